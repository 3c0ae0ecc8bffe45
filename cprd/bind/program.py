"""Whether the dynamic linker would load an object into a program, as far as the file says."""

from __future__ import annotations

import os
import shutil
import stat
import struct
from typing import TYPE_CHECKING, NamedTuple

from cprd.errors import CprdError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_PT_INTERP, _PT_NOTE = 3, 4
_DEPTH = 4  # scripts that are run by scripts


class Elf(NamedTuple):
    """The headers of an ELF file, as far as needed."""

    kind: tuple[int, int, int]  # class (32 or 64 bit), byte order, machine
    interpreter: bool  # whether a dynamic linker starts it
    notes: frozenset[bytes]  # the owners of its notes


def check(file: str, command: Sequence[str], preload: str) -> None:
    """Raises CprdError, which says why, when `file` (the program of `command`) starts without the
    object `preload`: static, set-user-ID, written in Go, made for another machine."""
    ours = read(preload)
    for program in _interpreters(file, command):
        _check_rights(program)
        elf = read(program)
        if elf is None:
            return  # a script in a way that the kernel does not know: its shell decides
        why = ""
        if not elf.interpreter:
            why = "it is statically linked, and no dynamic linker starts it"
        elif b"Go" in elf.notes:
            why = "it is written in Go, whose programs call the kernel without libc"
        elif ours is not None and elf.kind != ours.kind:
            why = "it is made for another machine than the object (32 and 64 bit?)"
        if why:
            raise CprdError(
                f"--bind cannot work for {program}: {why}; does it take LISTEN_FDS (run it without"
                " --bind), or a descriptor by option?"
            )


def _check_rights(program: str) -> None:
    found = os.stat(program)
    raised = (found.st_mode & stat.S_ISUID and found.st_uid != os.geteuid()) or (
        found.st_mode & stat.S_ISGID and found.st_gid != os.getegid()
    )
    if not raised and os.geteuid() != 0:
        try:
            raised = bool(os.getxattr(program, "security.capability"))
        except OSError:
            raised = False
    if raised:
        raise CprdError(
            f"--bind cannot work for {program}: it gains rights when it starts (set-user-ID,"
            " set-group-ID or file capabilities), and then LD_PRELOAD is ignored; start it as the"
            " user that it shall run as (the listeners are open already, port below 1024 or not)"
        )


def _interpreters(file: str, command: Sequence[str]) -> Iterator[str]:
    """`file`; for a script the interpreters, also those in $PATH after `env`."""
    rest = [file, *command[1:]]
    for _ in range(_DEPTH):
        program = rest[0]
        try:
            with open(program, "rb") as opened:
                line = opened.readline(256)
        except OSError:
            return
        if line.startswith(b"#!"):
            words = os.fsdecode(line[2:].strip()).split(None, 1)
            if not words:
                return
            rest = [words[0], *words[1:], *rest]
            continue
        yield program
        if os.path.basename(program) != "env":
            return
        following = [word for word in " ".join(rest[1:]).split() if not word.startswith("-")]
        following = [word for word in following if "=" not in word]
        found = shutil.which(following[0]) if following else None
        if found is None:
            return
        rest = [found, *following[1:]]


def read(path: str) -> Elf | None:
    """The headers of an ELF file; None for another file."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
            if head[:4] != b"\x7fELF" or len(head) < 52 or head[4] not in (1, 2):
                return None
            wide, order = head[4] == 2, "<" if head[5] == 1 else ">"
            machine = struct.unpack_from(f"{order}H", head, 18)[0]
            at = struct.unpack_from(f"{order}{'Q' if wide else 'I'}", head, 32 if wide else 28)[0]
            size, number = struct.unpack_from(f"{order}HH", head, 54 if wide else 42)
            file.seek(at)
            table = file.read(size * number)
            interpreter = False
            notes: set[bytes] = set()
            for i in range(number):
                entry = table[i * size : (i + 1) * size]
                kind = struct.unpack_from(f"{order}I", entry)[0]
                interpreter |= kind == _PT_INTERP
                if kind == _PT_NOTE:
                    form, where = (f"{order}QQQQ", 8) if wide else (f"{order}IIII", 4)
                    offset, _, _, length = struct.unpack_from(form, entry, where)
                    file.seek(offset)
                    notes.update(_owners(file.read(min(length, 1 << 16)), order))
    except (OSError, struct.error):
        return None
    return Elf((head[4], head[5], machine), interpreter, frozenset(notes))


def _owners(data: bytes, order: str) -> Iterator[bytes]:
    at = 0
    while at + 12 <= len(data):
        name, value, _ = struct.unpack_from(f"{order}III", data, at)
        yield data[at + 12 : at + 12 + name].rstrip(b"\0")
        at += 12 + (name + 3 & ~3) + (value + 3 & ~3)

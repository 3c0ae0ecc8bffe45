"""Which version a QEMU command is: all of it is run with -version, and the answer remembered by the
program's inode and mtime. A package upgrade changes both. That holds only for what the kernel
itself executes under that name: behind a script, or a wrapper that may look elsewhere (a chroot, a
container, sudo), the QEMU can be another one while nothing that we see changes. There it is asked
each time (some 20 ms)."""

from __future__ import annotations

import os
import re
import shutil
from typing import TYPE_CHECKING

from cprd.qemu.command import is_qemu
from cprd.qemu.failure import Refused

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cprd.qemu.command import Command

_VERSION = re.compile(r"version (\d+)\.(\d+)(?:\.(\d+))?")


def version_of(command: Command) -> tuple[int, int, int]:
    """Raises Refused when the command does not say."""
    key = _key(command)
    known = _recall(key)
    if known:
        return known
    version = _ask(command.words)
    if key:
        _remember(key, version)
    return version


def parse(text: str) -> tuple[int, int, int] | None:
    found = _VERSION.search(text)
    return (int(found[1]), int(found[2]), int(found[3] or 0)) if found else None


def _ask(words: list[str]) -> tuple[int, int, int]:
    import subprocess

    try:
        done = subprocess.run(
            [*words, "-version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=20,
            check=False,
        )
    except OSError as error:
        raise Refused(f"{words[0]}: {error.strerror}: cannot run the QEMU command") from None
    except subprocess.TimeoutExpired:
        raise Refused("the QEMU command with -version did not end within 20 s") from None
    version = parse(done.stdout)
    if version is None:
        said = " ".join((done.stderr or done.stdout).split())[:500]
        raise Refused(
            f"the QEMU command with -version did not say its version (exit {done.returncode}):"
            f" {said}"
        )
    return version


_TRANSPARENT = frozenset(("chrt", "ionice", "nice", "prlimit", "setpriv", "taskset"))
"""Wrappers that execute the next program of the same file system and environment, and no other."""


def forget(command: Command) -> None:
    """What was remembered has proved wrong, or may have: ask next time. Best effort."""
    key = _key(command).replace("\n", " ")
    if not key:
        return
    path = _file()
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            lines = [line for line in file if line.rstrip("\n").partition(" ")[2] != key]
        new = f"{path}.{os.getpid()}"
        with open(new, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(lines)
        os.rename(new, path)
    except OSError:
        pass


def _key(command: Command) -> str:
    """What the answer is remembered under; "" when the program's file does not tell the version."""
    program = command.words[command.program]
    wrappers = command.wrappers
    if not is_qemu(program) or not _are_transparent(wrappers):
        return ""
    path = shutil.which(program)
    if path is None:
        return ""
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"\x7fELF":
                return ""  # a script: what it executes may change and it stay the same
            there = os.fstat(file.fileno())
    except OSError:
        return ""
    words = "\0".join([*wrappers, os.path.realpath(path)])
    return f"{there.st_dev}:{there.st_ino}:{there.st_mtime_ns}:{words}"


def _are_transparent(wrappers: Sequence[str]) -> bool:
    """Whether all of them are known. A word among their arguments that could be run as well counts
    as another wrapper."""
    names = [
        os.path.basename(word)
        for at, word in enumerate(wrappers)
        if at == 0 or (not word.startswith("-") and shutil.which(word) is not None)
    ]
    return all(name in _TRANSPARENT for name in names)


def _file() -> str:
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("CACHE_DIRECTORY")
    if not base:
        base = "/var/cache" if os.geteuid() == 0 else os.path.expanduser("~/.cache")
    return os.path.join(base, "cprd", "qemu-versions")


def _recall(key: str) -> tuple[int, int, int] | None:
    if not key:
        return None
    try:
        with open(_file(), encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                version, _, rest = line.rstrip("\n").partition(" ")
                if rest == key.replace("\n", " "):
                    return parse(f"version {version}")
    except OSError:
        pass
    return None


def _remember(key: str, version: tuple[int, int, int]) -> None:
    """Best effort: it only saves time."""
    path = _file()
    try:
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        if os.path.exists(path) and os.path.getsize(path) > 1 << 16:
            os.unlink(path)
        line = f"{'.'.join(map(str, version))} " + key.replace("\n", " ") + "\n"
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.write(fd, line.encode("utf-8", "surrogateescape"))
        finally:
            os.close(fd)
    except OSError:
        pass

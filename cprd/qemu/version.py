"""Which version a QEMU command is: all of it is run with -version, and the answer remembered by the
program's inode and mtime. A package upgrade changes both; where the file cannot be told (a wrapper
that we do not know), it is asked each time (some 20 ms)."""

from __future__ import annotations

import os
import re
import shutil
from typing import TYPE_CHECKING

from cprd.qemu.failure import Refused

if TYPE_CHECKING:
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


def _key(command: Command) -> str:
    """What the answer is remembered under; "" when the program's file cannot be told."""
    program = command.words[command.program]
    wrappers = command.wrappers
    if any(os.path.basename(word) in ("chroot", "unshare", "nsenter", "env") for word in wrappers):
        return ""
    path = shutil.which(program)
    if path is None:
        return ""
    try:
        there = os.stat(path)
    except OSError:
        return ""
    words = "\0".join([*wrappers, os.path.realpath(path)])
    return f"{there.st_dev}:{there.st_ino}:{there.st_mtime_ns}:{words}"


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

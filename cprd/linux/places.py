"""Directories in which root may work by name: nobody else can change a step of the way there.

Who may write to a directory may put a link, or another directory, in the place of any name in it.
So root walks the way itself, each step by the descriptor of the step before.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque

_STEP = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_WORK = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_LINKS = 40  # as the kernel's own limit


def open_place(path: str, *, listed: bool = True) -> int:
    """A descriptor (the caller's) of the directory `path`, to work in; `listed`: to list, too.

    For root, raises OSError (EPERM) where another user may write, in `path` or on the way there. A
    sticky directory of root's counts as safe: root's own entries in there are. For everybody else
    the kernel's own checks are enough."""
    if os.geteuid() != 0:
        return os.open(path, _LIST if listed else _WORK)
    at = _walk(os.path.abspath(path))
    if not listed:
        return at
    try:
        return os.open(".", _LIST, dir_fd=at)
    finally:
        os.close(at)


def _walk(path: str) -> int:
    root, parts = "/", deque(path.split("/"))
    if path.startswith("/proc/") and len(parts) > 3 and parts[2].isdecimal() and parts[3] == "root":
        root = "/".join(parts.popleft() for _ in range(4))  # /proc/PID/root
    at = os.open(root, _WORK)
    links = 0
    try:
        _check(at, path)
        while parts:
            part = parts.popleft()
            if part in ("", "."):
                continue
            there = os.stat(part, dir_fd=at, follow_symlinks=False)
            if stat.S_ISLNK(there.st_mode) and there.st_uid == 0:
                links += 1
                if links > _LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                target = os.readlink(part, dir_fd=at)
                parts.extendleft(reversed(target.split("/")))
                if not target.startswith("/"):
                    continue
                below = os.open(root, _WORK)
            else:
                below = os.open(part, _STEP, dir_fd=at)
            os.close(at)
            at = below
            _check(at, path)
    except BaseException:
        os.close(at)
        raise
    return at


def _check(at: int, path: str) -> None:
    there = os.fstat(at)
    others = there.st_mode & (stat.S_IWOTH | (stat.S_IWGRP if there.st_gid else 0))
    if there.st_uid == 0 and (not others or there.st_mode & stat.S_ISVTX):
        return
    who = f"uid {there.st_uid}" if there.st_uid else "another user"
    raise OSError(
        errno.EPERM, f"{who} may change names there, so that root does nothing in it", path
    )

"""The files that a process has open, by the kernel's word (/proc/PID/fd): the inode behind a file
name, whatever lies at that name by now.

A file is a map: `ino`, `dev` (or `rdev` of a block device), `mnt` (the mount's id), `fs` (the type
of the file system), `size` in bytes and `mtime` in ns. Maps of the same file compare by
disks.is_same_file.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct

from cprd.linux import proc

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from typing import Any

    File = dict[str, Any]

_LOCK = struct.Struct("hhqqi")  # struct flock: type, whence, start, length, pid
_LOCKS = (100, 200)  # start and length of the bytes that QEMU locks (block/file-posix.c)


def boot_id() -> str:
    """The id of this boot of the kernel; an empty string when unreadable."""
    return proc.read("sys", "kernel/random/boot_id").decode().strip()


class OpenFiles:
    """The regular files and block devices that a process has open. Empty where the process is
    another user's."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        files = ((fd, _file(pid, fd, link)) for fd, link in proc.files(pid))
        self._files = [(fd, found) for fd, found in files if found]
        self._mounts = _mounts(pid) if self._files else {}
        self._named: set[int] = set()  # descriptors that a name has explained

    def find(self, name: str) -> list[File]:
        """The files that a process may mean by a file name: a single one as a rule. For a name that
        leads to no open file any more (renamed, replaced, /dev/fdset/N): every open file without a
        name so far, so ask for those names last. Without any: an empty list."""
        at = self.at(name)
        found = [(fd, file) for fd, file in self._files if at and _is_one(file, at)]
        if found:
            self._named.update(fd for fd, _ in found)
            return [self._mounted(*found[0])]
        return [self._mounted(*found) for found in self._files if found[0] not in self._named]

    def has(self, name: str) -> bool:
        """Whether the process has the file open that lies at `name` now."""
        at = self.at(name)
        return bool(at) and any(_is_one(file, at) for _, file in self._files)

    def at(self, name: str) -> File:
        """The file that lies at a name in the root and the working directory of the process; an
        empty map for none."""
        name = name.removeprefix("file:")
        where = "root" if name.startswith("/") else "cwd/"
        try:
            return _described(os.stat(f"/proc/{self.pid}/{where}{name}"))
        except (OSError, ValueError):
            return {}

    def _mounted(self, fd: int, file: File) -> File:
        """The file, with its mount."""
        mount = _mount_id(self.pid, fd)
        return {**file, "mnt": mount, "fs": self._mounts.get(mount, "")}


def taken_by_others(pid: int) -> str:
    """The path of an image on which another process has a QEMU's lock, while the QEMU `pid` has let
    go of its own; an empty string for none. For a QEMU whose images are inactive: to activate such
    an image would fail."""
    for fd, link in proc.files(pid):
        info = proc.read(pid, f"fdinfo/{fd}") if _has_path(link) else b""
        try:
            if info and b"\nlock:" not in info and _is_locked(f"/proc/{pid}/fd/{fd}"):
                return link
        except OSError:
            continue
    return ""


def _has_path(link: str) -> bool:
    return link.startswith("/") and not link.startswith("/memfd:")


def _file(pid: int, fd: int, link: str) -> File:
    try:
        return _described(os.stat(f"/proc/{pid}/fd/{fd}")) if _has_path(link) else {}
    except OSError:
        return {}


def _is_locked(path: str) -> bool:
    if not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISBLK(mode):
        return False
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        asked = _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, *_LOCKS, 0)
        found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked)
        return bool(_LOCK.unpack(found)[0] != fcntl.F_UNLCK)
    finally:
        os.close(fd)


def _is_one(one: File, other: File) -> bool:
    """For files that are there at the same moment."""
    if "rdev" in one:
        return bool(one["rdev"] == other.get("rdev"))
    return bool(one["ino"] == other.get("ino") and one["dev"] == other.get("dev"))


def _described(found: os.stat_result) -> File:
    if stat.S_ISBLK(found.st_mode):
        return {"rdev": found.st_rdev}
    if not stat.S_ISREG(found.st_mode):
        return {}
    return {
        "ino": found.st_ino,
        "dev": found.st_dev,
        "size": found.st_size,
        "mtime": found.st_mtime_ns,
    }


def _mount_id(pid: int, fd: int) -> int:
    said = (line for line in proc.lines(pid, f"fdinfo/{fd}") if line.startswith("mnt_id:"))
    return next((int(line[7:]) for line in said), -1)


def _mounts(pid: int) -> dict[int, str]:
    """The type of the file system by the mount's id."""
    rows = [line.partition(" - ") for line in proc.lines(pid, "mountinfo")]
    return {int(head.split()[0]): tail.split()[0] for head, _, tail in rows if tail}

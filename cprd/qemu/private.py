"""A directory for the sockets of one hand-over, beside the VM's own monitor: what sees that one (a
QEMU in a chroot, another uid) sees ours as well, and nobody else can enter it.

What a killed helper has left there goes with the next hand-over: each directory is locked by who
uses it, so that nobody takes one away from a helper that lives."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import time
from contextlib import suppress

from cprd.errors import LimitExceeded
from cprd.qemu.failure import Refused
from cprd.qemu.process import Process

MARK = "untouched"
"""The name of the file that says: the new QEMU of an upgrade was never told to run. It counts as
long as the old one lives, and tells which that is."""

_SUN_PATH = 107
_NAME = re.compile(r"\.cprd-[0-9a-f]{8}")
_YOUNG = 60.0  # s for which a directory is let alone, locked or not: its maker may just have begun


class PrivatePlace:
    """Owns the directory and what is in it; close() removes both."""

    def __init__(self, beside: str, uid: int = -1) -> None:
        """`beside`: the path of a socket. `uid`: whose QEMU it is for (-1: ours). Raises
        Refused."""
        parent = os.path.dirname(os.path.abspath(beside))
        sweep(parent)
        self.path = os.path.join(parent, f".cprd-{os.urandom(4).hex()}")
        try:
            os.mkdir(self.path, 0o700)
            # From here on by this descriptor: whose QEMU it is may own the directory above, and put
            # a link in our place; what we do as root there must not reach elsewhere.
            self._fd = os.open(self.path, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with suppress(OSError):  # (a file system without locks: then nobody sweeps)
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Refused(
                f"{parent}: {error.strerror}: our sockets lie beside the QEMU's monitor, so that"
                " directory must be writable"
            ) from None
        try:
            self._uid = uid if uid not in (-1, os.geteuid()) and os.geteuid() == 0 else -1
            if self._uid >= 0:
                if os.fstat(self._fd).st_uid != 0:
                    raise Refused(f"{self.path}: somebody put another directory in its place")
                os.chown(self._fd, self._uid, -1)
        except BaseException:
            self.close()
            raise

    def at(self, name: str) -> str:
        path = os.path.join(self.path, name)
        if len(os.fsencode(path)) > _SUN_PATH:
            self.close()
            raise LimitExceeded(
                f"{path}: longer than the {_SUN_PATH} bytes of a socket's address: put the QEMU's"
                " monitor into a directory with a shorter name"
            )
        return path

    def listen(self, name: str) -> socket.socket:
        """A listening socket there, the caller's."""
        self.at(name)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(f"/proc/self/fd/{self._fd}/{name}")
            if self._uid >= 0:
                os.chown(name, self._uid, -1, dir_fd=self._fd, follow_symlinks=False)
            sock.listen(1)
        except BaseException:
            sock.close()
            raise
        return sock

    def create(self, name: str, said: str = "") -> str:
        """A file there, and what is in it; its path."""
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=self._fd)
        try:
            os.write(fd, said.encode())
        finally:
            os.close(fd)
        return os.path.join(self.path, name)

    def remove(self, name: str) -> None:
        os.unlink(name, dir_fd=self._fd)

    def close(self, *, keep: str = "") -> None:
        """Harmless again, and when somebody removed it. A file of the name `keep` stays, and so
        does the directory then."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        with suppress(OSError):
            for name in os.listdir(fd):
                if name != keep:
                    os.unlink(name, dir_fd=fd)
        os.close(fd)
        with suppress(OSError):
            os.rmdir(self.path)


def sweep(parent: str) -> None:
    """Remove what killed helpers have left in this directory. Best effort."""
    try:
        within = os.open(parent, os.O_DIRECTORY | os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        for name in os.listdir(within):
            if _NAME.fullmatch(name):
                with suppress(OSError):
                    _sweep_one(within, name)
    except OSError:
        pass
    finally:
        os.close(within)


def _sweep_one(within: int, name: str) -> None:
    fd = os.open(name, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=within)
    try:
        if time.time() - os.fstat(fd).st_mtime < _YOUNG:
            return
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: its helper lives
        if _counts(fd):
            return
        for entry in os.listdir(fd):
            os.unlink(entry, dir_fd=fd)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=within)


def _counts(fd: int) -> bool:
    """Whether there is a mark, and a hold may still hang on it."""
    try:
        mark = os.open(MARK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd)
    except FileNotFoundError:
        return False
    try:
        record = json.loads(os.read(mark, 4096))
    except ValueError:
        return True  # not ours to judge
    finally:
        os.close(mark)
    old = Process.find(record) if isinstance(record, dict) else None
    if old is None:
        return False
    old.close()
    return True


def remove_mark(mark: str, uid: int) -> None:
    """Remove a mark that was kept for `uid`, and its directory. Best effort; only what is one of
    ours by its name and its owner, for `mark` is somebody's word."""
    place, name = os.path.split(mark)
    if name != MARK or not _NAME.fullmatch(os.path.basename(place)):
        return
    with suppress(OSError):
        fd = os.open(place, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_uid != uid:
                return
            for left in os.listdir(fd):
                os.unlink(left, dir_fd=fd)
        finally:
            os.close(fd)
        os.rmdir(place)

"""A directory for the sockets of one hand-over, beside the VM's own monitor: what sees that one (a
QEMU in a chroot, another uid) sees ours as well, and nobody else can enter it."""

from __future__ import annotations

import os
import re
import socket
from contextlib import suppress

from cprd.errors import LimitExceeded
from cprd.qemu.failure import Refused

_SUN_PATH = 107
MARK = "untouched"  # the file that says: the new QEMU of an upgrade was never told to run


class PrivatePlace:
    """Owns the directory and what is in it; close() removes both."""

    def __init__(self, beside: str, uid: int = -1) -> None:
        """`beside`: the path of a socket. `uid`: whose QEMU it is for (-1: ours). Raises
        Refused."""
        parent = os.path.dirname(os.path.abspath(beside))
        self.path = os.path.join(parent, f".cprd-{os.urandom(4).hex()}")
        try:
            os.mkdir(self.path, 0o700)
            # From here on by this descriptor: whose QEMU it is may own the directory above, and put
            # a link in our place; what we do as root there must not reach elsewhere.
            self._fd = os.open(self.path, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
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

    def create(self, name: str) -> str:
        """An empty file there; its path."""
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        os.close(os.open(name, flags, 0o600, dir_fd=self._fd))
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


def sweep(mark: str, uid: int) -> None:
    """Remove a mark that was kept for `uid`, and its directory. Best effort; only what is one of
    ours by its name and its owner, for `mark` is somebody's word."""
    place, name = os.path.split(mark)
    if name != MARK or not re.fullmatch(r"\.cprd-[0-9a-f]{8}", os.path.basename(place)):
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

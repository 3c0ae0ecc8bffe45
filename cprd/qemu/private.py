"""The private directory of a hand-over, and what killed helpers left in its place.

The directory lies beside the VM's own monitor: a QEMU in a chroot or of another uid sees it there,
and nobody else can enter. All in it is made as the uid of the QEMU (linux/identity.py), by the
descriptor of the directory. A user of a directory locks it. The next hand-over removes the
directories that killed helpers of the same uid have left.
"""

from __future__ import annotations

import fcntl
import os
import time

from cprd.errors import LimitExceeded
from cprd.linux.places import open_place
from cprd.qemu.errors import Refused
from cprd.qemu.process import Process

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    import socket

    from cprd.qemu.command import Command

MARK = "untouched"
"""The name of a file: as long as it exists, the new QEMU of an upgrade was never told to run. The
file has the record of the old QEMU, and counts while the old QEMU lives."""

_SUN_PATH = 107
_YOUNG = 60.0  # s for which a directory is let alone, locked or not: its maker may just have begun
_BELOW = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class PrivateDirectory:
    """Owns the directory and its files; close() removes all."""

    def __init__(self, beside: str) -> None:
        """`beside`: the path of a socket. Raises Refused."""
        parent = os.path.dirname(os.path.abspath(beside))
        self.keep = ""  # the name of a file that outlives close(), and the directory with it
        self._name = f".cprd-{os.urandom(4).hex()}"
        self.path = os.path.join(parent, self._name)
        self._fd = self._parent = -1
        try:
            self._parent = open_place(parent)
            sweep(self._parent)
            os.mkdir(self._name, 0o700, dir_fd=self._parent)
            self._fd = os.open(self._name, _BELOW, dir_fd=self._parent)
            if os.fstat(self._fd).st_uid != os.geteuid():
                raise PermissionError(1, "somebody put another directory in the place of ours")
            try:  # (a file system without locks: then nobody sweeps)
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                pass
        except OSError as error:
            for fd in (self._fd, self._parent):
                if fd >= 0:
                    os.close(fd)
            self._fd = self._parent = -1
            raise Refused(
                f"{parent}: {error.strerror}: our sockets lie beside the QEMU's monitor, so that"
                " directory must be writable for the QEMU's uid, and for no other if that is root"
            ) from None

    def at(self, name: str) -> str:
        """The path of a file in the directory. Raises LimitExceeded (too long for a socket)."""
        path = os.path.join(self.path, name)
        if len(os.fsencode(path)) > _SUN_PATH:
            self.close()
            raise LimitExceeded(
                f"{path}: longer than the {_SUN_PATH} bytes of a socket's address: put the QEMU's"
                " monitor into a directory with a shorter name"
            )
        return path

    def listen(self, name: str) -> socket.socket:
        """A listening socket of that name, the caller's."""
        import socket

        self.at(name)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(f"/proc/self/fd/{self._fd}/{name}")
            sock.listen(1)
        except BaseException:
            sock.close()
            raise
        return sock

    def create(self, name: str, said: str = "") -> str:
        """Create a file with that content; returns its path."""
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=self._fd)
        try:
            os.write(fd, said.encode())
        finally:
            os.close(fd)
        return os.path.join(self.path, name)

    def remove(self, name: str) -> None:
        os.unlink(name, dir_fd=self._fd)

    def __enter__(self) -> PrivateDirectory:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove all, but for `keep` and then the directory. Safe to repeat."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        try:
            for name in os.listdir(fd):
                if name != self.keep:
                    os.unlink(name, dir_fd=fd)
        except OSError:
            pass
        os.close(fd)
        try:
            os.rmdir(self._name, dir_fd=self._parent)
        except OSError:
            pass
        os.close(self._parent)


def beside(command: Command) -> str:
    """A path beside which the private directory for COMMAND's QEMU belongs."""
    runtime = "/run" if os.geteuid() == 0 else os.environ.get("XDG_RUNTIME_DIR") or "/tmp"
    return command.monitor_path() or os.path.join(runtime, "no-monitor")


def sweep(within: int) -> None:
    """Remove the directories that killed helpers of our uid left in the directory `within` (a
    descriptor, borrowed). Best effort."""
    try:
        for name in os.listdir(within):
            if _is_name(name):
                try:
                    _sweep_one(within, name)
                except OSError:
                    pass
    except OSError:
        pass


def _is_name(name: str) -> bool:
    """Whether a directory has a name of our making."""
    return len(name) == 14 and name[:6] == ".cprd-" and set(name[6:]) <= set("0123456789abcdef")


def _sweep_one(within: int, name: str) -> None:
    fd = os.open(name, _BELOW, dir_fd=within)
    try:
        there = os.fstat(fd)
        if there.st_uid != os.geteuid() or time.time() - there.st_mtime < _YOUNG:
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
    """Whether there is a mark of a QEMU that lives: a hold may still depend on the mark."""
    try:
        mark = os.open(MARK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd)
    except FileNotFoundError:
        return False
    import json

    try:
        record = json.loads(os.read(mark, 4096))
    except (ValueError, RecursionError):
        return True  # not ours to judge
    finally:
        os.close(mark)
    return Process.lives(record)


def remove_mark(mark: str) -> None:
    """Remove a mark that a hold of ours names, and its directory. Best effort."""
    is_marked(mark, remove=True)


def is_marked(mark: str, *, remove: bool = False) -> bool:
    """Whether a mark that a hold of ours names is there, in a directory of ours. `mark` is a claim
    of the saver: only a directory of our naming and of our uid is touched, in a place where nobody
    else can have put it."""
    place, name = os.path.split(mark)
    parent, own = os.path.split(place)
    if name != MARK or not _is_name(own):
        return False
    try:
        within = open_place(parent)
        try:
            fd = os.open(own, _BELOW, dir_fd=within)
            try:
                if os.fstat(fd).st_uid != os.geteuid():
                    return False
                found = MARK in os.listdir(fd)
                for left in os.listdir(fd) if remove else ():
                    os.unlink(left, dir_fd=fd)
            finally:
                os.close(fd)
            if remove:
                os.rmdir(own, dir_fd=within)
            return found
        finally:
            os.close(within)
    except OSError:
        pass
    return False

"""A listening socket of the daemon's own, where no service manager passes a socket."""

from __future__ import annotations

import os
import socket
import stat

from cprd.errors import Unavailable
from cprd.linux.rights import take_no_rights

BACKLOG = 128  # a client behind a loop of connect() waits for as many


def listen(path: str, *, private: bool) -> socket.socket:
    """Listen at `path`; `private`: for the own uid only. The caller owns the socket. Raises
    Unavailable, and leaves the socket of a living daemon alone."""
    _prepare_directory(path, private)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        _remove_stale(path)
        old = os.umask(0o177 if private else 0o111)
        try:
            sock.bind(path)
        finally:
            os.umask(old)
        take_no_rights(sock)  # nor do the connections, from the first on
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise Unavailable(f"cannot listen at {path}: {error.strerror or error}") from None
    return sock


class SocketFile:
    """The file of the daemon's own socket, to be removed at the end."""

    def __init__(self, path: str) -> None:
        """Remember the file at `path`."""
        self.path = path
        self.identity = (0, 0)  # device and inode
        try:
            self.identity = _identity(path)
        except OSError:
            pass  # removed meanwhile

    def unlink(self) -> None:
        """Remove the file, unless another daemon has made a socket of its own at the path."""
        try:
            if _identity(self.path) == self.identity:
                os.unlink(self.path)
        except OSError:
            pass


def _identity(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def _prepare_directory(path: str, private: bool) -> None:
    directory = os.path.dirname(path)
    if directory and not os.path.isdir(directory):
        try:
            os.makedirs(directory, 0o700 if private else 0o755)
        except OSError as error:
            raise Unavailable(f"cannot make {directory}: {error.strerror}") from None


def _remove_stale(path: str) -> None:
    """Remove the socket of an ended daemon. Raises Unavailable for anything else at `path`."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise Unavailable(f"{path} is in the way: it is not a socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            os.unlink(path)
            return
        except BlockingIOError:
            pass
    raise Unavailable(f"another cprd serves {path}")

"""New listeners for `cprctl run`: sockets bound, and files that a failed start takes away again."""

from __future__ import annotations

import errno
import os
import socket
import stat
import time
from typing import TYPE_CHECKING

from cprd.errors import CprdError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cprd.cli.addresses import Listen

_FREEBIND = ((socket.IPPROTO_IP, 15), (socket.IPPROTO_IPV6, 78))  # IP_FREEBIND, IPV6_FREEBIND


class Opened:
    """Listeners made by this start. Owns the descriptors until `take`, the files until `keep`."""

    def __init__(self) -> None:
        self._fds: dict[tuple[str, int], int] = {}
        self._files: list[tuple[str, int, int]] = []  # path, device, inode

    def open(self, asked: Iterable[Listen], *, patience: float = 0.0) -> None:
        """Bind a socket for each. Port 0 comes last, so that the kernel gives no fixed port away.
        `patience`: seconds for an address in use to become free.

        Raises CprdError; `undo` then removes the others."""
        end = time.monotonic() + patience
        for listen in sorted(asked, key=lambda each: not each.path and each.port == 0):
            while True:
                try:
                    self._fds[listen.key] = self._open(listen)
                    break
                except OSError as error:
                    if error.errno != errno.EADDRINUSE or time.monotonic() >= end:
                        raise CannotListen(listen, error) from None
                time.sleep(0.01)

    def __contains__(self, key: tuple[str, int]) -> bool:
        """Whether a descriptor was made for `key`, and not taken yet."""
        return key in self._fds

    def take(self, key: tuple[str, int]) -> int:
        """The descriptor made for `key`, which the caller owns from now on."""
        return self._fds.pop(key)

    def keep(self) -> None:
        """Leave the files in place: the hold needs them."""
        self._files.clear()

    def undo(self) -> None:
        """Close the descriptors that were not taken, and remove the new files."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
        for path, device, inode in self._files:
            remove(path, device, inode)
        self._files.clear()

    def _open(self, listen: Listen) -> int:
        sock = socket.socket(listen.family, listen.kind)
        try:
            if listen.family == socket.AF_UNIX:
                self._bind_unix(sock, listen)
            else:
                _bind(sock, listen)
            if listen.kind != socket.SOCK_DGRAM:
                sock.listen(listen.backlog)
        except BaseException:
            sock.close()
            raise
        return sock.detach()

    def _bind_unix(self, sock: socket.socket, listen: Listen) -> None:
        if not listen.is_file:
            sock.bind(listen.path)
            return
        remove_dead(listen.path, listen.kind)
        before = os.umask(0o777 & ~listen.mode) if listen.mode is not None else -1
        try:
            sock.bind(listen.path)
        finally:
            if before >= 0:
                os.umask(before)
        made = _set_rights(sock.fileno(), listen._replace(mode=None))
        self._files.append((listen.path, made.st_dev, made.st_ino))  # nobody connects yet


class CannotListen(CprdError):
    """A --listen that the kernel refuses, and why."""

    def __init__(self, listen: Listen, error: OSError) -> None:
        super().__init__(f"cannot listen on {listen.text}: {error.strerror or error}")
        self.listen = listen
        self.in_use = error.errno == errno.EADDRINUSE


def _bind(sock: socket.socket, listen: Listen) -> None:
    if listen.kind == socket.SOCK_STREAM:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if listen.reuseport:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if listen.device:
        device = os.fsencode(listen.device) + b"\0"
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)
    if listen.freebind:
        sock.setsockopt(*_FREEBIND[listen.family == socket.AF_INET6], 1)
    if listen.family == socket.AF_INET6:
        # Whatever net.ipv6.bindv6only says. For an address of IPv4 (::ffff:...) it has to be off.
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, listen.v6only)
        sock.bind((listen.host, listen.port, 0, listen.scope))
    else:
        sock.bind((listen.host, listen.port))


def adjust(fd: int, listen: Listen) -> None:
    """Apply the options of a --listen to a held socket: mode, owner, backlog, SO_REUSEPORT.

    Raises CprdError."""
    try:
        if listen.is_file and (listen.mode is not None or listen.owner):
            _set_rights(fd, listen)
        sock = socket.socket(fileno=fd)
        try:
            if listen.kind != socket.SOCK_DGRAM:
                sock.listen(listen.backlog)
            if listen.reuseport:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        finally:
            sock.detach()
    except OSError as error:
        raise CprdError(f"--listen {listen.text}: {error.strerror or error}") from None


def _set_rights(fd: int, listen: Listen) -> os.stat_result:
    """Give the file of a UNIX socket mode and owner. Returns facts of the file. Raises OSError."""
    from cprd.linux.sockets import file_of

    file = file_of(fd, listen.path)
    try:
        found, itself = os.fstat(file), f"/proc/self/fd/{file}"
        if listen.mode is not None and stat.S_IMODE(found.st_mode) != listen.mode:
            os.chmod(itself, listen.mode)
        is_owner = (found.st_uid, found.st_gid)
        wanted = listen.owner or (-1, -1)
        if any(w not in (-1, h) for w, h in zip(wanted, is_owner, strict=True)):
            os.chown(itself, *wanted)
        return found
    finally:
        os.close(file)


def remove_dead(path: str, kind: int) -> None:
    """Remove a socket file where nobody listens any more; leave anything else alone.

    Raises OSError EADDRINUSE when somebody listens, without waiting for an answer."""
    from cprd.linux.sockets import somebody_at

    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise OSError(errno.EADDRINUSE, "a file is there that is no socket")
    if somebody_at(path, kind):
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    remove(path, found.st_dev, found.st_ino)


def remove(path: str, device: int, inode: int) -> None:
    """Remove the file at `path` if it is still that inode."""
    folder, name = os.path.split(path)
    try:
        # By one descriptor: whoever may write above must not lead the removal elsewhere.
        at = os.open(folder or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            found = os.stat(name, dir_fd=at, follow_symlinks=False)
            if (found.st_dev, found.st_ino) == (device, inode):
                os.unlink(name, dir_fd=at)
        finally:
            os.close(at)
    except OSError:
        pass

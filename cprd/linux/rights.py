"""Sending and receiving descriptors with SCM_RIGHTS, with the errors of the kernel made loud.

Source of the limits: unix(7) and cmsg(3); SCM_MAX_FD is 253; what is in flight counts against the
sending *uid* and the soft RLIMIT_NOFILE of the sending process (ETOOMANYREFS).
"""

from __future__ import annotations

import _socket as socket  # without the enums of socket, which take 5 ms to import
import errno
import fcntl
import os
import sys
from array import array
from collections.abc import Iterable, Sequence

from cprd.errors import LimitExceeded
from cprd.linux.nofile import hard_limit

SCM_MAX_FD = 253
SO_PEEK_OFF = 42  # asm-generic/socket.h; the socket module does not name it
_SPACE = socket.CMSG_SPACE(SCM_MAX_FD * 4)
_NOSIGNAL, _CLOEXEC, _DONTWAIT = socket.MSG_NOSIGNAL, socket.MSG_CMSG_CLOEXEC, socket.MSG_DONTWAIT
_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT
_SEQPACKET_NONBLOCK = socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK
_RIGHTS = (socket.SOL_SOCKET, socket.SCM_RIGHTS)
_SO_PASSCRED, _SO_PASSSEC, _SO_PASSPIDFD, _SO_PASSRIGHTS = 16, 34, 76, 83  # asm-generic/socket.h
_OLD_KERNEL = bool(os.environ.get("CPRD_NO_PASSRIGHTS"))  # for tests: as before Linux 6.16


def send(
    sock: socket.SocketType, payload: bytes, fds: Sequence[int] = (), flags: int = _DONTWAIT
) -> None:
    """Send one message with at most 253 descriptors, which stay the caller's.

    With too many in flight the soft RLIMIT_NOFILE is raised to the hard one for the moment of
    sending and put back. Raises LimitExceeded (it says what to raise) or OSError."""
    flags = int(flags) | _NOSIGNAL
    if not fds:
        sock.send(payload, flags)
        return
    ancillary = [(*_RIGHTS, array("i", fds))]
    try:
        sock.sendmsg([payload], ancillary, flags)
    except OSError as error:
        if error.errno != errno.ETOOMANYREFS:
            raise
        _send_with_hard_limit(sock, payload, ancillary, flags)


def _send_with_hard_limit(
    sock: socket.SocketType,
    payload: bytes,
    ancillary: list[tuple[int, int, array[int]]],
    flags: int,
) -> None:
    with hard_limit() as (_, hard):
        try:
            sock.sendmsg([payload], ancillary, flags)
        except OSError as error:
            if error.errno != errno.ETOOMANYREFS:
                raise
            raise LimitExceeded(
                f"too many descriptors in flight for uid {os.geteuid()} (ETOOMANYREFS): all that"
                " its processes have parked counts against RLIMIT_NOFILE, whose hard limit is"
                f" {hard} here; raise the hard limit of the saving process (LimitNOFILE=,"
                " ulimit -Hn), or drop holds of this uid (cprctl list)"
            ) from None


def seqpacket_pair() -> tuple[socket.SocketType, socket.SocketType]:
    """A pair of sockets that do not block, owned by the caller. (socket.socketpair makes each end
    twice, in five times the time.)"""
    return socket.socketpair(socket.AF_UNIX, _SEQPACKET_NONBLOCK)


def receive(sock: socket.SocketType, size: int, flags: int = 0) -> tuple[bytes, array[int], int]:
    """Receive (or, with MSG_PEEK, copy) one message: payload, descriptors, message flags.

    The caller owns the descriptors (close-on-exec is set), also when the flags say that some are
    missing (MSG_CTRUNC) or that the payload was cut (MSG_TRUNC): that must be looked at."""
    data, ancillary, seen, _ = sock.recvmsg(size, _SPACE, int(flags) | _CLOEXEC)
    fds: array[int] = array("i")
    for level, kind, raw in ancillary:
        if (level, kind) == _RIGHTS:
            fds.frombytes(raw[: len(raw) - len(raw) % 4])
    return data, fds, seen


def peek(sock: socket.SocketType, size: int) -> tuple[bytes, array[int], int]:
    """`receive` a copy of a message; nothing is consumed. Does not block (BlockingIOError)."""
    try:
        return receive(sock, size, _PEEK)
    except ConnectionResetError:  # said once when the sender left something unread
        return receive(sock, size, _PEEK)


def queued(sock: socket.SocketType | int) -> int:
    """Bytes in the queue of a socket, of all messages (SIOCINQ), without reading them."""
    return int.from_bytes(fcntl.ioctl(sock, 0x541B, b"\0" * 4), sys.byteorder)


def unread(sock: socket.SocketType | int) -> int:
    """Memory of the messages that the peer of a socket has not read yet (SIOCOUTQ)."""
    return int.from_bytes(fcntl.ioctl(sock, 0x5411, b"\0" * 4), sys.byteorder)


def take_no_rights(sock: socket.SocketType) -> bool:
    """Let no descriptor into the queue of a socket: sending one fails with EPERM from now on.
    Returns False where the kernel cannot do so (before Linux 6.16). Nothing else that a message may
    carry (credentials, labels, pidfds) is received, either."""
    for option in (_SO_PASSCRED, _SO_PASSSEC, _SO_PASSPIDFD):
        try:
            sock.setsockopt(socket.SOL_SOCKET, option, 0)
        except OSError:
            pass  # unknown to this kernel
    return pass_rights(sock, False)


def pass_rights(sock: socket.SocketType, to: bool) -> bool:
    """Let descriptors into the queue of a socket, or none. Returns False where the kernel cannot do
    so (before Linux 6.16)."""
    if _OLD_KERNEL:
        return False
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, to)
    except OSError:
        return False
    return True


def has_taken_no_rights(sock: socket.SocketType) -> bool:
    """Whether no descriptor can have come into the queue of an accepted socket: the listener took
    none by the time of connect()."""
    if _OLD_KERNEL:
        return False
    try:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS) == 0
    except OSError:
        return False


def scm_fds(fd: int) -> int:
    """Count the descriptors queued in a socket (fdinfo, Linux 5.6) without reading it; -1 for what
    is no AF_UNIX socket. `fd` is borrowed. Does not wait for the socket's lock."""
    info = os.open(f"/proc/self/fdinfo/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        said = os.read(info, 4096)
    finally:
        os.close(info)
    _, _, count = said.partition(b"scm_fds:")
    return int(count.split(None, 1)[0]) if count else -1


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that the caller owns; neighbours in one call (10,000 take under 1 ms
    beside what the files themselves cost)."""
    first = last = -2
    for fd in sorted(fds):
        if fd != last + 1:
            if last >= 0:
                os.closerange(first, last + 1)
            first = fd
        last = fd
    if last >= 0:
        os.closerange(first, last + 1)

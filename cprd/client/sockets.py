"""A client's socket: connect, send, receive. The system calls between two waits of a driver."""

from __future__ import annotations

import _socket as socket  # as in rights
import errno
import fcntl
import os
import resource  # noqa: F401 - for nofile.py: without a descriptor left nothing can be imported
import struct

from cprd.client.exchange import Answer, Lost
from cprd.errors import CprdError, Denied, Unavailable
from cprd.linux.nofile import hard_limit, none_left
from cprd.linux.rights import receive, send
from cprd.protocol import messages

_CTRUNC, _DONTWAIT, _TRUNC = socket.MSG_CTRUNC, socket.MSG_DONTWAIT, socket.MSG_TRUNC
_TIMEVAL = struct.Struct("ll")
_LOST = (BrokenPipeError, ConnectionResetError, ConnectionAbortedError)


def open_socket(path: str, seconds: float) -> socket.socket:
    """A connected socket, owned by the caller. Blocks for so many seconds at most, while the
    backlog is full. Raises Unavailable, Denied, LimitExceeded."""
    sock = _new_socket()
    try:
        # Not settimeout(): a socket that does not block is refused at once by a full backlog.
        micros = max(1, int(seconds * 1e6))
        timeval = _TIMEVAL.pack(micros // 1_000_000, micros % 1_000_000)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        sock.connect(path)
        # O_APPEND means nothing to a socket, and copies share the flag: packing knows them by it.
        fcntl.fcntl(sock.fileno(), fcntl.F_SETFL, os.O_APPEND)
    except OSError as error:
        sock.close()
        if error.errno in (errno.EACCES, errno.EPERM):
            raise Denied(f"no permission to connect to {path}") from None
        if error.errno == errno.EAGAIN:
            raise Unavailable(f"nobody accepts at {path} within {seconds:.3g} s") from None
        from cprd.linux import stale

        why = error.strerror or str(error)
        raise Unavailable(
            f"no cprd answers at {path} ({why}): start it (systemctl start cprd.socket, or cprd"
            f" --socket PATH), or name its socket with $CPRD_SOCKET{stale.hint(path, error.errno)}"
        ) from None
    return sock


def _new_socket() -> socket.socket:
    try:
        return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError as error:
        # A program that has more open than the soft limit allows (lowered since) wants to save
        # all the same.
        with hard_limit() as (soft, hard):
            if soft != hard:
                try:
                    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                except OSError:
                    pass
        raise none_left("to connect to cprd with", error) from None


def send_now(sock: socket.socket, data: bytes) -> None:
    """Send a message. Raises Lost, BlockingIOError; the refusal of a daemon that has hung up."""
    try:
        send(sock, data)
    except _LOST:
        try:
            answer = receive_now(sock)
        except OSError:
            raise Lost from None
        answer.checked()
        raise Lost from None


def receive_now(sock: socket.socket, room: bool = False) -> Answer:
    """An answer. Raises Lost, Garbled (what follows is lost, too), BlockingIOError.

    `room`: with the soft RLIMIT_NOFILE at the hard one meanwhile."""
    if room:
        with hard_limit():
            return receive_now(sock)
    try:
        try:
            data, fds, seen = receive(sock, messages.MAX_ANSWER + 1, _DONTWAIT)
        except ConnectionResetError:  # said once when the daemon left something unread
            data, fds, seen = receive(sock, messages.MAX_ANSWER + 1, _DONTWAIT)
    except _LOST:
        raise Lost from None
    answer = Answer(fds)
    answer.cut = bool(seen & _CTRUNC)
    try:
        if not data and not fds:
            raise Lost
        if seen & _TRUNC:
            raise messages.Garbled(f"an answer longer than {messages.MAX_ANSWER} bytes")
        answer.number, said = messages.parse_answer(data)
    except BaseException:
        answer.close()
        raise
    if isinstance(said, CprdError):
        answer.error = said
    else:
        answer.fields = said
    return answer


def is_lost(sock: socket.socket) -> bool:
    """Whether the daemon has hung up. Consumes nothing, and does not block."""
    try:
        return not sock.recv(1, socket.MSG_PEEK | _DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True

"""A client's connection, without a loop of its own: what both clients share of opening, sending and
receiving, and of telling what may be tried again."""

from __future__ import annotations

import errno
import os
import socket
import struct

from cprd import wire
from cprd.errors import Denied, LimitExceeded, ProtocolError, Unavailable
from cprd.paths import default_socket
from cprd.rights import close_all, hard_limit, receive, send
from cprd.verbs import Answer, Call

RETRY_FOR = 15.0  # s that a lost daemon is waited for (it may be restarting)
GIVE_BACK = 1.0  # the same when a claim is only given back: its process's end says so as well
RETRY_EVERY = 0.05
HELLOS = 6  # tries until a cprd is believed not to want us: each may have met one that was killed
SERVED = 1.0  # s after which a connection that is lost had not been refused

_TIMEVAL = struct.Struct("ll")

LOST = (BrokenPipeError, ConnectionResetError, ConnectionAbortedError)


class Lost(Exception):
    """The connection ended; a request that carries a nonce may be said again on another one."""


def open_socket(path: str) -> socket.socket:
    """A connected socket, which the caller owns; it blocks. Raises Unavailable, Denied,
    LimitExceeded."""
    sock = _new_socket()
    try:
        # Not settimeout(): a socket that does not block is refused at once by a full backlog.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(int(wire.MUTE), 0))
        sock.connect(path)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(0, 0))
    except OSError as error:
        sock.close()
        if error.errno in (errno.EACCES, errno.EPERM):
            raise Denied(f"no permission to connect to {path}") from None
        if error.errno == errno.EAGAIN:
            raise Unavailable(f"nobody accepts at {path} within {wire.MUTE:g} s") from None
        why = error.strerror or str(error)
        raise Unavailable(
            f"no cprd answers at {path} ({why}): start it (systemctl start cprd.socket, or cprd"
            " --socket PATH), or name its socket with $CPRD_SOCKET"
        ) from None
    return sock


def _new_socket() -> socket.socket:
    try:
        return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError as error:
        # A program that has more open than its soft limit allows (it was lowered since) wants to
        # save all the same.
        with hard_limit() as (soft, hard):
            if soft != hard:
                try:
                    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                except OSError:
                    pass
        raise LimitExceeded(
            f"no descriptor left to connect to cprd with ({error.strerror}): RLIMIT_NOFILE is"
            f" {soft} (hard {hard}); raise it (ulimit -n, LimitNOFILE=)"
        ) from None


def where(path: str | os.PathLike[str] | None) -> str:
    return default_socket() if path is None else os.fspath(path)


def send_call(sock: socket.socket, call: Call, flags: int) -> None:
    """Raises Lost, LimitExceeded (too many in flight), BlockingIOError."""
    try:
        send(sock, call.data, call.fds, flags)
    except LOST:
        try:
            answer = read(sock, socket.MSG_DONTWAIT)  # a refusal may have come before the end
            close_all(answer.fds)
        except OSError:
            pass
        raise Lost from None


def read(sock: socket.socket, flags: int) -> Answer:
    """One answer; the caller owns its descriptors. Raises what the daemon raised, Lost,
    ProtocolError, BlockingIOError or TimeoutError."""
    try:
        try:
            data, fds, seen = receive(sock, wire.MAX_ANSWER + 1, flags)
        except ConnectionResetError:  # said once when the daemon left something unread
            data, fds, seen = receive(sock, wire.MAX_ANSWER + 1, flags)
    except LOST:
        raise Lost from None
    try:
        if not data and not fds:
            raise Lost
        if seen & socket.MSG_TRUNC:
            raise ProtocolError(f"an answer longer than {wire.MAX_ANSWER} bytes")
        return Answer(wire.read_answer(data), fds, cut=bool(seen & socket.MSG_CTRUNC))
    except BaseException:
        close_all(fds)
        raise

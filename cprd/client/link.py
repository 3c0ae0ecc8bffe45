"""A client's connection, without a loop of its own: what both clients share of opening, sending and
receiving, of telling what may be tried again, and of what becomes of a connection whose request was
interrupted."""

from __future__ import annotations

import _socket as socket  # as in rights
import errno
import os
import struct

from cprd.client.verbs import Answer, Call, Common
from cprd.errors import CprdError, Denied, InvalidInput, LimitExceeded, Unavailable
from cprd.linux.nofile import hard_limit
from cprd.linux.paths import default_socket
from cprd.linux.rights import receive, send
from cprd.protocol import messages

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from typing import Any, Self

RETRY_FOR = 15.0  # s that a lost daemon is waited for (it may be restarting)
GIVE_BACK = 1.0  # the same for a brief call (a claim is given back: its end says so as well)
MOMENT = 2.0  # s that the answer to a brief call is waited for
LATE = 0.2  # s that of an interrupted one is, before the call is said again elsewhere
RETRY_EVERY = 0.05
HELLOS = 6  # tries until a cprd is believed not to want us: each may have met one that was killed
SERVED = 1.0  # s after which a connection that is lost had not been refused

_TRUNC, _CTRUNC = socket.MSG_TRUNC, socket.MSG_CTRUNC
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
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(int(messages.MUTE), 0))
        sock.connect(path)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(0, 0))
    except OSError as error:
        sock.close()
        if error.errno in (errno.EACCES, errno.EPERM):
            raise Denied(f"no permission to connect to {path}") from None
        if error.errno == errno.EAGAIN:
            raise Unavailable(f"nobody accepts at {path} within {messages.MUTE:g} s") from None
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
    call.sent = True  # before it is: an interrupt may come at any point
    try:
        send(sock, call.data, call.fds, flags)
    except LOST:
        try:
            read(sock, socket.MSG_DONTWAIT).close()  # a refusal may have come before the end
        except OSError:
            pass
        raise Lost from None


def read(sock: socket.socket, flags: int) -> Answer:
    """One answer. Raises what the daemon raised, Lost, Garbled,
    BlockingIOError or TimeoutError."""
    try:
        try:
            data, fds, seen = receive(sock, messages.MAX_ANSWER + 1, flags)
        except ConnectionResetError:  # said once when the daemon left something unread
            data, fds, seen = receive(sock, messages.MAX_ANSWER + 1, flags)
    except LOST:
        raise Lost from None
    answer = Answer({}, fds)  # which owns them from now on
    try:
        answer.cut = bool(seen & _CTRUNC)
        if not data and not fds:
            raise Lost
        if seen & _TRUNC:
            raise messages.Garbled(f"an answer longer than {messages.MAX_ANSWER} bytes")
        answer.fields = messages.read_answer(data)
    except BaseException:
        answer.close()
        raise
    return answer


def patience(call: Call) -> float:
    """How long a lost daemon is waited for."""
    return GIVE_BACK if call.brief else RETRY_FOR


def mute(call: Call) -> float:
    """How long an answer is waited for before the daemon is called mute."""
    return min(MOMENT, messages.MUTE) if call.brief else messages.MUTE


class Line:
    """What a connection is apart from its I/O: shared by a Daemon and the claims and prepared saves
    made through it, closed with the last of these users.

    A request whose answer never came leaves its connection out of step. With nothing depending on
    it, it is closed. But its end would end claims that came by it: while there are any (or prepared
    saves), it is put aside, until its late answer has come or the last of them has left, and what
    comes next goes by another one: to the daemon a token is good on any."""

    def __init__(self, path: str, common: Common | None = None) -> None:
        self.path = path
        self.pid = os.getpid()
        self.users = 1  # whoever made it; and every claim and prepared save
        self.tickets = 0  # the claims and prepared saves among them
        self.common = common or Common()
        self.greeting: dict[str, Any] = {}
        self._sock: socket.socket | None = None
        self._owed: Call | None = None  # sent, and perhaps its answer is still to come
        self._aside: list[socket.socket] = []

    def fileno(self) -> int:
        return self._sock.fileno() if self._sock is not None else -1

    def apart(self) -> Self:
        """Another connection for the same Daemon, not opened yet; its user is the caller."""
        return type(self)(self.path, self.common)

    def speaker(self) -> Self:
        """A connection for a token whose own one may have been closed; the caller leaves it."""
        self._check_process()
        if not self.users:
            return self.apart()
        self.users += 1
        return self

    def part(self, *, stuck: bool = False) -> None:
        """A claim or prepared save depends on it no longer. `stuck`: the daemon could not be told,
        and must learn by the end of the connection, unless that would end others."""
        self.tickets -= 1
        if not self.tickets and self.pid == os.getpid():
            aside, self._aside = self._aside, []
            for sock in aside:
                self._close(sock)
            if stuck:
                self._break()
        self.leave()

    def leave(self) -> None:
        self.users -= 1
        if not self.users and self.pid == os.getpid():
            self._break()

    def check(self) -> None:
        self._check_process()
        if not self.users:
            raise Unavailable("the connection has been closed: connect() anew")

    def _check_process(self) -> None:
        if self.pid != os.getpid():
            raise InvalidInput("this connection belongs to the parent process: connect() anew")

    def _use(self, sock: socket.socket) -> None:
        self._sock = sock
        self.common.sockets.add(sock)

    def _greeted(self, greeting: dict[str, Any]) -> None:
        self.greeting = greeting
        self.common.uid = greeting.get("uid", os.getuid())

    def _close(self, sock: socket.socket) -> None:
        self.common.sockets.discard(sock)
        sock.close()

    def _break(self) -> None:
        sock, self._sock, self._owed = self._sock, None, None
        if sock is not None:
            self._close(sock)

    def _put_aside(self) -> None:
        """Out of step: not to be used as it is."""
        if self.tickets and self._sock is not None:
            self._aside.append(self._sock)
            self._sock = self._owed = None
        else:
            self._break()

    def _in_step_again(self) -> bool:
        """Go on with a connection whose late answer has come by now."""
        for sock in list(self._aside):
            try:
                if not _caught_up(sock):
                    continue
                self._sock = sock
            except Lost:
                self._close(sock)
            self._aside.remove(sock)
            if self._sock is not None:
                return True
        return False

    def _may_end(self, call: Call) -> bool:
        """Whether the verb has nothing to do about its interrupted call."""
        return not call.sent or (call.tied and not self.tickets)


def _caught_up(sock: socket.socket) -> bool:
    """Whether the answer that a connection owes has come; it is thrown away. Raises Lost."""
    try:
        sock.setblocking(False)
        read(sock, socket.MSG_DONTWAIT).close()
    except BlockingIOError:
        return False
    except (messages.Garbled, OSError):
        raise Lost from None
    except CprdError:
        pass  # an answer, too
    return True

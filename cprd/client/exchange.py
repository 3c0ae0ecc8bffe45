"""Requests and answers without I/O: retry, interrupt and deadline, once for every client.

A verb (verbs.py, claim.py) is a generator: a verb yields a `Call` and is sent the `Answer`, or
yields a `Work` and is sent the result; an error of the daemon is thrown into the verb. `run` turns
a verb into steps. A driver does each `Step` and sends the result back or throws the error in:
TimeoutError past the deadline, Lost at the end of the connection, and any interrupt
(KeyboardInterrupt, trio.Cancelled, ...) as raised. Nothing here blocks, and drivers decide nothing.

Each request has a number, which the answer repeats. After an interrupt or a deadline the connection
goes on, and the late answer is thrown away: claims of the same connection never end by it.
"""

from __future__ import annotations

import os
from _weakref import ref
from array import array
from collections.abc import Callable, Generator
from itertools import count
from time import monotonic

from cprd.client.owed import owe, owed, said
from cprd.errors import (
    Busy,
    CprdError,
    InvalidInput,
    LimitExceeded,
    ProtocolError,
    Timeout,
    Unavailable,
)
from cprd.linux.nofile import cut_short
from cprd.linux.paths import default_socket
from cprd.linux.rights import close_all
from cprd.protocol import messages

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from _socket import socket
    from typing import Any, Literal, Self, TypeAlias, TypeVar

    from cprd.protocol.rows import Greeting

    T = TypeVar("T")
    Kind = Literal["turn", "connect", "ask", "receive", "sleep", "work", "watch"]
    Steps: TypeAlias = "Generator[Step, Any, T]"
    Verb: TypeAlias = "Generator[Call | Work, Any, T]"
    Undo: TypeAlias = "Callable[[dict[str, Any]], Call]"

RETRY_FOR = 15.0  # s to wait for a lost daemon (which may be restarting), unless a timeout is less
RETRY_EVERY = 0.05
BRIEF = 2.0  # s for a request whose failure the end of the connection makes good
HELLOS = 6  # tries until a cprd is believed to refuse us: each may have met a killed one
FOREVER = float("inf")
SERVED = 1.0  # s after which a lost connection had not been refused


class Lost(Exception):
    """The connection ended. A request with a nonce may be sent again on another connection."""


class Call:
    """One request. `park` puts the bundle of a save into the queue with this sending end
    (borrowed), each time that the request is sent.

    `timeout`: seconds until Timeout (None: the default of the connection), besides `wait`, the
    seconds for which the daemon may let the request wait.
    `alone`: the answer is not to bring a queue for the next save.
    `until_known`: an interrupt is held back until the outcome is known.
    `undo`: makes the request that undoes this one, from the fields of the answer.
    `ends_with_connection`: the end of the connection undoes the request.
    `shielded`: sent in a cancelled task, too.
    `number`: of the last attempt; None: never sent, or undone."""

    __slots__ = (
        *(
            "alone",
            "ends_with_connection",
            "message",
            "number",
            "park",
            "shielded",
            "timeout",
            "undo",
        ),
        *("until_known", "wait"),
    )

    def __init__(
        self,
        message: dict[str, Any],
        *,
        park: Callable[[socket], None] | None = None,
        timeout: float | None = None,
        wait: float = 0.0,
        until_known: bool = False,
        undo: Undo | None = None,
        ends_with_connection: bool = False,
        shielded: bool = False,
        alone: bool = False,
    ) -> None:
        self.message = message
        self.alone = alone
        self.park = park
        self.timeout = timeout
        self.wait = wait
        self.until_known = until_known
        self.undo = undo
        self.ends_with_connection = ends_with_connection
        self.shielded = shielded
        self.number: int | None = None

    def encode(self, number: int, elapsed: float = 0.0) -> bytes:
        """The message. A request that is sent again after `elapsed` seconds waits so much less."""
        message = {**self.message, "id": number}
        if self.wait:
            field = "timeout" if message["verb"] == "wait" else "wait"
            message[field] = max(0.0, self.wait - elapsed)
        data = messages.encode(message)
        if len(data) > messages.MAX_REQUEST:
            raise InvalidInput(
                f"{message['verb']}: its arguments exceed {messages.MAX_REQUEST} bytes"
            )
        return data


class Work:
    """A call that may block for long, to be made where nothing waits for the caller."""

    __slots__ = ("do",)

    def __init__(self, do: Callable[[], Any]) -> None:
        self.do = do


class Answer:
    """An answer: `fields`, or `error`. Owns `fds`. `cut`: the kernel could not install all."""

    __slots__ = ("cut", "error", "fds", "fields", "number")

    def __init__(self, fds: array[int]) -> None:
        self.fds = fds
        self.fields: dict[str, Any] = {}
        self.error: CprdError | None = None
        self.number: int | None = None  # of the request; None: meant for the connection
        self.cut = False

    def close(self) -> None:
        """Close what nobody took out of `fds`."""
        if self.fds:
            fds, self.fds = self.fds, array("i")
            close_all(fds)

    __del__ = close

    def checked(self) -> Answer:
        """The answer; what the daemon raised is raised."""
        error, self.error = self.error, None
        if error is None:
            return self
        self.close()
        try:
            raise error
        finally:
            del error  # no cycle with the traceback, which would keep a Daemon alive

    def bundle(self) -> int:
        """The only descriptor of the answer, now the caller's. Raises LimitExceeded when this
        process had no descriptor left to receive with, ProtocolError."""
        if self.cut:
            raise cut_short("an answer of cprd")
        if len(self.fds) != 1:
            raise ProtocolError(f"an answer with {len(self.fds)} descriptors instead of one")
        return self.fds.pop()

    def inlet(self) -> socket:
        """As `bundle`: the sending end of a queue."""
        import _socket

        fd = self.bundle()
        return _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, fd)


class Step:
    """What a driver does next, by `kind`, before `until` (of time.monotonic) or TimeoutError:

    "turn": wait until no other request is on the line; "connect": return a new socket; "ask": send
    `what`, (bytes, room), and return the next Answer, received with the soft RLIMIT_NOFILE at the
    hard one where `room` is true; "receive": return the next Answer; "sleep": until then; "work":
    call `what`, where blocking harms nobody; "watch": return once the connection is lost, or there
    is none (sockets.is_lost). `shielded`: also in a cancelled task."""

    __slots__ = ("kind", "shielded", "until", "what")

    def __init__(self, kind: Kind, until: float, shielded: bool, what: Any = None) -> None:
        self.kind = kind
        self.until = until
        self.shielded = shielded
        self.what = what


class Common:
    """What all connections of one Daemon have in common."""

    __slots__ = ("_claims", "_numbers", "lines", "nonces", "timeout", "uid")

    def __init__(self, timeout: float | None) -> None:
        self.lines: set[ref[Line]] = set()
        self.timeout = timeout
        self.uid = 0  # ours, as the daemon sees it
        self.nonces: list[bytes] = []  # of what was sent ahead
        # Tickets only: a claim that the program forgot ends, and takes the ticket away.
        self._claims: dict[tuple[int, str], Any] = {}
        self._numbers = count(1)

    def number(self) -> int:
        """For a request: unique on all connections, for `Line.lend` moves a socket."""
        return next(self._numbers)

    def nonce(self) -> bytes:
        return self.nonces.pop(0) if self.nonces else messages.nonce()

    def forbidden(self) -> tuple[int, ...]:
        """The descriptors that must not lie in a bundle of ours."""
        lines = [line for line in [alive() for alive in tuple(self.lines)] if line is not None]
        socks = [sock for line in lines for sock in (line.sock, line.queue) if sock is not None]
        return tuple(fd for fd in [sock.fileno() for sock in socks] if fd >= 0)

    def claimed(self, ticket: Any) -> None:
        self._claims[messages.split_name(ticket.name, self.uid)] = ticket

    def forget(self, ticket: Any) -> None:
        key = messages.split_name(ticket.name, self.uid)
        if self._claims.get(key) is ticket:
            self._claims.pop(key, None)

    def replaced(self, name: str, generation: int) -> None:
        """A save of ours is held. Where the save took the place of our claim, the save has
        confirmed that claim."""
        ticket = self._claims.get(messages.split_name(name, self.uid))
        if ticket is not None and ticket.generation < generation:
            ticket.over = True


live_here: dict[tuple[str, str], ref[Any]] = {}
"""The live holds that are open in this process, by the path of cprd and UID/NAME. Whoever asks for
one again on another connection looks to cprd as a program that was executed by the owner."""


def check_not_here(line: Line, name: str) -> None:
    """Raise Busy for the name of a live hold of this process."""
    mine = live_here.get(place_of(line, name), lambda: None)()
    if mine is not None and mine.open and mine.line.mine():
        raise Busy(f"{name!r} is live in this process already", pid=os.getpid(), phase="live")


def place_of(line: Line, name: str) -> tuple[str, str]:
    return line.path, "{}/{}".format(*messages.split_name(name, line.common.uid))


_forks = 0  # between the process that imported this and the present process


def _forked() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_forked)


class Line:
    """A connection apart from the I/O: shared by a Daemon and the claims and prepared saves made
    through the connection, closed with the last of these users. Opened when a request wants it.

    Threads share a line: sets change atomically, and all else only in the request's turn."""

    def __init__(self, path: str, common: Common) -> None:
        self.path = path
        self.common = common
        self._forks = _forks
        self.users: set[object] = set()
        self.tickets: set[object] = set()  # the claims and prepared saves among the users
        self.running: set[ref[Verb[Any]]] = set()  # until the end, or collected as garbage
        self.stuck = False  # the daemon must learn of an ended claim by the end of the connection
        self.greeting: Greeting | dict[str, Any] = {}
        self.sock: socket | None = None
        self.queue: socket | None = None  # the sending end for the next save of this connection
        self.saved = False  # on this connection
        self.late: dict[int, Undo] = {}  # by number: requests that passed the deadline
        self.undos: list[Call] = []  # those that were answered since
        common.lines.add(ref(self, common.lines.discard))

    # What a driver adds

    def take_turn_now(self) -> bool:
        """Take the turn unless a request is on the line."""
        raise NotImplementedError

    def end_turn(self) -> None:
        """Give up the turn, if the caller has the turn."""
        raise NotImplementedError

    def close_socket(self, sock: socket) -> None:
        sock.close()

    def start(self, steps: Steps[None]) -> Callable[[], None]:
        """Drive `steps` beside all else. Returns what stops that, called once."""
        raise NotImplementedError

    # Users

    def apart(self) -> Self:
        """Another connection for the same Daemon, not opened yet."""
        return type(self)(self.path, self.common)

    def lend(self, user: object) -> Self:
        """A line to wait on, for `user`: an interrupt ends the connection and may end nothing
        else. Takes the socket along when nothing else hangs on the socket."""
        line = self.apart()
        line.users.add(user)
        if self.take_turn_now():
            try:
                if not (self.tickets or self.running or self.late or self.undos):
                    self._move(line)
                    line.greeting = self.greeting
            finally:
                self.end_turn()
        return line

    def take_back(self, line: Line, user: object) -> None:
        """The end of `lend`."""
        idle = not (line.tickets or line.late or line.undos)
        if self.users and idle and self.take_turn_now():
            try:
                if self.sock is None:
                    line._move(self)
            finally:
                self.end_turn()
        line.leave(user)

    def _move(self, line: Line) -> None:
        """Give the connection to another line."""
        line.sock, line.queue, line.saved = self.sock, self.queue, self.saved
        self.sock, self.queue, self.saved = None, None, False

    def hold(self, ticket: object) -> None:
        """A claim or prepared save depends on the connection from now on."""
        self.users.add(ticket)
        self.tickets.add(ticket)

    def part(self, ticket: object, *, stuck: bool = False) -> None:
        """The end of `hold`. `stuck`: the daemon could not be told."""
        self.tickets.discard(ticket)
        self.stuck = self.stuck or stuck
        self.leave(ticket)

    def leave(self, user: object) -> None:
        self.users.discard(user)
        self.settle()

    def settle(self) -> None:
        """Close the connection when nothing needs it. A running verb does so at the end."""
        if self._done() and self.mine() and self.take_turn_now():
            try:
                if self._done():
                    self.drop()
            finally:
                self.end_turn()

    def _done(self) -> bool:
        unused = not self.users or (self.stuck and not self.tickets)
        return unused and not self.running

    def mine(self) -> bool:
        """False in a child of fork()."""
        return self._forks == _forks

    def check(self) -> None:
        if not self.mine():
            raise InvalidInput("this connection belongs to the parent process: connect() anew")

    # The connection; in the turn only

    def fileno(self) -> int:
        """-1: not open, or the socket was garbage collected before the line."""
        sock = self.sock
        return -1 if sock is None else sock.fileno()

    def drop(self) -> None:
        sock, self.sock = self.sock, None
        queue, self.queue = self.queue, None
        self.late.clear()
        self.undos.clear()
        self.stuck = self.saved = False
        if queue is not None:
            queue.close()
        if sock is not None:
            self.close_socket(sock)

    def drop_for(self, call: Call) -> bool:
        """End the connection if that undoes an unanswered request, and nothing else."""
        alone = not self.tickets and len(self.running) == 1
        if call.ends_with_connection and alone:
            self.drop()
            call.number = None
            return True
        return False


def where(path: str | os.PathLike[str] | None) -> str:
    return default_socket() if path is None else os.fspath(path)


# Steps


def connect(line: Line) -> Steps[None]:
    """Open the connection and say hello. Raises Unavailable, Denied, Timeout, ..."""
    timeout = _timeout(line, None)
    until = monotonic() + timeout
    for tries in range(HELLOS):
        if tries:
            yield Step("sleep", monotonic() + RETRY_EVERY, False)
        try:
            yield from _greet(line, until, False)
            yield from _say_owed(line, until, False)
            return
        except Lost:
            continue
        except TimeoutError:
            raise _mute(line, timeout) from None
    raise Unavailable(f"cprd at {line.path} closed the connection before it said hello")


def run(line: Line, verb: Verb[T]) -> Steps[T]:
    """Run a verb to the end. An interrupt is thrown into the verb, once the request is taken back
    or the outcome known, as the Call says; a second interrupt is thrown in at once."""
    line.check()
    me = ref(verb, line.running.discard)
    line.running.add(me)
    interrupt: BaseException | None = None
    try:
        call = next(verb)
        while True:
            try:
                if isinstance(call, Work):
                    result = yield Step("work", FOREVER, True, call.do)
                else:
                    result = yield from request(line, call, interrupt is not None)
            except CprdError as error:
                call = verb.throw(error)
            except GeneratorExit:
                raise
            except BaseException as caught:
                if isinstance(call, Call) and call.number is not None and interrupt is None:
                    if call.until_known:
                        interrupt = caught
                        continue  # the same request again is given the first answer
                    if call.undo is not None:
                        yield from _take_back(line, call, call.undo)
                call = verb.throw(caught)
            else:
                try:
                    call = verb.send(result)
                finally:
                    if isinstance(result, Answer):
                        result.close()  # what nobody took
    except StopIteration as end:
        if interrupt is not None:
            raise interrupt from None
        value: T = end.value
        return value
    except CprdError as error:
        if interrupt is not None:
            raise interrupt from error
        raise
    finally:
        interrupt = None  # no cycle with the traceback
        verb.close()
        line.running.discard(me)
        line.settle()


def _take_back(line: Line, call: Call, undo: Undo) -> Steps[None]:
    """After an interrupt: learn whether `call` was done, and undo the request."""
    try:
        answer = yield from request(line, call, True, BRIEF)
        answer.close()
        taken_back = undo(answer.fields)
    except CprdError:
        return  # the end of the connection or of the lease has to do
    try:
        yield from request(line, taken_back, True, BRIEF)
    except Unavailable:
        owe(line.path, taken_back.message)
    except CprdError:
        pass


def request(
    line: Line, call: Call, shielded: bool = False, timeout: float | None = None
) -> Steps[Answer]:
    """Send a request and receive the answer, on another connection where one is lost: every
    request that changes something has a nonce, so sending it twice does it once.

    Raises what the daemon raised, Unavailable, Timeout."""
    shielded = shielded or call.shielded
    timeout = _timeout(line, call.timeout if timeout is None else timeout)
    began = monotonic()
    until = began + call.wait + timeout
    patience = min(RETRY_FOR, timeout)
    give_up = 0.0
    away = False  # nobody accepts
    try:
        yield Step("turn", until, shielded)
        while True:
            tried = monotonic()
            try:
                if line.fileno() < 0:
                    line.drop()
                    yield from _greet(line, until, shielded)
                if line.late or line.undos:
                    yield from _undo_late(line, until, shielded)
                yield from _say_owed(line, until, shielded)
                if call.park is not None:
                    answer = yield from _save(line, call, call.park, until, shielded, tried - began)
                else:
                    answer = yield from _ask(line, call, until, shielded, tried - began)
                break
            except (Lost, Unavailable) as error:
                was_open, away = line.sock is not None, isinstance(error, Unavailable)
                line.drop()
                now = monotonic()
                if now - tried > SERVED or not give_up:  # the daemon was there in between
                    give_up = min(until, now + patience)
                if now >= give_up:
                    why = error if away else "the connection is lost"
                    raise Unavailable(f"no answer: {why}") from None
                if not was_open:
                    yield Step("sleep", now + RETRY_EVERY, shielded)
    except TimeoutError:
        if call.number is not None and not line.drop_for(call) and call.undo is not None:
            line.late[call.number] = call.undo
        if away:
            raise Unavailable(f"no cprd answers at {line.path} within {timeout:g} s") from None
        raise _mute(line, call.wait + timeout) from None
    except messages.Garbled:
        line.drop()
        raise
    except CprdError:
        raise
    except BaseException:
        if call.number is not None:
            line.drop_for(call)
        raise
    finally:
        line.end_turn()
    return answer.checked()


def _save(
    line: Line,
    call: Call,
    park: Callable[[socket], None],
    until: float,
    shielded: bool,
    elapsed: float,
) -> Steps[Answer]:
    """Park the bundle in a queue of the daemon, then send the request that speaks of the bundle.

    Whatever comes of it, the sending end is closed at the end: that tells the daemon to let go of
    what was parked and not saved."""
    inlet, line.queue = line.queue, None
    if inlet is not None:
        try:
            park(inlet)
        except BrokenPipeError:  # the daemon has let go of it
            inlet.close()
            inlet = None
        except BaseException:
            inlet.close()
            raise
    try:
        if inlet is None:
            inlet = yield from _queue(line, until, shielded)
            try:
                park(inlet)
            except BrokenPipeError:
                raise Lost from None
        # One connection rarely saves twice: the second save asks for the queue of the next.
        call.message["queue"] = line.saved and not call.alone
        answer = yield from _ask(line, call, until, shielded, elapsed)
        if call.alone:
            return answer
        line.saved = True
        if answer.fds:
            line.queue = answer.inlet()
        return answer
    finally:
        if inlet is not None:
            inlet.close()


def _queue(line: Line, until: float, shielded: bool) -> Steps[socket]:
    """Ask for the sending end of a queue. Raises LimitExceeded."""
    room = False
    for again in (True, True, False):
        answer = yield from _ask(line, Call({"verb": "queue"}), until, shielded, room=room)
        if again and isinstance(answer.error, LimitExceeded):
            continue  # a queue of a request that was given up was unread, until now
        answer.checked()
        if again and answer.cut:
            room = True
            answer.close()
            continue
        return answer.inlet()
    raise AssertionError


def _ask(
    line: Line,
    call: Call,
    until: float,
    shielded: bool,
    elapsed: float = 0.0,
    *,
    room: bool = False,
) -> Steps[Answer]:
    """Send a request on the open connection and receive the answer; throw late ones away."""
    number = line.common.number()
    data = call.encode(number, elapsed)
    call.number = number  # before sending: an interrupt may come at any point
    answer: Answer = yield Step("ask", until, shielded, (data, room))
    while answer.number != number and answer.number is not None:
        answer.close()
        answer = yield Step("receive", until, shielded)
    if answer.error is None:
        try:
            answer.fields = messages.read_fields(call.message["verb"], answer.fields)
        except messages.Garbled:
            answer.close()
            raise
    return answer


def _undo_late(line: Line, until: float, shielded: bool) -> Steps[None]:
    """Undo what was done after the deadline, before anything else is asked for."""
    while line.late:
        answer: Answer = yield Step("receive", until, shielded)
        undo = line.late.pop(answer.number or 0, None)
        if undo is not None and answer.error is None:
            line.undos.append(undo(answer.fields))
        answer.close()
    while line.undos:
        yield from _ask(line, line.undos[0], until, shielded)
        del line.undos[0]


def _say_owed(line: Line, until: float, shielded: bool) -> Steps[None]:
    """Say what cprd could not be told before. The answer does not matter: the claim is over."""
    for message in owed(line.path):
        answer = yield from _ask(line, Call(message), until, shielded)
        answer.close()
        said(line.path, message)


def _greet(line: Line, until: float, shielded: bool) -> Steps[None]:
    line.sock = yield Step("connect", until, shielded)
    try:
        answer = (yield from _ask(line, hello(), until, shielded)).checked()
        if answer.fields.get("version") != messages.VERSION:
            raise ProtocolError(
                f"the daemon speaks version {answer.fields.get('version')} of the protocol, this"
                f" client version {messages.VERSION}: upgrade the older one"
            )
        line.greeting = answer.fields
        line.common.uid = answer.fields.get("uid", os.getuid())
    except BaseException:
        line.drop()
        raise


def hello() -> Call:
    return Call({"verb": "hello", "version": messages.VERSION})


def _timeout(line: Line, timeout: float | None) -> float:
    if timeout is None:
        timeout = line.common.timeout
    return messages.MUTE if timeout is None else timeout


def _mute(line: Line, seconds: float) -> Timeout:
    return Timeout(
        f"cprd at {line.path} accepted the connection and has not answered within {seconds:g} s"
    )

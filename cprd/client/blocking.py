"""The blocking client. Imports nothing heavy: a client runs while a service is down.

Each method blocks until cprd has answered. `timeout` is how many seconds that may take, retries
included (default: that of connect()); then Timeout is raised, or Unavailable when cprd was away. A
request whose answer did not come may have been done, or may be done later."""

from __future__ import annotations

import _thread
import os
import time

# Not within a request: by then setuid(), chroot() or a full table may hide the module.
from select import POLLIN, POLLOUT, poll

from cprd.client import claim as claims
from cprd.client import exchange, verbs
from cprd.client.claim import Saved
from cprd.client.exchange import Common, Line, Step
from cprd.client.sockets import is_lost, open_socket, receive_now, send_now
from cprd.errors import LimitExceeded
from cprd.linux.nofile import none_left
from cprd.linux.rights import close_all
from cprd.protocol import messages
from cprd.state import State

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable
    from typing import Any, Literal, Self, TypeVar

    from cprd.client.blocking_live import LiveState
    from cprd.client.exchange import Steps, Verb
    from cprd.protocol.rows import IfExists, Row, Shown, Status
    from cprd.state import HasFileno

    T = TypeVar("T")

__all__ = ["Claim", "Daemon", "Prepared", "Saved", "connect", "live"]


def connect(path: str | os.PathLike[str] | None = None, *, timeout: float | None = None) -> Daemon:
    """Connect to cprd at `path` (default: $CPRD_SOCKET, else /run/cprd/cprd.sock) and say hello.
    `timeout`: seconds for this, and the default of every request (None: 20).

    Raises Unavailable at once when nobody answers; Denied, LimitExceeded, Timeout, ProtocolError,
    InvalidInput."""
    claims.check_timeout(timeout)
    connection = Connection(exchange.where(path), Common(timeout))
    connection.drive(exchange.connect(connection))
    return Daemon(connection)


def live(
    name: str,
    path: str | os.PathLike[str] | None = None,
    *,
    wait: float = 0.0,
    lease: float = messages.LEASE,
    timeout: float | None = None,
) -> LiveState:
    """As Daemon.live, with the cprd at `path` (as connect). `timeout`: also the default of each
    request of the state."""
    claims.check_timeout(timeout)
    from cprd.client.blocking_live import begin

    connection = Connection(exchange.where(path), Common(timeout))
    return begin(connection, name, wait, lease, None)


class Connection(Line):
    """A line whose steps block the thread that runs them."""

    def __init__(self, path: str, common: Common) -> None:
        super().__init__(path, common)
        self._turn = _thread.RLock()
        self._poll: Any = None  # of the socket `_polled`
        self._polled: socket | None = None
        self._wake = -1  # an eventfd, of a line whose steps run in a thread
        self.ahead: socket | None = None  # connected already (ahead.py)

    def free(self) -> Self:
        """This line; or another where this thread is in the midst of a request: in a signal
        handler, or in a finalizer that garbage collection called."""
        return self.apart() if self._turn._is_owned() else self  # type: ignore[attr-defined]

    def take_turn_now(self) -> bool:
        return not self._turn._is_owned() and self._turn.acquire(blocking=False)  # type: ignore[attr-defined]

    def end_turn(self) -> None:
        if self._turn._is_owned():  # type: ignore[attr-defined]
            self._turn.release()

    def run(self, verb: Verb[T]) -> T:
        line = self.free()
        return line.drive(exchange.run(line, verb))

    def drive(self, steps: Steps[T]) -> T:
        try:
            step = next(steps)
            while True:
                try:
                    result = self._do(step)
                except BaseException as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(result)
        except StopIteration as end:
            value: T = end.value
            return value

    def start(self, steps: Steps[None]) -> Callable[[], None]:
        """Drive `steps` in a thread. Returns what ends a "watch" for good; does not block. Raises
        LimitExceeded; then nothing was begun."""
        import threading

        made: list[int] = []
        try:
            made.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            made.append(os.dup(made[0]))
        except OSError as error:
            close_all(made)
            raise none_left("to watch cprd with", error) from None
        wake, stopped = made
        self._wake = wake

        def drive() -> None:
            try:
                self.drive(steps)
            finally:
                self._wake = -1
                os.close(wake)

        def stop() -> None:
            os.eventfd_write(stopped, 1)
            os.close(stopped)

        try:
            threading.Thread(target=drive, daemon=True, name="cprd").start()
        except RuntimeError as error:
            self._wake = -1
            close_all(made)
            raise LimitExceeded(
                f"no thread to watch cprd with ({error}): raise RLIMIT_NPROC (ulimit -u), or"
                " TasksMax= of the unit"
            ) from None
        return stop

    def _watch(self) -> None:
        """Return when the connection is lost, or `stop` was called."""
        while self.sock is not None and not is_lost(self.sock):
            waiting = poll()
            waiting.register(self.sock, POLLIN)
            waiting.register(self._wake, POLLIN)
            if any(fd == self._wake for fd, _ in waiting.poll()):
                return

    def _do(self, step: Step) -> Any:
        if step.kind == "watch":
            return self._watch()
        if step.kind == "ask":
            data, room = step.what
            self._send(data, step.until)
            return self._receive(step.until, room=room)
        if step.kind == "receive":
            return self._receive(step.until)
        if step.kind == "work":
            return step.what()
        left = max(0.0, step.until - time.monotonic())
        if step.kind == "turn":
            if not self._turn.acquire(timeout=left):
                raise TimeoutError
            return None
        if step.kind == "connect":
            sock, self.ahead = self.ahead, None
            return sock or open_socket(self.path, left)
        return time.sleep(left)

    def _receive(self, until: float, *, room: bool = False) -> exchange.Answer:
        assert self.sock is not None
        while True:
            if self._polled is not self.sock:
                self._poll, self._polled = poll(), self.sock
                self._poll.register(self.sock, POLLIN)
            # An interrupt of the wait loses no descriptor.
            if not self._poll.poll(max(0.0, until - time.monotonic()) * 1000):
                raise TimeoutError
            try:
                return receive_now(self.sock, room)
            except BlockingIOError:
                continue

    def _send(self, data: bytes, until: float) -> None:
        assert self.sock is not None
        while True:
            try:
                return send_now(self.sock, data)
            except BlockingIOError:  # earlier requests, which cprd has not read yet
                _wait(self.sock, POLLOUT, until)


def _wait(sock: socket, event: int, until: float) -> None:
    waiting = poll()
    waiting.register(sock, event)
    if not waiting.poll(max(0.0, until - time.monotonic()) * 1000):
        raise TimeoutError


class Daemon(claims.DaemonFace):
    """A connection to cprd, for all threads of this process: requests take turns, and waiting
    (`wait`, `load` with wait) delays nobody. Made by connect(); as a block, leaving closes.

    In a child of fork() every method raises InvalidInput, and close() does nothing."""

    _line: Connection

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_user"):
            self.close()

    def close(self) -> None:
        """Close the connection, unless claims or prepared saves still need it; then with them.
        Does not block."""
        self._line.leave(self._user)

    def _free(self) -> Connection:
        self._check_open()
        return self._line.free()

    def _wait(self, verb: Callable[[Connection], Verb[T]]) -> T:
        """Run a verb that waits on a line of its own."""
        line, user = self._free(), object()
        other = line.lend(user)
        try:
            return other.run(verb(other))
        finally:
            line.take_back(other, user)

    def save(
        self,
        name: str,
        state: State,
        *,
        if_exists: IfExists = "error",
        ttl: float | None = None,
        after_exit: bool | int | HasFileno = False,
        require: Literal["memory", "store"] | None = None,
        timeout: float | None = None,
    ) -> Saved:
        """Leave `state` under `name`. Its descriptors are borrowed, and stay the caller's.

        `if_exists`: "replace" ends a hold of that name; "error" raises AlreadyHeld. `ttl`: seconds
        until the hold is dropped unless loaded. `after_exit`: not served before this process
        (True) has ended, or the process of a pidfd (borrowed). `require="store"`: LimitExceeded
        where cprd would keep the state in memory only.

        Raises AlreadyHeld, Busy, Denied, LimitExceeded, Damaged, InvalidInput, Unavailable,
        Timeout. After a Timeout or an interrupt the state may be held already, or be held once
        cprd reads the request. Requests of one Daemon are done in order, so the answer of list()
        tells; close() takes nothing back. Of a state that is not held, no descriptor stays with
        cprd."""
        line = self._free()
        options = (if_exists, ttl, after_exit, require, timeout)
        return line.run(verbs.save(line, name, state, *options))

    def prepare(
        self,
        name: str,
        state: State,
        *,
        if_exists: IfExists = "error",
        ttl: float | None = None,
        after_exit: bool | int | HasFileno = False,
        require: Literal["memory", "store"] | None = None,
        timeout: float | None = None,
    ) -> Prepared:
        """The first half of save: the state is kept, and not served before commit().

        Arguments, ownership and errors as save(). An interrupt is raised after the prepared save
        is taken back. After a Timeout the state may be prepared already, or once cprd reads the
        request: nobody is served the state, and a load of the name is Busy. The next request of
        this Daemon, whatever it is, first aborts the prepared save. Without one, the end of the
        connection leaves the state in doubt, as the death of a saver does: until release() or
        drop(), with force."""
        line = self._free()
        options = (if_exists, ttl, after_exit, require, timeout)
        return line.run(verbs.prepare(line, Prepared, name, state, *options))

    def load(
        self,
        name: str,
        *,
        wait: float = 0.0,
        lease: float = messages.LEASE,
        generation: int | None = None,
        timeout: float | None = None,
    ) -> Claim:
        """Claim what is held under `name`, whole. `wait`: seconds to wait for the hold, at most;
        `lease`: seconds until an unconfirmed claim goes back; `generation`: this hold only, else
        Fenced. The claim owns the descriptors until they are taken.

        Raises NotHeld, Busy (`.pid`, `.phase`, `.until` and the message say why), Damaged,
        LimitExceeded (no room in this process; the hold stays), Fenced, Denied, InvalidInput,
        Unavailable, Timeout (beyond `wait`). After a Timeout or an interrupt nothing stays
        claimed: cprd is told at once, or by the next request or the end of the connection."""

        def verb(line: Connection) -> Verb[Claim]:
            return verbs.load(line, Claim, name, wait, lease, generation, timeout)

        if wait:
            return self._wait(verb)
        line = self._free()
        return line.run(verb(line))

    def live(
        self,
        name: str,
        *,
        wait: float = 0.0,
        lease: float = messages.LEASE,
        timeout: float | None = None,
    ) -> LiveState:
        """Keep a state at every change under `name`: claims what a predecessor left (saved, exited
        or killed), or begins with nothing. "worker.*": any of that pattern that is left, or the
        next number.

        `wait`: seconds to wait, at most, while another process has the hold (a name that is not
        held is never waited for); `lease`: seconds until an unconfirmed claim goes back. The state
        has a connection of its own; this Daemon may be closed.

        Raises Busy (`.pid`: the owner), Damaged, LimitExceeded (no room in this process; the hold
        stays), Fenced, Denied, InvalidInput, Unavailable, Timeout (beyond `wait`)."""
        from cprd.client.blocking_live import begin

        return begin(self._free().apart(), name, wait, lease, timeout)

    def list(self, *, timeout: float | None = None) -> list[Row]:
        """A row (a dict, see cprd.Row) for each hold of this uid; for root, of every uid. Sorted by
        uid, name, generation. Raises Unavailable, Timeout."""
        return self._free().run(verbs.rows(timeout))

    def show(self, name: str, *, timeout: float | None = None) -> Shown:
        """The row of one hold with "descriptors" (name, id, what each is) and "sections" (key,
        kind, bytes; the value of a small one). Nothing is claimed or disturbed; no descriptor
        stays open here. Raises NotHeld, Denied, LimitExceeded, InvalidInput, Unavailable,
        Timeout."""
        return self._free().run(verbs.show(name, timeout))

    def status(self, *, timeout: float | None = None) -> Status:
        """The daemon's own state (a dict, see cprd.Status): server, pid, uptime in seconds, kept,
        phases, uids, connections, limits. Waits while cprd re-executes. Raises Unavailable,
        Timeout."""
        return self._free().run(verbs.status(timeout))

    def wait(self, name: str, timeout: float = messages.MAX_WAIT) -> int:
        """Wait until `name` could be loaded, at most `timeout` seconds. Returns the generation.
        Claims nothing. Raises what a load would raise when the time is over: NotHeld, Busy."""
        return self._wait(lambda _: verbs.wait(name, timeout))

    def drop(self, name: str, *, force: bool = False, timeout: float | None = None) -> int:
        """End a hold without a successor; cprd closes the descriptors. `force`: also where another
        process has claimed the hold, or may act on it. Returns the generation. Raises NotHeld,
        Busy, Denied, InvalidInput, Unavailable, Timeout (then show() tells)."""
        return self._free().run(verbs.drop("drop", name, force, timeout))

    def release(self, name: str, *, force: bool = True, timeout: float | None = None) -> int:
        """Serve again what is in doubt, because the caller knows that nothing acts on it. Returns
        the generation. Raises NotHeld, Busy, Denied, InvalidInput, Unavailable, Timeout."""
        return self._free().run(verbs.drop("release", name, force, timeout))


class Prepared(claims.PreparedFace):
    """A save that is kept and not served yet. Ends by commit() or abort(); without either, the end
    of the connection or of the process leaves the state in doubt.

    An interrupt (KeyboardInterrupt, ...) of either is raised once the outcome is known; a second
    interrupt at once. After Timeout or Unavailable the outcome is not known: the same method again
    repeats the same request, and gets the first answer."""

    _line: Connection

    def commit(self, *, timeout: float | None = None) -> Saved:
        """Hold the state: served from now on. Raises Fenced, Unavailable, Timeout."""
        return self._line.run(self._prepared.commit(timeout))

    def abort(self, *, timeout: float | None = None) -> None:
        """Forget the state; what was held before is served. Raises Fenced, Unavailable, Timeout."""
        self._line.run(self._prepared.abort(timeout))

    def __del__(self) -> None:
        if hasattr(self, "kept"):
            self._prepared.end()


class Claim(claims.ClaimFace):
    """An exclusive lease on a hold. As a block: leaving confirms; an exception (SystemExit and
    KeyboardInterrupt too) rejects, except after begin(): then the hold stays in doubt, until
    confirm() or reject() after all. Build inside the block, act after it.

    `state` and everything in it lives until the end of the block, or close(): descriptors not
    taken, sections, and memoryviews of them. confirm() alone closes nothing.

    An interrupt (KeyboardInterrupt, ...) of begin(), confirm(), reject() or the end of a block is
    raised once the outcome is known; a second interrupt at once. After Timeout or Unavailable the
    outcome is not known: the same method again repeats the same request, and gets the first answer
    (except begin() and confirm(next=...), which are Fenced if done)."""

    _line: Connection

    def renew(self, lease: float | None = None, *, timeout: float | None = None) -> float:
        """Begin the lease anew, by `lease` seconds (default: as long as before). The claim ends
        with the connection of this request from now on. Returns the seconds (0.0 in doubt: no
        lease ends). Raises Fenced when the claim was over, Unavailable, Timeout."""
        return self._line.run(self._claim.renew(lease, timeout))

    def begin(
        self, process: int | HasFileno | None = None, *, timeout: float | None = None
    ) -> None:
        """Say that from here on acting cannot be undone: a death leaves the hold in doubt.
        `process`: the pidfd (borrowed) of the process that acts. Raises Fenced, InvalidInput;
        after Unavailable and Timeout the claim counts as begun."""
        self._line.run(self._claim.begin(process, timeout))

    def confirm(
        self,
        next: State | None = None,
        after_exit: bool | int | HasFileno = True,
        ttl: float | None = None,
        *,
        strict: bool = False,
        timeout: float | None = None,
    ) -> Saved | None:
        """The point of no return: the hold ends, and this process acts on the state.

        With `next`, that state (borrowed) is held instead, in the same step, and served once this
        process (after_exit=True) has ended, or the process of a pidfd; `ttl` as in save(). Returns
        Saved with `next`, else None. Raises Fenced: then do not act. After Unavailable and
        Timeout do not act before confirm() again has returned."""
        return self._line.run(self._claim.confirm(next, after_exit, ttl, strict, timeout))

    def reject(self, why: str = "", *, timeout: float | None = None) -> None:
        """Give the hold back, whole, for another to try. `why`: cut at 1,024 bytes. After begin()
        this says that nothing ran, and is possible after the block, too. Raises Fenced,
        Unavailable, Timeout."""
        self._line.run(self._claim.reject(why, timeout))

    def close(self) -> None:
        """Close what was not taken, and the claim: unconfirmed, the hold goes back (after begin()
        it stays in doubt). Safe to repeat; does nothing in a child of fork(). Blocks for 2 s at
        most while cprd does not answer, and while the last close of a descriptor blocks."""
        if self._claim.open and self._line.mine():
            self._line.run(self._claim.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._line.mine():
            self._line.run(self._claim.leave(error))

    def __del__(self) -> None:
        if hasattr(self, "lease"):
            self.close()

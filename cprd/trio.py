"""The same verbs with await, on trio.

    async with cprd.trio.connect() as daemon:
        async with daemon.load("web") as claim:
            ...

`daemon.load(...)` and `connect()` can be awaited, too: then what they return is the block to enter,
or to close(). What can block (closing foreign descriptors) is done in a thread.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable, Generator
from contextlib import nullcontext
from functools import partial
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import trio

from cprd.client import link, verbs
from cprd.client.verbs import Saved, Ticket
from cprd.errors import CprdError, Fenced, InvalidInput, LimitExceeded, Timeout, Unavailable
from cprd.protocol import messages
from cprd.state import HasFileno, State

__all__ = ["Claim", "Daemon", "Prepared", "Saved", "connect"]

T = TypeVar("T")


class _Closes(Protocol):
    async def __aenter__(self) -> Any: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


C = TypeVar("C", bound=_Closes)


class Opening(Generic[C]):
    """Something on its way: await it, or enter it as a block."""

    def __init__(self, open: Callable[[], Awaitable[C]]) -> None:
        self._open = open
        self._opened: C | None = None

    def __await__(self) -> Generator[Any, Any, C]:
        return self._open().__await__()

    async def __aenter__(self) -> C:
        self._opened = await self._open()
        await self._opened.__aenter__()
        return self._opened

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._opened is not None
        await self._opened.__aexit__(kind, error, trace)


def connect(path: str | os.PathLike[str] | None = None) -> Opening[Daemon]:
    """As cprd.connect."""

    async def open() -> Daemon:
        connection = _Connection(link.where(path))
        await connection.open()
        return Daemon(connection)

    return Opening(open)


class _Connection(link.Line):
    """The socket, and how to wait at it. Its users take turns."""

    def __init__(self, path: str, common: verbs.Common | None = None) -> None:
        super().__init__(path, common)
        self._turn = trio.Lock()

    async def open(self) -> None:
        for tries in range(link.HELLOS):
            if tries:
                await trio.sleep(link.RETRY_EVERY)
            try:
                await self._open()
                return
            except link.Lost:
                continue
        raise Unavailable(f"cprd at {self.path} closed the connection before it said hello")

    async def _open(self, *, brief: bool = False) -> None:
        # connect() to a UNIX socket waits only while the backlog is full.
        sock = await trio.to_thread.run_sync(link.open_socket, self.path)
        try:
            sock.setblocking(False)
            self._use(sock)
            self._greeted(await self._steps(verbs.hello(brief=brief), self._exchange))
        except BaseException:
            self._break()
            raise

    def _close(self, sock: socket.SocketType) -> None:
        trio.lowlevel.notify_closing(sock)
        super()._close(sock)

    def for_waiting(self, wait: float) -> _Connection:
        """The one to wait with, to be given to done_waiting(): others need theirs meanwhile, and
        what is cancelled while it waits ends its connection, and may end nothing else."""
        self.check()
        if not wait:
            self.users += 1
            return self
        line = self.apart()
        if self._idle() and not self.tickets:  # lent: the next request opens another, if one comes
            line._sock, self._sock = self._sock, None
            line.greeting = self.greeting
        return line

    def done_waiting(self, line: _Connection) -> None:
        mine = line is not self and self.users and self._sock is None and self._idle()
        if mine and line._idle() and not line.tickets:
            line._sock, self._sock = None, line._sock
        line.leave()

    def _idle(self) -> bool:
        return self._owed is None and not self._turn.locked()

    async def run(self, verb: verbs.Verb[T]) -> T:
        self.check()
        async with self._turn:
            try:
                return await self._steps(verb, self._exchange_again)
            except link.Lost:
                raise Unavailable("the connection is lost") from None
            finally:
                if self._owed is not None:
                    self._put_aside()

    async def _steps(
        self, verb: verbs.Verb[T], exchange: Callable[[verbs.Call], Awaitable[verbs.Answer]]
    ) -> T:
        interrupted = False
        try:
            call = next(verb)
            while True:
                try:
                    with trio.CancelScope(shield=True) if interrupted else nullcontext():
                        answer = await exchange(call)
                except CprdError as error:
                    call = verb.throw(error)
                except link.Lost:
                    raise
                except BaseException as interrupt:
                    if self._may_end(call):
                        raise
                    interrupted = True
                    call = verb.throw(interrupt)
                else:
                    try:
                        call = verb.send(answer)
                    finally:
                        answer.close()  # what nobody took
        except StopIteration as end:
            value: T = end.value
            return value
        finally:
            verb.close()

    async def _exchange_again(self, call: verbs.Call) -> verbs.Answer:
        give_up = 0.0
        began = trio.current_time()
        while True:
            tried = trio.current_time()
            try:
                if self._sock is None and not self._in_step_again():
                    await self._open(brief=call.brief)
                return await self._exchange(call.after(tried - began))
            except (link.Lost, Unavailable) as error:
                now = trio.current_time()
                if now - tried > link.SERVED:  # it was there in between
                    give_up = 0.0
                give_up = give_up or now + link.patience(call)
                if now >= give_up:
                    why = error if isinstance(error, Unavailable) else "the connection is lost"
                    raise Unavailable(f"no answer: {why}") from None
                await trio.sleep(link.RETRY_EVERY if self._sock is None else 0.0)
                self._break()

    async def _exchange(self, call: verbs.Call) -> verbs.Answer:
        again = self._owed is call
        if self._owed is not None and not again:
            self._put_aside()
        if self._sock is None:
            raise link.Lost
        seconds = link.LATE if again else link.mute(call) + call.wait
        try:
            with trio.CancelScope(shield=call.sure):
                if not again:
                    with trio.fail_after(link.mute(call)):
                        await self._send(self._sock, call)
                with trio.fail_after(seconds):
                    answer = await self._read(self._sock)
        except trio.TooSlowError:
            if again:  # it was lost with the interrupt: by its nonce it can be had anew
                self._put_aside()
                raise link.Lost from None
            raise Timeout(
                f"cprd at {self.path} accepted the connection and has not answered within"
                f" {seconds:g} s"
            ) from None
        except (link.Lost, messages.Garbled):
            self._break()
            raise
        except CprdError:
            self._owed = None
            raise
        self._owed = None
        return answer

    async def _send(self, sock: socket.SocketType, call: verbs.Call) -> None:
        sent = call.sent
        while True:
            self._owed = call
            try:
                link.send_call(sock, call, socket.MSG_DONTWAIT)
                return
            except BlockingIOError:
                self._owed, call.sent = None, sent
                await trio.lowlevel.wait_writable(sock)

    async def _read(self, sock: socket.SocketType) -> verbs.Answer:
        while True:
            await trio.lowlevel.wait_readable(sock)
            try:
                return link.read(sock, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue


class Daemon:
    """A connection to cprd, for all tasks: requests take turns, those that wait delay nobody."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._closed = False

    async def __aenter__(self) -> Daemon:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection, unless claims or prepared saves still need it; then with them."""
        if not self._closed and self._connection.pid == os.getpid():
            self._closed = True
            self._connection.leave()

    aclose = close

    def fileno(self) -> int:
        return self._connection.fileno()

    @property
    def greeting(self) -> dict[str, Any]:
        return dict(self._connection.greeting)

    async def save(
        self,
        name: str,
        state: State,
        *,
        if_exists: str = "error",
        ttl: float | None = None,
        after_exit: bool | int | HasFileno = False,
        require: str | None = None,
    ) -> Saved:
        """As cprd.Daemon.save."""
        common = self._connection.common
        verb = verbs.save("save", common, name, state, if_exists, ttl, after_exit, require)
        return Saved(await self._connection.run(verb))

    async def prepare(
        self,
        name: str,
        state: State,
        *,
        if_exists: str = "error",
        ttl: float | None = None,
        after_exit: bool | int | HasFileno = False,
        require: str | None = None,
    ) -> Prepared:
        """As cprd.Daemon.prepare."""
        common = self._connection.common
        verb = verbs.save("prepare", common, name, state, if_exists, ttl, after_exit, require)
        fields = await self._connection.run(verb)
        return Prepared(self._connection, Ticket(name, fields), fields["kept"])

    def load(
        self, name: str, *, wait: float = 0.0, lease: float = 30.0, generation: int | None = None
    ) -> Opening[Claim]:
        """As cprd.Daemon.load: to await, or to enter."""

        async def open() -> Claim:
            connection = self._connection.for_waiting(wait)
            try:
                make = partial(Claim, connection)
                return await connection.run(verbs.load(name, wait, lease, generation, make))
            finally:
                self._connection.done_waiting(connection)

        return Opening(open)

    async def list(self) -> list[dict[str, Any]]:
        return await self._connection.run(verbs.rows())

    async def show(self, name: str) -> dict[str, Any]:
        from cprd.bundle.inspect import describe_bundle

        row, bundle = await self._connection.run(verbs.show(name))
        return await trio.to_thread.run_sync(describe_bundle, row, bundle)

    async def status(self) -> dict[str, Any]:
        return await self._connection.run(verbs.status())

    async def wait(self, name: str, timeout: float = messages.MAX_WAIT) -> int:
        connection = self._connection.for_waiting(timeout)
        try:
            return await connection.run(verbs.wait(name, timeout))
        finally:
            self._connection.done_waiting(connection)

    async def drop(self, name: str, *, force: bool = False) -> int:
        return await self._connection.run(verbs.drop(name, force))

    async def release(self, name: str, *, force: bool = True) -> int:
        return await self._connection.run(verbs.release(name, force))


class Prepared:
    """As cprd.Prepared. What was sent is not cancelled."""

    def __init__(self, connection: _Connection, ticket: Ticket, kept: str) -> None:
        self._connection = connection
        self._ticket = ticket
        self._open = True
        self.kept = kept
        connection.users += 1
        connection.tickets += 1

    @property
    def generation(self) -> int:
        return self._ticket.generation

    async def commit(self) -> Saved:
        return await self._say(verbs.commit(self._ticket, self._connection.common))

    async def abort(self) -> None:
        await self._say(verbs.abort(self._ticket))

    async def _say(self, verb: verbs.Verb[T]) -> T:
        try:
            return await self._connection.run(verb)
        finally:
            if self._ticket.over and self._open:
                self._open = False
                self._connection.part()


class Claim:
    """As cprd.Claim, as an async block. A cancelled block rejects; a confirm() that was sent is not
    cancelled any more, so that what became of it is known."""

    def __init__(self, connection: _Connection, loaded: verbs.Loaded) -> None:
        self._connection = connection
        self._ticket = loaded.ticket
        self._bundle = loaded.bundle
        self._begun = False
        self._closed = True
        self._stuck = False  # the daemon may have to learn of its end by the connection's
        self.state = loaded.state
        self.attempts = loaded.attempts
        self.last_reject = loaded.last_reject
        self.lease = loaded.lease
        connection.common.claimed(self._ticket)
        # No call from here on: what is interrupted before has nothing to leave, after it all.
        connection.users += 1
        connection.tickets += 1
        loaded.taken = True
        self._closed = False

    @property
    def generation(self) -> int:
        return self._ticket.generation

    async def renew(self, lease: float | None = None) -> float:
        return await self._connection.run(verbs.renew(self._ticket, lease))

    async def begin(self, process: int | HasFileno | None = None) -> None:
        before, self._begun = self._begun, True
        try:
            await self._connection.run(verbs.begin(self._ticket, process))
        except (InvalidInput, LimitExceeded, Fenced):  # refused: nothing has begun by this
            self._begun = before
            raise
        except BaseException:
            self._stuck = True  # whether it has begun, only the daemon knows
            raise

    async def confirm(
        self,
        next: State | None = None,
        after_exit: bool | int | HasFileno = True,
        ttl: float | None = None,
    ) -> Saved | None:
        saved: Saved | None = None
        if next is None:
            await self._say(verbs.confirm(self._ticket))
        else:
            common = self._connection.common
            saved = await self._say(verbs.confirm_next(common, self._ticket, next, after_exit, ttl))
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._unpark)
        return saved

    def _unpark(self) -> None:
        """Let go of the bundle: as long as it is here, what was taken and closed since is open.
        In a thread, for such a file can block when it is closed."""
        bundle, self._bundle = self._bundle, -1
        if bundle >= 0:
            os.close(bundle)

    async def reject(self, why: str = "") -> None:
        await self._say(verbs.reject(self._ticket, why))

    async def _say(self, verb: verbs.Verb[T]) -> T:
        """What ends the claim; in doubt, also when it was closed."""
        if self._ticket.over or (self._closed and not self._begun):
            raise Fenced("this claim has been confirmed, rejected or closed already")
        connection = self._connection.speaker()
        try:
            return await connection.run(verb)
        finally:
            connection.leave()

    async def close(self) -> None:
        """As cprd.Claim.close; the descriptors are closed in a thread."""
        if self._closed or self._connection.pid != os.getpid():
            return
        self._closed = True
        try:
            if not self._begun:
                await self._give_back("closed without confirm")
        finally:

            def let_go() -> None:
                self.state.close()
                self._unpark()

            try:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(let_go)
            finally:
                self._connection.common.forget(self._ticket)
                self._connection.part(stuck=self._stuck)

    aclose = close

    async def _give_back(self, why: str) -> None:
        if self._ticket.over:
            return
        self._ticket.over = self._stuck = True
        with trio.move_on_after(link.MOMENT, shield=True):
            try:
                await self._connection.run(verbs.give_back(self._ticket, why))
            except Fenced:
                pass  # it was over already
            except CprdError:
                return  # the end of its connection says it as well
            self._stuck = False

    async def __aenter__(self) -> Claim:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._connection.pid != os.getpid():
            return
        try:
            if self._ticket.over or self._closed:
                return
            if error is None:
                await self.confirm()
            elif not self._begun:
                await self._give_back(f"{type(error).__name__}: {error}")
        finally:
            await self.close()

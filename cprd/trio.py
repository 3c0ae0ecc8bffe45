"""The same verbs with await, on trio.

    async with cprd.trio.connect() as daemon:
        async with daemon.load("web") as claim:
            ...

`daemon.load(...)` and `connect()` can be awaited, too: then what they return is the block to enter,
or to aclose(). What can block (closing foreign descriptors) is done in a thread.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable, Generator
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import trio

from cprd import link, verbs, wire
from cprd.errors import (
    CprdError,
    Fenced,
    InvalidInput,
    LimitExceeded,
    ProtocolError,
    Timeout,
    Unavailable,
)
from cprd.rights import close_all
from cprd.state import HasFileno, State
from cprd.verbs import Saved, Ticket

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


class _Connection:
    """The socket, shared by a Daemon and the claims made through it; closed with the last user."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.pid = os.getpid()
        self.users = 1
        self.greeting: dict[str, Any] = {}
        self._sock: socket.socket | None = None
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

    async def _open(self) -> None:
        # connect() to a UNIX socket waits only while the backlog is full.
        self._sock = await trio.to_thread.run_sync(link.open_socket, self.path)
        self._sock.setblocking(False)
        try:
            self.greeting = await self._steps(verbs.hello(), 0.0)
        except BaseException:
            self._break()
            raise

    def _break(self) -> None:
        sock, self._sock = self._sock, None
        if sock is not None:
            trio.lowlevel.notify_closing(sock)
            sock.close()

    def fileno(self) -> int:
        return self._sock.fileno() if self._sock is not None else -1

    def forbidden(self) -> tuple[int, ...]:
        return () if self._sock is None else (self._sock.fileno(),)

    async def run(self, verb: verbs.Verb[T], *, patience: float = link.RETRY_FOR) -> T:
        if self.pid != os.getpid():
            raise InvalidInput("this connection belongs to the parent process: connect() anew")
        if not self.users:
            raise Unavailable("the connection has been closed: connect() anew")
        async with self._turn:
            try:
                return await self._steps(verb, patience)
            except link.Lost:
                raise Unavailable("the connection is lost") from None

    async def _steps(self, verb: verbs.Verb[T], patience: float) -> T:
        try:
            call = next(verb)
            while True:
                try:
                    answer = await self._exchange_again(call, patience)
                except CprdError as error:
                    call = verb.throw(error)
                else:
                    try:
                        call = verb.send(answer)
                    finally:
                        close_all(answer.fds)  # what nobody took
        except StopIteration as end:
            value: T = end.value
            return value
        finally:
            verb.close()

    async def _exchange_again(self, call: verbs.Call, patience: float) -> verbs.Answer:
        if not patience:
            return await self._exchange(call)
        give_up = 0.0
        began = trio.current_time()
        while True:
            tried = trio.current_time()
            try:
                if self._sock is None:
                    await self._open()
                return await self._exchange(call.after(tried - began))
            except (link.Lost, Unavailable) as error:
                now = trio.current_time()
                if now - tried > link.SERVED:  # it was there in between
                    give_up = 0.0
                give_up = give_up or now + patience
                if now >= give_up:
                    why = error if isinstance(error, Unavailable) else "the connection is lost"
                    raise Unavailable(f"no answer: {why}") from None
                await trio.sleep(link.RETRY_EVERY if self._sock is None else 0.0)
                self._break()

    async def _exchange(self, call: verbs.Call) -> verbs.Answer:
        if self._sock is None:
            raise link.Lost
        sock = self._sock
        try:
            with trio.fail_after(wire.MUTE):
                while True:
                    try:
                        link.send_call(sock, call, socket.MSG_DONTWAIT)
                        break
                    except BlockingIOError:
                        await trio.lowlevel.wait_writable(sock)
            with trio.fail_after(wire.MUTE + call.wait):
                while True:
                    await trio.lowlevel.wait_readable(sock)
                    try:
                        return link.read(sock, socket.MSG_DONTWAIT)
                    except BlockingIOError:
                        continue
        except trio.TooSlowError:
            self._break()
            raise Timeout(
                f"cprd at {self.path} accepted the connection and has not answered within"
                f" {wire.MUTE + call.wait:g} s"
            ) from None
        except ProtocolError:
            self._break()
            raise
        except CprdError:
            raise
        except BaseException:  # lost, cancelled, ...: the answer may still come
            self._break()
            raise

    def leave(self) -> None:
        self.users -= 1
        if not self.users and self.pid == os.getpid():
            self._break()


class Daemon:
    """A connection to cprd. Its requests take turns."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._closed = False

    async def __aenter__(self) -> Daemon:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    async def aclose(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, unless claims or prepared saves still need it; then with them."""
        if not self._closed and self._connection.pid == os.getpid():
            self._closed = True
            self._connection.leave()

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
        forbidden = self._connection.forbidden()
        verb = verbs.save("save", forbidden, name, state, if_exists, ttl, after_exit, require)
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
        forbidden = self._connection.forbidden()
        verb = verbs.save("prepare", forbidden, name, state, if_exists, ttl, after_exit, require)
        fields = await self._connection.run(verb)
        return Prepared(self._connection, Ticket(name, fields), fields["kept"])

    def load(
        self, name: str, *, wait: float = 0.0, lease: float = 30.0, generation: int | None = None
    ) -> Opening[Claim]:
        """As cprd.Daemon.load: to await, or to enter."""

        async def open() -> Claim:
            verb = verbs.load(name, wait, lease, generation)
            return Claim(self._connection, await self._connection.run(verb))

        return Opening(open)

    async def list(self) -> list[dict[str, Any]]:
        return await self._connection.run(verbs.rows())

    async def show(self, name: str) -> dict[str, Any]:
        from cprd.peek import describe_bundle

        row, bundle = await self._connection.run(verbs.show(name))
        return await trio.to_thread.run_sync(describe_bundle, row, bundle)

    async def status(self) -> dict[str, Any]:
        return await self._connection.run(verbs.status())

    async def wait(self, name: str, timeout: float = wire.MAX_WAIT) -> int:
        return await self._connection.run(verbs.wait(name, timeout))

    async def drop(self, name: str, *, force: bool = False) -> int:
        return await self._connection.run(verbs.drop(name, force))

    async def release(self, name: str, *, force: bool = True) -> int:
        return await self._connection.run(verbs.release(name, force))


class Prepared:
    """As cprd.Prepared."""

    def __init__(self, connection: _Connection, ticket: Ticket, kept: str) -> None:
        self._connection = connection
        self._ticket = ticket
        self._open = True
        self.kept = kept
        connection.users += 1

    @property
    def generation(self) -> int:
        return self._ticket.generation

    async def commit(self) -> Saved:
        saved = await self._connection.run(verbs.commit(self._ticket))
        self._end()
        return saved

    async def abort(self) -> None:
        await self._connection.run(verbs.abort(self._ticket))
        self._end()

    def _end(self) -> None:
        if self._open:
            self._open = False
            self._connection.leave()


class Claim:
    """As cprd.Claim, as an async block. A cancelled block rejects."""

    def __init__(self, connection: _Connection, loaded: verbs.Loaded) -> None:
        self._connection = connection
        self._ticket = loaded.ticket
        self._bundle = loaded.bundle
        self._open = True
        self._begun = False
        self._closed = False
        self.state = loaded.state
        self.attempts = loaded.attempts
        self.last_reject = loaded.last_reject
        self.lease = loaded.lease
        connection.users += 1

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

    async def confirm(
        self,
        next: State | None = None,
        after_exit: bool | int | HasFileno = True,
        ttl: float | None = None,
    ) -> Saved | None:
        self._need_open()
        saved: Saved | None = None
        if next is None:
            await self._connection.run(verbs.confirm(self._ticket))
        else:
            forbidden = self._connection.forbidden()
            verb = verbs.confirm_next(forbidden, self._ticket, next, after_exit, ttl)
            saved = await self._connection.run(verb)
        self._open = False
        return saved

    async def reject(self, why: str = "") -> None:
        self._need_open()
        await self._connection.run(verbs.reject(self._ticket, why))
        self._open = False

    def _need_open(self) -> None:
        if not self._open or self._closed:
            raise Fenced("this claim has been confirmed, rejected or closed already")

    async def aclose(self) -> None:
        """As cprd.Claim.close; the descriptors are closed in a thread."""
        if self._closed or self._connection.pid != os.getpid():
            return
        self._closed = True
        try:
            if self._open and not self._begun:
                await self._give_back("closed without confirm")
        finally:
            self._open = False
            state, bundle = self.state, self._bundle

            def let_go() -> None:
                state.close()
                os.close(bundle)

            try:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(let_go)
            finally:
                self._connection.leave()

    async def _give_back(self, why: str) -> None:
        with trio.move_on_after(2.0, shield=True):
            try:
                await self._connection.run(verbs.reject(self._ticket, why), patience=link.GIVE_BACK)
            except CprdError:
                pass  # the end of the claim says it as well

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
            if not self._open or self._closed:
                return
            if error is None:
                await self.confirm()
            elif not self._begun:
                self._open = False
                await self._give_back(verbs.cut(f"{type(error).__name__}: {error}"))
        finally:
            await self.aclose()

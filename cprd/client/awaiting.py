"""The client with await, apart from the loop: cprd.trio and others add a `Connection`."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Generator
from time import monotonic
from typing import Any, Generic, Literal, Protocol, Self, TypeVar

from cprd.client import claim as claims
from cprd.client import exchange, verbs
from cprd.client import live as lives
from cprd.client.claim import Saved
from cprd.client.exchange import Answer, Common, Line, Step, run
from cprd.client.livestate import LiveVerbs
from cprd.client.sockets import is_lost, open_socket, receive_now, send_now
from cprd.protocol import messages
from cprd.protocol.rows import IfExists, Row, Shown, Status
from cprd.state import HasFileno, State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cprd.client.exchange import Steps, Verb

T = TypeVar("T")


class _Block(Protocol):
    async def __aenter__(self) -> Any: ...

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None: ...


B = TypeVar("B", bound=_Block)


class Opening(Generic[B]):
    """Something on the way: await it, or enter it as a block."""

    def __init__(self, open: Callable[[], Awaitable[B]]) -> None:
        self._open = open
        self._opened: B | None = None

    def __await__(self) -> Generator[Any, Any, B]:
        return self._open().__await__()

    async def __aenter__(self) -> B:
        self._opened = await self._open()
        await self._opened.__aenter__()
        return self._opened

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        assert self._opened is not None
        await self._opened.__aexit__(kind, error, trace)


class Connection(Line):
    """A line whose steps are awaited. A loop adds the waits."""

    async def take_turn(self, step: Step) -> None:
        raise NotImplementedError

    async def ready(self, step: Step, *, to_write: bool = False) -> None:
        """Wait until the socket can be read, or written."""
        raise NotImplementedError

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Call where blocking harms nobody."""
        raise NotImplementedError

    async def sleep(self, step: Step) -> None:
        raise NotImplementedError

    async def do(self, step: Step) -> Any:
        if step.kind == "turn":
            return await self.take_turn(step)
        if step.kind == "connect":  # waits only while the backlog is full
            left = max(0.0, step.until - monotonic())
            return await self.in_thread(lambda: open_socket(self.path, left))
        if step.kind == "ask":
            data, room = step.what
            await self._send(step, data)
            return await self._receive(step, room)
        if step.kind == "receive":
            return await self._receive(step)
        if step.kind == "watch":
            return await self.watch(step)
        if step.kind == "work":
            return await self.in_thread(step.what)
        return await self.sleep(step)

    async def watch(self, step: Step) -> None:
        while self.sock is not None and not is_lost(self.sock):
            await self.ready(step)

    async def _send(self, step: Step, data: bytes) -> None:
        assert self.sock is not None
        while True:
            try:
                return send_now(self.sock, data)
            except BlockingIOError:
                await self.ready(step, to_write=True)

    async def _receive(self, step: Step, room: bool = False) -> Answer:
        assert self.sock is not None
        while True:
            await self.ready(step)
            try:
                return receive_now(self.sock, room)
            except BlockingIOError:
                continue

    async def run(self, verb: Verb[T]) -> T:
        return await self.drive(run(self, verb))

    async def drive(self, steps: Steps[T]) -> T:
        try:
            step = next(steps)
            while True:
                try:
                    result = await self.do(step)
                except BaseException as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(result)
        except StopIteration as end:
            value: T = end.value
            return value


class Daemon(claims.DaemonFace):
    """As cprd.Daemon, for all tasks of a loop."""

    _line: Connection

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """As cprd.Daemon.close."""
        self._line.leave(self._user)

    aclose = close

    def _open(self) -> Connection:
        self._check_open()
        return self._line

    async def save(
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
        """As cprd.Daemon.save."""
        line = self._open()
        options = (if_exists, ttl, after_exit, require, timeout)
        return await line.run(verbs.save(line, name, state, *options))

    async def prepare(
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
        """As cprd.Daemon.prepare."""
        line = self._open()
        options = (if_exists, ttl, after_exit, require, timeout)
        return await line.run(verbs.prepare(line, Prepared, name, state, *options))

    def load(
        self,
        name: str,
        *,
        wait: float = 0.0,
        lease: float = messages.LEASE,
        generation: int | None = None,
        timeout: float | None = None,
    ) -> Opening[Claim]:
        """As cprd.Daemon.load: to await, or to enter."""

        def verb(line: Connection) -> Verb[Claim]:
            return verbs.load(line, Claim, name, wait, lease, generation, timeout)

        async def open() -> Claim:
            line = self._open()
            return await (self._wait(verb) if wait else line.run(verb(line)))

        return Opening(open)

    async def _wait(self, verb: Callable[[Connection], Verb[T]]) -> T:
        line, user = self._open(), object()
        other = line.lend(user)
        try:
            return await other.run(verb(other))
        finally:
            line.take_back(other, user)

    def live(
        self,
        name: str,
        *,
        wait: float = 0.0,
        lease: float = messages.LEASE,
        timeout: float | None = None,
    ) -> Opening[LiveState]:
        """As cprd.Daemon.live: to await, or to enter."""

        async def open() -> LiveState:
            return await begin(self._open().apart(), name, wait, lease, timeout)

        return Opening(open)

    async def list(self, *, timeout: float | None = None) -> list[Row]:
        """As cprd.Daemon.list."""
        return await self._open().run(verbs.rows(timeout))

    async def show(self, name: str, *, timeout: float | None = None) -> Shown:
        """As cprd.Daemon.show."""
        return await self._open().run(verbs.show(name, timeout))

    async def status(self, *, timeout: float | None = None) -> Status:
        """As cprd.Daemon.status."""
        return await self._open().run(verbs.status(timeout))

    async def wait(self, name: str, timeout: float = messages.MAX_WAIT) -> int:
        """As cprd.Daemon.wait."""
        return await self._wait(lambda _: verbs.wait(name, timeout))

    async def drop(self, name: str, *, force: bool = False, timeout: float | None = None) -> int:
        """As cprd.Daemon.drop."""
        return await self._open().run(verbs.drop("drop", name, force, timeout))

    async def release(self, name: str, *, force: bool = True, timeout: float | None = None) -> int:
        """As cprd.Daemon.release."""
        return await self._open().run(verbs.drop("release", name, force, timeout))


class Prepared(claims.PreparedFace):
    """As cprd.Prepared."""

    _line: Connection

    async def commit(self, *, timeout: float | None = None) -> Saved:
        """As cprd.Prepared.commit."""
        return await self._line.run(self._prepared.commit(timeout))

    async def abort(self, *, timeout: float | None = None) -> None:
        """As cprd.Prepared.abort."""
        await self._line.run(self._prepared.abort(timeout))


class Claim(claims.ClaimFace):
    """As cprd.Claim, as an async block. A cancelled block rejects. A confirm() that was sent is not
    cancelled before the outcome is known. Not closed by garbage collection: enter it, or close."""

    _line: Connection

    async def renew(self, lease: float | None = None, *, timeout: float | None = None) -> float:
        """As cprd.Claim.renew."""
        return await self._line.run(self._claim.renew(lease, timeout))

    async def begin(
        self, process: int | HasFileno | None = None, *, timeout: float | None = None
    ) -> None:
        """As cprd.Claim.begin."""
        await self._line.run(self._claim.begin(process, timeout))

    async def confirm(
        self,
        next: State | None = None,
        after_exit: bool | int | HasFileno = True,
        ttl: float | None = None,
        *,
        strict: bool = False,
        timeout: float | None = None,
    ) -> Saved | None:
        """As cprd.Claim.confirm."""
        return await self._line.run(self._claim.confirm(next, after_exit, ttl, strict, timeout))

    async def reject(self, why: str = "", *, timeout: float | None = None) -> None:
        """As cprd.Claim.reject."""
        await self._line.run(self._claim.reject(why, timeout))

    async def close(self) -> None:
        """As cprd.Claim.close; descriptors are closed in a thread."""
        if self._claim.open and self._line.mine():
            await self._line.run(self._claim.close())

    aclose = close

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._line.mine():
            await self._line.run(self._claim.leave(error))


class LiveState(LiveVerbs):
    """As cprd.LiveState, as an async block; changes need no await. A cancelled block before
    confirm() gives back what was left. What may block (letting go of a lingering socket or of a
    file) is done in a thread. Not closed by garbage collection: enter it, or close."""

    _line: Connection

    async def confirm(self, *, strict: bool = False, timeout: float | None = None) -> None:
        """As cprd.LiveState.confirm."""
        await self._line.run(self._live.confirm(strict, timeout))

    async def end(self, *, timeout: float | None = None) -> None:
        """As cprd.LiveState.end; files are let go of in a thread."""
        await self._line.run(self._live.end(timeout))

    async def close(self) -> None:
        """As cprd.LiveState.close."""
        if self._live.open and self._line.mine():
            await self._line.run(self._live.close())

    aclose = close

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._live.open and self._line.mine():
            await self._line.run(self._live.leave(error))


async def begin(
    line: Connection, name: str, wait: float, lease: float, timeout: float | None
) -> LiveState:
    """The verb live() on a line of its own."""
    verb = lives.begin(line, LiveState, name, wait, lease, timeout, lives.elsewhere)
    return await line.run(verb)


class Loop:
    """The functions of cprd.trio and cprd.asyncio; `line` makes a connection of that loop."""

    def __init__(self, line: Callable[[str, Common], Connection]) -> None:
        self._line = line

    def connect(
        self, path: str | os.PathLike[str] | None = None, *, timeout: float | None = None
    ) -> Opening[Daemon]:
        """As cprd.connect: to await, or to enter. A Daemon is for the tasks of a single loop."""

        async def open() -> Daemon:
            claims.check_timeout(timeout)
            connection = self._line(exchange.where(path), Common(timeout))
            await connection.drive(exchange.connect(connection))
            return Daemon(connection)

        return Opening(open)

    def live(
        self,
        name: str,
        path: str | os.PathLike[str] | None = None,
        *,
        wait: float = 0.0,
        lease: float = messages.LEASE,
        timeout: float | None = None,
    ) -> Opening[LiveState]:
        """As cprd.live: to await, or to enter. A LiveState is for the tasks of a single loop."""

        async def open() -> LiveState:
            claims.check_timeout(timeout)
            connection = self._line(exchange.where(path), Common(timeout))
            return await begin(connection, name, wait, lease, None)

        return Opening(open)

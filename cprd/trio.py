"""The same verbs with await, on trio.

    async with cprd.trio.connect() as daemon:
        async with daemon.load("web") as claim:
            ...

`daemon.load(...)` and `connect()` can be awaited, too: then the result is the block to enter, or to
close(). What can block (closing foreign descriptors) is done in a thread.
"""

from __future__ import annotations

import time
from _socket import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from cprd.client.awaiting import Claim, Connection, Daemon, LiveState, Loop, Prepared
from cprd.client.claim import Saved
from cprd.client.exchange import Common, Step
from cprd.errors import absent

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cprd.client.exchange import Steps

try:
    import trio
except ModuleNotFoundError as error:
    raise ImportError(absent("trio", "cprd.trio")) from error

__all__ = ["Claim", "Daemon", "LiveState", "Prepared", "Saved", "connect", "live"]

T = TypeVar("T")


class _Connection(Connection):
    def __init__(self, path: str, common: Common) -> None:
        super().__init__(path, common)
        self._turn = trio.Lock()

    def take_turn_now(self) -> bool:
        return not self._turn.locked()  # and nobody else runs before the turn is ended

    def end_turn(self) -> None:
        if self._turn.statistics().owner is trio.lowlevel.current_task():
            self._turn.release()

    def close_socket(self, sock: socket) -> None:
        if sock.fileno() >= 0:
            trio.lowlevel.notify_closing(sock.fileno())
            sock.close()

    async def do(self, step: Step) -> Any:
        left = max(0.0, step.until - time.monotonic())
        with trio.CancelScope(deadline=trio.current_time() + left, shield=step.shielded):
            return await super().do(step)
        if step.kind != "sleep":
            raise TimeoutError
        return None

    async def take_turn(self, step: Step) -> None:
        await self._turn.acquire()

    async def ready(self, step: Step, *, to_write: bool = False) -> None:
        wait = trio.lowlevel.wait_writable if to_write else trio.lowlevel.wait_readable
        await wait(self.fileno())

    async def in_thread(self, work: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(work)

    async def sleep(self, step: Step) -> None:
        await trio.sleep_forever()

    async def watch(self, step: Step) -> None:
        with suppress(trio.ClosedResourceError):
            await super().watch(step)

    def start(self, steps: Steps[None]) -> Callable[[], None]:
        """Drive `steps` in a task of the run itself, which ends with the run at the latest."""
        scope = trio.CancelScope()

        async def drive() -> None:
            with scope:
                await self.drive(steps)

        trio.lowlevel.spawn_system_task(drive)
        return scope.cancel


_loop = Loop(_Connection)
connect, live = _loop.connect, _loop.live

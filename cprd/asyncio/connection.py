"""The driver of a connection on an asyncio loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from cprd.client.awaiting import Connection
from cprd.client.exchange import Common, Step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cprd.client.exchange import Steps

T = TypeVar("T")

_running: set[asyncio.Task[None]] = set()  # a loop alone does not keep tasks


class LoopConnection(Connection):
    def __init__(self, path: str, common: Common) -> None:
        super().__init__(path, common)
        self._turns: dict[object, asyncio.Future[None]] = {}  # by task; the first has the turn

    def take_turn_now(self) -> bool:
        return not self._turns  # and nobody else runs before the turn is ended

    def end_turn(self) -> None:
        task = _task()
        if self._turns and next(iter(self._turns)) is task:
            self._leave_line(task)

    def _leave_line(self, task: object) -> None:
        self._turns.pop(task, None)
        for first in self._turns.values():
            if not first.done():
                first.set_result(None)
            break

    async def ready(self, step: Step, *, to_write: bool = False) -> None:
        loop, fd = asyncio.get_running_loop(), self.fileno()
        event: asyncio.Future[None] = loop.create_future()

        def note() -> None:
            if not event.done():
                event.set_result(None)

        (loop.add_writer if to_write else loop.add_reader)(fd, note)
        try:
            await _finish(event, step.until, step.shielded)
        finally:
            (loop.remove_writer if to_write else loop.remove_reader)(fd)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """The outcome is awaited in a cancelled task, too."""
        doing = asyncio.get_running_loop().run_in_executor(None, work)
        return await _finish(doing, float("inf"), True)

    async def sleep(self, step: Step) -> None:
        never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with suppress(TimeoutError):
            await _finish(never, step.until, step.shielded)

    def start(self, steps: Steps[None]) -> Callable[[], None]:
        """Drive `steps` in a task of the loop, which ends with the loop at the latest."""
        loop = asyncio.get_running_loop()
        task = loop.create_task(self.drive(steps), name="cprd")
        _running.add(task)
        task.add_done_callback(_running.discard)

        def stop() -> None:  # of any thread
            if not loop.is_closed():
                loop.call_soon_threadsafe(task.cancel)

        return stop

    async def take_turn(self, step: Step) -> None:
        task, turn = _task(), asyncio.get_running_loop().create_future()
        self._turns[task] = turn
        if len(self._turns) == 1:
            return
        try:
            await _finish(turn, step.until, step.shielded)
        except BaseException:
            self._leave_line(task)
            raise


def _task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # garbage collection, after the end of the loop
        return None


async def _finish(future: asyncio.Future[T], until: float, shielded: bool) -> T:
    """The result of `future`, which an end without a result cancels. Raises TimeoutError.

    A cancellation reaches a step that is not shielded at once. A shielded step goes on to the end;
    then the task is cancelled again, at the next await of the caller or of a step that is not
    shielded. Futures alone are awaited, never tasks: the end of a loop cancels all tasks."""
    cancelled = False
    try:
        while not future.done():
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError
            try:
                await asyncio.wait([future], timeout=None if left == float("inf") else left)
            except asyncio.CancelledError:
                if not shielded:
                    raise
                cancelled = True
        return future.result()
    finally:
        future.cancel()
        if cancelled and (task := asyncio.current_task()) is not None:
            task.uncancel()  # the number of cancellations stays: asyncio.timeout() counts
            task.cancel()

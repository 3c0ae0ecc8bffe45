"""What a step waits for.

A cancellation reaches a step that is not shielded at once. A shielded step goes on to the end; then
the task is cancelled again, at the next await of the caller or of a step that is not shielded.
Futures alone are awaited, never tasks: the end of a loop cancels all tasks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar

from cprd.client.exchange import Step

T = TypeVar("T")


async def ready(fd: int, add: Callable[..., Any], remove: Callable[[int], Any], step: Step) -> None:
    """Wait until a descriptor can be read, or written. Raises TimeoutError."""
    event: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def note() -> None:
        if not event.done():
            event.set_result(None)

    add(fd, note)
    try:
        await finish(event, step.until, step.shielded)
    finally:
        remove(fd)


async def in_thread(work: Callable[[], T]) -> T:
    """Call where blocking harms nobody. The outcome is awaited in a cancelled task, too."""
    doing = asyncio.get_running_loop().run_in_executor(None, work)
    return await finish(doing, float("inf"), True)


async def finish(future: asyncio.Future[T], until: float, shielded: bool) -> T:
    """The result of `future`, which an end without a result cancels. Raises TimeoutError."""
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

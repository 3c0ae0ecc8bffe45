"""A blocking call beside the loop, which goes on."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from cprd.qemu.interrupt import SIGNALS

T = TypeVar("T")


def aside(call: Callable[[], T]) -> asyncio.Future[T]:
    """Make a call in a thread, for which nobody waits at our end; its result."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    future.add_done_callback(_look)  # (nobody may be left to ask for it)

    def work() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # they are the main thread's
        try:
            result = call()
        except BaseException as error:
            _post(loop, future.set_exception, error)
        else:
            _post(loop, future.set_result, result)

    threading.Thread(target=work, daemon=True).start()
    return future


def _post(loop: asyncio.AbstractEventLoop, tell: Callable[[T], None], what: T) -> None:
    with suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(tell, what)


def _look(future: asyncio.Future[T]) -> None:
    if not future.cancelled():
        future.exception()

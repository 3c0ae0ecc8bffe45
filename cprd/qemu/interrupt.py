"""SIGINT, SIGTERM and SIGHUP while a guest changes hands.

They must not strike anywhere: between two commands to a QEMU they would leave it with settings that
are not its own, or its guest stopped. So a signal is only noted, and raised as Interrupted where
the work allows it; what follows is the way of every other failure, which takes the step back. From
`hold_off` on (before a QEMU is told that its state is whole) it is too late: they wait until the
outcome is known.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from cprd.errors import CprdError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
T = TypeVar("T")


class Interrupted(CprdError):
    """A signal asked for the end of this, in time."""


class _Watch:
    """The signals of one run."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.came = 0  # the first signal; more of them say nothing new
        self.raised = False  # it has been acted on
        self.deferred = False
        self.loop: asyncio.AbstractEventLoop | None = None
        self.task: asyncio.Task[Any] | None = None  # which may be cancelled now

    def note(self, number: int, _: object) -> None:
        """The handler."""
        if os.getpid() != self.pid:  # a child of ours that has not executed anything yet
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if not self.came:
            self.came = number
            if self.task is not None and self.loop is not None:
                self.loop.call_soon_threadsafe(self._strike)

    def _strike(self) -> None:
        """From the loop itself, so that it strikes where the task awaits something, now."""
        if self.task is not None and not self.deferred:
            self.task.cancel()

    def check(self) -> None:
        if self.came and not self.raised and not self.deferred:
            self.raised = True
            raise Interrupted(f"interrupted by {signal.Signals(self.came).name}")


_watch: _Watch | None = None


def run(work: Coroutine[Any, Any, T]) -> T:
    """asyncio.run, but for those signals. (One that is ignored, as under nohup, stays so.)"""
    global _watch
    watch = _watch = _Watch()

    async def watched() -> T:
        watch.loop = asyncio.get_running_loop()
        return await work

    ignored = (signal.SIG_IGN, None)
    before = {
        number: signal.signal(number, watch.note)
        for number in SIGNALS
        if signal.getsignal(number) not in ignored
    }
    try:
        return asyncio.run(watched())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check() -> None:
    """Raises Interrupted when a signal has come, once, unless that is held off."""
    if _watch is not None:
        _watch.check()


def hold_off() -> None:
    """From here on a signal changes nothing any more. Raises Interrupted when one has come."""
    if _watch is not None:
        _watch.check()
        _watch.deferred = True


@contextmanager
def allowed() -> Iterator[None]:
    """What is awaited in here may be broken off at any await. Raises Interrupted."""
    watch = _watch
    if watch is None or watch.deferred or watch.raised:
        yield
        return
    watch.check()
    task = watch.task = asyncio.current_task()
    try:
        yield
    except asyncio.CancelledError:
        if not watch.came or task is None:
            raise
        task.uncancel()
        watch.check()
        raise
    finally:
        watch.task = None
    watch.check()  # (it may have struck where the task swallowed it)


def came() -> bool:
    """Whether somebody waits for our end, be it held off or not."""
    return _watch is not None and _watch.came != 0


def exit_status() -> int:
    """128 and the signal that has been acted on, as a shell says it; 0 when none has."""
    return 128 + _watch.came if _watch is not None and _watch.raised else 0

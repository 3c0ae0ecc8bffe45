"""Loops that the tests run on: asyncio's own, and uvloop's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

try:
    import uvloop
except ModuleNotFoundError:
    factories: dict[str, Any] = {"asyncio": None}
else:
    factories = {"asyncio": None, "uvloop": uvloop.new_event_loop}
    uvloop.new_event_loop().close()  # the first loop makes a pipe for signals, which stays

Run = Callable[[Coroutine[Any, Any, Any]], Any]


def runner(loop: str) -> asyncio.Runner:
    """A new loop of that name, or the test is skipped."""
    if loop not in factories:
        pytest.skip("needs uvloop: pip install 'cprd[test]'")
    return asyncio.Runner(loop_factory=factories[loop])


def run_on(loop: str) -> Run:
    """A run(coroutine) that makes a new loop each time."""

    def run(work: Coroutine[Any, Any, Any]) -> Any:
        with runner(loop) as running:
            return running.run(work)

    return run


async def cancelled_here() -> None:
    """Have this task cancelled in the midst of a wait."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().call_soon(task.cancel)
    await asyncio.get_running_loop().create_future()

"""Tasks that serve no single connection: no such task can end the daemon.

The log, the store, reports to the service manager, deadlines, ended processes: where such a task
fails, the log says so, and after a pause the task begins again. Holds are served meanwhile, unless
the task that begins requests is the failing task: an error of a request is the end of a connection.
"""

from __future__ import annotations

import traceback
from collections.abc import Awaitable, Callable

import trio

from cprd.daemon import log

FIRST_PAUSE = 0.1  # s, doubled with each failure in a row
LONGEST_PAUSE = 30.0  # s
CALM = 60.0  # s without a failure, after which the next one counts as the first


async def tend(name: str, work: Callable[[], Awaitable[None]]) -> None:
    """Run `work` until `work` returns, or until cancelled; again and again after a failure. The log
    names the task and the place, once for equal failures in a row."""
    pause = FIRST_PAUSE
    said = ""
    while True:
        began = trio.current_time()
        try:
            return await work()
        except Exception as error:
            if trio.current_time() - began > CALM:
                pause, said = FIRST_PAUSE, ""
            why = f"{error!r} {_place(error)}"
            if why != said:
                log.event("task-failed", level=log.ERROR, task=name, why=why)
                said = why
        await trio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def _place(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""

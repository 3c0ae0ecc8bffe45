"""Stopping cprctl at each of its points in turn, and killing it there.

`points` learns them all from a run that nobody disturbs. `killed_at` starts a command that stops
itself at one of them and kills what stopped there, be it the command itself or a helper that it
forked: this process is their subreaper, so that it sees them stop.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections import Counter
from pathlib import Path

from tests.support.patience import PATIENCE, until

_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans(adopt: bool = True) -> None:
    """Whether orphans of this process's children become its own children (prctl(2))."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)


def points(log: Path) -> list[str]:
    """NAME, or NAME#K where a name comes more than once, in order."""
    seen: Counter[str] = Counter()
    found = []
    for name in log.read_text().split():
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return found


def stopped() -> int:
    """The pid of a child that has stopped itself: with `adopt_orphans`, a helper too."""
    found: list[int] = []

    def stops() -> bool:
        stop = os.waitid(os.P_ALL, 0, os.WSTOPPED | os.WNOHANG)
        if stop is not None and stop.si_status == signal.SIGSTOP:
            found.append(stop.si_pid)
        return bool(found)

    until(stops, lambda: "nothing stopped")
    return found[0]


def kill_where_it_stops(process: subprocess.Popen[bytes]) -> int:
    """Wait until `process` or one of its orphans stops itself; SIGKILL. The pid that was killed."""
    found: list[int] = []

    def stops() -> bool:
        over = process.poll() not in (None, 0)
        stopped = os.waitid(os.P_ALL, 0, os.WSTOPPED | os.WNOHANG)
        if stopped is not None and stopped.si_status == signal.SIGSTOP:
            found.append(stopped.si_pid)
        assert found or not over, f"nothing stopped; the command is {process.poll()}"
        return bool(found)

    until(stops, lambda: "nothing stopped")
    (pid,) = found
    os.kill(pid, signal.SIGKILL)
    if pid != process.pid:
        os.waitid(os.P_PID, pid, os.WEXITED)
    else:
        process.wait(PATIENCE)
    return pid

"""Bounds in seconds, for this machine as fast as this machine is today.

`patience(seconds)`: what takes at most so long on two idle cores may take here. The factor is
measured once, at the start of the run: by the wall-clock time of a Python that starts, several at
once, as the tests start them. $CPRD_TEST_PATIENCE sets the factor instead.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable

VARIABLE = "CPRD_TEST_PATIENCE"
IDLE = 0.1  # s, for SAMPLE on two idle cores of 2024
SAMPLE = 4  # Pythons at once
MOST = 6.0  # what hangs is to fail before pytest's own timeout
ROOM = 3.0  # the load grows after the measurement: three workers share two cores


@functools.cache
def factor() -> float:
    """How many times slower than two idle cores this machine may be, at least 1."""
    told = os.environ.get(VARIABLE)
    if told is None:
        told = os.environ[VARIABLE] = f"{_measured():.2f}"  # workers of one run share the figure
    return min(max(1.0, float(told)), MOST)


def patience(seconds: float) -> float:
    """The bound for what takes less than `seconds` on two idle cores."""
    return seconds * factor()


def in_time(took: float, seconds: float) -> bool:
    """Whether what took so long takes less than `seconds` on two idle cores. The load may have
    grown since the start of the run: then the machine is measured anew."""
    return took < patience(seconds) or took < seconds * _measured()


def _measured() -> float:
    begin = time.monotonic()
    command = [sys.executable, "-I", "-c", "import json, subprocess, socket"]
    started = [subprocess.Popen(command) for _ in range(SAMPLE)]
    for process in started:
        process.wait()
    return ROOM * (time.monotonic() - begin) / IDLE


PATIENCE = patience(20.0)  # s, for whatever should have happened at once


def rest(seconds: float) -> None:
    """Let time pass in which something must not happen, or in which something happens at any
    moment: there is no event to await. The caller says which of them."""
    time.sleep(seconds)


def until(true: Callable[[], object], what: Callable[[], str], seconds: float = PATIENCE) -> None:
    """Wait for what has no event of its own to wait for; `what` says how far it came."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"after {seconds:g} s still {what()}"
        time.sleep(0.005)  # between two looks: here, and nowhere else

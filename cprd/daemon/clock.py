"""The clock of all records: CLOCK_BOOTTIME, which also counts while the machine sleeps."""

from __future__ import annotations

import time


def now() -> float:
    """Seconds since the machine booted."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)

"""How a verb of cprctl fails: a line on stderr, and an exit status for scripts."""

from __future__ import annotations

from cprd.errors import Busy, CprdError, InvalidInput, NotHeld
from cprd.linux.stdio import note


def exit_status(error: CprdError) -> int:
    """The exit status for scripts: 3 not held, 4 busy, 2 a usage error, 1 any other error."""
    if isinstance(error, NotHeld):
        return 3
    if isinstance(error, Busy):
        return 4
    return 2 if isinstance(error, InvalidInput) else 1


def fail(why: str, status: int) -> int:
    """Say why on one line of stderr; returns `status`."""
    note(f"cprctl: {' '.join(why.split())}")
    return status

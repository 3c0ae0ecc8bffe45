"""Whether the journal of systemd reads a log, and times for any other log."""

from __future__ import annotations

import os
import time


def reads(fd: int) -> bool:
    """Whether the journal reads from `fd`: $JOURNAL_STREAM, systemd.exec(5), names
    the device and the inode of the journal's stream. False for a stream redirected since."""
    try:
        found = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def stamp() -> str:
    """The time now, in UTC, to the millisecond, as in RFC 3339."""
    now = time.time_ns() // 1_000_000
    clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now // 1000))
    return f"{clock}.{now % 1000:03d}Z"

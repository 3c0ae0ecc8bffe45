"""Whether the journal of systemd reads a log, and times for any other log."""

from __future__ import annotations

import os
import time
from functools import lru_cache


def reads(fd: int) -> bool:
    """Whether the journal reads from `fd`: $JOURNAL_STREAM, systemd.exec(5), names
    the device and the inode of the journal's stream. False for a stream redirected since."""
    try:
        found = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def stamp(at: int) -> str:
    """A time (nanoseconds since 1970), in UTC, to the millisecond, as in RFC 3339."""
    millis = at // 1_000_000
    return f"{_second(millis // 1000)}.{millis % 1000:03d}Z"


@lru_cache(maxsize=2)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))

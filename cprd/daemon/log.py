"""A line an event on stderr: `event key=value ...`, for people and for grep. The content of states
is never logged. For the journal of systemd a line begins with the priority (sd-daemon(3)), for
anybody else with the time.

While `write_behind` runs, clients get answers first. Lines are made and written afterwards, those
of `GATHERED` seconds at once: a write to stderr and the wake-up of the reader take as long as a
whole step. Errors are written at once. No line is worth waiting for: where nobody reads stderr the
last thousand lines stay, and the rest are counted.
"""

from __future__ import annotations

import _thread
import os
import select
import time
from collections import deque
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import trio

INFO, WARNING, ERROR = 6, 4, 3
MOST = 1000  # lines that wait for a reader
MANY = 500  # lines that are written without waiting for more
GATHERED = 0.02  # s
PIECE = 4096  # bytes that a pipe takes at once when it says that it takes any (PIPE_BUF)
RETRY = 0.5  # s until a reader that did not read is tried again


def _journal_reads(fd: int) -> bool:
    """Whether the journal reads from `fd`: $JOURNAL_STREAM, systemd.exec(5), names the device and
    the inode of the journal's stream. False for a stream redirected since."""
    try:
        found = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


_journal = _journal_reads(2)

Event = tuple[int, str, int, dict[str, Any]]  # when (ns of the wall clock), what, level, fields

_behind: deque[bytes | Event] = deque()  # lines that were begun are bytes
_missing = 0  # lines that were not kept
_one_at_a_time = _thread.allocate_lock()
_writer: trio.lowlevel.ParkingLot | None = None
_loop = 0  # its thread; another one writes at once


def event(what: str, *, level: int = INFO, **fields: Any) -> None:
    """Log an event, now or in a moment. Never blocks."""
    global _missing
    if len(_behind) >= MOST:
        _behind.popleft()
        _missing += 1
    _behind.append((time.time_ns(), what, level, fields))
    ours = _writer is not None and _thread.get_ident() == _loop
    if not ours or level <= ERROR or len(_behind) >= MANY:
        _write()
    if ours and _behind and _writer:  # parked
        _writer.unpark()


def _line(event: Event) -> bytes:
    at, what, level, fields = event
    millis = at // 1_000_000
    when = f"{_second(millis // 1000)}.{millis % 1000:03d}Z"  # as in RFC 3339
    line = f"<{level}>{what}" if _journal else f"{when} {what}"
    for key, value in fields.items():
        if value is None:
            continue
        if type(value) is int:
            line += f" {key}={value}"
            continue
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        if not _plain(text):
            text = ascii(text) if not text.isprintable() else '"' + text.replace('"', "'") + '"'
        line += f" {key}={text}"
    return line.encode("utf-8", "replace") + b"\n"


@lru_cache(maxsize=2)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def _plain(text: str) -> bool:
    if text.isalnum():
        return True
    return bool(text) and text.isprintable() and not any(c in text for c in ' "=')


def _next() -> bytes:
    """Take the first of the lines that wait."""
    first = _behind.popleft()
    return first if isinstance(first, bytes) else _line(first)


def _write() -> bool:
    """Write waiting lines without blocking. Returns whether nothing is left."""
    global _missing
    stderr = select.poll()
    stderr.register(2, select.POLLOUT)
    with _one_at_a_time:
        while _behind:
            events = stderr.poll(0)
            if not events:
                return False
            piece = b""
            if _missing:
                lost = {"count": _missing}
                piece = _line((time.time_ns(), "log-lines-lost", WARNING, lost))
                _missing = 0
            piece += _next()
            while _behind:
                line = _next()
                if len(piece) + len(line) > PIECE:
                    _behind.appendleft(line)
                    break
                piece += line
            try:
                written = os.write(2, piece[:PIECE])
            except BlockingIOError:
                written = 0
            except OSError:  # nobody reads it any more, or it was closed
                written = len(piece)
            if written < len(piece):
                _behind.appendleft(piece[written:])
                if not written:
                    return False
    return True


async def write_behind() -> None:
    """Write the lines of the event loop's other tasks, a moment later. Until cancelled."""
    global _writer, _loop
    import trio

    _loop = _thread.get_ident()
    _writer = trio.lowlevel.ParkingLot()
    try:
        while True:
            if _write():
                await _writer.park()
                await trio.sleep(GATHERED)
            else:
                await trio.sleep(RETRY)
    finally:
        _writer = None
        _write()

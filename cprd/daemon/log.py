"""A line an event on stderr: `event key=value ...`, for people and for grep. The content of states
is never logged. For the journal of systemd a line begins with the priority (sd-daemon(3)), for
anybody else with the time.

While `write_behind` runs, clients get answers first and lines are written afterwards: a write to
stderr and the wake-up of the reader take as long as a whole step. No line is worth waiting for:
where nobody reads stderr the last thousand lines stay, and the rest are counted.
"""

from __future__ import annotations

import _thread
import os
import select
from collections import deque
from typing import TYPE_CHECKING, Any

from cprd.linux import journal

if TYPE_CHECKING:
    import trio

_journal = journal.reads(2)
INFO, WARNING, ERROR = 6, 4, 3
MOST = 1000  # lines that wait for a reader
PIECE = 4096  # bytes that a pipe takes at once when it says that it takes any (PIPE_BUF)
RETRY = 0.5  # s until a reader that did not read is tried again

_behind: deque[bytes] = deque()
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
    _behind.append(_line(what, level, fields))
    if _writer is not None and _thread.get_ident() == _loop:
        _writer.unpark()
    else:
        _write()


def _line(what: str, level: int, fields: dict[str, Any]) -> bytes:
    line = f"<{level}>{what}" if _journal else f"{journal.stamp()} {what}"
    for key, value in fields.items():
        if value is None:
            continue
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        if not text or not text.isprintable() or any(c in text for c in ' "='):
            text = ascii(text) if not text.isprintable() else '"' + text.replace('"', "'") + '"'
        line += f" {key}={text}"
    return line.encode("utf-8", "replace") + b"\n"


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
            piece = _behind.popleft()
            if _missing:
                piece = _line("log-lines-lost", WARNING, {"count": _missing}) + piece
                _missing = 0
            while _behind and len(piece) + len(_behind[0]) <= PIECE:
                piece += _behind.popleft()
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
            with trio.CancelScope() as waiting:
                if not _write():
                    waiting.deadline = trio.current_time() + RETRY
                await _writer.park()
    finally:
        _writer = None
        _write()

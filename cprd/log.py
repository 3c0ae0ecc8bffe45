"""One line an event on stderr: `event key=value ...`, for people and for grep. Never what a state
contains. Under systemd the line begins with its priority (sd-daemon(3)).

While `write_behind` runs, lines are written once those that wait for an answer have it: a write to
stderr and waking up who reads it take as long as a whole step.
"""

from __future__ import annotations

import _thread
import os
import sys
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import trio

_journal = "JOURNAL_STREAM" in os.environ
INFO, WARNING, ERROR = 6, 4, 3

_behind: deque[bytes] = deque()
_writer: trio.lowlevel.ParkingLot | None = None
_loop = 0  # its thread; another one writes at once


def event(what: str, *, level: int = INFO, **fields: Any) -> None:
    line = f"<{level}>{what}" if _journal else what
    for key, value in fields.items():
        if value is None:
            continue
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        if not text or not text.isprintable() or any(c in text for c in ' "='):
            text = ascii(text) if not text.isprintable() else '"' + text.replace('"', "'") + '"'
        line += f" {key}={text}"
    _behind.append(line.encode("utf-8", "replace") + b"\n")
    if _writer is not None and _thread.get_ident() == _loop:
        _writer.unpark()
    else:
        _write()


def _write() -> None:
    lines = b""
    while _behind:
        lines += _behind.popleft()
    try:
        while lines:
            lines = lines[os.write(2, lines) :]
    except OSError:
        sys.stderr = None  # nobody reads it: go on without


async def write_behind() -> None:
    """Write the lines of what else runs in this event loop, a moment later. Until cancelled."""
    global _writer, _loop
    import trio

    _loop = _thread.get_ident()
    _writer = trio.lowlevel.ParkingLot()
    try:
        while True:
            _write()
            await _writer.park()
    finally:
        _writer = None
        _write()

"""One line an event on stderr, `event key=value ...`, as cprd's own log."""

import os
import select
import time


def event(what: str, **fields: object) -> None:
    """Write the line, or drop the line where writing would block or fails."""
    for key, value in fields.items():
        text = str(value)
        plain = text.isprintable() and text and not set(text) & set(' "=')
        what += f" {key}={text if plain else ascii(text)}"
    stderr = select.poll()
    stderr.register(2, select.POLLOUT)
    try:
        if stderr.poll(0):
            line = (_stamp() + what).encode()
            os.write(2, line[:4095] + b"\n")  # PIPE_BUF: as much as a pipe takes at once
    except OSError:
        pass


def _stamp() -> str:
    """The time in UTC, unless the journal reads stderr ($JOURNAL_STREAM, systemd.exec(5))."""
    stderr = os.fstat(2)
    if os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}":
        return ""
    now = time.time_ns() // 1_000_000
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now // 1000))}.{now % 1000:03d}Z "

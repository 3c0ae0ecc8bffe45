"""One line an event on stderr, `event key=value ...`, as cprd's own log."""

import os
import select

from cprd.linux import journal


def event(what: str, **fields: object) -> None:
    """Write the line, or drop the line where writing would block or fails."""
    if not journal.reads(2):
        what = f"{journal.stamp()} {what}"
    for key, value in fields.items():
        text = str(value)
        plain = text.isprintable() and text and not set(text) & set(' "=')
        what += f" {key}={text if plain else ascii(text)}"
    stderr = select.poll()
    stderr.register(2, select.POLLOUT)
    try:
        if stderr.poll(0):
            os.write(2, what.encode()[:4095] + b"\n")  # PIPE_BUF: as much as a pipe takes at once
    except OSError:
        pass

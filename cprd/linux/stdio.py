"""The three standard streams, for commands that are started with some of them closed (`>&-`).

Then Python has None for sys.stdout, and what is opened next gets the number 0, 1 or 2: whoever
prints to stderr afterwards writes into it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from typing import TextIO


def stand_in() -> frozenset[int]:
    """Open /dev/null on whichever of the descriptors 0 to 2 are closed, for us and for what we
    become, and have sys.stdout and sys.stderr write there. Returns which they were.

    To be called before anything else is opened."""
    closed = frozenset(fd for fd in (0, 1, 2) if _is_closed(fd))
    for fd in sorted(closed):
        null = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: fd
        if null != fd:
            os.dup2(null, fd)
            os.close(null)
        os.set_inheritable(fd, True)
    if sys.stdout is None:
        sys.stdout = _writer(1)
    if sys.stderr is None:
        sys.stderr = _writer(2)
    return closed


def _writer(fd: int) -> TextIO:
    return open(fd, "w", encoding="utf-8", errors="backslashreplace", closefd=False)


def _is_closed(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError as error:
        return error.errno == errno.EBADF
    return False


def printable(text: str) -> str:
    """`text` fit for a terminal: a foreign name may hold anything, and is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def say(*lines: str) -> None:
    """Lines on stdout. What is not printable in a line is escaped: a peer may have said it."""
    for line in lines:
        print(printable(line))


def note(text: str) -> None:
    """A line on stderr, escaped as by `say`: should that fail, things take their course."""
    try:
        print(printable(text), file=sys.stderr)
    except (OSError, ValueError):
        pass


def flush() -> None:
    """Write out what was printed, before a fork or an exec. That nobody reads it, or that there is
    no room for it, is no reason to give up what comes after."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):  # ValueError: closed, by whoever imported us
            pass

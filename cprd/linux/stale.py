"""Why nobody answers at an existing socket file: in containers as a rule a stale bind mount."""

from __future__ import annotations

import errno
import os

from cprd.linux import proc


def hint(path: str, number: int | None) -> str:
    """Returns what to look at after connect() to `path` failed with errno `number`; "" for nothing
    in particular. Reads /proc/self/mountinfo; never raises."""
    if number != errno.ECONNREFUSED:
        return ""
    if is_mount(path):
        return (
            "; the file itself is a bind mount, and stays the socket of a cprd that has gone: mount"
            " the socket's directory instead, never the file"
        )
    return "; the socket's file is there and its cprd has gone"


def is_mount(path: str) -> bool:
    """Whether something is mounted at `path` itself, as far as can be seen."""
    try:
        wanted = os.fsencode(os.path.realpath(path))
        rows = proc.read("self", "mountinfo").split(b"\n")[:-1]
        return any(_unescape(line.split(b" ", 5)[4]) == wanted for line in rows)
    except (OSError, IndexError, ValueError):
        return False


def _unescape(word: bytes) -> bytes:
    """The kernel writes space, tab, newline and backslash as three octal digits."""
    for octal in (b"040", b"011", b"012", b"134"):  # the backslash last
        word = word.replace(b"\\" + octal, bytes([int(octal, 8)]))
    return word

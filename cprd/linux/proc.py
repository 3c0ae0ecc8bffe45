"""What /proc tells of a process: nothing where nobody may ask, or the process has ended."""

from __future__ import annotations

import errno
import os

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from collections.abc import Iterator


def read(pid: int | str, what: str) -> bytes:
    """The content of /proc/PID/WHAT; empty where unreadable."""
    try:
        with open(f"/proc/{pid}/{what}", "rb") as file:
            return file.read()
    except OSError:
        return b""


def lines(pid: int | str, what: str) -> list[str]:
    """The lines of /proc/PID/WHAT; none where unreadable."""
    return read(pid, what).decode("utf-8", "surrogateescape").split("\n")[:-1]


def files(pid: int | str) -> Iterator[tuple[int, str]]:
    """(descriptor, the kernel's name for the file) of each open file of a process. Raises OSError
    where no descriptor is left to look with."""
    where = f"/proc/{pid}/fd"
    try:
        numbers = os.listdir(where)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        return
    for number in numbers:
        try:
            yield int(number), os.readlink(f"{where}/{number}")
        except OSError:
            continue  # closed since

"""For programs that bind by themselves: an object for LD_PRELOAD that answers bind() of a held
address with the held socket (bind.c says how), and the check of programs.

The object is built from bind.c with cc: once for all users by `python -m cprd.bind`, else at the
first use, into a directory of the user.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

VARIABLE = "CPRD_BIND"
MOST = 256  # listeners; bind.c


def object_for(file: str, command: Sequence[str]) -> str:
    """The path of the object for `file`, the program of `command`; built when there is none yet.

    Blocks while the compiler runs, 60 s at most. Raises CprdError without a compiler, and
    for a program that starts without the object."""
    from cprd.bind.build import find_or_build
    from cprd.bind.program import check

    path = find_or_build()
    check(file, command, path)
    return path


def environment(path: str, sockets: Iterable[tuple[int, int, str]]) -> dict[str, str]:
    """The variables for a command with `sockets`: (descriptor, inode, path of the file or "").

    Raises LimitExceeded above 256."""
    from cprd.errors import LimitExceeded

    entries = []
    for fd, inode, name in sockets:
        file = os.stat(name) if name else None
        place = f"{file.st_dev}:{file.st_ino}" if file else "0:0"
        entries.append(f"{fd}:{inode}:{place}")
    if len(entries) > MOST:
        raise LimitExceeded(f"--bind: {len(entries)} listeners, and it knows {MOST} at most")
    before = os.environ.get("LD_PRELOAD", "")
    return {"LD_PRELOAD": f"{path}:{before}" if before else path, VARIABLE: ",".join(entries)}

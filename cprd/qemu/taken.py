"""Whether somebody listens already where a new QEMU's monitor is to be.

A QEMU that binds the path of another one's socket takes it away without a word. And when cprd holds
nothing, a QEMU that lives at that path has the guest: a second one would run it twice."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING

from cprd.errors import Busy
from cprd.qemu.overlap import mend

if TYPE_CHECKING:
    from cprd.qemu.command import Command


def refuse_taken(command: Command) -> None:
    """Raises Busy when a process listens at the path of a monitor of COMMAND's own. (A command
    without any cannot be asked.) Says nothing on that connection."""
    for path, _ in command.monitors(people=True):
        mend(path)
        if _is_taken(path):
            raise Busy(
                f"a QEMU listens at {path} already, and its guest may run: nothing was started."
                " Save it (cprctl qemu save), shut its guest down, or end it; then start again"
            )


def _is_taken(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)  # a queue full of clients is an answer as well
        try:
            failure = sock.connect_ex(path)
        except OSError:  # too long for an address: nobody listens there
            return False
    return failure in (0, errno.EAGAIN, errno.EACCES)

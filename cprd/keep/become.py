"""The command `cprd --keep` becomes the parent: the same PID, another program."""

import os
import socket
import sys
from typing import NoReturn

from cprd.errors import Unavailable
from cprd.keep import messages
from cprd.keep.record import Record

PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "__main__.py")


def become_parent(
    listeners: list[tuple[str, socket.socket]], inode: tuple[int, int] | None, command: list[str]
) -> NoReturn:
    """Execute the parent of `command`, which is to serve `listeners` (name, socket), at least one
    of them. The parent removes the first listener's file at the end, unless `inode` is None or not
    the file's any more.

    Raises Unavailable, with the message socket's file at most left behind."""
    path = listeners[0][1].getsockname()
    if not isinstance(path, str) or not path:
        raise Unavailable("cprd --keep wants a listening socket that has a path")
    record = Record()
    if inode is not None:
        record.path, record.inode = os.path.abspath(path), inode
    record.notify_path = os.path.abspath(path) + ".keep"
    record.sockets = [(name, sock.fileno()) for name, sock in listeners]
    try:
        notify = messages.listen(record.notify_path)
        record.notify = notify.fileno()
        record.pass_on(True)
        line = [sys.executable, "-I", "-S", PROGRAM, str(record.write()), *command]
        os.execv(sys.executable, line)
    except OSError as error:
        raise Unavailable(f"cprd --keep: {record.notify_path}: {error}") from None

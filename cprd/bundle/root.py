"""The root of a live hold in the queue of a bundle: a header, and the root's receiving end.

So a live hold travels, is held and is let go of as any bundle is, in one descriptor.
"""

from __future__ import annotations

import _socket as socket  # as in rights
import errno

from cprd.bundle.layout import HEADER, MAGIC, NODE, VERSION, Header
from cprd.bundle.unpack import as_socket
from cprd.errors import Damaged, LimitExceeded
from cprd.linux.nofile import ADVICE
from cprd.linux.rights import SO_PEEK_OFF, close_all, receive, send

PARKED, DEPTH = 1, 1  # as a request that saves says them

_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT


def park_root(inlet: socket.SocketType, root: int) -> None:
    """Send the receiving end of a root into the queue whose sending end is `inlet`. Both are
    borrowed. Does not block.

    Raises BrokenPipeError when nobody has the receiving end of the queue, LimitExceeded."""
    try:
        send(inlet, HEADER.pack(MAGIC, VERSION, NODE, DEPTH, PARKED, PARKED, 0, 0), [root])
    except (BrokenPipeError, ConnectionResetError) as error:
        raise BrokenPipeError(error.errno, error.strerror) from None
    except OSError as error:
        raise LimitExceeded(f"cannot park the root of a live hold: {error.strerror}") from None


def peek_root(queue: int) -> int:
    """The receiving end of the root in a queue (borrowed), owned by the caller. Consumes nothing.

    Raises Damaged for another content, LimitExceeded without room for one descriptor."""
    sock = as_socket(queue)
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, -1)
        try:
            data, fds, flags = receive(sock, HEADER.size + 1, _PEEK)
        except ConnectionResetError:  # said once when its sender left something unread
            data, fds, flags = receive(sock, HEADER.size + 1, _PEEK)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            raise Damaged("not a live hold: nothing is queued in it") from None
        raise Damaged(f"not a live hold: {error.strerror}") from None
    finally:
        sock.close()
    try:
        header = Header(data)
        if flags & socket.MSG_CTRUNC:
            raise LimitExceeded(
                f"no descriptor left to receive the root of a live hold with: raise RLIMIT_NOFILE"
                f" {ADVICE}; what is held stays held"
            )
        if (header.kind, header.total, len(fds)) != (NODE, PARKED, PARKED):
            raise Damaged("not a live hold: its queue holds something else than a root")
        return fds.pop()
    finally:
        close_all(fds)

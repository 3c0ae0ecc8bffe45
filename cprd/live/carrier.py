"""The root of a live hold travels like a saved state: parked in a queue, alone, after a header."""

from __future__ import annotations

import _socket as socket  # as in queue

from cprd.bundle.layout import LIVE_ROOT
from cprd.errors import Damaged
from cprd.linux.nofile import cut_short
from cprd.linux.rights import SO_PEEK_OFF, close_all, peek, send
from cprd.live.reader import as_queue

PARKED = {"fds": 0, "bytes": 0, "parked": 1, "depth": 1}
"""Fields of the request that parks a root."""


def park(inlet: socket.SocketType, root: int) -> None:
    """Park the receiving end of a root; both are borrowed. Raises LimitExceeded, OSError."""
    send(inlet, LIVE_ROOT, [root])


def root_of(bundle: int) -> int:
    """The receiving end of the root that lies in a bundle, owned by the caller; `bundle` is
    borrowed, and stays as before. Raises Damaged, LimitExceeded. Does not block."""
    sock = as_queue(bundle)
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, -1)
        data, fds, flags = peek(sock, len(LIVE_ROOT) + 1)
    except OSError as error:
        raise Damaged(f"the bundle of a live hold cannot be read: {error.strerror}") from None
    finally:
        sock.detach()
    if data == LIVE_ROOT and flags & socket.MSG_CTRUNC:
        raise cut_short("a live hold")
    if data != LIVE_ROOT or len(fds) != 1:
        close_all(fds)
        raise Damaged("not the bundle of a live hold")
    return fds[0]

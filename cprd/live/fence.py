"""Take a live hold from a living owner, and let go of its content: the part of cprd.

`shut` never blocks and reads nothing. Everything else here reads queues that others fill, whose
lock somebody may hold for long, and may drop the last reference of a foreign file, which may block
for ever: it is for a process of its own. Once `fence` has returned, no change of the owner counts:
each raises Fenced there.
"""

from __future__ import annotations

import _socket as socket  # as in queue
import os
from collections.abc import Iterable

from cprd.errors import Damaged
from cprd.linux.pause import point
from cprd.linux.rights import SCM_MAX_FD, SO_PEEK_OFF, close_all, queued, receive, scm_fds
from cprd.live.reader import MOST_TURNS, as_queue, shut
from cprd.live.records import MOST

_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT
_DRAIN = 1 << 20  # records of one queue, at most


def fence(root: int) -> list[int]:
    """Shut the root and every segment; returns the segments, which the caller owns.

    `root`: the receiving end, borrowed. Takes time by segments, not by what they hold. Raises
    Damaged for a root that cannot be read; the root is shut then."""
    shut(root)
    point("live:fence")
    segments = _copies(root)
    try:
        for fd in segments:
            try:
                shut(fd)
            except Damaged:
                pass  # no queue of ours, and nobody's hold
        point("live:fenced")
    except BaseException:
        close_all(segments)
        raise
    return segments


def let_go(queues: Iterable[int]) -> None:
    """Drain queues, whoever else has an end of them. Borrowed. May block for ever.

    A hold ends deep: first its segments, then its root."""
    for fd in queues:
        try:
            sock = as_queue(fd)
        except Damaged:
            continue
        try:
            point("live:drain")
            for _ in range(_DRAIN):
                if not sock.recv(1, socket.MSG_DONTWAIT):
                    break
        except OSError:
            pass  # nothing is left
        finally:
            sock.detach()
        point("live:drained")


def segments(root: int) -> int:
    """How many segments the root names, as far as can be seen without a read; some twice while
    the owner rewrites the root. `root` is borrowed."""
    return max(0, scm_fds(root))


def _copies(root: int) -> list[int]:
    """What is parked in the root, each file once; owned by the caller."""
    sock = as_queue(root)
    found: dict[int, int] = {}
    again: list[int] = []
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
        waiting, total, turns = queued(sock), 0, 0
        while total < waiting and turns < MOST_TURNS:
            data, fds, flags = receive(sock, MOST, _PEEK)
            for fd in fds:
                inode = os.fstat(fd).st_ino
                (again.append(fd) if inode in found else found.setdefault(inode, fd))
            if flags & socket.MSG_CTRUNC or not data:
                raise Damaged(
                    f"the root of a live hold of {len(found)} segments and more cannot be read: no"
                    f" room for {SCM_MAX_FD} descriptors more"
                )
            total += len(data)
            turns += 1
    except OSError as error:
        close_all(found.values())
        raise Damaged(f"the root of a live hold cannot be read: {error.strerror}") from None
    except BaseException:
        close_all(found.values())
        raise
    finally:
        close_all(again)
        sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, -1)
        sock.detach()
    return [*found.values()]

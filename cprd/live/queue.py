"""One queue of the owner: a SOCK_SEQPACKET pair with both ends in hand.

A queue is rewritten in place: a record that voids all others goes to its end, then the older
records are received from its front, without a control buffer, so that the kernel lets go of their
descriptors.

An interrupt (KeyboardInterrupt) may come between any two steps of Python, never within one call
into C. So what installs descriptors, or closes them, is one call into C each; and what such a call
did is learned from the queue itself afterwards (`resync`).
"""

from __future__ import annotations

import _socket as socket  # as in linux.rights; closes its descriptor when nobody has it any more
import errno
import os
from array import array
from collections import deque
from itertools import chain, repeat, starmap

from cprd.errors import Fenced, LimitExceeded
from cprd.linux.nofile import cut_short, hard_limit, none_left
from cprd.linux.pause import point
from cprd.linux.rights import SCM_MAX_FD, SO_PEEK_OFF, queued, send
from cprd.live.records import Key, ordinal_of

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    Peeked = tuple[bytes, list[tuple[int, int, bytes]], int, Any]

MOST_RECORDS = 278  # of the default send buffer, whatever their size
_SOL = socket.SOL_SOCKET
_SPACE = socket.CMSG_SPACE(SCM_MAX_FD * 4)
_DONTWAIT = socket.MSG_DONTWAIT
_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT
_PEEK_FDS = _PEEK | socket.MSG_CMSG_CLOEXEC
_CTRUNC = socket.MSG_CTRUNC
APPEND = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_GONE = (errno.EPIPE, errno.EPERM, errno.ECONNRESET, errno.ENOTCONN, errno.ESHUTDOWN)

Sent = tuple[int, int, tuple[Key, ...]]
"""A record in a queue: ordinal, bytes, the keys whose descriptors it carries."""


def fenced(why: str) -> Fenced:
    return Fenced(
        f"this live hold is not this process's any more ({why}): it was dropped by force"
        " (cprctl drop --force), and no change counts from now on"
    )


def _unreadable(error: OSError, what: str) -> Exception:
    if error.errno is None:
        return error  # of a signal handler
    return fenced(f"its queue cannot be {what}: {error.strerror}")


def cost(size: int) -> int:
    """How much of a send buffer a record of so many bytes takes, at most."""
    return 320 + max(512, 1 << (size + 319).bit_length())


SMALL = 193  # bytes: a smaller record takes LEAST
LEAST = cost(SMALL - 1)


def make_pair() -> tuple[socket.SocketType, socket.SocketType]:
    """The sending and the receiving end of a new queue. Raises LimitExceeded."""
    try:
        try:
            return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
        with hard_limit():
            return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError as error:
        raise none_left("for a queue of the live hold", error, "nothing was changed") from None


class Queue:
    """`tx` is None where nothing can be appended (the queue of a predecessor)."""

    __slots__ = ("_inodes", "busy", "first_valid", "next", "records", "rx", "spent", "tx")

    def __init__(self, tx: socket.SocketType | None, rx: socket.SocketType) -> None:
        self.tx = tx
        self.rx = rx
        self.records: list[Sent] = []  # what lies in the queue, oldest first
        self.next = 0  # ordinal of the next record
        self.first_valid = 0  # ordinal; what is older is void, and to be drained
        self.spent = 0  # of the send buffer
        self.busy = False  # another thread drains it
        self._inodes: list[int] = []

    def send(self, data: bytes, fds: Sequence[int]) -> None:
        """Append one record. Does not block. Raises Fenced, LimitExceeded, OSError (of `fds`)."""
        assert self.tx is not None
        try:
            send(self.tx, data, fds)
        except OSError as error:
            if error.errno in _GONE:
                raise fenced(str(error.strerror)) from None
            if error.errno not in (errno.EAGAIN, errno.ENOBUFS):
                raise
            self._send_with_more_room(data, fds)

    def _send_with_more_room(self, data: bytes, fds: Sequence[int]) -> None:
        """A machine may have a small net.core.wmem_default, and a larger maximum."""
        assert self.tx is not None
        self.tx.setsockopt(_SOL, socket.SO_SNDBUF, 1 << 20)
        try:
            send(self.tx, data, fds)
        except BlockingIOError:
            raise LimitExceeded(
                "the queue of a live hold is full: raise net.core.wmem_max (sysctl); nothing was"
                " changed"
            ) from None

    def landed(self, ordinal: int, size: int, keys: tuple[Key, ...]) -> None:
        """Write down that a record lies in the queue. May be said twice."""
        if ordinal >= self.next:
            self.records.append((ordinal, size, keys))
            self.spent += LEAST if size < SMALL else cost(size)
            self.next = ordinal + 1

    def peek(self, copies: Copies) -> dict[Key, int]:
        """Copies of all descriptors in the queue, by key: of a key's records the last one counts.
        `copies` owns them.

        Raises Fenced on any disorder, LimitExceeded when not all fit in this process."""
        found = self._copy(copies)
        fds = _fds(found)
        keys = self.records[0][2] if len(self.records) == 1 else _keys(self.records)
        if len(fds) < len(keys) and any(item[2] & _CTRUNC for item in found):
            with hard_limit():  # what came is closed with the rest
                found = self._copy(copies)
            if any(item[2] & _CTRUNC for item in found):
                raise cut_short("a queue of the live hold")
            fds = _fds(found)
        for (ordinal, size, _), (data, _, _, _) in zip(self.records, found, strict=True):
            if len(data) != size or ordinal_of(data) != ordinal:
                raise fenced("its queue was changed")
        if len(fds) != len(keys):
            raise fenced("its queue was changed")
        return dict(zip(keys, fds, strict=True))

    def _copy(self, copies: Copies) -> list[Peeked]:
        count = len(self.records)
        largest = max([record[1] for record in self.records], default=0)
        point("live:peek")
        try:
            self.rx.setsockopt(_SOL, SO_PEEK_OFF, 0)
            copies.found.extend(
                map(self.rx.recvmsg, repeat(largest, count), repeat(_SPACE), repeat(_PEEK_FDS))
            )
        except OSError as error:
            raise _unreadable(error, "read") from None
        point("live:peeked")
        return copies.found[len(copies.found) - count :]

    def void(self) -> int:
        """How many records are void: ordinals have no gap."""
        if not self.records:
            return 0
        return min(max(self.first_valid - self.records[0][0], 0), len(self.records))

    def drain(self) -> None:
        """Let go of what is void. May block where a descriptor of the record was the last of its
        file (SO_LINGER, network file systems). Raises Fenced."""
        count = self.void()
        if count:
            self.receive(count)
            self.forget(count)

    def receive(self, count: int) -> None:
        """Receive so many records; `forget` comes after."""
        point("live:drain")
        try:
            got = [*map(self.rx.recv, repeat(1, count), repeat(_DONTWAIT))]
        except OSError as error:
            raise _unreadable(error, "drained") from None
        if b"" in got:
            raise fenced("its queue is at its end")
        point("live:drained")

    def forget(self, count: int) -> None:
        self.records = left = self.records[count:]
        self.spent = cost(left[0][1]) if len(left) == 1 else sum([cost(r[1]) for r in left])

    def resync(self, pending: Sent | None = None) -> bool:
        """Learn from the queue which records are in it, after an interrupt. `pending`: a record
        that may have been sent; returns whether it was. Installs no descriptor. Raises Fenced."""
        known = {record[0]: record for record in self.records}
        if pending is not None:
            known[pending[0]] = pending
        largest = max([size for _, size, _ in known.values()], default=1)
        found: list[Sent] = []
        try:
            self.rx.setsockopt(_SOL, SO_PEEK_OFF, 0)
            left = queued(self.rx)
            while left > 0 and len(found) < 4 * MOST_RECORDS:
                data = self.rx.recv(largest, _PEEK)
                record = known.get(ordinal_of(data))
                if record is None or len(data) != record[1]:
                    raise fenced("its queue was changed")
                found.append(record)
                left -= len(data)
        except OSError as error:
            raise _unreadable(error, "read") from None
        self.records = found
        self.spent = sum(cost(size) for _, size, _ in found)
        if found:
            self.next = found[-1][0] + 1
        return pending is not None and pending in found

    def inodes(self) -> list[int]:
        """The inodes of both ends."""
        if not self._inodes:
            ends = [end for end in (self.tx, self.rx) if end is not None]
            self._inodes = [os.fstat(end.fileno()).st_ino for end in ends]
        return self._inodes

    @property
    def closed(self) -> bool:
        return self.rx.fileno() < 0

    def close(self) -> None:
        """Close both ends. Safe to repeat."""
        point("live:close")
        if self.tx is not None:
            self.tx.close()
        self.rx.close()
        point("live:closed")


class Copies:
    """Descriptors that peeking installed in this process, for a moment.

    An interrupt leaves them here, for the next change to close: `found` is what the kernel gave,
    and `_runs` what is being closed: first number and the one behind the last, taken out and closed
    in one step."""

    __slots__ = ("_runs", "found")

    def __init__(self) -> None:
        self.found: list[Peeked] = []
        self._runs: list[tuple[int, int]] = []

    def __bool__(self) -> bool:
        return bool(self.found or self._runs)

    def close(self) -> None:
        """Close all copies."""
        if self.found:
            # In this order: as long as `found` has anything, nothing of `_runs` is closed yet.
            self._runs = _runs(sorted(_fds(self.found)))
            self.found.clear()
        if self._runs:
            point("live:close")
            runs = self._runs
            _consume(starmap(os.closerange, map(runs.pop, repeat(-1, len(runs)))))
            point("live:closed")


def _keys(records: list[Sent]) -> tuple[Key, ...]:
    """The keys whose descriptors come with records, in this order."""
    return tuple(chain.from_iterable([record[2] for record in records]))


def _fds(found: list[Peeked]) -> array[int]:
    """All descriptors of messages."""
    fds = array("i")
    for _, ancillary, _, _ in found:
        for _, _, raw in ancillary:
            fds.frombytes(raw)
    return fds


def _runs(fds: list[int]) -> list[tuple[int, int]]:
    """Sorted numbers as runs."""
    if not fds:
        return []
    if fds[-1] - fds[0] == len(fds) - 1:
        return [(fds[0], fds[-1] + 1)]
    runs = []
    first = last = fds[0]
    for fd in fds[1:]:
        if fd != last + 1:
            runs.append((first, last + 1))
            first = fd
        last = fd
    return [*runs, (first, last + 1)]


_consume = deque[None](maxlen=0).extend

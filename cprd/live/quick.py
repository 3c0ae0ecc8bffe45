"""The usual changes in the least time: one key more in a segment, one key less.

What is done here is what the writer does, in fewer calls: half of the time of such a change would
be spent on calls. Whatever is not so simple is left to the writer.
"""

from __future__ import annotations

import _socket as socket  # as in queue
import functools
import struct
from array import array
from os import fstat

from cprd.errors import LimitExceeded
from cprd.linux import pause
from cprd.linux.pause import point
from cprd.live.ledger import Ledger
from cprd.live.puts import FORMAT, SHAREABLE, SOCKET, lingers
from cprd.live.queue import APPEND, LEAST, SMALL, cost
from cprd.live.records import (
    BEGIN,
    CHANGE,
    ENTRY,
    HEADER,
    LENGTH,
    MAGIC,
    ONE_WITH_FD,
    ONE_WITHOUT,
    SAVE,
    SINGLE,
    SNAPSHOT,
    VERSION,
    Key,
    entry_size,
)
from cprd.live.root import NO_KEYS
from cprd.live.segment import (
    ROOM,
    SECTION_KEYS,
    SECTION_RECORDS,
    SECTIONS,
    SHARED,
    SPEND,
    Put,
    Segment,
)
from cprd.live.shape import Shape
from cprd.live.steps import Steps

_SOL = socket.SOL_SOCKET
_RIGHTS = socket.SCM_RIGHTS
_FULL = ROOM - 512
_SINGLE, _single = SINGLE.size, SINGLE.pack
_SAVES = bytes([SAVE]) * 256


@functools.cache
def _columns(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}s{count}Q{count}i")


class Quick:
    """Works on the writer's queues and ledger, under the owner's lock."""

    def __init__(self, ledger: Ledger, steps: Steps, shape: Shape, defers: bool) -> None:
        self._ledger = ledger
        self._pool = ledger.pool
        self._where = ledger.where
        self._inodes = ledger.inodes
        self._dirty = ledger.dirty
        self._steps = steps
        self._unfinished = steps.unfinished
        self._defers = defers
        self._after = self._saved
        self._fd = array("i", [0])
        self._with_fd = ((_SOL, _RIGHTS, self._fd),)
        self._limit = shape.keys
        self._begin = BEGIN.pack(MAGIC, VERSION, CHANGE, 0, steps.hold)
        self._records = shape.records

    def save_fd(self, key: Key, fd: int) -> bool:
        """Keep a descriptor by one more record. False: not so simple, and nothing was done."""
        try:
            found = fstat(fd)
        except (OSError, OverflowError):
            return False
        kind = found.st_mode & FORMAT
        if kind not in SHAREABLE or (
            kind == SOCKET and (found.st_ino in self._inodes or (self._defers and lingers(fd)))
        ):
            return False
        steps, pool, where = self._steps, self._pool, self._where
        if key in where or steps.pending is not None or self._dirty or self._unfinished:
            return False
        segment = pool.current
        if (
            segment is None
            or pool.spreads
            or segment.kind is not SHARED
            or segment.busy
            or segment.size > _FULL
            or not 0 < len(segment.keys) < self._limit
        ):
            segment = self._other(key)
            if segment is None:
                return False
        name, birth = key[1], next(self._ledger.births)
        keys, records = segment.keys, segment.records
        count = len(keys) + 1
        if len(records) >= self._records or (count >= self._limit and not segment.changes):
            put = (SAVE, key, birth, fd, b"", False, False)
            return segment.plain and self._rewrite(segment, None, put)
        steps.seq = seq = steps.seq + 1
        ordinal = segment.next
        size = _SINGLE + len(name)
        data = _single(self._begin, seq, ordinal, ONE_WITH_FD, size, SAVE, birth, key[2]) + name
        sent = (ordinal, size, (key,))
        self._fd[0] = fd
        steps.pending = segment, sent, self._after, (segment, key, birth)
        if pause.armed:
            pause.point("live:send")
        try:
            segment.tx.sendmsg((data,), self._with_fd, APPEND)  # type: ignore[union-attr]
        except OSError:
            self._send(segment, data, (fd,))
        if pause.armed:
            pause.point("live:sent")
        records.append(sent)
        segment.spent += LEAST if size < SMALL else cost(size)
        segment.next = ordinal + 1
        segment.size += ENTRY + len(name)
        keys[key] = SAVE, birth, b"", False
        where[key] = segment
        if segment.filed is pool.fuller:
            segment.counted = count
            pool.kept += 1
        else:
            pool.file(segment)
        steps.pending = None
        return True

    def _other(self, key: Key) -> Segment | None:
        """A segment for a descriptor that the current one does not take."""
        segment = self._pool.for_shared(
            [(SAVE, key, 0, 0, b"", False, False)], entry_size(key), None
        )
        if segment is not None and not segment.keys:
            segment.use(SHARED)
        return segment

    def _saved(self, segment: Segment, key: Key, birth: int) -> None:
        """What save_fd writes down, after an interrupt."""
        self._appended(segment, (SAVE, key, birth, -1, b"", False, False))

    def save_value(self, put: Put) -> bool:
        """As save_fd, of a section: a new value of the key, or a new key."""
        op, key, birth, fd, value, _, _ = put
        steps = self._steps
        if fd >= 0 or steps.pending is not None or self._dirty or self._unfinished:
            return False
        old = self._where.get(key)
        segment = old or self._pool.current_sections
        if (
            segment is None
            or segment.kind is not SECTIONS
            or not segment.keys
            or (old is None and len(segment.keys) >= SECTION_KEYS)
            or len(segment.records) >= SECTION_RECORDS
            or segment.busy
            or segment.tx is None
            or segment.size + len(value) > _FULL
            or segment.spent > SPEND - 9216
        ):
            return False
        steps.seq = seq = steps.seq + 1
        ordinal = segment.next
        rest = LENGTH.pack(len(value)) + value + key[1]
        size = _SINGLE + len(rest)
        data = _single(self._begin, seq, ordinal, ONE_WITHOUT, size, op, birth, 0) + rest
        sent = (ordinal, size, NO_KEYS)
        steps.pending = segment, sent, self._appended, (segment, put)
        point("live:send")
        try:
            segment.tx.send(data, APPEND)
        except OSError:
            self._send(segment, data, ())
        point("live:sent")
        segment.records.append(sent)
        segment.spent += LEAST if size < SMALL else cost(size)
        segment.next = ordinal + 1
        self._appended(segment, put)
        steps.pending = None
        return True

    def _send(self, segment: Segment, data: bytes, fds: tuple[int, ...]) -> None:
        """Once more: limits are raised, or the error explains."""
        try:
            segment.send(data, fds)
        except Exception:
            self._steps.pending = None
            raise

    def _appended(self, segment: Segment, put: Put) -> None:
        """May be said twice."""
        key = put[1]
        segment.keep(put)
        self._where[key] = segment
        self._pool.file(segment)

    def remove(self, key: Key) -> bool:
        """End one key of a segment with descriptors only, by rewriting the segment. As append."""
        segment = self._where.get(key)
        if (
            segment is None
            or segment.kind is not SHARED
            or segment.tx is None
            or segment.busy
            or not segment.plain
            or segment.may_block
            or segment.keys[key][3]
            or self._steps.pending is not None
            or self._dirty
            or self._unfinished
        ):
            return False
        return self._rewrite(segment, key, None)

    def _rewrite(self, segment: Segment, gone: Key | None, put: Put | None) -> bool:
        """One record for all that a segment keeps, one key less or more."""
        steps, kept = self._steps, segment.keys
        try:
            alone = put is None and len(kept) == 1
            copies = {} if alone else segment.peek(steps.copies)
            left = [key for key in kept if key != gone]
            fds = [copies[key] for key in left]
        except LimitExceeded:
            steps.copies.close()
            return False
        births = [kept[key][1] for key in left]
        if put is not None:
            left.append(put[1])
            fds.append(put[3])
            births.append(put[2])
        steps.seq = seq = steps.seq + 1
        ordinal, count = segment.next, len(left)
        names = b"\0".join([key[1] for key in left])
        size = HEADER.size + 13 * count + len(names)
        head = (MAGIC, VERSION, SNAPSHOT, 0, steps.hold, seq, ordinal, count, count, size)
        columns = _columns(count).pack(_SAVES[:count], *births, *[key[2] for key in left])
        sent = (ordinal, size, tuple(left))
        steps.pending = (segment, sent, self._rewritten, (segment, gone, put, ordinal))
        point("live:send")
        try:
            segment.send(HEADER.pack(*head) + columns + names, fds)
        except LimitExceeded:
            steps.pending = None
            steps.copies.close()
            return False
        except Exception:
            steps.pending = None
            steps.copies.close()
            raise
        point("live:sent")
        segment.landed(*sent)
        self._rewritten(segment, gone, put, ordinal)
        steps.pending = None
        steps.copies.close()
        segment.receive(len(segment.records) - 1)
        segment.records = [sent]
        segment.spent = LEAST if size < SMALL else cost(size)
        self._unfinished.pop(segment, None)
        return True

    def _rewritten(self, segment: Segment, gone: Key | None, put: Put | None, first: int) -> None:
        """May be said twice."""
        segment.first_valid = first
        self._unfinished[segment] = None
        if put is not None:
            self._appended(segment, put)
        if gone is not None:
            segment.lose(gone)
            self._where.pop(gone, None)
            self._pool.file(segment)

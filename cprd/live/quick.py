"""The usual changes in the least time: one key more in a segment, one key less.

What is done here is what the writer does, in fewer calls: half of the time of such a change would
be spent on calls. Whatever is not so simple is left to the writer.

Descriptors come in runs: whether a segment takes a further key is found out for several keys at
once, and what such a run took is counted when the run ends. Every other change ends the run.
"""

from __future__ import annotations

import _socket as socket  # as in queue
import functools
import struct
from array import array
from operator import itemgetter
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
from cprd.live.steps import Pending, Steps

_SOL = socket.SOL_SOCKET
_RIGHTS = socket.SCM_RIGHTS
_TYPE, _LINGER = socket.SO_TYPE, socket.SO_LINGER
_ORDINARY = (socket.SOCK_STREAM, socket.SOCK_DGRAM)  # types of sockets that no hold has
_FULL = ROOM - 512
_SINGLE, _single = SINGLE.size, SINGLE.pack
_SAVES = bytes([SAVE]) * 256
_BIRTH = itemgetter(1)  # of what is kept of a key


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
        self._segment: Segment | None = None  # of the run
        self._left = 0  # keys that the run may still take
        self._run: Pending | None = None
        self._fd = array("i", [0])
        self._with_fd = ((_SOL, _RIGHTS, self._fd),)
        self._limit = shape.keys
        self._begin = BEGIN.pack(MAGIC, VERSION, CHANGE, 0, steps.hold)
        self._records = shape.records

    def save_fd(self, key: Key, fd: int | socket.SocketType) -> bool:
        """Keep a descriptor by one more record. False: not so simple, and nothing was done."""
        try:
            if type(fd) is int:
                found = fstat(fd)
                kind = found.st_mode & FORMAT
                if kind not in SHAREABLE or (
                    kind == SOCKET
                    and (found.st_ino in self._inodes or (self._defers and lingers(fd)))
                ):
                    return False
            else:  # the kernel says as much in less time
                if fd.getsockopt(_SOL, _TYPE) not in _ORDINARY or (  # type: ignore[union-attr]
                    self._defers and fd.getsockopt(_SOL, _LINGER)  # type: ignore[union-attr]
                ):
                    return False
                fd = fd.fileno()  # type: ignore[union-attr]
        except (OSError, OverflowError):
            return False
        steps, where = self._steps, self._where
        if key in where or steps.pending is not None:
            return False
        segment = self._segment
        if not self._left or segment is None:
            segment = self._begin_run(key)
            if segment is None:
                return False
            if not self._left:
                put = (SAVE, key, next(self._ledger.births), fd, b"", False, False)
                return segment.plain and self._rewrite(segment, None, put)
        name, birth, ordinal = key[1], next(self._ledger.births), segment.next
        steps.seq = seq = steps.seq + 1
        size = _SINGLE + len(name)
        data = _single(self._begin, seq, ordinal, ONE_WITH_FD, size, SAVE, birth, key[2]) + name
        self._fd[0] = fd
        steps.pending = self._run
        segment.keys[key] = SAVE, birth, b"", False
        segment.records.append((ordinal, size, (key,)))
        if pause.armed:
            pause.point("live:send")
        try:
            segment.tx.sendmsg((data,), self._with_fd, APPEND)  # type: ignore[union-attr]
        except OSError as error:
            self._send_again(segment, key, data, fd, error)
        if pause.armed:
            pause.point("live:sent")
        segment.next = ordinal + 1
        where[key] = segment
        self._left -= 1
        steps.pending = None
        return True

    def _begin_run(self, key: Key) -> Segment | None:
        """The segment for a descriptor, and how many keys it takes by one more record each: none
        where one record for all is due."""
        self.end_run()
        pool = self._pool
        if self._dirty or self._unfinished:
            return None
        segment = pool.current
        if (
            segment is None
            or pool.spreads
            or segment.kind is not SHARED
            or segment.busy
            or segment.size > _FULL
            or not 0 < len(segment.keys) < self._limit
        ):
            put = (SAVE, key, 0, 0, b"", False, False)
            segment = pool.for_shared([put], entry_size(key), None)
            if segment is None:
                return None
            if not segment.keys:
                segment.use(SHARED)
        room = self._limit - len(segment.keys) - (not segment.changes)
        left = min(room, self._records - len(segment.records), (ROOM - segment.size) // 512)
        self._run = (segment, None, self._resume, (segment,))
        self._segment = segment
        self._left = min(left, 1) if pool.spreads else max(left, 0)
        return segment

    def end_run(self) -> None:
        """Count what the run took. To be said before anything else is changed."""
        self._left = 0
        segment = self._segment
        if segment is not None:
            self._steps.pending = self._run
            segment.size = sum([entry_size(key, kept[2]) for key, kept in segment.keys.items()])
            segment.spent = sum([cost(record[1]) for record in segment.records])
            self._pool.file(segment)
            self._segment = self._steps.pending = None

    def _resume(self, segment: Segment) -> None:
        """After an interrupt: of the key that came last the queue says whether it is kept."""
        for key in [*segment.keys]:
            if key not in self._where:
                if segment.records and key in segment.records[-1][2]:
                    self._where[key] = segment
                else:
                    segment.keys.pop(key)

    def _send_again(self, segment: Segment, key: Key, data: bytes, fd: int, error: OSError) -> None:
        """Once more: limits are raised, or the error explains."""
        sent = segment.records[-1]
        if segment.resync(sent):
            raise error  # of a signal handler
        segment.records.append(sent)
        try:
            segment.send(data, (fd,))
        except Exception:
            if not self._steps.unless_sent(segment, sent):
                segment.keys.pop(key)
            raise

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
        if pause.armed:
            pause.point("live:send")
        try:
            segment.tx.send(data, APPEND)
        except OSError:
            if segment.resync(sent):
                raise  # of a signal handler
            try:
                segment.send(data, ())
            except Exception:
                steps.unless_sent(segment, sent)
                raise
        if pause.armed:
            pause.point("live:sent")
        segment.records.append(sent)
        segment.spent += LEAST if size < SMALL else cost(size)
        segment.next = ordinal + 1
        if old is not None and len(old.keys[key][2]) == len(value):  # nothing to be counted
            old.keys[key] = op, birth, value, False
        else:
            self._appended(segment, put)
        steps.pending = None
        return True

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
            or self._steps.pending is not None
            or self._dirty
            or self._unfinished
            or segment.kind is not SHARED
            or segment.tx is None
            or segment.busy
            or not segment.plain
            or segment.may_block
            or segment.keys[key][3]
        ):
            return False
        if segment is self._segment or self._pool.spreads:
            self.end_run()
        left, self._left = self._left, 0  # an interrupt ends the run
        done = self._rewrite(segment, key, None)
        self._left = left
        return done

    def _rewrite(self, segment: Segment, gone: Key | None, put: Put | None) -> bool:
        """One record for all that a segment keeps, one key less or more."""
        steps, kept = self._steps, segment.keys
        try:
            alone = put is None and len(kept) == 1
            copies = {} if alone else segment.peek(steps.copies)
            left = [*kept]
            if gone is not None:
                left.remove(gone)
            fds = [*map(copies.__getitem__, left)]
        except LimitExceeded:
            steps.copies.close()
            return False
        births = [*map(_BIRTH, map(kept.__getitem__, left))]
        if put is not None:
            left.append(put[1])
            fds.append(put[3])
            births.append(put[2])
        steps.seq = seq = steps.seq + 1
        ordinal, count = segment.next, len(left)
        _, names, ids = zip(*left, strict=True) if left else ((), (), ())
        named = b"\0".join(names)
        size = HEADER.size + 13 * count + len(named)
        head = (MAGIC, VERSION, SNAPSHOT, 0, steps.hold, seq, ordinal, count, count, size)
        columns = _columns(count).pack(_SAVES[:count], *births, *ids)
        sent = (ordinal, size, tuple(left))
        steps.pending = (segment, sent, self._rewritten, (segment, gone, put, ordinal))
        point("live:send")
        try:
            segment.send(HEADER.pack(*head) + columns + named, fds)
        except LimitExceeded:
            steps.pending = None
            steps.copies.close()
            return False
        except Exception:
            steps.unless_sent(segment, sent)
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

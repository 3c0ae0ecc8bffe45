"""The bookkeeping of a hold's writer: keys and their segments. No queue is touched here.

Everything that is written down may be written down twice: an interrupt may come in the middle, and
the next change writes all of it again.
"""

from __future__ import annotations

from itertools import count

from cprd.live.pool import Pool
from cprd.live.queue import Queue
from cprd.live.records import Entry, Key, deletion
from cprd.live.segment import Put, Segment
from cprd.live.shape import Shape
from cprd.live.tombstones import Tombstones


class Ledger:
    """`where`: the segment of each kept key. `dirty`: segments that hold what a record elsewhere
    made void. `pool`: the attached segments. `inodes`: of sockets that must never be kept.
    `births`: the places of further keys in the order of keys."""

    def __init__(self, shape: Shape) -> None:
        self.where: dict[Key, Segment] = {}
        self.pool = Pool(shape.keys, shape.spread)
        self.tombstones = Tombstones()
        self.dirty: dict[Segment, None] = {}
        self.inodes: set[int] = set()
        self.births = count(1)

    def write_puts(self, target: Segment, puts: list[Put]) -> None:
        """A record in `target` keeps `puts`."""
        where = self.where
        for put in puts:
            key = put[1]
            old = where.get(key)
            if old is not None and old is not target:
                self._left(key, old, target)
            target.keep(put)
            where[key] = target
            self.tombstones.hold(key, target)
            if key in target.stale:
                target.stale.discard(key)
                self.tombstones.gone(key, target)

    def write_gone(self, holder: Queue, gone: list[Key]) -> None:
        """A record in `holder` ends `gone`."""
        for key in gone:
            old = self.where.get(key)
            if old is None:
                continue
            if old is holder:
                old.lose(key)
                self.tombstones.hold(key, holder)
            else:
                self._left(key, old, holder)
            self.where.pop(key, None)

    def _left(self, key: Key, old: Segment, holder: Queue) -> None:
        """`key` still lies in `old`, void by a record in `holder`."""
        old.lose(key)
        old.stale.add(key)
        self.tombstones.add(key, old, holder)
        self.dirty[old] = None
        self.pool.file(old)

    def clean(self, segment: Segment) -> None:
        """Nothing in a segment is void by records elsewhere. May be said twice."""
        for key in segment.stale:
            self.tombstones.gone(key, segment)
        segment.stale.clear()
        self.dirty.pop(segment, None)

    def deletions(self, target: Segment, puts: list[Put], gone: list[Key]) -> list[Entry]:
        """The deletions in a record that voids the others of `target`."""
        ended = [deletion(k) for k in gone if k not in target.keys or k in self.tombstones]
        again = self.again(target)
        if again:
            new = {put[1] for put in puts}
            ended += [entry for entry in again if entry[2] not in new]
        return ended

    def clear(self) -> None:
        """Nothing is kept any more."""
        self.where.clear()
        self.dirty.clear()
        self.tombstones = Tombstones()

    def again(self, holder: Queue) -> list[Entry]:
        """The deletions that `holder` has to say again when it is rewritten."""
        return self.tombstones.deletions(holder, self.where)

"""Changes that are commits of the root: fresh segments are attached, useless ones left out."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from functools import partial

from cprd.errors import LimitExceeded
from cprd.linux.pause import point
from cprd.live.ledger import Ledger
from cprd.live.pool import MAX_OWN
from cprd.live.queue import make_pair
from cprd.live.records import CARRIES, CHANGE, Entry, Key, deletion, encode, entry_size
from cprd.live.records import OWN as FLAG_OWN
from cprd.live.root import NO_KEYS, PART_DELETIONS, Root
from cprd.live.segment import OWN, ROOM, SECTION_KEYS, SECTIONS, SHARED, Put, Segment, kind_of
from cprd.live.steps import Steps


class Branches:
    """The root of a hold and which segments are attached to it."""

    def __init__(self, root: Root, ledger: Ledger, steps: Steps, limit: int) -> None:
        self.root = root
        self.next_id = 0
        self.files = MAX_OWN
        self._ledger = ledger
        self._steps = steps
        self._limit = limit  # keys of a shared segment

    def attach(self, puts: list[Put], gone: list[Key]) -> None:
        """Commit by records of the root: fresh segments with `puts`, and deletions."""
        groups = self._groups(puts)
        own = sum(group[0][6] for group in groups)
        leaving = [self._ledger.where.get(key) for key in (*[put[1] for put in puts], *gone)]
        wanted = self._ledger.pool.own + own
        wanted -= sum(segment is not None and segment.kind == OWN for segment in leaving)
        most = max(self.files, self._ledger.pool.own)
        if own and wanted > most:
            raise LimitExceeded(
                f"{wanted} descriptors that are neither socket, pipe nor anonymous"
                f" inode (files, memfds, devices), sections above 4 KiB included; the limit is"
                f" {most} in one live hold; nothing was changed"
            )
        ended = [deletion(key) for key in gone]
        small = len(groups) <= self.root.part and sum(map(entry_size, gone)) <= PART_DELETIONS
        if small and self.root.is_due():
            self._make_room()  # first: what the root ends again must not be later than `puts`
        fresh = [self._fresh(group) for group in groups]
        made = list(zip(fresh, groups, strict=True))
        apply = partial(self._attached, made, gone)
        if small:
            self._steps.seq += 1
            data = self.root.attach(self._steps.seq, fresh, ended)
            fds = [segment.rx.fileno() for segment in fresh]
            self._steps.send_data(self.root, data, NO_KEYS, fds, apply)
        else:
            new = {put[1] for put in puts}
            self.rewrite(fresh=fresh, ended=ended, new=new, then=apply)

    def _make_room(self) -> None:
        """Rewrite the root; at a limit go on without, as long as the root has room."""
        try:
            self.rewrite()
        except LimitExceeded:
            if self.root.is_full():
                raise

    def _attached(self, made: list[tuple[Segment, list[Put]]], gone: list[Key]) -> None:
        for segment, puts in made:
            self._ledger.write_puts(segment, puts)
            self._ledger.pool.file(segment)
            if segment.kind == SHARED and len(segment.keys) < self._limit:
                self._ledger.pool.current = segment
            elif segment.kind == SECTIONS:
                self._ledger.pool.current_sections = segment
        self._ledger.write_gone(self.root, gone)

    def _groups(self, puts: list[Put]) -> list[list[Put]]:
        """The puts of each fresh segment."""
        groups = [[put] for put in puts if put[6]]
        rest = [put for put in puts if not put[6]]
        size = sum(entry_size(put[1], put[4]) for put in rest)
        if rest and len(rest) <= self._limit and size <= ROOM:
            return [*groups, rest]
        for carries, limit in ((True, self._limit), (False, SECTION_KEYS)):
            size = ROOM
            group: list[Put] = []
            for put in rest:
                if (put[0] in CARRIES) is carries:
                    length = entry_size(put[1], put[4])
                    if size + length > ROOM or len(group) == limit:
                        group, size = [], 0
                        groups.append(group)
                    group.append(put)
                    size += length
        return groups

    def _fresh(self, puts: list[Put]) -> Segment:
        """A segment that is not attached yet, with its first record."""
        self.next_id += 1
        segment = Segment(self.next_id, *make_pair())
        segment.kind = kind_of(puts)
        self._ledger.inodes.update(segment.inodes())
        self._steps.seq += 1
        entries = [(put[0], put[2], put[1], put[4]) for put in puts]
        keys = tuple(put[1] for put in puts if put[3] >= 0)
        fds = [put[3] for put in puts if put[3] >= 0]
        flags = FLAG_OWN if segment.kind == OWN else 0
        data = encode(CHANGE, self.root.hold, self._steps.seq, 0, entries, len(fds), flags=flags)
        point("live:fill")
        segment.send(data, fds)
        point("live:filled")
        segment.landed(0, len(data), keys)
        return segment

    def rewrite(
        self,
        drop: Sequence[Segment] = (),
        fresh: Sequence[Segment] = (),
        ended: Sequence[Entry] = (),
        new: Container[Key] = (),
        then: Callable[[], None] | None = None,
    ) -> None:
        """Void all records of the root by new ones that name all segments but `drop`. `new`: the
        keys of `fresh`."""
        leaving = set(drop)
        segments = [s for s in self._ledger.pool.segments.values() if s not in leaving]
        again = [*ended]
        for holder in (self.root, *drop):
            again += [entry for entry in self._ledger.again(holder) if entry[2] not in new]
        first = self.root.next
        parts = self.root.whole(self._steps.seq + 1, [*segments, *fresh], again)
        self._steps.seq += len(parts)
        for number, (data, named) in enumerate(parts, 1):
            fds = [segment.rx.fileno() for segment in named]
            apply = _nothing
            if number == len(parts):
                apply = partial(self._rewritten, first, drop, again, then)
            self._steps.send_data(self.root, data, NO_KEYS, fds, apply)
        self._steps.drain(self.root)
        self._steps.close_dropped()

    def _rewritten(
        self,
        first: int,
        drop: Sequence[Segment],
        ended: Sequence[Entry],
        then: Callable[[], None] | None,
    ) -> None:
        self.root.first_valid = first
        self._steps.unfinished[self.root] = None
        for segment in drop:
            self._ledger.pool.forget(segment)
            if segment not in self._steps.dropped:
                self._steps.dropped.append(segment)
        for _, _, key, _ in ended:
            self._ledger.tombstones.hold(key, self.root)
        if then is not None:
            then()


def _nothing() -> None:
    pass

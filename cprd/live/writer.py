"""The writer: which record goes into which queue, and what is let go of afterwards.

A change is one record: the commit. What comes after it (the segments that still hold what the
commit made void are rewritten, sparse segments are merged, useless ones are taken out of the root)
can be finished by the next change, should an interrupt or a limit come between.

Whoever calls holds the owner's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

from cprd.errors import LimitExceeded
from cprd.live.ballast import Ballast
from cprd.live.branches import Branches
from cprd.live.ledger import Ledger
from cprd.live.puts import socket_inode
from cprd.live.quick import Quick
from cprd.live.records import (
    CARRIES,
    CHANGE,
    SNAPSHOT,
    Entry,
    Key,
    deletion,
    entry_size,
)
from cprd.live.root import NO_KEYS, Root
from cprd.live.segment import (
    OWN,
    ROOM,
    SECTION_KEYS,
    SECTIONS,
    SHARED,
    Put,
    Segment,
    kind_of,
)
from cprd.live.shape import Shape
from cprd.live.steps import Defer, Steps

MANY = 64  # deletions that go into one record of a segment


class Writer:
    """The queues of one hold. `ledger`: what lies where."""

    def __init__(
        self,
        root: Root,
        lock: AbstractContextManager[object],
        shape: Shape,
        defer: Defer | None,
    ) -> None:
        self.limit = shape.keys
        self.records = shape.records
        self.ledger = Ledger(shape)
        self.steps = Steps(self.ledger, root.hold, lock, defer)
        self.branches = Branches(root, self.ledger, self.steps, shape.keys)
        self.quick = Quick(self.ledger, self.steps, shape, defer is not None)
        self.ballast = Ballast()
        self.ledger.inodes.update(root.inodes(), self.ballast.queue.inodes())

    @property
    def unfinished(self) -> bool:
        """Whether the next change has something to finish for an earlier one."""
        return bool(self.ledger.dirty) or not self.steps.idle

    # All changes

    def change(self, puts: list[Put], deletes: Sequence[Key]) -> None:
        """Keep `puts`, whose descriptors stay the caller's, and end `deletes`, all or nothing.

        When this raises Fenced, LimitExceeded or OSError (of a descriptor), nothing was changed; a
        LimitExceeded that says otherwise excepted."""
        self.recover()
        gone = [key for key in deletes if key in self.ledger.where]
        if not puts and not gone:
            return
        try:
            if puts:
                self._commit(puts, gone)
            else:
                self._delete(gone)
        except Exception:
            self.steps.copies.close()
            raise
        if not self.ledger.dirty and not gone:
            return
        problem = self._tidy()
        if not self.ledger.dirty:
            self.shrink()
        if problem is not None:
            raise LimitExceeded(
                f"the change counts, for every successor, but the kernel still holds what it ended"
                f" (the next change tries again): {problem}"
            )

    def clear(self) -> None:
        """Keep nothing any more: one record of the root; then let go of everything."""
        self.recover()
        drop = [*self.ledger.pool.segments.values()]
        self.branches.rewrite(drop=drop, then=self.ledger.clear)

    def write_root(self) -> None:
        """Void all records of the root by new ones that name all segments."""
        self.branches.rewrite()

    def sockets(self, found: set[int]) -> None:
        """Add the inodes of all kept sockets to `found`, by a look at copies."""
        self.recover()
        for segment in [*self.ledger.pool.segments.values()]:
            if segment.busy:  # nobody can look at present
                for key in segment.keys:
                    found.update(segment.sockets.get(key, ()))
            elif segment.kind == SHARED and segment.records:
                for key, fd in segment.peek(self.steps.copies).items():
                    if key in segment.keys:
                        found.update(socket_inode(fd))
                self.steps.copies.close()

    def close(self) -> None:
        """Close all ends and copies; what is kept stays kept. Safe to repeat."""
        self.steps.copies.close()
        segments = [*self.ledger.pool.segments.values(), *self.steps.dropped]
        for queue in (self.branches.root, self.ballast.queue, *segments):
            queue.close()

    def _delete(self, gone: list[Key]) -> None:
        try:
            self._with_ballast(lambda: self._commit([], gone))
        except LimitExceeded:
            self.steps.copies.close()
            self.branches.attach([], gone)

    def _with_ballast(self, act: Callable[[], None]) -> None:
        """Act; at the limit of descriptors in flight once more, without the ballast."""
        try:
            act()
        except LimitExceeded:
            self.steps.copies.close()
            if not self.ballast.let_go():
                raise
            act()

    # The commit

    def _commit(
        self,
        puts: list[Put],
        gone: list[Key],
        avoid: Segment | None = None,
        target: Segment | None = None,
    ) -> None:
        if target is None:
            target = self._target(puts, gone, avoid)
        if target is not None:
            self._into(target, puts, gone)
            return
        if not puts and len({self.ledger.where[key] for key in gone}) == 1:
            segment = self.ledger.where[gone[0]]
            if segment.inherited and not segment.busy and not segment.stale:
                self._move(segment, gone)
                return
        self.branches.attach(puts, gone)

    def _target(self, puts: list[Put], gone: list[Key], avoid: Segment | None) -> Segment | None:
        """The segment whose record can be the whole commit; None: the root's."""
        if len(gone) > MANY or len(puts) > max(self.limit, SECTION_KEYS):
            return None
        if not puts:
            return self._of_deleted(gone)
        size = sum([entry_size(put[1], put[4]) for put in puts])
        if puts[0][6]:
            return self.ledger.pool.for_own() if len(puts) == 1 else None
        if any(put[6] for put in puts):
            return None
        if any(put[0] in CARRIES for put in puts):
            old = self._of_deleted(gone) if gone else None
            if old is not None and old.kind == SHARED and old is not avoid:
                left = len(old.keys.keys() - set(gone)) + len(puts)
                if left <= self.limit and old.size + size <= ROOM:
                    return old
            return self.ledger.pool.for_shared(puts, size, avoid)
        first = self.ledger.where.get(puts[0][1])
        if first is not None and first is not avoid and self._fits(first, puts, size):
            return first
        return self.ledger.pool.for_sections(puts, size, avoid)

    def _fits(self, segment: Segment, puts: list[Put], size: int) -> bool:
        """Whether new values of a segment's own keys have room in it."""
        keys = segment.keys
        if segment.kind != SECTIONS or not all(put[1] in keys for put in puts):
            return False
        grown = size - sum(entry_size(put[1], keys[put[1]][2]) for put in puts)
        return segment.takes(puts, grown, SECTION_KEYS + len(puts))

    def _of_deleted(self, gone: list[Key]) -> Segment | None:
        """A segment that holds one of the deleted keys and can be appended to, rather one that has
        to be rewritten anyway."""
        found = None
        for key in gone:
            segment = self.ledger.where[key]
            if segment.tx is not None and not segment.busy:
                if segment.kind != SECTIONS:
                    return segment
                found = segment
        return found

    def _into(
        self, target: Segment, puts: list[Put], gone: list[Key], rewrite: bool = False
    ) -> None:
        """Commit by one record of `target`."""
        if puts and not target.keys:
            target.use(kind_of(puts))
        snapshot = rewrite or self._voids(target, puts, gone)
        new = [(put[0], put[2], put[1], put[4]) for put in puts]
        carried = [put[1] for put in puts if put[3] >= 0]
        fds = [put[3] for put in puts if put[3] >= 0]
        if snapshot:
            entries, kept, copies = self._rest(target, puts, gone)
            entries += new
            carried = kept + carried
            fds = copies + fds
            entries += self.ledger.deletions(target, puts, gone)
        else:
            entries = new + [deletion(key) for key in gone]
        apply = (self._applied, (target, puts, gone, target.next if snapshot else -1))
        kind = SNAPSHOT if snapshot else CHANGE
        self.steps.send(target, kind, entries, tuple(carried), fds, *apply)
        if snapshot:
            if self.steps.defers(target):
                target.sockets = dict(zip(carried, map(socket_inode, fds), strict=True))
            self.steps.copies.close()
            self.steps.drain(target)

    def _voids(self, target: Segment, puts: list[Put], gone: list[Key]) -> bool:
        """Whether the record of a change should void those before it: to let go of descriptors,
        or because there are enough of them."""
        keys = target.keys
        for key in gone:
            if key in keys and keys[key][0] in CARRIES:
                return True
        for put in puts:
            if put[1] in keys and keys[put[1]][0] in CARRIES:
                return True
        if not target.records:
            return False
        if target.kind == SHARED and target.fills(len(puts), self.limit):
            return True
        return target.is_due(sum([entry_size(put[1], put[4]) for put in puts]), self.records)

    def _rest(
        self, target: Segment, puts: list[Put], gone: list[Key]
    ) -> tuple[list[Entry], list[Key], list[int]]:
        """What a segment keeps beside the change: entries, and the keys and copies of those that
        come with a descriptor."""
        without = {put[1] for put in puts}.union(gone) if puts else gone
        entries = [
            (kept[0], kept[1], key, kept[2])
            for key, kept in target.keys.items()
            if key not in without
        ]
        carried = [entry[2] for entry in entries if entry[0] in CARRIES]
        if not carried:
            return entries, [], []
        copies = target.peek(self.steps.copies)
        return entries, carried, [copies[key] for key in carried]

    def _applied(self, target: Segment, puts: list[Put], gone: list[Key], first: int) -> None:
        """Write down a commit by `target`, whose records before `first` are void. May be said
        twice."""
        if first >= 0:
            target.first_valid = first
            self.steps.unfinished[target] = None
            self.ledger.clean(target)
        self.ledger.write_puts(target, puts)
        self.ledger.write_gone(target, gone)
        self.ledger.pool.file(target)

    # Afterwards

    def _tidy(self) -> LimitExceeded | None:
        """Rewrite what still holds something void. Returns the limit that was in the way."""
        problem = None
        for segment in [*self.ledger.dirty]:
            if segment.busy:
                continue
            try:
                self._with_ballast(partial(self._rewrite, segment))
            except LimitExceeded as error:
                self.steps.copies.close()
                problem = error
        self.ballast.load()
        return problem

    def _rewrite(self, segment: Segment) -> None:
        """Let go of what is void in a segment."""
        if segment.keys and segment.inherited:
            self._move(segment, [])
        if not segment.keys and not self.ledger.again(segment):
            self.steps.unfinished[segment] = None
            segment.first_valid = segment.next
            self.steps.drain(segment)
        elif not segment.carries() and not any(key in self.ledger.where for key in segment.stale):
            ended = [deletion(key) for key in segment.stale]
            if segment.is_due(sum(entry_size(key) for key in segment.stale), self.records):
                self._into(segment, [], [], rewrite=True)
            else:
                self.steps.send(segment, CHANGE, ended, NO_KEYS, [], self.ledger.clean, (segment,))
        else:
            self._into(segment, [], [], rewrite=True)

    def _move(self, segment: Segment, gone: list[Key], target: Segment | None = None) -> None:
        """Keep the keys of a segment elsewhere; `gone` end."""
        keys = [key for key in segment.keys if key not in gone]
        copies: dict[Key, int] = {}
        if any(segment.keys[key][0] in CARRIES for key in keys):
            copies = segment.peek(self.steps.copies)
        own = segment.kind == OWN
        puts: list[Put] = []
        for key in keys:
            op, birth, value, may_block = segment.keys[key]
            puts.append((op, key, birth, copies.get(key, -1), value, may_block, own))
        if puts:
            self._commit(puts, gone, segment, target)
        else:
            self.branches.attach([], gone)
        self.steps.copies.close()

    def shrink(self) -> None:
        """Merge sparse segments, and take useless ones out of the root: as much in flight as the
        keys need. Limits are no error here."""
        self.quick.end_run()
        try:
            segment = self.ledger.pool.sparse()
            if segment is not None:
                self._merge(segment)
            useless = self.ledger.pool.useless()
            if useless:
                self.branches.rewrite(drop=useless)
        except LimitExceeded:
            self.steps.copies.close()

    def settle(self) -> None:
        """Finish what a predecessor left; merge what many predecessors left, each a little in a
        segment, and forget the segments in which nothing is kept. Limits are no error."""
        self.recover()
        try:
            for segment in self.ledger.pool.scattered():
                self._move(segment, [])
                self._tidy()
        except LimitExceeded:
            self.steps.copies.close()
        if not self.ledger.dirty:
            self.shrink()

    def _merge(self, segment: Segment) -> None:
        puts: list[Put] = [
            (op, key, birth, 0 if op in CARRIES else -1, value, may_block, False)
            for key, (op, birth, value, may_block) in segment.keys.items()
        ]
        choose = (
            self.ledger.pool.for_sections
            if segment.kind == SECTIONS
            else self.ledger.pool.for_shared
        )
        target = choose(puts, segment.size, segment)
        if target is not None and target.keys:
            self._move(segment, [], target)
            self._tidy()

    def recover(self) -> None:
        """Finish what an interrupt left, or a limit."""
        if not self.steps.idle:
            self.steps.finish()
        self.quick.end_run()
        if self.ledger.dirty:
            self._tidy()

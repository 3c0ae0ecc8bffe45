"""The legacy of an earlier daemon: the counting shelves, and the holds on the shelves.

Several shelves count after a downgrade, or an upgrade after a downgrade: an older cprd leaves a
newer shelf alone, and starts a new shelf. A queue on a shelf whose hold has ended, or never had a
record, is to be drained: a save was not answered, or a releaser had not come so far.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Mapping
from typing import NamedTuple

from cprd.daemon.storage import shelf
from cprd.daemon.storage.journal import Journal, Place
from cprd.daemon.storage.record import VERSION, Record, Unreadable, decode, last_replies, prefix
from cprd.daemon.storage.shelf import Pidfd, Queue, Shelf
from cprd.daemon.storage.slot import Slot
from cprd.linux.rights import close_all
from cprd.protocol.lifecycle import UNREADABLE, Hold
from cprd.protocol.replies import Reply

NAMELESS = 1 << 63  # generations from here on stand for holds whose records cannot be read
Pairs = Mapping[int, tuple[socket.socket, socket.socket]]


class Dead(NamedTuple):
    """A bundle to be let go of. `version`: of the last record, which says how."""

    uid: int
    bundle: int
    version: int


class Lying(NamedTuple):
    """A living slot. `hold`: None where the last record cannot be read."""

    slot: Slot
    hold: Hold | None
    pidfds: dict[str, int]


class Found:
    """Owns all parts."""

    def __init__(self, created: float, draining: Collection[int]) -> None:
        """`created` is for unreadable holds. Slots of the inodes in `draining` have ended, and a
        releaser has each: left alone."""
        self.counting: list[Shelf] = []  # older first
        self.untouchable: list[Shelf] = []  # count, and have messages that cannot be read
        self.retired: list[Shelf] = []  # do not count
        self.last_number = 1
        self.journals: list[Journal] = []  # older first
        self.foreign: set[int] = set()  # inodes of journals of shelves that cannot be read
        self.last_pidfd = 0
        self.holds: dict[int, tuple[Hold, dict[str, int]]] = {}  # with pidfds by role
        self.places: dict[int, Place] = {}  # by generation; some without a readable record
        self.on: dict[int, set[int]] = {}  # numbers of the shelves that lead to a place
        self.dead: dict[int, Dead] = {}  # by generation
        self.slots: dict[int, list[Lying]] = {}  # by shelf
        self.ended: list[Slot] = []  # to be drained
        self.void: list[Slot] = []  # alive, but their holds lie elsewhere: to be ended and drained
        self.replies: list[Reply] = []
        self.has_outcomes = False  # some replies lie on a shelf of version 1
        self.hidden = ""  # why a hold may exist whose name nobody can read
        self._created = created
        self._draining = draining
        self._last: dict[int, tuple[Journal, int, Record | Unreadable]] = {}
        self._answered: dict[int, list[Reply]] = {}  # replies in records, by generation
        self._ended: dict[int, int] = {}  # versions of last records, by generation
        self._inodes: set[int] = set()  # of slots: two shelves may have one slot
        self._lying: set[int] = set()  # generations in slots: killed while a shelf was taken over

    # Journals

    def add_journal(self, fd: int, *, foreign: bool) -> None:
        """A journal, owned from now on; several shelves may lead to one."""
        journal = Journal(fd)
        if foreign:
            self.foreign.add(journal.inode)
        if any(journal.inode == other.inode for other in self.journals):
            journal.close()
            return
        self.journals.append(journal)
        for at, data, whole in journal.records():
            if whole:
                self._add_record(journal, at, data)
            else:
                self._doubt(journal, data)
        if journal.strange:
            self.hidden = self.hidden or journal.strange

    def _add_record(self, journal: Journal, at: int, data: bytes) -> None:
        known = prefix(data)
        if known is None:
            journal.strange = journal.strange or f"the record at {at} cannot be read"
        elif known.is_last:
            self._ended[known.generation] = known.version
            self.replies += [one.about(known.generation) for one in last_replies(data)]
        else:
            record: Record | Unreadable
            try:
                record = decode(data)
            except Unreadable as error:
                record = error.with_traceback(None)  # or the frames keep all alive
            except ValueError as error:
                journal.strange = journal.strange or f"the record at {at} cannot be read: {error}"
                return
            else:
                self._answered.setdefault(known.generation, []).extend(record.replies)
                if not isinstance(record.roles, dict):  # adopted from a slot that was not whole
                    name, why = record.hold.name, "a record of a slot, not of a journal"
                    record = Unreadable(why, known.uid, known.generation, name)
            self._last[known.generation] = journal, at, record

    def _doubt(self, journal: Journal, damaged: bytes) -> None:
        """Serve no hold whose last record may be the damaged record: the record before is outdated.
        Where the damaged record does not tell the hold, that is any hold."""
        known = prefix(damaged)
        if known is not None and known.generation in self._last:
            of = [known.generation]
        else:
            of = list(self._last)
        for generation in of:
            place, at, record = self._last[generation]
            if place.inode == journal.inode and isinstance(record, Record):
                why = f"{journal.strange}, and the record may be outdated: drop the hold by force"
                name = record.hold.name
                record = Unreadable(why, record.hold.uid, generation, name)
                self._last[generation] = place, at, record

    # Queues

    def add_queue(self, queue: Queue, number: int) -> None:
        """A queue on a counting shelf; owned from now on."""
        generation, uid, fd = queue
        self.on.setdefault(generation, set()).add(number)
        if self._is_known(generation):
            os.close(fd)
        elif generation in self._ended:
            self.dead[generation] = Dead(uid, fd, self._ended[generation])
        elif generation in self._last:
            self._add_hold(uid, fd, *self._last[generation])
        elif self.hidden or generation >= NAMELESS:
            self.hidden = self.hidden or "a hold came from a slot that cannot be read"
            if not self.journals:
                self.journals.append(Journal.create())
            self.places[generation] = Place(uid, fd, self.journals[0], -1)
        else:
            self.dead[generation] = Dead(uid, fd, VERSION)

    def _is_known(self, generation: int) -> bool:
        return generation in self.places or generation in self.dead or generation in self._lying

    def _add_hold(
        self, uid: int, fd: int, journal: Journal, at: int, record: Record | Unreadable
    ) -> None:
        hold = record.hold if isinstance(record, Record) else self.unreadable(record)
        self.places[hold.generation] = Place(uid, fd, journal, at)
        self.holds[hold.generation] = hold, {}

    def unreadable(self, error: Unreadable) -> Hold:
        return Hold(
            uid=error.uid,
            name=error.name,
            generation=error.generation,
            phase=UNREADABLE,
            reason=str(error),
            created=self._created,
        )

    def add_replaced_queue(self, queue: Queue) -> None:
        """A queue on a shelf that does not count; owned from now on.

        The hold may have ended without being drained. The owner's releaser is to drain the queue,
        not the event loop by closing the shelf."""
        generation, uid, fd = queue
        if self._is_known(generation):
            os.close(fd)
        else:
            self.dead[generation] = Dead(uid, fd, self._ended.get(generation, VERSION))

    def add_replies(self) -> None:
        """The replies of holds that are there, or have ended; not of those that got lost with a
        shelf in memory."""
        for generation, replies in self._answered.items():
            if generation in self.places or generation in self._ended:
                self.replies += replies

    def add_pidfds(self, pidfds: list[Pidfd]) -> None:
        """The pidfds of all counting shelves, once all queues are known; owned from now on."""
        every: dict[tuple[int, int], Pidfd] = {}
        for one in pidfds:
            self.last_pidfd = max(self.last_pidfd, one.number)
            if (one.generation, one.number) in every or one.generation not in self.places:
                os.close(one.fd)
            else:
                every[one.generation, one.number] = one
        for generation, (_, roles) in self.holds.items():
            record = self._last[generation][2]
            if not isinstance(record, Record):
                continue
            place = self.places[generation]
            self.last_pidfd = max(self.last_pidfd, *record.roles.values(), 0)
            for role, number in record.roles.items():
                found = every.pop((generation, number), None)
                if found is not None:
                    roles[role] = found.fd
                    place.parked = {**place.parked, role: (found.fd, number)}
        self._keep_strange(list(every.values()))

    def _keep_strange(self, left: list[Pidfd]) -> None:
        """Pidfds that no record names: kept where the record cannot be read."""
        for one in left:
            last = self._last.get(one.generation)
            place = self.places[one.generation]
            if last is not None and isinstance(last[2], Record):
                os.close(one.fd)
            else:
                place.strange = (*place.strange, one)

    # Slots

    def add_slot(self, fds: tuple[int, ...], number: int) -> None:
        """A slot, (socket,) or (outlet, inlet), of a counting shelf; owned from now on."""
        slot = self._first_time(fds)
        if slot is None:
            return
        hold: Hold | None = None
        pidfds: dict[str, int] = {}
        try:
            hold, pidfds = slot.read()
        except Unreadable as error:
            hold = self.unreadable(error)
        except ValueError as error:
            self.hidden = self.hidden or f"a slot cannot be read: {error}"
            self.slots.setdefault(number, []).append(Lying(slot, None, {}))
            return
        self.replies += slot.replies
        if hold is None:
            self.ended.append(slot)
            return
        self._lying.add(hold.generation)
        for lying in self.slots.values():  # of two slots with one generation the later counts
            for one in lying:
                if one.hold is not None and one.hold.generation == hold.generation:
                    lying.remove(one)
                    close_all(one.pidfds.values())
                    self.void.append(one.slot)
                    break
        self.slots.setdefault(number, []).append(Lying(slot, hold, pidfds))

    def add_replaced_slot(self, fds: tuple[int, ...], *, void: bool) -> None:
        """A slot of a replaced shelf, or whose hold is in a journal by now (`void`); owned from
        now on. See `add_replaced_queue`."""
        slot = self._first_time(fds)
        if slot is None:
            return
        try:
            hold, pidfds = slot.read()
        except (Unreadable, ValueError):
            slot.close()
            return
        close_all(pidfds.values())
        if hold is None:
            self.ended.append(slot)
        elif void:
            self.void.append(slot)
        else:
            slot.close()

    def _first_time(self, fds: tuple[int, ...]) -> Slot | None:
        """The slot, unless another shelf led to the same slot before, or a releaser drains the
        slot: to read the slot takes a copy of the bundle, one more to be let go of."""
        slot = Slot(fds)
        if slot.inode in self._inodes or slot.inode in self._draining:
            slot.close()
            return None
        self._inodes.add(slot.inode)
        return slot


def recover(
    pairs: Pairs,
    durable: Collection[int],
    once: Collection[int],
    created: float,
    draining: Collection[int] = (),
) -> Found:
    """Read the shelves of an earlier daemon: (outlet, inlet) by number, owned from now on.

    The store has the shelves of `durable`, and had the shelves of `once`. `created` is for
    unreadable holds. `draining`: inodes of ended slots that releasers have."""
    found = Found(created, draining)
    reads: list[tuple[Shelf, shelf.Read]] = []
    replaced: set[int] = set()
    for number in sorted(pairs):
        outlet, inlet = pairs[number]
        one = Shelf(number, inlet, outlet)
        one.durable = number in durable
        one.was_durable = one.durable or number in once
        read, one.messages = shelf.read(outlet)
        one.counts = read.complete
        one.in_flight = read.fds()
        reads.append((one, read))
        if read.complete:
            replaced.update(read.replaces)
        found.last_number = max(found.last_number, number, *read.replaces)
    counting: list[tuple[Shelf, shelf.Read]] = []
    for one, read in reads:
        counts = one.counts and one.number not in replaced
        if read.unknown and one.number not in replaced:
            found.hidden = found.hidden or f"shelf {one.number} cannot be read: {read.unknown}"
        if not counts and not read.unknown:  # all living holds lie on another shelf as well
            found.retired.append(one)
            continue
        readable = not (read.unreadable or read.unknown)
        (found.counting if readable else found.untouchable).append(one)
        counting.append((one, read))
    _read_counting(found, counting)
    _read_replaced(found, [read for one, read in reads if one in found.retired])
    return found


def _read_counting(found: Found, counting: list[tuple[Shelf, shelf.Read]]) -> None:
    for one, read in counting:
        for fd in read.journals:
            found.add_journal(fd, foreign=one in found.untouchable)
    for one, read in counting:
        found.replies += read.replies
        found.has_outcomes = found.has_outcomes or bool(read.replies)
        for fds in read.slots:
            found.add_slot(fds, one.number)
    for one, read in counting:
        for fds in read.void_slots:
            found.add_replaced_slot(fds, void=True)
        for queue in read.queues:
            found.add_queue(queue, one.number)
    found.add_replies()
    found.add_pidfds([pidfd for _, read in counting for pidfd in read.pidfds])


def _read_replaced(found: Found, replaced: list[shelf.Read]) -> None:
    for read in replaced:
        close_all([*read.journals, *(pidfd.fd for pidfd in read.pidfds)])
        for queue in read.queues:
            found.add_replaced_queue(queue)
        for fds in (*read.slots, *read.void_slots):
            found.add_replaced_slot(fds, void=False)

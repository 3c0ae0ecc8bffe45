"""The legacy of an earlier daemon: the counting shelves, and the slots on the shelves.

Several shelves count after a downgrade, or an upgrade after a downgrade: an older cprd leaves a
newer shelf alone, and starts a new shelf.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Mapping

from cprd.daemon.storage import shelf
from cprd.daemon.storage.shelf import Shelf
from cprd.daemon.storage.slot import Slot, Unreadable
from cprd.linux.rights import close_all
from cprd.protocol.lifecycle import UNREADABLE, Hold
from cprd.protocol.replies import Reply

Pairs = Mapping[int, tuple[socket.socket, socket.socket]]


class Found:
    """Owns all parts."""

    def __init__(self, draining: Collection[int]) -> None:
        """Slots of these inodes have ended, and a releaser has each: left alone."""
        self.counting: list[Shelf] = []  # older first
        self.untouchable: list[Shelf] = []  # count, and have records that cannot be read
        self.retired: list[Shelf] = []  # do not count
        self.last_number = 1
        self.holds: dict[int, tuple[Hold, dict[str, int]]] = {}  # with pidfds by role
        self.slots: dict[int, Slot] = {}  # by generation; below 0: without a readable prefix
        self.ended: list[Slot] = []  # to be drained
        self.outdated: list[Slot] = []  # the daemon died while writing the slot anew; to be drained
        self.replies: list[Reply] = []
        self.hidden = ""  # why a hold may exist whose name nobody can read
        self._shelves: dict[int, set[int]] = {}  # by inode of a slot: two shelves may have one slot
        self._draining = draining

    def unshelved(self, numbers: Collection[int]) -> list[Slot]:
        """The slots outside of the shelves with these numbers."""
        return [
            slot
            for slot in self.slots.values()
            if self._shelves[_inode(slot.fileno())].isdisjoint(numbers)
        ]

    def add_slot(self, fds: tuple[int, ...], number: int, created: float) -> None:
        """A slot, (socket,) or (outlet, inlet), of a counting shelf; owned from now on."""
        slot = self._first_time(fds, number)
        if slot is None:
            return
        pidfds: dict[str, int] = {}
        try:
            hold, pidfds = slot.read()
        except Unreadable as error:
            hold = Hold(
                uid=error.uid,
                name=error.name,
                generation=error.generation,
                phase=UNREADABLE,
                reason=str(error),
                created=created,
            )
        except ValueError as error:
            self.slots[-1 - len(self.slots)] = slot
            self.hidden = self.hidden or f"a slot cannot be read: {error}"
            return
        self.replies += slot.content.replies
        if hold is None:
            self.ended.append(slot)
            return
        earlier = self.slots.get(hold.generation)
        if earlier is not None:
            close_all(self.holds[hold.generation][1].values())
            self.outdated.append(earlier)
        self.slots[hold.generation] = slot
        self.holds[hold.generation] = hold, pidfds

    def add_replaced_slot(self, fds: tuple[int, ...]) -> None:
        """A slot of a replaced shelf; owned from now on.

        Such a slot may have ended without being drained. The owner's releaser is to drain the
        slot, not the event loop by closing the shelf."""
        slot = self._first_time(fds, 0)
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
        else:
            slot.close()

    def _first_time(self, fds: tuple[int, ...], number: int) -> Slot | None:
        """The slot, unless another shelf led to the same slot before, or a releaser drains the
        slot: to read the slot takes a copy of the bundle, one more to be let go of."""
        inode = _inode(fds[0])
        known = inode in self._shelves or inode in self._draining
        self._shelves.setdefault(inode, set()).add(number)
        if known:
            for fd in fds:
                os.close(fd)
            return None
        return Slot.found(fds)


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
    found = Found(draining)
    reads: list[tuple[Shelf, shelf.Read]] = []
    replaced: set[int] = set()
    for number in sorted(pairs):
        outlet, inlet = pairs[number]
        one = Shelf(number, inlet, outlet)
        one.durable = number in durable
        one.was_durable = one.durable or number in once
        read, one.messages = shelf.read(outlet)
        one.counts = read.complete
        one.in_flight = sum(map(len, read.slots))
        reads.append((one, read))
        if read.complete:
            replaced.update(read.replaces)
        found.last_number = max(found.last_number, number, *read.replaces)
    not_counting: list[tuple[int, ...]] = []
    for one, read in reads:
        counts = one.counts and one.number not in replaced
        if read.unknown and one.number not in replaced:
            found.hidden = found.hidden or f"shelf {one.number} cannot be read: {read.unknown}"
        if not counts and not read.unknown:  # all living slots lie on another shelf as well
            not_counting += read.slots
            found.retired.append(one)
            continue
        readable = not (read.unreadable or read.unknown)
        (found.counting if readable else found.untouchable).append(one)
        found.replies += read.replies
        for fds in read.slots:
            found.add_slot(fds, one.number, created)
    for fds in not_counting:
        found.add_replaced_slot(fds)
    return found


def _inode(fd: int) -> int:
    return os.fstat(fd).st_ino

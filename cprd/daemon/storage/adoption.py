"""Going on with what an earlier daemon left: all holds on one shelf, and records in journals.

Everything is written before anything is taken out, and nothing is answered meanwhile: a kill at any
moment leaves the same legacy, or the new form of it.
"""

from __future__ import annotations

import os
from itertools import count, filterfalse
from typing import TYPE_CHECKING

from cprd.daemon import log
from cprd.daemon.storage.journal import Place
from cprd.daemon.storage.record import encode, reply_records
from cprd.daemon.storage.recover import NAMELESS, Found, Lying
from cprd.daemon.storage.shelf import ShelfFull
from cprd.errors import LimitExceeded
from cprd.linux.rights import scm_fds
from cprd.protocol.lifecycle import UNREADABLE

if TYPE_CHECKING:
    from cprd.daemon.storage.shelves import Keeper
    from cprd.daemon.storage.slot import Slot


def take_over(keeper: Keeper, found: Found) -> None:
    """Takes over all parts of `found`. Raises LimitExceeded, with nothing lost, where the holds
    find no room on one shelf."""
    keeper.last_number = max(keeper.last_number, found.last_number)
    keeper.last_pidfd = found.last_pidfd
    keeper.places = found.places
    keeper.untouchable = found.untouchable
    _take_journals(keeper, found)
    keeper.shelf.close()
    fresh = not found.counting
    keeper.shelf = keeper.new_spare() if fresh else found.counting.pop()
    for old in (*found.retired, *found.counting):
        keeper.retire(old)
    slots = _take_slots(keeper, found)
    earlier = bool(slots or found.ended or found.has_outcomes)
    _restore_replies(keeper, found, stored=earlier)
    in_place = _shelve(keeper, found, fresh=fresh, again=bool(slots))
    keeper.has_slots = in_place and earlier
    for lying in slots:
        if in_place or not keeper.shelf.was_durable:
            _end_slot(keeper, lying.slot)
        else:  # the stored shelf leads there, until the present shelf is stored
            lying.slot.close()
    _let_go(keeper, found)


def _take_journals(keeper: Keeper, found: Found) -> None:
    """New holds go into the last journal that no newer cprd needs."""
    own = [one for one in found.journals if not (one.strange or one.inode in found.foreign)]
    if own:
        keeper.journal.close()
        keeper.journal = own[-1]
    others = [one for one in found.journals if one is not keeper.journal]
    keeper.journals = [*others, keeper.journal]


def _take_slots(keeper: Keeper, found: Found) -> list[Lying]:
    """Write the holds of living slots into the journal; no shelf leads from there to the bundles
    yet. Returns the slots."""
    slots = [lying for on_one in found.slots.values() for lying in on_one]
    nameless = filterfalse(keeper.places.__contains__, count(NAMELESS))
    for slot, hold, pidfds in slots:
        generation = next(nameless) if hold is None else hold.generation
        place = Place(slot.uid, slot.bundle(), keeper.journal, -1)
        keeper.places[generation] = place
        if hold is None or hold.phase == UNREADABLE:
            at = keeper.journal.append(slot.raw)
            if hold is not None:
                place.at = at
                found.holds[generation] = hold, {}
            continue
        numbers = dict(zip(pidfds, range(keeper.last_pidfd + 1, 1 << 64), strict=False))
        keeper.last_pidfd += len(numbers)
        place.at = keeper.journal.append(encode(hold, numbers))
        place.parked = {role: (pidfds[role], numbers[role]) for role in numbers}
        found.holds[generation] = hold, pidfds
    return slots


def _shelve(keeper: Keeper, found: Found, *, fresh: bool, again: bool) -> bool:
    """Bring all holds on the counting shelf. Returns whether that is the same shelf as before; a
    shelf without room is replaced."""
    shelf = keeper.shelf
    missing = [
        (generation, place)
        for generation, place in keeper.places.items()
        if shelf.number not in found.on.get(generation, ())
    ]
    if not (fresh or again or missing or found.counting or keeper.journal not in found.journals):
        return True
    try:
        with_pidfds = {of: fds for of, (_, fds) in found.holds.items()}
        keeper.pidfds_of, before = lambda of: with_pidfds.get(of, {}), keeper.pidfds_of
        keeper.add_places(shelf, missing)
        shelf.complete(keeper.journal_fds(), [old.number for old in keeper.retired])
    except ShelfFull:
        keeper.compact(must=True)
    finally:
        keeper.pidfds_of = before
    return keeper.shelf is shelf


def _restore_replies(keeper: Keeper, found: Found, *, stored: bool) -> None:
    """Remember the replies. `stored`: in slots, too, and beside slots, which will be gone."""
    for reply in sorted(found.replies, key=lambda reply: reply.at):
        keeper.replies.remember(reply)
    for written in reply_records(keeper.replies.pending(keeper.clock()) if stored else ()):
        keeper.journal.append(written)


def _let_go(keeper: Keeper, found: Found) -> None:
    """Drain what has ended, in the releasers of the owners."""
    draining = keeper.releasing.draining
    for generation, dead in found.dead.items():
        if os.fstat(dead.bundle).st_ino in draining or not scm_fds(dead.bundle):
            os.close(dead.bundle)  # not the last one; or empty
        else:
            keeper.drain(generation, dead)
    for slot in found.void:
        _end_slot(keeper, slot)
    for slot in found.ended:
        if slot.has_foreign(draining):
            _drain_slot(keeper, slot)
        else:  # drained before: only pidfds of cprd can be left
            slot.close()


def _end_slot(keeper: Keeper, slot: Slot) -> None:
    try:
        slot.mark_dead()
    except LimitExceeded as error:  # draining says so as well
        log.event("end-not-written", level=log.WARNING, why=str(error))
    _drain_slot(keeper, slot)


def _drain_slot(keeper: Keeper, slot: Slot) -> None:
    outlet, foreign = slot.give_away()
    keeper.releasing.close(slot.uid, foreign)
    keeper.releasing.drain(slot.uid, outlet)

"""Where holds physically lie: which shelf counts, and writing steps down before they are true.

`Keeper.write` puts a step where the step outlives this process, as far as the place allows. Only
then may the registry apply the step, and the client hear the answer. `let_go` does the slow part
afterwards.

A single shelf counts. Where systemd keeps the shelf, an empty stored shelf, the spare, is ready to
take over: so a shelf can be written anew at any moment, at once, without the store growing. (The
spare takes the two entries of the store which are always free; fdstore.py stores spares.) While the
counting shelf is not stored (the store is full), no slot of an older stored shelf is replaced: only
the newer shelf would lead to the new slot. Without a manager all is the same, but the shelf lives
no longer than the process (which may re-execute).
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

from cprd.daemon import log
from cprd.daemon.releasing import Releasing
from cprd.daemon.storage.recover import Found, Pairs, recover
from cprd.daemon.storage.shelf import SLOTS_A_RECORD, Shelf, ShelfFull
from cprd.daemon.storage.slot import NOBODY, Slot, SlotFull, last_version
from cprd.errors import LimitExceeded
from cprd.linux.pause import point
from cprd.protocol.holds import AWAKE
from cprd.protocol.lifecycle import Hold
from cprd.protocol.registry import Ended, Step
from cprd.protocol.replies import Replies, Reply

MAX_RECORDS = 30  # in one slot, before the slot is written anew
ON_A_SHELF = 1  # descriptors of a new slot
MAX_PARKED = 8  # descriptors in one slot, before the slot is written anew
FULL = "cprd's shelf is full: raise net.core.wmem_max, or drop holds"
NOT_STORED = (
    'require="store": this cprd keeps holds in memory only; run it as a systemd service with'
    " FileDescriptorStoreMax=, or as cprd --keep (see cprctl status)"
)
# On a shelf that has few slots, before the shelf is written anew: messages, and descriptors of
# ended holds. With these the kernel does not yet count too many of cprd in flight (2,024).
MANY_MESSAGES, MANY_ENDED, FEW = 1024, 500, 750

Pidfds = Mapping[str, int]


class Keeper:
    """The slots of all holds, by generation, and the counting shelf."""

    def __init__(
        self,
        releasing: Releasing,
        clock: Callable[[], float],
        replies: Replies,
        *,
        managed: bool = False,
    ) -> None:
        """`managed`: a `fdstore.Store` takes shelves out of the store before closing."""
        self.releasing = releasing
        self.managed = managed
        self.clock = clock
        self.replies = replies
        self.slots: dict[int, Slot] = {}
        self._fresh: deque[Slot] = deque()  # may be asked for soon
        self._last_number = 1
        self.shelf = Shelf.create(1)
        self.shelf.complete()
        self.spare: Shelf | None = None
        self.retired: list[Shelf] = []  # to be taken out of the store, then closed
        self.untouchable: list[Shelf] = []  # have records that cannot be read: kept as they are
        self.merging: list[Shelf] = []  # count as well, until the next shelf takes over the slots
        self.wants_spare: Callable[[], None] = lambda: None
        self.next: Shelf | None = None  # is written, and does not count yet
        self._pieces: Iterator[None] = iter(())
        self.compact_soon: Callable[[], None] | None = None  # else at once
        self.close_shelf: Callable[[Shelf], None] = Shelf.close  # with all ended slots there

    @property
    def kept(self) -> str:
        """The place of the next write: "store" or "memory"."""
        return "store" if self.shelf.durable else "memory"

    def write(
        self, step: Step, bundle: int, pidfds: Mapping[int, Pidfds], *, require_store: bool = False
    ) -> None:
        """Write a step down. Raises LimitExceeded; then nothing has changed.

        `bundle` (of a new hold, else -1) and the pidfds, by generation and role, stay the
        caller's."""
        replies = [step.reply] if step.reply is not None else []
        made: list[Hold] = []
        try:
            for hold in step.put:
                roles = pidfds.get(hold.generation, {})
                old = self.slots.get(hold.generation)
                if old is None:
                    self._add(hold, Slot.create(hold, bundle, roles, replies))
                    made.append(hold)
                    if require_store and not self.shelf.durable:
                        raise LimitExceeded(NOT_STORED)
                else:
                    self._rewrite(old, hold, roles, replies)
            point("keeper:put")
        except BaseException:
            for hold in made:
                self._unmake(hold)
            for hold in step.put:
                if hold.generation in self.slots:
                    self.slots[hold.generation].content.known = NOBODY
            raise
        try:
            self._end(step.ended, [] if step.put else replies)
        except LimitExceeded as error:
            if not step.put:
                raise
            # The new record says so as well: committed, and newer.
            log.event("end-not-written", level=log.WARNING, why=str(error))
        point("keeper:ended")

    def _unmake(self, hold: Hold) -> None:
        made = self.slots.pop(hold.generation)
        with suppress(LimitExceeded):  # draining says so as well
            made.mark_dead(hold)
        self._drain(made, hold.uid)

    @property
    def on_next_shelf(self) -> int:
        """The descriptors of all slots."""
        return sum(len(held.fds) for held in self.slots.values())

    def in_flight(self) -> tuple[int, Counter[int]]:
        """What is parked in slots and on shelves: in all, and by owner."""
        of: Counter[int] = Counter()
        parked = sum(one.in_flight for one in self.shelves())
        for held in self.slots.values():
            # Now, and while the shelf is rewritten.
            of[held.uid] += held.in_flight + 2 * len(held.fds)
            parked += held.in_flight
        return parked, of

    def _end(self, all_ended: Iterable[Ended], replies: Sequence[Reply]) -> None:
        """End holds: the slots say so, with the replies, and the end is true. The shelf gets the
        replies too, because the slots will be drained."""
        outcomes: list[Reply] = []
        for ended in all_ended:
            hold = ended.hold
            dying = self.slots.get(hold.generation)
            if dying is not None:
                dying.mark_dead(hold, replies, version=last_version(ended))
                outcomes += [one.about(hold.generation) for one in dying.content.replies]
        self._add_outcomes(outcomes)

    def _add(self, hold: Hold, new: Slot) -> None:
        try:
            self._append(lambda: self.shelf.add_slot(new.fds))
        except BaseException:
            new.close()
            raise
        self._to_next(lambda shelf: shelf.add_slot(new.fds))
        self.slots[hold.generation] = new
        self._fresh.append(new)
        if len(self._fresh) > AWAKE:
            self._fresh.popleft().rest()

    def _append(self, append: Callable[[], None]) -> None:
        """Append to the shelf; a full shelf is written anew first. Raises LimitExceeded."""
        if _worn(self):
            self._try(self.compact_soon or self.compact)
        try:
            append()
        except ShelfFull:
            self.compact(must=True)
            try:
                append()
            except ShelfFull:
                raise LimitExceeded(FULL) from None

    @property
    def _may_replace(self) -> bool:
        """Whether a new slot is as safe as an old one: not while the counting shelf is not stored,
        and an older shelf is."""
        older = (*self.retired, *self.merging, *self.untouchable)
        return self.shelf.durable or not any(one.was_durable for one in older)

    def _rewrite(self, old: Slot, hold: Hold, roles: Pidfds, replies: Sequence[Reply]) -> None:
        """Append a record to the slot; a full slot is replaced by a fresh slot."""
        try:
            full = old.content.records >= MAX_RECORDS or old.in_flight >= MAX_PARKED
            if full and self._may_replace:
                raise SlotFull
            old.append(hold, roles, replies)
        except SlotFull:
            if self._may_replace and self._replace(old, hold, roles, replies):
                return
            try:
                old.grow()
                old.append(hold, roles, replies)
            except SlotFull:
                raise LimitExceeded(
                    f"the record of {hold.name!r} is full, and the manager's store has no room for"
                    " a new one: raise FileDescriptorStoreMax= of cprd.service"
                ) from None

    def _replace(self, old: Slot, hold: Hold, roles: Pidfds, replies: Sequence[Reply]) -> bool:
        """Write a fresh slot instead of a full one.

        False, with nothing changed, when a new shelf is needed and the store has no room."""
        bundle = old.bundle()
        try:
            fresh = Slot.create(hold, bundle, roles, (*old.content.replies, *replies))
        finally:
            os.close(bundle)
        self._add(hold, fresh)
        point("keeper:replaced")
        if not self._may_replace:
            self._unmake(hold)
            self.slots[hold.generation] = old
            return False
        try:
            old.mark_dead(hold)
        except LimitExceeded as error:  # the later slot of two counts
            log.event("end-not-written", level=log.WARNING, why=str(error))
        self._drain(old, hold.uid)
        return True

    def _add_outcomes(self, replies: Sequence[Reply]) -> None:
        """Append replies about ended holds."""
        if not replies:
            return
        try:
            self._append(lambda: self.shelf.add_outcomes(replies))
        except LimitExceeded as error:
            log.event("outcome-not-written", level=log.WARNING, why=str(error))
        self._to_next(lambda shelf: shelf.add_outcomes(replies))

    def compact(self, *, must: bool = False) -> None:
        """Write the shelf anew, without the ended slots.

        With a store a stored spare takes over. Without a spare the old shelf stays; when the
        shelf is full (`must`) an unstored shelf takes over: answers say "memory" meanwhile."""
        self.begin(must=must)
        while self.fill():
            pass

    def _try(self, compact: Callable[[], None]) -> None:
        try:
            compact()
        except LimitExceeded as error:
            log.event("shelf-not-compacted", level=log.WARNING, why=str(error))

    def begin(self, *, must: bool = False) -> None:
        """As `compact`, but `fill` is to be called until all is written. Meanwhile the present
        shelf counts, and what comes lies on both."""
        if self.next is None and (must or self.spare is not None or not self.shelf.durable):
            self.next = self.spare or self.new_spare()
            self._pieces = self._write_all(self.next)

    def _write_all(self, new: Shelf) -> Iterator[None]:
        slots = list(self.slots.items())
        for at in range(0, len(slots), SLOTS_A_RECORD):
            part = slots[at : at + SLOTS_A_RECORD]
            new.add_slots(held.fds for of, held in part if self.slots.get(of) is held)
            yield
        outcomes = _outcomes(self)[-new.room :]  # so many take a quarter of the room
        for at in range(0, len(outcomes), SLOTS_A_RECORD):
            new.add_outcomes(outcomes[at : at + SLOTS_A_RECORD])
            yield

    def fill(self) -> bool:
        """Write a piece of the next shelf; with the last piece that shelf takes over. Returns
        whether more is left. Raises LimitExceeded."""
        new = self.next
        if new is None:
            return False
        if self.spare not in (None, new):  # stored since: an unstored shelf is not to take over
            self.give_up()
            self.begin()
            return True
        replaced = [self.shelf, *self.merging]
        try:
            for _ in self._pieces:
                return True
            new.complete([other.number for other in (*replaced, *self.retired)])
        except BaseException as error:
            self.give_up()
            if isinstance(error, ShelfFull):
                raise LimitExceeded(FULL) from None
            raise
        before, self.shelf = self.shelf.number, new
        log.event(
            "shelf", number=new.number, slots=len(self.slots), replaces=before, kept=self.kept
        )
        self.spare, self.next, self.merging = None, None, []
        for old in replaced:
            self._retire(old)
        point("keeper:compacted")
        self.wants_spare()
        return False

    def give_up(self) -> None:
        """Retire the next shelf, which does not count yet."""
        new, self.next = self.next, None
        if new is not None:
            self.spare = None if self.spare is new else self.spare
            self._retire(new)
            self.wants_spare()

    def _to_next(self, append: Callable[[Shelf], None]) -> None:
        try:
            if self.next is not None:
                append(self.next)
        except (LimitExceeded, ShelfFull):
            self.give_up()

    def _retire(self, old: Shelf) -> None:
        """Close a shelf; with a manager only after the store has let go of the shelf."""
        if self.managed:
            self.retired.append(old)
        else:
            self.close_shelf(old)

    def new_spare(self) -> Shelf:
        """An empty shelf, which the caller owns. No number is used twice."""
        self._last_number += 1
        return Shelf.create(self._last_number)

    def let_go(self, ended: Iterable[Hold]) -> None:
        """Drain the slots of ended holds: soon, in the releasers of the owners."""
        for hold in ended:
            old = self.slots.pop(hold.generation, None)
            if old is not None and not (old.content.says_ended and self._drain_bundle(old, hold)):
                self._drain(old, hold.uid)

    def _drain_bundle(self, old: Slot, hold: Hold) -> bool:
        """Drain the bundle of a slot that says the end; the slot stays until the shelf is written
        anew. False where the slot has to be drained.

        To take a socket out of a socket in flight makes the kernel's collector look at all sockets
        in flight, and whoever has many there waits."""
        if hold.live:
            return False
        try:
            bundle = old.bundle()
        except (LimitExceeded, OSError):
            return False
        point("slot:drain")
        self.shelf.in_flight += old.in_flight
        self.releasing.drain(hold.uid, bundle)
        old.close()  # the bundle has a copy until drained: not the last one
        point("slot:drained")
        return True

    def forget(self, hold: Hold) -> None:
        """End an outdated hold. A newer hold of the name may have the content of a live hold."""
        try:
            self._end([Ended(hold, "outdated", heir=hold.live)], [])
        except LimitExceeded as error:  # draining says so as well
            log.event("end-not-written", level=log.WARNING, why=str(error))
        self.let_go([hold])

    def _drain(self, old: Slot, uid: int) -> None:
        outlet, foreign = old.give_away()
        self.releasing.close(uid, foreign)
        self.releasing.drain(uid, outlet)
        point("slot:drained")

    def abandon(self) -> None:
        """Before the end of the daemon: what is kept in memory only ends with the daemon, and a
        foreign file could block that end. The releasers of the owners get a copy of each bundle,
        and close the copy afterwards: whatever a store has lives on. `close` is to follow."""
        if self.shelf.durable:
            return
        for slot in self.slots.values():
            try:
                self.releasing.close_after(slot.uid, [slot.bundle()])
            except (LimitExceeded, OSError) as error:
                log.event("not-released", level=log.ERROR, uid=slot.uid, why=str(error))

    def close(self) -> None:
        """Close all slots and shelves of this process. Nothing works afterwards."""
        every: tuple[Slot | Shelf, ...] = (*self.slots.values(), *self.shelves())
        for one in every:
            one.close()

    def bundle(self, generation: int) -> int:
        """The bundle of a hold: a descriptor, owned by the caller."""
        return self.slots[generation].bundle()

    # After a restart

    def shelves(self) -> list[Shelf]:
        """All that must come along when the daemon re-executes."""
        ready = dict.fromkeys(one for one in (self.spare, self.next) if one is not None)
        return [*self.untouchable, *self.retired, *self.merging, *ready, self.shelf]

    def adopt(
        self, pairs: Pairs, durable: Collection[int], once: Collection[int] = ()
    ) -> tuple[list[tuple[Hold, dict[str, int]]], str]:
        """Take over the shelves of an earlier daemon (recover.recover).

        Returns the holds with pidfds by role, owned by the caller, and why a hold with an unknown
        name may exist ("": no such hold)."""
        found = recover(pairs, durable, once, self.clock(), self.releasing.draining)
        self._last_number = max(self._last_number, found.last_number)
        self.slots = found.slots
        for slot in found.slots.values():
            slot.rest()
        self.untouchable = found.untouchable
        self.shelf.close()
        self.shelf = found.counting.pop() if found.counting else self.new_spare()
        self.merging = found.counting
        self._shelve(found, fresh=self.shelf.number not in pairs)
        for old in found.retired:
            self._retire(old)
        self._restore_replies(found)
        for dead in (*found.ended, *found.outdated):
            if dead in found.outdated or dead.has_foreign(self.releasing.draining):
                self._drain(dead, dead.uid)
            else:  # drained before: only pidfds of cprd can be left
                self.shelf.in_flight += dead.in_flight
                dead.close()
        if self.merging:
            self._try(self.compact)
        return list(found.holds.values()), found.hidden

    def _shelve(self, found: Found, *, fresh: bool) -> None:
        """Put slots of untouchable shelves on the counting shelf as well: as safe as a new save."""
        numbers = {self.shelf.number, *(other.number for other in self.merging)}
        slots = [slot.fds for slot in found.unshelved(numbers)]
        try:
            if fresh:
                self.shelf.add_slots(slots)
            elif slots:
                self._append(lambda: self.shelf.add_slots(slots))
        except (LimitExceeded, ShelfFull) as error:  # the slots stay where they are
            log.event("shelf-not-compacted", level=log.WARNING, why=str(error) or FULL)
        if fresh:
            self.shelf.complete()

    def _restore_replies(self, found: Found) -> None:
        """Remember the replies; append the replies of ended slots to the shelf."""
        for reply in sorted(found.replies, key=lambda reply: reply.at):
            self.replies.remember(reply)
        self.replies.forget_old(self.clock())
        dying = {(one.uid, one.nonce) for slot in found.ended for one in slot.content.replies}
        self._add_outcomes([one for one in _outcomes(self) if (one.uid, one.nonce) in dying])


def _outcomes(keeper: Keeper) -> list[Reply]:
    """Replies that may be asked for, and lie in no slot, older first."""
    slots = keeper.slots
    awake = (slot for slot in slots.values() if not slot.at_rest)
    lying = {(one.uid, one.nonce) for slot in awake for one in slot.content.replies}

    def lies(reply: Reply) -> bool:
        if (reply.uid, reply.nonce) in lying:
            return True
        slot = slots.get(reply.answer.get("generation", 0))
        return slot is not None and slot.at_rest  # it has the answer to the save, and no other

    return [reply for reply in keeper.replies.pending(keeper.clock()) if not lies(reply)]


def _worn(keeper: Keeper) -> bool:
    """Whether much of the counting shelf is of ended holds."""
    shelf, held = keeper.shelf, len(keeper.slots)
    if shelf.messages > min(max(MANY_MESSAGES, 2 * held), shelf.room // 2):
        return True
    many = 2 * held if held > FEW else MANY_ENDED
    # First the quick look: a slot of an earlier version has two descriptors.
    return shelf.in_flight - held > many and shelf.in_flight - keeper.on_next_shelf > many

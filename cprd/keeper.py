"""Where holds physically lie, and writing steps down before they count.

`write` puts a step where it outlives this process as far as the place allows; only then may the
registry apply it and the client hear of it. `let_go` does afterwards what can take time.

There is one shelf that counts. Where systemd keeps it, a second one, empty and stored as well, lies
ready to take its place: so a shelf can be written anew at any moment, at once, and without the
store growing; that is the two entries of the store which are always free. See `store` for how they
get there. Without a manager everything is the same, only that the shelf lives no longer than the
process (which may re-execute itself).
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cprd import log, shelf, slot
from cprd.closer import Closer
from cprd.errors import LimitExceeded
from cprd.holds import UNREADABLE, Hold, Step
from cprd.pause import point
from cprd.shelf import Shelf, ShelfFull
from cprd.slot import Slot, SlotFull, Unreadable

MAX_RECORDS = 100  # in one slot, before it is written anew
OUTCOMES = 512  # remembered across a restart
OUTCOMES_FOR = 300.0  # s

Pidfds = Mapping[str, int]


class Keeper:
    """The slots of all holds, by generation, and the shelf that they lie on."""

    def __init__(self, closer: Closer, clock: Callable[[], float]) -> None:
        self.closer = closer
        self.clock = clock
        self.slots: dict[int, Slot] = {}
        self._last_number = 1
        self.shelf = Shelf.create(1)
        self.shelf.complete()
        self.spare: Shelf | None = None
        self.retired: list[Shelf] = []  # to be taken out of the store, then closed
        self.untouchable: list[Shelf] = []  # something on them cannot be read: kept as they are
        self.outcomes: deque[dict[str, Any]] = deque(maxlen=OUTCOMES)
        self.wants_spare: Callable[[], None] = lambda: None

    @property
    def kept(self) -> str:
        """Where what is written now is kept."""
        return "store" if self.shelf.durable else "memory"

    def write(self, step: Step, bundle: int, pidfds: Mapping[int, Pidfds]) -> None:
        """Write a step down. `bundle` (of a hold that is new, else -1) and the pidfds by
        generation and role stay the caller's. Raises LimitExceeded; then nothing has changed."""
        made: list[int] = []
        try:
            for hold in step.put:
                roles = pidfds.get(hold.generation, {})
                old = self.slots.get(hold.generation)
                if old is None:
                    self._add(hold, Slot.create(hold, bundle, roles))
                    made.append(hold.generation)
                else:
                    self._rewrite(old, hold, roles)
            point("keeper:put")
            for ended in step.ended:
                dying = self.slots.get(ended.hold.generation)
                if dying is not None:
                    dying.mark_dead(ended.hold)
            if step.ended:
                self._remember(step)
            point("keeper:ended")
        except BaseException:
            for generation in made:
                self._drain(self.slots.pop(generation), 0)
            raise

    def _add(self, hold: Hold, new: Slot) -> None:
        try:
            self._append(lambda: self.shelf.add_slots([slot.fileno_pair(new)]))
        except BaseException:
            new.close()
            raise
        self.slots[hold.generation] = new

    def _append(self, append: Callable[[], None]) -> None:
        """Append to the shelf; a full one is written anew first."""
        try:
            if self.shelf.messages > max(64 + 2 * len(self.slots), self.shelf.room // 2):
                self.compact()
            append()
        except ShelfFull:
            self.compact(must=True)
            append()

    def _rewrite(self, old: Slot, hold: Hold, roles: Pidfds) -> None:
        """A new record in the slot; a slot that is full of them is replaced by a fresh one."""
        try:
            if old.records >= MAX_RECORDS:
                raise SlotFull
            old.append(hold, roles)
        except SlotFull:
            bundle = old.bundle()
            try:
                fresh = Slot.create(hold, bundle, roles)
            finally:
                os.close(bundle)
            self._add(hold, fresh)
            old.mark_dead(hold)
            self._drain(old, hold.uid)

    def _remember(self, step: Step) -> None:
        """Note the answer to a request that ended a hold; the slots themselves say that it did."""
        outcome = {
            "uid": step.uid,
            "nonce": step.nonce,
            "answer": step.answer,
            "at": self.clock(),
            "how": step.ended[0].how,
            "generation": max(ended.hold.generation for ended in step.ended),
        }
        self.outcomes.append(outcome)
        try:
            self._append(lambda: self.shelf.add_outcome(outcome))
        except (ShelfFull, LimitExceeded) as error:
            log.event("outcome-not-written", level=log.WARNING, why=str(error) or "shelf full")

    def compact(self, *, must: bool = False) -> None:
        """Write the shelf anew, without what ended. With a store it takes a spare one that is
        stored already; while there is none the old one has to do, and when it is full (`must`)
        one that is not stored: answers say "memory" until a stored one takes over."""
        if self.shelf.durable and self.spare is None and not must:
            return
        new = self.spare or self.new_spare()
        try:
            new.add_slots([slot.fileno_pair(held) for held in self.slots.values()])
            oldest = self.clock() - OUTCOMES_FOR
            for outcome in self.outcomes:
                if outcome["at"] >= oldest:
                    new.add_outcome(outcome)
            new.complete()
        except BaseException as error:
            if new is self.spare:
                self.spare = None
                self.retired.append(new)
            else:
                new.close()
            if isinstance(error, ShelfFull):
                raise LimitExceeded(
                    "cprd's shelf is full: raise net.core.wmem_max, or drop holds"
                ) from None
            raise
        log.event(
            "shelf",
            number=new.number,
            slots=len(self.slots),
            replaces=self.shelf.number,
            kept="store" if new.durable else "memory",
        )
        if self.shelf.durable:
            self.retired.append(self.shelf)
        else:
            self.shelf.close()
        self.shelf, self.spare = new, None
        point("keeper:compacted")
        self.wants_spare()

    def new_spare(self) -> Shelf:
        """An empty shelf, which the caller owns. Numbers are never used twice."""
        self._last_number += 1
        return Shelf.create(self._last_number)

    def let_go(self, ended: Iterable[Hold]) -> None:
        """Free what ended holds held: soon, in their owners' worker threads."""
        for hold in ended:
            old = self.slots.pop(hold.generation, None)
            if old is not None:
                self._drain(old, hold.uid)

    def _drain(self, old: Slot, uid: int) -> None:
        self.closer.run(uid, old.drain)

    def bundle(self, generation: int) -> int:
        """The bundle of a hold: a descriptor that the caller owns."""
        return self.slots[generation].bundle()

    # After a restart

    def shelves(self) -> list[Shelf]:
        """All that must come along when the daemon re-executes itself."""
        spare = [] if self.spare is None else [self.spare]
        return [*self.untouchable, *self.retired, *spare, self.shelf]

    def adopt(
        self, pairs: Mapping[int, tuple[socket.socket, socket.socket]], durable: frozenset[int]
    ) -> tuple[list[tuple[Hold, dict[str, int]]], str]:
        """Take over the shelves that an earlier daemon left: (outlet, inlet) by number.

        Returns the holds with their pidfds by role (the caller owns them), and why there may be
        holds that nobody can name ("": there are none)."""
        blind = ""
        found: list[tuple[Hold, dict[str, int]]] = []
        best: tuple[Shelf, shelf.Read] | None = None
        for number in sorted(pairs):
            outlet, inlet = pairs[number]
            self._last_number = max(self._last_number, number)
            old = Shelf(number, inlet, outlet)
            old.durable = number in durable
            read, old.messages = shelf.read(outlet)
            if read.unreadable:
                blind = f"shelf {number} cannot be read: {read.unreadable}"
                self.untouchable.append(old)
                _close_pairs(read.slots)
            elif not read.complete:  # a spare, or one that was being filled: it never counted
                _close_pairs(read.slots)
                self.retired.append(old)
            else:
                if best is not None:
                    _close_pairs(best[1].slots)
                    self.retired.append(best[0])
                best = (old, read)
        if best is not None:
            self.shelf.close()
            self.shelf, read = best
            self.outcomes.extend(read.outcomes)
            for fds in read.slots:
                adopted = self._adopt_slot(*fds)
                if isinstance(adopted, str):
                    blind = blind or adopted
                elif adopted is not None:
                    found.append(adopted)
        return found, blind

    def _adopt_slot(self, outlet: int, inlet: int) -> tuple[Hold, dict[str, int]] | str | None:
        """One slot, whose descriptors this owns now. None: it is a husk. A text: nobody can tell
        whose it is."""
        ends = [
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=fd)
            for fd in (inlet, outlet)
        ]
        old = Slot(*ends)
        try:
            hold, pidfds = old.read()
        except Unreadable as error:
            hold = Hold(
                uid=error.uid,
                name=error.name,
                generation=error.generation,
                phase=UNREADABLE,
                reason=str(error),
                created=self.clock(),
            )
            pidfds = {}
        except ValueError as error:
            self.slots[-1 - len(self.slots)] = old  # stays on the shelf, come what may
            return f"a slot cannot be read: {error}"
        if hold is None:
            self._drain(old, 0)
            return None
        earlier = self.slots.get(hold.generation)
        if earlier is not None:  # the daemon died while it wrote this slot anew
            self._drain(earlier, hold.uid)
        self.slots[hold.generation] = old
        return hold, pidfds


def _close_pairs(pairs: Iterable[tuple[int, int]]) -> None:
    for pair in pairs:
        for fd in pair:
            os.close(fd)

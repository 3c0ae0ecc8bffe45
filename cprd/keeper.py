"""Where holds physically lie, and writing steps down before they count.

`write` puts a step where it outlives this process as far as the place allows; only then may the
registry apply it and the client hear of it. `let_go` does afterwards what can take time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from cprd.closer import Closer
from cprd.holds import Hold, Step
from cprd.pause import point
from cprd.slot import Slot, SlotFull

MAX_RECORDS = 100  # in one slot, before it is written anew

Pidfds = Mapping[str, int]


class Keeper:
    """The slots of all holds, by generation."""

    def __init__(self, closer: Closer) -> None:
        self.closer = closer
        self.slots: dict[int, Slot] = {}
        self.kept = "memory"

    def write(self, step: Step, bundle: int, pidfds: Mapping[int, Pidfds]) -> None:
        """Write a step down. `bundle` (of a hold that is new, else -1) and the pidfds by
        generation and role stay the caller's. Raises LimitExceeded; then nothing has changed."""
        made: list[int] = []
        try:
            for hold in step.put:
                roles = pidfds.get(hold.generation, {})
                slot = self.slots.get(hold.generation)
                if slot is None:
                    self._add(hold, Slot.create(hold, bundle, roles))
                    made.append(hold.generation)
                else:
                    self._rewrite(slot, hold, roles)
            point("keeper:put")
            self.record_ends(step)
            point("keeper:ended")
        except BaseException:
            for generation in made:
                self._drain(self.slots.pop(generation), 0)
            raise

    def _add(self, hold: Hold, slot: Slot) -> None:
        self.slots[hold.generation] = slot

    def _rewrite(self, slot: Slot, hold: Hold, roles: Pidfds) -> None:
        """A new record in the slot; a slot that is full of them is replaced by a fresh one."""
        try:
            if slot.records >= MAX_RECORDS:
                raise SlotFull
            slot.append(hold, roles)
        except SlotFull:
            import os

            bundle = slot.bundle()
            try:
                fresh = Slot.create(hold, bundle, roles)
            finally:
                os.close(bundle)
            self._add(hold, fresh)
            self._drain(slot, hold.uid)

    def record_ends(self, step: Step) -> None:
        """Write down how holds ended, before anything of them is let go."""

    def let_go(self, ended: Iterable[Hold]) -> None:
        """Free what ended holds held: soon, in their owners' worker threads."""
        for hold in ended:
            slot = self.slots.pop(hold.generation, None)
            if slot is not None:
                self._drain(slot, hold.uid)

    def _drain(self, slot: Slot, uid: int) -> None:
        self.closer.run(uid, slot.drain)

    def bundle(self, generation: int) -> int:
        """The bundle of a hold: a descriptor that the caller owns."""
        return self.slots[generation].bundle()

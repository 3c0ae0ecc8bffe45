"""Counting what live holds have when nobody owns them any more: for quotas and lists.

While a hold is live, cprd sees nothing of the content. Afterwards a releaser of the uid looks:
cprd installs nobody's descriptors. A successor comes first: the count waits a moment, and is left
out where somebody has the hold by then. A hold without content is gone with its owner.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import trio

from cprd.daemon.clock import now
from cprd.daemon.releasing import Releasing
from cprd.daemon.storage.shelves import Keeper
from cprd.protocol import living
from cprd.protocol.registry import Registry, Step

MOMENT = 0.3  # s
PATIENCE = 10.0  # s that a releaser may take: files of the uid may block


class Counting:
    """`count` is to run as a task."""

    def __init__(
        self,
        registry: Registry,
        keeper: Keeper,
        releasing: Releasing,
        observe: Callable[[Step], None],
    ) -> None:
        self._registry = registry
        self._keeper = keeper
        self._releasing = releasing
        self._observe = observe
        self._left: dict[int, dict[int, float]] = {}  # by uid: generation, and when
        self._busy: set[int] = set()  # uids
        self._wanted = trio.Event()

    def left(self, generation: int) -> None:
        """The owner of a live hold has ended."""
        hold = self._registry.get(generation)
        if hold is not None:
            left = self._left.setdefault(hold.uid, {})
            left.pop(generation, None)  # once, however often it changes hands
            left[generation] = now() + MOMENT
            self._wanted.set()

    async def count(self) -> None:
        """Count one hold of each uid after the other. Until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                await self._wanted.wait()
                self._wanted = trio.Event()
                for uid in self._left.keys() - self._busy:
                    self._busy.add(uid)
                    nursery.start_soon(self._count_all, uid)

    async def _count_all(self, uid: int) -> None:
        """Files of a uid may block: nobody else's holds wait."""
        left = self._left[uid]
        try:
            while left:
                generation = next(iter(left))
                at = left.pop(generation)
                await trio.sleep(max(0.0, at - now()))
                await self._count(generation)
        finally:
            self._busy.discard(uid)
            if not left:
                del self._left[uid]

    async def _count(self, generation: int) -> None:
        hold = self._registry.get(generation)
        if hold is None or not hold.allows("counted") or self._releasing.refuses(hold.uid):
            return  # refuses: each question that waits keeps a descriptor here
        try:
            bundle = os.dup(self._keeper.bundle(generation))
        except OSError:
            return  # no descriptor left: the hold is served all the same
        with trio.move_on_after(PATIENCE):
            found = await self._releasing.count(hold.uid, bundle)
            if found is not None:
                self._observe(living.counted(self._registry, hold, *found))

"""Getting shelves into systemd's descriptor store, and out of the store again.

The store never answers, so a shelf counts as stored only once a probe behind the shelf was seen to
be stored (cprd.systemd.fdstore.keep). The order keeps every moment safe: a new shelf is stored
before the old shelf is taken out. The daemon's requests never wait for the store:
a manager that is slow, mute or gone costs durability and nothing else.

Stored shelves are offered again now and then, without effect while the store has the shelves: a
manager that reads a lower FileDescriptorStoreMax= drops shelves, and tells nobody (seen on 252). A
manager does so at a reload only, of which cprd hears (cprd.systemd.reloads): then some more looks
follow soon.
"""

from __future__ import annotations

import os
from typing import TypeVar

import trio

from cprd.daemon import log
from cprd.daemon.manager import AWAY, PATIENCE, adrive
from cprd.daemon.storage.shelf import Shelf
from cprd.daemon.storage.shelves import Keeper
from cprd.errors import CprdError, Unavailable
from cprd.linux.pause import point
from cprd.systemd import fdstore, notify, reloads

T = TypeVar("T")

RECHECK = 60.0  # s until stored shelves are offered again
RELOADED = (0.5, 2.0, 5.0, 15.0)  # s after the beginning of a reload, the same: how long one takes
FIRST_RETRY = 1.0  # s until a store without room is tried again; doubled each time
RETRY = 60.0  # s, the longest such pause: systemd logs each try


class Store:
    """The store of the manager at `manager`, for the shelves of `keeper`."""

    def __init__(self, keeper: Keeper, manager: notify.Manager) -> None:
        """After `keeper` has adopted earlier shelves."""
        self.keeper = keeper
        self.manager = manager
        self.asked = trio.Event()  # once the manager has answered, or has gone
        self._begun = False  # nothing asked for yet
        self._wanted = trio.Event()
        self._looks: list[float] = []  # after a reload of the manager
        self._retry = FIRST_RETRY
        self._trouble = ""  # as said in the log: once, until things change
        # Of earlier processes nobody knows what they offered to the manager.
        self._offered = {shelf.number for shelf in keeper.shelves()}
        keeper.wants_spare = self.wake

    def wake(self) -> None:
        """A shelf is to be stored, or to be taken out."""
        # A mute manager must not make retired shelves pile up: those that it has never been offered
        # need not be taken out.
        for old in [old for old in self.keeper.retired if old.number not in self._offered]:
            self.keeper.retired.remove(old)
            self.keeper.close_shelf(old)
        self._wanted.set()

    async def tend(self) -> None:
        """For ever: store the shelves in use, and take out the rest."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._hear_reloads)
            await self._store()

    async def _hear_reloads(self) -> None:
        """Look again soon after the manager has begun to read the units anew. Until cancelled."""
        with trio.open_signal_receiver(reloads.SIGNAL) as signals:
            watched = reloads.watch(reloads.directory(self.manager.address))
            try:
                async for _ in signals:
                    now = trio.current_time()
                    self._looks = [now + seconds for seconds in RELOADED]
                    self._wanted.set()
            finally:
                if watched >= 0:
                    os.close(watched)

    def _next_look(self, checked: float, pause: float) -> float:
        return min((checked + pause, *self._looks[:1]))

    async def _store(self) -> None:
        checked = trio.current_time()
        again = False
        while True:
            self._wanted = trio.Event()
            began = trio.current_time()
            pause = await self._try(again=again)
            self.asked.set()
            if again:
                checked = began
                self._looks = [look for look in self._looks if look > began]
            with trio.move_on_at(self._next_look(checked, pause)):
                await self._wanted.wait()
            again = trio.current_time() >= self._next_look(checked, pause)

    async def _try(self, *, again: bool) -> float:
        """Bring the store up to date as far as possible; the seconds until the next look."""
        try:
            complete = await self.settle(again=again)
        except Unavailable as error:
            self._say("manager-gone", str(error))
            for shelf in (self.keeper.shelf, self.keeper.spare):
                if shelf is not None:
                    shelf.durable = False  # until the store is seen to have the shelf again
            return AWAY
        except (CprdError, OSError) as error:
            self._say("store-failed", str(error))
            complete = False
        if complete:
            if self._trouble:
                log.event("store-used-again", kept=self.keeper.kept)
            self._trouble = ""
            self._retry = FIRST_RETRY
            return RECHECK
        pause, self._retry = self._retry, min(2 * self._retry, RETRY)
        return pause

    async def settle(self, *, again: bool = False) -> bool:
        """Bring the store up to date. Whether nothing is left to be done. `again`: offer stored
        shelves once more. Raises Unavailable, LimitExceeded, OSError."""
        keeper = self.keeper
        if not self._begun:  # a killed process may have left one
            await self._run(fdstore.remove(self.manager, fdstore.PROBE))
            self._begun = True
        await self._remove([old for old in keeper.retired if not old.was_durable])
        # The shelves that the present shelf has replaced go once the present shelf is seen to be
        # stored, now and not some time ago: another may take over meanwhile, and a manager drops
        # what is too much for a store that was made smaller.
        replaced, shelf = list(keeper.retired), keeper.shelf
        if (again or replaced or not shelf.durable) and not await self._keep(shelf):
            if await self._make_room(shelf, replaced):
                return await self.settle()
            if keeper.spare is not None:
                keeper.spare.durable = False  # until it is seen to be there
            return False
        await self._remove(replaced)
        if again and keeper.spare is not None:
            await self._check_spare(keeper.spare)
        return keeper.spare is not None or await self._keep_spare()

    async def _make_room(self, shelf: Shelf, replaced: list[Shelf]) -> bool:
        """The present shelf finds no room. Of the replaced shelves the last, if stored, is enough:
        whether anything was removed."""
        stored = [old for old in replaced if old.counts and old.was_durable]
        if not stored or len(replaced) == 1:
            return False
        for name in shelf.names:  # half of the shelf may have been taken
            await self._run(fdstore.remove(self.manager, name))
        if not await self._keep(stored[-1]):
            return False
        await self._remove([old for old in replaced if old is not stored[-1]])
        return True

    async def _keep_spare(self) -> bool:
        keeper = self.keeper
        spare = keeper.new_spare()
        try:
            if not await self._keep(spare):
                return False
            if keeper.spare is None and keeper.shelf.durable:
                keeper.spare = spare
                return True
            return False
        finally:
            if keeper.spare is not spare:  # refused, not needed any more, or cancelled half-way
                keeper.retired.append(spare)

    async def _check_spare(self, spare: Shelf) -> None:
        """Retire a spare that the store has lost, unless the spare took over meanwhile."""
        if not await self._keep(spare) and self.keeper.spare is spare:
            self.keeper.spare = None
            if self.keeper.next is spare:
                self.keeper.next = None
            self.keeper.retired.append(spare)

    async def _keep(self, shelf: Shelf) -> bool:
        """Store a shelf; False when the manager has not taken both ends."""
        out, inlet = shelf.names
        point("store:offer")
        entries = [(out, shelf.outlet.fileno()), (inlet, shelf.tx.fileno())]
        self._offered.add(shelf.number)
        taken = await self._run(fdstore.keep(self.manager, entries))
        point("store:asked")
        if taken and not shelf.durable:
            log.event("stored", shelf=shelf.number)
        shelf.durable = taken
        shelf.was_durable = shelf.was_durable or taken
        if not taken:
            why = "the manager's store is full or not offered (FileDescriptorStoreMax=)"
            self._say("not-stored", why, shelf=shelf.number)
        return taken

    async def _remove(self, shelves: list[Shelf]) -> None:
        """Take retired shelves out of the store, and close both ends."""
        for shelf in shelves:
            point("store:remove")
            for name in shelf.names:
                await self._run(fdstore.remove(self.manager, name))
            point("store:removed")
            self.keeper.retired.remove(shelf)
            self._offered.discard(shelf.number)
            self.keeper.close_shelf(shelf)

    # The manager's silences

    async def _run(self, steps: notify.Steps[T]) -> T:
        return await adrive(steps, self._silent)

    def _silent(self) -> None:
        why = f"no answer for {PATIENCE:g} s; cprd goes on without, and waits for it"
        self._say("manager-mute", why)
        self.asked.set()

    def _say(self, trouble: str, why: str, shelf: int | None = None) -> None:
        """Name a trouble in the log, once."""
        if trouble != self._trouble:
            kept = self.keeper.kept
            log.event(trouble, level=log.WARNING, shelf=shelf, kept=kept, why=why)
        self._trouble = trouble

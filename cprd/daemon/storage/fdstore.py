"""Getting shelves into systemd's descriptor store, and out of it again.

The store never answers, so a shelf counts as stored only once a canary that went in behind it was
seen alive (systemd.Manager.keep). The order keeps every moment safe: what takes over is stored
before what it replaces is taken out. It runs beside the daemon's requests, which never wait for it.

What is stored is offered again from time to time, which changes nothing as long as it is there: a
manager that reads its configuration again with a lower FileDescriptorStoreMax= drops what exceeds
it, and says so to nobody (seen on 252).
"""

from __future__ import annotations

import trio

from cprd.daemon import log
from cprd.daemon.storage.shelf import Shelf
from cprd.daemon.storage.shelves import Keeper
from cprd.errors import CprdError, Unavailable
from cprd.linux.pause import point
from cprd.systemd.notify import CANARY, Manager, adrive

RETRY = 60.0  # s until a store that was full is tried again
RECHECK = 3.0  # s until what is stored is offered again
PATIENCE = 20.0  # s that the manager may take


class Store:
    def __init__(self, keeper: Keeper, manager: Manager) -> None:
        self.keeper = keeper
        self.manager = manager
        self._begun = False  # nothing asked for yet
        self._wanted = trio.Event()
        keeper.wants_spare = self.wake

    def wake(self) -> None:
        self._wanted.set()

    async def tend(self) -> None:
        """For ever: store what should be, and take out what need not be there any more."""
        checked = trio.current_time()
        complete = True
        while True:
            pause = RECHECK if complete else RETRY
            with trio.move_on_after(checked + pause - trio.current_time()):
                await self._wanted.wait()
            self._wanted = trio.Event()
            again = trio.current_time() >= checked + pause
            complete = await self.settle(again=again)
            if again:
                checked = trio.current_time()

    async def settle(self, *, again: bool = False) -> bool:
        """Bring the store up to date. Whether there is nothing left to be done. `again`: offer what
        is stored once more."""
        keeper = self.keeper
        try:
            with trio.fail_after(PATIENCE):
                if not self._begun:  # one may be left by a process that was killed
                    await adrive(self.manager.remove(CANARY))
                    self._begun = True
                await self._remove([old for old in keeper.retired if not old.was_durable])
                # What the shelf that counts has taken over goes once that one is seen to be stored,
                # now and not some time ago: another may take over meanwhile, and a manager drops
                # what exceeds a store that was made smaller.
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
                if keeper.spare is None and not await self._keep_spare():
                    return False
                if keeper.merging:
                    keeper.compact()
        except (CprdError, OSError, trio.TooSlowError) as error:
            if isinstance(error, Unavailable):  # gone (the parent of --keep may be killed)
                keeper.shelf.durable = False
            log.event("store-failed", level=log.ERROR, why=str(error) or "the manager is mute")
            return False
        return True

    async def _make_room(self, shelf: Shelf, replaced: list[Shelf]) -> bool:
        """There is no room for the shelf that counts. Of those that it has taken over the last one
        is enough, if that is stored: whether anything was removed."""
        stored = [old for old in replaced if old.counts and old.was_durable]
        if not stored or len(replaced) == 1:
            return False
        for name in shelf.names:  # the half of it that may have been taken
            await adrive(self.manager.remove(name))
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
        """One that the store has no more is no use, unless it took over meanwhile."""
        if not await self._keep(spare) and self.keeper.spare is spare:
            self.keeper.spare = None
            self.keeper.retired.append(spare)

    async def _keep(self, shelf: Shelf) -> bool:
        """Store a shelf; False when the manager has not taken all of it."""
        out, inlet = shelf.names
        point("store:offer")
        entries = [(out, shelf.outlet.fileno()), (inlet, shelf.tx.fileno())]
        taken = await adrive(self.manager.keep(entries))
        point("store:asked")
        if taken and not shelf.durable:
            log.event("stored", shelf=shelf.number)
        shelf.durable = taken
        shelf.was_durable = shelf.was_durable or taken
        if not taken:
            log.event(
                "not-stored",
                level=log.WARNING,
                shelf=shelf.number,
                why="the manager's store is full or not offered (FileDescriptorStoreMax=)",
            )
        return taken

    async def _remove(self, shelves: list[Shelf]) -> None:
        """Take retired ones out of the store, and let go of them."""
        for shelf in shelves:
            point("store:remove")
            for name in shelf.names:
                await adrive(self.manager.remove(name))
            point("store:removed")
            self.keeper.retired.remove(shelf)
            shelf.close()

"""Whose turn it is: work of all uids in small pieces, so that nobody waits for the work of others.

A uid with more than a single connection has a single request decoded and served in each round of
the event loop, whatever the number of connections. Work that no request bounds (deadlines, claims
of an ended connection, ended processes) pauses after each `PIECE`.
"""

from __future__ import annotations

import time
from collections import Counter

import trio

PIECE = 0.002  # s


class Turns(trio.abc.Instrument):
    """Counts the connections of each uid, and lets their requests take turns. As an instrument of
    trio, counts the rounds of the event loop."""

    def __init__(self) -> None:
        self.connections: Counter[int] = Counter()  # by uid
        self._locks: dict[int, trio.Lock] = {}
        self._round = 0
        self._served: dict[int, int] = {}  # the last round with a request of a uid

    def after_io_wait(self, timeout: float) -> None:
        del timeout
        self._round += 1

    def add(self, uid: int) -> None:
        self.connections[uid] += 1

    def remove(self, uid: int) -> None:
        self.connections[uid] -= 1
        if not self.connections[uid]:
            del self.connections[uid]
            self._locks.pop(uid, None)
            self._served.pop(uid, None)

    def free(self, uid: int) -> bool:
        """Take the turn of this round, where none of `uid` has taken that turn, or waits."""
        if self._served.get(uid) == self._round or uid in self._locks:
            return False
        self._served[uid] = self._round
        return True

    async def take(self, uid: int) -> None:
        """Wait for the turn of a request of `uid`, in the order of arrival."""
        lock = self._locks.setdefault(uid, trio.Lock())
        try:
            async with lock:
                await trio.lowlevel.checkpoint()
                self._served[uid] = self._round
        finally:
            if not lock.locked():
                self._locks.pop(uid, None)


class Pace:
    """Pauses long work."""

    def __init__(self, piece: float = PIECE) -> None:
        self._piece = piece
        self._since = time.perf_counter()

    @property
    def over(self) -> bool:
        return time.perf_counter() - self._since >= self._piece

    async def pause(self) -> None:
        """Let everybody else go first, where a piece is done."""
        if self.over:
            await trio.lowlevel.checkpoint()
            self._since = time.perf_counter()

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


class Turns:
    """Counts the connections of each uid, and lets their requests take turns."""

    def __init__(self) -> None:
        self.connections: Counter[int] = Counter()  # by uid
        self._locks: dict[int, trio.Lock] = {}

    def add(self, uid: int) -> None:
        self.connections[uid] += 1

    def remove(self, uid: int) -> None:
        self.connections[uid] -= 1
        if not self.connections[uid]:
            del self.connections[uid]
            self._locks.pop(uid, None)

    async def take(self, uid: int) -> None:
        """Wait for the turn of a request of `uid`, in the order of arrival."""
        if self.connections[uid] > 1:
            async with self._locks.setdefault(uid, trio.Lock()):
                await trio.lowlevel.checkpoint()


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

"""Processes behind holds: pidfds by generation and role, each watched for the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from functools import partial

import trio

from cprd.daemon.turns import PIECE
from cprd.linux import processes


class Pidfds:
    """Owns the pidfds. `ended(generation, role)` is called once for each process."""

    def __init__(self, ended: Callable[[int, str], None]) -> None:
        self._ended = ended
        self.watched = processes.Watch()  # of connections, too
        self._by_hold: dict[int, dict[str, int]] = {}

    def of(self, generation: int) -> dict[str, int]:
        """pidfds by role; borrowed."""
        return dict(self._by_hold.get(generation, {}))

    def keep(self, generation: int, fds: Mapping[str, int], roles: Collection[str]) -> None:
        """Own `fds` from now on. The pidfds of `roles` stay watched, all others of the hold are
        closed. `fds` may repeat the result of `of`."""
        old = self._by_hold.pop(generation, {})
        if not (old or fds):
            return
        kept: dict[str, int] = {}
        for role in {*fds, *old}:
            fd, former = fds.get(role, -1), old.get(role, -1)
            if former >= 0 and (role not in roles or former != fd):
                self.watched.remove(former)
                os.close(former)
            if role in roles and fd >= 0:
                kept[role] = fd
                if former != fd:
                    self.watched.add(fd, partial(self._ended, generation, role))
            elif fd >= 0 and fd != former:
                os.close(fd)
        if kept:
            self._by_hold[generation] = kept

    def look(self, generation: int) -> None:
        """Report ended processes of a hold, before the event loop does."""
        for role, fd in self.of(generation).items():
            # An end reported for one role can close the pidfd of another, whose number is reused.
            mine = self._by_hold.get(generation, {}).get(role) == fd
            if mine and processes.has_ended(fd):
                self.watched.remove(fd)
                self._ended(generation, role)

    def collect(self) -> bool:
        """Report ended processes, for `PIECE` at most. Returns whether all were reported."""
        return self.watched.collect(PIECE)

    async def watch(self) -> None:
        """Report each end at once. Until cancelled."""
        while True:
            await trio.lowlevel.wait_readable(self.watched.epoll.fileno())
            self.collect()

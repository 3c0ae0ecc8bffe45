"""Keys that a segment still holds although a record elsewhere voids them.

As long as they lie there, the record that voids them has to stay: who rewrites the queue with that
record (the holder) has to say the deletion again. As a rule the segment is rewritten before the
change returns, and nothing is noted here any more.
"""

from __future__ import annotations

from collections.abc import Container

from cprd.live.queue import Queue
from cprd.live.records import Entry, Key, deletion


class Tombstones:
    __slots__ = ("_holders", "_places")

    def __init__(self) -> None:
        self._holders: dict[Key, Queue] = {}
        self._places: dict[Key, set[Queue]] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._holders

    def add(self, key: Key, place: Queue, holder: Queue) -> None:
        """`key` lies in `place` and is void by a record in `holder`. May be said twice."""
        self._places.setdefault(key, set()).add(place)
        self._holders[key] = holder

    def hold(self, key: Key, holder: Queue) -> None:
        """A later record, in `holder`, voids what is noted of `key`."""
        if key in self._holders:
            self._holders[key] = holder

    def gone(self, key: Key, place: Queue) -> None:
        """`key` does not lie in `place` any more. May be said twice."""
        places = self._places.get(key)
        if places is not None:
            places.discard(place)
            if not places:
                self._holders.pop(key, None)
                self._places.pop(key, None)

    def deletions(self, holder: Queue, kept: Container[Key]) -> list[Entry]:
        """The deletions that `holder` has to say again when it is rewritten: of keys that nobody
        keeps."""
        if not self._holders:
            return []
        return [
            deletion(key)
            for key, found in self._holders.items()
            if found is holder and key not in kept
        ]

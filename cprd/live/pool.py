"""Choice of segments: for the next key, for a merge, for removal."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from cprd.live.records import entry_size
from cprd.live.segment import OWN, ROOM, SECTION_KEYS, SECTIONS, SHARED, Put, Segment

SPARE = 4  # empty segments that stay for the next keys
MAX_OWN = 512
MOST_MERGED = 256  # segments at a take-over: about 20 ms


class Pool:
    """The attached segments of one hold. `file` after each change to a segment's keys."""

    def __init__(self, limit: int, spread: int) -> None:
        self.limit = limit  # keys of a shared segment
        # As long as there are so few shared segments, each takes one key only: letting go of the
        # key is cheaper than where copies have to be made of others.
        self.spread = spread
        self.segments: dict[int, Segment] = {}
        self._half = limit // 2
        self._shared: list[dict[Segment, None]] = [{} for _ in range(self._half + 1)]
        self.fuller: dict[Segment, None] = {}  # shared ones, more than half full
        self._sections: list[dict[Segment, None]] = [{} for _ in range(4)]  # by quarters of room
        self._own: dict[Segment, None] = {}
        self._inherited: dict[Segment, None] = {}
        self.empty: dict[Segment, None] = {}
        self.dead: dict[Segment, None] = {}
        self._filled = self.kept = 0  # shared segments with keys, and these keys
        self.spreads = spread > 0  # whether the next key gets a segment that has none
        self.current: Segment | None = None
        self.current_sections: Segment | None = None

    def file(self, segment: Segment) -> None:
        """Put a segment where its keys put it. May be said twice."""
        count = len(segment.keys)
        if count and segment.kind is SHARED and segment.tx is not None:
            place = self._shared[count] if count <= self._half else self.fuller
        else:
            count = 0
            place = self._place(segment)
        if count != segment.counted:
            self.kept += count - segment.counted
            self._filled += (count > 0) - (segment.counted > 0)
            segment.counted = count
        if segment.filed is not place:
            self.segments[segment.id] = segment
            if segment.filed is not None:
                segment.filed.pop(segment, None)
            place[segment] = None
            segment.filed = place
            self.spreads = self._filled + len(self._inherited) < self.spread

    def recount(self) -> None:
        """Count keys and bytes anew, of which an interrupt may have left some counted halfway."""
        self.kept = self._filled = 0
        for segment in [*self.segments.values()]:
            segment.counted = 0
            segment.size = sum([entry_size(key, kept[2]) for key, kept in segment.keys.items()])
            self.file(segment)
        self.spreads = self._filled + len(self._inherited) < self.spread

    def _place(self, segment: Segment) -> dict[Segment, None]:
        """Of any segment but a shared one with keys that can be appended to."""
        if segment.tx is None:
            if not segment.keys and not segment.stale:
                return self.dead
            return self._own if segment.kind == OWN else self._inherited
        if not segment.keys:
            return self.empty
        if segment.kind == OWN:
            return self._own
        return self._sections[min(segment.size * 4 // ROOM, 3)]

    def forget(self, segment: Segment) -> None:
        """The segment is not attached any more. May be said twice."""
        self.segments.pop(segment.id, None)
        if segment.filed is not None:
            segment.filed.pop(segment, None)
        self.kept -= segment.counted
        self._filled -= segment.counted > 0
        segment.counted = 0
        self.spreads = self._filled + len(self._inherited) < self.spread
        if self.current is segment:
            self.current = None
        if self.current_sections is segment:
            self.current_sections = None

    @property
    def own(self) -> int:
        """How many segments with one key there are, those of a predecessor included."""
        return len(self._own)

    def for_own(self) -> Segment | None:
        """An attached segment for one key; None: make one."""
        return self._empty(None)

    def for_shared(self, puts: list[Put], size: int, avoid: Segment | None) -> Segment | None:
        """An attached segment that takes all of `puts`; None: make one."""
        if self.spreads:
            return self._empty(avoid)
        first = [self.current] if self.current is not None and self.current.kind == SHARED else []
        found = self._first(chain(first, *self._shared[::-1]), puts, size, self.limit, avoid)
        self.current = found or self.current
        return found

    def for_sections(self, puts: list[Put], size: int, avoid: Segment | None) -> Segment | None:
        """As for_shared, for values."""
        current = self.current_sections
        first = [current] if current is not None and current.kind == SECTIONS else []
        rest = chain(first, self._sections[1], self._sections[0])
        found = self._first(rest, puts, size, SECTION_KEYS, avoid)
        self.current_sections = found or current
        return found

    def _first(
        self,
        segments: Iterable[Segment],
        puts: list[Put],
        size: int,
        limit: int,
        avoid: Segment | None,
    ) -> Segment | None:
        for segment in segments:
            if segment is not avoid and segment.takes(puts, size, limit):
                return segment
        return self._empty(avoid)

    def _empty(self, avoid: Segment | None) -> Segment | None:
        for segment in self.empty:
            if not segment.busy and not segment.stale and segment is not avoid:
                return segment
        return None

    @property
    def is_loose(self) -> bool:
        """Whether segments with descriptors may be worth merging, or some are of no use."""
        few = self._filled > self.spread and self.kept * 16 < self._filled * self.limit * 7
        return few or self._idle > 2 * SPARE + self.spread

    def sparse(self) -> Segment | None:
        """A segment whose keys should move to others, when there are many more segments than the
        keys need."""
        if self._filled > self.spread and self.kept * 16 < self._filled * self.limit * 7:
            return _first_idle(self._shared)
        few = len(self._sections[0])
        if few > 2 and few > sum(map(len, self._sections[1:])):
            return _first_idle(self._sections[:1])
        return None

    def scattered(self) -> list[Segment]:
        """Segments of predecessors with few keys each, where there are many: to be merged."""
        found: list[Segment] = []
        for kind, most in ((SHARED, self.limit // 2), (SECTIONS, SECTION_KEYS // 2)):
            some = [
                segment
                for segment in self._inherited
                if segment.kind == kind
                and len(segment.keys) <= most
                and segment.size <= ROOM // 4
                and not (segment.busy or segment.stale)
            ]
            if len(some) > self.spread:
                found += some
        return found[:MOST_MERGED]

    def useless(self) -> list[Segment]:
        """The segments to take out of the root, when there are many; else none."""
        if self._idle <= 2 * SPARE + self.spread:
            return []
        empty = [segment for segment in self.empty if not segment.busy and not segment.stale]
        return [*self.dead, *empty[max(SPARE, self.spread - self._filled) :]]

    @property
    def _idle(self) -> int:
        """Segments of no use, beyond what is usual among so many."""
        return len(self.empty) + len(self.dead) - len(self.segments) // 8


def _first_idle(places: list[dict[Segment, None]]) -> Segment | None:
    for found in places:
        for segment in found:
            if not segment.busy and not segment.stale:
                return segment
    return None

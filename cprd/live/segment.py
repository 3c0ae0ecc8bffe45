"""A segment: the queue in which some keys of a live hold lie."""

from __future__ import annotations

import _socket as socket  # as in queue

from cprd.live.queue import Queue, cost
from cprd.live.records import CARRIES, ENTRY, HEADER, SAVE, Key, entry_size

# What a segment is for.
SHARED, SECTIONS, OWN = "shared", "sections", "own"

ROOM = 12 * 1024  # bytes of entries in a segment
SPEND = 112 * 1024  # of the send buffer (212,992) before the records become one
SECTION_KEYS = 64
SECTION_RECORDS = 32

Kept = tuple[int, int, bytes, bool]
"""Of a key: op, birth, value, whether letting go of its descriptor may block."""
Put = tuple[int, Key, int, int, bytes, bool, bool]
"""A key that is to be kept: op, key, birth, descriptor (-1: none), value, whether letting go of
the descriptor may block, whether it needs a segment of its own."""


class Segment(Queue):
    """`keys` are those that a reader would find here. `stale` are keys that lie in the queue and
    are void by a record elsewhere: the segment is to be rewritten."""

    __slots__ = (
        *("changes", "counted", "filed", "id", "keys", "kind", "may_block", "size", "sockets"),
        *("stale", "values"),
    )

    def __init__(self, id: int, tx: socket.SocketType | None, rx: socket.SocketType) -> None:
        super().__init__(tx, rx)
        self.id = id
        self.kind = SHARED
        self.keys: dict[Key, Kept] = {}
        self.stale: set[Key] = set()
        self.size = 0  # bytes of the entries of `keys`
        self.may_block = False  # letting go of what is void may
        self.filed: dict[Segment, None] | None = None  # where the pool has it
        self.counted = 0  # keys that the pool counts
        self.sockets: dict[Key, list[int]] = {}  # inodes, while the segment is busy
        self.changes = False  # whether a key was ever lost: more will be
        self.values = False  # whether any key was ever another than that of a descriptor

    @property
    def inherited(self) -> bool:
        """A predecessor's: nothing can be appended."""
        return self.tx is None

    @property
    def plain(self) -> bool:
        """Whether all keys are those of descriptors, and nothing is void by records elsewhere."""
        return not self.values and not self.stale

    @property
    def blocks(self) -> bool:
        """Whether letting go of what is void here may block."""
        return self.may_block or self.kind == OWN

    def use(self, kind: str) -> None:
        """An empty segment becomes one for keys of this kind."""
        self.kind = kind
        self.values = self.changes = False

    def takes(self, puts: list[Put], size: int, limit: int) -> bool:
        """Whether so many more keys of so many bytes have room."""
        return (
            not self.busy
            and self.tx is not None
            and len(self.keys) + len(puts) <= limit
            and self.size + size <= ROOM
        )

    def fills(self, count: int, limit: int) -> bool:
        """Whether so many more keys make the segment full for long: one record for all takes the
        least memory then. Where keys come and go the time counts more."""
        return bool(self.records) and not self.changes and len(self.keys) + count >= limit

    def is_due(self, size: int, records: int) -> bool:
        """Whether a record of so many bytes should void the others, of which there are enough."""
        count = len(self.records)
        if self.kind == SECTIONS:
            return count >= SECTION_RECORDS or self.spent + cost(HEADER.size + size) > SPEND
        return count >= records or self.spent + cost(HEADER.size + size) > SPEND

    def keep(self, put: Put) -> None:
        """Write down that a key lies here. May be said twice."""
        op, key, birth, _, value, may_block, _ = put
        if op != SAVE:
            self.values = True
        keys = self.keys
        if key in keys:
            old = keys[key]
            self.size -= entry_size(key, old[2])
            self.may_block = self.may_block or old[3]
        keys[key] = op, birth, value, may_block
        self.size += ENTRY + len(key[1]) + len(value)  # entry_size, without a call

    def lose(self, key: Key) -> None:
        """Write down that a key does not lie here any more. May be said twice."""
        old = self.keys.get(key)
        if old is not None:
            self.may_block = self.may_block or old[3]
            self.size -= entry_size(key, old[2])
            self.changes = True
            self.keys.pop(key, None)

    def carries(self) -> bool:
        """Whether any descriptor lies here, kept or void."""
        return any(keys for _, _, keys in self.records)


def kind_of(puts: list[Put]) -> str:
    """What a segment has to be for, to take `puts`."""
    if puts and puts[0][6]:
        return OWN
    return SHARED if any(put[0] in CARRIES for put in puts) else SECTIONS

"""The root of a live hold: the queue whose descriptors are the segments' receiving ends."""

from __future__ import annotations

import _socket as socket  # as in queue
from collections.abc import Sequence

from cprd.errors import LimitExceeded
from cprd.live.queue import Queue, cost
from cprd.live.records import ATTACH, ROOT, Entry, Key, encode, entry_size
from cprd.live.segment import Segment
from cprd.live.shape import SHAPE, Shape

FULL = 200  # records in the root; 278 fit
PART_DELETIONS = 24 * 1024  # bytes of deletions in one part


class Root(Queue):
    """Records are made here and sent by the writer, which learns what an interrupt left."""

    __slots__ = ("capacity", "hold", "limit", "part")

    def __init__(
        self, tx: socket.SocketType, rx: socket.SocketType, hold: int, shape: Shape = SHAPE
    ) -> None:
        super().__init__(tx, rx)
        self.hold = hold
        self.limit = shape.root_records
        self.part = shape.part
        tx.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.capacity = tx.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)

    def is_due(self) -> bool:
        """Whether the root should be rewritten before more is appended."""
        return len(self.records) >= self.limit or self.spent > self.capacity // 2

    def is_full(self) -> bool:
        """Whether nothing more should be appended as it is."""
        return len(self.records) >= FULL or self.spent > self.capacity * 3 // 4

    def attach(self, seq: int, fresh: Sequence[Segment], deletions: Sequence[Entry]) -> bytes:
        """The record that attaches segments and ends keys. At most 253 segments."""
        ids = [segment.id for segment in fresh]
        return encode(ATTACH, self.hold, seq, self.next, deletions, len(ids), ids)

    def whole(
        self, seq: int, segments: Sequence[Segment], deletions: Sequence[Entry]
    ) -> list[tuple[bytes, list[Segment]]]:
        """The records that make `segments` all there are: bytes and segments of each part. They
        take `seq` and the numbers above. Raises LimitExceeded."""
        step = self.part
        chunks = [list(segments[at : at + step]) for at in range(0, len(segments), step)]
        ends = _by_size(deletions)
        count = max(1, len(chunks), len(ends))
        parts = []
        for index in range(count):
            chunk = chunks[index] if index < len(chunks) else []
            ended = ends[index] if index < len(ends) else []
            ids = [segment.id for segment in chunk]
            data = encode(
                *(ROOT, self.hold, seq + index, self.next + index, ended, len(ids), ids),
                part=(index + 1, count),
            )
            parts.append((data, chunk))
        room = sum(cost(len(data)) for data, _ in parts)
        if self.spent + room > self.capacity or count > 0xFFFF:
            raise LimitExceeded(
                f"{len(segments)} segments do not fit in the root of a live hold, whose buffer is"
                f" {self.capacity} bytes: raise net.core.wmem_max (sysctl), or keep fewer keys;"
                " nothing was changed"
            )
        return parts


def _by_size(deletions: Sequence[Entry]) -> list[list[Entry]]:
    chunks: list[list[Entry]] = []
    size = PART_DELETIONS
    for entry in deletions:
        length = entry_size(entry[2])
        if size + length > PART_DELETIONS:
            chunks.append([])
            size = 0
        chunks[-1].append(entry)
        size += length
    return chunks


NO_KEYS: tuple[Key, ...] = ()

"""One step after the other: a record into a queue, void records out of one.

Each record is written down as `pending` before it is sent. Whether a record was sent, and what was
drained, is learned from the queues themselves after an interrupt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

from cprd.errors import Fenced
from cprd.linux.pause import point
from cprd.live.ledger import Ledger
from cprd.live.queue import Copies, Queue, Sent
from cprd.live.records import OWN as FLAG_OWN
from cprd.live.records import Entry, Key, encode
from cprd.live.segment import OWN, Segment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

Defer = Callable[[Callable[[], None]], object]
"""Runs a function, which may block, in another thread."""


Pending = tuple[Queue, "Sent | None", Callable[..., None], tuple["Any", ...]]
"""A queue, a record that may have been sent (None: the last that was written down), and the call
that writes down what the record changed."""


class Steps:
    """`unfinished`: queues with void records. `dropped`: segments out of the root, to be closed.
    `copies`: what is installed in this process for a moment."""

    def __init__(
        self, ledger: Ledger, hold: int, lock: AbstractContextManager[object], defer: Defer | None
    ) -> None:
        self.ledger = ledger
        self.hold = hold
        self.seq = 0
        self.copies = Copies()
        self.unfinished: dict[Queue, None] = {}
        self.dropped: list[Segment] = []
        self.pending: Pending | None = None
        self._lock = lock
        self._defer = defer
        self._handing: tuple[Segment, list[int]] | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing is left to be finished."""
        busy = self.pending or self._handing or self.unfinished or self.copies or self.dropped
        return not busy

    def send(
        self,
        queue: Segment,
        kind: int,
        entries: Sequence[Entry],
        keys: tuple[Key, ...],
        fds: Sequence[int],
        apply: Callable[..., None],
        arguments: tuple[Any, ...] = (),
    ) -> None:
        """Append a record to a segment; `apply` writes down what the record changed."""
        self.seq += 1
        flags = FLAG_OWN if queue.kind == OWN else 0
        data = encode(kind, self.hold, self.seq, queue.next, entries, len(fds), flags=flags)
        self.send_data(queue, data, keys, fds, apply, arguments)

    def send_data(
        self,
        queue: Queue,
        data: bytes,
        keys: tuple[Key, ...],
        fds: Sequence[int],
        apply: Callable[..., None],
        arguments: tuple[Any, ...] = (),
    ) -> None:
        """Append a record that is made already. Raises Fenced, LimitExceeded, OSError: then the
        record is not there."""
        sent = (queue.next, len(data), keys)
        self.pending = (queue, sent, apply, arguments)
        point("live:send")
        try:
            queue.send(data, fds)
        except Exception:
            self.unless_sent(queue, sent)
            raise
        point("live:sent")
        queue.landed(*sent)
        apply(*arguments)
        self.pending = None

    def unless_sent(self, queue: Queue, sent: Sent) -> bool:
        """Forget a pending record that is not in the queue, as is usual after an exception: but a
        signal handler may have raised that after the send. Returns whether the record is there."""
        if not queue.resync(sent):
            self.pending = None
        return self.pending is not None

    def defers(self, segment: Segment) -> bool:
        """Whether another thread lets go of what is void in a segment."""
        return self._defer is not None and segment.blocks

    def drain(self, queue: Queue) -> None:
        """Let go of what is void in a queue; where that may block, in another thread."""
        count = queue.void()
        if count and self._defer is not None and isinstance(queue, Segment) and self.defers(queue):
            self._handing = queue, [count]
            self._hand()
            return
        queue.drain()
        self._drained(queue)

    def _hand(self) -> None:
        """Hand a segment to another thread; after an interrupt once more, maybe."""
        assert self._handing is not None
        assert self._defer is not None
        segment, counts = self._handing
        segment.busy = True
        self.unfinished.pop(segment, None)
        self._defer(partial(self._drain_elsewhere, segment, counts))
        self._handing = None

    def _drain_elsewhere(self, segment: Segment, counts: list[int]) -> None:
        """In another thread, which may wait long for a file to be let go of. `counts`: empty where
        another call has begun."""
        try:
            count = counts.pop()
        except IndexError:
            return
        try:
            segment.receive(count)
        except Fenced:
            return  # the next change finds out as well
        with self._lock:
            segment.forget(count)
            segment.busy = False
            self._drained(segment)

    def _drained(self, queue: Queue) -> None:
        if isinstance(queue, Segment):
            queue.may_block = False
            if not queue.records and (queue.stale or queue in self.ledger.dirty):
                self.ledger.clean(queue)
            self.ledger.pool.file(queue)
        self.unfinished.pop(queue, None)

    def close_dropped(self) -> None:
        """Let go of all that lies in segments that no root names any more."""
        for segment in [*self.dropped]:
            if segment.busy:
                continue
            if segment.records and not segment.closed:  # a forked child may have an end
                segment.resync()
                segment.receive(len(segment.records))
            self.unfinished.pop(segment, None)
            self.ledger.inodes.difference_update(segment.inodes())
            segment.close()
            self.dropped.remove(segment)

    def finish(self) -> None:
        """Finish what an interrupt left."""
        self.copies.close()
        if self._handing is not None:
            self._hand()
        if self.pending is not None:
            queue, sent, apply, arguments = self.pending
            if queue.resync(sent) or sent is None:
                apply(*arguments)
            self.ledger.pool.recount()
            self.pending = None
        self.close_dropped()
        for unfinished in [*self.unfinished]:
            unfinished.resync()
            self.drain(unfinished)

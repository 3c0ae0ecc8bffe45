"""A successor becomes the owner: nothing is parked anew.

A new root refers to the segments of the predecessor. These are shut: no record can be appended.
The first change to a key in one of them moves what is left of that segment to a segment of the
successor and drains the old one as a whole.
"""

from __future__ import annotations

import _socket as socket  # as in queue

from cprd.live.ledger import Ledger
from cprd.live.owner import Owner
from cprd.live.queue import cost
from cprd.live.reader import Found, FoundSegment, no_collection
from cprd.live.records import CARRIES, entry_size
from cprd.live.root import Root
from cprd.live.segment import OWN, SECTIONS, SHARED, Segment
from cprd.live.shape import SHAPE, Shape
from cprd.live.steps import Defer


def take_over(
    found: Found,
    tx: socket.SocketType,
    rx: socket.SocketType,
    *,
    hold: int = 0,
    shape: Shape = SHAPE,
    defer: Defer | None = None,
) -> Owner:
    """Make the owner of what was found, with a new root that names all segments.

    `tx`, `rx`: both ends of an empty root, owned from now on. `hold`: a nonce for a hold in which
    nothing was ever written. Segments and memories of `found` pass to the owner; the state does
    not. No queue of the predecessor is changed: that begins with the first change, which must not
    come before cprd has confirmed the new root. Raises LimitExceeded; then `found` is as before."""
    owner = Owner(tx, rx, found.hold or hold, shape=shape, defer=defer, begin=False)
    segments = []
    try:
        writer = owner.inherit(found.birth, dict(found.memories))
        writer.steps.seq, writer.branches.next_id = found.seq, found.next_id
        with no_collection():
            segments = [_segment(there) for there in found.segments]
            _file(writer.ledger, writer.branches.root, segments)
        writer.write_root()
    except BaseException:
        for segment in segments:
            segment.rx.detach()
        owner.inherit(0, {})
        owner.close()
        raise
    found.memories = {}
    for there in found.segments:
        there.fd = -1
    return owner


def _segment(there: FoundSegment) -> Segment:
    rx = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, there.fd)
    segment = Segment(there.id, None, rx)
    segment.records = there.records
    segment.next = there.records[-1][0] + 1 if there.records else 0
    segment.spent = sum([cost(size) for _, size, _ in there.records])
    segment.stale = there.stale
    segment.keys = there.keys
    segment.size = sum([entry_size(key, kept[2]) for key, kept in segment.keys.items()])
    ops = {kept[0] for kept in segment.keys.values()}
    segment.kind = OWN if there.own else SHARED if ops & CARRIES else SECTIONS
    return segment


def _file(ledger: Ledger, root: Root, segments: list[Segment]) -> None:
    """Write down what lies where, and what is void by a record elsewhere."""
    for segment in segments:
        ledger.inodes.update(segment.inodes())
        ledger.pool.file(segment)
        ledger.where.update(dict.fromkeys(segment.keys, segment))
    for segment in segments:
        for key in segment.stale:
            ledger.tombstones.add(key, segment, ledger.where.get(key, root))
            ledger.dirty[segment] = None
        # What a record of the same queue made void is let go of, too: the predecessor did not
        # come to that.
        parked = sum([len(keys) for _, _, keys in segment.records])
        if parked > sum([kept[0] in CARRIES for kept in segment.keys.values()]):
            ledger.dirty[segment] = None

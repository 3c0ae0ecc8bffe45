"""Read a live hold after the end of its owner.

First every queue is shut for its writers, then the first segment is read: nothing can be appended
in between. Reading consumes nothing. A process that was stopped and goes on may still drain void
records: a queue that changes while it is read is read again.

Whoever wrote the queues may be hostile. Lengths are looked at before contents, loops are bounded,
and no more is installed than there is room for.
"""

from __future__ import annotations

import _socket as socket  # as in queue
import errno
import fcntl
import gc
import os
import time
from array import array
from contextlib import contextmanager
from itertools import repeat
from operator import itemgetter

from cprd.errors import Damaged
from cprd.linux.memfd import missing_seals
from cprd.linux.nofile import check_room, cut_short
from cprd.linux.pause import point
from cprd.linux.rights import SO_PEEK_OFF, close_all, queued, receive, scm_fds
from cprd.live.records import (
    ATTACH,
    CARRIES,
    DELETE,
    FD,
    MOST,
    OWN,
    PACKED,
    PACKED_MEMFD,
    RAW_MEMFD,
    ROOT,
    SECTION,
    SNAPSHOT,
    Key,
    Record,
    decode,
)
from cprd.live.segment import Kept
from cprd.state import InlineSection, MemfdSection, State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

MOST_TURNS = 1024  # records of one queue
RETRIES, PAUSE = 200, 0.0005  # s
LONGEST = 1.0  # s of retries of one queue: a long one may be made to stay out of order
SPARE = 64  # descriptors that must be free beside what is installed
MOST_SEGMENTS = 1 << 17
MEMORY_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT
_SO_DOMAIN = 39

Peeked = tuple[Record, int, "array[int]"]
"""A record, its bytes, its descriptors."""


class FoundSegment:
    """One queue with keys. `fd` is its receiving end. `keys`: what counts of it.
    `stale`: keys in it that are void by a record elsewhere."""

    __slots__ = ("fd", "id", "keys", "own", "records", "stale")

    def __init__(self, id: int, fd: int) -> None:
        self.id = id
        self.fd = fd
        self.records: list[tuple[int, int, tuple[Key, ...]]] = []
        self.keys: dict[Key, Kept] = {}
        self.stale: set[Key] = set()
        self.own = False  # what lies in it is never to be copied by its owner


class Found:
    """What a live hold keeps. The state owns its descriptors, this object owns `memories` (by
    name) and the segments; `close` closes both, but not the state.

    hold: the nonce, 0 where nothing was ever written. seq, birth, next_id: the highest in use."""

    def __init__(self) -> None:
        self.hold = 0
        self.seq = 0
        self.birth = 0
        self.next_id = 0
        self.segments: list[FoundSegment] = []
        self.memories: dict[str, int] = {}
        self.ended: list[Key] = []  # keys that lie in some segment and are not kept
        self.state = State()

    def close(self) -> None:
        """Close segments and memories that nobody took. Safe to repeat."""
        fds = [segment.fd for segment in self.segments if segment.fd >= 0]
        fds += self.memories.values()
        self.memories = {}
        for segment in self.segments:
            segment.fd = -1
        close_all(fds)


def read(root: int) -> Found:
    """Read a live hold whose owner has ended. `root`: the receiving end, borrowed.

    Nothing is consumed; nobody can append from now on. Raises Damaged, Busy (a later version), and
    LimitExceeded before anything is installed. Blocks for milliseconds only."""
    reading = _Reading()
    try:
        with no_collection():
            return reading.read(root)
    except BaseException:
        close_all(reading.installed)
        raise


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep the garbage collector from walking, again and again, what is being made: of 9,000 keys
    10 to 30 ms."""
    was = gc.isenabled()
    try:
        if was:
            _paused.append(True)
            gc.disable()
        yield
    finally:
        if was:
            gc.enable()
            _paused.clear()


_paused: list[bool] = []  # not empty while the collector is off


def _after_fork_in_child() -> None:
    """The thread that would switch the collector on again is not in the child."""
    if _paused:
        gc.enable()


os.register_at_fork(after_in_child=_after_fork_in_child)


def shut(fd: int) -> None:
    """Let nobody append to a queue from now on. `fd`: the receiving end, borrowed. Never blocks.

    Raises Damaged for what is no SEQPACKET socket of AF_UNIX."""
    sock = as_queue(fd)
    try:
        sock.shutdown(socket.SHUT_RD)
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise Damaged(f"a queue of the live hold cannot be shut: {error.strerror}") from None
    finally:
        sock.detach()


def as_queue(fd: int) -> socket.SocketType:
    """An object for a descriptor that it must not close: detach it. Raises Damaged."""
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fd)
    except OSError as error:
        raise Damaged(f"a part of the live hold is no queue: {error.strerror}") from None
    try:
        family = sock.getsockopt(socket.SOL_SOCKET, _SO_DOMAIN)
        kind = sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
    except OSError as error:
        sock.detach()
        raise Damaged(f"a part of the live hold is no queue: {error.strerror}") from None
    if family != socket.AF_UNIX or kind != socket.SOCK_SEQPACKET:
        sock.detach()
        raise Damaged("a part of the live hold is no SEQPACKET socket of AF_UNIX")
    return sock


_Offer = tuple[int, int, int, bytes, FoundSegment | None, int]
"""Of a key: seq, op, birth, value, segment, descriptor."""


class _Reading:
    def __init__(self) -> None:
        self.installed: set[int] = set()
        self.hold: int | None = None
        self.best: dict[Key, _Offer] = {}

    def read(self, root: int) -> Found:
        found = Found()
        shut(root)
        check_room(scm_fds(root) + len(self.installed), SPARE)
        segments = self._read_root(found, root)
        for segment in segments:
            shut(segment.fd)
        wanted = len(segments) + sum(scm_fds(segment.fd) for segment in segments)
        check_room(wanted + len(self.installed), SPARE)
        for segment in segments:
            self._read_segment(found, segment)
        found.hold = self.hold or 0
        found.segments = segments
        self._settle(found)
        return found

    def _read_root(self, found: Found, root: int) -> list[FoundSegment]:
        """The attached segments; deletions of the root's records are noted."""
        chosen: list[Peeked] = []
        parts: list[Peeked] = []
        for peeked in self._peek(root, "the root"):
            record = peeked[0]
            if record.kind not in (ATTACH, ROOT):
                raise Damaged("the root of a live hold with a record of a segment")
            found.seq = max(found.seq, record.seq)
            if record.kind == ATTACH:
                chosen.append(peeked)
                continue
            if record.part == 1:
                parts = []
            elif not parts or record.part != len(parts) + 1:
                parts = []
                continue
            parts.append(peeked)
            if record.parts == len(parts):
                chosen, parts = parts, []
        by_id: dict[int, int] = {}
        for record, _, fds in chosen:
            before = len(by_id)
            by_id.update(zip(record.ids, fds, strict=False))
            if len(by_id) != before + len(record.ids):
                raise Damaged("the root of a live hold names a segment twice")
            for op, _, key, _ in record.entries:
                if op < DELETE:
                    raise Damaged("the root of a live hold with a record that keeps a key")
                self._offer(key, (record.seq, op, 0, b"", None, -1))
        if len(by_id) > MOST_SEGMENTS:
            raise Damaged(f"a live hold of {len(by_id)} segments; the limit is {MOST_SEGMENTS}")
        self._close_all_but(by_id.values())
        found.next_id = max(by_id, default=0)
        return [FoundSegment(id, fd) for id, fd in by_id.items()]

    def _read_segment(self, found: Found, segment: FoundSegment) -> None:
        point("live:read")
        last: dict[Key, _Offer] = {}
        for record, size, fds in self._peek(segment.fd, f"segment {segment.id}"):
            if record.kind == SNAPSHOT:
                last = {key: value for key, value in last.items() if value[1] >= DELETE}
            elif record.kind in (ATTACH, ROOT):
                raise Damaged("a segment of a live hold with a record of a root")
            found.seq = max(found.seq, record.seq)
            segment.own = record.flags == OWN
            entries = record.entries
            carried: Sequence[Key] = ()
            if entries and len(fds) == len(entries):  # the usual case, in calls of C
                ops, births, carried, values = zip(*entries, strict=True)
                offers = zip(repeat(record.seq), ops, births, values, repeat(segment), fds)
                last.update(zip(carried, offers, strict=False))
            else:
                left = iter(fds)
                carried = [entry[2] for entry in entries if entry[0] in CARRIES]
                for op, birth, key, value in entries:
                    fd = next(left) if op in CARRIES else -1
                    last[key] = (record.seq, op, birth, value, segment, fd)
            segment.records.append((record.ordinal, size, tuple(carried)))
        found.birth = max([found.birth, *[offer[2] for offer in last.values()]])
        if self.best.keys().isdisjoint(last):
            self.best.update(last)
        else:
            for key, offer in last.items():
                self._offer(key, offer)

    def _offer(self, key: Key, offer: _Offer) -> None:
        other = self.best.get(key)
        if other is not None:
            if other[0] >= offer[0]:
                offer, other = other, offer
            if other[4] is not None and other[1] < DELETE:
                other[4].stale.add(key)
        self.best[key] = offer

    def _settle(self, found: Found) -> None:
        """Make the state, and close what does not count."""
        best = self.best
        kept = [(o[2], o[0], key, o) for key, o in best.items() if o[1] < DELETE]
        kept.sort(key=itemgetter(0, 1))
        for birth, _, key, (_, op, _, value, segment, _) in kept:
            segment.keys[key] = op, birth, value, False  # type: ignore[union-attr]
        rows = [(key[1], key[2], offer[5]) for _, _, key, offer in kept if key[0] == FD]
        sections: dict[str, InlineSection | MemfdSection] = {}
        if len(rows) < len(kept):
            for _, _, (space, name, _), (_, op, _, value, _, fd) in kept:
                if space == SECTION:
                    sections[name.decode()] = _section(name.decode(), op, value, fd)
                elif space != FD:
                    _check_memory(name.decode(), fd)
                    found.memories[name.decode()] = fd
        stale = {key for segment in found.segments for key in segment.stale}
        found.ended = [key for key in stale if best[key][1] >= DELETE]
        ends = [segment.fd for segment in found.segments]
        self._close_all_but(ends + [offer[5] for _, _, _, offer in kept if offer[5] >= 0])
        names = b"\0".join([row[0] for row in rows])
        ids, fds = array("i", [row[1] for row in rows]), array("i", [row[2] for row in rows])
        found.state = State.owning(names, ids, fds, sections)

    # Queues

    def _close_all_but(self, fds: Iterable[int]) -> None:
        keep = set(fds)
        gone = self.installed - keep
        self.installed = keep
        close_all(gone)

    def _peek(self, fd: int, what: str) -> list[Peeked]:
        """All records of a queue, with their descriptors, which are written down as installed."""
        sock = as_queue(fd)
        end = time.monotonic() + LONGEST
        try:
            for attempt in range(RETRIES):
                if attempt > 10 and time.monotonic() > end:  # others may read meanwhile
                    break
                if attempt:
                    time.sleep(PAUSE)
                fds: list[array[int]] = []
                try:
                    return self._peek_once(sock, fds, what)
                except (Damaged, ConnectionResetError, BlockingIOError) as error:
                    problem = error
                finally:
                    for some in fds:
                        self.installed.difference_update(some)
                        close_all(some)
            if isinstance(problem, Damaged):
                raise problem
            raise Damaged(f"{what} of a live hold cannot be read: {problem.strerror}")
        finally:
            sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, -1)
            sock.detach()

    def _peek_once(self, sock: socket.SocketType, fds: list[array[int]], what: str) -> list[Peeked]:
        """One pass. `fds` gets what was installed, and is empty when all is well."""
        found: list[Peeked] = []
        sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
        waiting = queued(sock)
        total = 0
        while total < waiting:
            data, some, flags = receive(sock, MOST + 1, _PEEK)
            fds.append(some)
            self.installed.update(some)
            if flags & socket.MSG_CTRUNC:
                raise cut_short("a live hold")
            if flags & socket.MSG_TRUNC or not data or len(found) >= MOST_TURNS:
                raise Damaged(f"{what} of a live hold is not in order")
            record = decode(data)
            if record.descriptors != len(some):
                raise Damaged(f"{what} of a live hold has a record without all its descriptors")
            self._check_order(record, found, what)
            found.append((record, len(data), some))
            total += len(data)
        if queued(sock) != waiting or total != waiting:
            raise Damaged(f"{what} of a live hold changes while it is read")
        if self.hold is None and found:
            self.hold = found[0][0].hold
        fds.clear()
        return found

    def _check_order(self, record: Record, found: list[Peeked], what: str) -> None:
        hold = self.hold
        if found:
            before = found[-1][0]
            hold = before.hold
            if record.ordinal != before.ordinal + 1 or record.seq <= before.seq:
                raise Damaged(f"{what} of a live hold lacks a record")
        if hold is not None and record.hold != hold:
            raise Damaged(f"{what} of a live hold has a record of another hold")


def _section(key: str, op: int, value: bytes, fd: int) -> InlineSection | MemfdSection:
    if op in (RAW_MEMFD, PACKED_MEMFD):
        if missing_seals(fd) != []:
            raise Damaged(f"section {key!r} of the live hold is not a sealed memfd")
        return MemfdSection(fd, packed=op == PACKED_MEMFD, owned=True)
    return InlineSection(value, packed=op == PACKED)


def _check_memory(name: str, fd: int) -> None:
    """A file that can shrink would kill by SIGBUS whoever maps it."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        seals = 0
    if seals & MEMORY_SEALS != MEMORY_SEALS or not os.fstat(fd).st_size:
        raise Damaged(f"memory {name!r} of the live hold is not a memfd of a fixed size")

"""Where all slots lie together: one parked socket pair that outlives the daemon.

The queue of a shelf has a header, then slots, then the replies about holds that ended. The daemon
only appends. The kernel keeps the queue as long as anybody has the pair: this process across exec,
or systemd's descriptor store across anything.

To write a shelf anew (`Keeper.compact`) the daemon fills an empty spare shelf and appends a record
"complete", which names the shelves that the new shelf replaces. A shelf without such a record never
counted, and a replaced shelf does not count any more: every moment of the change is safe.

The way from a shelf to the slots is frozen for all versions: the prefix of a record, the kinds, the
order of descriptors in a record of slots (of pairs outlet and inlet in turn), and the list in
"complete". A cprd that cannot read all of a shelf still finds every slot, and leaves the shelf as
it is.
docs/bundle.md has the layout.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgpack

from cprd.errors import LimitExceeded
from cprd.linux.pause import point
from cprd.linux.rights import SO_PEEK_OFF, close_all, receive, send
from cprd.protocol.replies import Reply, array, restored

MAGIC = b"CPRH"
VERSION = 1
PREFIX = struct.Struct("<4sHc")
HEADER, OUTCOMES, COMPLETE = b"h", b"o", b"c"
PAIRS, LOOPS = b"s", b"l"  # slots of two descriptors each, and of one
SLOTS_A_RECORD = 100  # the kernel's limit is 253 descriptors
OUTCOMES_A_RECORD = 20  # of about 100 bytes each
MAX_RECORD = 16384
WANTED_BUFFER = 4 << 20  # as much as wmem_max allows is what it gets
BYTES_A_MESSAGE = 768  # what a message of up to 192 bytes counts in the send buffer (measured)
PREFIX_OF_NAMES = "shelf."
_pack = msgpack.Packer(use_bin_type=True).pack  # packb() makes a packer each time
_ONE: bytes = _pack({"n": 1})
_ALL = b"\x81" + _pack("all")  # a map: an array of replies is to follow


class ShelfFull(Exception):
    """Nothing more fits in the queue."""


class Shelf:
    """Owns both ends of the pair.

    `durable`: systemd's store was lately seen to have both ends; `was_durable`: the store had both
    once, and the slots here were called stored; `counts`: the shelf is complete."""

    __slots__ = (
        "counts",
        "durable",
        "in_flight",
        "messages",
        "number",
        "outlet",
        "room",
        "tx",
        "was_durable",
    )

    def __init__(self, number: int, tx: socket.socket, outlet: socket.socket) -> None:
        self.number = number
        self.tx = tx
        self.outlet = outlet
        self.durable = self.was_durable = self.counts = False
        self.messages = 0
        # About how many messages the queue can take in all.
        self.room = tx.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // BYTES_A_MESSAGE
        self.in_flight = 0  # descriptors parked here
        for end in (tx, outlet):
            end.setblocking(False)

    @classmethod
    def create(cls, number: int) -> Shelf:
        """An empty shelf. Raises LimitExceeded."""
        try:
            tx, outlet = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise LimitExceeded(
                f"cprd has no descriptor left for a shelf ({error.strerror}): raise LimitNOFILE= of"
                " cprd.service"
            ) from None
        tx.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, WANTED_BUFFER)
        shelf = cls(number, tx, outlet)
        shelf._append(HEADER, _pack({"number": number}))
        return shelf

    @property
    def names(self) -> tuple[str, str]:
        """Names of the outlet and the inlet in the store."""
        return f"{PREFIX_OF_NAMES}{self.number}.out", f"{PREFIX_OF_NAMES}{self.number}.in"

    def add_slot(self, fds: tuple[int, ...]) -> None:
        """As `add_slots`, a single slot."""
        self._append(LOOPS if len(fds) == 1 else PAIRS, _ONE, fds)
        point("shelf:slots")

    def add_slots(self, slots: Iterable[tuple[int, ...]]) -> None:
        """Append slots, (socket,) or (outlet, inlet) each; borrowed. Raises ShelfFull,
        LimitExceeded."""
        parts: dict[int, list[int]] = {2: [], 1: []}  # descriptors, by those of each slot
        for fds in slots:
            part = parts[len(fds)]
            part += fds
            if len(part) == SLOTS_A_RECORD * len(fds):
                self._add_part(part, len(fds))
                part.clear()
        for each, part in parts.items():
            if part:
                self._add_part(part, each)

    def _add_part(self, fds: Sequence[int], each: int) -> None:
        self._append(PAIRS if each == 2 else LOOPS, _pack({"n": len(fds) // each}), fds)
        point("shelf:slots")

    def add_outcomes(self, replies: Sequence[Reply]) -> None:
        """Append replies about holds that ended. Raises ShelfFull, LimitExceeded."""
        for start in range(0, len(replies), OUTCOMES_A_RECORD):
            part = replies[start : start + OUTCOMES_A_RECORD]
            self._append(OUTCOMES, _ALL + array(part))
            point("shelf:outcomes")

    def complete(self, replaces: Sequence[int] = ()) -> None:
        """From here on this shelf counts, and the shelves of `replaces` count no more."""
        point("shelf:filled")
        self._append(COMPLETE, _pack({"replaces": list(replaces)}))
        self.counts = True
        point("shelf:complete")

    def _append(self, kind: bytes, content: bytes, fds: Sequence[int] = ()) -> None:
        try:
            send(self.tx, PREFIX.pack(MAGIC, VERSION, kind) + content, fds)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EPIPE):
                raise ShelfFull from None
            raise LimitExceeded(f"cprd cannot write to its shelf: {error.strerror}") from None
        self.messages += 1
        self.in_flight += len(fds)

    def drop_first(self) -> bool:
        """Take the first message out of a shelf that is not needed any more. Returns whether there
        was any."""
        try:
            return bool(self.outlet.recv(1))
        except OSError:
            return False

    def close(self) -> None:
        self.tx.close()
        self.outlet.close()


class Read:
    """The content of a shelf: slots as (socket,) or (outlet, inlet), which the reader owns."""

    __slots__ = ("complete", "replaces", "replies", "slots", "unknown", "unreadable")

    def __init__(self) -> None:
        self.slots: list[tuple[int, ...]] = []
        self.replies: list[Reply] = []
        self.complete = False
        self.replaces: list[int] = []
        self.unreadable = ""  # why a record cannot be read; the shelf must stay as it is then
        self.unknown = ""  # why slots may be here that nobody can find; the shelf must stay, too


def read(outlet: socket.socket) -> tuple[Read, int]:
    """All of a shelf, and the number of messages. Nothing is consumed."""
    found = Read()
    messages = 0
    for data, fds in records(outlet, MAX_RECORD):
        messages += 1
        try:
            _read_record(found, data, fds)
        except _Unknown as error:
            found.unknown = found.unknown or f"{error}; this cprd reads version {VERSION}"
        except Exception as error:
            found.unreadable = found.unreadable or f"{error}; this cprd reads version {VERSION}"
        close_all(fds)
    return found, messages


class _Unknown(Exception):
    """A record of unknown kind: slots, perhaps."""


def _read_record(found: Read, data: bytes, fds: list[int]) -> None:
    """Add a record to `found`; the descriptors of slots are taken out of `fds`.

    Raises _Unknown where slots may be missed, another exception where none can be."""
    if len(data) < PREFIX.size or not data.startswith(MAGIC):
        raise _Unknown("a record that is not of a shelf")
    _, version, kind = PREFIX.unpack_from(data)
    what = f"a record of version {version}"
    if kind not in (HEADER, PAIRS, LOOPS, OUTCOMES, COMPLETE):
        raise _Unknown(f"{what} and of kind {kind!r}")
    ours = version == VERSION
    if kind in (PAIRS, LOOPS):
        each = 2 if kind == PAIRS else 1
        if len(fds) % each or (ours and len(fds) != each * _content(data)["n"]):
            raise _Unknown(f"{what} with {len(fds)} descriptors")
        found.slots += zip(*(fds[at::each] for at in range(each)), strict=True)
        fds.clear()
    elif kind == COMPLETE:
        found.complete = True
        found.replaces += [int(number) for number in _content(data)["replaces"]]
    elif kind == OUTCOMES and ours:
        found.replies += [restored(one) for one in _content(data)["all"]]
    if not ours:
        raise ValueError(what)


def _content(data: bytes) -> dict[str, Any]:
    content: dict[str, Any] = msgpack.unpackb(data[PREFIX.size :], raw=False)
    return content


def records(outlet: socket.SocketType, size: int) -> Iterator[tuple[bytes, list[int]]]:
    """Each message of a queue with its descriptors, which the caller owns; nothing is consumed.

    One reader at a time: the cursor belongs to the socket. Raises LimitExceeded when a message does
    not come whole (descriptors of this process run out)."""
    outlet.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
    try:
        while True:
            try:
                data, fds, flags = receive(outlet, size, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except ConnectionResetError:
                continue
            if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
                close_all(fds)
                raise LimitExceeded(
                    "cprd has no descriptor left to read its shelf with: raise LimitNOFILE= of"
                    " cprd.service"
                )
            if not data:
                return
            yield data, fds.tolist()
    finally:
        outlet.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, -1)

"""Where all holds lie together: one parked socket pair that outlives the daemon.

The queue of a shelf has the queues (bundles) of holds, pidfds, and the journals with the records of
the holds. The daemon only appends. The kernel keeps all that as long as anybody has the pair: this
process across exec, or systemd's descriptor store across anything.

To write a shelf anew (`Keeper.compact`) the daemon fills an empty spare shelf and appends a record
"complete" with the journals, which names the shelves that the new shelf replaces. A shelf without
such a record never counted, and a replaced shelf does not count any more: every moment of the
change is safe. Old and new shelf lead to the same journal.

The way from a shelf to the holds is frozen for all versions: the prefix of a message, the kinds,
the numbers in front of queues and pidfds, and the list and the journals in "complete". A cprd that
cannot read all of a shelf still finds every hold, and leaves the shelf as it is. Shelves of
version 1 have slots instead (slot.py). docs/bundle.md has the layout.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgpack

from cprd.errors import LimitExceeded
from cprd.linux.pause import point
from cprd.linux.rights import SO_PEEK_OFF, close_all, peek, send
from cprd.protocol.replies import Reply, restored

MAGIC = b"CPRH"
VERSION = 2
PREFIX = struct.Struct("<4sHc")
HEADER, QUEUES, PIDFDS, COMPLETE = b"h", b"q", b"p", b"c"
PAIRS, LOOPS, OUTCOMES = b"s", b"l", b"o"  # of version 1: slots of two descriptors and of one
QUEUE = struct.Struct("<QI")  # generation, uid of the owner
PIDFD = struct.Struct("<QQ")  # generation, number
A_RECORD = 100  # queues or pidfds; the kernel's limit is 253 descriptors
MAX_RECORD = 16384
WANTED_BUFFER = 4 << 20  # as much as wmem_max allows is what it gets
BYTES_A_MESSAGE = 768  # what a message of up to 192 bytes counts in the send buffer (measured)
PREFIX_OF_NAMES = "shelf."
_pack = msgpack.Packer(use_bin_type=True).pack  # packb() makes a packer each time


class ShelfFull(Exception):
    """Nothing more fits in the queue."""


class Queue(NamedTuple):
    """A bundle on a shelf."""

    generation: int
    uid: int
    fd: int


class Pidfd(NamedTuple):
    generation: int
    number: int
    fd: int


class Shelf:
    """Owns both ends of the pair.

    `durable`: systemd's store was lately seen to have both ends; `was_durable`: the store had both
    once, and the holds here were called stored; `counts`: the shelf is complete."""

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
        shelf._append(_head(HEADER) + _pack({"number": number}))
        return shelf

    @property
    def names(self) -> tuple[str, str]:
        """Names of the outlet and the inlet in the store."""
        return f"{PREFIX_OF_NAMES}{self.number}.out", f"{PREFIX_OF_NAMES}{self.number}.in"

    def add_queues(self, queues: Sequence[Queue]) -> None:
        """Append queues; borrowed. Raises ShelfFull, LimitExceeded."""
        self._append_all(QUEUES, QUEUE, queues, "shelf:queues")

    def add_pidfds(self, pidfds: Sequence[Pidfd]) -> None:
        """Append pidfds; borrowed. Raises ShelfFull, LimitExceeded."""
        self._append_all(PIDFDS, PIDFD, pidfds, "shelf:pidfds")

    def _append_all(
        self, kind: bytes, form: struct.Struct, every: Sequence[Queue | Pidfd], name: str
    ) -> None:
        """Each descriptor behind its numbers, in messages of one kind."""
        for at in range(0, len(every), A_RECORD):
            part = every[at : at + A_RECORD]
            said = b"".join([form.pack(*one[:2]) for one in part])
            self._append(_head(kind) + said, [one.fd for one in part])
            point(name)

    def complete(self, journals: Sequence[int], replaces: Sequence[int] = ()) -> None:
        """From here on this shelf counts with `journals` (borrowed), and the shelves of `replaces`
        count no more, nor slots on this shelf. May be said again."""
        point("shelf:filled")
        self._append(_head(COMPLETE) + _pack({"replaces": list(replaces)}), journals)
        self.counts = True
        point("shelf:complete")

    def _append(self, data: bytes, fds: Sequence[int] = ()) -> None:
        try:
            send(self.tx, data, fds)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EPIPE):
                raise ShelfFull from None
            raise LimitExceeded(f"cprd cannot write to its shelf: {error.strerror}") from None
        except LimitExceeded as error:
            raise LimitExceeded(f"raise LimitNOFILE= of cprd.service: {error}") from None
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


def _head(kind: bytes) -> bytes:
    return PREFIX.pack(MAGIC, VERSION, kind)


class Read:
    """The content of a shelf; the reader owns all descriptors."""

    __slots__ = (
        "complete",
        "journals",
        "pidfds",
        "queues",
        "replaces",
        "replies",
        "slots",
        "unknown",
        "unreadable",
        "void_slots",
    )

    def __init__(self) -> None:
        self.queues: list[Queue] = []
        self.pidfds: list[Pidfd] = []
        self.journals: list[int] = []
        self.slots: list[tuple[int, ...]] = []  # as (socket,) or (outlet, inlet)
        self.void_slots: list[tuple[int, ...]] = []  # whose holds are in a journal by now
        self.replies: list[Reply] = []
        self.complete = False
        self.replaces: list[int] = []
        self.unreadable = ""  # why a message cannot be read; the shelf must stay as it is then
        self.unknown = ""  # why holds may be here that nobody can find; the shelf must stay, too

    def fds(self) -> int:
        """How many descriptors lie on the shelf."""
        slots = (*self.slots, *self.void_slots)
        return len(self.queues) + len(self.pidfds) + len(self.journals) + sum(map(len, slots))


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
    """A message of unknown kind: holds, perhaps."""


def _read_record(found: Read, data: bytes, fds: list[int]) -> None:
    """Add a message to `found`; the descriptors of holds are taken out of `fds`.

    Raises _Unknown where holds may be missed, another exception where none can be."""
    if len(data) < PREFIX.size or not data.startswith(MAGIC):
        raise _Unknown("a record that is not of a shelf")
    _, version, kind = PREFIX.unpack_from(data)
    what = f"a record of version {version}"
    ours = version in (1, VERSION)
    if kind == QUEUES:
        found.queues += map(Queue._make, _numbered(QUEUE, what, data, fds))
    elif kind == PIDFDS:
        found.pidfds += map(Pidfd._make, _numbered(PIDFD, what, data, fds))
    elif kind in (PAIRS, LOOPS):
        each = 2 if kind == PAIRS else 1
        if len(fds) % each or (ours and len(fds) != each * _content(data)["n"]):
            raise _Unknown(f"{what} with {len(fds)} descriptors")
        found.slots += zip(*(fds[at::each] for at in range(each)), strict=True)
        fds.clear()
    elif kind == COMPLETE:
        found.complete = True
        found.replaces += [int(number) for number in _content(data)["replaces"]]
        if fds:
            found.void_slots += found.slots
            found.slots = []
        found.journals += fds
        fds.clear()
    elif kind == OUTCOMES and ours:
        found.replies += [restored(one) for one in _content(data)["all"]]
    elif kind not in (HEADER, OUTCOMES):
        raise _Unknown(f"{what} and of kind {kind!r}")
    if not ours:
        raise ValueError(what)


def _numbered(
    form: struct.Struct, what: str, data: bytes, fds: list[int]
) -> list[tuple[int, int, int]]:
    """Each descriptor behind the numbers that stand for the descriptor, in order. Takes `fds`."""
    numbers = data[PREFIX.size : PREFIX.size + form.size * len(fds)]
    if len(numbers) != form.size * len(fds):
        raise _Unknown(f"{what} with {len(fds)} descriptors")
    every = [(*said, fd) for said, fd in zip(form.iter_unpack(numbers), fds, strict=True)]
    fds.clear()
    return every


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
                data, fds, flags = peek(outlet, size)
            except BlockingIOError:
                return
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

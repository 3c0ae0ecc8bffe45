"""Where all slots lie together: one parked socket pair that outlives the daemon.

A shelf's queue holds, in order, its own header, then slots (both ends of each), then what became of
holds that ended (so that a request repeated after a restart gets its first answer). It is only ever
appended to, and the kernel keeps it as long as anybody has the pair: this process across exec, or
systemd's descriptor store across anything.

It is written anew (`Keeper.compact`) by filling an empty spare shelf and ending that with a record
"complete", which names the shelves that it replaces: a shelf without such a record never counted,
and one that is replaced does not count any more, so every moment of the change is safe.

What a shelf leads to is frozen for all versions: the prefix of a record, its kinds, that the
descriptors of a record of slots are outlet and inlet in turn, and what "complete" replaces. So a
cprd that cannot read all of a shelf still finds every slot on it, and leaves the shelf as it is.
docs/bundle.md has the layout.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import msgpack

from cprd.errors import LimitExceeded
from cprd.linux.pause import point
from cprd.linux.rights import SO_PEEK_OFF, close_all, receive, send

MAGIC = b"CPRH"
VERSION = 1
PREFIX = struct.Struct("<4sHc")
HEADER, SLOTS, OUTCOMES, COMPLETE = b"h", b"s", b"o", b"c"
SLOTS_A_RECORD = 100  # two descriptors each; the kernel's limit is 253
OUTCOMES_A_RECORD = 20  # of about 100 bytes each
MAX_RECORD = 16384
WANTED_BUFFER = 4 << 20  # as much as wmem_max allows is what it gets
BYTES_A_MESSAGE = 768  # what a message of up to 192 bytes counts in the send buffer (measured)
PREFIX_OF_NAMES = "shelf."


class ShelfFull(Exception):
    """Nothing more fits in its queue."""


class Shelf:
    """Owns both ends of the pair. `durable`: systemd's store has them, too, as was seen lately;
    `was_durable`: it had them once, so that what lies here was called stored; `counts`: it is
    complete."""

    __slots__ = ("counts", "durable", "messages", "number", "outlet", "tx", "was_durable")

    def __init__(self, number: int, tx: socket.socket, outlet: socket.socket) -> None:
        self.number = number
        self.tx = tx
        self.outlet = outlet
        self.durable = self.was_durable = self.counts = False
        self.messages = 0
        for end in (tx, outlet):
            end.setblocking(False)

    @classmethod
    def create(cls, number: int) -> Shelf:
        """An empty one. Raises LimitExceeded."""
        try:
            tx, outlet = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise LimitExceeded(
                f"cprd has no descriptor left for a shelf ({error.strerror}): raise LimitNOFILE= of"
                " cprd.service"
            ) from None
        tx.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, WANTED_BUFFER)
        shelf = cls(number, tx, outlet)
        shelf._append(HEADER, {"number": number})
        return shelf

    @property
    def names(self) -> tuple[str, str]:
        """Under which its outlet and its inlet lie in the store."""
        return f"{PREFIX_OF_NAMES}{self.number}.out", f"{PREFIX_OF_NAMES}{self.number}.in"

    @property
    def room(self) -> int:
        """About how many messages its queue can take in all."""
        return self.tx.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // BYTES_A_MESSAGE

    def add_slots(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Put slots on it, (outlet, inlet) each; borrowed. Raises ShelfFull, LimitExceeded."""
        for start in range(0, len(pairs), SLOTS_A_RECORD):
            part = pairs[start : start + SLOTS_A_RECORD]
            self._append(SLOTS, {"n": len(part)}, [fd for pair in part for fd in pair])
            point("shelf:slots")

    def add_outcomes(self, outcomes: Sequence[dict[str, Any]]) -> None:
        """What was answered for holds that ended, for requests that are repeated. Raises ShelfFull,
        LimitExceeded."""
        for start in range(0, len(outcomes), OUTCOMES_A_RECORD):
            self._append(OUTCOMES, {"all": outcomes[start : start + OUTCOMES_A_RECORD]})
            point("shelf:outcomes")

    def complete(self, replaces: Sequence[int] = ()) -> None:
        """From here on it counts, and the shelves of these numbers do not any more."""
        point("shelf:filled")
        self._append(COMPLETE, {"replaces": list(replaces)})
        self.counts = True
        point("shelf:complete")

    def _append(self, kind: bytes, content: dict[str, Any], fds: Sequence[int] = ()) -> None:
        data = PREFIX.pack(MAGIC, VERSION, kind) + msgpack.packb(content, use_bin_type=True)
        try:
            send(self.tx, data, fds)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EPIPE):
                raise ShelfFull from None
            raise LimitExceeded(f"cprd cannot write to its shelf: {error.strerror}") from None
        self.messages += 1

    def close(self) -> None:
        self.tx.close()
        self.outlet.close()


class Read:
    """What lay on a shelf: slots as (outlet, inlet), which the reader owns."""

    __slots__ = ("complete", "outcomes", "replaces", "slots", "unknown", "unreadable")

    def __init__(self) -> None:
        self.slots: list[tuple[int, int]] = []
        self.outcomes: list[dict[str, Any]] = []
        self.complete = False
        self.replaces: list[int] = []
        self.unreadable = ""  # why something on it cannot be read; it must stay as it is then
        self.unknown = ""  # why there may be slots on it that nobody can find; it must stay, too


def read(outlet: socket.socket) -> tuple[Read, int]:
    """All of a shelf, without taking anything off it, and how many messages that were."""
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
    """A record that may be anything, slots too."""


def _read_record(found: Read, data: bytes, fds: list[int]) -> None:
    """Note in `found` what a record says; of its descriptors, those of slots are taken out.

    Raises _Unknown, or anything else for what cannot be read and is known not to be slots."""
    if len(data) < PREFIX.size or not data.startswith(MAGIC):
        raise _Unknown("a record that is not of a shelf")
    _, version, kind = PREFIX.unpack_from(data)
    what = f"a record of version {version}"
    if kind not in (HEADER, SLOTS, OUTCOMES, COMPLETE):
        raise _Unknown(f"{what} and of kind {kind!r}")
    ours = version == VERSION
    if kind == SLOTS:
        if len(fds) % 2 or (ours and len(fds) != 2 * _content(data)["n"]):
            raise _Unknown(f"{what} with {len(fds)} descriptors")
        found.slots += zip(fds[::2], fds[1::2], strict=True)
        fds.clear()
    elif kind == COMPLETE:
        found.complete = True
        found.replaces += [int(number) for number in _content(data)["replaces"]]
    elif kind == OUTCOMES and ours:
        found.outcomes += _content(data)["all"]
    if not ours:
        raise ValueError(what)


def _content(data: bytes) -> dict[str, Any]:
    content: dict[str, Any] = msgpack.unpackb(data[PREFIX.size :], raw=False)
    return content


def records(outlet: socket.socket, size: int) -> Iterator[tuple[bytes, list[int]]]:
    """Each message of a queue with its descriptors, which the caller owns; nothing is consumed.

    One reader at a time: the cursor is the socket's. Raises LimitExceeded when a message does not
    come whole (descriptors of this process run out)."""
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

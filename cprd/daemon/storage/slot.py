"""One hold's place: a socket pair whose queue holds the daemon's records of it.

The first record carries the bundle; each later one is the whole record anew, so that the last one
tells. All of them carry the pidfds that matter then. The queue is the kernel's: it stays as long as
anything holds the pair, whatever becomes of the daemon. Ending a hold drains its slot, the first
record first: what the bundle held is let go of. Before that a last record says that the slot is
dead; with it go the answers to the requests that made the hold what it was, so that the one that
ended it is answered again should its answer have been lost.

A record begins with a prefix that is frozen for all versions (owner, generation, name), so that a
cprd that cannot read the rest still knows whose it is, and can end it: a prefix without a name is
the last record, in every version.
docs/bundle.md has the layout.
"""

from __future__ import annotations

import dataclasses
import errno
import socket
import struct
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import msgpack

from cprd.daemon.storage.shelf import records
from cprd.errors import LimitExceeded
from cprd.linux.pause import point
from cprd.linux.rights import SO_PEEK_OFF, close_all, receive, send
from cprd.protocol.registry import Hold

MAGIC = b"CPRS"
VERSION = 1
PREFIX = struct.Struct("<4sHIQB")  # magic, version, uid, generation, bytes of the name that follows
MAX_RECORD = 8192
ANSWERS = 4  # to the last requests that changed the hold, in each record
_PREFIXED = ("uid", "generation", "name")
_BODY = tuple(f.name for f in dataclasses.fields(Hold) if f.name not in _PREFIXED)
ROLES = ("after_exit", "saver", "claimant", "acting")  # whose pidfds lie in a record


Answered = dict[str, Any]  # uid, nonce, answer, at (s of the boot clock)


class SlotFull(Exception):
    """No record fits any more: the hold wants a new slot."""


class Unreadable(Exception):
    """A record of another version: `uid`, `generation` and `name` are known nevertheless."""

    def __init__(self, why: str, uid: int, generation: int, name: str) -> None:
        super().__init__(f"{why}; this cprd reads version {VERSION}")
        self.uid = uid
        self.generation = generation
        self.name = name


def encode(hold: Hold, roles: tuple[str, ...], answers: Iterable[Answered] = ()) -> bytes:
    name = hold.name.encode()
    body = {field: getattr(hold, field) for field in _BODY}
    prefix = PREFIX.pack(MAGIC, VERSION, hold.uid, hold.generation, len(name))
    content = {"roles": roles, "answers": list(answers), "hold": body}
    packed: bytes = msgpack.packb(content, use_bin_type=True)
    return prefix + name + packed


def is_last(data: bytes) -> bool:
    """Whether it is the record that ends a slot: so in every version."""
    return data[:4] == MAGIC and len(data) >= PREFIX.size and data[PREFIX.size - 1] == 0


def owner(data: bytes, otherwise: int) -> int:
    """The uid in a record's prefix: so in every version."""
    if data[:4] != MAGIC or len(data) < PREFIX.size:
        return otherwise
    uid: int = PREFIX.unpack_from(data)[2]
    return uid


def decode(data: bytes) -> tuple[Hold, tuple[str, ...], list[Answered]]:
    """The record, whose pidfds come with it, and what was answered. Raises Unreadable, or
    ValueError for noise."""
    if len(data) < PREFIX.size:
        raise ValueError("not a record: too short")
    magic, version, uid, generation, length = PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise ValueError("not a record of cprd")
    name = data[PREFIX.size : PREFIX.size + length].decode()
    if version != VERSION:
        raise Unreadable(f"a record of version {version}", uid, generation, name)
    try:
        body: dict[str, Any] = msgpack.unpackb(data[PREFIX.size + length :], raw=False)
        hold = Hold(uid=uid, generation=generation, name=name, **body["hold"])
        return hold, tuple(body["roles"]), body["answers"]
    except Exception as error:  # what cannot be understood is kept like what is newer
        raise Unreadable(f"a record that cannot be read ({error})", uid, generation, name) from None


class Slot:
    """Owns both ends of the pair."""

    __slots__ = ("answers", "outlet", "records", "tx", "uid")

    def __init__(self, tx: socket.socket, outlet: socket.socket) -> None:
        self.tx = tx
        self.outlet = outlet
        self.records = 0
        self.uid = 0  # whose it is, once a record of it was written or read
        self.answers: deque[Answered] = deque(maxlen=ANSWERS)
        for end in (tx, outlet):
            end.setblocking(False)

    @classmethod
    def create(
        cls, hold: Hold, bundle: int, pidfds: Mapping[str, int], answers: Iterable[Answered] = ()
    ) -> Slot:
        """A slot with its first record. `bundle` and `pidfds` stay the caller's.

        Raises LimitExceeded; then nothing is left."""
        try:
            slot = cls(*socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        except OSError as error:
            raise LimitExceeded(
                f"cprd has no descriptor left to hold with ({error.strerror}): raise LimitNOFILE="
                " of cprd.service, or drop holds"
            ) from None
        try:
            slot._append(hold, pidfds, answers, bundle)
        except BaseException:
            slot.close()
            raise
        return slot

    def append(
        self, hold: Hold, pidfds: Mapping[str, int], answers: Iterable[Answered] = ()
    ) -> None:
        """Write the record anew. Raises SlotFull, LimitExceeded; then nothing has changed."""
        self._append(hold, pidfds, answers, -1)

    def _append(
        self, hold: Hold, pidfds: Mapping[str, int], answers: Iterable[Answered], bundle: int
    ) -> None:
        every = deque((*self.answers, *answers), maxlen=ANSWERS)
        roles = tuple(role for role in ROLES if pidfds.get(role, -1) >= 0)
        fds = [pidfds[role] for role in roles]
        if bundle >= 0:
            fds.insert(0, bundle)
        try:
            send(self.tx, encode(hold, roles, every), fds)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                raise SlotFull from None
            raise LimitExceeded(f"cprd cannot write its record: {error.strerror}") from None
        self.records += 1
        self.uid = hold.uid
        self.answers = every
        point("slot:written")

    def grow(self) -> None:
        """Let more records fit, as far as net.core.wmem_max goes."""
        size = self.tx.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        self.tx.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)  # doubles it

    def mark_dead(self, hold: Hold, answers: Iterable[Answered] = ()) -> None:
        """Say for good that the hold has ended, before anything of it is let go. Raises
        LimitExceeded; then nothing has changed."""
        every = [*self.answers, *answers][-ANSWERS:]
        data = PREFIX.pack(MAGIC, VERSION, hold.uid, hold.generation, 0)
        data += msgpack.packb(every, use_bin_type=True)
        for attempt in (1, 2):
            try:
                send(self.tx, data)
                break
            except OSError as error:
                if error.errno != errno.EAGAIN or attempt == 2:
                    why = f"cprd cannot write its record: {error.strerror}"
                    raise LimitExceeded(why) from None
                self.grow()
        self.answers = deque(every, maxlen=ANSWERS)
        point("slot:dead")

    def read(self) -> tuple[Hold | None, dict[str, int]]:
        """The record as it is now, with pidfds by role (the caller owns them); None when the hold
        has ended. `answers` and `uid` are read, too. Raises Unreadable, ValueError; LimitExceeded
        when this process has no descriptor left to read with."""
        hold: Hold | None = None
        unreadable: Unreadable | ValueError | None = None
        pidfds: dict[str, int] = {}
        ended = False
        self.records = 0
        try:
            for data, fds in records(self.outlet, MAX_RECORD):
                try:
                    self.records += 1
                    self.uid = owner(data, self.uid)
                    if is_last(data):
                        ended = True
                        self._read_answers(data[PREFIX.size :])
                        continue
                    if self.records == 1 and not fds:
                        ended = True  # its first record is gone: it was being drained
                    hold, roles, answers = decode(data)
                    if self.records == 1:
                        if len(fds) != 1 + len(roles):
                            ended = True
                            continue
                        close_all(fds[:1])
                        del fds[0]
                    self.answers = deque(answers, maxlen=ANSWERS)
                    close_all(pidfds.values())
                    pidfds = dict(zip(roles, list(fds), strict=True))
                    fds.clear()
                except (Unreadable, ValueError) as error:
                    unreadable = unreadable or error
                finally:
                    close_all(fds)
            if unreadable is not None and not ended:
                raise unreadable
        except BaseException:
            close_all(pidfds.values())
            raise
        if ended:
            close_all(pidfds.values())
            return None, {}
        return hold, pidfds

    def _read_answers(self, data: bytes) -> None:
        try:
            self.answers = deque(msgpack.unpackb(data, raw=False), maxlen=ANSWERS)
        except Exception:
            pass  # of another version

    def bundle(self) -> int:
        """A descriptor of the bundle, which the caller owns (it never is the last one)."""
        self.outlet.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, -1)
        _, fds, _ = receive(self.outlet, MAX_RECORD, socket.MSG_PEEK)
        close_all(fds[1:])
        if not fds:
            raise LimitExceeded(
                "cprd has no descriptor left to serve with: raise LimitNOFILE= of cprd.service"
            )
        return fds[0]

    def drain(self) -> None:
        """End it: whatever it held is let go of here and now, and a foreign file can block that:
        not for the event loop."""
        point("slot:drain")
        while True:
            try:
                if not self.outlet.recv(1):
                    break
            except BlockingIOError:
                break
            except ConnectionResetError:
                continue
            point("slot:drained")
        self.close()

    def close(self) -> None:
        """Give up this process's copies of the pair; what a shelf holds stays there."""
        self.tx.close()
        self.outlet.close()


def fileno_pair(slot: Slot) -> tuple[int, int]:
    """(outlet, tx): what a shelf parks; borrowed."""
    return slot.outlet.fileno(), slot.tx.fileno()

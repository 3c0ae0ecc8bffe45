"""One hold's place: a socket pair whose queue holds the daemon's records of it.

The first record carries the bundle; each later one is the whole record anew, so that the last one
tells. All of them carry the pidfds that matter then. The queue is the kernel's: it stays as long as
anything holds the pair, whatever becomes of the daemon. Ending a hold drains its slot, the first
record first: from then on the slot is dead, and what the bundle held is let go of.

A record begins with a prefix that is frozen for all versions (owner, generation, name), so that a
cprd that cannot read the rest still knows whose it is. docs/bundle.md has the layout.
"""

from __future__ import annotations

import dataclasses
import errno
import socket
import struct
from collections.abc import Mapping
from typing import Any

import msgpack

from cprd.errors import LimitExceeded
from cprd.holds import Hold
from cprd.pause import point
from cprd.rights import SO_PEEK_OFF, close_all, receive, send
from cprd.shelf import records

MAGIC = b"CPRS"
VERSION = 1
PREFIX = struct.Struct("<4sHIQB")  # magic, version, uid, generation, bytes of the name that follows
MAX_RECORD = 8192
DEAD = b"ended"  # the whole body of the record that ends a slot
_PREFIXED = ("uid", "generation", "name")
_BODY = tuple(f.name for f in dataclasses.fields(Hold) if f.name not in _PREFIXED)
ROLES = ("after_exit", "saver", "claimant", "acting")  # whose pidfds lie in a record


class SlotFull(Exception):
    """No record fits any more: the hold wants a new slot."""


class Unreadable(Exception):
    """A record of another version: `uid`, `generation` and `name` are known nevertheless."""

    def __init__(self, version: int, uid: int, generation: int, name: str) -> None:
        super().__init__(f"a record of version {version}; this cprd reads version {VERSION}")
        self.uid = uid
        self.generation = generation
        self.name = name


def encode(hold: Hold, roles: tuple[str, ...]) -> bytes:
    name = hold.name.encode()
    body = {field: getattr(hold, field) for field in _BODY}
    prefix = PREFIX.pack(MAGIC, VERSION, hold.uid, hold.generation, len(name))
    packed: bytes = msgpack.packb({"roles": roles, "hold": body}, use_bin_type=True)
    return prefix + name + packed


def decode(data: bytes) -> tuple[Hold, tuple[str, ...]]:
    """The record and whose pidfds come with it. Raises Unreadable, or ValueError for noise."""
    if len(data) < PREFIX.size:
        raise ValueError("not a record: too short")
    magic, version, uid, generation, length = PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise ValueError("not a record of cprd")
    name = data[PREFIX.size : PREFIX.size + length].decode()
    if version != VERSION:
        raise Unreadable(version, uid, generation, name)
    body: dict[str, Any] = msgpack.unpackb(data[PREFIX.size + length :], raw=False)
    hold = Hold(uid=uid, generation=generation, name=name, **body["hold"])
    return hold, tuple(body["roles"])


class Slot:
    """Owns both ends of the pair."""

    __slots__ = ("outlet", "records", "tx")

    def __init__(self, tx: socket.socket, outlet: socket.socket) -> None:
        self.tx = tx
        self.outlet = outlet
        self.records = 0
        for end in (tx, outlet):
            end.setblocking(False)

    @classmethod
    def create(cls, hold: Hold, bundle: int, pidfds: Mapping[str, int]) -> Slot:
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
            slot._append(hold, pidfds, bundle)
        except BaseException:
            slot.close()
            raise
        return slot

    def append(self, hold: Hold, pidfds: Mapping[str, int]) -> None:
        """Write the record anew. Raises SlotFull, LimitExceeded; then nothing has changed."""
        self._append(hold, pidfds, -1)

    def _append(self, hold: Hold, pidfds: Mapping[str, int], bundle: int) -> None:
        roles = tuple(role for role in ROLES if pidfds.get(role, -1) >= 0)
        fds = [pidfds[role] for role in roles]
        if bundle >= 0:
            fds.insert(0, bundle)
        try:
            send(self.tx, encode(hold, roles), fds)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                raise SlotFull from None
            raise LimitExceeded(f"cprd cannot write its record: {error.strerror}") from None
        self.records += 1
        point("slot:written")

    def mark_dead(self, hold: Hold) -> None:
        """Say for good that the hold has ended, before anything of it is let go. Raises
        LimitExceeded."""
        data = PREFIX.pack(MAGIC, VERSION, hold.uid, hold.generation, 0) + DEAD
        for attempt in (1, 2):
            try:
                send(self.tx, data)
                break
            except OSError as error:
                if error.errno != errno.EAGAIN or attempt == 2:
                    why = f"cprd cannot write its record: {error.strerror}"
                    raise LimitExceeded(why) from None
                size = self.tx.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
                self.tx.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)  # doubles it
        point("slot:dead")

    def read(self) -> tuple[Hold | None, dict[str, int]]:
        """The record as it is now, with pidfds by role (the caller owns them); None when the hold
        has ended. Raises Unreadable, ValueError."""
        hold: Hold | None = None
        pidfds: dict[str, int] = {}
        self.records = 0
        for data, fds in records(self.outlet, MAX_RECORD):
            try:
                if data[PREFIX.size :] == DEAD:
                    hold = None
                    break
                hold, roles = decode(data)
                if not self.records:
                    if len(fds) != 1 + len(roles):
                        hold = None  # its first record is gone: it was being drained
                        break
                    close_all(fds[:1])
                    del fds[0]
                self.records += 1
                close_all(pidfds.values())
                pidfds = dict(zip(roles, list(fds), strict=True))
                fds.clear()
            except BaseException:
                close_all(pidfds.values())
                raise
            finally:
                close_all(fds)
        if hold is None:
            close_all(pidfds.values())
            pidfds = {}
        return hold, pidfds

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

"""One hold's place: a socket whose queue has the daemon's records of the hold.

The first record carries the bundle; each later record is the whole record anew, so that the last
counts, with the replies to the last requests about the hold. A pidfd is parked once: a later record
names the roles whose pidfds lie in earlier records.
The socket is connected to itself, so that a hold costs few sockets in flight; slots of earlier
versions are pairs, and stay so until they are written anew. The queue stays as long as anything
holds the socket, whatever becomes of the daemon. To end a hold
the daemon writes a last record, then drains the slot from the front: that lets go of the bundle.

A record begins with a prefix that is frozen for all versions (owner, generation, name). A cprd that
cannot read the rest still knows the owner, and can end the slot: a prefix without a name is the
last record, in every version. docs/bundle.md has the layout.
"""

from __future__ import annotations

import errno
import os
import struct

# Without the wrapper of socket.socket.
from _socket import AF_UNIX, MSG_PEEK, SO_SNDBUF, SOCK_DGRAM, SOCK_SEQPACKET, SOL_SOCKET
from _socket import socket as Socket
from collections.abc import Collection, Mapping, Sequence
from operator import attrgetter
from types import MappingProxyType
from typing import Any

import msgpack

from cprd.daemon.releaser import HANDED_ON, LIVING
from cprd.daemon.storage.shelf import records
from cprd.errors import LimitExceeded
from cprd.linux.loop import loop
from cprd.linux.pause import point
from cprd.linux.rights import close_all, receive, scm_fds, send
from cprd.protocol.lifecycle import CLAIMED, Hold
from cprd.protocol.registry import Ended
from cprd.protocol.replies import IN_A_RECORD, Reply, array, restored

MAGIC = b"CPRS"
VERSION = 2
LEANING = 3  # a record that needs pidfds of earlier records
# Two more, of live holds (releaser.py). LIVING: a record of a live hold; as the last record: let go
# of all that is kept. HANDED_ON: the last record of a hold whose content another hold has by now.
OLDEST = 1  # that is read: records without digests
PREFIX = struct.Struct("<4sHIQB")  # magic, version, uid, generation, bytes of the name that follows
MAX_RECORD = 8192
_PREFIXED = ("uid", "generation", "name")
_BODY = tuple(name for name in Hold._fields if name not in (*_PREFIXED, "away"))
# Fields since then, which a record has only where they say something: the record is unreadable,
# and kept, for a cprd that does not know the field.
_SINCE = ("saver_uid", "live", "took", "deaths", "last_end")
_ADDED = {name: Hold._field_defaults[name] for name in _SINCE}
_body_of = attrgetter(*_BODY)
_pack = msgpack.Packer(use_bin_type=True).pack  # packb() makes a packer each time
NOBODY: Mapping[str, int] = MappingProxyType({})  # one for all slots without pidfds
ROLES = ("after_exit", "saver", "claimant", "acting", "owner")  # of the pidfds in a record
_ROLES, _ANSWERS, _HOLD, _BEFORE = map(_pack, ("roles", "answers", "hold", "before"))
_NO_ROLES = _ROLES + _pack(())


class SlotFull(Exception):
    """No record fits any more: the hold needs a new slot."""


class Unreadable(Exception):
    """A record of another version: `uid`, `generation` and `name` are known nevertheless."""

    def __init__(self, why: str, uid: int, generation: int, name: str) -> None:
        super().__init__(f"{why}; this cprd reads version {VERSION}")
        self.uid = uid
        self.generation = generation
        self.name = name


def encode(
    hold: Hold,
    roles: tuple[str, ...],
    replies: Sequence[Reply] = (),
    before: tuple[str, ...] = (),
) -> bytes:
    """A record with the pidfds of `roles`; those of the roles `before` lie in earlier records."""
    name = hold.name.encode()
    body = dict(zip(_BODY, _body_of(hold), strict=True))
    for field, default in _ADDED.items():
        if body[field] == default:
            del body[field]
    version = LIVING if hold.live else LEANING if before else VERSION
    prefix = PREFIX.pack(MAGIC, version, hold.uid, hold.generation, len(name))
    head = prefix + name + (b"\x84" if before else b"\x83")  # a map of so many
    head += _ROLES + _pack(roles) if roles else _NO_ROLES
    packed: bytes = head + _ANSWERS + array(replies) + _HOLD + _pack(body)
    return packed + _BEFORE + _pack(before) if before else packed


def encode_last(hold: Hold, replies: Sequence[Reply] = (), version: int = VERSION) -> bytes:
    """The record that ends a slot, in every version. `version` tells a releaser how to let go."""
    return PREFIX.pack(MAGIC, version, hold.uid, hold.generation, 0) + array(replies)


def last_version(ended: Ended) -> int:
    """The version for the last record of a hold."""
    if not ended.hold.live:
        return VERSION
    return HANDED_ON if ended.heir else LIVING


def is_last(data: bytes) -> bool:
    return data[:4] == MAGIC and len(data) >= PREFIX.size and data[PREFIX.size - 1] == 0


def owner(data: bytes, otherwise: int) -> int:
    """The uid in the prefix of a record of any version; `otherwise` without a prefix."""
    if data[:4] != MAGIC or len(data) < PREFIX.size:
        return otherwise
    uid: int = PREFIX.unpack_from(data)[2]
    return uid


def decode(data: bytes) -> tuple[Hold, tuple[str, ...], list[Reply], tuple[str, ...]]:
    """The record, the roles of the pidfds that came with the record, the replies, and the roles
    whose pidfds came with earlier records.

    Raises Unreadable; ValueError for noise."""
    if len(data) < PREFIX.size:
        raise ValueError("not a record: too short")
    magic, version, uid, generation, length = PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise ValueError("not a record of cprd")
    name = data[PREFIX.size : PREFIX.size + length].decode()
    if version not in (OLDEST, VERSION, LEANING, LIVING):
        raise Unreadable(f"a record of version {version}", uid, generation, name)
    try:
        content: dict[str, Any] = msgpack.unpackb(data[PREFIX.size + length :], raw=False)
        body, replies = content["hold"], [restored(one, name) for one in content["answers"]]
        last = _without_nonces(body) if version == OLDEST else b""
        hold = Hold(uid=uid, generation=generation, name=name, **body)
        if last and hold.phase == CLAIMED:  # version 1 kept the answer to a load nowhere else
            answer = {"generation": generation, "token": hold.token}
            at = hold.deadline - hold.lease
            replies.append(Reply(uid, last, answer, at, name=name))
        return hold, tuple(content["roles"]), replies, tuple(content.get("before", ()))
    except Exception as error:  # kept like a record of a newer version
        raise Unreadable(f"a record that cannot be read ({error})", uid, generation, name) from None


def _without_nonces(body: dict[str, Any]) -> bytes:
    """Take the fields of version 1 out of a record. Returns the nonce of the last request."""
    body.pop("born", None)
    last: bytes = body.pop("last", b"")
    return last


class _Cut(Exception):
    """A first record without its bundle: the slot was being drained."""


class Content:
    """What lies in a slot."""

    __slots__ = ("foreign", "in_flight", "inlet", "known", "records", "replies", "says_ended")

    def __init__(self, inlet: Socket | None = None) -> None:
        """`inlet`: of a pair, owned."""
        self.inlet = inlet
        self.records = 0
        self.says_ended = False  # the last record does
        self.foreign: Sequence[int] = ()  # read from an ended slot; owned
        self.in_flight = 0  # descriptors parked here
        self.known = NOBODY  # pidfds by role, as parked last
        self.replies: tuple[Reply, ...] = ()  # in the last record


class Slot(Socket):
    """The socket, or the outlet of the pair, which then owns the inlet.

    A hold at rest costs little memory: the content of a slot is in the queue, and read again when
    asked for."""

    __slots__ = ("_content", "uid")

    def __init__(self, family: int, kind: int, proto: int = 0, fileno: int | None = None) -> None:
        self._content: Content | None = None  # None: at rest
        self.uid = 0  # of the owner, once a record was written or read
        super().__init__(family, kind, proto, fileno)

    @classmethod
    def found(cls, fds: tuple[int, ...]) -> Slot:
        """A slot of an earlier daemon, (socket,) or (outlet, inlet), owned from now on."""
        kind = SOCK_DGRAM if len(fds) == 1 else SOCK_SEQPACKET
        slot = cls(AF_UNIX, kind, 0, fds[0])
        inlet = [Socket(AF_UNIX, kind, 0, fd) for fd in fds[1:]]
        for end in (slot, *inlet):
            end.setblocking(False)
        slot._content = Content(*inlet)
        return slot

    def rest(self) -> None:
        """Forget the content, where a later look at the first record tells all."""
        content = self._content
        if content is None or content.inlet is not None or content.foreign or content.says_ended:
            return
        # As a save has made it: without pidfds, and with a first answer, which was read if need be.
        if content.records == content.in_flight == len(content.replies) == 1:
            self._content = None

    @property
    def at_rest(self) -> bool:
        """Whether the queue has a single record, and the answer to the save in there."""
        return self._content is None

    @property
    def content(self) -> Content:
        content = self._content
        if content is None:
            content = Content()
            content.records = content.in_flight = 1
            content.replies = tuple(decode(self.recv(MAX_RECORD, MSG_PEEK))[2])[-IN_A_RECORD:]
            self._content = content
        return content

    @property
    def in_flight(self) -> int:
        """Descriptors parked here."""
        return 1 if self._content is None else self._content.in_flight

    @property
    def fds(self) -> tuple[int, ...]:
        """What a shelf parks, borrowed: the socket; or outlet and inlet."""
        content, fd = self._content, self.fileno()
        return (fd,) if content is None or content.inlet is None else (fd, content.inlet.fileno())

    @property
    def _tx(self) -> Socket:
        return self.content.inlet or self

    @classmethod
    def create(
        cls, hold: Hold, bundle: int, pidfds: Mapping[str, int], replies: Sequence[Reply] = ()
    ) -> Slot:
        """A slot with the first record. `bundle` and `pidfds` stay the caller's.

        Raises LimitExceeded; then nothing is left."""
        try:
            slot = loop(cls)
        except OSError as error:
            raise LimitExceeded(
                f"cprd has no descriptor left to hold with ({error.strerror}): raise LimitNOFILE="
                " of cprd.service, or drop holds"
            ) from None
        slot._content = Content()
        try:
            slot._append(hold, pidfds, replies, bundle)
        except BaseException:
            slot.close()
            raise
        return slot

    def append(self, hold: Hold, pidfds: Mapping[str, int], replies: Sequence[Reply] = ()) -> None:
        """Write the record anew. Raises SlotFull, LimitExceeded; then nothing has changed."""
        self._append(hold, pidfds, replies, -1)

    def _append(
        self, hold: Hold, pidfds: Mapping[str, int], replies: Sequence[Reply], bundle: int
    ) -> None:
        content = self.content
        every = (*content.replies, *replies)[-IN_A_RECORD:]
        wanted = {role: pidfds[role] for role in ROLES if pidfds.get(role, -1) >= 0}
        before = tuple(role for role, fd in wanted.items() if content.known.get(role, -1) == fd)
        roles = tuple(role for role in wanted if role not in before)
        fds = [wanted[role] for role in roles]
        if bundle >= 0:
            fds.insert(0, bundle)
        # Should this fail, a pidfd may be closed all the same, and the number be used anew.
        content.known = NOBODY
        try:
            send(content.inlet or self, encode(hold, roles, every, before), fds)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                raise SlotFull from None
            raise LimitExceeded(f"cprd cannot write its record: {error.strerror}") from None
        content.known = wanted or NOBODY
        content.in_flight += len(fds)
        content.records += 1
        self.uid = hold.uid
        content.replies = every
        point("slot:written")

    def grow(self) -> None:
        """Let more records fit, as far as net.core.wmem_max goes."""
        size = self._tx.getsockopt(SOL_SOCKET, SO_SNDBUF)
        self._tx.setsockopt(SOL_SOCKET, SO_SNDBUF, size)  # doubles it

    def mark_dead(
        self, hold: Hold, replies: Sequence[Reply] = (), *, version: int = VERSION
    ) -> None:
        """Say for good that the hold has ended, before anything is let go. `version`: see
        `encode_last`.

        Raises LimitExceeded; then nothing has changed."""
        every = (*self.content.replies, *replies)[-IN_A_RECORD:]
        data = encode_last(hold, every, version)
        for attempt in (1, 2):
            try:
                send(self._tx, data)
                break
            except OSError as error:
                if error.errno != errno.EAGAIN or attempt == 2:
                    why = f"cprd cannot write its record: {error.strerror}"
                    raise LimitExceeded(why) from None
                self.grow()
        self.content.replies = every
        self.content.says_ended = True
        point("slot:dead")

    def read(self) -> tuple[Hold | None, dict[str, int]]:
        """The last record, None when the hold has ended, and pidfds by role, which the caller owns,
        and keeps open as long as the hold names their roles: later records do not park them again.

        Reads the content and `uid`, too. Of an ended slot `foreign` keeps the bundle: a releaser of
        an earlier daemon may be draining the slot, and the copy here be the last. Raises
        Unreadable, ValueError; LimitExceeded when this process has no descriptor left to read
        with."""
        hold: Hold | None = None
        unreadable: Unreadable | ValueError | None = None
        pidfds: dict[str, int] = {}
        ended = False
        content = self._content = Content(self.content.inlet)
        try:
            for data, fds in records(self, MAX_RECORD):
                content.records += 1
                content.in_flight += len(fds)
                self.uid = owner(data, self.uid)
                try:
                    if is_last(data):
                        ended = True
                        self._read_last(data)
                    elif content.records == 1 and not fds:
                        ended = True  # the first record is gone: the slot was being drained
                    else:
                        hold = self._read_record(data, fds, pidfds)
                except _Cut:
                    ended = True
                except (Unreadable, ValueError) as error:
                    unreadable = unreadable or error
                finally:
                    first = content.records == 1
                    if first:
                        content.foreign = (*content.foreign, *fds)
                    close_all(() if first else fds)
            if unreadable is not None and not ended:
                raise unreadable
        except BaseException:
            close_all(pidfds.values())
            self._close_foreign()
            raise
        if ended:
            close_all(pidfds.values())
            return None, {}
        self._close_foreign()
        if hold is not None:
            known = {role: fd for role, fd in pidfds.items() if role in hold.roles}
            content.known = known or NOBODY
        return hold, pidfds

    def _read_record(self, data: bytes, fds: list[int], pidfds: dict[str, int]) -> Hold:
        """One record; the pidfds are taken out of `fds` into `pidfds`, which has those of earlier
        records. Raises _Cut, Unreadable, ValueError."""
        hold, roles, replies, before = decode(data)
        content = self.content
        if content.records == 1:
            if len(fds) != 1 + len(roles):
                raise _Cut
            content.foreign = (*content.foreign, fds.pop(0))
        if len(roles) != len(fds) or not pidfds.keys() >= set(before):
            raise ValueError("not the descriptors that the record describes")
        content.replies = tuple(replies)[-IN_A_RECORD:]
        over = [role for role in pidfds if role not in before]
        close_all([pidfds.pop(role) for role in over])
        pidfds.update(zip(roles, fds, strict=True))
        fds.clear()
        return hold

    def _read_last(self, data: bytes) -> None:
        try:
            stored = msgpack.unpackb(data[PREFIX.size :], raw=False)
            self.content.replies = tuple(restored(one) for one in stored)[-IN_A_RECORD:]
        except Exception:
            pass  # of another version

    def bundle(self) -> int:
        """A copy of the bundle's descriptor, which the caller owns."""
        _, fds, _ = receive(self, MAX_RECORD, MSG_PEEK)
        close_all(fds[1:])
        if not fds:
            raise LimitExceeded(
                "cprd has no descriptor left to serve with: raise LimitNOFILE= of cprd.service"
            )
        return fds[0]

    def give_away(self) -> tuple[int, list[int]]:
        """The outlet, and descriptors read from an ended slot, owned by the caller from now on.
        Draining the outlet lets go of all that the hold had, and blocks as long as a foreign file
        does."""
        point("slot:drain")
        content = self._content or Content()
        if content.inlet is not None:
            content.inlet.close()
        foreign, content.foreign = content.foreign, ()
        return self.detach(), list(foreign)

    def has_foreign(self, draining: Collection[int]) -> bool:
        """Whether descriptors of a client can be left in an ended slot that was read, and in no
        bundle with an inode in `draining`."""
        try:
            foreign = self.content.foreign
            return any(scm_fds(fd) and os.fstat(fd).st_ino not in draining for fd in foreign)
        except OSError:
            return True

    def _close_foreign(self) -> None:
        if self._content is not None:
            close_all(self._content.foreign)
            self._content.foreign = ()

    def close(self) -> None:
        """Close this process's copies; a shelf keeps its own."""
        self._close_foreign()
        if self._content is not None and self._content.inlet is not None:
            self._content.inlet.close()
        super().close()

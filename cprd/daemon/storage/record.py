"""The bytes of one record of a hold. No I/O.

A record is the whole hold anew, so that the last record of a generation counts, with the replies to
the request that made the record. `roles` names the parked pidfds by number (shelf.py).

A record begins with a prefix that is frozen for all versions (owner, generation, name). A cprd that
cannot read the rest still knows the owner, and can end the hold: a prefix without a name is the
last record, in every version. docs/bundle.md has the layout.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import msgpack

from cprd.daemon.releaser import HANDED_ON, LIVING
from cprd.protocol.lifecycle import CLAIMED, Hold
from cprd.protocol.registry import Ended
from cprd.protocol.replies import Reply, array, restored

MAGIC = b"CPRS"
VERSION = 6  # of records in a journal
# Records in slots (slot.py). 1 had no digests; 3 needs pidfds of earlier records; 4 is of a live
# hold. As last records 4 and 5, LIVING and HANDED_ON, say how a releaser lets go of a live hold.
IN_SLOTS = (1, 2, 3, LIVING)
PREFIX = struct.Struct("<4sHIQB")  # magic, version, uid, generation, bytes of the name that follows
MAX_RECORD = 8192
REPLIES_A_RECORD = 20  # of about 100 bytes each
_PREFIXED = ("uid", "generation", "name")
_BODY = tuple(name for name in Hold._fields if name not in (*_PREFIXED, "away"))
# Fields since then, which a record has only where they say something: the record is unreadable,
# and kept, for a cprd that does not know the field.
_SINCE = ("saver_uid", "live", "took", "deaths", "last_end")
_ADDED = {name: Hold._field_defaults[name] for name in _SINCE}
_body_of = attrgetter(*_BODY)
_pack = msgpack.Packer(use_bin_type=True).pack  # packb() makes a packer each time
_ROLES, _ANSWERS, _HOLD = (_pack(key) for key in ("roles", "answers", "hold"))
_MAP_OF_ROLES: bytes = b"\x83" + _ROLES
_NO_ROLES: bytes = _MAP_OF_ROLES + _pack({})


class Unreadable(Exception):
    """A record of another version, or an outdated record: `uid`, `generation` and `name` are known
    nevertheless."""

    def __init__(self, why: str, uid: int, generation: int, name: str) -> None:
        super().__init__(why)
        self.uid = uid
        self.generation = generation
        self.name = name


class Record(NamedTuple):
    """`roles`: numbers of pidfds by role; in slots the roles alone, of the pidfds that came with
    the record. `before`: roles whose pidfds came with earlier records of a slot."""

    hold: Hold
    roles: Any
    replies: list[Reply]
    before: tuple[str, ...] = ()


def encode(hold: Hold, roles: Mapping[str, int], replies: Sequence[Reply] = ()) -> bytes:
    """A record. `roles`: numbers of pidfds by role."""
    name = hold.name.encode()
    body = dict(zip(_BODY, _body_of(hold), strict=True))
    for field, default in _ADDED.items():
        if body[field] == default:
            del body[field]
    prefix = PREFIX.pack(MAGIC, VERSION, hold.uid, hold.generation, len(name))
    head = prefix + name + (_MAP_OF_ROLES + _pack(roles) if roles else _NO_ROLES)
    packed: bytes = head + _ANSWERS + array(replies) + _HOLD + _pack(body)
    return packed


def encode_last(uid: int, generation: int, replies: Sequence[Reply], version: int) -> bytes:
    """The record that ends a hold, in every version. `version` tells how to let go."""
    return PREFIX.pack(MAGIC, version, uid, generation, 0) + array(replies)


def reply_records(replies: Sequence[Reply]) -> Iterator[bytes]:
    """Records of replies alone: the end of no hold."""
    for at in range(0, len(replies), REPLIES_A_RECORD):
        yield encode_last(0, 0, replies[at : at + REPLIES_A_RECORD], VERSION)


def last_version(ended: Ended) -> int:
    """The version for the last record of a hold."""
    if not ended.hold.live:
        return VERSION
    return HANDED_ON if ended.heir else LIVING


class Prefix(NamedTuple):
    version: int
    uid: int
    generation: int
    is_last: bool


def prefix(data: bytes) -> Prefix | None:
    """The prefix of a record of any version; None for noise."""
    if data[:4] != MAGIC or len(data) < PREFIX.size:
        return None
    _, version, uid, generation, length = PREFIX.unpack_from(data)
    return Prefix(version, uid, generation, not length)


def last_replies(data: bytes) -> list[Reply]:
    """The replies in a last record; none where another version wrote something else."""
    try:
        return [restored(one) for one in msgpack.unpackb(data[PREFIX.size :], raw=False)]
    except Exception:
        return []


def decode(data: bytes) -> Record:
    """A record. Raises Unreadable; ValueError for noise."""
    if len(data) < PREFIX.size:
        raise ValueError("not a record: too short")
    magic, version, uid, generation, length = PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise ValueError("not a record of cprd")
    name = data[PREFIX.size : PREFIX.size + length].decode()
    if version not in (*IN_SLOTS, VERSION):
        why = f"a record of version {version}; this cprd reads version {VERSION}"
        raise Unreadable(why, uid, generation, name)
    try:
        content: dict[str, Any] = msgpack.unpackb(data[PREFIX.size + length :], raw=False)
        body, replies = content["hold"], [restored(one, name) for one in content["answers"]]
        last = _without_nonces(body) if version == 1 else b""
        hold = Hold(uid=uid, generation=generation, name=name, **body)
        if last and hold.phase == CLAIMED:  # version 1 kept the answer to a load nowhere else
            answer = {"generation": generation, "token": hold.token}
            at = hold.deadline - hold.lease
            replies.append(Reply(uid, last, answer, at, name=name))
        kind = tuple if version in IN_SLOTS else dict
        return Record(hold, kind(content["roles"]), replies, tuple(content.get("before", ())))
    except Exception as error:  # kept like a record of a newer version
        why = f"a record that cannot be read ({error}); this cprd reads version {VERSION}"
        raise Unreadable(why, uid, generation, name) from None


def _without_nonces(body: dict[str, Any]) -> bytes:
    """Take the fields of version 1 out of a record. Returns the nonce of the last request."""
    body.pop("born", None)
    last: bytes = body.pop("last", b"")
    return last

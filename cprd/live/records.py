"""The bytes of a live hold's records. Pure: no descriptor is touched here.

A record is one message of a SOCK_SEQPACKET queue, little endian:

    header   "CPRL", u16 version, u8 kind, u8 flags, u64 hold, u64 seq, u64 ordinal,
             u16 entries, u16 descriptors, u32 bytes of the whole record
    segment  CHANGE, SNAPSHOT   the entries; descriptors come in the order of their entries
    root     ATTACH   u32 id of a segment for each descriptor, then entries (deletions only)
             ROOT     u16 part, u16 parts, then as ATTACH

Entries lie in columns: u8 op, u64 birth, i32 id, u32 length of each value, the values, then the
names with NUL between. A hold has one nonce for life. `seq` grows over all records of a hold; the
highest seq of a key wins. `ordinal` counts the records of one queue without a gap. `birth` gives
the order of keys and stays with a key as long as the key is kept.

Flags: OWN, in a segment that is never read by its owner, for a copy of such a descriptor must not
be closed there. SNAPSHOT voids all records before itself in the same queue. The parts of a ROOT are
void until the last part is there, and void all records of the root before the first part then.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from itertools import repeat

from cprd.errors import Busy, Damaged

MAGIC, VERSION = b"CPRL", 1
CHANGE, SNAPSHOT, ATTACH, ROOT = 1, 2, 3, 4
OWN = 1  # a flag
HEADER = struct.Struct("<4sHBBQQQHHI")
BEGIN = struct.Struct("<4sHBBQ")
SINGLE = struct.Struct("<16sQQIIBQi")
"""A record with one entry, from the BEGIN of a header on: length and bytes of a value follow, if
the op has any, and the name."""
ENTRY = 18  # bytes of an entry, at most, besides name and value
ONE_WITH_FD, ONE_WITHOUT = 0x10001, 1
"""The numbers of entries and of descriptors in a SINGLE."""
LENGTH = struct.Struct("<I")
PART = struct.Struct("<HH")

MOST = 64 * 1024  # bytes of a record
MAX_NAME = 255  # bytes
MAX_ID = 1 << 31  # of a segment; a successor counts on
MAX_COUNT = 1 << 62  # seq, ordinal and birth; a successor counts on

# Spaces of keys.
FD, SECTION, MEMORY = 0, 1, 2

# Ops.
SAVE, RAW, PACKED, RAW_MEMFD, PACKED_MEMFD, MAPPED = 1, 2, 3, 4, 5, 6
DELETE = 8  # plus the space
SPACES = {
    SAVE: FD,
    RAW: SECTION,
    PACKED: SECTION,
    RAW_MEMFD: SECTION,
    PACKED_MEMFD: SECTION,
    MAPPED: MEMORY,
    DELETE + FD: FD,
    DELETE + SECTION: SECTION,
    DELETE + MEMORY: MEMORY,
}
CARRIES = frozenset((SAVE, RAW_MEMFD, PACKED_MEMFD, MAPPED))
"""The ops whose entry comes with a descriptor."""
VALUES = frozenset((RAW, PACKED))
"""The ops whose entry comes with a value."""

Key = tuple[int, bytes, int]
"""Space, name, id (0 but for descriptors)."""
Entry = tuple[int, int, Key, bytes]
"""Op, birth, key, value (empty where the op has none)."""


class Record:
    """One decoded record. `ids`: segments of a root's record; `part` of `parts`: of a ROOT."""

    __slots__ = (
        *("descriptors", "entries", "flags", "hold", "ids", "kind", "ordinal", "part", "parts"),
        "seq",
    )

    kind: int
    flags: int
    hold: int
    seq: int
    ordinal: int
    descriptors: int
    entries: list[Entry]
    ids: tuple[int, ...]
    part: int
    parts: int


def deletion(key: Key) -> Entry:
    """The entry that ends a key."""
    return (DELETE + key[0], 0, key, b"")


def entry_size(key: Key, value: bytes = b"") -> int:
    """How many bytes an entry adds to a record, at most."""
    return ENTRY + len(key[1]) + len(value)


def encode(
    kind: int,
    hold: int,
    seq: int,
    ordinal: int,
    entries: Sequence[Entry],
    descriptors: int,
    ids: Sequence[int] = (),
    part: tuple[int, int] | None = None,
    flags: int = 0,
) -> bytes:
    """One record. `ids` and `part` (k, m) belong to records of a root."""
    body = b""
    if ids or part:
        body = (PART.pack(*part) if part else b"") + struct.pack(f"<{len(ids)}I", *ids)
    body += _columns(entries)
    size = HEADER.size + len(body)
    count = len(entries)
    header = HEADER.pack(MAGIC, VERSION, kind, flags, hold, seq, ordinal, count, descriptors, size)
    return header + body


def _columns(entries: Sequence[Entry]) -> bytes:
    if not entries:
        return b""
    ops, births, keys, values = zip(*entries, strict=True)
    count = len(entries)
    packed = bytes(ops)
    columns = packed + struct.pack(f"<{count}Q{count}i", *births, *[key[2] for key in keys])
    if RAW in packed or PACKED in packed:
        with_value = [value for op, value in zip(ops, values, strict=True) if op in VALUES]
        columns += struct.pack(f"<{len(with_value)}I", *map(len, with_value))
        columns += b"".join(with_value)
    return columns + b"\0".join([key[1] for key in keys])


def ordinal_of(data: bytes) -> int:
    """The ordinal of a record that the process itself wrote; -1 for what is no record."""
    if len(data) < HEADER.size or data[:4] != MAGIC:
        return -1
    return int.from_bytes(data[24:32], "little")


def decode(data: bytes) -> Record:
    """One record, whoever wrote `data`. Looks at lengths before contents.

    Raises Damaged; Busy for a later version, which is whole for a program that can read it."""
    if len(data) < HEADER.size or data[:4] != MAGIC:
        raise Damaged("not a live hold: a record that does not begin with its header")
    fields = HEADER.unpack_from(data)
    _, version, kind, flags, hold, seq, ordinal, count, descriptors, size = fields
    if version != VERSION:
        raise Busy(
            f"a live hold of version {version}; this cprd reads version {VERSION}: upgrade the"
            " program that wants to read it"
        )
    if size != len(data) or size > MOST or flags > OWN or max(seq, ordinal) >= MAX_COUNT:
        raise Damaged("a live hold with a record whose header contradicts itself")
    record = Record()
    record.kind, record.flags, record.hold = kind, flags, hold
    record.seq, record.ordinal, record.descriptors = seq, ordinal, descriptors
    record.ids, record.part, record.parts = (), 0, 0
    at = HEADER.size
    if kind in (ATTACH, ROOT):
        at = _decode_ids(record, data)
    elif kind not in (CHANGE, SNAPSHOT):
        raise Damaged(f"a live hold with a record of the unknown kind {kind}")
    record.entries = _decode_columns(data, at, count)
    carried = sum([entry[0] in CARRIES for entry in record.entries])
    if carried != descriptors - len(record.ids):
        raise Damaged(f"a record says {descriptors} descriptors and describes {carried}")
    return record


def _decode_ids(record: Record, data: bytes) -> int:
    """Read what a root's record begins with; returns where the entries begin."""
    at, count = HEADER.size, record.descriptors
    if record.kind == ROOT:
        if len(data) < at + PART.size:
            raise Damaged("a root's record ends too early")
        record.part, record.parts = PART.unpack_from(data, at)
        if not 0 < record.part <= record.parts:
            raise Damaged("a root's record is a part of no whole")
        at += PART.size
    if len(data) < at + 4 * count:
        raise Damaged("a root's record ends too early")
    record.ids = struct.unpack_from(f"<{count}I", data, at)
    if any(id >= MAX_ID for id in record.ids):
        raise Damaged("a root's record with a segment beyond all numbers")
    return at + 4 * count


def _decode_columns(data: bytes, at: int, count: int) -> list[Entry]:
    if not count:
        if at != len(data):
            raise Damaged("a record with something behind its end")
        return []
    fixed = at + 13 * count
    if len(data) < fixed:
        raise Damaged("a record ends too early")
    ops = data[at : at + count]
    births = struct.unpack_from(f"<{count}Q", data, at + count)
    ids = struct.unpack_from(f"<{count}i", data, at + 9 * count)
    values, at = _decode_values(data, fixed, ops)
    names = data[at:].split(b"\0")
    if len(names) != count:
        raise Damaged(f"a record with {count} entries and {len(names)} names")
    if max(births) >= MAX_COUNT:
        raise Damaged("a record with a birth beyond all numbers")
    if ops.count(SAVE) == count:  # the usual case, in calls of C
        keys = [*zip(repeat(FD), names, ids)]
        _check_keys({name: (FD, name, 0) for name in names}.values())
        return [*zip(ops, births, keys, repeat(b""))]
    try:
        keys = [(SPACES[op], name, id) for op, name, id in zip(ops, names, ids, strict=True)]
    except KeyError as error:
        raise Damaged(f"a record with the unknown op {error}") from None
    _check_keys(keys)
    if not values:
        return [(op, birth, key, b"") for op, birth, key in zip(ops, births, keys, strict=True)]
    left = iter(values)
    return [
        (op, birth, key, next(left) if op in VALUES else b"")
        for op, birth, key in zip(ops, births, keys, strict=True)
    ]


def _decode_values(data: bytes, at: int, ops: bytes) -> tuple[list[bytes], int]:
    """The values of a record, and where its names begin."""
    count = ops.count(RAW) + ops.count(PACKED)
    if not count:
        return [], at
    if len(data) < at + 4 * count:
        raise Damaged("a record ends too early")
    lengths = struct.unpack_from(f"<{count}I", data, at)
    at += 4 * count
    if len(data) < at + sum(lengths):
        raise Damaged("a record ends too early")
    values = []
    for length in lengths:
        values.append(data[at : at + length])
        at += length
    return values, at


def _check_keys(keys: Iterable[Key]) -> None:
    for space, name, id in keys:
        if not 0 < len(name) <= MAX_NAME:
            raise Damaged("a record with a name that no key can have")
        if space != FD:
            if id:
                raise Damaged("a record with a section that has an id")
            try:
                name.decode()
            except UnicodeDecodeError:
                raise Damaged("a record with a section whose name is no UTF-8") from None

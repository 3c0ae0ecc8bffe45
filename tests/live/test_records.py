"""The bytes of records: vectors, and what is refused."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cprd import Busy, Damaged
from cprd.live.records import (
    ATTACH,
    BEGIN,
    CARRIES,
    CHANGE,
    DELETE,
    FD,
    HEADER,
    MAPPED,
    MEMORY,
    ONE_WITH_FD,
    PACKED,
    PACKED_MEMFD,
    RAW,
    RAW_MEMFD,
    ROOT,
    SAVE,
    SECTION,
    SINGLE,
    SNAPSHOT,
    Entry,
    decode,
    deletion,
    encode,
    ordinal_of,
)

VECTORS = {
    "one descriptor": (
        encode(CHANGE, 7, 9, 2, [(SAVE, 5, (FD, b"conn", -1), b"")], 1),
        "4350524c 0100 01 00 0700000000000000 0900000000000000 0200000000000000 0100 0100 39000000"
        "01 0500000000000000 ffffffff 636f6e6e",
    ),
    "value and deletion": (
        encode(
            *(SNAPSHOT, 1, 2, 3),
            [(RAW, 4, (SECTION, b"a", 0), b"xy"), deletion((FD, b"b", 6))],
            0,
        ),
        "4350524c 0100 02 00 0100000000000000 0200000000000000 0300000000000000 0200 0000 4b000000"
        "02 08 0400000000000000 0000000000000000 00000000 06000000 02000000 7879 61 00 62",
    ),
    "attach": (
        encode(ATTACH, 1, 2, 3, [deletion((MEMORY, b"m", 0))], 2, [16, 17]),
        "4350524c 0100 03 00 0100000000000000 0200000000000000 0300000000000000 0100 0200 3e000000"
        "10000000 11000000 0a 0000000000000000 00000000 6d",
    ),
    "root": (
        encode(ROOT, 1, 2, 3, [], 1, [255], part=(2, 3)),
        "4350524c 0100 04 00 0100000000000000 0200000000000000 0300000000000000 0000 0100 30000000"
        "0200 0300 ff000000",
    ),
    "own": (
        encode(CHANGE, 1, 2, 0, [(MAPPED, 1, (MEMORY, b"m", 0), b"")], 1, flags=1),
        "4350524c 0100 01 01 0100000000000000 0200000000000000 0000000000000000 0100 0100 36000000"
        "06 0100000000000000 00000000 6d",
    ),
}


@pytest.mark.parametrize("name", VECTORS)
def test_the_bytes_are_these(name: str) -> None:
    made, expected = VECTORS[name]
    assert made.hex() == expected.replace(" ", "")


def test_a_single_entry_is_the_same_in_one_step() -> None:
    key = (FD, b"conn", -1)
    begin = BEGIN.pack(b"CPRL", 1, CHANGE, 0, 7)
    made = SINGLE.pack(begin, 9, 2, ONE_WITH_FD, SINGLE.size + 4, SAVE, 5, -1)
    assert made + b"conn" == encode(CHANGE, 7, 9, 2, [(SAVE, 5, key, b"")], 1)


NAME = st.binary(min_size=1, max_size=255).filter(lambda name: b"\0" not in name)
TEXT = st.text(min_size=1, max_size=60).map(str.encode).filter(lambda name: b"\0" not in name)
BIRTH = st.integers(0, (1 << 62) - 1)
ENTRY: st.SearchStrategy[Entry] = st.one_of(
    st.tuples(
        st.just(SAVE),
        BIRTH,
        st.tuples(st.just(FD), NAME, st.integers(-(1 << 31), (1 << 31) - 1)),
        st.just(b""),
    ),
    st.tuples(
        st.sampled_from([RAW, PACKED]),
        BIRTH,
        st.tuples(st.just(SECTION), TEXT, st.just(0)),
        st.binary(max_size=300),
    ),
    st.tuples(
        st.sampled_from([RAW_MEMFD, PACKED_MEMFD, DELETE + SECTION]),
        BIRTH,
        st.tuples(st.just(SECTION), TEXT, st.just(0)),
        st.just(b""),
    ),
    st.tuples(
        st.sampled_from([MAPPED, DELETE + MEMORY]),
        BIRTH,
        st.tuples(st.just(MEMORY), TEXT, st.just(0)),
        st.just(b""),
    ),
)


@given(st.lists(ENTRY, max_size=40), st.integers(1, (1 << 64) - 1), BIRTH, BIRTH)
def test_what_is_encoded_is_decoded(
    entries: list[Entry], hold: int, seq: int, ordinal: int
) -> None:
    carried = sum(entry[0] in CARRIES for entry in entries)
    data = encode(SNAPSHOT, hold, seq, ordinal, entries, carried)
    record = decode(data)
    assert (record.hold, record.seq, record.ordinal) == (hold, seq, ordinal)
    assert record.entries == entries
    assert ordinal_of(data) == ordinal


@settings(max_examples=300)
@given(st.sampled_from([made for made, _ in VECTORS.values()]), st.data())
def test_spoilt_records_are_damaged_or_still_records(data: bytes, draw: st.DataObject) -> None:
    """No other exception comes of any bytes, and nothing grows beyond them."""
    spoilt = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 4))):
        spoilt[draw.draw(st.integers(0, len(spoilt) - 1))] = draw.draw(st.integers(0, 255))
    cut = bytes(spoilt[: draw.draw(st.integers(0, len(spoilt)))])
    for candidate in (bytes(spoilt), cut, bytes(spoilt) + b"x"):
        try:
            record = decode(candidate)
        except Busy:  # Damaged is one
            continue
        assert len(record.entries) + len(record.ids) <= len(candidate)


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (b"", "begin"),
        (b"CPRX" + bytes(60), "begin"),
        (VECTORS["root"][0][:-1], "contradicts"),
        (encode(9, 1, 2, 3, [], 0), "unknown kind"),
        (encode(CHANGE, 1, 2, 3, [], 1), "says 1 descriptors and describes 0"),
        (encode(CHANGE, 1, 1 << 63, 3, [], 0), "contradicts"),
        (encode(CHANGE, 1, 2, 3, [(7, 1, (FD, b"a", 0), b"")], 0), "unknown op"),
        (encode(CHANGE, 1, 2, 3, [(SAVE, 1, (FD, b"a" * 256, 0), b"")], 1), "name"),
        (encode(CHANGE, 1, 2, 3, [(SAVE, 1, (FD, b"", 0), b"")], 1), "name"),
        (encode(CHANGE, 1, 2, 3, [(RAW, 1, (SECTION, b"\xff", 0), b"")], 0), "UTF-8"),
        (encode(CHANGE, 1, 2, 3, [(RAW, 1, (SECTION, b"s", 3), b"")], 0), "has an id"),
        (encode(CHANGE, 1, 2, 3, [(SAVE, 1 << 63, (FD, b"a", 0), b"")], 1), "birth"),
        (encode(ROOT, 1, 2, 3, [], 0, part=(3, 2)), "no whole"),
        (encode(ROOT, 1, 2, 3, [], 1, [1 << 31], part=(1, 1)), "beyond all numbers"),
        (HEADER.pack(b"CPRL", 1, CHANGE, 0, 1, 2, 3, 900, 0, HEADER.size + 1) + b"\x01", "early"),
        (HEADER.pack(b"CPRL", 1, ATTACH, 0, 1, 2, 3, 0, 900, HEADER.size), "early"),
    ],
)
def test_what_contradicts_itself_is_damaged(made: bytes, why: str) -> None:
    with pytest.raises(Damaged, match=why):
        decode(made)


def test_a_length_beyond_the_record_is_damaged() -> None:
    made = bytearray(VECTORS["value and deletion"][0])
    at = HEADER.size + 2 * 13
    assert struct.unpack_from("<I", made, at) == (2,)
    struct.pack_into("<I", made, at, 1 << 31)
    with pytest.raises(Damaged, match="early"):
        decode(bytes(made))


def test_a_later_version_is_whole_for_another_program() -> None:
    with pytest.raises(Busy, match="version 2") as caught:
        decode(HEADER.pack(b"CPRL", 2, CHANGE, 0, 1, 2, 3, 0, 0, HEADER.size))
    assert not isinstance(caught.value, Damaged)

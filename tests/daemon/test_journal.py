"""The journal: torn at any byte, damaged anywhere, moved over and over."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from cprd.daemon.storage import journal
from cprd.daemon.storage.journal import Journal
from cprd.daemon.storage.record import MAX_RECORD
from cprd.errors import LimitExceeded

RECORDS = [b"a", b"b" * 300, b"c" * 8, b"d" * MAX_RECORD, b"e" * 41]

pytestmark = pytest.mark.usefixtures("nothing_leaks")


@pytest.fixture
def written() -> Iterator[tuple[Journal, list[int]]]:
    """A journal of RECORDS, and the places."""
    one = Journal.create()
    yield one, [one.append(record) for record in RECORDS]
    one.close()


def again(fd: int, *, append: bool = True) -> tuple[list[bytes], str]:
    """What the next daemon reads, and why not all."""
    other = Journal(os.dup(fd))
    try:
        read = [(at, record) for at, record, is_whole in other.records() if is_whole]
        assert all(other.read(at) == record for at, record in read)
        if append and not other.strange:
            at = other.append(b"later")
            assert list(other.records()) == [(*one, True) for one in (*read, (at, b"later"))]
        return [record for _, record in read], other.strange
    finally:
        other.close()


def test_a_record_that_is_torn_at_any_byte_was_never_written(
    written: tuple[Journal, list[int]],
) -> None:
    one, places = written
    whole = os.pread(one.fd, 1 << 20, 0)
    for index, (begin, end) in enumerate(zip(places, [*places[1:], one.end], strict=True)):
        last = end - (-len(RECORDS[index]) % 8)
        for cut in {*range(begin, min(begin + 40, last)), *range(max(begin, last - 9), last)}:
            os.ftruncate(one.fd, 0)
            os.pwrite(one.fd, whole[:cut], 0)
            assert again(one.fd) == (RECORDS[:index], ""), (index, cut)


def test_damage_in_a_record_loses_that_one_and_is_said(
    written: tuple[Journal, list[int]],
) -> None:
    one, places = written
    os.pwrite(one.fd, b"?", places[1] + 20)
    read, why = again(one.fd)
    assert read == [RECORDS[0], *RECORDS[2:]]
    assert f"damaged at {places[1]}" in why


def test_damage_in_a_length_is_said_and_nothing_in_a_record_is_taken_for_one() -> None:
    """A client chooses bytes within records."""
    forged = Journal.create()
    forged.append(b"forged")
    frame = os.pread(forged.fd, 1 << 10, 0)
    forged.close()
    one = Journal.create()
    one.append(b"before")
    at = one.append(frame * 100)
    one.append(b"x" * MAX_RECORD)
    os.pwrite(one.fd, b"\0\0\0\1", at)
    read, why = again(one.fd)
    assert read == [b"before"]
    assert "damaged" in why
    one.close()


def test_a_journal_that_is_moved_keeps_what_counts_and_frees_the_rest() -> None:
    one = Journal.create()
    at = one.append(b"counts")
    for turn in range(30):
        while not one.is_worn:
            one.append(b"outdated" * 100)
        start = one.begin_move()
        assert again(one.fd, append=False)[1] == "", turn  # killed here: all is there
        at = one.append(one.read(at))
        one.end_move(start)
        assert again(one.fd, append=False) == ([b"counts"], "")
        assert os.fstat(one.fd).st_blocks * 512 <= 3 * 4096
        assert one.end > turn * journal.MANY_BYTES
    one.close()


def test_no_room_for_a_record_leaves_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Journal.create()
    one.append(b"first")
    short = os.pwrite
    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", lambda fd, data, at: short(fd, data[:9], at))
        with pytest.raises(LimitExceeded, match="no memory is left"):
            one.append(b"second" * 100)
    assert again(one.fd) == ([b"first"], "")
    one.close()

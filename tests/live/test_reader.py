"""What a reader makes of queues that somebody else filled, or spoilt."""

from __future__ import annotations

import _socket
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from cprd import Busy, Damaged
from cprd.linux.rights import SO_PEEK_OFF, close_all, send
from cprd.live import reader
from cprd.live.queue import make_pair
from cprd.live.reader import read
from cprd.live.records import (
    ATTACH,
    CHANGE,
    FD,
    HEADER,
    MAPPED,
    MEMORY,
    PACKED_MEMFD,
    RAW,
    ROOT,
    SAVE,
    SECTION,
    SNAPSHOT,
    Entry,
    deletion,
    encode,
)
from tests.live.owning import fenced
from tests.support.descriptors import open_fds
from tests.support.patience import patience

pytestmark = pytest.mark.usefixtures("nothing_leaks")
KEY = (FD, b"c", 0)
ONE: Entry = (SAVE, 1, KEY, b"")


class Queues:
    """A root and segments, filled by hand."""

    def __init__(self) -> None:
        self.tx, self.rx = make_pair()
        self.fd = os.eventfd(0)
        self._open: list[_socket.socket] = [self.tx, self.rx]

    def segment(self, *records: bytes) -> int:
        tx, rx = make_pair()
        self._open += [tx, rx]
        for record in records:
            count = HEADER.unpack_from(record)[8] if record[:4] == b"CPRL" else 0
            send(tx, record, [self.fd] * count)
        return rx.fileno()

    def root(self, record: bytes, fds: list[int]) -> None:
        send(self.tx, record, fds)

    def attach(self, seq: int, ordinal: int, *segments: int, hold: int = 1) -> None:
        ids = [seq * 10 + number for number in range(len(segments))]
        self.root(encode(ATTACH, hold, seq, ordinal, [], len(ids), ids), [*segments])

    def read(self) -> list[tuple[str, int]]:
        found = read(self.rx.fileno())
        keys = [(name, id) for name, id, _ in found.state.fds()]
        found.state.close()
        found.close()
        return keys

    def close(self) -> None:
        for end in self._open:
            end.close()
        close_all([self.fd])


@pytest.fixture
def queues() -> Iterator[Queues]:
    made = Queues()
    yield made
    made.close()


def change(seq: int, ordinal: int, *entries: Entry, kind: int = CHANGE, hold: int = 1) -> bytes:
    carried = sum(entry[0] in (SAVE, MAPPED, PACKED_MEMFD) for entry in entries)
    return encode(kind, hold, seq, ordinal, entries, carried)


def key(id: int, birth: int = 1) -> Entry:
    return (SAVE, birth, (FD, b"c", id), b"")


def test_the_highest_seq_of_a_key_wins(queues: Queues) -> None:
    one = queues.segment(change(5, 0, key(1, 3), key(2, 2)), change(9, 1, key(4, 1)))
    two = queues.segment(change(7, 0, deletion((FD, b"c", 1)), key(3, 9), key(2, 8)))
    queues.attach(1, 0, one, two)
    assert queues.read() == [("c", 4), ("c", 2), ("c", 3)]


def test_a_snapshot_voids_what_is_before_it(queues: Queues) -> None:
    records = [change(2, 4, key(1)), change(3, 5, key(2), kind=SNAPSHOT), change(4, 6, key(3, 2))]
    queues.attach(1, 0, queues.segment(*records))
    assert queues.read() == [("c", 2), ("c", 3)]


def test_a_root_counts_when_its_last_part_is_there(queues: Queues) -> None:
    old, one, two = (queues.segment(change(5 + n, 0, key(n))) for n in range(3))
    queues.attach(1, 0, old)
    queues.root(encode(ROOT, 1, 2, 1, [], 1, [50], part=(1, 2)), [one])
    copy = Queues()
    assert queues.read() == [("c", 0)]
    for ordinal, ended in ((0, []), (1, [deletion((FD, b"c", 2))])):
        data = encode(ROOT, 1, 20 + ordinal, ordinal, ended, 1, [ordinal], part=(ordinal + 1, 2))
        copy.root(data, [one if ordinal == 0 else two])
    assert copy.read() == [("c", 1)]
    copy.close()


def test_parts_in_disorder_are_void(queues: Queues) -> None:
    one, two = queues.segment(change(5, 0, key(1))), queues.segment(change(6, 0, key(2)))
    queues.attach(1, 0, one)
    queues.root(encode(ROOT, 1, 2, 1, [], 1, [60], part=(2, 2)), [two])
    assert queues.read() == [("c", 1)]


SPOILT = {
    "garbage": [b"x" * 70],
    "another hold": [change(2, 0, key(1), hold=2)],
    "a gap": [change(2, 0, key(1)), change(3, 2, key(2))],
    "seq goes back": [change(5, 0, key(1)), change(4, 1, key(2))],
    "a root's record": [encode(ATTACH, 1, 2, 0, [], 1, [1])],
    "too long": [change(2, 0, (RAW, 1, (SECTION, b"s", 0), b"x" * 65_600))],
    "says more descriptors": [encode(CHANGE, 1, 2, 0, [], 1)],
    "a section that is no memfd": [change(2, 0, (PACKED_MEMFD, 1, (SECTION, b"s", 0), b""))],
    "memory that is no memfd": [change(2, 0, (MAPPED, 1, (MEMORY, b"m", 0), b""))],
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_spoilt_is_damaged(queues: Queues, name: str) -> None:
    good = queues.segment(change(50, 0, key(9)))
    queues.attach(1, 0, good, queues.segment(*SPOILT[name]))
    before = open_fds()
    with pytest.raises(Damaged):
        queues.read()
    assert open_fds() == before


def test_a_record_that_lacks_descriptors_is_damaged(queues: Queues) -> None:
    tx, rx = make_pair()
    send(tx, change(2, 0, key(1), key(2, 2)), [queues.fd])
    queues.attach(1, 0, rx.fileno())
    with pytest.raises(Damaged, match="without all its descriptors"):
        queues.read()
    tx.close()
    rx.close()


@pytest.mark.parametrize("what", ["file", "stream", "tcp", "eventfd"])
def test_what_is_no_queue_is_damaged(queues: Queues, what: str) -> None:
    with open("/dev/null") as file, socket.socket(socket.AF_UNIX) as stream, socket.socket() as tcp:
        fd = {"file": file.fileno(), "stream": stream.fileno(), "tcp": tcp.fileno()}.get(what)
        queues.attach(1, 0, queues.fd if fd is None else fd)
        with pytest.raises(Damaged, match=r"no queue|no SEQPACKET"):
            queues.read()
        for copy in fenced(queues.rx.fileno()):
            os.close(copy)


def test_a_later_version_is_not_damaged(queues: Queues) -> None:
    later = bytearray(change(2, 0, key(1)))
    later[4] = 2
    queues.attach(1, 0, queues.segment(bytes(later)))
    with pytest.raises(Busy, match="version 2") as caught:
        queues.read()
    assert not isinstance(caught.value, Damaged)


def test_a_cursor_that_somebody_moves_ends_in_words(queues: Queues) -> None:
    """The offset of peeking belongs to the socket: whoever else has the socket can set it."""
    segment = queues.segment(*(change(2 + n, n, key(n)) for n in range(40)))
    queues.attach(1, 0, segment)
    other = socket.socket(fileno=os.dup(segment))
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            other.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, -1)

    thread = threading.Thread(target=disturb)
    thread.start()
    before = open_fds()
    try:
        for _ in range(5):
            try:
                assert len(queues.read()) == 40
            except Damaged:
                pass
            assert open_fds() == before
    finally:
        stop.set()
        thread.join()
        other.close()


def test_nobody_can_append_once_it_is_read(queues: Queues) -> None:
    tx, rx = make_pair()
    send(tx, change(2, 0, ONE), [queues.fd])
    queues.attach(1, 0, rx.fileno())
    assert queues.read() == [("c", 0)]
    for end in (tx, queues.tx):
        with pytest.raises(BrokenPipeError):
            send(end, change(3, 1, key(5)), [queues.fd])
    assert queues.read() == [("c", 0)]
    tx.close()
    rx.close()


@pytest.mark.timeout(120)
def test_a_queue_that_stays_out_of_order_delays_its_reader_for_a_moment_only(
    queues: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads the hold of another uid reads what that uid made: a pass can be long."""
    monkeypatch.setattr(reader, "RETRIES", 1 << 40)
    one = queues.segment(change(2, 0, key(1)), change(3, 5, key(2)))
    queues.attach(1, 0, one)
    begin = time.monotonic()
    with pytest.raises(Damaged, match="segment 10 of a live hold lacks a record"):
        queues.read()
    assert time.monotonic() - begin < reader.LONGEST + patience(2)

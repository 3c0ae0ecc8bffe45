"""What each version of the records looked like, byte for byte, as that cprd wrote them.

Any later cprd has to read these: they lie in the store of a machine that is upgraded. So do not
write them anew when a format changes: add what the new version writes, and keep reading these.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

import cprd
from cprd.bundle import inspect, layout
from cprd.bundle.unpack import unpack
from cprd.daemon.releasing import Releasing
from cprd.daemon.storage import record, shelf
from cprd.daemon.storage.journal import Journal
from cprd.daemon.storage.shelves import Keeper
from cprd.linux.memfd import SEALS
from cprd.linux.rights import close_all, scm_fds
from cprd.protocol.lifecycle import CLAIMED, HELD, IN_DOUBT, UNREADABLE, Hold, changed
from cprd.protocol.replies import Replies, Reply
from tests.support.bundles import pack
from tests.support.patience import PATIENCE

BUNDLE = bytes.fromhex("435052420100010002000000020000000d000000000000000000000000000000")
MANIFEST = bytes.fromhex(
    """
    83a873656374696f6e739294a5776f726473c300c40881a574616c6c792a94a3726177c200c4056279746573
    a3696473c60000000403000000a56e616d6573c6000000056576656e74
    """
)
# Before `parked` was written.
EARLY_RECORD = bytes.fromhex(
    """
    435052530100e803000001002a36fe9c97170477c3a96283a5726f6c657390a7616e73776572739184a37569
    64cd03e8a56e6f6e6365c41062626262626262626262626262626262a6616e7377657282aa67656e65726174
    696f6ecf17979cfe362a0001a5746f6b656ec400a26174cb408f420000000000a4686f6c64de0014a5706861
    7365a468656c64a366647301a473697a6507a763726561746564cb408f420000000000a765787069726573cb
    409f420000000000a874746c5f6c656674c0a8617474656d70747301ab6c6173745f72656a656374a26e6fa6
    726561736f6ea0a57361766572cd1092aa61667465725f65786974ffa8636c61696d616e7400ad6c6173745f
    636c61696d616e74cd1093a5746f6b656ec400a56c65617365cb0000000000000000a8646561646c696e65cb
    0000000000000000a6616374696e6700a5626567756ec2a4626f726ec4106262626262626262626262626262
    6262a46c617374c4106c6c6c6c6c6c6c6c6c6c6c6c6c6c6c6c
    """
)
HELD_RECORD = bytes.fromhex(
    """
    435052530100e803000001002a36fe9c97170477c3a96283a5726f6c657390a7616e73776572739184a37569
    64cd03e8a56e6f6e6365c41062626262626262626262626262626262a6616e7377657282aa67656e65726174
    696f6ecf17979cfe362a0001a5746f6b656ec400a26174cb408f420000000000a4686f6c64de0015a5706861
    7365a468656c64a366647301a473697a6507a763726561746564cb408f420000000000a765787069726573cb
    409f420000000000a874746c5f6c656674c0a8617474656d70747301ab6c6173745f72656a656374a26e6fa6
    726561736f6ea0a57361766572cd1092aa61667465725f65786974ffa8636c61696d616e7400ad6c6173745f
    636c61696d616e74cd1093a5746f6b656ec400a56c65617365cb0000000000000000a8646561646c696e65cb
    0000000000000000a6616374696e6700a67061726b656402a5626567756ec2a4626f726ec410626262626262
    62626262626262626262a46c617374c4106c6c6c6c6c6c6c6c6c6c6c6c6c6c6c6c
    """
)
DOUBT_RECORD = bytes.fromhex(
    """
    435052530100e803000001002a36fe9c97170477c3a96283a5726f6c657393aa61667465725f65786974a863
    6c61696d616e74a6616374696e67a7616e73776572739284a3756964cd03e8a56e6f6e6365c4106262626262
    6262626262626262626262a6616e7377657282aa67656e65726174696f6ecf17979cfe362a0001a5746f6b65
    6ec400a26174cb408f42000000000084a3756964cd03e8a56e6f6e6365c4104c4c4c4c4c4c4c4c4c4c4c4c4c
    4c4c4ca6616e7377657280a26174cb408f900000000000a4686f6c64de0015a57068617365a8696e2d646f75
    6274a366647301a473697a6507a763726561746564cb408f420000000000a765787069726573c0a874746c5f
    6c656674cb404e000000000000a8617474656d70747302ab6c6173745f72656a656374a26e6fa6726561736f
    6ea5626567756ea57361766572cd1092aa61667465725f65786974cd1092a8636c61696d616e74cd1093ad6c
    6173745f636c61696d616e7400a5746f6b656ec41074747474747474747474747474747474a56c65617365cb
    403e000000000000a8646561646c696e65cb0000000000000000a6616374696e67cd1094a67061726b656402
    a5626567756ec3a4626f726ec41062626262626262626262626262626262a46c617374c4104c4c4c4c4c4c4c
    4c4c4c4c4c4c4c4c4c
    """
)
LAST_RECORD = bytes.fromhex(
    """
    435052530100e803000001002a36fe9c9717009184a3756964cd03e8a56e6f6e6365c4106262626262626262
    6262626262626262a6616e7377657282aa67656e65726174696f6ecf17979cfe362a0001a5746f6b656ec400
    a26174cb408f420000000000
    """
)
CLAIMED_RECORD_2 = bytes.fromhex(
    """
    435052530200e803000001002a36fe9c97170477c3a96283a5726f6c657391a8636c61696d616e74a7616e73
    776572739285a3756964cd03e8a56e6f6e6365c41062626262626262626262626262626262a6616e73776572
    82aa67656e65726174696f6ecf17979cfe362a0001a5746f6b656ec400a26174cb408f420000000000a66469
    67657374c4107373737373737373737373737373737385a3756964cd03e8a56e6f6e6365c4106c6c6c6c6c6c
    6c6c6c6c6c6c6c6c6c6ca6616e7377657282aa67656e65726174696f6ecf17979cfe362a0001a5746f6b656e
    c41074747474747474747474747474747474a26174cb408f680000000000a6646967657374c4106464646464
    6464646464646464646464a4686f6c64de0013a57068617365a7636c61696d6564a366647301a473697a6507
    a763726561746564cb408f420000000000a765787069726573cb409f420000000000a874746c5f6c656674c0
    a8617474656d70747301ab6c6173745f72656a656374a26e6fa6726561736f6ea0a57361766572cd1092aa61
    667465725f65786974ffa8636c61696d616e74cd1094ad6c6173745f636c61696d616e74cd1093a5746f6b65
    6ec41074747474747474747474747474747474a56c65617365cb403e000000000000a8646561646c696e65cb
    40902c0000000000a6616374696e6700a67061726b656402a5626567756ec2
    """
)
LAST_RECORD_2 = bytes.fromhex(
    """
    435052530200e803000001002a36fe9c9717009185a3756964cd03e8a56e6f6e6365c4106262626262626262
    6262626262626262a6616e7377657282aa67656e65726174696f6ecf17979cfe362a0001a5746f6b656ec400
    a26174cb408f420000000000a6646967657374c41073737373737373737373737373737373
    """
)
SHELF_HEADER = bytes.fromhex("4350524801006881a66e756d62657207")
SHELF_SLOTS = bytes.fromhex("4350524801007381a16e01")
SHELF_LOOPS = bytes.fromhex("4350524801006c81a16e01")
SHELF_OUTCOMES = bytes.fromhex(
    """
    4350524801006f81a3616c6c9185a3756964cd03e8a56e6f6e6365c410626262626262626262626262626262
    62a6616e7377657282aa67656e65726174696f6ecf17979cfe362a0001a5746f6b656ec400a26174cb408f42
    0000000000aa67656e65726174696f6ecf17979cfe362a0001
    """
)
SHELF_COMPLETE = bytes.fromhex("4350524801006381a87265706c61636573920304")

CLAIMED_RECORD_6 = bytes.fromhex(
    """
    435052530600e803000001002a36fe9c97170477c3a96283a5726f6c657381a8636c61696d616e7405a7616e
    73776572739185a3756964cd03e8a56e6f6e6365c4106c6c6c6c6c6c6c6c6c6c6c6c6c6c6c6ca6616e737765
    7282aa67656e65726174696f6ecf17979cfe362a0001a5746f6b656ec4107474747474747474747474747474
    7474a26174cb408f680000000000a6646967657374c41064646464646464646464646464646464a4686f6c64
    de0013a57068617365a7636c61696d6564a366647301a473697a6507a763726561746564cb408f4200000000
    00a765787069726573cb409f420000000000a874746c5f6c656674c0a8617474656d70747301ab6c6173745f
    72656a656374a26e6fa6726561736f6ea0a57361766572cd1092aa61667465725f65786974ffa8636c61696d
    616e74cd1094ad6c6173745f636c61696d616e74cd1093a5746f6b656ec41074747474747474747474747474
    747474a56c65617365cb403e000000000000a8646561646c696e65cb40902c0000000000a6616374696e6700
    a67061726b656402a5626567756ec2
    """
)
LAST_RECORD_6 = bytes.fromhex(
    """
    435052530600e803000001002a36fe9c9717009185a3756964cd03e8a56e6f6e6365c4106262626262626262
    6262626262626262a6616e7377657282aa67656e65726174696f6ecf17979cfe362a0001a5746f6b656ec400
    a26174cb408f420000000000a6646967657374c41073737373737373737373737373737373
    """
)
SHELF_HEADER_2 = bytes.fromhex("4350524802006881a66e756d62657207")
SHELF_QUEUES = bytes.fromhex("4350524802007101002a36fe9c9717e8030000")
SHELF_PIDFDS = bytes.fromhex("4350524802007001002a36fe9c97170500000000000000")
SHELF_COMPLETE_2 = bytes.fromhex("4350524802006381a87265706c61636573920304")
JOURNAL = bytes.fromhex("7d000000035ff303") + LAST_RECORD_6 + bytes(3)

GENERATION = 1_700_000_000_000_000_001
COMMON: dict[str, Any] = {
    **{"uid": 1000, "name": "w\u00e9b", "generation": GENERATION, "fds": 1, "size": 7, "parked": 2},
    **{"created": 1000.25, "last_reject": "no", "saver": 4242},
}
HELD_HOLD = Hold(phase=HELD, expires=2000.5, attempts=1, last_claimant=4243, **COMMON)
DOUBT_HOLD = Hold(
    phase=IN_DOUBT,
    ttl_left=60.0,
    attempts=2,
    reason="begun",
    after_exit=4242,
    claimant=4243,
    token=b"t" * 16,
    lease=30.0,
    acting=4244,
    begun=True,
    **COMMON,
)
SAVED = Reply(1000, b"b" * 16, {"generation": GENERATION, "token": b""}, 1000.25)
BEGUN = Reply(1000, b"L" * 16, {}, 1010.0)
OUTCOME = SAVED.about(GENERATION)
LOADED = Reply(1000, b"l" * 16, {"generation": GENERATION, "token": b"t" * 16}, 1005.0)
CLAIMED_HOLD = changed(
    HELD_HOLD, phase=CLAIMED, claimant=4244, token=b"t" * 16, lease=30.0, deadline=1035.0
)
DIGESTED = [
    Reply(reply.uid, reply.nonce, reply.answer, reply.at, digest)
    for reply, digest in ((SAVED, b"s" * 16), (LOADED, b"d" * 16))
]

pytestmark = pytest.mark.usefixtures("nothing_leaks")
Pair = tuple[socket.socket, socket.socket]


def queue(*messages: tuple[bytes, Sequence[int]]) -> Pair:
    """(outlet, inlet) of a queue with these messages."""
    inlet, outlet = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for data, fds in messages:
        socket.send_fds(inlet, [data], fds)
    return outlet, inlet


@pytest.fixture
def held() -> Iterator[int]:
    """A bundle of version 1, with an eventfd of 7 in it."""
    event = os.eventfd(7)
    manifest = os.memfd_create("manifest", os.MFD_ALLOW_SEALING)
    os.write(manifest, MANIFEST)
    fcntl.fcntl(manifest, fcntl.F_ADD_SEALS, SEALS)
    outlet, inlet = queue((BUNDLE, [manifest, event]))
    inlet.close()
    os.close(manifest)
    os.close(event)
    with outlet:
        yield outlet.fileno()


def check(fd: int) -> None:
    """That it is the state which was saved."""
    inspect.check(fd, 2)
    state = unpack(fd)
    assert dict(state) == {"words": {"tally": 42}, "raw": b"bytes"}
    assert os.eventfd_read(state.find_fd("event", 3)) == 7
    os.eventfd_write(state.find_fd("event", 3), 7)
    state.close()


def test_a_bundle_of_version_1_is_read(held: int) -> None:
    check(held)


def test_a_shelf_of_version_1_is_adopted_with_all_that_lies_on_it(held: int) -> None:
    pidfds = [os.pidfd_open(os.getpid()) for _ in range(3)]
    going = queue((HELD_RECORD, [held]), (DOUBT_RECORD, pidfds))
    ended = queue((HELD_RECORD, [held]), (LAST_RECORD, []))
    for fd in pidfds:
        os.close(fd)
    old = queue((SHELF_HEADER, []), (SHELF_COMPLETE, []))
    new = queue(
        (SHELF_HEADER, []),
        (SHELF_SLOTS, [end.fileno() for end in ended]),
        (SHELF_SLOTS, [end.fileno() for end in going]),
        (SHELF_OUTCOMES, []),
        (SHELF_COMPLETE, []),
    )
    for end in (*going, *ended):
        end.close()
    releasing = Releasing()
    replies = Replies()
    keeper = Keeper(releasing, lambda: 1020.0, replies)
    found, blind = keeper.adopt({3: old, 7: new}, frozenset((3, 7)))
    assert not blind
    ((hold, roles),) = found
    assert hold == DOUBT_HOLD
    assert sorted(roles) == ["acting", "after_exit", "claimant"]
    for fd in roles.values():
        assert "pidfd" in os.readlink(f"/proc/self/fd/{fd}")
        os.close(fd)
    assert replies.pending(1020.0) in ([OUTCOME, BEGUN], [SAVED, BEGUN])
    assert keeper.shelf.number == 7
    assert not keeper.untouchable
    assert not [one for one in keeper.shelves() if one.number == 3]
    check(keeper.bundle(GENERATION))
    deadline = time.monotonic() + PATIENCE
    while releasing.blocked():
        assert time.monotonic() < deadline, "not released"
        releasing.collect()
    # The next cprd finds the same, without slots that count.
    again = Keeper(releasing, lambda: 1020.0, Replies())
    ((hold, roles),) = again.adopt(
        {one.number: (one.outlet.dup(), one.tx.dup()) for one in keeper.shelves()}, frozenset((7,))
    )[0]
    assert hold == DOUBT_HOLD
    assert sorted(roles) == ["acting", "after_exit", "claimant"]
    close_all(roles.values())
    check(again.bundle(GENERATION))
    assert {reply.nonce for reply in again.replies} == {reply.nonce for reply in replies}
    for one in (keeper, again):
        one.close()


@pytest.mark.parametrize("one_socket", [True, False])
def test_slots_of_one_socket_and_of_two_lie_on_one_shelf(held: int, one_socket: bool) -> None:
    """Pairs of before, and sockets connected to themselves; both end, and free what they had."""
    pair = queue((HELD_RECORD, [held]))
    alone = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    alone.bind("")
    alone.connect(alone.getsockname())
    socket.send_fds(alone, [HELD_RECORD], [held])
    slots = [*([] if one_socket else [(SHELF_SLOTS, [end.fileno() for end in pair])])]
    slots += [(SHELF_LOOPS, [alone.fileno()])] if one_socket else []
    old = queue((SHELF_HEADER, []), *slots, (SHELF_COMPLETE, []))
    releasing = Releasing()
    keeper = Keeper(releasing, lambda: 1020.0, Replies())
    ((hold, _),) = keeper.adopt({7: old}, frozenset())[0]
    assert hold == HELD_HOLD
    deadline = time.monotonic() + PATIENCE
    while releasing.blocked():
        assert time.monotonic() < deadline, "not released"
        releasing.collect()
    assert scm_fds((alone if one_socket else pair[0]).fileno()) == 0
    for end in (*pair, alone):
        end.close()
    keeper.compact()
    assert keeper.in_flight()[0] == 2  # the bundle, and the journal
    again = Keeper(Releasing(), lambda: 1020.0, Replies())
    shelves = {one.number: (one.outlet.dup(), one.tx.dup()) for one in keeper.shelves()}
    assert len(again.adopt(shelves, frozenset())[0]) == 1
    check(again.bundle(GENERATION))
    for one in (keeper, again):
        one.close()


def all_end(pairs: dict[int, Pair], releasing: Releasing) -> None:
    """Close shelves, which a cprd has left; all that lies there is let go of."""
    close_all(end.detach() for ends in pairs.values() for end in ends)
    deadline = time.monotonic() + PATIENCE
    while releasing.blocked():
        assert time.monotonic() < deadline, "not released"
        releasing.collect()


@pytest.mark.parametrize("middle", [(HELD_RECORD[:4] + b"\x09" + HELD_RECORD[5:], []), (b"?", [])])
def test_a_slot_that_is_not_whole_is_kept_over_each_start(
    held: int, middle: tuple[bytes, list[int]]
) -> None:
    """The last record alone could be read."""
    going = queue((HELD_RECORD, [held]), middle, (HELD_RECORD, []))
    old = queue(
        (SHELF_HEADER, []),
        (SHELF_SLOTS, [end.fileno() for end in going]),
        (SHELF_COMPLETE, []),
    )
    for end in going:
        end.close()
    releasing = Releasing()
    pairs = {7: old}
    for _ in range(3):
        keeper = Keeper(releasing, lambda: 1020.0, Replies())
        found, blind = keeper.adopt(pairs, frozenset((7,)))
        assert [hold.phase for hold, _ in found] == [UNREADABLE] * (not blind)
        (kept,) = keeper.places.values()
        check(kept.bundle)
        pairs = {one.number: (one.outlet.dup(), one.tx.dup()) for one in keeper.shelves()}
        keeper.close()
    all_end(pairs, releasing)


def test_slots_that_cannot_be_read_are_all_kept_whenever_they_come(held: int) -> None:
    """As after an upgrade, a downgrade and another upgrade: none takes the place of another."""
    releasing = Releasing()
    pairs: dict[int, Pair] = {}
    for number in (7, 9, 0):
        if number:
            slot = queue((HELD_RECORD, [held]), (b"?", []))
            slots = (SHELF_SLOTS, [end.fileno() for end in slot])
            pairs[number] = queue((SHELF_HEADER, []), slots, (SHELF_COMPLETE, []))
            for end in slot:
                end.close()
        keeper = Keeper(releasing, lambda: 1020.0, Replies())
        _, blind = keeper.adopt(pairs, frozenset(pairs))
        assert "cannot be read" in blind
        kept = [place.bundle for place in keeper.places.values()]
        assert len(kept) == (1 if number == 7 else 2)
        for fd in kept:
            check(fd)
        pairs = {one.number: (one.outlet.dup(), one.tx.dup()) for one in keeper.shelves()}
        keeper.close()
    all_end(pairs, releasing)


def test_a_held_hold_of_version_1_is_read() -> None:
    assert record.decode(HELD_RECORD) == (HELD_HOLD, (), [SAVED], ())
    assert record.decode(EARLY_RECORD) == (changed(HELD_HOLD, parked=0), (), [SAVED], ())
    assert record.prefix(HELD_RECORD) == (1, 1000, GENERATION, False)
    assert record.prefix(LAST_RECORD) == (1, 1000, GENERATION, True)


def test_of_a_claim_of_version_1_the_load_is_known_too() -> None:
    """That version kept the answer to a load in the record alone, by its nonce."""
    data = HELD_RECORD.replace(b"\xa4held", b"\xa7claimed").replace(
        b"\xa5token\xc4\x00\xa5lease", b"\xa5token\xc4\x10" + b"t" * 16 + b"\xa5lease"
    )
    hold, _, replies, _ = record.decode(data)
    assert (hold.phase, hold.token) == (CLAIMED, b"t" * 16)
    assert replies == [SAVED, Reply(1000, LOADED.nonce, LOADED.answer, 0.0)]
    assert [reply.name for reply in replies] == ["w\u00e9b"] * 2


def test_a_record_of_version_2_is_read() -> None:
    assert record.decode(CLAIMED_RECORD_2) == (CLAIMED_HOLD, ("claimant",), DIGESTED, ())
    assert record.prefix(LAST_RECORD_2) == (2, 1000, GENERATION, True)


@pytest.mark.skipif(record.VERSION != 6, reason="records have another version by now")
def test_records_that_say_version_6_have_it() -> None:
    """Whoever changes what is written counts the version up, and reads all before."""
    made = record.encode(CLAIMED_HOLD, {"claimant": 5}, DIGESTED[1:])
    assert made == CLAIMED_RECORD_6
    assert record.decode(made) == (CLAIMED_HOLD, {"claimant": 5}, DIGESTED[1:], ())
    last = record.encode_last(1000, GENERATION, DIGESTED[:1], record.VERSION)
    assert last == LAST_RECORD_6
    assert record.last_replies(last) == DIGESTED[:1]


@pytest.mark.skipif(shelf.VERSION != 2, reason="shelves have another version by now")
def test_shelves_that_say_version_2_have_it() -> None:
    one = shelf.Shelf.create(7)
    one.add_queues([shelf.Queue(GENERATION, 1000, 0)])
    one.add_pidfds([shelf.Pidfd(GENERATION, 5, 0)])
    one.complete([0], [3, 4])
    written = []
    for data, fds in shelf.records(one.outlet, shelf.MAX_RECORD):
        written.append(data)
        close_all(fds)
    one.close()
    assert written == [SHELF_HEADER_2, SHELF_QUEUES, SHELF_PIDFDS, SHELF_COMPLETE_2]


def test_journals_have_the_frame_that_all_versions_have() -> None:
    journal = Journal.create()
    journal.append(LAST_RECORD_6)
    assert os.pread(journal.fd, 1 << 16, 0) == JOURNAL
    journal.close()


@pytest.mark.skipif(layout.VERSION != 1, reason="bundles have another version by now")
def test_bundles_that_say_version_1_have_it() -> None:
    event = os.eventfd(7)
    state = cprd.State()
    state["words"] = {"tally": 42}
    state["raw"] = b"bytes"
    state.save_fd("event", 3, event)
    packed = pack(state)
    with socket.socket(fileno=os.dup(packed.fd)) as outlet:
        data, fds, _, _ = socket.recv_fds(outlet, 4096, 9)
    assert data == BUNDLE
    assert os.pread(fds[0], 4096, 0) == MANIFEST
    for fd in (*fds, event):
        os.close(fd)
    packed.close()

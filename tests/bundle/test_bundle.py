"""Bundles: whole states in one descriptor, what becomes of spoilt ones, and of what is none."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import resource
import select
import signal
import socket
import struct
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cprd
from cprd import Busy, Damaged, InvalidInput, LimitExceeded, State
from cprd.bundle.inspect import check
from cprd.bundle.layout import HEADER, LEAF, MAGIC, NODE, VERSION
from cprd.bundle.unpack import unpack
from cprd.client.verbs import row_and_bundle
from cprd.linux.memfd import sealed_memfd
from cprd.linux.rights import close_all, receive, scm_fds, send
from cprd.protocol import messages
from tests.support import wire
from tests.support.bundles import pack
from tests.support.daemon import DaemonProcess
from tests.support.descriptors import open_fds
from tests.support.eventfds import full_table, of, opened, values
from tests.support.patience import PATIENCE, until

pytestmark = pytest.mark.usefixtures("nothing_leaks")


@contextmanager
def packed(state: State) -> Iterator[int]:
    """The descriptor of a bundle."""
    made = pack(state)
    try:
        yield made.fd
    finally:
        made.close()


# Whole ones


@pytest.mark.parametrize("count", [0, 1, 251, 252, 253, 254, 505, 506, 5000, 9000])
def test_every_number_of_descriptors_comes_back_in_order(count: int) -> None:
    with opened(count) as fds, packed(of(fds)) as fd:
        assert HEADER.unpack(_first(fd))[5] == count + 1
        check(fd, count + 1 if count < 253 else -(-(count + 1) // 253))
        state = unpack(fd)
        assert [(name, id) for name, id, _ in state.fds()] == [("fd", n) for n in range(count)]
        assert values(state) == list(range(1, count + 1))
        state.close()


def test_19000_descriptors_travel() -> None:
    """One file under many keys: the table of descriptors is full only at the end."""
    limit = 2 * 19_000
    if open_fds() + 19_500 > _hard_limit():
        pytest.skip(f"wants a hard limit of {limit} descriptors")
    with opened(1) as fds, packed(of(fds * 19_000)) as fd:
        state = unpack(fd)
        assert state.fd_count == 19_000
        assert state.find_fd("fd", 18_999) >= 0
        state.close()


def _hard_limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


@pytest.mark.parametrize("sections", [1, 252, 253, 300])
def test_sections_that_are_memfds_take_their_place_among_the_descriptors(sections: int) -> None:
    with opened(3) as fds:
        state = of(fds)
        for number in range(sections):
            state[f"s{number}"] = bytes([number % 256]) * 20_000
        with packed(state) as fd:
            found = unpack(fd)
            assert values(found) == [1, 2, 3]
            assert list(found) == [f"s{n}" for n in range(sections)]
            for number in range(sections):
                assert found[f"s{number}"] == bytes([number % 256]) * 20_000
            found.close()


names = st.text(
    st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1, max_size=60
).filter(lambda name: len(name.encode()) < 256)
values_of_sections = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(blacklist_categories=["Cs"]))
    | st.binary(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=20,
)


@settings(max_examples=150)
@given(
    keys=st.lists(st.tuples(names, st.integers(-(1 << 31), (1 << 31) - 1)), unique=True),
    sections=st.dictionaries(names, values_of_sections, max_size=4),
    repeat=st.integers(1, 60),
)
def test_any_state_comes_back_as_it_was(
    keys: list[tuple[str, int]], sections: dict[str, Any], repeat: int
) -> None:
    before = open_fds()
    keys = [(f"{number}{name}"[:60], id) for number in range(repeat) for name, id in keys]
    keys = list(dict.fromkeys(keys))
    with opened(3) as fds:
        state = State()
        for number, (name, id) in enumerate(keys):
            state.save_fd(name, id, fds[number % 3])
        for key, value in sections.items():
            state[key] = value
        with packed(state) as fd:
            found = unpack(fd)
            assert [(name, id) for name, id, _ in found.fds()] == keys
            mine = [os.eventfd_read(found.find_fd(*key)) for key in keys[:3]]
            assert mine == [1, 2, 3][: len(keys)]
            assert dict(found) == sections
            found.close()
    assert open_fds() == before


def test_several_readers_at_once_disturb_nobody() -> None:
    wrong: list[str] = []
    with opened(2000) as fds, packed(of(fds)) as fd:

        def read() -> None:
            for _ in range(15):
                try:
                    state = unpack(fd)
                except cprd.CprdError as error:
                    wrong.append(str(error))
                    return
                if state.fd_count != 2000:
                    wrong.append(repr(state))
                state.close()

        children = []
        for _ in range(2):
            child = os.fork()
            if child == 0:
                try:
                    read()
                    assert not wrong
                    os._exit(0)
                finally:
                    os._exit(1)
            children.append(child)
        threads = [threading.Thread(target=read) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
        assert wrong == []
        state = unpack(fd)  # and nothing was consumed
        assert values(state) == list(range(1, 2001))
        state.close()


def test_a_cursor_that_a_former_holder_left_behind_is_put_back() -> None:
    with opened(300) as fds, packed(of(fds)) as fd:
        root = socket.socket(fileno=os.dup(fd))
        root.setsockopt(socket.SOL_SOCKET, 42, 5)  # SO_PEEK_OFF
        _, leaves, _ = receive(root, 100, socket.MSG_PEEK)
        for leaf in leaves:
            with socket.socket(fileno=leaf) as sock:
                sock.setsockopt(socket.SOL_SOCKET, 42, HEADER.size)
        root.close()
        state = unpack(fd)
        assert values(state) == list(range(1, 301))
        state.close()


# Spoilt ones, made by hand


def header(
    here: int,
    total: int,
    *,
    kind: int = LEAF,
    depth: int = 0,
    index: int = 0,
    size: int = 0,
    version: int = VERSION,
) -> bytes:
    return HEADER.pack(MAGIC, version, kind, depth, here, total, size, index)


class Hand:
    """Makes sockets with whatever in them; all of it is closed at the end."""

    def __init__(self) -> None:
        self.stack = ExitStack()

    def queue(self, *messages: tuple[bytes, list[int]], keep: bool = False) -> int:
        inlet, outlet = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for data, fds in messages:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
            inlet.sendmsg([data], rights)
        if keep:
            self.inlet = inlet
            self.stack.callback(inlet.close)
        else:
            inlet.close()
        self.stack.callback(outlet.close)
        return outlet.fileno()

    def manifest(self, **said: Any) -> int:
        content = {"names": b"", "ids": b"", "sections": [], **said}
        fd = sealed_memfd("test", [msgpack.packb(content)])
        self.stack.callback(os.close, fd)
        return fd

    def leaf(self, fds: list[int], **fields: Any) -> int:
        return self.queue((header(len(fds), len(fds), **fields), fds))

    def node(self, leaves: list[int], total: int) -> int:
        return self.queue((header(len(leaves), total, kind=NODE, depth=1), leaves))


@pytest.fixture
def hand() -> Iterator[Hand]:
    made = Hand()
    with made.stack:
        yield made


def keys(count: int) -> dict[str, Any]:
    return {"names": "\0".join("n" * count).encode(), "ids": array("i", range(count)).tobytes()}


def test_what_the_hand_makes_is_what_pack_makes(hand: Hand) -> None:
    """Else the tests below would be about something else."""
    state = unpack(hand.leaf([hand.manifest(**keys(2)), 0, 1]))
    assert [(name, id) for name, id, _ in state.fds()] == [("n", 0), ("n", 1)]
    state.close()
    leaves = [hand.leaf([hand.manifest(**keys(2)), 0]), hand.leaf([1], index=1)]
    state = unpack(hand.node(leaves, 3))
    assert state.fd_count == 2
    state.close()


Spoil = Callable[[Hand], int]


def _one_more(hand: Hand) -> int:
    return hand.leaf([hand.manifest(**keys(1)), 0, 1])


SPOILT: dict[str, Spoil] = {
    "an empty leaf": lambda hand: hand.node(
        [hand.leaf([hand.manifest(**keys(2)), 0]), hand.queue()], 3
    ),
    "a leaf twice": lambda hand: hand.node([hand.leaf([hand.manifest(**keys(3)), 0])] * 2, 4),
    "leaves in another order": lambda hand: hand.node(
        [hand.leaf([1], index=1), hand.leaf([hand.manifest(**keys(2)), 0])], 3
    ),
    "a leaf with two messages": lambda hand: hand.node(
        [hand.queue((header(2, 2), [hand.manifest(**keys(1)), 0]), (header(1, 1), [1]))], 2
    ),
    "a leaf that is a file": lambda hand: hand.node([0], 1),
    "a leaf that is a node": lambda hand: hand.node([hand.node([hand.leaf([0])], 1)], 1),
    "a total that is wrong": lambda hand: hand.node([hand.leaf([hand.manifest(**keys(1)), 0])], 5),
    "a leaf that says more than it has": lambda hand: hand.node(
        [hand.queue((header(3, 3), [hand.manifest(**keys(2)), 0]))], 3
    ),
    "a longer record": lambda hand: hand.node(
        [hand.queue((header(1, 1) + b"more", [hand.manifest()]))], 1
    ),
    "noise": lambda hand: hand.queue((b"\0" * HEADER.size, [0])),
    "a header that contradicts itself": lambda hand: hand.queue((header(1, 7), [0])),
    "a depth without end": lambda hand: hand.queue((header(1, 1, kind=NODE, depth=9), [0])),
    "a message missing": lambda hand: hand.queue((header(2, 2), [0])),
    "no manifest": lambda hand: hand.leaf([0, 1]),
    "a manifest that is not sealed": lambda hand: hand.leaf([_unsealed(hand)]),
    "a manifest of noise": lambda hand: hand.leaf([_memfd(hand, b"\xc1\xff")]),
    "a manifest that is a list": lambda hand: hand.leaf([_memfd(hand, b"\x90")]),
    "an empty manifest": lambda hand: hand.leaf([_memfd(hand, b"")]),
    "names of the wrong type": lambda hand: hand.leaf([hand.manifest(names="", ids=b"")]),
    "ids of half an integer": lambda hand: hand.leaf([hand.manifest(ids=b"\0\0")]),
    "fewer keys than descriptors": _one_more,
    "more keys than descriptors": lambda hand: hand.leaf([hand.manifest(**keys(3)), 0]),
    "a section beyond the end": lambda hand: hand.leaf(
        [hand.manifest(sections=[("a", False, 1, b"")])]
    ),
    "a section that is no memfd": lambda hand: hand.leaf(
        [hand.manifest(sections=[("a", False, 1, b"")]), 0]
    ),
    "a section that is a number": lambda hand: hand.leaf(
        [hand.manifest(sections=[("a", False, 0, 7)])]
    ),
    "a section twice": lambda hand: hand.leaf(
        [hand.manifest(sections=[("a", False, 0, b""), ("a", False, 0, b"")])]
    ),
}


def _memfd(hand: Hand, content: bytes) -> int:
    fd = sealed_memfd("test", [content])
    hand.stack.callback(os.close, fd)
    return fd


def _unsealed(hand: Hand) -> int:
    fd = os.memfd_create("test")
    hand.stack.callback(os.close, fd)
    os.write(fd, msgpack.packb({"names": b"", "ids": b"", "sections": []}))
    return fd


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_bundle_is_damaged_and_leaves_nothing_open(how: str, hand: Hand) -> None:
    fd = SPOILT[how](hand)
    before = open_fds()
    with pytest.raises(Damaged):
        unpack(fd)
    assert open_fds() == before


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_bundle_is_never_served_in_part_by_cprd(
    how: str, hand: Hand, daemon: DaemonProcess
) -> None:
    """The daemon sees the root only; what is wrong below it, the first reader sees: both ways it
    ends in Damaged, and later loads hear of it without another look."""
    fd = SPOILT[how](hand)
    first = _first(fd)
    fds = HEADER.unpack(first)[5] - 1 if first[:4] == MAGIC else 0
    parked = scm_fds(fd)
    depth = 0 if fds < parked else 1
    with daemon.connect() as client:
        say(client, "save", save_message("web", fds, 0, parked=parked, depth=depth), fd)
        with pytest.raises(Damaged, match="will not be served again"):
            client.load("web")
        with pytest.raises(Damaged):
            client.load("web")
        (row,) = client.list()
        assert row["phase"] == "damaged"
        with pytest.raises(cprd.Busy):
            client.drop("web")
        client.drop("web", force=True)
        assert client.list() == []


@pytest.mark.parametrize("where", ["root", "leaf"])
def test_a_bundle_of_a_version_to_come_is_refused_and_stays_whole(
    where: str, hand: Hand, daemon: DaemonProcess
) -> None:
    fd = hand.leaf([0], version=2)
    with daemon.connect() as client:
        depth = 0 if where == "root" else 1
        root = fd if where == "root" else hand.node([fd], 1)
        say(client, "save", save_message("web", 0, 0, depth=depth), root)
        for _ in range(2):
            with pytest.raises(Busy, match="of version 2; this cprd reads version 1"):
                client.load("web")
        assert client.list()[0]["phase"] == "held"  # for a program that can read it


def test_two_descriptors_with_one_key_are_damaged(hand: Hand) -> None:
    manifest = hand.manifest(names=b"n\0n", ids=array("i", [1, 1]).tobytes())
    state = unpack(hand.leaf([manifest, 0, 1]))
    with pytest.raises(Damaged, match="same key"):
        state.find_fd("n", 1)
    state.close()


# Offered to the daemon


def _first(fd: int) -> bytes:
    with socket.socket(fileno=os.dup(fd)) as sock:
        return sock.recv(HEADER.size, socket.MSG_PEEK)


def save_message(
    name: str, fds: int, size: int, *, parked: int | None = None, depth: int = 0
) -> dict[str, Any]:
    return wire.save(name, fds, size, fds + 1 if parked is None else parked, depth)


def say(client: cprd.Daemon, verb: str, message: dict[str, Any], bundle: int) -> dict[str, Any]:
    """A request that no client library would make, with a copy of a bundle in the queue. Raises
    what cprd answers."""
    with socket.socket(fileno=os.dup(client.fileno())) as sock:
        sock.settimeout(PATIENCE)
        with wire.park(sock, bundle):
            sock.send(messages.encode({"verb": verb, **message}))
            return wire.read_answer(sock.recv(messages.MAX_ANSWER))


NO_BUNDLES: dict[str, Spoil] = {
    "an empty queue": lambda hand: hand.queue(),
    "a short message": lambda hand: hand.queue((b"CPRB", [0])),
    "a descriptor too many": lambda hand: hand.queue((header(1, 1), [0, 0])),
    "no descriptor at all": lambda hand: hand.queue((header(1, 1), [])),
    "the message doubled": lambda hand: hand.queue((header(1, 1), [0]), (header(1, 1), [0])),
}


@pytest.mark.parametrize("what", NO_BUNDLES)
@pytest.mark.parametrize("verb", ["save", "prepare"])
def test_what_is_no_bundle_is_refused_with_a_reason_and_the_connection_goes_on(
    what: str, verb: str, hand: Hand, daemon: DaemonProcess
) -> None:
    fd = NO_BUNDLES[what](hand)
    with daemon.connect() as client:
        before = daemon.fds()
        with pytest.raises(Damaged, match="bundle"):
            say(client, verb, save_message("web", 0, 0), fd)
        assert client.list() == []
        daemon.await_fds(before)


@pytest.mark.parametrize("lie", [{"fds": 2}, {"parked": 3}, {"parked": 1, "fds": 0}, {"fds": 99}])
def test_counts_that_differ_from_the_bundle_are_refused(
    lie: dict[str, int], daemon: DaemonProcess
) -> None:
    with packed(of([0])) as fd, daemon.connect() as client:
        with pytest.raises(Damaged, match=r"fds says|should hold"):
            say(client, "save", {**save_message("web", 1, 0), **lie}, fd)
        assert client.list() == []


@pytest.mark.parametrize("said", [{}, {"parked": 2}, {"bytes": 7}])
def test_a_reader_compares_nothing_with_the_request(
    said: dict[str, int], daemon: DaemonProcess
) -> None:
    """What the saver says of a bundle is for quotas and lists."""
    message = {"name": "web", "fds": 0, "nonce": messages.nonce(), **said}
    with packed(of([0])) as fd, daemon.connect() as client:
        say(client, "save", message, fd)
        with client.load("web") as claim:
            assert claim.state.fd_count == 1


def test_damage_names_the_saver(daemon: DaemonProcess) -> None:
    """The first reader finds the damage, and is not to blame."""
    inlet, outlet = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with inlet, outlet, daemon.connect() as client:
        send(inlet, bytes(HEADER.size), [0])
        say(client, "save", {"name": "web", "fds": 0, "nonce": messages.nonce()}, outlet.fileno())
        saver = f"saved by pid {os.getpid()} of uid {os.getuid()}$"
        with pytest.raises(Damaged, match=saver) as first:
            client.load("web")
        with pytest.raises(Damaged, match=saver.replace("$", ";")) as later:
            client.load("web")
        for error in (first.value, later.value):
            assert (error.pid, error.phase) == (os.getpid(), "damaged")


@contextmanager
def asleep_in_a_page(use: Callable[[int], object]) -> Iterator[None]:
    """A thread that calls use(address), and sleeps in the kernel when that touches the page."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    number = {"x86_64": 323, "aarch64": 282}[platform.machine()]
    fd = libc.syscall(number, os.O_CLOEXEC)  # userfaultfd
    if fd < 0:
        pytest.skip("this user may not use userfaultfd")
    with opened_fd(fd):
        fcntl.ioctl(fd, 0xC018AA3F, bytearray(struct.pack("QQQ", 0xAA, 0, 0)))  # UFFDIO_API
        page = libc.mmap(None, 4096, mmap.PROT_READ | mmap.PROT_WRITE, 0x22, -1, 0)
        registered = bytearray(struct.pack("QQQQ", page, 4096, 1, 0))
        fcntl.ioctl(fd, 0xC020AA00, registered)  # UFFDIO_REGISTER, missing pages
        thread = threading.Thread(target=use, args=(page,), daemon=True)
        thread.start()
        assert select.select([fd], [], [], PATIENCE)[0], "it does not sleep in the page"
        try:
            yield
        finally:
            fcntl.ioctl(fd, 0xC020AA04, bytearray(struct.pack("QQQq", page, 4096, 0, 0)))  # zeros
            thread.join(PATIENCE)


@contextmanager
def opened_fd(fd: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(fd)


def test_a_claimant_that_sleeps_with_the_lock_of_its_bundle_in_hand_delays_nobody(
    daemon: DaemonProcess,
) -> None:
    """Whoever has a socket can hold its lock for as long as a page takes to come."""
    libc = ctypes.CDLL(None)
    with daemon.connect() as client:
        client.save("web", State())
        claim = client.load("web")
        bundle = os.dup(claim._claim.bundle)

        def peek(page: int) -> None:
            libc.recv(bundle, ctypes.c_void_p(page), 32, int(socket.MSG_PEEK))

        with asleep_in_a_page(peek):
            claim.reject("another may try")  # cprd looks for damage
            assert client.list()[0]["phase"] == "held"
        with client.load("web") as second:
            assert second.attempts == 2
        claim.close()
        os.close(bundle)


def test_a_bundle_cannot_grow_after_it_was_saved(hand: Hand, daemon: DaemonProcess) -> None:
    manifest = hand.manifest()
    with daemon.connect() as client:
        with socket.socket(fileno=os.dup(client.fileno())) as sock:
            sock.settimeout(PATIENCE)
            with wire.queue(sock) as inlet:
                send(inlet, header(1, 1), [manifest])
                sock.send(wire.request("save", **save_message("web", 0, 0)))
                wire.read_answer(sock.recv(messages.MAX_ANSWER))
                for fds in ([], [manifest]):
                    with pytest.raises(BrokenPipeError):
                        send(inlet, header(1, 1), fds)
        with client.load("web") as claim:
            assert claim.state.fd_count == 0


def test_a_bundle_that_holds_itself_harms_nobody(hand: Hand, daemon: DaemonProcess) -> None:
    """No client library makes one; the daemon takes nothing out of a bundle, and cannot see it. By
    a leaf that lies in itself, and by the sending end of the queue."""
    before = daemon.fds()
    with daemon.connect() as client:
        inlet, outlet = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with inlet, outlet:
            fds = [hand.manifest(**keys(1)), outlet.fileno()]
            send(inlet, header(2, 2), fds)
            say(client, "save", save_message("round", 1, 0), outlet.fileno())
        with socket.socket(fileno=os.dup(client.fileno())) as sock:
            sock.settimeout(PATIENCE)
            with wire.queue(sock) as inlet:
                send(inlet, header(2, 2), [fds[0], inlet.fileno()])
                sock.send(wire.request("save", **save_message("end", 1, 0)))
                wire.read_answer(sock.recv(messages.MAX_ANSWER))
        with packed(of([0])) as good:
            say(client, "save", save_message("good", 1, 0), good)
        for name in ("round", "end"):
            client.show(name)
            client.drop(name)
        with client.load("good") as claim:
            assert claim.state.fd_count == 1
    daemon.await_fds(before)


@pytest.mark.parametrize("others", [0, 2000])
def test_a_connection_to_cprd_in_a_state_is_refused(daemon: DaemonProcess, others: int) -> None:
    with daemon.connect() as client, opened(1) as fds:
        state = of(fds * others)
        state.save_fd("daemon", 0, client.fileno())
        with pytest.raises(InvalidInput, match=r"\('daemon', 0\).*connection to cprd itself"):
            client.save("web", state)
        state.delete_fd("daemon", 0)
        state.save_fd("one", 0, fds[0])
        client.save("web", state)
        claim = client.load("web")
        claim.state.close()
        following = State()
        following.save_fd("daemon", 0, client.fileno())
        with pytest.raises(InvalidInput, match="connection to cprd itself"):
            claim.confirm(next=following)
        claim.confirm()
        claim.close()


def test_a_copy_of_the_connection_in_a_state_is_refused_too(daemon: DaemonProcess) -> None:
    with daemon.connect() as client:
        copy = os.dup(client.fileno())
        state = State()
        state.save_fd("daemon", 0, copy)
        with pytest.raises(InvalidInput, match="connection to cprd itself"):
            client.save("web", state)
        os.close(copy)


# Claimants that destroy


@pytest.mark.parametrize("count", [5, 1000])
@pytest.mark.parametrize("end", ["dies", "rejects", "begins and dies"])
def test_a_claimant_that_receives_instead_of_peeking_is_named(
    count: int, end: str, daemon: DaemonProcess
) -> None:
    with opened(count) as fds, daemon.connect() as client:
        client.save("web", of(fds))
        child = os.fork()
        if child == 0:
            try:
                claim = daemon.connect().load("web")
                root = socket.socket(fileno=os.dup(claim._claim.bundle))
                if count == 5:
                    receive(root, 100)
                else:  # only a leaf: the root looks as before
                    _, leaves, _ = receive(root, 100, socket.MSG_PEEK)
                    receive(socket.socket(fileno=leaves[1]), 100)
                if end == "rejects":
                    claim.reject("let another try")
                elif end == "begins and dies":
                    claim.begin()
                os.kill(os.getpid(), signal.SIGKILL)
            finally:
                os._exit(1)
        os.waitpid(child, 0)
        until(lambda: client.list()[0]["phase"] != "claimed", lambda: repr(client.list()))
        if end == "begins and dies":
            client.release("web")
        with pytest.raises(Damaged, match=f"pid {child} had claimed it last"):
            client.load("web")
        with pytest.raises(Damaged, match=f"pid {child} had claimed it last"):
            client.load("web", wait=5.0)
        (row,) = client.list()
        assert row["phase"] == "damaged"
        assert f"pid {child}" in row["reason"]
        client.drop("web", force=True)


def test_a_leaf_that_the_saver_emptied_afterwards_is_found_by_the_first_reader(
    daemon: DaemonProcess,
) -> None:
    with opened(600) as fds, daemon.connect() as client:
        client.save("web", of(fds))
        row, fd = client._line.run(row_and_bundle("web", None))
        assert row["fds"] == 600
        with socket.socket(fileno=fd) as root:
            _, leaves, _ = receive(root, 100, socket.MSG_PEEK)
            with socket.socket(fileno=leaves.pop()) as leaf:
                receive_and_close(leaf)
            close_all(leaves)
        before = open_fds()
        with pytest.raises(Damaged, match="nothing is queued in a part of it"):
            client.load("web")
        assert open_fds() == before
        assert client.list()[0]["phase"] == "damaged"


def receive_and_close(sock: socket.socket) -> None:
    _, fds, _ = receive(sock, 100)
    close_all(fds)


# Cut off


@pytest.mark.parametrize("count", [10, 600])
def test_descriptors_that_are_cut_off_are_told_and_none_stays(count: int) -> None:
    """MSG_CTRUNC: the table fills up somewhere in between."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with opened(count) as fds, packed(of(fds)) as fd:
        for room in {1, 2, count // 2, count - 1}:
            with full_table(count + 40, room):  # there is room for all but what is open already
                before = open_fds()
                with pytest.raises(LimitExceeded, match=r"MSG_CTRUNC.*RLIMIT_NOFILE") as caught:
                    unpack(fd)
                assert "stays held" in str(caught.value)
                assert open_fds() == before
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)
        state = unpack(fd)
        assert values(state) == list(range(1, count + 1))
        state.close()

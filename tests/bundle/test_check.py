"""cprctl check-bundle says all that is wrong, at once, and nothing about what is whole."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

import cprd
from cprd.bundle import layout
from cprd.bundle.check import check_bundle
from cprd.linux.rights import send
from cprd.live.check import check_live
from cprd.protocol import messages
from tests.support import cprctl as support
from tests.support import wire
from tests.support.daemon import DaemonProcess
from tests.support.eventfds import opened
from tests.support.live import Live
from tools import vectors
from tools.vectors import BUNDLE, LIVE, Vector, stored

pytestmark = pytest.mark.usefixtures("nothing_leaks")

WHOLE = [vector for vector in stored(BUNDLE) if "means" in vector]
WRONG = [vector for vector in stored(BUNDLE) if "error" in vector]
HOLDS = [vector for vector in stored(LIVE) if "queue" in vector]
LEAF = layout.HEADER.pack(layout.MAGIC, 1, layout.LEAF, 0, 2, 2, 0, 0).hex()


def name_of(vector: Vector) -> str:
    return str(vector["name"])


def checked(vector: Vector) -> dict[str, Any]:
    fd = vectors.build(vector)
    try:
        return check_bundle(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("vector", WHOLE, ids=name_of)
def test_of_a_whole_bundle_nothing_is_said(vector: Vector) -> None:
    found = checked(vector)
    means = vector["means"]
    counts = {"descriptors": len(means["descriptors"]), "sections": len(means["sections"])}
    assert found == {"wrong": [], **counts}


@pytest.mark.parametrize("vector", WRONG, ids=name_of)
def test_what_no_reader_takes_is_found(vector: Vector) -> None:
    assert checked(vector)["wrong"]


def test_a_tree_that_says_no_end_has_an_end() -> None:
    """Each of 253 sockets leads to the same 253: a walk would take years."""
    header = layout.HEADER.pack(layout.MAGIC, 1, layout.NODE, 1, 253, 253, 0, 0)
    with contextlib.ExitStack() as stack:
        fd = stack.enter_context(opened(1))[0]
        for _ in range(6):
            inlet, outlet = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(outlet)
            with inlet:
                send(inlet, header, [fd] * 253)
            fd = outlet.fileno()
        found = check_bundle(fd)
    assert "the root, socket 0: depth 1, where 0 belongs" in found["wrong"]


def test_a_part_that_is_no_socket_is_named() -> None:
    header = layout.HEADER.pack(layout.MAGIC, 1, layout.NODE, 1, 1, 1, 0, 0)
    inlet, outlet = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with outlet, opened(1) as (fd,):
        with inlet:
            send(inlet, header, [fd])
        assert "the root, socket 0: not a socket" in check_bundle(outlet.fileno())["wrong"]


def test_everything_is_said_at_once() -> None:
    import msgpack

    manifest = msgpack.packb(
        {
            "sections": [["a", 1, 0, b"\x01\x02"], ["a", 2, 0, b""], ["", 0, 1, b"x"]],
            "ids": b"\0" * 4,
            "names": b"same\0same\0" + b"n" * 300,
        }
    )
    child = {"queue": [{"hex": LEAF, "carries": [{"descriptor": 1}]}] * 2}
    sealed = {"memfd": manifest.hex(), "sealed": True}
    header = layout.HEADER.pack(layout.MAGIC, 1, layout.NODE, 1, 3, 9, 5, 4)
    parts = [
        {"queue": [{"hex": LEAF, "carries": [sealed, {"memfd": "00", "sealed": False}]}]},
        child,
    ]
    said = "\n".join(checked({"queue": [{"hex": header.hex(), "carries": parts}]})["wrong"])
    for fault in (
        *("the root: says 3 descriptors in its message, which has 2", "number 4 among"),
        *("the root: says 9 descriptors in all below; found 3", "more than the first message"),
        *("socket 1: says 2 descriptors", "number 0 among its siblings, and comes as 1"),
        *("section 'a': packed, and more than one", "section 'a' comes twice", "packed is 2"),
        *("section '': a key has 1 to 255", "section '': in a memfd, and has data"),
        *("section '' lacks the seals", "3 names for 1", "the name b'nnn", "bytes of sections"),
    ):
        assert fault in said, said


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ("81", "c0", "a part whose name is no string: a list of too many"),
        ("81a873656374696f6e739194", "00c0c400", "section a list of too many"),
        ("81a873656374696f6e739194a161", "00c400", "packed is a list of too many"),
    ],
)
def test_what_is_deeper_than_any_stack_is_a_fault_as_others(
    before: str, after: str, fault: str
) -> None:
    manifest = {"memfd": f"{before}{'91' * 1015}c0{after}", "sealed": True}
    header = layout.HEADER.pack(layout.MAGIC, 1, layout.LEAF, 0, 1, 1, 0, 0)
    said = checked({"queue": [{"hex": header.hex(), "carries": [manifest]}]})["wrong"]
    assert any(fault in each for each in said), said


def test_a_sending_end_that_is_open_and_a_wrong_count_are_found() -> None:
    inlet, outlet = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    (small,) = [vector for vector in WHOLE if vector["name"] == "small"]
    (message,) = small["queue"]
    fds = [vectors.build(one) for one in message["carries"]]
    with inlet, outlet:
        send(inlet, bytes.fromhex(message["hex"]), fds)
        for fd in fds:
            os.close(fd)
        assert "the sending end is open" in check_bundle(outlet.fileno())["wrong"][0]
        inlet.shutdown(socket.SHUT_WR)
        (wrong,) = check_bundle(outlet.fileno(), {"fds": 2, "bytes": 13})["wrong"]
        assert "the save said fds 2, and the bundle has 1" in wrong


@pytest.mark.parametrize("vector", HOLDS, ids=name_of)
def test_live_holds_are_looked_at_record_by_record(vector: Vector) -> None:
    assert live({"queue": vector["queue"]})["wrong"] == []
    spoilt = json.loads(json.dumps(vector["queue"]))
    spoilt.append(dict(spoilt[0]))  # the same ordinal and seq once more
    spoilt.append({"hex": "00" * 44, "carries": []})
    said = "\n".join(live({"queue": spoilt})["wrong"])
    for fault in ("ordinal 0 follows", "seq 1 follows", "does not begin with its header"):
        assert fault in said


def live(root: Vector) -> dict[str, Any]:
    fd = vectors.build({"queue": [{"hex": layout.LIVE_ROOT.hex(), "carries": [root]}]})
    try:
        return check_live(fd)
    finally:
        os.close(fd)


def cprctl(daemon: DaemonProcess, *words: str) -> tuple[int, str]:
    done = support.cprctl(daemon, *words)
    return done.returncode, done.stdout + done.stderr


def test_cprctl_says_what_is_wrong_with_a_hold(daemon: DaemonProcess, tmp_path: Path) -> None:
    inlet, outlet = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with inlet, outlet, daemon.connect() as client:
        assert cprctl(daemon, "check-bundle", "nothing")[0] == 3
        state = cprd.State()
        state["a"] = 1
        client.save("whole", state)
        assert cprctl(daemon, "check-bundle", "whole") == (
            0,
            "whole: whole: 0 descriptors, 1 sections\n",
        )
        send(inlet, bytes(layout.HEADER.size), [0])
        with socket.socket(fileno=os.dup(client.fileno())) as sock:
            with wire.park(sock, outlet.fileno()):
                sock.send(wire.request("save", name="bad", fds=0, nonce=messages.nonce()))
                wire.read_answer(sock.recv(messages.MAX_ANSWER))
        for _ in range(2):  # held, and then found damaged
            status, said = cprctl(daemon, "check-bundle", "bad", "--json")
            assert status == 1
            assert "the root: begins with" in json.loads(said)["wrong"][0]
            with pytest.raises(cprd.Damaged):
                client.load("bad")
        with Live(daemon.path, "live") as owner:
            owner.kept.save_section("note", 1)
            assert cprctl(daemon, "check-bundle", "live")[0] == 4
            owner.end(keep=True)
        assert cprctl(daemon, "check-bundle", "live") == (
            0,
            "live: whole: 1 segments, 0 descriptors, 1 sections\n",
        )

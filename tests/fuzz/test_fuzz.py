"""Bytes that nobody meant: decoders raise what they say, and cprd serves on."""

from __future__ import annotations

import random
import socket
import time
import tracemalloc

import pytest

import cprd
from cprd.protocol import messages
from tests.fuzz.mutate import mutated
from tests.fuzz.targets import TARGETS, run
from tests.support import wire
from tests.support.daemon import DaemonProcess
from tests.support.goods import state_of
from tests.support.patience import PATIENCE, in_time, patience

SECONDS = 1.0  # for each decoder
MOST = 16 << 20  # bytes that a decoder may make of up to 70 KB


@pytest.mark.parametrize("name", TARGETS)
def test_a_decoder_raises_what_it_says_and_nothing_else(name: str) -> None:
    end = time.monotonic() + SECONDS
    count = 0
    for data in mutated(TARGETS[name].seeds, random.Random(name)):
        begin = time.perf_counter()
        run(name, data)
        assert in_time(time.perf_counter() - begin, 1.0), data.hex()
        count += 1
        if time.monotonic() > end:
            break
    assert count > 20


@pytest.mark.parametrize("name", TARGETS)
def test_a_decoder_takes_memory_in_proportion(name: str) -> None:
    tracemalloc.start()
    try:
        changed = mutated(TARGETS[name].seeds, random.Random(f"memory of {name}"))
        for _, data in zip(range(100), changed, strict=False):
            run(name, data)
        assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()


def requests() -> list[bytes]:
    """A request of each verb, of names that nobody else has. What wants a bundle finds none."""
    nonce = b"n" * 16
    ticket = {"name": "fuzz", "generation": 1, "token": bytes(16)}
    claim = {**ticket, "nonce": nonce}
    saved = wire.save("fuzz", 1, 0, 1, nonce=nonce)
    named = {"name": "fuzz", "force": True, "nonce": nonce}
    return [
        *(wire.request("status"), wire.request("list", after=None), wire.load("fuzz")),
        *(wire.request("show", name="fuzz"), wire.request("wait", name="fuzz", timeout=0.0)),
        *(wire.request(verb, **claim) for verb in ("confirm", "commit", "abort", "put_back")),
        *(wire.request("renew", **ticket), wire.request("begin", **claim, pid=1, inode=2)),
        *(wire.request("end", **claim, keep=True), wire.request("queue")),
        *(wire.request(verb, **saved) for verb in ("save", "prepare")),
        wire.request("confirm_next", **{**saved, **claim}, live=True),
        wire.request("live", name="fuzz", ttl=5.0, nonce=nonce),
        wire.request("ended", name="fuzz", generation=1, pid=1),
        wire.request("reject", **claim, why="no", damaged=False),
        *(wire.request(verb, **named) for verb in ("drop", "release")),
    ]


def may_wait(data: bytes) -> bool:
    """Whether bytes are a request to wait for a hold for longer than a moment."""
    try:
        message = messages.read_request(data)
    except cprd.ProtocolError:
        return False
    longest: float = max(message.get("wait", 0.0), message.get("timeout", 0.0))
    return longest > 1.0


def pelt(daemon: DaemonProcess, count: int) -> None:
    """Send `count` changed requests, on connections that are opened anew when cprd ends them."""
    changed = mutated(requests(), random.Random(count))
    sock: socket.socket | None = None
    for _ in range(count):
        if sock is None:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sock.settimeout(PATIENCE)
            sock.connect(daemon.path)
            sock.send(wire.HELLO)
            assert b"ok" in sock.recv(messages.MAX_ANSWER)
        answer = b""
        data = next(changed)[: messages.MAX_REQUEST] or b"\0"
        waits = may_wait(data)
        sock.settimeout(0.01 if waits else patience(2))
        try:
            sock.send(data)
            answer = sock.recv(messages.MAX_ANSWER)
        except TimeoutError:
            assert waits, data.hex()
        except ConnectionError:
            pass
        else:
            messages.decode(answer or b"\x80", messages.MAX_ANSWER)
        if not answer or b"ProtocolError" in answer:
            sock.close()
            sock = None
    if sock is not None:
        sock.close()


def pelted(daemon: DaemonProcess, count: int) -> None:
    with daemon.connect() as connection:
        connection.save("kept", state_of("kept", [], []))
        pelt(daemon, count)
        assert connection.status()["phases"] == {"held": 1}
        with connection.load("kept"):
            pass
        assert connection.list() == []
    assert daemon.alive()
    assert " failed " not in "".join(daemon.log())


def test_a_daemon_that_is_pelted_serves_on(new_daemon: DaemonProcess) -> None:
    pelted(new_daemon, 20_000)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_a_daemon_that_is_pelted_for_long_serves_on(new_daemon: DaemonProcess) -> None:
    pelted(new_daemon, 1_000_000)


def test_the_requests_that_are_changed_are_requests() -> None:
    verbs = {messages.read_request(data)["verb"] for data in requests()}
    assert verbs == messages.REQUESTS.keys() - {"hello"}

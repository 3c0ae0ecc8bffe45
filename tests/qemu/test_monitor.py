"""The monitor's client against a QEMU that says just what a test wants: pieces, floods, silence."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cprd.errors import LimitExceeded, Timeout
from cprd.qemu import source as source_module
from cprd.qemu.errors import (
    MonitorBusy,
    MonitorGone,
    MonitorLost,
    MonitorRefused,
    NoListener,
    Refused,
)
from cprd.qemu.monitor import Monitor, event_is
from cprd.qemu.private import PrivateDirectory
from cprd.qemu.process import Process
from cprd.qemu.source import Source
from tests.qemu.machine import monitor_over
from tests.support.patience import PATIENCE, until

GREETING = b'{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}}}}\r\n'
SHORT = 0.2  # s, for what never comes

pytestmark = pytest.mark.usefixtures("nothing_leaks")


def event(name: str) -> bytes:
    row = {"event": name, "data": {}, "timestamp": {"seconds": 1, "microseconds": 500000}}
    return json.dumps(row).encode() + b"\r\n"


class Peer:
    """The QEMU's end. A thread answers each command by `answers`: a function, or {} for none."""

    def __init__(self) -> None:
        self.ours, self.sock = socket.socketpair()
        self.sock.settimeout(PATIENCE)
        self.answers: dict[str, Callable[[dict[str, Any]], bytes]] = {}
        self.thread = threading.Thread(target=self.serve)

    def greet(self, greeting: bytes = GREETING) -> Monitor:
        self.sock.sendall(greeting)
        self.thread.start()
        return monitor_over(self.ours, "the peer", PATIENCE)

    def serve(self) -> None:
        try:
            with self.sock.makefile("rb") as lines:
                for line in lines:
                    asked = json.loads(line)
                    answer = self.answers.get(asked["execute"])
                    said = returns({})(asked) if answer is None else answer(asked)
                    if said:
                        self.sock.sendall(said)
        except OSError:
            pass  # the test has ended this connection

    def has_been_read(self) -> bool:
        """Whether the other end has read all that was sent."""
        return (
            int.from_bytes(fcntl.ioctl(self.sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder) == 0
        )

    def close(self) -> None:
        self.ours.close()
        if self.thread.is_alive():
            self.thread.join(PATIENCE)
        self.sock.close()


def returns(value: Any) -> Callable[[dict[str, Any]], bytes]:
    return lambda asked: json.dumps({"return": value, "id": asked["id"]}).encode() + b"\r\n"


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    yield made
    made.close()


def test_an_answer_in_pieces_between_events_that_stay(peer: Peer) -> None:
    def answer(asked: dict[str, Any]) -> bytes:
        whole = event("STOP") + returns({"status": "paused"})(asked) + event("RESUME")
        for byte in whole[:-1]:
            peer.sock.sendall(bytes([byte]))
        return whole[-1:]

    peer.answers["query-status"] = answer
    monitor = peer.greet()
    assert monitor.version == (10, 0, 2)
    assert monitor.status() == "paused"
    assert monitor.event(event_is("RESUME"), PATIENCE)[0] == "RESUME"
    assert monitor.event(event_is("STOP"), PATIENCE)[0] == "STOP"
    with pytest.raises(MonitorLost, match="no such event"):
        monitor.event(event_is("STOP"), SHORT)
    monitor.close()


def test_an_event_before_the_first_answer_is_an_event(peer: Peer) -> None:
    """QEMU sends events as soon as it has read qmp_capabilities."""
    peer.answers["qmp_capabilities"] = lambda asked: event("RESUME") + returns({})(asked)
    monitor = peer.greet()
    assert monitor.seen(event_is("RESUME")) is not None
    monitor.close()


def test_a_long_answer_and_a_long_command(peer: Peer) -> None:
    long = "x" * (3 << 20)
    peer.answers["echo"] = lambda asked: returns(asked["arguments"])(asked)
    monitor = peer.greet()
    assert monitor.execute("echo", text=long) == {"text": long}
    monitor.close()


def test_an_error_means_that_nothing_was_done(peer: Peer) -> None:
    peer.answers["cont"] = lambda asked: (
        json.dumps({"error": {"class": "GenericError", "desc": "locked"}, "id": asked["id"]})
        + "\r\n"
    ).encode()
    monitor = peer.greet()
    with pytest.raises(MonitorRefused, match="QEMU refuses cont: locked"):
        monitor.execute("cont")
    monitor.close()


def test_an_answer_that_comes_too_late_is_not_the_next_ones(peer: Peer) -> None:
    late: list[bytes] = []

    def keep(asked: dict[str, Any]) -> bytes:
        late.append(returns("late")(asked))
        return b""

    peer.answers["first"] = keep
    peer.answers["second"] = lambda asked: late[0] + returns("second")(asked)
    monitor = peer.greet()
    with pytest.raises(MonitorLost, match=r"did not answer first within 0\.2 s"):
        monitor.execute("first", SHORT)
    assert monitor.execute("second") == "second"
    monitor.close()


def test_its_last_words_are_read_and_what_follows_was_not_done(peer: Peer) -> None:
    def end(asked: dict[str, Any]) -> bytes:
        peer.sock.sendall(returns({})(asked) + event("STOP"))
        peer.sock.shutdown(socket.SHUT_RDWR)
        return b""

    peer.answers["stop"] = end
    monitor = peer.greet()
    monitor.execute("stop")
    assert monitor.ended_at_rest(PATIENCE)
    with pytest.raises(MonitorGone, match="before cont was sent"):
        monitor.execute("cont")
    with pytest.raises(MonitorLost, match="broke while an event"):
        monitor.event(event_is("RESUME"), PATIENCE)
    monitor.close()


def test_it_ends_where_an_answer_belongs(peer: Peer) -> None:
    def end(_: dict[str, Any]) -> bytes:
        peer.sock.sendall(event("STOP") + event("RESUME"))
        peer.sock.shutdown(socket.SHUT_RDWR)
        return b""

    peer.answers["cont"] = end
    monitor = peer.greet()
    with pytest.raises(MonitorLost, match="broke at cont") as caught:
        monitor.execute("cont")
    assert not isinstance(caught.value, MonitorGone)
    assert not monitor.ended_at_rest(PATIENCE)
    monitor.close()


@pytest.mark.parametrize(
    "said", [b"{\r\n", b"SSH-2.0\r\n", b"[1]\r\n", b'{"QMP": 1}\r\n', b"\xff\n"]
)
def test_what_is_no_qmp_is_refused(peer: Peer, said: bytes) -> None:
    with pytest.raises(MonitorLost, match="no QMP is spoken there"):
        peer.greet(said)


def test_no_greeting_in_time(peer: Peer) -> None:
    with pytest.raises(MonitorBusy, match="one client at a time"):
        monitor_over(peer.ours, "the peer", SHORT)


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(NoListener, match="no QEMU listens there"):
        Monitor.connect(str(tmp_path / "qmp"))
    (tmp_path / "file").touch()
    with pytest.raises(NoListener):
        Monitor.connect(str(tmp_path / "file"))
    with pytest.raises(Refused, match="cannot be told"):
        Monitor.connect(str(tmp_path / ("x" * 200)))


# `migrate`, whose answer and whose connection come in any order


@pytest.mark.parametrize("order", ["answer first", "connection first", "never"])
def test_the_answer_to_migrate_and_its_connection_come_in_any_order(
    peer: Peer, tmp_path: Path, order: str
) -> None:
    empty = bytes.fromhex("514350520000000100")  # a CPR stream without a descriptor

    def migrate(asked: dict[str, Any]) -> bytes:
        where = {row["channel-type"]: row["addr"]["path"] for row in asked["arguments"]["channels"]}
        answer = event("MIGRATION_PASS") + returns({})(asked)
        if order == "never":
            return answer
        if order == "answer first":
            peer.sock.sendall(answer)
            until(peer.has_been_read, lambda: "unread")
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(where["cpr"])
            sock.sendall(empty)
        return b"" if order == "answer first" else answer

    peer.answers["migrate"] = migrate
    peer.answers["query-migrate-capabilities"] = returns([])
    monitor = peer.greet()
    monitor.process = Process.open(os.getpid())
    directory = PrivateDirectory(str(tmp_path / "qmp"))
    expected: type[Exception] = Timeout if order == "never" else Refused
    why = "did not connect" if order == "never" else "has no memory in it"
    with Source(monitor, directory, SHORT if order == "never" else PATIENCE) as source:
        with pytest.raises(expected, match=why):
            source.take_cpr()
    directory.close()
    monitor.close()
    assert list(tmp_path.iterdir()) == []


# A QEMU that says more than it should


def flooding(kind: str, first: bytes, piece: bytes, *, ends: bool) -> Any:
    """An answer to `migrate`: so much on one of its channels that nobody would keep it."""

    def migrate(asked: dict[str, Any]) -> bytes:
        where = {row["channel-type"]: row["addr"]["path"] for row in asked["arguments"]["channels"]}
        with socket.socket(socket.AF_UNIX) as cpr, socket.socket(socket.AF_UNIX) as main:
            cpr.connect(where["cpr"])
            flooded, sent = (cpr if kind == "cpr" else main), 0
            if kind == "main":
                cpr.sendall(first)
                cpr.shutdown(socket.SHUT_WR)
                main.connect(where["main"])
            try:
                while not ends or sent < 3 * source_module.MAX_CPR:
                    flooded.sendall(piece)
                    sent += len(piece)
            except OSError:
                pass  # hung up
        return returns({})(asked)

    return migrate


@pytest.mark.parametrize("ends", [True, False], ids=["ends", "endless"])
def test_a_cpr_stream_has_a_bound_and_is_read_to_its_end(
    peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    monkeypatch.setattr(source_module, "MAX_CPR", 1 << 20)
    peer.answers["migrate"] = flooding("cpr", b"", bytes(1 << 16), ends=ends)
    peer.answers["query-migrate-capabilities"] = returns([])
    monitor = peer.greet()
    monitor.process = Process.open(os.getpid())
    expected = LimitExceeded if ends else Timeout
    with (
        PrivateDirectory(str(tmp_path / "qmp")) as directory,
        Source(monitor, directory, PATIENCE if ends else 1.0) as source,
    ):
        with pytest.raises(expected, match="CPR stream"):
            source.take_cpr()
        assert len(source.received.data) <= 1 << 20
    monitor.close()


def test_a_flood_of_events_and_words_leaves_nothing_behind(peer: Peer) -> None:
    wild = [b'{"event": 7}', b'{"event": "MIGRATION"}', b'{"event": "STOP", "data": "x" }']
    wild += [b'{"event": "RESUME", "timestamp": {"seconds": "x"}, "data": {"status": {}}}']
    padded = b'{"event": "VNC", "data": "' + b"x" * 10_000 + b'"}'
    peer.answers["flood"] = lambda asked: (
        b"\n".join([*wild, *[padded] * 2000]) + b"\n" + returns("over")(asked)
    )
    monitor = peer.greet()
    assert monitor.execute("flood") == "over"
    names = []
    while (found := monitor.seen(lambda _: True)) is not None:
        names.append(monitor.event(lambda each: each is found, 0.0)[0])
    assert names == ["MIGRATION", "STOP", "RESUME"]
    monitor.close()


@pytest.mark.parametrize("said", [b"[" * 200_000 + b"\n", b"x" * (6 << 20)])
def test_a_message_of_endless_depth_or_length_ends_the_monitor(peer: Peer, said: bytes) -> None:
    peer.answers["deep"] = lambda _: said
    monitor = peer.greet()
    with pytest.raises(MonitorLost):
        monitor.execute("deep")
    monitor.close()

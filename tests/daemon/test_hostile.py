"""Clients that mean harm, or know no better: nobody else is delayed, and cprd lives.

While they are at it, a process of its own keeps asking, and says how long it waited for answers.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import select
import signal
import socket
import termios
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import pytest

import cprd
from cprd.linux.rights import close_all, receive, send
from cprd.protocol import messages
from tests.support import wire
from tests.support.child import Child, Line, become
from tests.support.daemon import DaemonProcess
from tests.support.goods import state_of, tcp_pair
from tests.support.patience import in_time, patience, rest, until
from tests.support.wire import silent

pytestmark = pytest.mark.usefixtures("nothing_leaks")


@pytest.fixture
def daemon(new_daemon: DaemonProcess) -> DaemonProcess:
    """A cprd for one test only: what blocks in it, or was turned away, is no other test's."""
    return new_daemon


PROMPT = patience(0.25)  # s within which everybody else is answered


def asks(line: Line, path: str) -> None:
    """Asks again and again until told to stop, as another uid if it can; says its longest waits."""
    if os.geteuid() == 0:
        become(23456)
    with cprd.connect(path) as daemon:
        line.say("here")
        waits = []
        while True:
            begin = time.monotonic()
            daemon.status()
            waits.append(time.monotonic() - begin)
            if select.select([line.sock], [], [], 0.002)[0]:
                break
        line.hear()
        line.say(" ".join(f"{wait:.4f}" for wait in sorted(waits)[-5:]))


@contextlib.contextmanager
def nobody_else_waits(daemon: DaemonProcess) -> Iterator[None]:
    with Child(asks, daemon.path) as asker:
        asker.hear()
        yield
        asker.say("enough")
        waits = [float(wait) for wait in asker.hear().split()]
        assert waits
        # Twice may be the machine's fault, which others use as well.
        assert waits[:-2][-1:] < [PROMPT], waits[-5:]
        assert in_time(waits[-1], 2), waits[-5:]
    assert daemon.alive()


def raw(path: str) -> socket.socket:
    """A connection that has said hello."""
    sock = silent(path)
    sock.send(wire.HELLO)
    wire.read_answer(sock.recv(65536))
    return sock


def answer(sock: socket.socket) -> dict[str, Any] | None:
    """The next answer; None at the end of the connection."""
    try:
        data, fds, _ = receive(sock, 65536)
    except ConnectionError:
        return None
    close_all(fds)
    return messages.decode(data, 65536) if data else None


def packed(**message: Any) -> bytes:
    data: bytes = msgpack.packb(message, use_bin_type=True)
    return data


NONCE = b"n" * 16
LOAD = {"verb": "load", "name": "x", "wait": 0, "lease": 1, "generation": None, "nonce": NONCE}
NOISE = {
    "nothing msgpack": b"\xc1",
    "a number": b"\x07",
    "an array": b"\x93\x01\x02\x03",
    "truncated": packed(**LOAD)[:-5],
    "with a tail": packed(verb="status") + b"\x00",
    "oversized": b"\xdb\x00\x00\xf0\x00" + b"x" * 0xF000,
    "promises 4 GiB": b"\xdd\xff\xff\xff\xff",
    "deeply nested": b"\x91" * 16000,
    "deeply nested maps": b"\x81\xa1a" * 5000,
    "keys that are numbers": b"\x81\x01\x02",
    "a key twice": b"\x82" + 2 * b"\xa4verb\xa6status",
    "no verb": packed(name="x"),
    "verb of bytes": packed(verb=b"status"),
    "unknown verb": packed(verb="explode"),
    "a verb that is a list": packed(verb=["status"]),
    "a missing field": packed(verb="drop", name="x"),
    "a lease of text": packed(**{**LOAD, "lease": "long"}),
    "a lease that is no number": packed(**{**LOAD, "lease": float("nan")}),
    "an endless wait": packed(**{**LOAD, "wait": float("inf")}),
    "true for a number": packed(**{**LOAD, "generation": True}),
    "a negative generation": packed(**{**LOAD, "generation": -1}),
    "a nonce of one byte": packed(**{**LOAD, "nonce": b"n"}),
    "a name of 1 KiB": packed(**{**LOAD, "name": "x" * 1024}),
    "broken UTF-8": b"\x81\xa4verb\xa2\xff\xfe",
    "a timestamp": msgpack.packb({"verb": msgpack.Timestamp(1, 1)}),
    "hello again": wire.HELLO,
}
UNREADABLE = [
    *("nothing msgpack", "a number", "an array", "truncated", "with a tail", "oversized"),
    *("promises 4 GiB", "deeply nested", "deeply nested maps", "keys that are numbers"),
    *("a key twice", "broken UTF-8", "a timestamp"),
]


@pytest.mark.parametrize("said_hello", [True, False], ids=["after hello", "as hello"])
def test_noise_gets_a_reason_or_an_end(daemon: DaemonProcess, said_hello: bool) -> None:
    with nobody_else_waits(daemon):
        for what, noise in NOISE.items():
            with (raw if said_hello else silent)(daemon.path) as sock:
                if what == "hello again" and not said_hello:
                    continue
                sock.send(noise)
                got = answer(sock)
                assert got is not None, what
                assert got["error"] == "ProtocolError", (what, got)
                assert got["why"], what
                if not said_hello or what in UNREADABLE:  # what follows noise is noise
                    assert answer(sock) is None, what
                else:
                    sock.send(packed(verb="status"))
                    got = answer(sock)
                    assert got is not None, what
                    assert "ok" in got, what


def test_random_noise_of_64_kib(daemon: DaemonProcess) -> None:
    with nobody_else_waits(daemon):
        for _ in range(50):
            with silent(daemon.path) as sock:
                sock.send(os.urandom(65536))
                got = answer(sock)
                assert got is not None
                assert got["error"] == "ProtocolError"
                assert answer(sock) is None


def test_names_that_are_none_are_refused_and_the_connection_goes_on(daemon: DaemonProcess) -> None:
    with raw(daemon.path) as sock:
        for name in ("", ".x", "a/b/c", "x/y", "\n", "4294967295/x", "99999999999/x", "x" * 256):
            sock.send(packed(**{**LOAD, "name": name}))
            got = answer(sock)
            assert got is not None
            assert got["error"] in ("InvalidInput", "ProtocolError"), (name, got)
        sock.send(packed(verb="status"))
        got = answer(sock)
        assert got is not None
        assert "ok" in got


def test_the_mute_and_those_that_do_not_read_are_cut_off(daemon: DaemonProcess) -> None:
    """A mute one at the first-byte deadline; one that leaves its answers unread some time later."""
    with daemon.connect() as connection, nobody_else_waits(daemon):
        for number in range(60):
            connection.save(f"{number:03}{'x' * 200}", state_of("", [], []))
        begin = time.monotonic()
        with (
            silent(daemon.path) as mute,
            raw(daemon.path) as deaf,
            silent(daemon.path) as slow,
        ):
            sent = 0
            with contextlib.suppress(BlockingIOError):
                deaf.setblocking(False)
                while sent < 10_000:
                    deaf.send(packed(verb="list", after=None))
                    sent += 1
            assert sent < 10_000
            slow.send(b"\x81")  # a byte a second: each is a message, and the first one too few
            refused = answer(slow)
            assert refused is not None
            assert refused["error"] == "ProtocolError"
            assert in_time(time.monotonic() - begin, 2)
            assert answer(mute) is None
            waited = time.monotonic() - begin
            assert messages.FIRST_BYTE < waited < messages.FIRST_BYTE + patience(2)
            daemon.await_log("mute")
            hangup = select.poll()
            hangup.register(deaf, 0)
            assert hangup.poll(15_000)


def nulls(count: int) -> list[int]:
    return [os.open(os.devnull, os.O_RDONLY) for _ in range(count)]


SAVE = {"verb": "save", **wire.save("x", 0, 0, 1), "nonce": NONCE}


# Files that block when they are closed


def lingering() -> tuple[socket.socket, socket.socket]:
    """A TCP connection whose last close waits a minute for its peer to read; and that peer."""
    ours, theirs = tcp_pair()
    ours.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            ours.send(b"x" * 65536)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\x3c\0\0\0")
    return ours, theirs


def test_files_that_block_on_close_block_nobody(daemon: DaemonProcess) -> None:
    """In a hold that is dropped, and in a queue that is not saved."""
    with contextlib.ExitStack() as peers, nobody_else_waits(daemon):
        with daemon.connect() as connection, raw(daemon.path) as sock:
            before = connection.status()["closing"]
            ours, theirs = lingering()
            peers.enter_context(theirs)
            connection.save("x", state_of("", [], [ours.fileno()]))
            os.close(ours.detach())
            ours, theirs = lingering()
            peers.enter_context(theirs)
            with wire.queue(sock) as inlet:
                send(inlet, b"not saved", [ours.fileno()])
                os.close(ours.detach())
            connection.drop("x")
            assert before == {}
            until(lambda: connection.status()["closing"], lambda: "nothing blocks")
            rest(0.2)  # nobody else waits: for so long, too
            assert connection.status()["closing"]
        peers.close()  # their peers end, and with them the waiting
        with daemon.connect() as connection:
            until(lambda: not connection.status()["closing"], lambda: "blocked still")


def await_standstill(sock: socket.socket, connection: cprd.Daemon) -> None:
    """Wait until cprd reads no more of `sock`: while three others were answered, not a byte."""

    def unread() -> int:
        left = array.array("i", [0])
        fcntl.ioctl(sock, termios.TIOCOUTQ, left)
        return left[0]

    def stands() -> bool:
        before = unread()
        for _ in range(3):
            connection.status()
        return unread() == before

    until(stands, lambda: f"{unread()} bytes are unread")


def answers_that_fit(daemon: DaemonProcess, connection: cprd.Daemon, request: bytes) -> int:
    """How many answers a client can leave unread before cprd has to wait for it."""
    with raw(daemon.path) as sock:
        for _ in range(300):
            sock.send(request)
        await_standstill(sock, connection)
        os.kill(daemon.pid, signal.SIGSTOP)
        count = 0
        sock.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            while answer(sock) is not None:
                count += 1
        os.kill(daemon.pid, signal.SIGCONT)
    return count


@pytest.mark.parametrize("verb", ["show", "load"])
def test_a_hold_that_ends_while_its_answer_is_not_read_blocks_nobody(
    daemon: DaemonProcess, verb: str
) -> None:
    """A copy of its bundle is on its way to a client that does not read, and hangs up."""
    small = packed(verb="show", name="small")
    with contextlib.ExitStack() as stack, nobody_else_waits(daemon):
        ours, theirs = lingering()
        stack.enter_context(theirs)
        connection = stack.enter_context(daemon.connect())
        connection.save("small", state_of("", [], []))
        connection.save("x", state_of("", [], [ours.fileno()]))
        fit = answers_that_fit(daemon, connection, small)
        assert 10 < fit < 300
        with raw(daemon.path) as sock:
            for _ in range(fit):
                sock.send(small)
            show = {"verb": "show", "name": "x"}
            sock.send(packed(**(show if verb == "show" else {**LOAD, "lease": 60})))
            await_standstill(sock, connection)
            os.close(ours.detach())
            connection.drop("x", force=True)
        until(lambda: connection.status()["closing"], lambda: "nothing blocks")
        theirs.close()
        until(lambda: not connection.status()["closing"], lambda: "blocked still")


def test_a_uid_whose_files_block_gets_no_queue_in_the_end(daemon: DaemonProcess) -> None:
    """Otherwise what it parks would pile up in cprd, until nothing is left for others."""
    ours, theirs = lingering()
    fds = nulls(10)
    with theirs, raw(daemon.path) as sock:
        with wire.queue(sock) as inlet:
            send(inlet, b"not saved", [ours.fileno()])
            os.close(ours.detach())
        before = daemon.fds()
        for _ in range(250):
            with wire.queue(sock) as inlet:
                send(inlet, b"not saved", fds)

        def refused() -> bool:
            try:
                wire.queue(sock).close()
            except cprd.LimitExceeded:
                return True
            return False

        until(refused, lambda: "it gets one queue after the other")
        daemon.await_log("block when they are closed")
        assert daemon.fds() < before + 300
    close_all(fds)


# Many at once


def test_hundreds_of_connections_of_one_uid_delay_nobody(daemon: DaemonProcess) -> None:
    with daemon.connect() as connection:
        for number in range(1900):
            connection.save(f"{number}", state_of("", [], []))
    with contextlib.ExitStack() as stack, nobody_else_waits(daemon):
        crowd = [stack.enter_context(raw(daemon.path)) for _ in range(300)]
        for _ in range(5):
            for sock in crowd:
                sock.send(packed(verb="list", after=None))
            for sock in crowd:
                assert answer(sock)


def test_more_connections_than_the_quota_are_refused_with_a_reason(
    start_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon = start_daemon(config="[limits]\nconnections = 5\n")
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(daemon.connect())
        for _ in range(3):
            with pytest.raises(cprd.LimitExceeded, match=r"limits\.connections"):
                daemon.connect()

    def alone() -> bool:
        try:
            with daemon.connect() as connection:
                return connection.status()["connections"] == 1
        except cprd.LimitExceeded:  # the ends of the five have not all been seen
            return False

    until(alone, lambda: "not let go")


def test_requests_sent_while_one_is_answered_are_answered_in_turn(daemon: DaemonProcess) -> None:
    with raw(daemon.path) as sock, nobody_else_waits(daemon):
        for _ in range(100):
            sock.send(packed(verb="status"))
        for _ in range(100):
            got = answer(sock)
            assert got is not None
            assert "ok" in got


def test_one_nonce_for_everything_confuses_only_its_user(daemon: DaemonProcess) -> None:
    with daemon.connect() as connection, raw(daemon.path) as sock:
        connection.save("x", state_of("", [], []))
        drop = {"verb": "drop", "name": "x", "force": True, "nonce": NONCE}
        for message in (drop, drop, {**drop, "verb": "release"}, {**drop, "name": "y"}):
            sock.send(msgpack.packb(message))
            assert answer(sock)
        with wire.queue(sock):
            send(sock, msgpack.packb({**SAVE, "verb": "prepare"}))
            answer(sock)
        assert connection.list() == []


def test_files_that_block_do_not_keep_it_from_becoming_a_new_version(
    new_daemon: DaemonProcess,
) -> None:
    """What is still to be closed goes along: exec would close it, and wait. (So does what ended
    before: of a used cprd that is much, and what blocks keeps its uid from being served.)"""
    daemon = new_daemon
    with contextlib.ExitStack() as peers, nobody_else_waits(daemon):
        with daemon.connect() as connection, raw(daemon.path) as sock:
            connection.save("web", state_of("", [], []))
            for _ in range(5):
                ours, theirs = lingering()
                peers.enter_context(theirs)
                with wire.queue(sock) as inlet:
                    send(inlet, b"not saved", [ours.fileno()])
                    os.close(ours.detach())
            seen = len(daemon.log())
            os.kill(daemon.pid, signal.SIGHUP)
            daemon.await_log("ready pid=", since=seen)
            assert [row["name"] for row in connection.list()] == ["web"]
            until(lambda: connection.status()["closing"], lambda: "nothing blocks")
        peers.close()
        with daemon.connect() as connection:
            until(lambda: not connection.status()["closing"], lambda: "blocked still")

"""A nonce answers for the request that it came with: over the wire, with nonces that repeat.

Two programs of one uid that seed rand() by the second are enough to make such nonces.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import pytest

import cprd
from cprd.linux.rights import close_all, receive
from cprd.protocol import messages
from tests.support import wire
from tests.support.bundles import pack
from tests.support.child import Child, Line
from tests.support.daemon import DaemonProcess

pytestmark = pytest.mark.usefixtures("nothing_leaks")


@pytest.fixture
def daemon(new_daemon: DaemonProcess) -> DaemonProcess:
    """One that has met no nonce yet."""
    return new_daemon


NONCE = b"n" * 16


class Raw:
    """A connection that says what it is told to, and the same nonce each time."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(20)
        self.sock.connect(path)
        self.ask("hello", version=messages.VERSION, limits={})

    def ask(self, verb: str, **fields: Any) -> dict[str, Any]:
        """The "ok" of an answer. Raises what cprd raised."""
        self.sock.send(msgpack.packb({"verb": verb, **fields}))
        data, got, _ = receive(self.sock, messages.MAX_ANSWER)
        close_all(got)
        return wire.read_answer(data)

    def save(self, name: str, packed: Any, verb: str = "save", **more: Any) -> dict[str, Any]:
        fields = wire.save(name, packed.fds, packed.size, packed.parked, packed.depth, nonce=NONCE)
        with wire.park(self.sock, packed.fd):
            return self.ask(verb, **{**fields, **more})

    def load(self, name: str, **more: Any) -> dict[str, Any]:
        fields = {"wait": 0, "lease": 60, "generation": None, "nonce": NONCE, **more}
        return self.ask("load", name=name, **fields)

    def say(self, verb: str, claim: dict[str, Any], **more: Any) -> dict[str, Any]:
        said = {"name": "A", "generation": claim["generation"], "token": claim["token"]}
        return self.ask(verb, **{**said, "nonce": NONCE, **more})


@contextlib.contextmanager
def raw(daemon: DaemonProcess) -> Iterator[Raw]:
    one = Raw(daemon.path)
    with one.sock:
        yield one


@contextlib.contextmanager
def bundle(text: str) -> Iterator[Any]:
    state = cprd.State()
    state["text"] = text
    packed = pack(state)
    try:
        yield packed
    finally:
        packed.close()


def reexecuted(daemon: DaemonProcess) -> None:
    seen = len(daemon.log())
    os.kill(daemon.pid, signal.SIGHUP)
    daemon.await_log("ready pid=", since=seen)


def the_same(daemon: DaemonProcess) -> None:
    del daemon


BETWEEN = pytest.mark.parametrize("between", [the_same, reexecuted])
Between = Callable[[DaemonProcess], None]


@BETWEEN
def test_a_second_save_with_a_used_nonce_is_refused_and_not_called_held(
    daemon: DaemonProcess, between: Between
) -> None:
    def saves(line: Line) -> None:
        with raw(daemon) as other, bundle("b") as b:
            try:
                other.save("A", b)
            except cprd.CprdError as error:
                line.say(type(error).__name__)

    with bundle("a") as a, bundle("b") as b:
        with raw(daemon) as first:
            saved = first.save("A", a)
        between(daemon)
        with raw(daemon) as second:
            with Child(saves) as other:
                assert other.hear() == "ProtocolError"
                assert other.wait() == 0
            for name, packed in (("B", b), ("B", a)):
                with pytest.raises(cprd.ProtocolError, match="Nothing was changed"):
                    second.save(name, packed)
            with pytest.raises(cprd.ProtocolError):
                second.save("A", a, ttl=5.0)
            with pytest.raises(cprd.ProtocolError):
                second.save("A", a, "prepare")
            assert second.save("A", a)["generation"] == saved["generation"]
    assert daemon.phases() == {"A": "held"}


@BETWEEN
def test_a_confirm_with_a_used_nonce_is_refused_and_the_claim_can_still_be_confirmed(
    daemon: DaemonProcess, between: Between
) -> None:
    with daemon.connect() as connection:
        connection.save("A", cprd.State())
    with raw(daemon) as kept:
        claim = kept.load("A")
        between(daemon)
        with raw(daemon) as claimant:
            for verb in ("confirm", "abort", "commit"):
                with pytest.raises(cprd.ProtocolError, match=f"{verb}: this nonce came with"):
                    claimant.say(verb, claim)
            with pytest.raises(cprd.ProtocolError):
                claimant.say("reject", claim, why="", damaged=False)
            assert daemon.phases() == {"A": "claimed"}
            claimant.say("confirm", claim, nonce=b"o" * 16)
    assert daemon.phases() == {}


@BETWEEN
def test_a_begin_with_a_used_nonce_is_refused_and_nothing_is_in_doubt(
    daemon: DaemonProcess, between: Between
) -> None:
    with daemon.connect() as connection:
        connection.save("A", cprd.State())
    with raw(daemon) as kept:
        claim = kept.load("A")
        between(daemon)
        with raw(daemon) as claimant:
            with pytest.raises(cprd.ProtocolError):
                claimant.say("begin", claim, pid=0, inode=0)
            assert daemon.phases() == {"A": "claimed"}
            claimant.say("begin", claim, pid=0, inode=0, nonce=b"o" * 16)
            assert daemon.phases() == {"A": "in-doubt"}


@BETWEEN
def test_what_ended_a_hold_answers_for_itself_only(daemon: DaemonProcess, between: Between) -> None:
    with daemon.connect() as connection, bundle("a") as a:
        dropped = connection.save("A", cprd.State()).generation
        connection.save("B", cprd.State())
        with raw(daemon) as first:
            first.ask("drop", name="A", force=False, nonce=NONCE)
        between(daemon)
        with raw(daemon) as second:
            with pytest.raises(cprd.ProtocolError):
                second.ask("drop", name="B", force=False, nonce=NONCE)
            with pytest.raises(cprd.ProtocolError):
                second.ask("release", name="A", force=False, nonce=NONCE)
            with pytest.raises(cprd.ProtocolError):
                second.save("A", a)
            again = second.ask("drop", name="A", force=False, nonce=NONCE)
            assert again["generation"] == dropped
    assert daemon.phases() == {"B": "held"}


def test_a_load_with_the_nonce_of_another_process_is_not_a_second_claim(
    daemon: DaemonProcess,
) -> None:
    def loads(line: Line) -> None:
        with raw(daemon) as other:
            try:
                other.load("A")
            except cprd.CprdError as error:
                line.say(type(error).__name__)

    with daemon.connect() as connection, raw(daemon) as first:
        connection.save("A", cprd.State())
        claim = first.load("A")
        with Child(loads) as other:
            assert other.hear() == "ProtocolError"
            assert other.wait() == 0
        assert first.load("A", wait=5)["token"] == claim["token"]  # `wait` is what is left of it


def test_a_load_said_again_after_its_claim_ended_is_a_new_load(daemon: DaemonProcess) -> None:
    """As by a client whose connection broke before the answer: its first claim ended with it."""
    with daemon.connect() as connection:
        connection.save("A", cprd.State())
        with raw(daemon) as first:
            claim = first.load("A")
        with raw(daemon) as second:
            connection.wait("A", 20)
            again = second.load("A")
            assert again["attempts"] == 2
            assert again["token"] != claim["token"]


def test_busy_says_which_process_is_in_the_way_and_until_when(daemon: DaemonProcess) -> None:
    with daemon.connect() as connection, raw(daemon) as claimant:
        connection.save("A", cprd.State())
        claimant.load("A")
        with pytest.raises(cprd.Busy) as busy:
            connection.load("A")
        assert (busy.value.pid, busy.value.phase) == (os.getpid(), "claimed")
        assert busy.value.until is not None
        connection.save("B", cprd.State(), after_exit=True)
        with pytest.raises(cprd.Busy) as busy:
            connection.load("B")
        assert (busy.value.pid, busy.value.phase, busy.value.until) == (os.getpid(), "held", None)
        row = connection.show("B")
        assert (row["phase"], row["in_use_by"]) == ("held", os.getpid())
        assert row["reason"].startswith(f"in use by pid {os.getpid()}:")

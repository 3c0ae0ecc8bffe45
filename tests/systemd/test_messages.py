"""cprd.systemd without a systemd: messages, and a manager's socket that this test reads, or does
not read."""

from __future__ import annotations

import os
import re
import select
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from cprd.daemon.manager import adrive
from cprd.errors import InvalidInput, LimitExceeded, ProtocolError, Timeout, Unavailable
from cprd.systemd import fdstore, notify
from tests.support.descriptors import open_fds


@pytest.mark.parametrize("name", ["", "a/b c", "..", "~", " ", "x" * 255])
def test_a_name_that_the_store_keeps_is_accepted(name: str) -> None:
    assert fdstore.check_name(name) == name


@pytest.mark.parametrize("name", ["a:b", "x" * 256, "a\nb", "é", "\x7f", "a\0"])
def test_a_name_that_the_store_would_replace_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput):
        fdstore.store_message(name)
    with pytest.raises(InvalidInput):
        fdstore.remove_message(name)


def test_messages_are_those_of_sd_notify() -> None:
    assert notify.status("evil\nMAINPID=1") == b"STATUS=evil MAINPID=1"
    assert re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=[0-9]+", notify.reloading())
    assert notify.stopping("5 holds") == b"STOPPING=1\nSTATUS=5 holds"
    assert notify.mainpid(42) == b"MAINPID=42"
    assert fdstore.store_message("a b") == b"FDSTORE=1\nFDPOLL=0\nFDNAME=a b"
    assert fdstore.remove_message("a b") == b"FDSTOREREMOVE=1\nFDNAME=a b"


def test_the_watchdog_watches_one_process_only() -> None:
    own = str(os.getpid())
    assert notify.watchdog_interval({}) is None
    assert notify.watchdog_interval({"WATCHDOG_USEC": "30000000"}) == 30.0
    environ = {"WATCHDOG_USEC": "500000", "WATCHDOG_PID": own}
    assert notify.watchdog_interval(environ) == 0.5
    assert len(environ) == 2
    assert notify.watchdog_interval({"WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"}) is None
    with pytest.raises(ProtocolError, match="WATCHDOG_USEC"):
        notify.watchdog_interval({"WATCHDOG_USEC": "soon"})


@pytest.fixture
def inbox(tmp_path: Path) -> socket.socket:
    """A manager's socket that nobody reads unless the test does."""
    own = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    own.bind(str(tmp_path / "notify"))
    return own


def manager(inbox: socket.socket) -> notify.Manager:
    own = notify.Manager.from_environment({"NOTIFY_SOCKET": inbox.getsockname()})
    assert own is not None
    return own


def test_no_manager_is_none_and_a_dead_one_is_unavailable(tmp_path: Path) -> None:
    assert notify.Manager.from_environment({}) is None
    before = open_fds()
    with notify.Manager(str(tmp_path / "nobody")) as told:
        for _ in range(2):
            with pytest.raises(Unavailable, match="NOTIFY_SOCKET"):
                told.send_now(notify.WATCHDOG)
    with pytest.raises(InvalidInput, match="vsock"):
        notify.Manager("vsock:2:1")
    assert open_fds() == before


def test_an_abstract_address_is_understood() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
        own.bind(f"\0cprd-test-{os.getpid()}")
        with notify.Manager(f"@cprd-test-{os.getpid()}") as told:
            notify.drive(told.tell(notify.WATCHDOG), 5)
        assert own.recv(100) == b"WATCHDOG=1"


def test_a_manager_that_made_a_new_socket_is_found_again(inbox: socket.socket) -> None:
    with manager(inbox) as told:
        address = inbox.getsockname()
        inbox.close()
        os.unlink(address)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as successor:
            successor.bind(address)
            notify.drive(told.tell(notify.WATCHDOG), 5)
            assert successor.recv(100) == b"WATCHDOG=1"
        for _ in range(3):  # as often as somebody tries
            with pytest.raises(Unavailable):
                notify.drive(told.tell(notify.WATCHDOG), 5)
        os.unlink(address)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as third:
            third.bind(address)
            notify.drive(told.tell(notify.WATCHDOG), 5)
            assert third.recv(100) == b"WATCHDOG=1"


def fill(told: notify.Manager) -> int:
    """Send until the receiver's queue is full; how many fitted."""
    sent = 0
    while told.send_now(notify.status(str(sent))):
        sent += 1
    return sent


def test_a_manager_that_is_behind_is_waited_for_and_not_for_ever(inbox: socket.socket) -> None:
    with inbox, manager(inbox) as told:
        assert fill(told) > 1
        before = open_fds()
        with pytest.raises(Timeout):
            notify.drive(told.barrier(), 0.05)
        assert open_fds() == before
        inbox.recv(100)
        notify.drive(told.tell(notify.WATCHDOG), 5)


def test_a_barrier_that_nobody_answers_times_out_and_leaks_nothing(inbox: socket.socket) -> None:
    with inbox, manager(inbox) as told:
        told.send_now(notify.WATCHDOG)
        before = open_fds()
        with pytest.raises(Timeout, match="did not answer"):
            notify.drive(told.barrier(), 0.05)
        with pytest.raises(Timeout):
            notify.drive(fdstore.keep(told, [("a", 0)]), 0.05)
        assert open_fds() == before


async def test_under_trio_room_is_awaited_and_a_cancelled_wait_leaks_nothing(
    inbox: socket.socket,
) -> None:
    with inbox, manager(inbox) as told:
        count = fill(told)
        before = open_fds()
        with trio.move_on_after(0.05) as scope:
            await adrive(told.tell(notify.WATCHDOG))
        assert scope.cancelled_caught
        with trio.move_on_after(0.05) as scope:
            await adrive(told.barrier())
        assert scope.cancelled_caught
        assert open_fds() == before
        async with trio.open_nursery() as nursery:
            nursery.start_soon(adrive, told.tell(notify.WATCHDOG))
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(count):
                inbox.recv(100)
        assert inbox.recv(100) == b"WATCHDOG=1"


async def test_under_trio_a_barrier_ends_when_the_last_copy_is_closed(inbox: socket.socket) -> None:
    with inbox, manager(inbox) as told:
        told.send_now(notify.WATCHDOG)
        before = open_fds()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(adrive, told.barrier())
            await trio.testing.wait_all_tasks_blocked()
            assert inbox.recv(100) == b"WATCHDOG=1"
            message, fds, _, _ = socket.recv_fds(inbox, 100, 5)
            assert (message, len(fds)) == (b"BARRIER=1", 1)
            os.close(fds[0])
        assert open_fds() == before


def test_a_witness_knows_whether_another_process_polled_it() -> None:
    before = open_fds()
    assert fdstore.Witness.works()
    for somebody_polls in (True, False):
        with fdstore.Witness() as witness:
            pid = os.fork()
            if pid == 0:
                if somebody_polls:
                    poll = select.epoll()
                    poll.register(witness, 0)
                os._exit(0)
            os.waitpid(pid, 0)
            assert witness.polled() == somebody_polls
    assert open_fds() == before


def test_too_many_descriptors_in_one_message_are_refused(inbox: socket.socket) -> None:
    with inbox, manager(inbox) as told, pytest.raises(LimitExceeded, match="253"):
        told.send_now(b"FDSTORE=1", [0] * 254)


def test_importing_it_pulls_in_nothing_slow() -> None:
    heavy = "{'trio', 'asyncio', 'inspect', 'dataclasses', 'logging', 'json'}"
    code = "import sys, cprd.systemd.fdstore, cprd.systemd.notify;"
    code += f" print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "[]"

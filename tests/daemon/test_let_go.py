"""A hold that ended holds nothing: connections see their end, memory is free, nothing grows."""

from __future__ import annotations

import os
import time

import pytest

import cprd
from tests.support.child import Child, Line
from tests.support.daemon import DaemonProcess
from tests.support.descriptors import open_fds
from tests.support.goods import state_of, tcp_pair
from tests.support.memory import Memory
from tests.support.patience import patience
from tests.support.processes import await_quiet

pytestmark = pytest.mark.usefixtures("nothing_leaks")

SOON = patience(1.0)  # s
MIB = 1 << 20


@pytest.mark.parametrize("end", ["confirm", "confirm alone", "drop", "replace", "ttl"])
def test_a_connection_that_all_have_closed_sees_its_end(daemon: DaemonProcess, end: str) -> None:
    ours, theirs = tcp_pair()
    with daemon.connect() as connection, theirs:
        ttl = 0.2 if end == "ttl" else None
        connection.save("web", state_of("x", [], [ours.fileno()]), ttl=ttl)
        ours.close()
        theirs.setblocking(False)
        if end != "ttl":
            with pytest.raises(BlockingIOError):  # held, by nobody's table of descriptors
                theirs.recv(1)
        theirs.setblocking(True)
        theirs.settimeout(10)
        if end == "confirm":
            with connection.load("web"):
                pass
        elif end == "confirm alone":  # what was taken is ours to close, whatever the claim does
            claim = connection.load("web")
            os.close(claim.state.take_fd("connection"))
            claim.confirm()
        elif end == "drop":
            connection.drop("web")
        elif end == "replace":
            connection.save("web", state_of("y", [], []), if_exists="replace")
        begin = time.monotonic()
        assert theirs.recv(1) == b""
        assert time.monotonic() - begin < SOON
        if end == "confirm alone":
            claim.close()


@pytest.mark.parametrize("end", ["confirm", "drop"])
@pytest.mark.parametrize("kind", ["section", "descriptor"])
def test_the_memory_of_a_memfd_is_free_again(daemon: DaemonProcess, kind: str, end: str) -> None:
    memory = Memory(MIB)
    state = cprd.State()
    if kind == "section":
        state.save_section_fd("ram", memory.fd)
    else:
        state.save_fd("ram", 0, memory.fd)
    with daemon.connect() as connection:
        connection.save("web", state)
        memory.saved()
        assert not memory.free(0.1)
        if end == "drop":
            connection.drop("web")
        else:
            with connection.load("web") as claim:
                if kind == "section":
                    assert len(claim.state["ram"]) == MIB
        assert memory.free(SOON)
    memory.close()


WARM, MEASURED, DESCRIPTORS = 100, 1000, 100


def hands_over(line: Line, path: str) -> None:
    """Takes what is held and leaves it again, as often as it is told."""
    eventfds = [os.eventfd(number) for number in range(DESCRIPTORS)]
    with cprd.connect(path) as daemon:
        while told := int(line.hear()):
            for _ in range(told):
                daemon.save("web", state_of("web", eventfds, []))
                with daemon.load("web") as claim:
                    assert claim.state.fd_count == DESCRIPTORS
            line.say(open_fds())
    line.say("end")


def private_memory(pid: int) -> int:
    """Bytes that are this process's alone, written to."""
    total = 0
    with open(f"/proc/{pid}/smaps_rollup") as file:
        for line in file:
            if line.startswith(("Private_Dirty:", "Swap:")):
                total += int(line.split()[1]) * 1024
    return total


def test_a_thousand_hand_overs_leave_nothing_behind(daemon: DaemonProcess) -> None:
    with Child(hands_over, daemon.path) as client:
        client.say(WARM)
        fds_before = client.hear()
        await_quiet(daemon.pid)
        daemon_fds, memory = daemon.fds(), private_memory(daemon.pid)
        client.say(MEASURED)
        assert client.hear() == fds_before
        daemon.await_fds(daemon_fds)
        grown = private_memory(daemon.pid) - memory
        assert grown < MIB, f"cprd grew by {grown} bytes in {MEASURED} hand-overs"
        client.say(0)
        client.hear()
        assert client.wait() == 0

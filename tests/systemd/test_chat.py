"""chat@.service, the demo's server, through restarts of itself and of cprd: its clients stay
connected, never at rest, and each tally goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from .machine import Machine
from .vm import install_cprd

UNIT = "chat@7000.service"
CLIENTS = """
import json, sys, time, trio
from cprd.demo.load import Load

COUNT = 40

async def connect(load):
    while True:
        try:
            return await load.connect(7000)
        except OSError:
            await trio.sleep(0.01)  # the first server does not listen yet: nobody says when

async def main():
    load = Load(COUNT, 400, time.monotonic)
    with trio.fail_after(20):
        await connect(load)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(load.run, 7000)
        lines = trio.lowlevel.FdStream(0)
        while await lines.receive_some(1):
            goal, visits = len(load.answers) + COUNT, load.visits
            with trio.fail_after(20):
                while len(load.answers) < goal or load.visits == visits:
                    await trio.sleep(0.01)  # Load says nothing when an answer comes
            tell(load)
        with trio.fail_after(20):
            await load.settle()
        nursery.cancel_scope.cancel()
    tell(load)

def tell(load):
    words = {name: getattr(load, name) for name in ("connected", "wrong", "dropped", "owed")}
    print(json.dumps({"answers": len(load.answers), **words}), flush=True)

trio.run(main)
"""


class Clients:
    """40 connections in the machine, each with numbers to send and a sum to compare."""

    def __init__(self, machine: Machine) -> None:
        program = machine.root / "run/boot/clients.py"
        program.write_text(CLIENTS)
        self._process = machine.popen(
            "test-python", "/run/boot/clients.py", stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def are_served(self) -> int:
        """Wait for more answers and for a new connection; nothing may be wrong: answers so far."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"?")
        self._process.stdin.flush()
        return self._told()

    def _told(self) -> int:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the clients gave up"
        told = json.loads(line)
        assert told["wrong"] == told["dropped"] == 0
        assert told["connected"] == 40
        self.owed = int(told["owed"])
        return int(told["answers"])

    def settle(self) -> int:
        """No more numbers; every answer that is owed comes."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        answers = self._told()
        assert self.owed == 0
        assert self._process.wait() == 0
        return answers

    def close(self) -> None:
        if self._process.poll() is None:
            Machine.signal(self._process, signal.SIGKILL)
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


@pytest.fixture
def chat(systemd: Machine) -> Iterator[Clients]:
    """The service, started, and its clients."""
    install_cprd(systemd)
    systemd.systemctl("start", UNIT)
    clients = Clients(systemd)
    try:
        clients.are_served()
        yield clients
    finally:
        clients.close()


def test_restarted_again_and_again_no_client_notices(systemd: Machine, chat: Clients) -> None:
    seen = {systemd.main_pid(UNIT)}
    for _ in range(3):
        systemd.systemctl("restart", UNIT)
        chat.are_served()
        pid = systemd.main_pid(UNIT)
        assert pid not in seen
        seen.add(pid)
    assert chat.settle() > 160


def test_restarted_together_with_cprd_in_both_orders(systemd: Machine, chat: Clients) -> None:
    for units in (("cprd.service", UNIT), (UNIT, "cprd.service")):
        before = {systemd.main_pid(unit) for unit in units}
        systemd.systemctl("restart", *units)
        assert before.isdisjoint({systemd.main_pid(unit) for unit in units})
        chat.are_served()
    chat.settle()


def test_stopped_and_cprd_killed_meanwhile_it_goes_on(systemd: Machine, chat: Clients) -> None:
    systemd.systemctl("stop", UNIT)
    os.kill(systemd.main_pid("cprd.service"), signal.SIGKILL)
    systemd.systemctl("start", UNIT)
    chat.are_served()
    chat.settle()


@pytest.mark.full
def test_fifty_restarts_while_cprd_is_killed_every_third_time(
    systemd: Machine, chat: Clients
) -> None:
    for turn in range(50):
        if turn % 3 == 0:
            os.kill(systemd.main_pid("cprd.service"), signal.SIGKILL)
        systemd.systemctl("restart", UNIT)
        chat.are_served()
    chat.settle()

"""A Linux guest at work goes through holds: its network, fsync'ed writes, port and memory."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.qemu.conftest import MakeMachine
from tests.qemu.linux import FIRST_SECTOR, SECTORS, Linux, Missing, fetch
from tests.qemu.machine import Machine
from tests.support.patience import patience, until

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]

BOOTING = 120.0  # s: an emulated CPU takes its time
ROUND = re.compile(r"T (\d+) cpus=(\d+) disk=(\w+) net=(\w+) port=(\w+) memory=(\w+)")
TROUBLE = re.compile(r"\b(BUG|Oops|panic|I/O error|soft lockup|rcu: INFO|blocked for more)\b")


@pytest.fixture(scope="module")
def linux(tmp_path_factory: pytest.TempPathFactory) -> Linux:
    try:
        return fetch(tmp_path_factory.mktemp("linux"))
    except Missing as why:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(why))


class Guest:
    """What the guest in `vm` says of itself."""

    def __init__(self, vm: Machine, port: Path, cpus: int) -> None:
        self.vm = vm
        self.port = port
        self.cpus = cpus

    def rounds(self) -> int:
        """How many it has done: all of them well, in order, and its kernel complains of nothing."""
        done = 0
        for line in self.vm.lines():
            assert not TROUBLE.search(line), line
            found = ROUND.search(line)
            if found is None:
                continue
            done += 1
            assert found.groups() == (str(done), str(self.cpus), "ok", "ok", "ok", "ok"), line
        return done

    def goes_on(self, rounds: int = 12, seconds: float = 60.0) -> int:
        goal = self.rounds() + rounds
        until(
            lambda: self.rounds() >= goal,
            lambda: f"{self.rounds()} of {goal} rounds: {self.vm.lines()[-20:]}",
            patience(seconds),
        )
        return self.rounds()

    def wrote_everything(self, place: Path) -> None:
        """With nobody alive: each round that was acknowledged is on the disk and came out of the
        port, whatever QEMU it was done in."""
        done = self.rounds()
        raw = place / "disk.raw"
        subprocess.run(["qemu-img", "convert", "-O", "raw", self.vm.disk, raw], check=True)
        data = raw.read_bytes()
        for number in range(max(1, done - SECTORS + 2), done + 1):
            at = (FIRST_SECTOR + number % SECTORS) * 512
            assert data[at : at + 512].split() == [str(number).encode()]
        said = self.port.read_text().splitlines()
        assert said[:done] == [f"P {number}" for number in range(1, done + 1)]
        assert len(said) <= done + 1  # the one under way
        check = subprocess.run(["qemu-img", "check", "-q", self.vm.disk], check=False)
        assert check.returncode == 0


@pytest.fixture
def boot(make_machine: MakeMachine, linux: Linux, tmp_path: Path) -> Callable[..., Guest]:
    def make(machine: str = "q35", sleep_at: int = 0) -> Guest:
        port = tmp_path / "port"
        vm = make_machine(
            *linux.arguments(sleep_at),
            *("-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0"),
            *("-device", "virtio-serial-pci", "-chardev", f"file,id=p0,path={port},append=on"),
            *("-device", "virtserialport,chardev=p0,name=t"),
            machine=machine,
            memory="256M",
            smp=2,
            disk="qcow2",
        )
        vm.start()
        guest = Guest(vm, port, cpus=2)
        guest.goes_on(4, BOOTING)
        return guest

    return make


@pytest.mark.parametrize("machine", ["q35", "pc"])
def test_linux_at_work_goes_through_holds_and_an_upgrade(
    boot: Callable[..., Guest], machine: str, tmp_path: Path
) -> None:
    guest = boot(machine)
    vm = guest.vm
    for _ in range(5):
        saved = vm.save()
        assert saved.returncode == 0, saved.stderr
        assert vm.alive() == []
        guest.wrote_everything(tmp_path)
        vm.start()
        guest.goes_on()
    done = vm.upgrade(vm.qmp, vm.command)
    assert done.returncode == 0, done.stderr
    guest.goes_on()
    assert vm.save().returncode == 0
    guest.wrote_everything(tmp_path)


def test_a_guest_that_sleeps_is_held_asleep_and_wakes_in_the_next_qemu(
    boot: Callable[..., Guest],
) -> None:
    guest = boot(sleep_at=10)
    vm = guest.vm
    vm.await_status("suspended")
    done = guest.rounds()
    for _ in range(2):
        saved = vm.save()
        assert saved.returncode == 0, saved.stderr
        vm.start()
        vm.until(lambda: vm.cprctl("show", vm.name).returncode == 3, "confirmed")
        assert vm.status() == "suspended"
    assert guest.rounds() == done
    vm.execute("system_wakeup")
    guest.goes_on()
    assert vm.status() == "running"

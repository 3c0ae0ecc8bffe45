"""A Linux guest at work goes through holds: its network, fsync'ed writes, port and memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
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
    def make(machine: str = "q35", sleep_at: int = 0, *more: str) -> Guest:
        port = tmp_path / "port"
        vm = make_machine(
            *linux.arguments(sleep_at),
            *("-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0"),
            *("-device", "virtio-serial-pci", "-chardev", f"file,id=p0,path={port},append=on"),
            *("-device", "virtserialport,chardev=p0,name=t"),
            *more,
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


def synced(guest: Guest) -> int:
    """The last round that the guest wrote to its file system, and synced."""
    found = [line for line in guest.vm.lines() if line.startswith("F ")]
    return int(found[-1].split()[1]) if found else 0


def is_whole(guest: Guest, image: Path, place: Path) -> None:
    """The file system has all that the guest has synced, and no fault: e2fsck plays the journal
    back, as the next boot would, and finds nothing more."""
    done = synced(guest)
    assert done
    copy = place / "fs.raw"
    subprocess.run(["qemu-img", "convert", "-U", "-O", "raw", image, copy], check=True)
    played = subprocess.run(["e2fsck", "-fy", copy], capture_output=True, text=True, check=False)
    assert played.returncode in (0, 1), played.stdout
    assert "INCONSISTENCY" not in played.stdout, played.stdout
    assert subprocess.run(["e2fsck", "-fn", copy], capture_output=True, check=False).returncode == 0
    said = subprocess.run(
        ["debugfs", "-R", f"cat /n{done % 50}", copy], capture_output=True, text=True, check=True
    )
    assert int(said.stdout) >= done


def test_a_file_system_survives_each_refusal_and_each_hand_over(
    boot: Callable[..., Guest], tmp_path: Path
) -> None:
    """A snapshot moves the disk of a guest at work: the words of before are refused, and the right
    words take the guest on, on the image that has all the writes."""
    if shutil.which("mkfs.ext4") is None or shutil.which("debugfs") is None:
        pytest.skip("wants mkfs.ext4 and debugfs: apt-get install e2fsprogs")
    old, new = tmp_path / "fs.img", tmp_path / "over.qcow2"
    old.write_bytes(b"")
    os.truncate(old, 64 << 20)
    subprocess.run(["mkfs.ext4", "-q", old], check=True)
    drive = f"file={old},format=raw,if=none,id=fs"
    guest = boot("q35", 0, "-drive", drive, "-device", "virtio-blk-pci,drive=fs,id=fsdisk")
    vm = guest.vm
    names = {"snapshot-file": str(new), "format": "qcow2"}
    vm.execute("blockdev-snapshot-sync", device="fs", **names)
    guest.goes_on(6)
    refused = vm.upgrade(vm.qmp, vm.command)
    assert refused.returncode == 1
    assert str(new) in refused.stderr
    guest.goes_on(6)
    assert vm.save().returncode == 0
    is_whole(guest, new, tmp_path)
    assert vm.start().wait(30) != 0  # refused again
    is_whole(guest, new, tmp_path)
    vm.command = [w.replace(drive, f"file={new},format=qcow2,if=none,id=fs") for w in vm.command]
    vm.start()
    before = synced(guest)
    guest.goes_on()
    assert synced(guest) > before
    done = vm.upgrade(vm.qmp, vm.command)
    assert done.returncode == 0, done.stderr
    guest.goes_on()
    assert vm.save().returncode == 0
    is_whole(guest, new, tmp_path)


def test_a_clock_that_stood_still_is_set_by_the_guest_agent(boot: Callable[..., Guest]) -> None:
    """A real qemu-ga in the guest."""
    place = tempfile.mkdtemp()
    agent = f"{place}/agent"
    guest = boot(
        "q35",
        0,
        *("-chardev", f"socket,id=ga,path={agent},server=on,wait=off"),
        *("-device", "virtserialport,chardev=ga,name=org.qemu.guest_agent.0"),
    )
    vm = guest.vm

    def behind() -> float:
        """s that the guest's clock is behind ours."""
        guest.goes_on(2)
        clocks = [line for line in vm.lines() if line.startswith("C ")]
        if not clocks:
            pytest.skip("no qemu-guest-agent could be had")
        return time.time() - int(clocks[-1].split()[1])

    assert abs(behind()) < 4
    assert vm.save().returncode == 0
    time.sleep(12)  # nothing to wait for: time is what this is about
    vm.start()
    assert behind() > 9
    assert vm.save().returncode == 0
    vm.start("--set-time", agent)
    vm.until(lambda: vm.cprctl("show", vm.name).returncode == 3, "confirmed")
    vm.until(lambda: behind() < 4, "a clock that is right")
    assert "was not set" not in vm.said()
    assert vm.save().returncode == 0
    vm.start("--set-time", f"{place}/nobody")
    guest.goes_on()
    assert "the guest's clock was not set" in vm.said()

"""What the Linux guest says of itself, and what lies on its disks."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.qemu.linux import FIRST_SECTOR, SECTORS
from tests.qemu.machine import Machine
from tests.support.patience import patience, until

BOOTING = 120.0  # s: an emulated CPU takes its time
ROUND = re.compile(r"T (\d+) cpus=(\d+) disk=(\w+) net=(\w+) port=(\w+) memory=(\w+)")
TROUBLE = re.compile(r"\b(BUG|Oops|panic|I/O error|soft lockup|rcu: INFO|blocked for more)\b")


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

"""A VM of the unit vm@.service in a booted machine: what it is, what its guest and journal prove.

Its disk and its serial log lie in the machine, at /var/lib/vm; they stay readable when the machine
has gone down, for they are held open here."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from tests.qemu.guest import boot_sector
from tests.qemu.machine import QEMU
from tests.qemu.machine import Machine as Vm

from .machine import TREE, Machine
from .ours import UNITS, install

PLACE = "/var/lib/vm"
POLLS_THE_BUTTON = bytes.fromhex("f6 c4 01 74")  # test ah,1; jz ...
NEVER_MIND_IT = bytes.fromhex("f6 c4 01 eb")  # ... jmp ...
QCOW2_DIRTY = 1  # of the incompatible features, at byte 72


def needs_qemu() -> None:
    """Skip where there is no QEMU in the tree that is booted."""
    where = os.pathsep.join(f"{TREE.rstrip('/')}/usr/{name}" for name in ("local/bin", "bin"))
    if shutil.which(QEMU, path=where) is None or shutil.which("qemu-img") is None:
        pytest.skip(f"{QEMU} is not installed in {TREE}, or qemu-img not here (apt: see tests/run)")


class Guest(Vm):
    """vm@NAME, installed, its guest not started. `unit` is what systemctl calls it."""

    def __init__(
        self,
        systemd: Machine,
        name: str = "test",
        *,
        machine: str = "q35",
        disk: str = "raw",
        stubborn: bool = False,
    ) -> None:
        """`stubborn`: the guest does not react to its power button."""
        self.systemd = systemd
        self.unit = f"vm@{name}.service"
        place = systemd.root / PLACE.lstrip("/") / name
        place.mkdir(parents=True)
        sector = boot_sector()
        if stubborn:
            assert sector.count(POLLS_THE_BUTTON) == 1
            sector = sector.replace(POLLS_THE_BUTTON, NEVER_MIND_IT)
        image = place / f"disk.{disk}"
        image.write_bytes(sector.ljust(1 << 20, b"\0"))
        if disk == "qcow2":
            raw = image.rename(place / "raw")
            # Small clusters: the guest's first write takes a new one, and makes the image dirty.
            options = "lazy_refcounts=on,cluster_size=512"
            qemu_img("convert", "-S", "512", "-f", "raw", "-O", "qcow2", "-o", options, raw, image)
            raw.unlink()
        super().__init__(place, "", name=name, machine=machine, disk=disk)
        self.uid, gid = (int(field) for field in self._user()[2:4])
        self.log.touch()
        for path in (place, self.disk, self.log):
            os.chown(path, self.uid, gid)
        self._log = self.log.open("rb")
        self._image = self.disk.open("rb")
        self.qmp = f"{systemd.root}/run/vm/{name}/qmp"
        self.configure()

    def _user(self) -> list[str]:
        people = (self.systemd.root / "etc/passwd").read_text().splitlines()
        return next(row for row in people if row.startswith("vm:")).split(":")

    @property
    def arguments(self) -> str:
        """What EnvironmentFile= has: all but the program and -qmp, by the paths in there."""
        words = [word.replace(str(self.systemd.root), "") for word in self.command[1:]]
        at = words.index("-qmp")
        return " ".join(words[:at] + words[at + 2 :])

    def configure(self, arguments: str = "") -> None:
        file = self.systemd.root / f"etc/cprd/vm/{self.name}.conf"
        file.write_text(f"QEMU_ARGS={arguments or self.arguments}\n")

    # The unit

    def systemctl(self, verb: str) -> None:
        """A job of this unit that has to succeed."""
        self.systemd.systemctl(verb, self.unit)

    def attempt(self, verb: str) -> int:
        """A job of this unit; the exit status of systemctl."""
        return self.systemd.attempt("systemctl", verb, self.unit)[0]

    def state(self) -> str:
        return self.systemd.show(self.unit, "ActiveState")

    def await_state(self, state: str) -> None:
        self.until(lambda: self.state() == state, f"{state}, is {self.state()}")

    def said(self) -> str:
        return self.systemd.journal(self.unit)

    def ctl(self, *words: str) -> tuple[int, str]:
        """cprctl in the machine, as the VM's user: its exit status, and what it said."""
        return self.systemd.attempt("cprctl", *words, user="vm")

    def phases(self) -> dict[str, str]:
        """What cprd holds for the VM's user."""
        rows = json.loads(self.systemd.run("cprctl", "list", "--json", user="vm"))
        return {row["name"]: row["phase"] for row in rows}

    # The guest

    def words(self) -> list[str]:
        """All whole lines that the guest ever said."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace").split("\n")[:-1]

    def lines(self) -> list[str]:
        """Those of its only boot, up to the moment in which it switched itself off."""
        words = self.words()
        return words[:-1] if words[-1:] == ["OFF"] else words

    def alive(self) -> list[int]:
        """The QEMUs of this VM (their pids out here), in this machine."""
        found = []
        for pid in processes(self.systemd):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            # (A zombie has no command line.)
            is_qemu = os.path.basename(words[0]).startswith(b"qemu-system")
            if is_qemu and any(f"/vm/{self.name}/".encode() in word for word in words):
                found.append(pid)
        return found

    def runs_in_the_unit(self) -> int:
        """The guest counts on, in the one QEMU of this VM, which is the unit's main process: its
        pid out here."""
        self.goes_on()
        [pid] = self.alive()
        assert self.systemd.main_pid(self.unit) == pid
        assert self.state() == "active"
        self.no_signal()
        return pid

    def no_signal(self) -> None:
        """QEMU says so when one ends it."""
        assert "terminating on signal" not in self.said()

    def went_off_by_itself(self) -> None:
        """The guest saw its power button, and switched itself off; nothing else was wrong."""
        assert self.words()[-1:] == ["OFF"], self.words()[-3:]
        self.unharmed()
        assert self.alive() == []

    def is_dirty(self) -> bool:
        """Whether its image (qcow2, written to since it was opened) has not been closed."""
        [features] = struct.unpack(">Q", os.pread(self._image.fileno(), 8, 72))
        return bool(features & QCOW2_DIRTY)

    def sector(self, number: int, scratch: Path) -> bytes:
        """What is in its image, which must be whole; `scratch` is a directory for a copy."""
        copy, raw = scratch / "copy", scratch / "raw"
        copy.write_bytes(os.pread(self._image.fileno(), 1 << 24, 0))
        kind = self.disk.suffix[1:]
        if kind == "qcow2":
            qemu_img("check", "-f", kind, copy)
        qemu_img("convert", "-f", kind, "-O", "raw", copy, raw)
        return raw.read_bytes()[512 * number : 512 * (number + 1)]

    def close(self) -> None:
        self._log.close()
        self._image.close()


def processes(machine: Machine) -> list[int]:
    """All of the machine's, by their pids out here."""
    own = os.readlink(f"/proc/{machine.pid}/ns/pid")
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{pid}/ns/pid") == own:
                found.append(int(pid))
        except OSError:
            continue
    return found


def install_cprd(machine: Machine) -> None:
    """Everything that we ship, as it stands; cprd started, its store found good."""
    install(machine)
    machine.systemctl("start", "cprd.socket", "cprd.service")


def unit_line(unit: str, start: str) -> str:
    """The line of one of our units that starts so."""
    lines = (UNITS / unit).read_text().splitlines()
    [line] = [line for line in lines if line.startswith(start)]
    return line


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *words], check=True, stdout=subprocess.DEVNULL)

"""A new QEMU that not even SIGKILL ends: it hangs in the kernel, on a file system that does not
answer. Nothing is given back before it has ended."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.qemu.machine import Machine
from tests.qemu.steps import rows, settings
from tests.support.checkout import CHECKOUT
from tests.support.patience import PATIENCE

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root"),
    pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="no /dev/fuse"),
]


class Mute:
    """The file system; `end` lets go of whoever hangs in it."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()
        program = CHECKOUT / "tests" / "support" / "mute_file_system.py"
        self.server = subprocess.Popen(
            [sys.executable, program, place], stdout=subprocess.PIPE, text=True
        )
        assert self.server.stdout is not None
        if not self.server.stdout.readline():
            self.server.wait()
            pytest.skip("this root may not mount a FUSE file system")

    def end(self) -> None:
        if self.server.poll() is None:
            self.server.kill()
            self.server.communicate()

    def close(self) -> None:
        self.end()
        ctypes.CDLL(None).umount2(os.fsencode(self.place), 2)

    def command(self, vm: Machine) -> list[str]:
        drive = f"file={self.place}/file,format=raw,if=none,id=mute,readonly=on"
        return [*vm.command, "-drive", drive]


@pytest.fixture
def mute(tmp_path: Path) -> Iterator[Mute]:
    system = Mute(tmp_path / "mute")
    yield system
    system.close()


def test_start_leaves_the_hold_in_doubt_until_it_has_ended(vm: Machine, mute: Mute) -> None:
    assert vm.save().returncode == 0
    process = vm.start("--timeout", "2", command=mute.command(vm))
    vm.until(lambda: "does not end, not even by SIGKILL" in vm.said(), "said")
    assert rows(vm)[0]["phase"] == "in-doubt"
    assert rows(vm)[0]["acting"] == process.pid
    assert vm.start("--force").wait(PATIENCE) == 4
    assert f"pid {process.pid} has taken this state, and lives" in vm.said()
    mute.end()
    process.wait(PATIENCE)
    vm.until(lambda: rows(vm)[0]["acting"] is None, "its end")
    vm.start("--force")
    vm.goes_on()
    assert rows(vm) == []


def test_upgrade_says_so_and_the_guest_runs_on(vm: Machine, mute: Mute) -> None:
    before, old = settings(vm), vm.alive()
    words = ("--qmp", vm.qmp, "--timeout", "2", "--", *mute.command(vm))
    done = vm.cprctl("qemu", "upgrade", vm.name, *words)
    assert done.returncode == 1
    assert "the guest runs on in its QEMU" in done.stderr
    assert "does not end, not even by SIGKILL" in done.stderr
    vm.goes_on()
    assert settings(vm) == before
    mute.end()
    vm.until(lambda: vm.alive() == old, "the end of the new QEMU")
    assert vm.status() == "running"

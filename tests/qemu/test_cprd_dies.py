"""cprd dies at every step of a save and of an upgrade, and forgets all (it has no store here).

While anything is uncommitted the guest must come out of it: in its old QEMU, or in the new one.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.qemu.machine import Machine
from tests.qemu.steps import rows
from tests.qemu.sweep import points
from tests.support.daemon import DaemonProcess
from tests.support.patience import PATIENCE

pytestmark = pytest.mark.full


def run_through(vm: Machine, daemon: DaemonProcess, words: list[str], step: str) -> int:
    """The command, with cprd killed and started anew while it stands at `step`; its exit status."""
    process = vm.popen(*words, env={"CPRD_PAUSE": step})
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    daemon.restart()
    process.send_signal(signal.SIGCONT)
    return process.wait(PATIENCE)


def test_cprd_dies_at_every_step_of_a_save(
    vm: Machine, daemon: DaemonProcess, tmp_path: Path
) -> None:
    log = tmp_path / "points"
    assert vm.save(env={"CPRD_PAUSE_LOG": str(log)}).returncode == 0
    vm.start()
    vm.goes_on(5)
    steps = points(log)
    for step in steps[: steps.index("commit:answered")]:
        status = run_through(vm, daemon, ["qemu", "save", "vm", "--qmp", vm.qmp], step)
        if status == 0:
            assert rows(vm)[0]["phase"] == "held", step
            assert vm.alive() == [], step
            vm.start()
        vm.goes_on(5)
        assert len(vm.alive()) == 1, step
        assert rows(vm) == [], step


def test_cprd_dies_at_every_step_of_an_upgrade(
    vm: Machine, daemon: DaemonProcess, tmp_path: Path
) -> None:
    log = tmp_path / "points"
    assert vm.upgrade(vm.qmp, vm.command, env={"CPRD_PAUSE_LOG": str(log)}).returncode == 0
    vm.goes_on(5)
    words = ["qemu", "upgrade", "vm", "--qmp", vm.qmp, "--", *vm.command]
    for step in points(log):
        run_through(vm, daemon, words, step)
        vm.goes_on(5)
        vm.until(lambda: len(vm.alive()) == 1, f"one QEMU ({vm.alive()})")
        assert rows(vm) == [], step

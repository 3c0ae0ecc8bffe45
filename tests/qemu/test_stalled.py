"""A new QEMU that neither goes on nor ends: --timeout ends it, and the guest is where it was."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time

import pytest

from tests.qemu.machine import QEMU, Machine
from tests.qemu.steps import rows
from tests.qemu.sweep import stopped
from tests.support.patience import PATIENCE, patience

TIMEOUT = ("--timeout", "1.5")

FULL = pytest.mark.full


pytestmark = pytest.mark.usefixtures("subreaper")


def stalling(vm: Machine) -> list[str]:
    """The command with a QEMU that says its version, and then does nothing at all."""
    program = vm.place / "qemu-system-stalling"
    program.write_text(
        f'#!/bin/sh\ncase "$*" in *-version*) exec {QEMU} -version;; esac\nexec sleep 300\n'
    )
    program.chmod(0o755)
    at = vm.command.index(QEMU)
    return [*vm.command[:at], str(program), *vm.command[at + 1 :]]


def held_and_starts(vm: Machine) -> None:
    vm.until(lambda: [row["phase"] for row in rows(vm)] == ["held"], "held again")
    vm.start()
    vm.goes_on()
    assert len(vm.alive()) == 1


def test_start_ends_a_qemu_that_never_listens(vm: Machine) -> None:
    assert vm.save().returncode == 0
    began = time.monotonic()
    process = vm.start(*TIMEOUT, command=stalling(vm))
    assert process.wait(PATIENCE) == -signal.SIGKILL
    assert 1.0 < time.monotonic() - began < patience(8.0)
    vm.until(lambda: "held as before" in vm.said(), "the reason")
    assert "1.5 s" in vm.said()
    held_and_starts(vm)


@pytest.mark.parametrize(
    "where", [pytest.param("listening", marks=FULL), "cpr", pytest.param("main", marks=FULL)]
)
def test_start_ends_a_qemu_that_stalls_with_the_state(vm: Machine, where: str) -> None:
    assert vm.save().returncode == 0
    process = vm.start(*TIMEOUT, env={"CPRD_PAUSE": f"qemu-start:{where}"})
    helper = stopped()
    os.kill(process.pid, signal.SIGSTOP)
    os.kill(helper, signal.SIGCONT)
    assert process.wait(PATIENCE) == -signal.SIGKILL
    held_and_starts(vm)


@FULL
def test_an_upgrade_ends_a_qemu_that_never_listens(vm: Machine) -> None:
    before = vm.alive()
    words = ("qemu", "upgrade", "vm", "--qmp", vm.qmp, *TIMEOUT, "--", *stalling(vm))
    done = vm.cprctl(*words)
    assert done.returncode == 1
    assert "the guest runs on in its QEMU" in done.stderr
    assert vm.alive() == before
    assert subprocess.run(["pgrep", "-f", str(vm.place / "qemu-system-st")], check=False).returncode
    vm.goes_on()
    assert rows(vm) == []


@pytest.mark.parametrize("where", [pytest.param("listening", marks=FULL), "cpr", "ready"])
def test_an_upgrade_ends_a_qemu_that_stalls_with_the_state(vm: Machine, where: str) -> None:
    before = vm.alive()
    words = ("qemu", "upgrade", "vm", "--qmp", vm.qmp, *TIMEOUT, "--", *vm.command)
    process = vm.popen(*words, env={"CPRD_PAUSE": f"qemu-upgrade:{where}"})
    assert stopped() == process.pid
    (new,) = set(vm.alive()) - set(before)
    end = os.pidfd_open(new)
    os.kill(new, signal.SIGSTOP)
    process.send_signal(signal.SIGCONT)
    assert process.wait(PATIENCE) == 1, vm.said()
    assert select.select([end], [], [], 0)[0], "the stalled one is ended"
    os.close(end)
    assert "the guest runs on in its QEMU" in vm.said()
    assert vm.alive() == before
    vm.goes_on()
    assert vm.status() == "running"
    assert rows(vm) == []

"""From `cont` on there is no way back: what has run once is never run again from the same state."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from tests.qemu import guest
from tests.qemu.conftest import MakeMachine
from tests.qemu.machine import Machine
from tests.qemu.steps import kill, rows
from tests.qemu.sweep import stopped
from tests.support.patience import PATIENCE


@pytest.fixture
def busy(make_machine: MakeMachine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A guest that counts and writes all the time, without a pause in between."""
    drop = ("hlt", "test bp,15", "jnz line")
    kept = [row for row in guest.PROGRAM if not row[2].startswith(drop)]
    monkeypatch.setattr(guest, "PROGRAM", kept)
    vm = make_machine()
    vm.start()
    vm.until(lambda: vm.ticks() > 50, "counting")
    return vm


def full_disk(vm: Machine) -> list[str]:
    """The command of `vm` with a disk on which no write succeeds; its guest is stopped by that."""
    command = list(vm.command)
    command[command.index("-drive") + 1] = (
        "driver=raw,if=none,id=d0,werror=stop,file.driver=blkdebug,file.image.driver=file,"
        f"file.image.filename={vm.disk},file.inject-error.0.event=pwritev,"
        "file.inject-error.0.errno=28"
    )
    return command


def once(vm: Machine) -> None:
    """Each number was said once, in order, and RAM and register agree (a state that ran twice
    repeats numbers, or differs)."""
    numbers = [line.split()[0] for line in vm.lines() if line != "BOOT"]
    assert vm.boots() == 1
    assert [int(number, 16) for number in numbers] == list(range(1, len(numbers) + 1))
    assert not [line for line in vm.lines() if "DIFF" in line]


def test_a_disk_that_is_full_right_after_start_does_not_make_the_guest_run_twice(
    busy: Machine,
) -> None:
    assert busy.save().returncode == 0
    process = busy.start(command=full_disk(busy))
    busy.until(lambda: rows(busy) == [], "confirmed")
    busy.await_status("io-error")
    assert process.poll() is None
    once(busy)
    assert busy.start().wait(PATIENCE) == 1  # nothing is held, and a QEMU is there
    once(busy)


def test_a_disk_that_is_full_right_after_an_upgrade_does_not_make_the_guest_run_twice(
    busy: Machine,
) -> None:
    before = busy.alive()
    done = busy.upgrade(busy.qmp, full_disk(busy))
    assert done.returncode == 0, done.stderr
    busy.await_status("io-error")
    assert len(busy.alive()) == 1
    assert busy.alive() != before
    assert rows(busy) == []
    once(busy)


@pytest.mark.usefixtures("subreaper")
@pytest.mark.parametrize("verb", ["start", "upgrade"])
def test_the_new_qemu_dies_right_after_it_was_told_to_run(vm: Machine, verb: str) -> None:
    """The guest has run: what was held is older than its disk."""
    old = vm.alive()
    env = {"CPRD_PAUSE": "qemu:cont"}
    if verb == "start":
        assert vm.save().returncode == 0
        process = vm.start(env=env)
    else:
        words = vm.argv("qemu", "upgrade", "vm", "--qmp", vm.qmp, "--", *vm.command)
        process = subprocess.Popen(words, env={**vm.env, **env}, stderr=subprocess.DEVNULL)
    helper = stopped()
    (new,) = set(vm.alive()) - set(old)
    kill(new)
    os.kill(helper, signal.SIGCONT)
    assert process.wait(PATIENCE) != 0
    vm.until(lambda: rows(vm) == [], "the end of the hold")
    vm.until(lambda: vm.alive() == [], "the end of the old QEMU")


@pytest.mark.usefixtures("subreaper")
def test_somebody_else_lets_the_guest_run_and_then_cprd_refuses(vm: Machine) -> None:
    """By the new QEMU's own monitor, which is open to all from the start. It is not taken back any
    more, and not ended either."""
    assert vm.save().returncode == 0
    process = vm.start(env={"CPRD_PAUSE": "qemu-start:loaded"})
    helper = stopped()
    vm.execute("cont")
    vm.goes_on()
    assert vm.cprctl("drop", "vm", "--force").returncode == 0  # so that `begin` will be refused
    os.kill(helper, signal.SIGCONT)
    vm.until(lambda: "somebody else let the guest run" in vm.said(), "said")
    vm.goes_on(50)
    assert process.poll() is None
    assert rows(vm) == []

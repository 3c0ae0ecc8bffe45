"""cprctl killed at every step of save, start and upgrade: the guest goes on, once, whatever
happens.

After each kill the state is one of these, and what an operator does next must lead on: the guest
runs in a QEMU (then nothing that is held may be started), or it is held, or it is in doubt and says
why.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.qemu.conftest import MakeMachine
from tests.qemu.machine import Machine
from tests.qemu.steps import rows
from tests.qemu.sweep import kill_where_it_stops, points
from tests.qemu.test_overlap import second_names
from tests.support.patience import PATIENCE, patience, until

pytestmark = pytest.mark.usefixtures("subreaper")


@pytest.fixture(params=["q35-1", pytest.param("pc-2", marks=pytest.mark.full)])
def vm(request: pytest.FixtureRequest, make_machine: MakeMachine) -> Machine:
    """Each machine type and number of CPUs; one of them in the usual run."""
    machine, _, smp = str(request.param).partition("-")
    made = make_machine(machine=machine, smp=int(smp))
    made.start()
    made.goes_on()
    return made


def counts(vm: Machine) -> bool:
    """Whether the guest counts on within 0.3 s of an idle machine."""
    goal = vm.ticks() + 5
    try:
        until(lambda: vm.ticks() >= goal, lambda: "silent", patience(0.3))
    except AssertionError:
        return False
    return True


def one_qemu(vm: Machine, where: str) -> None:
    vm.until(lambda: len(vm.alive()) <= 1, f"one QEMU ({where}), there are {vm.alive()}")


def go_on(vm: Machine, where: str) -> None:
    """From whatever a kill has left to a running guest, as an operator would; nothing twice."""
    if counts(vm):
        vm.goes_on(5)
        held = rows(vm)
        if held:  # a guest that runs: its older state must not be started beside it
            again = vm.start()
            assert again.wait(PATIENCE) == 4, f"{where}: {vm.said()[-500:]}"
            vm.goes_on(5)
            saved = vm.save()
            assert saved.returncode == 0, f"{where}: {saved.stderr}"
            vm.start()
    else:
        held = rows(vm)
        assert len(held) == 1, f"{where}: the guest stands, and there is {held}"
        process = vm.start()
        vm.until(lambda: process.poll() is not None or counts(vm), f"an answer of start ({where})")
        if process.poll() is not None:
            assert process.poll() == 4, f"{where}: {process.poll()} {vm.said()[-800:]}"
            assert rows(vm)[0]["phase"] == "in-doubt", where
            assert "in doubt" in rows(vm)[0]["reason"], where
            for pid in vm.alive():  # what the message tells the operator to do
                os.kill(pid, signal.SIGKILL)
            vm.until(lambda: not vm.alive(), "the end of QEMU")
            vm.start("--force")
    vm.goes_on(5)
    one_qemu(vm, where)
    assert rows(vm) == [], where
    vm.await_status("running")  # at its path, by which all else goes on


def test_save_is_killed_at_every_step(vm: Machine, tmp_path: Path) -> None:
    log = tmp_path / "points"
    assert vm.save(env={"CPRD_PAUSE_LOG": str(log)}).returncode == 0
    vm.start()
    vm.goes_on(5)
    steps = points(log)
    assert len(steps) >= 12, steps
    for step in steps:
        words = ("qemu", "save", vm.name, "--qmp", vm.qmp)
        kill_where_it_stops(vm.popen(*words, env={"CPRD_PAUSE": step}))
        go_on(vm, f"save killed at {step}")


def test_start_is_killed_at_every_step(vm: Machine, tmp_path: Path) -> None:
    log = tmp_path / "points"
    assert vm.save().returncode == 0
    vm.start(env={"CPRD_PAUSE_LOG": str(log)})
    vm.goes_on(5)
    steps = points(log)
    assert len(steps) >= 18, steps
    for step in steps:
        assert vm.save().returncode == 0
        process = vm.start(env={"CPRD_PAUSE": step})
        kill_where_it_stops(process)
        go_on(vm, f"start killed at {step}")


def test_upgrade_is_killed_at_every_step(vm: Machine, tmp_path: Path) -> None:
    log = tmp_path / "points"
    done = vm.upgrade(vm.qmp, vm.command, env={"CPRD_PAUSE_LOG": str(log)})
    assert done.returncode == 0, done.stderr
    vm.goes_on(5)
    steps = points(log)
    assert len(steps) >= 25, steps
    for step in steps:
        words = ("qemu", "upgrade", vm.name, "--qmp", vm.qmp, "--", *vm.command)
        try:
            kill_where_it_stops(vm.popen(*words, env={"CPRD_PAUSE": step}))
        except AssertionError as error:
            raise AssertionError(f"{step}: {error}: {vm.said()}") from None
        go_on(vm, f"upgrade killed at {step}")
        vm.until(lambda: second_names(vm) == [], f"no second name left ({step})")

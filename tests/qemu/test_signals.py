"""SIGINT and SIGTERM to cprctl: the guest goes on where it was, or the hand-over is finished; never
a guest that stands, with nobody saying so."""

from __future__ import annotations

import os
import signal

import pytest

from tests.qemu.machine import Machine
from tests.qemu.steps import Standing, rows, settings, words
from tests.qemu.sweep import stopped
from tests.support.daemon import DaemonProcess
from tests.support.patience import PATIENCE

SIGTERM = pytest.param(signal.SIGTERM, marks=pytest.mark.full)  # no different from SIGINT


def left_over(vm: Machine) -> list[str]:
    endings = (".old", ".new")
    names = [path.name for path in vm.place.iterdir()]
    return [name for name in names if name.startswith(".cprd-") or name.endswith(endings)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("verb", "steps"),
    [
        ("save", "begin connected settings cpr main prepared"),
        ("upgrade", "begin connected forked listening cpr prepared ready main whole loaded"),
    ],
)
def test_before_the_point_of_no_return_the_guest_runs_on_and_it_is_said(
    vm: Machine, verb: str, steps: str, number: signal.Signals
) -> None:
    before, old = settings(vm), vm.alive()
    for step in steps.split():
        standing = Standing(vm, f"qemu-{verb}:{step}", *words(vm, verb))
        standing.signal(number)
        status, said = standing.go()
        assert status == 128 + number, (step, said)
        assert f"interrupted by {number.name}; the guest" in said, (step, said)
        assert len(said.splitlines()) == 1, (step, said)
        vm.goes_on(5)
        vm.until(lambda: vm.alive() == old, f"only the old QEMU ({step})")
        assert settings(vm) == before, step
        assert rows(vm) == [], step
        assert left_over(vm) == [], step


@pytest.mark.parametrize("number", [signal.SIGINT, SIGTERM])
@pytest.mark.parametrize("step", ["qemu-save:shut", "qemu-save:completed", "qemu-save:committed"])
def test_after_it_a_save_is_finished(vm: Machine, step: str, number: signal.Signals) -> None:
    standing = Standing(vm, step, *words(vm, "save"))
    standing.signal(number)
    status, said = standing.go()
    assert (status, said) == (0, "")
    assert vm.alive() == []
    assert [row["phase"] for row in rows(vm)] == ["held"]
    vm.start()
    vm.goes_on()


@pytest.mark.parametrize("number", [SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", ["completed", "disarmed", "running", "ended"])
def test_after_it_an_upgrade_is_finished(vm: Machine, step: str, number: signal.Signals) -> None:
    old = vm.alive()
    standing = Standing(vm, f"qemu-upgrade:{step}", *words(vm, "upgrade"))
    standing.signal(number)
    assert standing.go() == (0, "")
    vm.goes_on()
    assert len(vm.alive()) == 1
    assert vm.alive() != old
    assert rows(vm) == []
    assert left_over(vm) == []


def test_a_signal_breaks_off_a_long_wait(vm: Machine, daemon: DaemonProcess) -> None:
    """The new QEMU hangs before it listens; nobody has to wait for the timeout."""
    (old,) = vm.alive()
    standing = Standing(vm, "qemu-upgrade:listening", *words(vm, "upgrade"))
    (new,) = set(vm.alive()) - {old}
    os.kill(new, signal.SIGSTOP)
    standing.let_go()
    vm.until(lambda: len(vm.alive()) == 2, "waiting")
    standing.signal(signal.SIGTERM)
    status, said = standing.end()
    assert status == 128 + signal.SIGTERM, said
    assert "the guest runs on in its QEMU" in said
    vm.goes_on()
    assert vm.alive() == [old]


@pytest.mark.full
def test_ctrl_c_while_cprd_is_away_says_where_the_guest_is(
    vm: Machine, daemon: DaemonProcess
) -> None:
    standing = Standing(vm, "qemu-save:completed", *words(vm, "save"))
    daemon.kill()
    standing.signal(signal.SIGINT)
    standing.let_go()
    status, said = standing.end()
    assert status == 4
    assert "The guest is stopped, whole, in its QEMU" in said
    assert vm.status() == "postmigrate"
    daemon.start()


def test_stop_interrupted_leaves_the_guest_alone(vm: Machine) -> None:
    """Who wanted the end of `stop` did not ask for that of the guest."""
    standing = Standing(vm, "qemu-save:cpr", "qemu", "stop", vm.name, "--qmp", vm.qmp)
    standing.signal(signal.SIGTERM)
    status, said = standing.go()
    assert status == 128 + signal.SIGTERM
    assert "the guest runs on in its QEMU" in said
    vm.goes_on(50)
    assert vm.lines()[-1] != "OFF"


# Start: a helper does the work; the QEMU is what a supervisor signals.


def helper_at(vm: Machine, step: str) -> int:
    vm.start(env={"CPRD_PAUSE": f"qemu-start:{step}"})
    return stopped()


@pytest.mark.usefixtures("subreaper")
@pytest.mark.parametrize("number", [signal.SIGINT, SIGTERM])
def test_the_helper_of_a_start_is_signalled(vm: Machine, number: signal.Signals) -> None:
    assert vm.save().returncode == 0
    for step in ("claimed", "go", "listening", "cpr", "main", "loaded"):
        helper = helper_at(vm, step)
        os.kill(helper, number)
        os.kill(helper, signal.SIGCONT)
        assert vm.processes[-1].wait(PATIENCE) != 0, step
        vm.until(lambda: rows(vm)[0]["phase"] == "held", f"held again ({step})")
        assert f"interrupted by {number.name}" in rows(vm)[0]["last_reject"], step
        vm.until(lambda: vm.alive() == [], f"the end of QEMU ({step})")
        os.waitid(os.P_PID, helper, os.WEXITED)
    for step in ("begun", "disarmed", "running"):
        helper = helper_at(vm, step)
        os.kill(helper, number)
        os.kill(helper, signal.SIGCONT)
        vm.goes_on()
        vm.until(lambda: rows(vm) == [], f"confirmed ({step})")
        os.waitid(os.P_PID, helper, os.WEXITED)
        assert vm.save().returncode == 0


@pytest.mark.usefixtures("subreaper")
@pytest.mark.parametrize("step", ["go", "listening", "main", "loaded", "begun", "disarmed"])
def test_the_qemu_of_a_start_is_told_to_end_before_its_guest_runs(vm: Machine, step: str) -> None:
    """As by a supervisor's SIGTERM to its main process: the hold is there as before."""
    assert vm.save().returncode == 0
    helper = helper_at(vm, step)
    vm.processes[-1].terminate()
    if step != "listening":  # (there it takes no signals before it has read its state)
        vm.processes[-1].wait(PATIENCE)
    os.kill(helper, signal.SIGCONT)
    vm.processes[-1].wait(PATIENCE)
    vm.until(lambda: rows(vm)[0]["phase"] == "held", "held again")
    assert vm.alive() == []
    vm.start()
    vm.goes_on()

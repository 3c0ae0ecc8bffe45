"""cprd is dead or mute while a guest stands still in the middle of a hand-over: it does not stand
for long, and nothing is ever served of it."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.qemu.machine import Machine
from tests.qemu.steps import Standing, kill, rows, settings, words
from tests.support.daemon import DaemonProcess
from tests.support.patience import in_time, rest

FULL = pytest.mark.full  # a patience of 15 to 20 s each
STEPS = [("save", "qemu-save:main"), ("upgrade", "qemu-upgrade:main")]


def soon(vm: Machine, since: float) -> None:
    """The guest counts again, well before a client would give up on cprd. (A second is what it may
    take; a machine that is busy gets another two.)"""
    before = vm.ticks()
    vm.until(lambda: vm.ticks() > before, "going on")
    assert in_time(time.monotonic() - since, 3.0)


def the_next_save_ends_the_doubt(vm: Machine, daemon: DaemonProcess) -> None:
    """Once cprd, which was mute, speaks again."""
    os.kill(daemon.pid, signal.SIGCONT)
    vm.until(lambda: all(row["phase"] == "in-doubt" for row in rows(vm)), "in doubt, or nothing")
    vm.goes_on()
    assert vm.save().returncode == 0
    assert [row["phase"] for row in rows(vm)] == ["held"]
    vm.start()
    vm.goes_on()


@FULL
@pytest.mark.parametrize(("verb", "step"), STEPS)
def test_it_is_dead(vm: Machine, daemon: DaemonProcess, verb: str, step: str) -> None:
    before, old = settings(vm), vm.alive()
    standing = Standing(vm, step, *words(vm, verb))
    daemon.kill()
    began = time.monotonic()
    standing.let_go()
    soon(vm, began)
    status, said = standing.end()
    assert status == 1
    why = {"save": "cprd did not answer within 1 s", "upgrade": "cprd ended meanwhile"}[verb]
    assert why in said
    assert "the guest runs on in its QEMU" in said
    assert "may hold what it was sent" in said
    vm.goes_on()
    assert vm.alive() == old
    assert settings(vm) == before


@FULL
def test_it_is_mute_for_good_and_the_doubt_that_is_left_ends_with_the_next_save(
    vm: Machine, daemon: DaemonProcess
) -> None:
    standing = Standing(vm, "qemu-save:main", *words(vm, "save"))
    os.kill(daemon.pid, signal.SIGSTOP)
    began = time.monotonic()
    standing.let_go()
    soon(vm, began)
    status, said = standing.end()
    assert status == 1
    assert "the guest runs on in its QEMU" in said
    assert "may hold what it was sent" in said
    the_next_save_ends_the_doubt(vm, daemon)


@FULL
def test_it_is_mute_for_good_and_an_upgrade_needs_it_no_more(
    vm: Machine, daemon: DaemonProcess
) -> None:
    (old,) = vm.alive()
    standing = Standing(vm, "qemu-upgrade:main", *words(vm, "upgrade"))
    os.kill(daemon.pid, signal.SIGSTOP)
    began = time.monotonic()
    standing.let_go()
    soon(vm, began)
    vm.until(lambda: len(vm.alive()) == 1, "the old QEMU's end")
    assert vm.alive() != [old]
    standing.signal(signal.SIGTERM)  # no more waiting for cprd
    status, said = standing.end()
    assert status == 4
    assert "the guest runs, and cprd could not be told" in said
    the_next_save_ends_the_doubt(vm, daemon)


@pytest.mark.parametrize("how", ["killed", "mute"])
@pytest.mark.parametrize(("verb", "step"), STEPS)
def test_it_is_away_for_two_seconds_and_the_hand_over_is_done_all_the_same(
    vm: Machine, daemon: DaemonProcess, verb: str, step: str, how: str
) -> None:
    standing = Standing(vm, step, *words(vm, verb))
    if how == "killed":
        daemon.kill()
    else:
        os.kill(daemon.pid, signal.SIGSTOP)
    began = time.monotonic()
    standing.let_go()
    soon(vm, began)
    rest(max(0.0, began + 2.0 - time.monotonic()))  # so long it is away
    if how == "killed":
        daemon.start()
    else:
        os.kill(daemon.pid, signal.SIGCONT)
    assert standing.end() == (0, "")
    if verb == "save":
        assert vm.alive() == []
        vm.start()
    vm.goes_on()
    assert len(vm.alive()) == 1
    assert rows(vm) == []


@FULL
def test_it_dies_when_the_new_qemu_of_an_upgrade_cannot_run_the_guest(
    vm: Machine, daemon: DaemonProcess
) -> None:
    """Nobody answers that the hold is gone, so that the old QEMU is not told to go on; it is found
    as soon as somebody can."""
    standing = Standing(vm, "qemu-upgrade:disarmed", *words(vm, "upgrade"))
    (old,) = [pid for pid in vm.alive() if pid == vm.processes[0].pid]
    (new,) = set(vm.alive()) - {old}
    kill(new)
    os.kill(daemon.pid, signal.SIGSTOP)
    standing.let_go()
    status, said = standing.end()
    assert status == 4
    assert "The guest is stopped, whole, in it" in said
    assert vm.status() == "postmigrate"
    os.kill(daemon.pid, signal.SIGCONT)
    vm.until(lambda: all(row["phase"] == "in-doubt" for row in rows(vm)), "in doubt, or nothing")
    if rows(vm):
        vm.start()  # the mark says that it never ran
        vm.goes_on()
        assert len(vm.alive()) == 1
        assert not [path for path in vm.place.iterdir() if path.name.startswith(".cprd-")]


@FULL
@pytest.mark.timeout(180)
def test_a_new_qemu_loads_for_longer_than_the_lease_and_cprd_is_mute_at_times(
    vm: Machine, daemon: DaemonProcess
) -> None:
    """The lease of 30 s is renewed every 10; once that fails, it is tried again."""
    assert vm.save().returncode == 0
    process = vm.start(env={"CPRD_PAUSE": "qemu-start:exec"})
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)  # before it is a QEMU
    os.kill(daemon.pid, signal.SIGSTOP)
    rest(12.0)  # longer than from one renewal to the next
    os.kill(daemon.pid, signal.SIGCONT)
    rest(25.0)  # more than what was left of the lease
    assert rows(vm)[0]["phase"] == "claimed"
    assert rows(vm)[0]["attempts"] == 1
    process.send_signal(signal.SIGCONT)
    vm.goes_on()
    assert rows(vm) == []

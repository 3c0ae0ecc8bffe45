"""The old QEMU is killed in the middle of a hand-over. Once its state is whole, and its guest has
not run since, that is as good as its end; before, the guest is lost, and that is said."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from tests.qemu.machine import Machine
from tests.qemu.steps import Standing, kill, rows, words
from tests.support.daemon import DaemonProcess
from tests.support.patience import rest


@pytest.mark.parametrize("step", ["main", "prepared", "shut", "completed", "committed"])
def test_in_a_save_that_has_it_all(vm: Machine, step: str) -> None:
    standing = Standing(vm, f"qemu-save:{step}", *words(vm, "save"))
    kill(vm.alive()[0])
    assert standing.go() == (0, "")
    assert [row["phase"] for row in rows(vm)] == ["held"]
    vm.start()
    vm.goes_on()


@pytest.mark.parametrize("step", ["main", "whole", "loaded", "completed"])
def test_in_an_upgrade_that_has_it_all(vm: Machine, step: str) -> None:
    (old,) = vm.alive()
    standing = Standing(vm, f"qemu-upgrade:{step}", *words(vm, "upgrade"))
    kill(old)
    assert standing.go() == (0, "")
    vm.goes_on()
    assert rows(vm) == []
    assert vm.status() == "running"


@pytest.mark.parametrize("step", ["main", "whole", "loaded", "completed"])
def test_both_qemus_of_an_upgrade(vm: Machine, step: str) -> None:
    standing = Standing(vm, f"qemu-upgrade:{step}", *words(vm, "upgrade"))
    for pid in vm.alive():
        kill(pid)
    status, said = standing.go()
    assert status == 1, said
    assert "The guest is held, whole, under vm: go on with `cprctl qemu start`" in said
    assert [row["phase"] for row in rows(vm)] == ["held"]
    vm.start()
    vm.goes_on()
    assert rows(vm) == []


@pytest.mark.parametrize(
    ("verb", "step"),
    [("save", "settings"), ("save", "cpr"), ("upgrade", "prepared"), ("upgrade", "ready")],
)
def test_before_it_was_whole(vm: Machine, verb: str, step: str) -> None:
    (old,) = [process.pid for process in vm.processes]
    standing = Standing(vm, f"qemu-{verb}:{step}", *words(vm, verb))
    kill(old)
    status, said = standing.go()
    assert status == 1, said
    assert f"its QEMU (pid {old}) has ended, and the guest with it" in said
    vm.until(lambda: vm.alive() == [], "the end of the new QEMU")
    assert rows(vm) == []


def test_its_guest_had_gone_on_before_it_died(vm: Machine) -> None:
    """Somebody cancelled the migration: what was taken is older than the guest's memory by then."""
    vm.command += ["-qmp", f"unix:{vm.place}/second,server=on,wait=off"]
    done = vm.upgrade(vm.qmp, vm.command)
    assert done.returncode == 0, done.stderr
    standing = Standing(vm, "qemu-save:prepared", *words(vm, "save"))

    def cancel(monitor: object) -> None:
        monitor.execute("migrate_cancel")  # type: ignore[attr-defined]

    vm.ask(cancel, f"{vm.place}/second")
    vm.goes_on()
    kill(vm.alive()[0])
    status, said = standing.go()
    assert status == 1, said
    assert "has ended, and the guest with it" in said
    assert rows(vm) == []


@pytest.mark.parametrize("step", ["main", "loaded"])
def test_in_an_upgrade_whose_cprd_was_restarted(
    vm: Machine, daemon: DaemonProcess, step: str
) -> None:
    """The new one has it all; there is no way back that cprd would be needed for."""
    (old,) = vm.alive()
    standing = Standing(vm, f"qemu-upgrade:{step}", *words(vm, "upgrade"))
    daemon.restart()
    kill(old)
    assert standing.go() == (0, "")
    vm.goes_on()
    assert rows(vm) == []


@pytest.mark.parametrize("step", ["whole", "completed"])
def test_both_qemus_of_an_upgrade_whose_cprd_was_restarted(
    vm: Machine, daemon: DaemonProcess, step: str
) -> None:
    """What it had of it is gone; cprctl has it still."""
    standing = Standing(vm, f"qemu-upgrade:{step}", *words(vm, "upgrade"))
    daemon.restart()
    for pid in vm.alive():
        kill(pid)
    assert standing.go()[0] == 1
    assert [row["phase"] for row in rows(vm)] == ["held"]
    vm.start()
    vm.goes_on()


def test_it_has_written_all_while_the_new_one_reads_slowly(
    make_machine: Callable[..., Machine],
) -> None:
    extra = [
        word
        for number in range(6)  # a stream that is longer than a socket's buffer
        for word in ("-device", f"qemu-xhci,p2=15,p3=15,id=x{number}")
    ]
    vm = make_machine(*extra)
    vm.start()
    vm.goes_on()
    (old,) = vm.alive()
    standing = Standing(vm, "qemu-upgrade:ready", *words(vm, "upgrade"))
    (new,) = [pid for pid in vm.alive() if pid != old]
    os.kill(new, signal.SIGSTOP)
    standing.let_go()
    rest(1.0)  # it writes all that it has, of which nobody is told
    kill(old)
    rest(0.3)  # that is seen, too, before the rest is read
    os.kill(new, signal.SIGCONT)
    assert standing.end() == (0, "")
    vm.goes_on()
    assert rows(vm) == []

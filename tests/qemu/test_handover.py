"""A guest goes from QEMU to QEMU through a hold, and does not notice."""

from __future__ import annotations

import pytest

from tests.qemu.conftest import MakeMachine
from tests.qemu.machine import Machine


@pytest.mark.parametrize(("machine", "smp"), [("q35", 1), ("pc", 2)])
def test_five_hand_overs_in_a_row_and_nobody_runs_in_between(
    make_machine: MakeMachine, machine: str, smp: int
) -> None:
    vm = make_machine(machine=machine, smp=smp)
    vm.start()
    vm.goes_on()
    for _ in range(5):
        saved = vm.save()
        assert saved.returncode == 0, saved.stderr
        assert vm.alive() == []
        assert vm.processes[-1].wait(5) == 0
        vm.unharmed()
        process = vm.start()
        vm.goes_on()
        assert vm.alive() == [process.pid]
    assert vm.cprctl("show", "vm").returncode == 3


def test_an_upgrade_with_the_same_monitor_path_three_times(vm: Machine) -> None:
    for _ in range(3):
        before = vm.alive()
        done = vm.upgrade(vm.qmp, vm.command)
        assert done.returncode == 0, done.stderr
        after = vm.alive()
        assert len(after) == 1
        assert after != before
        vm.goes_on()
        assert vm.status() == "running"  # at the path that both of them had
    assert vm.cprctl("show", "vm").returncode == 3
    assert sorted(p.name for p in vm.place.iterdir()) == ["disk.raw", "qmp", "serial.log", "stderr"]


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("machine", ["q35", "pc"])
@pytest.mark.parametrize("smp", [1, 2])
def test_a_hundred_upgrades_and_twenty_restarts(
    make_machine: MakeMachine, machine: str, smp: int
) -> None:
    vm = make_machine(machine=machine, smp=smp)
    vm.start()
    vm.goes_on()
    for turn in range(100):
        done = vm.upgrade(vm.qmp, vm.command)
        assert done.returncode == 0, done.stderr
        vm.goes_on(2)
        if turn % 5 == 0:
            assert vm.save().returncode == 0
            assert vm.alive() == []
            vm.start()
            vm.goes_on(2)
    assert len(vm.alive()) == 1

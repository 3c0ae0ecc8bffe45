"""The old QEMU is killed in the middle of a hand-over. Once its state is whole, and its guest has
not run since, that is as good as its end; before, the guest is lost, and that is said."""

from __future__ import annotations

import pytest

from tests.qemu.machine import Machine
from tests.qemu.steps import Standing, kill, rows, words


@pytest.mark.parametrize("step", ["main", "prepared", "shut", "completed", "committed"])
def test_in_a_save_that_has_it_all(vm: Machine, step: str) -> None:
    standing = Standing(vm, f"qemu-save:{step}", *words(vm, "save"))
    kill(vm.alive()[0])
    assert standing.go() == (0, "")
    assert [row["phase"] for row in rows(vm)] == ["held"]
    vm.start()
    vm.goes_on()


@pytest.mark.parametrize("step", ["main", "prepared", "loaded", "completed"])
def test_in_an_upgrade_that_has_it_all(vm: Machine, step: str) -> None:
    (old,) = vm.alive()
    standing = Standing(vm, f"qemu-upgrade:{step}", *words(vm, "upgrade"))
    kill(old)
    assert standing.go() == (0, "")
    vm.goes_on()
    assert rows(vm) == []
    assert vm.status() == "running"


@pytest.mark.parametrize("step", ["main", "prepared", "loaded", "completed"])
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
    ("verb", "step"), [("save", "settings"), ("save", "cpr"), ("upgrade", "ready")]
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

    async def cancel(monitor: object) -> None:
        await monitor.execute("migrate_cancel")  # type: ignore[attr-defined]

    vm.ask(cancel, f"{vm.place}/second")
    vm.goes_on()
    kill(vm.alive()[0])
    status, said = standing.go()
    assert status == 1, said
    assert "has ended, and the guest with it" in said
    assert rows(vm) == []

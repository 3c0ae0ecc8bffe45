"""The old QEMU is killed in the middle of a hand-over. Once its state is whole, and its guest has
not run since, that is as good as its end; before, the guest is lost, and that is said."""

from __future__ import annotations

import subprocess

import pytest

from tests.qemu.machine import Machine
from tests.qemu.steps import Standing, kill, rows, words
from tests.qemu.sweep import adopt_orphans, kill_where_it_stops


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

    async def cancel(monitor: object) -> None:
        await monitor.execute("migrate_cancel")  # type: ignore[attr-defined]

    vm.ask(cancel, f"{vm.place}/second")
    vm.goes_on()
    kill(vm.alive()[0])
    status, said = standing.go()
    assert status == 1, said
    assert "has ended, and the guest with it" in said
    assert rows(vm) == []


@pytest.mark.parametrize("force", [False, True], ids=["", "forced"])
@pytest.mark.parametrize("step", ["prepared", "ready"])
def test_everybody_dies_before_it_was_whole(vm: Machine, step: str, force: bool) -> None:
    """What was prepared is nobody's state: its guest ended with its QEMU, and boots anew."""
    adopt_orphans()
    try:
        (old,) = vm.alive()
        words = vm.argv("qemu", "upgrade", vm.name, "--qmp", vm.qmp, "--", *vm.command)
        env = {**vm.env, "CPRD_PAUSE": f"qemu-upgrade:{step}"}
        kill_where_it_stops(subprocess.Popen(words, env=env, stdin=subprocess.DEVNULL))
        kill(old)
        vm.until(lambda: vm.alive() == [], "the end of the new QEMU")
        vm.until(lambda: [row["phase"] for row in rows(vm)] == ["in-doubt"], "in doubt")
        vm.start(*(["--force"] if force else []))
        vm.until(lambda: vm.lines().count("BOOT") == 2, "a cold boot")
        assert "ended before its state was whole, and the guest with it" in vm.said()
        assert rows(vm) == []
    finally:
        adopt_orphans(False)

"""An upgrade was killed before its hold had the whole state: nobody's state. It is never served,
and in nobody's way; and what is whole is never taken for it."""

from __future__ import annotations

import resource
import subprocess

import pytest

from tests.qemu.machine import Machine
from tests.qemu.steps import Standing, kill, rows, words
from tests.qemu.sweep import kill_where_it_stops
from tests.support.patience import PATIENCE

SAID = "ended before its state was whole, and the guest with it"


pytestmark = pytest.mark.usefixtures("subreaper")


def killed_at(vm: Machine, step: str) -> int:
    """The upgrade is killed there; the pid of the old QEMU, which is the only one then."""
    (old,) = vm.alive()
    argv = vm.argv(*words(vm, "upgrade"))
    env = {**vm.env, "CPRD_PAUSE": f"qemu-upgrade:{step}"}
    kill_where_it_stops(subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL))
    vm.until(lambda: vm.alive() == [old], "the end of the new QEMU")
    vm.until(lambda: [row["phase"] for row in rows(vm)] == ["in-doubt"], "in doubt")
    return old


def end(vm: Machine, pid: int) -> None:
    kill(pid)
    vm.until(lambda: vm.alive() == [], "its end")


def boots_anew(vm: Machine, *words: str) -> None:
    vm.start(*words)
    vm.until(lambda: vm.boots() == 2, "a cold boot")
    assert SAID in vm.said()
    assert rows(vm) == []


@pytest.mark.parametrize("how", ["", "--force", "released"])
@pytest.mark.parametrize("step", ["prepared"])
def test_its_guest_boots_anew(vm: Machine, step: str, how: str) -> None:
    end(vm, killed_at(vm, step))
    if how == "released":
        assert vm.cprctl("release", "vm", "--force").returncode == 0
    boots_anew(vm, *(["--force"] if how == "--force" else []))


def test_its_guest_was_booted_otherwise_and_is_saved(vm: Machine) -> None:
    end(vm, killed_at(vm, "prepared"))
    vm.start("--cold")
    vm.until(lambda: vm.boots() == 2, "a cold boot")
    done = vm.save()
    assert done.returncode == 0, done.stderr
    assert [row["phase"] for row in rows(vm)] == ["held"]


@pytest.mark.parametrize("force", [False, True], ids=["", "forced"])
def test_its_guest_was_handed_over_by_another_way_since(vm: Machine, force: bool) -> None:
    """It is whole in the old QEMU, which must not quit for what never was a state."""
    old = killed_at(vm, "prepared")
    off = [{"capability": name, "state": False} for name in ("return-path", "events")]
    vm.execute("migrate-set-capabilities", capabilities=off)
    vm.execute("migrate-set-parameters", mode="normal")
    vm.execute("migrate", uri="exec:cat > /dev/null")
    vm.until(lambda: vm.status() == "postmigrate", "the end of that migration")
    assert vm.start(*(["--force"] if force else [])).wait(PATIENCE) == 4
    assert "has handed its guest over since, by another way" in vm.said()
    assert vm.alive() == [old]


def test_what_is_whole_is_kept_where_nobody_can_see_what_it_is(vm: Machine) -> None:
    (old,) = vm.alive()
    standing = Standing(vm, "qemu-upgrade:loaded", *words(vm, "upgrade"))
    kill(old)
    standing.process.kill()
    standing.process.wait()
    vm.until(lambda: vm.alive() == [], "the end of the new QEMU")
    vm.until(lambda: [row["phase"] for row in rows(vm)] == ["in-doubt"], "in doubt")
    start = vm.argv("qemu", "start", "vm", "--", *vm.command)
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", 'umount -l /proc; exec "$@"', "sh", *start],
        env=vm.env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    assert [row["phase"] for row in rows(vm)] == ["in-doubt"]
    vm.start("--force")
    vm.goes_on()


def test_no_room_for_the_stream(vm: Machine) -> None:
    standing = Standing(vm, "qemu-upgrade:ready", *words(vm, "upgrade"))
    resource.prlimit(standing.process.pid, resource.RLIMIT_FSIZE, (10000, 10000))
    status, said = standing.go()
    assert status == 1, said
    assert "the guest runs on in its QEMU" in said
    vm.goes_on()
    assert rows(vm) == []


@pytest.mark.parametrize("step", ["prepared", "loaded"])
def test_what_is_older_than_the_guest_is_dropped_when_it_is_saved_under_another_name(
    vm: Machine, step: str
) -> None:
    """Or the old QEMU's word, that its guest has left it, would be taken for this one."""
    old = killed_at(vm, step)
    vm.goes_on()
    standing = Standing(vm, "qemu-save:completed", "qemu", "save", "vm2", "--qmp", vm.qmp)
    standing.process.kill()
    standing.process.wait()
    vm.until(lambda: {row["phase"] for row in rows(vm)} == {"in-doubt"}, "in doubt")
    assert [row["name"] for row in rows(vm)] == ["vm2"]
    assert vm.start().wait(PATIENCE) == 1  # for the old one has the monitor's path still
    assert vm.alive() == [old]
    vm.name = "vm2"
    vm.start()
    vm.goes_on()
    assert rows(vm) == []

"""`start --force` serves what is in doubt; it neither runs a state beside a QEMU that has it, nor
makes a doubt vanish that it could not end."""

from __future__ import annotations

import os
import socket
import subprocess

import pytest

from tests.qemu.machine import Machine
from tests.qemu.steps import kill, rows
from tests.qemu.sweep import kill_where_it_stops
from tests.support.patience import PATIENCE

pytestmark = pytest.mark.usefixtures("subreaper")


def elsewhere(vm: Machine) -> list[str]:
    """The same VM with its monitor at another path, where nobody can see who has the first one."""
    return [word.replace(f"unix:{vm.qmp},", f"unix:{vm.place}/other,") for word in vm.command]


def save_is_killed(vm: Machine) -> None:
    """Between prepare and the end of the save: in doubt, and the guest runs on."""
    words = vm.argv("qemu", "save", "vm", "--qmp", vm.qmp)
    env = {**vm.env, "CPRD_PAUSE": "qemu-save:prepared"}
    kill_where_it_stops(subprocess.Popen(words, env=env, stdin=subprocess.DEVNULL))
    vm.until(lambda: rows(vm)[0]["phase"] == "in-doubt", "in doubt")
    vm.goes_on()


def test_the_qemu_that_has_taken_the_state_lives(vm: Machine) -> None:
    assert vm.save().returncode == 0
    kill_where_it_stops(vm.start(env={"CPRD_PAUSE": "qemu-start:running"}))
    vm.goes_on()
    (acting,) = vm.alive()
    assert vm.start("--force", command=elsewhere(vm)).wait(PATIENCE) == 4
    assert f"pid {acting} has taken this state, and lives" in vm.said()
    assert rows(vm)[0]["phase"] == "in-doubt"
    assert vm.alive() == [acting]
    vm.goes_on()


def test_the_old_qemu_lives_and_nobody_can_ask_it(vm: Machine) -> None:
    """Its monitor is somebody else's. When it has ended, it takes force still."""
    save_is_killed(vm)
    (old,) = vm.alive()
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(vm.qmp)
        other.recv(4096)
        assert vm.start("--force", command=elsewhere(vm)).wait(PATIENCE) == 4
        assert "one client at a time" in vm.said()
    vm.goes_on()
    kill(old)
    assert vm.start().wait(PATIENCE) == 4
    assert vm.alive() == []
    assert rows(vm)[0]["phase"] == "in-doubt"


def test_the_old_qemu_runs_the_guest(vm: Machine) -> None:
    save_is_killed(vm)
    (old,) = vm.alive()
    assert vm.start("--force", command=elsewhere(vm)).wait(PATIENCE) == 4
    assert "nothing to start" in vm.said()
    assert rows(vm) == []
    assert vm.alive() == [old]
    vm.goes_on()


@pytest.mark.parametrize("how", ["it does not fit", "the helper is killed"])
def test_a_forced_start_that_fails_leaves_the_doubt(vm: Machine, how: str) -> None:
    words = vm.argv("qemu", "save", "vm", "--qmp", vm.qmp)
    env = {**vm.env, "CPRD_PAUSE": "qemu-save:prepared"}
    saving = subprocess.Popen(words, env=env, stdin=subprocess.DEVNULL)
    os.waitid(os.P_PID, saving.pid, os.WSTOPPED)
    kill(vm.alive()[0])  # the guest stands, and is whole in what was prepared
    saving.kill()
    saving.wait(PATIENCE)
    vm.until(lambda: rows(vm)[0]["phase"] == "in-doubt", "in doubt")
    if how == "it does not fit":
        wrong = [word.replace("128M", "64M") for word in vm.command]
        assert vm.start("--force", command=wrong).wait(PATIENCE) != 0
        vm.until(lambda: "it is in doubt as before" in vm.said(), "said")
    else:
        kill_where_it_stops(vm.start("--force", env={"CPRD_PAUSE": "qemu-start:loaded"}))
    vm.until(lambda: not vm.alive(), "the end of the new QEMU")
    vm.until(lambda: rows(vm)[0]["claimant"] is None, "the end of the helper")
    assert rows(vm)[0]["phase"] == "in-doubt"
    assert vm.start().wait(PATIENCE) == 4
    assert vm.alive() == []
    vm.start("--force")
    vm.goes_on()
    vm.until(lambda: rows(vm) == [], "confirmed")

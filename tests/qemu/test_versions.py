"""A guest goes to a QEMU of another version and back.

$CPRD_TEST_OTHER_QEMU is the command of another QEMU that can hand over, wrappers and all, such as
"chroot /srv/trixie qemu-system-x86_64". A chroot must see the directory of temporary files at the
same path (mount --bind /tmp /srv/trixie/tmp), and /dev and /proc. How to make one: docs/qemu.md.
"""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from tests.qemu.conftest import MakeMachine
from tests.qemu.machine import Machine

OTHER = os.environ.get("CPRD_TEST_OTHER_QEMU", "").split()

pytestmark = [
    pytest.mark.full,
    pytest.mark.hardware,  # as good as: it is not in Debian's release
    pytest.mark.skipif(not OTHER, reason="$CPRD_TEST_OTHER_QEMU names no other QEMU"),
]


@pytest.mark.parametrize("machine", ["pc-q35-10.0", "pc-i440fx-10.0"])
@pytest.mark.parametrize("how", ["start", "upgrade"])
def test_there_and_back_and_there_again(make_machine: MakeMachine, machine: str, how: str) -> None:
    vm = make_machine(machine=machine)
    mine = vm.command
    other = [*OTHER, *mine[1:]]
    mine_says, other_says = said_version(mine), said_version(other)
    assert mine_says != other_says
    vm.start()
    vm.goes_on()
    for command in (other, mine, other, other, mine):
        if how == "start":
            saved = vm.save()
            assert saved.returncode == 0, saved.stderr
            assert vm.alive() == []
            vm.start(command=command)
        else:
            done = vm.upgrade(vm.qmp, command)
            assert done.returncode == 0, done.stderr
        vm.goes_on()
        assert len(vm.alive()) == 1
        version = ".".join(map(str, vm.ask(lambda monitor: monitor.version)))
        assert version == (mine_says if command is mine else other_says)


def said_version(command: list[str]) -> str:
    done = subprocess.run([*command, "-version"], capture_output=True, text=True, check=True)
    found = re.search(r"version ([0-9.]+)", done.stdout)
    assert found
    return found[1]


def test_a_monitor_that_is_an_object_is_a_monitor(make_machine: MakeMachine) -> None:
    """QEMU 11.1 and later: each monitor is an object, and none is part of the guest's machine. Our
    own monitor leaves with us."""
    vm = make_machine()
    if int(said_version([*OTHER, *vm.command[1:]]).split(".")[0]) < 11:
        pytest.skip("monitors are objects from QEMU 11.1 on: $CPRD_TEST_OTHER_QEMU is older")
    at = vm.command.index("-qmp")
    vm.command = [
        *OTHER,
        *vm.command[1:at],
        *("-chardev", f"socket,id=m,path={vm.qmp},server=on,wait=off"),
        *("-object", '{"qom-type":"monitor-qmp","id":"mine","chardev":"m"}'),
    ]
    vm.start()
    vm.goes_on()
    for _ in range(2):
        checked = vm.cprctl("qemu", "check", "--qmp", vm.qmp)
        assert checked.stdout == "this VM (running) can be handed over\n"
        assert vm.save().returncode == 0
        vm.start()
        vm.until(lambda: vm.cprctl("show", vm.name).returncode == 3, "confirmed")
        vm.goes_on()
        done = vm.upgrade(vm.qmp, vm.command)
        assert done.returncode == 0, done.stderr
        vm.goes_on()
        vm.until(lambda: monitors(vm) == ["mine"], f"one monitor: {monitors(vm)}")
    assert "deprecated" not in vm.said()
    backend = {"type": "null", "data": {}}
    vm.execute("chardev-add", id="late", backend=backend)
    vm.execute("object-add", id="more", chardev="late", **{"qom-type": "monitor-qmp"})
    checked = vm.cprctl("qemu", "check", "--qmp", vm.qmp)
    assert checked.returncode == 0
    assert "the monitor 'more' ends with this QEMU" in checked.stdout
    assert vm.start().wait(20) == 1  # nothing is held, and somebody listens there


def monitors(vm: Machine) -> list[str]:
    rows = vm.execute("qom-list", path="/objects")
    return [row["name"] for row in rows if row["type"] == "child<monitor-qmp>"]

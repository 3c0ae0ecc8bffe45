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

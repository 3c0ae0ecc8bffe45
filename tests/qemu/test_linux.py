"""A Linux guest at work goes through holds: its network, fsync'ed writes, port and memory."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import pytest

from tests.qemu.conftest import Boot

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]


@pytest.mark.parametrize("machine", ["q35", "pc"])
def test_linux_at_work_goes_through_holds_and_an_upgrade(
    boot: Boot, machine: str, tmp_path: Path
) -> None:
    guest = boot(machine)
    vm = guest.vm
    for _ in range(5):
        saved = vm.save()
        assert saved.returncode == 0, saved.stderr
        assert vm.alive() == []
        guest.wrote_everything(tmp_path)
        vm.start()
        guest.goes_on()
    done = vm.upgrade(vm.qmp, vm.command)
    assert done.returncode == 0, done.stderr
    guest.goes_on()
    assert vm.save().returncode == 0
    guest.wrote_everything(tmp_path)


def test_a_guest_that_sleeps_is_held_asleep_and_wakes_in_the_next_qemu(boot: Boot) -> None:
    guest = boot(sleep_at=10)
    vm = guest.vm
    vm.await_status("suspended")
    done = guest.rounds()
    for _ in range(2):
        saved = vm.save()
        assert saved.returncode == 0, saved.stderr
        vm.start()
        vm.until(lambda: vm.cprctl("show", vm.name).returncode == 3, "confirmed")
        assert vm.status() == "suspended"
    assert guest.rounds() == done
    vm.execute("system_wakeup")
    guest.goes_on()
    assert vm.status() == "running"


def test_a_clock_that_stood_still_is_set_by_the_guest_agent(boot: Boot) -> None:
    """A real qemu-ga in the guest."""
    place = tempfile.mkdtemp()
    agent = f"{place}/agent"
    guest = boot(
        "q35",
        0,
        *("-chardev", f"socket,id=ga,path={agent},server=on,wait=off"),
        *("-device", "virtserialport,chardev=ga,name=org.qemu.guest_agent.0"),
    )
    vm = guest.vm

    def behind() -> float:
        """s that the guest's clock is behind ours."""
        guest.goes_on(2)
        clocks = [line for line in vm.lines() if line.startswith("C ")]
        if not clocks:
            pytest.skip("no qemu-guest-agent could be had")
        return time.time() - int(clocks[-1].split()[1])

    assert abs(behind()) < 4
    assert vm.save().returncode == 0
    time.sleep(12)  # nothing to wait for: time is what this is about
    vm.start()
    assert behind() > 9
    assert vm.save().returncode == 0
    vm.start("--set-time", agent)
    vm.until(lambda: vm.cprctl("show", vm.name).returncode == 3, "confirmed")
    vm.until(lambda: behind() < 4, "a clock that is right")
    assert "was not set" not in vm.said()
    assert vm.save().returncode == 0
    vm.start("--set-time", f"{place}/nobody")
    guest.goes_on()
    assert "the guest's clock was not set" in vm.said()

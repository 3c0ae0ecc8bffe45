"""What a guest was doing when it was saved, it does in the next QEMU."""

from __future__ import annotations

from tests.qemu.conftest import MakeMachine
from tests.qemu.machine import Machine


def faulty(vm: Machine, text: str) -> None:
    """Put a layer under the disk of `vm` that fails as `text` (QEMU's blkdebug) says."""
    place = vm.place / "faults"
    place.write_text(text)
    there = f"file={vm.disk},"
    assert any(there in word for word in vm.command)
    vm.command = [word.replace(there, f"file=blkdebug:{place}:{vm.disk},") for word in vm.command]


def test_a_write_that_failed_is_repeated_in_the_next_qemu(make_machine: MakeMachine) -> None:
    """A full disk stops the guest in the middle of its write; it is held like that, the storage is
    mended while nobody runs, and what the guest sees is a write that took long."""
    vm = make_machine()
    mended = vm.command
    faulty(vm, '[inject-error]\nevent = "write_aio"\niotype = "write"\nerrno = "28"\n')
    vm.start()
    vm.await_status("io-error")
    checked = vm.cprctl("qemu", "check", "--qmp", vm.qmp)
    assert checked.returncode == 0
    assert "mend the storage, then `cont`" in checked.stdout
    assert not any(line.endswith("W") for line in vm.lines())
    saved = vm.save()
    assert saved.returncode == 0, saved.stderr
    assert vm.alive() == []

    vm.command = mended
    vm.start()
    vm.until(lambda: vm.cprctl("show", vm.name).returncode == 3, "confirmed")
    assert vm.status() == "io-error"
    vm.stands(0.3)
    vm.execute("cont")
    vm.goes_on(40)
    written = [int(line[:8], 16) for line in vm.lines() if line.endswith("W")]
    assert written[:2] == [16, 32]

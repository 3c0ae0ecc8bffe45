"""What a guest was doing when it was saved, it does in the next QEMU."""

from __future__ import annotations

import pytest

from tests.qemu.conftest import MakeMachine
from tests.qemu.machine import Machine
from tests.qemu.steps import Standing, rows, words


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


@pytest.mark.parametrize("verb", ["save", "upgrade"])
def test_paused_by_its_user_just_before_it_is_taken_it_stays_paused(
    make_machine: MakeMachine, verb: str
) -> None:
    """Through another monitor, after we have looked."""
    vm = make_machine()
    second = str(vm.place / "second")
    vm.command += ["-qmp", f"unix:{second},server=on,wait=off"]
    vm.start()
    vm.goes_on()
    standing = Standing(vm, f"qemu-{verb}:cpr", *words(vm, verb))
    vm.ask(lambda monitor: monitor.execute("stop"), second)
    assert standing.go() == (0, "")
    if verb == "save":
        vm.start()
    vm.await_status("paused")
    vm.until(lambda: rows(vm) == [], "the end of the hold")
    vm.stands(0.3)
    vm.execute("cont")
    vm.goes_on()


@pytest.mark.parametrize("verb", ["save", "upgrade"])
def test_let_go_on_by_its_user_just_before_it_is_taken_it_goes_on(
    make_machine: MakeMachine, verb: str
) -> None:
    vm = make_machine()
    second = str(vm.place / "second")
    vm.command += ["-qmp", f"unix:{second},server=on,wait=off"]
    vm.start()
    vm.goes_on()
    vm.execute("stop")
    standing = Standing(vm, f"qemu-{verb}:cpr", *words(vm, verb))
    vm.ask(lambda monitor: monitor.execute("cont"), second)
    assert standing.go() == (0, "")
    if verb == "save":
        vm.start()
    vm.goes_on()


CANNOT_FLUSH = '[inject-error]\nevent = "flush_to_disk"\niotype = "flush"\nerrno = "5"\n'


@pytest.mark.parametrize("paused", [False, True])
def test_a_disk_that_cannot_be_flushed_does_not_cost_the_guest(
    make_machine: MakeMachine, paused: bool
) -> None:
    """QEMU stops the guest for the hand-over, fails, and refuses to let it go on; we know a way."""
    vm = make_machine()
    faulty(vm, CANNOT_FLUSH)
    vm.start()
    vm.goes_on()
    if paused:
        vm.execute("stop")
    for _ in range(2):
        saved = vm.save()
        assert saved.returncode == 1
        assert "the guest's disks could not be flushed (Input/output error)" in saved.stderr
        assert vm.cprctl("show", vm.name).returncode == 3
        assert vm.execute("query-migrate-parameters")["mode"] == "normal"
        if paused:
            assert "the guest is in its QEMU as before (paused)" in saved.stderr
            assert vm.status() == "paused"
            vm.stands(0.3)
        else:
            assert "the guest runs on in its QEMU" in saved.stderr
            vm.goes_on()
    if paused:
        vm.execute("cont")
    vm.goes_on()
    assert [row for row in vm.execute("query-chardev") if row["label"] == "gdb"] == []
    assert not [place for place in vm.place.iterdir() if place.name.startswith(".cprd-")]


def test_an_upgrade_of_a_guest_whose_disk_cannot_be_flushed_leaves_it_running(
    make_machine: MakeMachine,
) -> None:
    vm = make_machine()
    healthy = vm.command
    faulty(vm, CANNOT_FLUSH)
    vm.start()
    vm.goes_on()
    before = vm.alive()
    done = vm.upgrade(vm.qmp, healthy)
    assert done.returncode == 1
    assert "could not be flushed" in done.stderr
    vm.goes_on()
    assert vm.alive() == before
    assert vm.cprctl("show", vm.name).returncode == 3

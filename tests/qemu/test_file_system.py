"""An ext4 of a Linux guest at work, after each refusal and each hand-over: all that the guest has
synced is there, and the file system has no fault."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.qemu.conftest import Boot
from tests.qemu.linux_guest import Guest, is_whole, synced
from tests.qemu.machine import Machine
from tests.qemu.steps import Standing, kill, words
from tests.qemu.test_image_taken import image_in_use, is_free, stays
from tests.qemu.test_same_machine import mirrored, refuses

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]

Words = list[str]
NET = "virtio-net-pci,netdev=n0"


class Disk:
    """The guest's file system: the image in which it lies now."""

    def __init__(self, guest: Guest, image: Path, place: Path) -> None:
        self.guest = guest
        self.vm = guest.vm
        self.image = image
        self.place = place
        self.looks = 0

    def is_whole(self) -> None:
        """Look at it: with nobody alive, or while the guest is stopped for a moment."""
        runs = bool(self.vm.alive()) and self.vm.status() == "running"
        if runs:
            self.vm.execute("stop")
        is_whole(self.guest, self.image, self.place)
        self.looks += 1
        if runs:
            self.vm.execute("cont")

    def goes_on(self) -> None:
        """The guest works, writes to it, and it is whole."""
        before = synced(self.guest)
        self.guest.goes_on(6)
        assert synced(self.guest) > before
        self.is_whole()

    def is_refused(self, words: Words, *named: str, by: str) -> None:
        refuses(self.vm, words, *named, by=by, unharmed=self.guest.goes_on)
        self.is_whole()

    def is_refused_by_both(
        self, words: Words, right: Words, *named: str, options: tuple[str, ...] = ()
    ) -> None:
        """By upgrade and by start; `right` takes the guest on, by both."""
        self.is_refused(words, *named, by="upgrade")
        saved = self.vm.save()
        assert saved.returncode == 0, saved.stderr
        self.is_whole()
        self.is_refused(words, *named, by="start")
        self.vm.command = right
        self.vm.start(*options)
        self.goes_on()
        done = self.vm.upgrade(self.vm.qmp, right)
        assert done.returncode == 0, done.stderr
        self.goes_on()


@pytest.fixture
def disk(boot: Boot, tmp_path: Path) -> Disk:
    """Of a guest that works on it."""
    if shutil.which("mkfs.ext4") is None or shutil.which("debugfs") is None:
        pytest.skip("wants mkfs.ext4 and debugfs: apt-get install e2fsprogs")
    image = tmp_path / "fs.img"
    image.write_bytes(b"")
    os.truncate(image, 64 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    (tmp_path / "a.iso").write_bytes(bytes(1 << 16))
    guest = boot(
        "q35",
        0,
        *("-drive", f"file={image},format=raw,if=none,id=fs"),
        *("-device", "virtio-blk-pci,drive=fs,id=fsdisk"),
        *("-drive", f"file={tmp_path}/a.iso,if=none,id=cd,media=cdrom"),
        *("-device", "ide-cd,drive=cd,id=drive0", "-device", "qemu-xhci,id=xhci"),
    )
    return Disk(guest, image, tmp_path)


def changed(vm: Machine, old: str, new: str) -> Words:
    found = [word.replace(old, new) for word in vm.command]
    assert found != vm.command
    return found


def test_it_was_moved_to_another_image(disk: Disk) -> None:
    """By a snapshot, then by a mirror."""
    vm, first = disk.vm, disk.image
    disk.image = disk.place / "over.qcow2"
    names = {"snapshot-file": str(disk.image), "format": "qcow2"}
    vm.execute("blockdev-snapshot-sync", device="fs", **names)
    disk.guest.goes_on(6)
    right = changed(vm, f"file={first},format=raw", f"file={disk.image},format=qcow2")
    disk.is_refused_by_both(vm.command, right, "'fs'", str(disk.image))
    second = disk.image
    disk.image = Path(mirrored(vm, "fs")[0])
    disk.guest.goes_on(6)
    right = changed(vm, f"file={second},format=qcow2", f"file={disk.image},format=raw")
    disk.is_refused_by_both(vm.command, right, "'fs'", str(disk.image))
    assert disk.looks == 10  # 5 an image


def test_another_medium_and_an_edited_image(disk: Disk) -> None:
    vm = disk.vm
    second = disk.place / "b.iso"
    second.write_bytes(bytes(1 << 16))
    vm.execute("blockdev-change-medium", id="drive0", filename=str(second), format="raw")
    right = changed(vm, "a.iso", "b.iso")
    disk.is_refused_by_both(vm.command, right, "'cd'", str(second))
    assert vm.save().returncode == 0
    with open(disk.image, "r+b") as file:  # the first KiB is none of ext4's
        file.write(b"edited")
    disk.is_refused(vm.command, "'fs'", "was written", by="start")
    vm.start("--other-images")
    disk.goes_on()


def test_another_machine(disk: Disk) -> None:
    """What was plugged, another CPU, another mac."""
    vm = disk.vm
    vm.execute("device_add", driver="usb-kbd", id="hot0", bus="xhci.0")
    right = [*vm.command, "-device", "usb-kbd,id=hot0,bus=xhci.0"]
    disk.is_refused_by_both(vm.command, right, "hot0")
    others = [
        (["-cpu max"], [*vm.command, "-cpu", "max"]),
        (["mac", "34:77"], changed(vm, NET, f"{NET},mac=52:54:00:12:34:77")),
    ]
    for named, other in others:
        disk.is_refused(other, *named, by="upgrade")
    assert vm.save().returncode == 0
    for named, other in others:
        disk.is_refused(other, *named, by="start")
    vm.start()
    disk.goes_on()


def test_another_process_takes_its_lock_in_the_gap(disk: Disk) -> None:
    """The guest stays, whole, in the old QEMU, and goes on there by `cont`."""
    vm = disk.vm
    (old,) = vm.alive()
    upgrade = Standing(vm, "qemu-upgrade:prepared", *words(vm, "upgrade"))
    (new,) = (pid for pid in vm.alive() if pid != old)
    os.kill(new, signal.SIGSTOP)
    upgrade.let_go()
    vm.until(lambda: is_free(vm, disk.image), "the old QEMU lets go of its image")
    with image_in_use(vm, disk.image):
        kill(new)
        stays(vm, *upgrade.end(), unharmed=disk.is_whole)
    vm.execute("cont")
    disk.goes_on()
    save = Standing(vm, "qemu-save:main", *words(vm, "save"))
    assert vm.cprctl("save", vm.name, "--fd", "x=0").returncode == 0  # cprd refuses it now
    with image_in_use(vm, disk.image):
        stays(vm, *save.go(), unharmed=disk.is_whole)
    vm.execute("cont")
    disk.goes_on()
    assert vm.cprctl("drop", vm.name).returncode == 0
    assert vm.save().returncode == 0
    disk.is_whole()
    vm.start()
    disk.goes_on()

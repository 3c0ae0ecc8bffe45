"""Which devices a guest keeps through a hold, and what a hold of them consists of.

Every row goes through `cprctl qemu save` and `cprctl qemu start` with nobody alive in between, and
the guest's own count proves that it went on. The memory that travels is compared by name and size:
a region that is missing would be noticed only later, and by the guest.
"""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

from tests.qemu.conftest import MakeMachine
from tests.qemu.machine import Machine
from tests.support.daemon import DaemonProcess

BIOS = "/usr/share/seabios/bios-256k.bin"
SLOT = "addr=0x10"
AT = "0000:00:10.0"  # what is in that slot

Regions = dict[str, str]
BASE: Regions = {
    "/rom@etc/acpi/tables": "2.0 MiB",
    "/rom@etc/table-loader": "64.0 KiB",
    "/rom@etc/acpi/rsdp": "4.0 KiB",
    "ram0": "128.0 MiB",
    "pc.rom": "128.0 KiB",
    "pc.bios": "256.0 KiB",
}
_WHAT = re.compile(r"(?:memfd|file) .*?(\d+\.\d [KMG]iB)(?:,| in memory)")


def held(vm: Machine) -> dict[str, Any]:
    shown = vm.cprctl("show", vm.name, "--json")
    assert shown.returncode == 0, shown.stderr
    return dict(json.loads(shown.stdout))


def listed(vm: Machine) -> dict[str, Any]:
    """The one row of `cprctl list` for `vm`."""
    rows = json.loads(vm.cprctl("list", "--json").stdout)
    (row,) = (row for row in rows if row["name"] == vm.name)
    return dict(row)


def regions(vm: Machine) -> Regions:
    """The descriptors in the hold of `vm`: the size of each by its name."""
    found: Regions = {}
    for row in held(vm)["descriptors"]:
        what = _WHAT.match(row["what"])
        assert what, row
        assert row["id"] == 0
        assert row["name"] not in found
        found[row["name"]] = what[1]
    return found


def saved(vm: Machine) -> Regions:
    """Save, and see that nobody is left: what is held."""
    done = vm.save()
    assert done.returncode == 0, done.stderr
    assert vm.alive() == []
    vm.unharmed()
    return regions(vm)


def started(vm: Machine) -> None:
    """The guest goes on, in one QEMU, and nothing is held any more."""
    process = vm.start()
    vm.goes_on()
    assert vm.alive() == [process.pid]
    assert vm.cprctl("show", vm.name).returncode == 3


def booted(make_machine: MakeMachine, *extra: str, **options: Any) -> Machine:
    vm = make_machine(*extra, **options)
    vm.start()
    vm.goes_on()
    return vm


def device(*words: str) -> list[str]:
    """-device for each of these words, unless it begins with its own option."""
    made: list[str] = []
    for word in words:
        made += word.split(" ", 1) if word.startswith("-") else ["-device", word]
    return made


# What a VM has besides the usual: its arguments, and the descriptors they add.
ROWS = {
    "virtio-net-user": (
        device("-netdev user,id=n0", f"virtio-net-pci,netdev=n0,{SLOT}"),
        {f"{AT}/virtio-net-pci.rom": "256.0 KiB"},
    ),
    "virtio-serial": (
        device(
            "virtio-serial-pci",
            "-chardev file,id=v0,path=/dev/null,append=on",
            "virtserialport,chardev=v0,name=t",
        ),
        {},
    ),
    "VGA": (device(f"VGA,{SLOT}"), {f"{AT}/vga.rom": "64.0 KiB", f"{AT}/vga.vram": "16.0 MiB"}),
    "second-memory-backend": (
        device("-object memory-backend-memfd,id=other,size=16M,share=on"),
        {"other": "16.0 MiB"},
    ),
}
MORE_ROWS = {
    "virtio-net-without-rom": (
        device("-netdev user,id=n0", f"virtio-net-pci,netdev=n0,romfile=,{SLOT}"),
        {},
    ),
    "e1000": (
        device("-netdev user,id=n0", f"e1000,netdev=n0,{SLOT}"),
        {f"{AT}/e1000.rom": "256.0 KiB"},
    ),
    "e1000e": (
        device("-netdev user,id=n0", f"e1000e,netdev=n0,{SLOT}"),
        {f"{AT}/e1000e.rom": "256.0 KiB"},
    ),
    "virtio-vga": (
        device(f"virtio-vga,{SLOT}"),
        {f"{AT}/virtio-vga.rom": "64.0 KiB", f"{AT}/vga.vram": "8.0 MiB"},
    ),
    "cirrus-vga": (
        device(f"cirrus-vga,{SLOT}"),
        {f"{AT}/cirrus_vga.rom": "64.0 KiB", f"{AT}/vga.vram": "4.0 MiB"},
    ),
    "bochs-display": (
        device(f"bochs-display,{SLOT}"),
        {f"{AT}/bochs-display.rom": "32.0 KiB", f"{AT}/bochs-display-vram": "16.0 MiB"},
    ),
    "memory-backend-shm": (
        device("-object memory-backend-shm,id=other,size=16M,share=on"),
        {"other": "16.0 MiB"},
    ),
    "virtio-scsi": (
        device(
            "virtio-scsi-pci", "-drive driver=null-co,if=none,id=n0,size=1M", "scsi-hd,drive=n0"
        ),
        {},
    ),
    "ide-cd": (device("ide-cd"), {}),
    "virtio-rng": (device("virtio-rng-pci"), {}),
    "virtio-balloon": (device("virtio-balloon-pci"), {}),
    "xhci": (device("qemu-xhci", "usb-tablet"), {}),
    "vmgenid": (device("vmgenid,guid=auto"), {}),
    "pvpanic": (device("pvpanic-pci"), {}),
    "root-port": (device("pcie-root-port,id=p0,chassis=1"), {}),
    "intel-iommu": (device("intel-iommu"), {}),
}


def through_a_hold(make_machine: MakeMachine, extra: list[str], more: Regions) -> None:
    vm = booted(make_machine, *extra)
    assert saved(vm) == {**BASE, **more}
    started(vm)
    # Once more: what the first round restored is what the second one saves.
    assert saved(vm) == {**BASE, **more}
    started(vm)


@pytest.mark.parametrize("row", ROWS)
def test_a_guest_keeps_its_device(make_machine: MakeMachine, row: str) -> None:
    through_a_hold(make_machine, *ROWS[row])


@pytest.mark.full
@pytest.mark.parametrize("row", MORE_ROWS)
def test_a_guest_keeps_its_rarer_device(make_machine: MakeMachine, row: str) -> None:
    through_a_hold(make_machine, *MORE_ROWS[row])


@pytest.mark.parametrize(("machine", "smp"), [("q35", 2), ("pc", 1)])
def test_a_machine_of_the_other_kind(make_machine: MakeMachine, machine: str, smp: int) -> None:
    vm = booted(make_machine, machine=machine, smp=smp)
    assert saved(vm) == BASE
    started(vm)
    assert len(vm.execute("query-cpus-fast")) == smp


def test_firmware_in_pflash_travels(make_machine: MakeMachine) -> None:
    vm = booted(make_machine, "-drive", f"if=pflash,format=raw,readonly=on,file={BIOS}")
    between = saved(vm)
    assert between["system.flash0"] == "256.0 KiB"
    assert "pc.bios" not in between
    started(vm)


def test_what_was_on_the_screen_is_still_there(make_machine: MakeMachine) -> None:
    vm = booted(make_machine, "-device", "VGA")

    def screen() -> bytes:
        """The text memory, as the guest's CPU sees it."""
        place = vm.place / "screen"
        vm.execute("pmemsave", val=0xB8000, size=80 * 25 * 2, filename=str(place))
        return place.read_bytes()

    before = screen()
    assert b"SeaBIOS" in before[::2]
    saved(vm)
    started(vm)
    assert screen() == before


@pytest.mark.parametrize("count", [22, 60])
def test_many_descriptors_come_whole_and_cost_the_daemon_nothing(
    make_machine: MakeMachine, daemon: DaemonProcess, count: int
) -> None:
    """More than a QEMU takes in one message (16)."""
    displays = ["bochs-display"] * 8
    others = [
        f"-object memory-backend-memfd,id=other{at},size=2M,share=on" for at in range(count - 22)
    ]
    vm = booted(make_machine, *device(*displays, *others))
    before = daemon.fds()
    between = saved(vm)
    assert len(between) == count
    assert listed(vm)["fds"] == count
    assert daemon.fds() - before < 10  # whatever is held, it is a few descriptors for cprd
    started(vm)


def sector_1(image: Path) -> int:
    """What the guest wrote last, read from an image that nobody has open."""
    raw = image.with_name("read.raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw], check=True)
    data = raw.read_bytes()
    raw.unlink()
    return int(struct.unpack_from("<I", data, 512)[0])


def test_writes_to_a_qcow2_go_on_and_none_is_lost(make_machine: MakeMachine) -> None:
    """Every 16th tick is written to the disk, and synced: the image has what was acknowledged."""
    vm = make_machine(disk="qcow2")
    vm.command = [
        word.replace("format=qcow2", "format=qcow2,cache=writethrough") for word in vm.command
    ]
    assert sector_1(vm.disk) == 0
    vm.start()
    vm.goes_on()
    last = 0
    for _ in range(3):
        vm.goes_on(32)
        saved(vm)
        acknowledged = [line for line in vm.lines() if line.endswith("W")]
        tick = int(acknowledged[-1][:8], 16)
        assert tick > last
        # The write of the next tick may have been done just before its line was printed.
        assert sector_1(vm.disk) in (tick, vm.ticks() + 1)
        assert subprocess.run(["qemu-img", "check", "-q", vm.disk], check=False).returncode == 0
        last = tick
        started(vm)


def test_a_guest_paused_by_its_user_stays_paused(make_machine: MakeMachine) -> None:
    vm = booted(make_machine)
    vm.execute("stop")
    saved(vm)
    (origin,) = (row["value"] for row in held(vm)["sections"] if row["key"] == "qemu")
    assert origin["status"] == "paused"
    vm.start()
    vm.until(lambda: vm.cprctl("show", vm.name).returncode == 3, "confirmed")
    assert vm.status() == "paused"
    vm.stands(0.5)
    vm.execute("cont")
    vm.goes_on()


def allocated(vm: Machine) -> int:
    """Bytes that the VM's shared memory has, in its living QEMU."""
    (pid,) = vm.alive()
    places = [Path(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    found = {
        (place.stat().st_dev, place.stat().st_ino): place.stat().st_blocks * 512
        for place in places
        if os.readlink(place).startswith("/memfd:memory-backend")
    }
    return sum(found.values())


def resident(daemon: DaemonProcess) -> int:
    """Bytes of memory of the daemon."""
    text = Path(f"/proc/{daemon.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    assert found
    return int(found[1]) << 10


def seconds_of_a_hand_over(vm: Machine) -> tuple[float, int]:
    """(s from the begin of save to the guest's next tick, bytes held)."""
    begin = perf_counter()
    done = vm.save()
    between = perf_counter()
    assert done.returncode == 0, done.stderr
    count = int(listed(vm)["bytes"])
    last = vm.ticks()
    again = perf_counter()
    vm.start()
    vm.until(lambda: vm.ticks() > last, "the next tick")
    return perf_counter() - again + between - begin, count


def test_sixteen_times_the_memory_costs_neither_time_nor_bytes(
    make_machine: MakeMachine, daemon: DaemonProcess
) -> None:
    """All of it is really there, so that a copy anywhere would show."""
    vms = []
    for name, memory in (("small", "128M"), ("large", "2G")):
        vm = booted(make_machine, name=name, memory=memory, share="on,prealloc=on")
        vm.command = [word.replace(",prealloc=on", "") for word in vm.command]
        vms.append(vm)
    assert [allocated(vm) for vm in vms] == [128 << 20, 2 << 30]
    for vm in vms:
        seconds_of_a_hand_over(vm)  # (the daemon imports what it needs at its first hold)
    before = resident(daemon)
    took: list[list[float]] = [[], []]
    held: list[list[int]] = [[], []]
    for _ in range(3):
        for at, vm in enumerate(vms):
            elapsed, count = seconds_of_a_hand_over(vm)
            took[at].append(elapsed)
            held[at].append(count)
    assert [allocated(vm) for vm in vms] == [128 << 20, 2 << 30]
    small, large = (min(times) for times in took)  # the rest is the machine's other load
    assert large <= 1.5 * small + 0.1, took  # to copy 2 GiB takes half a second and more
    assert max(held[1]) - min(held[0]) < 1024, held
    assert max(held[1]) < 256 << 10
    assert resident(daemon) - before < 2 << 20
    for vm in vms:
        vm.unharmed()

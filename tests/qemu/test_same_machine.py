"""The guest never goes on in another machine: what differs is named and refused, and the guest is
where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import cprd
from cprd.qemu.command import Command
from tests.qemu.conftest import MakeMachine
from tests.qemu.machine import Machine
from tests.qemu.test_check import boot, check, replaced

Words = list[str]


def starts(vm: Machine, words: Words, *options: str) -> None:
    """A start that takes the guest on."""
    before = vm.ticks()
    vm.start(*options, command=words)
    vm.until(lambda: vm.ticks() > before, "a guest that goes on")
    vm.until(lambda: vm.cprctl("show", vm.name).returncode == 3, "confirmed")
    vm.goes_on(3)


def refuses(
    vm: Machine, words: Words, *named: str, by: str, unharmed: Callable[[int], object] | None = None
) -> None:
    """Neither an upgrade (of a guest that runs) nor a start (of a guest that is held) takes these
    words for the same machine; the guest is untouched. `unharmed`: how a guest goes on."""
    if by == "upgrade":
        pids = vm.alive()
        done = vm.upgrade(vm.qmp, words)
        assert done.returncode == 1
        said = done.stderr
        assert vm.alive() == pids
        (unharmed or vm.goes_on)(3)
        assert vm.cprctl("show", vm.name).returncode == 3
    else:
        at = len(vm.said())
        before = vm.ticks()
        assert vm.start(command=words).wait(20) in (1, -signal.SIGKILL)
        vm.until(lambda: "held as before" in vm.said()[at:], "held")
        said = vm.said()[at:]
        assert vm.alive() == []
        assert vm.ticks() == before
    for word in named:
        assert word in said, said


def refused_by_both(
    vm: Machine, words: Words, right: Words, *named: str, options: tuple[str, ...] = ()
) -> None:
    """By upgrade and by start; `right` (with `options`) takes the guest on."""
    refuses(vm, words, *named, by="upgrade")
    saved = vm.save()
    assert saved.returncode == 0, saved.stderr
    refuses(vm, words, *named, by="start")
    starts(vm, right, *options)


# Disks


def over(vm: Machine) -> tuple[str, Words]:
    """A live snapshot; the file, and the words that fit."""
    path = str(vm.place / "over.qcow2")
    vm.execute("blockdev-snapshot-sync", device="d0", **{"snapshot-file": path, "format": "qcow2"})
    words = replaced(f"file={vm.disk},format=raw", f"file={path},format=qcow2")(vm.command)
    return path, words


def mirrored(vm: Machine, device: str = "d0") -> tuple[str, Words]:
    """A mirror with pivot; the file, and the words that fit for the usual disk."""
    path = str(vm.place / "copy.raw")
    vm.execute("drive-mirror", device=device, target=path, format="raw", sync="full")
    vm.until(lambda: vm.execute("query-block-jobs")[0]["ready"], "ready")
    vm.execute("block-job-complete", device=device)
    vm.until(lambda: vm.execute("query-block-jobs") == [], "the pivot")
    words = vm.command if device != "d0" else replaced(str(vm.disk), path)(vm.command)
    return path, words


@pytest.mark.parametrize("move", [over, mirrored])
def test_the_image_that_a_guest_was_moved_to_is_the_only_one(
    vm: Machine, move: Callable[[Machine], tuple[str, Words]]
) -> None:
    path, right = move(vm)
    vm.goes_on(20)  # it writes there
    status, lines = check(vm)
    assert status == 1
    assert "'d0'" in lines[0]
    assert path in lines[0]
    assert "-drive id=d0" in lines[0]
    refused_by_both(vm, vm.command, right, "'d0'", path, str(vm.disk), "-drive id=d0")
    vm.goes_on(20)
    assert check(vm)[0] == 0
    assert vm.execute("query-block")[0]["inserted"]["file"] == path


def test_an_image_is_known_by_its_inode_and_not_by_its_name(vm: Machine) -> None:
    other = vm.place / "moved.raw"
    os.rename(vm.disk, other)
    right = replaced(str(vm.disk), str(other))(vm.command)
    for at_the_path in (False, True):
        if at_the_path:
            vm.disk.write_bytes(other.read_bytes())  # another file
        status, lines = check(vm)
        assert status == 1
        assert str(vm.disk) in lines[0]
        refuses(vm, right, str(vm.disk), by="upgrade")  # (by QEMU it would be as well)
        assert vm.save().returncode == 1
        vm.goes_on(3)
    os.rename(other, vm.disk)
    assert vm.save().returncode == 0
    os.rename(vm.disk, other)
    vm.disk.write_bytes(other.read_bytes())
    refuses(vm, vm.command, "'d0'", str(vm.disk), by="start")
    starts(vm, right)
    link = vm.place / "link.raw"
    link.symlink_to(other)
    done = vm.upgrade(vm.qmp, replaced(str(vm.disk), str(link))(vm.command))
    assert done.returncode == 0, done.stderr
    vm.goes_on(5)


def test_an_image_that_was_written_while_nobody_ran_is_refused(vm: Machine) -> None:
    vm.goes_on(20)
    assert vm.save().returncode == 0
    with open(vm.disk, "r+b") as file:
        file.seek(600_000)
        file.write(b"edited")
    refuses(vm, vm.command, "'d0'", "was written", by="start")
    with cprd.connect(vm.daemon) as daemon, daemon.load(vm.name) as claim:
        claim.state["machine"] = {**claim.state["machine"], "devices": 5, "command": []}
        claim.confirm(next=claim.state, after_exit=False)
    refuses(vm, vm.command, "garbled", by="start")  # a section is a claim, not a fact
    starts(vm, vm.command, "--other-images", "--force-machine")
    assert vm.save().returncode == 0
    starts(vm, vm.command)


def test_a_medium_that_was_changed_is_named(make_machine: MakeMachine) -> None:
    vm = make_machine("-drive", "{}", "-device", "ide-cd,drive=cd,id=drive0")
    first, second = (vm.place / name for name in ("first.iso", "second.iso"))
    for path in (first, second):
        path.write_bytes(bytes(1 << 16))
    words = [f"file={first},if=none,id=cd,media=cdrom" if w == "{}" else w for w in vm.command]
    vm.command = words
    vm.start()
    vm.goes_on()
    vm.execute("blockdev-change-medium", id="drive0", filename=str(second), format="raw")
    status, lines = check(vm)
    assert status == 1
    assert str(second) in lines[0]
    right = replaced(str(first), str(second))(words)
    refused_by_both(vm, words, right, "'cd'", str(first), str(second))
    vm.execute("eject", id="drive0", force=True)
    assert check(vm)[0] == 1
    refused_by_both(
        vm, right, replaced(f"file={second},", "")(words_of(right)), "'cd'", "without a medium"
    )


def words_of(words: Words) -> Words:
    return list(words)


def test_limits_that_were_set_since_the_start_are_named(vm: Machine) -> None:
    limits = {"bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 500, "iops_rd": 0, "iops_wr": 0}
    vm.execute("block_set_io_throttle", device="d0", **limits)
    status, lines = check(vm)
    assert status == 1
    assert "iops=500" in lines[0]
    right = replaced("if=none,id=d0", "if=none,id=d0,throttling.iops-total=500")(vm.command)
    refused_by_both(vm, vm.command, right, "iops=500")
    assert check(vm)[0] == 0


# Devices


def test_what_was_plugged_is_named_with_its_words(make_machine: MakeMachine) -> None:
    vm = make_machine(
        *("-m", "128M,slots=2,maxmem=1G", "-device", "qemu-xhci,id=xhci,p2=8"),
        *("-smp", "1,maxcpus=2", "-device", "usb-tablet,id=cold0,bus=xhci.0"),
        *("-device", "pcie-root-port,id=port0,chassis=1", "-device", "usb-mouse,bus=xhci.0,port=4"),
    )
    vm.start()
    vm.goes_on()
    vm.execute("device_add", driver="usb-kbd", id="hot0", bus="xhci.0")
    backend = {"qom-type": "memory-backend-memfd", "size": 128 << 20, "share": True}
    vm.execute("object-add", id="hotmem", **backend)
    vm.execute("device_add", driver="pc-dimm", id="hot1", memdev="hotmem")
    place = {"socket-id": 0, "core-id": 1, "thread-id": 0}
    slots = vm.execute("query-hotpluggable-cpus")
    free = next(row for row in slots if "qom-path" not in row)
    vm.execute("device_add", driver=free["type"], id="hot2", **{**place, **free["props"]})
    image = vm.place / "hot.raw"
    image.write_bytes(bytes(1 << 20))
    vm.execute("blockdev-add", driver="file", filename=str(image), **{"node-name": "hotdisk"})
    vm.execute("device_add", driver="usb-storage", id="hot3", bus="xhci.0", drive="hotdisk")
    vm.execute("netdev_add", type="user", id="hotnet")
    net = {"driver": "virtio-net-pci", "netdev": "hotnet", "mrg_rxbuf": False}
    vm.execute("device_add", id="hot4", bus="port0", **net)
    vm.execute("object-add", id="unused", **{"qom-type": "iothread"})  # no guest sees that
    vm.execute("device_del", id="cold0")
    unnamed = vm.execute("qom-list", path="/machine/peripheral-anon")
    mouse = next(row["name"] for row in unnamed if "usb-mouse" in row["type"])
    vm.execute("device_del", id=f"/machine/peripheral-anon/{mouse}")
    vm.until(lambda: "cold0" not in str(vm.execute("qom-list", path="/machine/peripheral")), "gone")
    status, lines = check(vm)
    assert status == 1
    assert "a device without an id was unplugged" in " ".join(lines)
    words = [line.partition("COMMAND needs ")[2] for line in lines if "COMMAND needs " in line]
    ids = Command(["kvm", *(word for option in words for word in option.split(" "))]).ids()
    assert ids == {"hotmem", "hotdisk", "hotnet", *(f"hot{number}" for number in range(5))}
    assert "mrg_rxbuf=false" in " ".join(words)
    assert "'cold0' was unplugged" in " ".join(lines)
    at = vm.command.index("usb-tablet,id=cold0,bus=xhci.0")
    assert vm.command[at + 4] == "usb-mouse,bus=xhci.0,port=4"
    right = [*vm.command[: at - 1], *vm.command[at + 1 : at + 3], *vm.command[at + 5 :]]
    for option in words:
        right += option.split(" ")
    refuses(vm, vm.command, "hot0", "hot1", "hot2", "hotmem", by="upgrade")
    refuses(vm, [*right, "-device", "usb-mouse,id=more,bus=xhci.0"], "'more'", by="upgrade")
    saved = vm.save()
    assert saved.returncode == 0
    assert "hot0" in saved.stdout
    refuses(vm, vm.command, "hot0", "hot1", "hot2", "hotmem", by="start")
    starts(vm, right)
    assert check(vm)[0] == 0
    done = vm.upgrade(vm.qmp, right)
    assert done.returncode == 0, done.stderr
    vm.goes_on(5)


NET = "virtio-net-pci,netdev=n0,mac=52:54:00:12:34:57"
OTHERS = {
    "model": ("-cpu qemu64", "-cpu max", ["-cpu max", "qemu64"]),
    "feature": ("-cpu qemu64", "-cpu qemu64,-sse2", ["-sse2", "CPUID 0x1 EDX"]),
    "cpus": ("-smp 2", "-smp 4", ["-smp 4", "2 CPUs"]),
    "topology": ("-smp 2", "-smp 2,sockets=2", ["sockets=2"]),
    "room for cpus": ("-smp 2", "-smp 2,maxcpus=4", ["maxcpus=4", "maxcpus=2"]),
    "room for memory": ("-m 128M", "-m 128M,slots=2,maxmem=1G", ["max-size=1073741824"]),
    "cache": ("-cpu qemu64", "-cpu qemu64,l3-cache=off", ["l3-cache"]),
    "firmware": ("-smbios type=1,serial=a", "-smbios type=1,serial=b", ["serial=a", "serial=b"]),
    "networks": (
        "-device e1000,netdev=n1,id=net1 -device e1000,netdev=n2,id=net2",
        "-device e1000,netdev=n2,id=net1 -device e1000,netdev=n1,id=net2",
        ["net1", "n1 in the old", "n2 in COMMAND"],
    ),
    "mac": (f"-device {NET}", f"-device {NET[:-1]}8", ["mac", "34:57", "34:58"]),
    "serial": (",bootindex=1", ",bootindex=1,serial=b", ["serial"]),
    "uuid": ("-uuid a1b2c3d4-0000-4000-8000-0123456789ab", "", ["uuid"]),
    "more": ("", "-device usb-ehci -device usb-tablet,id=t1", ["'t1'", "usb-ehci"]),
    "less": ("-device usb-ehci,id=e1", "", ["'e1'", "missing"]),
    "generation": (
        "-device vmgenid,guid=auto",
        "-device vmgenid,guid=auto",
        ["generation", "guid="],
    ),
}


SPELLED = {
    "-machine q35": "-machine q35,hpet=yes,vmport=auto,mem-merge=off",
    "-cpu qemu64": "-cpu qemu64,+sse2,l3-cache=on,family=15",
    "-smp 2": "-smp cpus=2,sockets=1,maxcpus=2",
    "-m 128M": "-m size=131072k",
    "virtio-blk-pci,num-queues=1,vectors=2,": "virtio-blk-pci,vectors=2,",
    "-device usb-ehci,id=e1": "-device usb-ehci,id=e1 -global virtio-blk-pci.num-queues=1",
    "user,id=n0": "user,id=m0",
    "netdev=n0": "netdev=m0",
    "format=raw,if=none,id=d0": "format=raw,file.driver=file,if=none,id=d0",
}


def test_another_machine_is_refused_by_upgrade_and_by_start(make_machine: MakeMachine) -> None:
    """One guest, and each difference in turn."""
    vm = make_machine(*(word for n in range(3) for word in ("-netdev", f"user,id=n{n}")))
    line = " ".join(vm.command).replace("-smp 1", "-smp 2")
    line = line.replace("virtio-blk-pci,", "virtio-blk-pci,num-queues=1,vectors=2,")
    line += "".join(
        f" {old}"
        for old, _, _ in OTHERS.values()
        if old[:1] == "-" and old not in ("-smp 2", "-m 128M", "-cpu qemu64")
    )
    line += " -cpu qemu64"
    vm.command = line.split()
    vm.start()
    vm.goes_on()
    generation = vm.execute("query-vm-generation-id")["guid"]
    right = line.replace("guid=auto", f"guid={generation}")
    status, lines = check(vm)
    assert status == 1
    assert generation in lines[0]
    rows = []
    for name, (old, new, named) in OTHERS.items():
        changed = line
        if name != "generation":
            changed = right.replace(old, new) if old else f"{right} {new}"
            assert changed != right
        rows.append((changed.split(), named))
    for words, named in rows[::3]:
        refuses(vm, words, *named, by="upgrade")
    assert vm.save().returncode == 0
    for words, named in rows:
        refuses(vm, words, *named, by="start")
    starts(vm, right.split())
    respelled = right
    for usual, other in SPELLED.items():
        assert usual in respelled
        respelled = respelled.replace(usual, other)
    done = vm.upgrade(vm.qmp, respelled.split())
    assert done.returncode == 0, done.stderr
    vm.goes_on(5)
    forced = right.replace(f"-device {NET}", f"-device {NET[:-1]}8").split()
    assert vm.save().returncode == 0
    starts(vm, forced, "--force-machine")


# Migration settings


def test_shared_memory_that_is_ignored_is_put_out_of_the_way(vm: Machine) -> None:
    rows = [{"capability": "x-ignore-shared", "state": True}]
    vm.execute("migrate-set-capabilities", capabilities=rows)
    assert check(vm)[0] == 0
    refused = vm.upgrade(vm.qmp, replaced("-smp", "-no-such-option")(vm.command))
    assert refused.returncode == 1
    states = {row["capability"]: row["state"] for row in vm.execute("query-migrate-capabilities")}
    assert states["x-ignore-shared"]  # put back
    assert vm.save().returncode == 0
    starts(vm, vm.command)


def test_a_hold_that_wants_it_is_served_all_the_same(vm: Machine) -> None:
    """As the cprctl before this one left it."""
    rows = [{"capability": "x-ignore-shared", "state": True}]
    vm.execute("migrate-set-capabilities", capabilities=rows)
    code = (
        "import sys, cprd.qemu.source as s; s._HARMLESS |= {'x-ignore-shared'};"
        "from cprd.cli import main; sys.exit(main())"
    )
    words = ["qemu", "save", vm.name, "--qmp", vm.qmp]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=vm.env, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 0
    starts(vm, vm.command)


@pytest.mark.parametrize("name", ["x-multifd", "mapped-ram", "x-postcopy-ram"])
def test_a_global_setting_of_command_does_not_stop_a_start(
    make_machine: MakeMachine, name: str
) -> None:
    vm = make_machine("-global", f"migration.{name}=on")
    boot(vm)
    vm.goes_on(3)
    assert check(vm)[0] == 0
    assert vm.save().returncode == 0
    starts(vm, vm.command)


# Foreseen, or refused


def test_a_qemu_with_another_root_is_refused_before_anything(
    make_machine: MakeMachine, tmp_path: Path
) -> None:
    vm = make_machine("-run-with", f"chroot={tmp_path}")
    boot(vm)
    vm.goes_on(3)
    status, lines = check(vm)
    assert status == 1
    assert "another root" in " ".join(lines)
    assert vm.save().returncode == 1
    vm.goes_on(3)


def test_nobody_boots_beside_a_qemu_that_has_any_socket_of_command(
    make_machine: MakeMachine,
) -> None:
    """An image without locks, and another monitor: only the chardev tells."""
    vm = make_machine()
    path = vm.place / "c.sock"
    chardev = ["-chardev", f"socket,id=c,path={path},server=on,wait=off"]
    vm.command = [*replaced("format=raw", "format=raw,file.locking=off")(vm.command), *chardev]
    boot(vm)
    vm.goes_on(3)
    other = replaced(vm.qmp, f"{vm.qmp}2")(vm.command)
    assert vm.start(command=other).wait(20) == 1
    assert str(path) in vm.said()
    assert len(vm.alive()) == 1
    vm.goes_on(3)

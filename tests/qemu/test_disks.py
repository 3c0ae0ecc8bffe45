"""When two files, and two drives, count as the same: the rules, without a QEMU."""

from __future__ import annotations

from typing import Any

import pytest

from cprd.qemu import devices, disks, drift, machine
from cprd.qemu.command import Command
from cprd.qemu.examine import about_command_line
from cprd.qemu.inventory import Inventory

FILE = {"ino": 12, "dev": 65024, "size": 1 << 20, "mtime": 10**18, "mnt": 27, "fs": "ext4"}


def file(**changed: Any) -> dict[str, Any]:
    return {**FILE, **changed}


SAME = {
    "itself": (file(), file(), True),
    "another inode": (file(), file(ino=13), False),
    "another inode at the same name, on a mount of before": (file(), file(ino=13, mnt=30), False),
    "a remount with another device number": (file(), file(dev=65030, mnt=30), True),
    "another disk with that inode number": (file(), file(dev=65030, mnt=30, mtime=5), False),
    "another device number within a mount": (file(), file(dev=65030), False),
    "NFS, mounted anew": (file(fs="nfs4"), file(fs="nfs4", dev=44, mnt=30, mtime=5), True),
    "NFS, another file": (file(fs="nfs4"), file(fs="nfs4", ino=13, dev=44, mnt=30), False),
    "FUSE, with inode numbers of the day": (
        file(fs="fuse.sshfs"),
        file(fs="fuse.sshfs", ino=99),
        True,
    ),
    "FUSE, of another size": (file(fs="fuse"), file(fs="fuse", ino=99, size=5), False),
    "a block device": ({"rdev": 5}, {"rdev": 5}, True),
    "a block device with another number, at the same name": ({"rdev": 5}, {"rdev": 6}, True),
    "a block device and a file": ({"rdev": 5}, file(), False),
    "of a guest that still ran": ({k: v for k, v in FILE.items() if k != "mtime"}, file(), True),
}


@pytest.mark.parametrize("row", SAME)
def test_a_file_is_itself_by_inode_and_a_mount_may_change(row: str) -> None:
    old, new, same = SAME[row]
    assert disks.Compare(at_once=False).is_same_file(old, new, named=True) is same


def test_of_two_qemus_at_once_device_numbers_mean_the_same() -> None:
    compare = disks.Compare(at_once=True)
    assert not compare.is_same_file(file(), file(dev=65030, mnt=30), named=True)
    assert not compare.is_same_file({"rdev": 5}, {"rdev": 6}, named=False)


NAMES = {
    "/a/b.raw": ["/a/b.raw"],
    "b.raw": ["b.raw"],
    "file:b.raw": ["file:b.raw"],
    "nbd://host:10809/disk": [],
    "nbd:host:10809": [],
    "rbd:pool/image": [],
    "blkdebug:/a/conf:/a/b.raw": ["/a/b.raw"],
    'json:{"driver": "raw", "file": {"driver": "file", "filename": "/a/b.raw"}}': ["/a/b.raw"],
    'json:{"driver": "nbd", "server": {"host": "a"}}': [],
    "json:{": [],
}


@pytest.mark.parametrize("name", NAMES)
def test_the_files_in_a_name_of_qemus(name: str) -> None:
    assert list(disks.paths(name)) == NAMES[name]


def drive(name: str, image: str, **more: Any) -> dict[str, Any]:
    chain = [{"format": "raw", "name": image, "files": []}] if image else []
    usual = {"qdev": "", "drive": name, "node": "", "removable": False, "ro": False, "limits": {}}
    usual["groups"] = {}
    return {**usual, "chain": chain, **more}


def test_another_protocol_is_compared_by_its_uri() -> None:
    compare = disks.Compare(at_once=True)
    old = [drive("d", "nbd://a/x")]
    assert compare.differences(old, [drive("d", "nbd://a/x")]) == []
    (said,) = compare.differences(old, [drive("d", "nbd://a/y")])
    assert "nbd://a/x" in said
    assert "nbd://a/y" in said


RAW = 'json:{"driver": "raw", "file": {"driver": "file", "filename": "/b"}}'
PART = 'json:{"driver": "raw", "offset": 512, "file": {"driver": "file", "filename": "/b"}}'
LUKS = 'json:{"driver": "luks", "key-secret": "s", "file": {"driver": "file", "filename": "/b"}}'
OVER = 'json:{"driver": "qcow2", "backing": {"filename": "/a"}, "file": {"filename": "/b"}}'
BYTES = {
    "a node of the protocol alone": ("raw /b", "file /b", True),
    "the options in full": ("raw /b", f"raw {RAW}", True),
    "another part of the file": ("raw /b", f"raw {PART}", False),
    "another offset": (f"raw {PART}", f"raw {PART.replace('512', '1024')}", False),
    "another name of a secret": (f"luks {LUKS}", "luks " + LUKS.replace('"s"', '"t"'), True),
    "the backing file named as well": ("qcow2 /b", f"qcow2 {OVER}", True),
    "another format": ("raw /b", "qcow2 /b", False),
    "a format below": (f"raw {RAW}", "raw " + RAW.replace('"file", "f', '"luks", "f'), False),
}


@pytest.mark.parametrize("row", BYTES)
def test_the_same_file_may_be_spelled_otherwise_but_not_hold_other_bytes(row: str) -> None:
    old, new, same = BYTES[row]
    sides = []
    for text in (old, new):
        kind, _, name = text.partition(" ")
        files = [[file(ino=len(path))] if path == "/b" else [] for path in disks.paths(name)]
        sides.append([drive("d", "x", chain=[{"format": kind, "name": name, "files": files}])])
    assert (disks.Compare(at_once=True).differences(*sides) == []) == same


WORDS = (
    "-blockdev file,node-name=f1,filename=/1 -blockdev raw,node-name=n1,file=f1"
    " -blockdev file,node-name=f2,filename=/2 -blockdev raw,node-name=n2,file=f2,offset=512"
    " -blockdev qcow2,node-name=n3,file.filename=/3,backing=n1"
    " -device virtio-blk-pci,id=d1,drive=n1 -device virtio-blk-pci,id=d2,drive=n2"
    " -drive file=nbd+unix:///a?socket=/s,id=n4 -device virtio-blk-pci,id=d3,drive=n3"
    " -object throttle-group,id=g,x-iops-total=50"
    " -drive id=n5,file=/5,throttling.iops-total=9,throttling.group=t"
    " -drive id=n6,file=/6,throttling.group=t"
)
PART_2 = 'json:{"driver": "raw", "offset": 512, "file": {"filename": "/2"}}'
DRIFTED = {
    "as at the start": (drive("", "/1", qdev="/m/p/d1", node="n1"), ""),
    "swapped": (drive("", "/2", qdev="/m/p/d1", node="n1"), "change -blockdev node-name=n1"),
    "another node": (drive("", "/2", qdev="/m/p/d1", node="n2"), "change -blockdev node-name=n1"),
    "a part of the file": (drive("", PART_2, qdev="/m/p/d2", node="n2"), ""),
    "the whole file": (drive("", "/2", qdev="/m/p/d2", node="n2"), "another part"),
    "streamed": (drive("", "/3", qdev="/m/p/d3", node="n3"), "change -blockdev node-name=n3"),
    "on a server": (drive("n4", "nbd+unix:///a?socket=/s"), ""),
    "another export": (drive("n4", "nbd+unix:///b?socket=/s"), "change -drive id=n4"),
    "in its group": (drive("", "/1", node="n1", groups={"g": {"iops-total": 50}}), ""),
    "another limit": (drive("", "/1", node="n1", groups={"g": {"iops-total": 5}}), "id=g"),
    "limits shared": (drive("n6", "/6", limits={"iops": 9}), ""),
    "limits shared, and changed": (drive("n6", "/6", limits={"iops": 8}), "throttling.*"),
}


@pytest.mark.parametrize("row", DRIFTED)
def test_a_drive_that_is_no_more_what_its_words_make(row: str) -> None:
    seen, named = DRIFTED[row]
    command = Command(["kvm", *WORDS.split(" ")])
    machine = {"plugged": [], "objects": {"d1": "", "d2": "", "d3": ""}, "unnamed": []}
    said = drift.differences(Inventory("", [seen], machine), command)
    assert len(said) == bool(named), said
    assert all(named in line for line in said)


def test_drives_are_paired_by_device_then_by_id() -> None:
    compare = disks.Compare(at_once=True)
    old = [drive("d", "nbd://a/x", qdev="/m/p/one"), drive("e", "nbd://a/y", qdev="/m/a/device[3]")]
    new = [drive("e", "nbd://a/y", qdev="/m/a/device[2]"), drive("", "nbd://a/x", qdev="/m/p/one")]
    assert compare.differences(old, new) == []
    said = compare.differences(old, new[:1])
    assert ["missing" in line for line in said] == [True]
    said = compare.differences(new[:1], new)
    assert ["leave its" in line for line in said] == [True]


ALONE = {
    "tpm": "-chardev socket,id=t,path=/run/swtpm -tpmdev emulator,id=tpm0,chardev=t",
    "virtiofs": "-chardev socket,id=t,path=/run/fs -device vhost-user-fs-pci,chardev=t,tag=a",
    "network": "-chardev socket,id=t,path=/run/net -netdev vhost-user,id=n,chardev=t",
}


@pytest.mark.parametrize("row", ALONE)
def test_a_server_for_one_qemu_excludes_an_upgrade(row: str) -> None:
    upgrade, _ = about_command_line(["qemu-system-x86_64", *ALONE[row].split(" ")])
    assert ["serves a single QEMU" in line for line in upgrade] == [True]


def test_what_cprctl_added_is_not_held_against_a_qemu_that_runs() -> None:
    words = ["qemu-system-x86_64", "-m", "1G"]
    added = Command(words).incoming(monitor=5, main=6, cpr="/x")
    assert list(Command(added, running=True).refused()) == []
    assert [name for name, _ in Command([*words, "-S"], running=True).refused()] == ["S"]


@pytest.mark.parametrize("version", [[9, 2, 0], [11, 0, 0]])
def test_a_setting_of_all_devices_counts_in_another_version_too(version: list[int]) -> None:
    """Of two versions few properties are compared: then the words are all there is."""

    def seen(version: list[int], csum: str, said: dict[str, str]) -> machine.Machine:
        tree = f'bus: b\n  dev: virtio-net-pci, id "n"\n    csum = {csum}\n    addr = 02.0\n'
        maps = ("tables", "backends", "cpu", "cpu_set", "smp", "size", "words", "memdevs")
        kept = {"devices": devices.visible(devices.parse(tree), []), "set": said, "type": "q35"}
        kept |= {"version": version, "objects": {"n": "virtio-net-pci"}, "cpus": [], "memory": []}
        return {**kept, **{name: {} for name in maps}, "uuid": "", "generation": ""}

    old = seen([9, 2, 0], "false", {"-global virtio-net-pci.csum": "off"})
    assert machine.differences(old, seen(version, "false", {})) == []
    (said,) = machine.differences(old, seen(version, "true", {}))
    assert "csum is" in said

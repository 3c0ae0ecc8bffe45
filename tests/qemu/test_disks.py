"""When two files, and two drives, count as the same: the rules, without a QEMU."""

from __future__ import annotations

from typing import Any

import pytest

from cprd.qemu import disks
from cprd.qemu.command import Command
from cprd.qemu.examine import about_command_line

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
    return {**usual, "chain": chain, **more}


def test_another_protocol_is_compared_by_its_uri() -> None:
    compare = disks.Compare(at_once=True)
    old = [drive("d", "nbd://a/x")]
    assert compare.differences(old, [drive("d", "nbd://a/x")]) == []
    (said,) = compare.differences(old, [drive("d", "nbd://a/y")])
    assert "nbd://a/x" in said
    assert "nbd://a/y" in said


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

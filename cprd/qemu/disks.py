"""The drives of a machine: what QEMU says of each (query-block), and how two machines' drives
differ. Pure.

A drive is a map: `qdev` (the path of its device, "" for none), `drive` (the id of its -drive, ""
for a -blockdev), `node`, `removable`, `ro`, `limits` (throttling, by QEMU's names), `groups`
(limits of throttle groups, by name: inventory.py adds these), and `chain`: the images from the one
that takes the guest's writes down to the last backing file; empty for no medium. An image is
{"format", "name", "files": one list of file maps (files.py) a file name}.
"""

from __future__ import annotations

import json

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from cprd.qemu.files import File

    Drive = dict[str, Any]

_LIMITS: tuple[str, ...] = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr", "iops_size")
_LIMITS += tuple(f"{name}_max" for name in _LIMITS[:6])
NBD = ("nbd://", "nbd+unix://")
"""What the names of images on NBD servers begin with."""
_PLAIN = ("raw", "file", "host_device", "host_cdrom", "nbd")
"""Formats of images whose bytes are the guest's."""
_REMOTE = ("nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "virtiofs", "lustre", "afs", "glusterfs")
"""File systems whose times are another machine's."""
_UNSTABLE = ("cifs", "smb3", "9p", "fuse")
"""File systems that may give one file another inode number later."""


def read(rows: list[dict[str, Any]], find: Callable[[str], list[File]]) -> list[Drive]:
    """The drives of a query-block answer. `find`: the open files behind a file name."""
    drives = [_drive(row) for row in rows]
    images = [image for drive in drives for image in drive["chain"]]
    pending = []
    for image in images:
        image["files"] = [find(name) for name in image["paths"]]
        if any(len(found) != 1 for found in image["files"]):
            pending.append(image)
    for image in pending:  # (every name that explains a file has done so by now)
        image["files"] = [find(name) for name in image["paths"]]
    for image in images:
        del image["paths"]
    return drives


def _drive(row: dict[str, Any]) -> Drive:
    inserted = row.get("inserted") or {}
    return {
        "qdev": row.get("qdev", "").removesuffix("/virtio-backend"),
        "drive": row.get("device", ""),
        "node": inserted.get("node-name", ""),
        "removable": bool(row.get("removable")),
        "ro": bool(inserted.get("ro")),
        "limits": {name: inserted[name] for name in _LIMITS if inserted.get(name, 0)},
        "chain": [
            {"format": image.get("format", ""), "name": name, "paths": list(paths(name))}
            for image in _chain(inserted.get("image"))
            for name in _names(image)
        ],
    }


def _chain(image: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    while image:
        yield image
        image = image.get("backing-image")


def _names(image: dict[str, Any]) -> Iterator[str]:
    """The image's own name, and the name of a data file beside."""
    yield str(image.get("filename", ""))
    data = image.get("format-specific", {}).get("data")
    if isinstance(data, dict) and isinstance(data.get("data-file"), str):
        yield data["data-file"]


def paths(name: str) -> Iterator[str]:
    """The paths of files in one of QEMU's names for an image; none for another protocol."""
    if name.startswith("json:"):
        yield from (path for path, _ in _leaves(parsed(name)))
    elif name.startswith(("blkdebug:", "blkverify:")):
        yield name.split(":", 2)[-1]
    elif "://" not in name and (":" not in name or name.startswith(("/", "file:", "."))):
        yield name


def parsed(name: str) -> dict[str, Any]:
    """The options in an image's name that begins with "json:"; none for another name."""
    try:
        found = json.loads(name[5:]) if name.startswith("json:") else None
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def _leaves(value: Any, *, below: bool = False) -> Iterator[tuple[str, bool]]:
    """(file name, whether of a backing file) of each file in options."""
    if isinstance(value, dict):
        if isinstance(value.get("filename"), str):
            yield value["filename"], below
        for key, item in value.items():
            yield from _leaves(item, below=below or key == "backing")
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, below=below)


def groups(drive: Drive) -> list[str]:
    """The names of the throttle groups in the images of a drive."""
    found = (parsed(image["name"]).get("throttle-group") for image in drive["chain"])
    return [name for name in found if isinstance(name, str)]


def content(value: Any) -> Any:
    """What the options of an image tell of the guest's bytes, beside the names of files: an offset,
    a size, a format below. An image that is all of its file: an empty map. (The format on top and
    backing files are compared by themselves.)"""
    value = _unfiltered(value)
    if isinstance(value, list):
        return [content(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {}
    for key, item in value.items():
        if key in _NAMED or key.endswith("key-secret") or (key, item) in _DEFAULTS:
            continue
        below = _unfiltered(item)
        kept = content(below)
        if isinstance(below, dict) and below.get("driver") not in (None, *_PLAIN):
            kept["driver"] = below["driver"]
        if kept != {}:
            found[key] = kept
    return found


def _unfiltered(value: Any) -> Any:
    """The node below filters, through which the bytes go as they are."""
    while isinstance(value, dict) and value.get("driver") in _FILTERS:
        value = value.get(_FILTERS[value["driver"]])
    return value


_FILTERS = {"blkdebug": "image", "blkverify": "test"}
_FILTERS |= dict.fromkeys(("blklogwrites", "copy-on-read", "preallocate", "throttle"), "file")
_NAMED = ("driver", "filename", "backing", "throttle-group")
_DEFAULTS = (("offset", 0),)


# The comparison


class Compare:
    """How the drives of the next QEMU (`new`) differ from those of the QEMU before (`old`).

    `at_once`: both QEMUs have their images open at this moment, so that the device numbers of file
    systems mean the same; else the images were at rest since the old QEMU ended, and `same_boot`:
    whether the kernel is still the same."""

    def __init__(self, *, at_once: bool, same_boot: bool = True) -> None:
        self.at_once = at_once
        self.same_boot = same_boot

    def differences(self, old: list[Drive], new: list[Drive]) -> list[str]:
        """A message for each difference; both sides are named."""
        found: list[str] = []
        pairs, without, more = pair(old, new)
        for before, after in pairs:
            found += self._drive(before, after)
        found += [
            f"{label(drive)} ({shown(drive)}) is missing in COMMAND: add its -drive or -blockdev"
            for drive in without
            if drive["chain"]
        ]
        found += [
            f"{label(drive)} ({shown(drive)}) is in COMMAND, and was not in the old QEMU: leave its"
            " -drive or -blockdev out"
            for drive in more
            if drive["chain"]
        ]
        return found

    def _drive(self, old: Drive, new: Drive) -> Iterator[str]:
        change = f"change {option(new if new['drive'] else old)}"
        if not self._same_chain(old["chain"], new["chain"]):
            yield (
                f"{label(old)} is {shown(old)} in the old QEMU, {shown(new)} in COMMAND: {change}"
            )
            return
        if old["ro"] != new["ro"]:
            sides = ["read-only" if side["ro"] else "writable" for side in (old, new)]
            yield f"{label(old)} is {sides[0]} in the old QEMU, {sides[1]} in COMMAND: {change}"
        if old["limits"] != new["limits"]:
            sides = [limits(side) for side in (old, new)]
            yield (
                f"{label(old)} is throttled to {sides[0]} in the old QEMU, to {sides[1]} in"
                f" COMMAND: {change}"
            )
        grouped = [list(side.get("groups", {}).values()) for side in (old, new)]
        if "groups" in old and grouped[0] != grouped[1]:
            yield (
                f"{label(old)} is throttled in its groups to {grouped[0]} in the old QEMU, to"
                f" {grouped[1]} in COMMAND: change limits of -object throttle-group"
            )
        if not self.at_once:
            for before, after in zip(old["chain"], new["chain"], strict=True):
                yield from self._written(old, before, after)

    def _same_chain(self, old: list[Any], new: list[Any]) -> bool:
        return len(old) == len(new) and all(
            _bytes(before) == _bytes(after) and self._same_image(before, after)
            for before, after in zip(old, new, strict=True)
        )

    def _same_image(self, old: dict[str, Any], new: dict[str, Any]) -> bool:
        if not any(old["files"]) or not any(new["files"]):
            return bool(old["name"] == new["name"])
        named = old["name"] == new["name"]
        sides = _own_files(old), _own_files(new)
        return len(sides[0]) == len(sides[1]) and all(
            any(self.is_same_file(one, other, named=named) for one in ours for other in theirs)
            for ours, theirs in zip(*sides, strict=True)
        )

    def is_same_file(self, old: File, new: File, *, named: bool) -> bool:
        """`named`: both have the same name. A remount may give a file system another device number,
        so that a file with the same inode number, size and time counts as the same."""
        if "rdev" in old or "rdev" in new:
            return old.get("rdev") == new.get("rdev") or (named and "rdev" in old and "rdev" in new)
        if old["ino"] == new["ino"] and old["dev"] == new["dev"]:
            return True
        if self.at_once or _differ(old, new, "size"):
            return False
        if named and _is_of(old, _UNSTABLE):
            return True
        remounted = not self.same_boot or old.get("mnt") != new.get("mnt")
        same = old["ino"] == new["ino"] and (_is_remote(old) or not _differ(old, new, "mtime"))
        return bool(remounted and same)

    def _written(self, drive: Drive, old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
        """An image that changed while nobody ran."""
        for ours, theirs in zip(_own_files(old), _own_files(new), strict=True):
            if len(ours) != 1 or len(theirs) != 1 or "rdev" in ours[0]:
                continue
            before, after = ours[0], theirs[0]
            later = _differ(before, after, "mtime") and not _is_remote(after)
            if later or _differ(before, after, "size"):
                sides = [
                    f"{file['size']} bytes, mtime {file['mtime'] / 1e9:.3f}"
                    for file in (before, after)
                ]
                yield (
                    f"{label(drive)}: {old['name']} was written since the guest left its QEMU"
                    f" ({sides[0]} then, {sides[1]} now): the guest does not know of that. Restore"
                    " the image as it was, or drop the hold and boot"
                )


def _bytes(image: dict[str, Any]) -> tuple[str, Any]:
    """How the guest's bytes lie in the files of an image."""
    kind = "raw" if image["format"] in _PLAIN else image["format"]
    return kind, content(parsed(image["name"]))


def _own_files(image: dict[str, Any]) -> list[list[File]]:
    """The files of an image, without its backing files."""
    below = [is_below for _, is_below in _leaves(parsed(image["name"]))]
    return [found for at, found in enumerate(image["files"]) if not any(below[at : at + 1])]


def pair(
    old: list[Drive], new: list[Drive]
) -> tuple[list[tuple[Drive, Drive]], list[Drive], list[Drive]]:
    """(pairs, only in `old`, only in `new`): by the path of the device, then by the id of the
    -drive, then by the node's name."""
    pairs: list[tuple[Drive, Drive]] = []
    left, right = list(old), list(new)
    for key in ("qdev", "drive", "node"):
        by_key = {drive[key]: drive for drive in right if drive[key]}
        for drive in list(left):
            other = by_key.pop(drive[key], None) if drive[key] else None
            if other is not None:
                pairs.append((drive, other))
                left.remove(drive)
                right.remove(other)
    return pairs, left, right


def label(drive: Drive) -> str:
    """The drive, for people."""
    name = drive["drive"]
    if not name and drive["node"] and not drive["node"].startswith("#"):
        name = drive["node"]
    return f"disk {name or drive['qdev']!r}"


def option(drive: Drive) -> str:
    """The option of COMMAND that makes the drive."""
    if drive["drive"]:
        return f"-drive id={drive['drive']}"
    return f"-blockdev node-name={drive['node']}" if drive["node"] else "its -drive"


def words(drive: Drive) -> str:
    """The option that makes a drive of one image, as far as the name of that tells."""
    image = drive["chain"][0]
    kind, name = image["format"], image["name"]
    if drive["drive"] or "://" in name:
        file = name.replace(",", ",,")
        return f"-drive if=none,id={drive['drive'] or drive['node']},format={kind},file={file}"
    block = any("rdev" in file for found in image["files"] for file in found)
    driver = "host_device" if block else "file"
    file = {"driver": driver, "filename": name}
    node = parsed(name) or (file if kind == driver else {"driver": kind, "file": file})
    node = {"node-name": drive["node"], **node, **({"read-only": True} if drive["ro"] else {})}
    return f"-blockdev {json.dumps(node, separators=(',', ':'))}"


def shown(drive: Drive) -> str:
    """The images, for people."""
    if not drive["chain"]:
        return "without a medium"
    return " on ".join(f"{image['name']} ({image['format']})" for image in drive["chain"])


def limits(drive: Drive) -> str:
    """The throttling, for people."""
    found = ", ".join(f"{name}={value}" for name, value in drive["limits"].items())
    return found or "nothing"


def without_times(drives: list[Drive]) -> list[Drive]:
    """The drives of a guest that still ran: the guest may have written since."""
    return [
        {**drive, "chain": [_without_times(image) for image in drive["chain"]]} for drive in drives
    ]


def _without_times(image: dict[str, Any]) -> dict[str, Any]:
    timed = ("size", "mtime")
    files = [
        [{key: value for key, value in file.items() if key not in timed} for file in found]
        for found in image["files"]
    ]
    return {**image, "files": files}


def _differ(old: File, new: File, key: str) -> bool:
    """Whether both say something, and not the same."""
    return key in old and key in new and bool(old[key] != new[key])


def _is_of(file: File, kinds: tuple[str, ...]) -> bool:
    kind = str(file.get("fs", ""))
    return kind in kinds or ("fuse" in kinds and kind.startswith("fuse"))


def _is_remote(file: File) -> bool:
    return _is_of(file, (*_REMOTE, "fuse"))

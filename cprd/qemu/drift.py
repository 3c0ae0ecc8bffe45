"""How a running QEMU has drifted from its command line: what the next QEMU, started by the same
words, would lack or have otherwise. Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cprd.qemu.command import keyed
from cprd.qemu.disks import NBD, label, limits, option, paths, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cprd.qemu.command import Command
    from cprd.qemu.disks import Drive
    from cprd.qemu.inventory import Inventory

_LIMIT = {"bps": "bps-total", "iops": "iops-total", "bps_max": "bps-total-max"}
_LIMIT |= {"iops_max": "iops-total-max"}
_TAKES_DISK = ("hda", "hdb", "hdc", "hdd", "cdrom", "fda", "fdb", "sd", "pflash", "mtdblock")


def differences(seen: Inventory, command: Command) -> list[str]:
    """A message for each difference."""
    found = [
        f"{option.split(' ')[1]} was plugged since the start: COMMAND needs {option}"
        for _, option in seen.machine["plugged"]
    ]
    found += _unplugged(seen.machine["objects"], command)
    for drive in seen.drives:
        found += _disk(drive, command)
    if any(keyed(value).get("guid") == "auto" for value in _devices(command, "vmgenid")):
        found.append(
            "the next QEMU would give vmgenid another id (guid=auto), as if the guest were a copy:"
            f" COMMAND needs -device vmgenid,guid={seen.machine['generation']}"
        )
    return found


def moved(drives: list[Drive], has: Callable[[str], bool]) -> list[str]:
    """A message for each image that lies elsewhere than where its QEMU has opened it: when the
    guest stops, QEMU opens its images anew, by their names."""
    return [
        f"{label(drive)}: {path} is not the file any more that this QEMU has open there (renamed,"
        " replaced or removed), and QEMU opens its images anew when its guest stops: move the file"
        " back first, or let a blockdev-mirror move the guest"
        for drive in drives
        for image in drive["chain"]
        for path in paths(image["name"])
        if any(image["files"]) and not path.startswith("/dev/fdset/") and not has(path)
    ]


def _devices(command: Command, kind: str) -> Iterator[str]:
    return (value for value in command.values("device") if keyed(value)[""] == kind)


def _unplugged(objects: dict[str, str], command: Command) -> Iterator[str]:
    """Devices with an id that are no more."""
    for value in command.values("device"):
        name = keyed(value).get("id", "")
        if name and name not in objects:
            yield f"device {name!r} was unplugged since the start: COMMAND must not have it"


def _disk(drive: Drive, command: Command) -> Iterator[str]:
    if not drive["chain"]:
        said = _words(drive, command)
        if said is not None and _file(said):
            yield (
                f"{label(drive)} has no medium any more, and {_file(said)} in COMMAND: change"
                f" {option(drive)}"
            )
        return
    name = drive["chain"][0]["name"]
    if not _names(drive, command, name):
        yield (
            f"{label(drive)} is {shown(drive)} since the start (a snapshot, a mirror, another"
            f" medium): COMMAND names another image, change {option(drive)}"
        )
    yield from _throttled(drive, command)


def _names(drive: Drive, command: Command, name: str) -> bool:
    """Whether the words that make a drive name its image. For a drive whose words are not found by
    an id: whether any words do."""
    said = _words(drive, command)
    if name.startswith(NBD):  # that has many spellings
        server = _server(name)
        return any(server in word for word in (said.values() if said else command.words))
    if said is not None and _file(said):
        return _file(said) == name or bool(set(paths(name)) & set(said.values()))
    wanted = {name, *paths(name)}
    if name.startswith("json:") and not set(paths(name)):
        return True  # no file, and QEMU's own spelling
    for option_name, value in command.options:
        if value is None:
            continue
        if option_name in _TAKES_DISK and value in wanted:
            return True
        if option_name in ("drive", "blockdev", "snapshot") and wanted & set(keyed(value).values()):
            return True
    return any(word in wanted for word in command.words)


def _server(name: str) -> str:
    """The part of an NBD image's name that each spelling has: the path of a socket, or the host."""
    where, unix, path = name.partition("?socket=")
    return path if unix else where.partition("://")[2].partition("/")[0].rpartition(":")[0]


def _words(drive: Drive, command: Command) -> dict[str, str] | None:
    """The options of the -drive or -blockdev that makes a drive, found by its id."""
    for name in ("drive", "blockdev"):
        for value in command.values(name):
            options = keyed(value)
            key = options.get("id") if name == "drive" else options.get("node-name")
            if key and key == drive["drive" if name == "drive" else "node"]:
                return options
    return None


def _file(options: dict[str, str]) -> str:
    """The file in the options of a drive; an empty string for none, or for a reference."""
    found = (options.get(f"{'file.' * depth}filename") for depth in range(4))
    named = next((name for name in found if name), "")
    return named or ("" if options.get("driver") else options.get("file", ""))


def _throttled(drive: Drive, command: Command) -> Iterator[str]:
    """Limits that were changed since the start."""
    said = _words(drive, command)
    if said is None or "throttling.group" in said:
        return
    wanted: dict[str, Any] = {}
    for name in ("bps", "iops"):
        for part in ("", "_rd", "_wr", "_max", "_rd_max", "_wr_max"):
            key = f"{name}{part}"
            spelled = _LIMIT.get(key, key.replace("_rd", "-read").replace("_wr", "-write"))
            value = said.get(f"throttling.{spelled.replace('_', '-')}") or said.get(key)
            if value and value != "0":
                wanted[key] = value
    # Values may have units (10M), and a limit may imply its _max: names and plain numbers count.
    now = drive["limits"]
    changed = [key for key in wanted if wanted[key].isdigit() and int(wanted[key]) != now.get(key)]
    changed += [key for key in now if key not in wanted and not key.endswith(("_max", "_size"))]
    if changed or (wanted and not now):
        yield (
            f"{label(drive)} is throttled to {limits(drive)} since the start: COMMAND says"
            f" otherwise, change throttling.* of {option(drive)}"
        )

"""How a running QEMU has drifted from its command line: what the next QEMU, started by the same
words, would lack or have otherwise. Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cprd.qemu.command import dotted, keyed
from cprd.qemu.disks import NBD, label, limits, option, parsed, paths, shown
from cprd.qemu.machine import plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cprd.qemu.command import Command
    from cprd.qemu.disks import Drive
    from cprd.qemu.inventory import Inventory
    from cprd.qemu.machine import Machine

_LIMIT = {"bps": "bps-total", "iops": "iops-total", "bps_max": "bps-total-max"}
_LIMIT |= {"iops_max": "iops-total-max"}
_TAKES_DISK = ("hda", "hdb", "hdc", "hdd", "cdrom", "fda", "fdb", "sd", "pflash", "mtdblock")


def differences(seen: Inventory, command: Command) -> list[str]:
    """A message for each difference."""
    found = [
        f"{option.split(' ')[1]} was plugged since the start: COMMAND needs {option}"
        for _, option in seen.machine["plugged"]
    ]
    found += _unplugged(seen.machine, command)
    late = {name for name, _ in seen.machine["plugged"]}
    words = _Words(command)
    for drive in seen.drives:
        if (drive["drive"] or drive["node"]) not in late:
            found += _disk(drive, words, command)
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


def _unplugged(seen: Machine, command: Command) -> Iterator[str]:
    """Devices that are no more."""
    names = [keyed(value).get("id", "") for value in command.values("device")]
    for name in names:
        if name and name not in seen["objects"]:
            yield f"device {name!r} was unplugged since the start: COMMAND must not have it"
    late = sum(1 for name, _ in seen["plugged"] if not name)
    if len(seen["unnamed"]) - late < names.count(""):
        yield (
            "a device without an id was unplugged since the start: COMMAND must not have it (an id"
            " for each would tell which)"
        )


def _disk(drive: Drive, all_words: _Words, command: Command) -> Iterator[str]:
    words, said = all_words.of(drive)
    change = f"change {words or option(drive)}"
    file = said and _file(said)
    if not drive["chain"]:
        if file:
            yield f"{label(drive)} has no medium any more, and {file} in COMMAND: {change}"
        return
    name = drive["chain"][0]["name"]
    if not _names(said, command, name) or not _names_backing(said, drive):
        yield (
            f"{label(drive)} is {shown(drive)} since the start (a snapshot, a mirror, another"
            f" medium): COMMAND names another image, {change}"
        )
    elif file and _window(said) != _window(dotted("", parsed(name))):
        yield (
            f"{label(drive)} is {shown(drive)} since the start (blockdev-reopen): COMMAND names"
            f" another part of that file, {change}"
        )
    yield from _throttled(drive, said, command, words or option(drive))


class _Words:
    """The -drive and -blockdev options of a command, by id and by node name."""

    def __init__(self, command: Command) -> None:
        self._devices = {keyed(value).get("id", ""): value for value in command.values("device")}
        found = [keyed(value) for value in command.values("drive")]
        self._drives = {options["id"]: options for options in found if "id" in options}
        found = [keyed(value) for value in command.values("blockdev")]
        self._nodes = {it["node-name"]: it for it in found if "node-name" in it}

    def of(self, drive: Drive) -> tuple[str, dict[str, str]]:
        """The option, for people, and what that says, of the drive of a device; by the words of the
        device first: another node may have come to the device since. Empty for none."""
        device = keyed(self._devices.get(drive["qdev"].rpartition("/")[2] or "?", "")).get("drive")
        for name in (device, drive["drive"], drive["node"]):
            if name and name in self._drives:
                return f"-drive id={name}", self._whole(self._drives[name])
            if name and name in self._nodes:
                return f"-blockdev node-name={name}", self._whole(self._nodes[name])
        return "", {}

    def _whole(self, options: dict[str, str], depth: int = 8) -> dict[str, str]:
        """With the options of the nodes that these name."""
        whole = dict(options)
        for key, value in options.items():
            if key.rpartition(".")[2] in ("file", "backing") and value in self._nodes and depth:
                below = self._whole(self._nodes[value], depth - 1)
                whole |= {f"{key}.{name}": said for name, said in below.items() if name}
            if value.startswith("json:"):
                whole |= dict(dotted(key, parsed(whole.pop(key))))
        return whole


def _names(said: dict[str, str], command: Command, name: str) -> bool:
    """Whether the words that make a drive name its image. For a drive whose words are not found:
    whether any words do."""
    if name.startswith(NBD):  # that has many spellings
        server, export = _server(name)
        words = list(said.values() if said else command.words)
        spelled = [f"{sign}{export}" for sign in '/="']
        return any(server in word for word in words) and any(
            export in ("", word) or any(it in word for it in spelled) for word in words
        )
    if _file(said):
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


def _names_backing(said: dict[str, str], drive: Drive) -> bool:
    """Whether a backing file that the words name is there."""
    below = {key[8:]: value for key, value in said.items() if key.startswith("backing.")}
    return not _file(below) or any(
        _file(below) in (image["name"], *paths(image["name"])) for image in drive["chain"][1:]
    )


def _window(options: Any) -> list[tuple[str, Any]]:
    """The part of a file that the options of an image name."""
    found = {
        key.rpartition(".")[2]: said
        for key, said in dict(options).items()
        if not key.startswith("backing.")
    }
    return [(key, plain(found.get(key, "0"))) for key in ("offset", "size")]


def _server(name: str) -> tuple[str, str]:
    """The part of an NBD image's name that each spelling has: the path of a socket, or the host;
    and the export."""
    where, unix, path = name.partition("?socket=")
    host, _, export = where.partition("://")[2].partition("/")
    return (path if unix else host.rpartition(":")[0]), export


def _file(options: dict[str, str]) -> str:
    """The file in the options of a drive; an empty string for none, or for a reference."""
    found = (options.get(f"{'file.' * depth}filename") for depth in range(4))
    named = next((name for name in found if name), "")
    return named or ("" if options.get("driver") else options.get("file", ""))


def _throttled(drive: Drive, said: dict[str, str], command: Command, words: str) -> Iterator[str]:
    """Limits that were changed since the start."""
    sharing = [keyed(value) for value in command.values("drive")]
    group = said.get("throttling.group")
    shared = [it for it in sharing if group and it.get("throttling.group") == group]
    spoken = [it for it in shared if len([key for key in it if key.startswith("throttling.")]) > 1]
    if said and _changed((spoken or [said])[-1], drive["limits"]):
        yield (
            f"{label(drive)} is throttled to {limits(drive)} since the start: COMMAND says"
            f" otherwise, change throttling.* of {words}"
        )
    objects = {it.get("id", ""): it for it in map(keyed, command.values("object"))}
    for name, now in drive["groups"].items():
        named = {
            f"throttling.{key.removeprefix('limits.').removeprefix('x-')}": value
            for key, value in objects.get(name, {}).items()
        }
        if _changed(named, {_SPELLED.get(key, key): value for key, value in now.items()}):
            yield (
                f"throttle group {name!r} has {now} since the start: COMMAND says otherwise, change"
                f" limits of -object throttle-group,id={name}"
            )


_KEYS = [
    f"{name}{part}"
    for name in ("bps", "iops")
    for part in ("", "_rd", "_wr", "_max", "_rd_max", "_wr_max")
]


def _spelled(key: str) -> str:
    """A limit's name in options."""
    said = _LIMIT.get(key, key.replace("_rd", "-read").replace("_wr", "-write"))
    return said.replace("_", "-")


_SPELLED = {_spelled(key): key for key in _KEYS}


def _changed(said: dict[str, str], now: dict[str, Any]) -> bool:
    found = {key: said.get(f"throttling.{_spelled(key)}") or said.get(key) for key in _KEYS}
    wanted = {key: value for key, value in found.items() if value and value != "0"}
    # Values may have units (10M), and a limit may imply its _max: names and plain numbers count.
    changed = [key for key in wanted if wanted[key].isdigit() and int(wanted[key]) != now.get(key)]
    changed += [
        key for key in now if key not in wanted and not key.endswith(("_max", "size", "-length"))
    ]
    return bool(changed or (wanted and not now))

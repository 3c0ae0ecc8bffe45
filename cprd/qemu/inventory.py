"""What a QEMU has: its drives with the files that lie behind, and the machine that its guest sees.
Asks the monitor and /proc; changes nothing.

The same questions go to the QEMU that is saved and to the QEMU that waits for its state, and the
answers are compared (disks.py, machine.py).
"""

from __future__ import annotations

import re

from cprd.qemu import devices, disks, machine
from cprd.qemu.command import Command, keyed
from cprd.qemu.errors import Refused
from cprd.qemu.files import OpenFiles, boot_id
from cprd.qemu.process import command_line

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from cprd.qemu.disks import Drive
    from cprd.qemu.machine import Machine
    from cprd.qemu.monitor import Monitor
    from cprd.qemu.start import Overrides

MONITORS = ("monitor-qmp", "monitor-hmp")
"""Objects that a guest does not see (from QEMU 11.1 on; each monitor is such an object)."""

_CPU = ("type", "feature-words")
_QTREE = ("human-monitor-command", {"command-line": "info qtree"})
_PERIPHERAL = ("/machine/peripheral", "/machine/peripheral-anon")


_FIRST_CPU = "/machine/unattached/device[0]"  # as a rule


def _questions_about_cpu(path: str) -> list[tuple[str, dict[str, Any]]]:
    return [("qom-get", {"path": path, "property": name}) for name in _CPU]


QUESTIONS: list[tuple[str, dict[str, Any]]] = [
    ("query-block", {}),
    _QTREE,
    ("query-cpus-fast", {}),
    ("query-uuid", {}),
    ("query-vm-generation-id", {}),
    ("query-memory-devices", {}),
    ("query-memdev", {}),
    *(("qom-get", {"path": "/machine", "property": name}) for name in ("type", "smp", "memory")),
    *(("qom-list", {"path": path}) for path in _PERIPHERAL),
    *_questions_about_cpu(_FIRST_CPU),
]
"""All that an inventory asks of a monitor, but for another first CPU and what was plugged."""


DISKS = QUESTIONS[:1]
"""All that an inventory asks when the same words, in the same build of QEMU, make the same machine
(`made_by`)."""


class Inventory:
    """What a QEMU has, at one moment. `boot`: the id of the kernel's boot."""

    __slots__ = ("boot", "drives", "machine")

    def __init__(self, boot: str, drives: list[Drive], machine: Machine) -> None:
        self.boot = boot
        self.drives = drives
        self.machine = machine


def take(monitor: Monitor, pid: int, words: list[str] | None = None, *, plugged: bool) -> Inventory:
    """Look at the QEMU `pid`. `words`: of its command line, if known; `plugged`: whether to look
    for what was plugged since its start (a question a device). Raises MonitorLost."""
    if words is None:
        words = command_line(pid)
    return read(monitor, pid, words, monitor.send_all(QUESTIONS), plugged=plugged)


def read(
    monitor: Monitor, pid: int, words: list[str], requests: list[int], *, plugged: bool = False
) -> Inventory:
    """`take`, for QUESTIONS that were sent already. Raises MonitorLost."""
    answers = monitor.answers(requests)
    blocks, qtree, cpus, uuid, generation, memory, memdevs, kind, smp, size, *rest = answers
    named, unnamed, *cpu = rest
    tree = devices.parse(qtree or "")
    command = Command(words, running=True)
    ids, last = command.ids(), _words(command)
    first = (cpus or [{}])[0].get("qom-path", "")
    if first != _FIRST_CPU:
        cpu = monitor.ask(*_questions_about_cpu(first))
    seen = {
        "version": list(monitor.version),
        "devices": devices.visible(tree, _children(unnamed).values()),
        "set": _set(command),
        "package": monitor.package,
        "type": str(kind or "").removesuffix("-machine"),
        "objects": _children(named),
        "unnamed": sorted(_children(unnamed)),
        "named": {name: kind for name, kind in _children(named).items() if name in ids},
        "backends": {row["id"]: row["size"] for row in memdevs or () if "id" in row},
        "cpus": sorted(_place(row) for row in cpus or ()),
        "cpu": _cpu(cpu),
        "cpu_set": _set_by_words(last.get("cpu", "")),
        "tables": _tables(command),
        "smp": {name: value for name, value in (smp or {}).items() if name != "cpus"},
        "size": size or {},
        "words": last,
        "uuid": (uuid or {}).get("UUID", ""),
        "generation": (generation or {}).get("guid", ""),
        "memory": sorted(_plugged_memory(row) for row in memory or ()),
        "memdevs": {row["data"].get("id", ""): row["data"].get("memdev") for row in memory or ()},
        "plugged": [],
    }
    drives = _drives(monitor, OpenFiles(pid), blocks)
    if plugged:
        seen["plugged"] = _Plugged(monitor, tree, command, drives).find(named, unnamed)
        seen["values"] = _values(monitor, _plain(monitor), _NO_FEATURES)
    return Inventory(boot_id(), drives, seen)


def read_drives(monitor: Monitor, files: OpenFiles, requests: list[int]) -> Inventory:
    """The drives alone, for DISKS that were sent already. Raises MonitorLost."""
    (blocks,) = monitor.answers(requests)
    return Inventory(boot_id(), _drives(monitor, files, blocks), {})


def drives(monitor: Monitor, pid: int) -> list[Drive]:
    """Only the drives. Raises MonitorLost, MonitorRefused."""
    return _drives(monitor, OpenFiles(pid), monitor.execute("query-block"))


def _drives(monitor: Monitor, files: OpenFiles, blocks: Any) -> list[Drive]:
    found = disks.read(blocks or [], files.find)
    for drive in found:
        drive["groups"] = {}
        for name in disks.groups(drive):
            said = monitor.ask(("qom-get", {"path": f"/objects/{name}", "property": "limits"}))[0]
            drive["groups"][name] = {
                key: value
                for key, value in (said or {}).items()
                if value > key.endswith("-length")  # (1 s unless set)
            }
    return found


def refuse_another(
    old: Inventory, new: Inventory, overrides: Overrides, monitor: Monitor, *, at_once: bool
) -> None:
    """Raises Refused with every difference between the QEMU before and the next (`monitor`) that no
    override allows, MonitorLost. `at_once`: both look at their images at this moment."""
    found = []
    if not overrides.images:
        compare = disks.Compare(at_once=at_once, same_boot=old.boot == new.boot)
        found += compare.differences(old.drives, new.drives)
    images = len(found)
    if not overrides.machine and old.machine and new.machine:
        if "values" in old.machine:
            new.machine["values"] = _values(monitor, *machine.in_doubt(old.machine, new.machine))
        found += machine.differences(old.machine, new.machine)
    if found:
        options = ["--other-images"] * (images > 0) + ["--force-machine"] * (len(found) > images)
        raise Refused(
            f"COMMAND makes another machine than the guest's: {'; '.join(found)}"
            f" ({' and '.join(options)} would start the guest there all the same)"
        )


def made_by(seen: Machine, drift: list[str], words: list[str]) -> list[str]:
    """The words that alone make a machine as it was seen, in the same build of QEMU and the same
    boot of the host; none for a machine that has drifted from its words, and where more than words
    counts."""
    command = Command(words, running=True)
    numbers = [f"device[{at}]" for at in range(len(seen["unnamed"]))]
    gaps = seen["unnamed"] != sorted(numbers)  # some were unplugged, or never came to be
    if drift or gaps or seen["plugged"] or any(command.values("readconfig")):
        return []
    return [] if any("guid=auto" in word for word in command.words) else command.own()


def is_made(old: Inventory, words: list[str], monitor: Monitor) -> bool:
    """Whether these words make the machine of `old` in a QEMU that has greeted."""
    build = (list(monitor.version), monitor.package, boot_id())
    noted = (old.machine.get("version"), old.machine.get("package"), old.boot)
    return bool(words) and old.machine.get("command") == words and build == noted


def _cpu(answers: list[Any]) -> dict[str, Any]:
    """The model and the features of a CPU. (QEMU for another architecture does not tell
    features.)"""
    found: dict[str, Any] = {}
    for name, value in zip(_CPU, answers, strict=True):
        if value is None:
            continue
        if name != "feature-words":
            found[name] = value
            continue
        for row in value:
            leaf = f"CPUID {row['cpuid-input-eax']:#x}"
            if "cpuid-input-ecx" in row:
                leaf += f".{row['cpuid-input-ecx']}"
            found[f"{leaf} {row['cpuid-register']}"] = f"{row['features'] & 0xFFFFFFFF:#x}"
    return found


_NO_FEATURES: tuple[str, ...] = (
    "family",
    "model",
    "stepping",
    "vendor",
    "model-id",
    "phys-bits",
    "level",
)
_NO_FEATURES += ("xlevel", "xlevel2", "host-phys-bits", "tsc-frequency", "kvm", "ucode-rev")
_NO_FEATURES += ("l3-cache", "legacy-cache", "fill-mtrr-mask", "vmware-cpuid-freq")


def _set_by_words(cpu: str) -> dict[str, Any]:
    """What -cpu sets beside features. (To ask QEMU for each takes a millisecond or two in all, and
    the guest waits.)"""
    named: dict[str, Any] = {}
    for key, value in keyed(cpu).items():
        sign, name = (key[0], key[1:]) if key[:1] in ("+", "-") else ("", key)
        named[name.replace("_", "-")] = {"+": "on", "-": "off"}.get(sign, value)
    return {
        key: value
        for key, value in named.items()
        if key in _NO_FEATURES or key.startswith(("hv-", "min-", "x-")) or "cache" in key
    }


def _place(row: dict[str, Any]) -> list[list[Any]]:
    return sorted([key, value] for key, value in row.get("props", {}).items() if key != "type")


def _plugged_memory(row: dict[str, Any]) -> str:
    data = row["data"]
    keys = ("id", "addr", "size", "max-size", "slot", "node", "memaddr")
    return ",".join([row["type"], *(f"{key}={data[key]}" for key in keys if key in data)])


def _children(rows: list[dict[str, str]] | None) -> dict[str, str]:
    """Name -> type, of the children of an object."""
    return {
        row["name"]: row["type"][6:-1] for row in rows or () if row["type"].startswith("child<")
    }


def _plain(monitor: Monitor) -> list[str]:
    """The names of the machine's properties that are plain values."""
    rows = monitor.ask(("qom-list", {"path": "/machine"}))[0] or ()
    kinds = ("bool", "string", "str", "size", "OnOffAuto", "OnOffSplit")
    return [row["name"] for row in rows if row["type"] in kinds or "int" in row["type"]]


def _values(
    monitor: Monitor, names: Iterable[str], of_cpu: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """The properties of these names, of the machine and of the first CPU, as QEMU has them."""
    first = (monitor.ask(("query-cpus-fast", {}))[0] or [{}])[0].get("qom-path", _FIRST_CPU)
    asked = [("/machine", name) for name in names] + [(first, name) for name in of_cpu]
    rows = [("qom-get", {"path": path, "property": name}) for path, name in asked]
    found: dict[str, dict[str, Any]] = {"machine": {}, "cpu": {}}
    for (path, name), value in zip(asked, monitor.ask(*rows) if rows else (), strict=True):
        if value is not None:
            found["machine" if path == "/machine" else "cpu"][name] = value
    return found


def _set(command: Command) -> dict[str, str]:
    """What -machine and -global set, by name."""
    found = {}
    for value in command.values("machine", "M", "global"):
        options = keyed(value)
        if "driver" in options:
            found[f"-global {options['driver']}.{options.get('property')}"] = options["value"]
            continue
        for name, said in options.items():
            key = name if "." in name else name.replace("_", "-")
            if key in machine.HOST or key.startswith("migration."):
                continue
            found[f"-global {key}" if "." in key else f"-machine {key}"] = said
    return found


def _tables(command: Command) -> dict[str, str]:
    """What the firmware tells the guest, by name, and what QEMU's own stream does not fit
    without: -smbios, -fw_cfg, -acpitable, -icount."""
    found: dict[str, str] = {}
    for option, value in command.options:
        if value is None or option not in ("smbios", "fw_cfg", "acpitable", "icount"):
            continue
        options = keyed(value)
        first = options.pop("", "")
        what = f"type={options.pop('type')}" if "type" in options else options.pop("name", first)
        name = f"-{option} {what}".strip()
        said = ",".join(f"{key}={options[key]}" for key in sorted(options) if key)
        found[name] = "; ".join(filter(None, (found.get(name), said)))
    return found


def _words(command: Command) -> dict[str, str]:
    """The value that counts of -cpu and -smp."""
    found = ((name, value) for name, value in command.options if name in ("cpu", "smp"))
    return {name: value for name, value in found if value is not None}


_NETWORK = re.compile(r"^(?: \\ )?([^\s:]+): index=\d+,type=([\w-]+)", re.MULTILINE)
"""A line of `info network`."""


class _Plugged:
    """Finds what was plugged into a QEMU since its start."""

    def __init__(
        self, monitor: Monitor, tree: devices.Devices, command: Command, drives: list[Drive]
    ) -> None:
        self.monitor = monitor
        self.tree = tree
        self.command = command
        self.drives = drives
        self._ids = command.ids()
        self._used: set[str] = set()  # the ids of all that plugged devices name

    def find(self, named: Any, unnamed: Any) -> list[list[str]]:
        """(id, option) of each plugged device, and of what makes up that: objects, images, networks
        and character devices; the id is "" for a device without."""
        rows = [(_PERIPHERAL[0], name, kind) for name, kind in _children(named).items()]
        rows += [(_PERIPHERAL[1], name, kind) for name, kind in _children(unnamed).items()]
        flags = self.monitor.ask(
            *(
                ("qom-get", {"path": f"{path}/{name}", "property": "hotplugged"})
                for path, name, _ in rows
            )
        )
        late = [row for row, flag in zip(rows, flags, strict=True) if flag]
        found = []
        for path, name, kind in late:
            key = name if path == _PERIPHERAL[0] else ""
            found.append([key, devices.words(kind, key, self._described(f"{path}/{name}", kind))])
        if not self.command.words or any(True for _ in self.command.values("readconfig")):
            return found
        before = [*self._objects(), *self._networks(), *self._characters(), *self._images()]
        return before + found

    def _described(self, where: str, kind: str) -> dict[str, Any]:
        """The properties for the words of a device: those that are not as usual."""
        name = where.rpartition("/")[2]
        rows = self.monitor.ask(("device-list-properties", {"typename": kind}))[0] or ()
        links = [row["name"] for row in rows if row["type"].startswith("link<")]
        values = self.monitor.ask(
            *(("qom-get", {"path": where, "property": link}) for link in links)
        )
        found = {
            link: value[9:]
            for link, value in zip(links, values, strict=True)
            if str(value).startswith("/objects/")
        }
        if name in self.tree:
            inner = (self.tree[key] for key in self.tree if key.startswith(f"{name}/virtio-bus/"))
            usual = {row["name"]: row.get("default-value") for row in rows}
            found |= devices.unusual({**next(inner, {}), **self.tree[name]}, usual)
        else:
            for row in self.monitor.ask(("query-hotpluggable-cpus", {}))[0] or ():
                if row.get("qom-path") == where:
                    found |= {f"{key}": value for key, value in row["props"].items()}
        for drive in self.drives:  # (a USB disk has given the drive to the SCSI disk in it)
            if f"{drive['qdev']}/".startswith(f"{where}/"):
                found["drive"] = drive["drive"] or drive["node"]
        self._used |= set(map(str, found.values()))
        return found

    def _objects(self) -> Iterator[list[str]]:
        """Objects that the command line does not name, and that a guest needs: memory, and what a
        plugged device names."""
        rows = self.monitor.ask(("qom-list", {"path": "/objects"}))[0]
        implicit = self.monitor.ask(("query-machines", {}))[0] or ()
        known = self._ids | {row.get("default-ram-id") for row in implicit}
        for name, kind in _children(rows).items():
            if name in known:
                continue
            where = {"path": f"/objects/{name}", "property": "size"}
            if kind.startswith("memory-backend-"):
                size = self.monitor.ask(("qom-get", where))[0]
                yield [name, f"-object {kind},id={name},size={size},share=on"]
            elif name in self._used:
                yield [name, f"-object {kind},id={name}"]

    def _networks(self) -> Iterator[list[str]]:
        """Networks of plugged devices, and any of kind "user", whose state is in the stream."""
        question = ("human-monitor-command", {"command-line": "info network"})
        by_kind = any(True for _ in self.command.values("nic", "net"))  # these make names
        for name, kind in _NETWORK.findall(self.monitor.ask(question)[0] or ""):
            if name in self._ids or name[:1] == "#" or (by_kind and name.startswith(f"{kind}.")):
                continue
            if kind == "user" or (name in self._used and kind not in ("nic", "hubport")):
                yield [name, f"-netdev {kind},id={name}"]

    def _characters(self) -> Iterator[list[str]]:
        for row in self.monitor.ask(("query-chardev", {}))[0] or ():
            name = row["label"]
            if name not in self._ids and name in self._used:
                kind, _, where = row["filename"].removeprefix("disconnected:").partition(":")
                if kind == "unix":
                    where = where.partition(",server")
                    kind = f"socket,path={where[0]}" + (",server=on,wait=off" if where[1] else "")
                yield [name, f"-chardev {kind},id={name}"]

    def _images(self) -> Iterator[list[str]]:
        for drive in self.drives:
            name = drive["drive"] or drive["node"]
            if name not in self._ids and name in self._used and drive["chain"]:
                yield [name, disks.words(drive)]

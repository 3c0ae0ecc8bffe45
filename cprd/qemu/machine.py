"""The machine that a guest sees, but for its disks: how two of them differ. Pure.

A machine is a map (inventory.py makes it): `version` of QEMU, `type` of the machine, `devices`
(devices.py), `objects` (devices with an id, by name: their types), `unnamed` (the devices without,
as QEMU numbers these), `named` (the objects whose id is in the command line), `backends` (of
memory, by name: their bytes), `cpus` (the place of each CPU), `cpu` (the model and the features of
the first CPU), `cpu_set` (what -cpu sets beside), `set` (by -machine and -global), `tables` (the
words of -smbios and the like), `smp` and `size` (the topology, the room for memory), `words` (of
-cpu and -smp), `uuid`, `generation` (the id of a vmgenid device), `memory` (plugged memory),
`memdevs` (its backends, by device), `plugged`: the options that make what was plugged since the
start, and `values`: properties of the machine and of its first CPU as QEMU has them: all of the
QEMU before, of the next those `in_doubt`.
"""

from __future__ import annotations

from cprd.qemu import devices

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    Machine = dict[str, Any]


HOST: tuple[str, ...] = ("", "type", "accel", "memory-backend", "aux-ram-share", "mem-merge")
HOST += ("memory-encryption", "kernel-irqchip", "kvm-shadow-mem", "dump-guest-core", "dumpdtb")
HOST += ("pflash0", "pflash1", "pcspk-audiodev")
"""Options of -machine that no guest sees, or that are compared by themselves."""


def differences(old: Machine, new: Machine) -> list[str]:
    """A message for each difference between the machine of the QEMU before and that of the next;
    both sides are named."""
    old = {**new, **old}  # what another version of cprctl did not note counts as the same
    found = list(_kind(old, new))
    if found:
        return found  # (and all the rest differs, too)
    same_version = old["version"] == new["version"]
    found += _processors(old, new)
    for what, key, option in (
        ("the machine's uuid", "uuid", "-uuid"),
        ("the generation id", "generation", "-device vmgenid,guid="),
    ):
        if old[key] != new[key]:
            found.append(
                f"{what} is {old[key] or 'unset'} in the old QEMU, {new[key] or 'unset'} in"
                f" COMMAND: give COMMAND {option}{'' if option[-1] == '=' else ' '}{old[key]}"
            )
    for place in ("set", "tables"):
        for name in _changed(old, new, place):
            sides = [side[place].get(name, "not set") for side in (old, new)]
            found.append(f"{name} is {sides[0]} in the old QEMU, {sides[1]} in COMMAND")
    if old["size"] != new["size"]:
        found.append(
            f"the room for memory is {_shown(old['size'])} in the old QEMU,"
            f" {_shown(new['size'])} in COMMAND: change -m"
        )
    found += devices.differences(old["devices"], new["devices"], same_version=same_version)
    for what, place in (("missing in", old["memory"]), ("only in", new["memory"])):
        other = new["memory"] if place is old["memory"] else old["memory"]
        found += [f"plugged memory {row} is {what} COMMAND" for row in place if row not in other]
    found += [
        f"device {name!r} has {backend} in the old QEMU, {new['memdevs'][name]} in COMMAND"
        for name, backend in sorted(old["memdevs"].items())
        if new["memdevs"].get(name, backend) != backend
    ]
    for name, kind in sorted(old["objects"].items()):
        if name not in new["objects"] and name not in old["devices"]:
            found.append(f"{name!r} ({kind}) is missing in COMMAND")
    for name, kind in sorted(new["objects"].items()):
        if name not in old["objects"] and name not in new["devices"]:
            found.append(f"{name!r} ({kind}) is in COMMAND, and was not in the old QEMU")
    return found


_SWITCHES = {"yes": "on", "true": "on", "y": "on", "no": "off", "false": "off", "n": "off"}


def plain(said: str) -> str | int:
    """A value without its spelling."""
    number, unit = said.lower(), 0
    if number[:-1].isdecimal() and number[-1:] in "bkmgtpe":
        number, unit = number[:-1], "bkmgtpe".index(number[-1])
    try:
        return int(number, 0) << 10 * unit
    except ValueError:
        return _SWITCHES.get(number, said)


def _changed(old: Machine, new: Machine, place: str) -> list[str]:
    """The names in a map of words whose values differ, but for those that both QEMUs have the same
    all the same."""
    found = []
    for name in sorted({*old[place], *new[place]}):
        sides = [side[place].get(name) for side in (old, new)]
        if sides[0] == sides[1] or (None not in sides and plain(sides[0]) == plain(sides[1])):
            continue
        kind, _, key = name.rpartition(" ")
        if kind == "-machine" and key.replace("_", "-") in HOST:
            continue  # (of a hold of an older cprctl)
        if kind == "-machine" and _same_value(old, new, "machine", key):
            continue
        both, same = (old["devices"], new["devices"]), old["version"] == new["version"]
        device, _, prop = key.rpartition(".")
        if kind == "-global" and devices.tell(*both, device, prop, same_version=same):
            continue
        found.append(name)
    return found


def _same_value(old: Machine, new: Machine, what: str, name: str) -> bool:
    sides = [side.get("values", {}).get(what, {}) for side in (old, new)]
    return all(name in side for side in sides) and bool(sides[0][name] == sides[1][name])


def in_doubt(old: Machine, new: Machine) -> tuple[list[str], list[str]]:
    """The properties of the machine, and of its first CPU, for which the words differ: `values` of
    the next QEMU decide."""
    old = {**new, **old}
    names = [name.partition(" ")[2] for name in _changed(old, new, "set") if name[:2] == "-m"]
    same = old["cpu"].get("type") == new["cpu"].get("type") and old["cpu_set"] == new["cpu_set"]
    return names, [] if same else sorted(old["values"]["cpu"])


def _shown(size: dict[str, Any]) -> str:
    return ", ".join(f"{name}={size[name]}" for name in sorted(size))


def _kind(old: Machine, new: Machine) -> Iterator[str]:
    if old["type"] != new["type"]:
        yield (
            f"Machine type {old['type']} in the old QEMU, {new['type']} in COMMAND: change -machine"
            " (and give a versioned type)"
        )
    for name, size in old["backends"].items():
        if name not in new["backends"]:
            yield f"memory backend {name!r} is missing in COMMAND: add -object ...,id={name}"
        elif new["backends"][name] != size:
            yield (
                f"memory backend {name!r} has {size} bytes in the old QEMU,"
                f" {new['backends'][name]} in COMMAND: change size= of its -object, and -m"
            )


_TOPOLOGY = ("sockets", "dies", "cores", "threads", "maxcpus")


def _processors(old: Machine, new: Machine) -> Iterator[str]:
    both = (old, new)
    said = [side["words"].get("smp") or f"{len(side['cpus'])}" for side in both]
    if len(old["cpus"]) != len(new["cpus"]):
        yield (
            f"{len(old['cpus'])} CPUs in the old QEMU, {len(new['cpus'])} in COMMAND: change"
            f" -smp {said[1]} (it was {said[0]})"
        )
    elif old["cpus"] != new["cpus"] and old["size"] == new["size"]:  # (-m makes nodes, too)
        yield (
            f"the CPUs lie elsewhere (sockets, cores, threads, nodes) than in COMMAND: change"
            f" -smp {said[1]} (it was {said[0]})"
        )
    elif any(old["smp"][name] != new["smp"][name] for name in old["smp"] if name in new["smp"]):
        smp = [",".join(f"{name}={side['smp'].get(name)}" for name in _TOPOLOGY) for side in both]
        yield (
            f"the CPUs have {smp[0]} in the old QEMU, {smp[1]} in COMMAND: change -smp {said[1]}"
            f" (it was {said[0]})"
        )
    alike = bool(old.get("values", {}).get("cpu")) and all(
        _same_value(old, new, "cpu", name) for name in old["values"]["cpu"]
    )
    changed = [
        f"{name} {old['cpu'][name]} in the old QEMU, {new['cpu'][name]} in COMMAND"
        for name in old["cpu"]
        if name in new["cpu"] and old["cpu"][name] != new["cpu"][name]
        if not (alike and name == "type")
    ]
    changed += [
        f"{name} is {old['cpu_set'].get(name, 'not set')} in the old QEMU,"
        f" {new['cpu_set'].get(name, 'not set')} in COMMAND"
        for name in sorted({*old["cpu_set"], *new["cpu_set"]})
        if old["cpu_set"].get(name) != new["cpu_set"].get(name)
        if not _same_value(old, new, "cpu", name)
    ]
    if changed:
        words = [side["words"].get("cpu") or "none" for side in (old, new)]
        yield f"the CPU differs: change -cpu {words[1]} (it was {words[0]}): {'; '.join(changed)}"

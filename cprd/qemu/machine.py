"""The machine that a guest sees, but for its disks: how two of them differ. Pure.

A machine is a map (inventory.py makes it): `version` of QEMU, `type` of the machine, `devices`
(devices.py), `objects` (devices with an id, by name: their types), `named` (the objects whose id is
in the command line), `backends` (of memory, by name: their bytes), `cpus` (the place of each CPU),
`cpu` (the model and the features of the first CPU), `cpu_set` (what -cpu sets beside), `set` (by
-machine and -global), `words` (of -cpu and -smp), `uuid`, `generation` (the id of a vmgenid
device), `memory` (plugged memory), and `plugged`: the options that make what was plugged since the
start.
"""

from __future__ import annotations

from cprd.qemu import devices

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    Machine = dict[str, Any]


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
    for name in sorted({*old["set"], *new["set"]}):
        sides = [side["set"].get(name, "not set") for side in (old, new)]
        if sides[0] != sides[1]:
            found.append(f"{name} is {sides[0]} in the old QEMU, {sides[1]} in COMMAND")
    found += devices.differences(old["devices"], new["devices"], same_version=same_version)
    for what, place in (("missing in", old["memory"]), ("only in", new["memory"])):
        other = new["memory"] if place is old["memory"] else old["memory"]
        found += [f"plugged memory {row} is {what} COMMAND" for row in place if row not in other]
    for name, kind in sorted(old["objects"].items()):
        if name not in new["objects"] and name not in old["devices"]:
            found.append(f"{name!r} ({kind}) is missing in COMMAND")
    for name, kind in sorted(new["objects"].items()):
        if name not in old["objects"] and name not in new["devices"]:
            found.append(f"{name!r} ({kind}) is in COMMAND, and was not in the old QEMU")
    return found


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


def _processors(old: Machine, new: Machine) -> Iterator[str]:
    said = [side["words"].get("smp") or f"{len(side['cpus'])}" for side in (old, new)]
    if len(old["cpus"]) != len(new["cpus"]):
        yield (
            f"{len(old['cpus'])} CPUs in the old QEMU, {len(new['cpus'])} in COMMAND: change"
            f" -smp {said[1]} (it was {said[0]})"
        )
    elif old["cpus"] != new["cpus"]:
        yield (
            f"the CPUs lie elsewhere (sockets, cores, threads, nodes) than in COMMAND: change"
            f" -smp {said[1]} (it was {said[0]})"
        )
    changed = [
        f"{name} {old['cpu'][name]} in the old QEMU, {new['cpu'][name]} in COMMAND"
        for name in old["cpu"]
        if name in new["cpu"] and old["cpu"][name] != new["cpu"][name]
    ]
    changed += [
        f"{name} is {old['cpu_set'].get(name, 'not set')} in the old QEMU,"
        f" {new['cpu_set'].get(name, 'not set')} in COMMAND"
        for name in sorted({*old["cpu_set"], *new["cpu_set"]})
        if old["cpu_set"].get(name) != new["cpu_set"].get(name)
    ]
    if changed:
        words = [side["words"].get("cpu") or "none" for side in (old, new)]
        yield f"the CPU differs: change -cpu {words[1]} (it was {words[0]}): {'; '.join(changed)}"

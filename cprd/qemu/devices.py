"""The devices of a machine: QEMU's own list (`info qtree`), and how two machines' devices differ.
Pure.

Devices are a map: key -> {"type", "bus", and the properties as QEMU prints each}. The key is the id
of a device, or "BUS/TYPE@PLACE" for a device without an id.
"""

from __future__ import annotations

import re

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    Device = dict[str, str]
    Devices = dict[str, Device]

_LINE = re.compile(r'( *)(?:(dev): ([^ ,]+), id "(.*)"|(bus): (.+)|([\w.-]+) = (.*))$')
_SIZE = re.compile(r" \(.*\)$")

_USB = re.compile(r" +addr \d+\.\d+, port ([\d.]+), ")
"""The port that a USB device got (its property may be empty)."""

# What the host has, and the guest does not see.
_HOST = frozenset(
    (  # noqa: SIM905
        "drive audiodev tpmdev fsdev rng iothread iothread-vq-mapping cryptodev"
        " vhostfd vhostfds romfile display host sysfsdev fd hostbus hostaddr hostdevice"
        " hostport logfile werror rerror account-invalid account-failed share-rw tx x-txtimer"
        " x-txburst hpet-offset-saved ebpf-rss-fds backend_defaults ioeventfd rombar MCFG busnr"
    ).split()
)
_PLACES: tuple[str, ...] = (
    "addr",
    "scsi-id",
    "lun",
    "unit",
    "port",
    "nr",
    "address",
    "iobase",
    "base",
    "slot",
)
_IDENTITY = ("mac", "serial", "wwn", "addr", "num-queues", "uuid", "guid", "port", "unit", "lun")
"""The properties that count between two versions of QEMU."""
_WORDS: tuple[str, ...] = (
    *("bus", *_PLACES[:6], "drive", "netdev", "chardev", "fsdev", "mac", "serial", "wwn", "name"),
)
"""The properties that make up the words of a plugged device, and have no usual value."""
_BY_ITSELF: tuple[str, ...] = ("vectors", "num-queues", "disable-legacy", "romsize")
_BY_ITSELF += ("cyls", "heads", "secs", "lcyls", "lheads", "lsecs", "discard_granularity")
"""The properties to which QEMU gives a value, where none is given."""


def parse(text: str) -> Devices:
    """The devices of an `info qtree` answer."""
    found: list[Device] = []
    stack: list[tuple[int, str, Device | None]] = []  # indent, bus, device
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None:
            if (usb := _USB.match(line)) and stack and stack[-1][2] is not None:
                stack[-1][2]["port"] = usb[1]
            continue
        indent, dev, kind, named, bus, bus_name, key, value = match.groups()
        while stack and stack[-1][0] >= len(indent):
            stack.pop()
        if dev:
            device = {"type": kind, "id": named, "bus": stack[-1][1] if stack else ""}
            found.append(device)
            stack.append((len(indent), device["bus"], device))
        elif bus:
            stack.append((len(indent), _bus(bus_name, stack), None))
        elif stack and stack[-1][2] is not None:
            stack[-1][2][key] = _SIZE.sub("", value).strip('"')
    return _keyed(found)


def _bus(name: str, stack: list[tuple[int, str, Device | None]]) -> str:
    """The name of a bus; the bus of a transport (every virtio device has a "virtio-bus") gets the
    name of the device, too."""
    parent = stack[-1][2] if stack else None
    if parent is None or name != "virtio-bus":
        return name
    return f"{parent['id'] or parent['bus'] + '/' + parent.get('addr', '?')}/{name}"


def _keyed(found: list[Device]) -> Devices:
    devices: Devices = {}
    count: dict[str, int] = {}
    for device in reversed(found):  # QEMU lists the last one first
        place = next((device[name] for name in _PLACES if name in device), "")
        key = device.pop("id") or f"{device['bus']}/{device['type']}@{place}"
        count[key] = count.get(key, 0) + 1
        devices[key if count[key] == 1 else f"{key}#{count[key]}"] = device
    return devices


def visible(devices: Devices, added: Iterable[str]) -> Devices:
    """The devices, without the properties that no guest sees. `added`: the types of devices that
    the command line adds without an id. Of a device that QEMU makes by itself only the properties
    count that identify: others may be what the guest has set (an I/O base), and the command line
    sets them by -machine and -global, which are compared as words."""
    kinds = set(added)
    found = {}
    for key, device in devices.items():
        own = _has_id(key) or device["type"] in kinds or device["bus"].endswith("/virtio-bus")
        found[key] = {
            name: value
            for name, value in device.items()
            if (name not in _HOST if own else name in ("type", "bus", *_IDENTITY))
        }
    return found


_BACKENDS = ("netdev", "chardev", "memdev")
"""What lies behind a device, by an id that may be another in COMMAND, unless another device had the
id."""


def differences(old: Devices, new: Devices, *, same_version: bool) -> Iterator[str]:
    """A message for each difference; both sides are named. Between two versions the devices that
    QEMU makes by itself may have other names, and properties other defaults: only devices with an
    id count, and properties that identify."""
    had, have = (
        {(name, device[name]) for device in side.values() for name in _BACKENDS if name in device}
        for side in (old, new)
    )
    for key, before in old.items():
        after = new.get(key)
        if after is None:
            if same_version or _has_id(key):
                yield f"device {key!r} ({before['type']}) is missing in COMMAND: add its -device"
            continue
        for name, value in before.items():
            other = after.get(name, value)
            if name in _BACKENDS and not ((name, value) in have and (name, other) in had):
                continue
            if value != other and (same_version or name in (*_IDENTITY, *_BACKENDS)):
                yield (
                    f"device {key!r} ({before['type']}): {name} is {value or 'unset'} in the old"
                    f" QEMU, {other or 'unset'} in COMMAND"
                )
    for key, after in new.items():
        if key not in old and (same_version or _has_id(key)):
            yield (
                f"device {key!r} ({after['type']}) is in COMMAND, and was not in the old QEMU:"
                " leave it out"
            )


def tell(old: Devices, new: Devices, kind: str, name: str, *, same_version: bool) -> bool:
    """Whether each device of a kind has a property in the lists (itself, or the device on its
    virtio-bus), so that `differences` knows of the property, however it was set; or has the same
    value in both, where two versions are compared by few properties only."""
    found = []
    values: list[dict[str, list[str | None]]] = [{}, {}]
    for devices, said in zip((old, new), values, strict=True):
        for key, device in devices.items():
            if device["type"] == kind:
                place = key if _has_id(key) else f"{device['bus']}/{device.get('addr', '?')}"
                bus = f"{place}/virtio-bus"
                inner = [other for other in devices.values() if other["bus"] == bus]
                found.append(any(name in one for one in (device, *inner)))
                said[key] = [one.get(name) for one in (device, *inner)]
    known = same_version or name in _IDENTITY or values[0] == values[1]
    return bool(found) and all(found) and known


def _has_id(key: str) -> bool:
    return "@" not in key


def unusual(device: Device, usual: dict[str, Any]) -> Device:
    """The properties that make up the words of a device. `usual`: the value of each where none is
    given; None for no value."""
    found = {}
    for name, value in device.items():
        normal = usual.get(name)
        if name in _WORDS:
            other = value not in ("", "-1", "4294967295") and (name, value) != ("wwn", "0")
        else:
            said = str(normal).lower() if isinstance(normal, bool) else str(normal)
            other = normal is not None and value not in (said, "<null>", "")
            other = other and name not in _BY_ITSELF and not name.startswith("x-")
            other = other and not (name.endswith("block_size") and value == "512")
        if other:
            found[name] = value
    return found


def words(kind: str, name: str, said: dict[str, Any]) -> str:
    """The -device option that makes a device."""
    order = sorted(said, key=lambda key: _WORDS.index(key) if key in _WORDS else len(_WORDS))
    parts = [f"{key}={said[key]}".replace(",", ",,") for key in order]
    return f"-device {','.join([kind, *([f'id={name}'] if name else []), *parts])}"

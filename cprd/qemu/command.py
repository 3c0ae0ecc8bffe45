"""QEMU's command line: what we must know of it, and what we add to it. Pure.

COMMAND may begin with wrappers (chroot, prlimit, taskset, setpriv, ...); the QEMU is the first word
that is called like one. Only the options named here are understood; all others pass through as they
are.
"""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING

from cprd.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MONITOR = "cprd-monitor"
FDS_FOR_CPR = (10, 2)
"""From this version on the CPR channel may be an inherited listening socket. Before: only a
path."""

_PROGRAM = re.compile(r"(qemu-system-\w+|qemu-kvm|kvm)$")

# Options without an argument (qemu-options.hx); every other one takes the next word.
_BARE = frozenset(
    (  # noqa: SIM905
        "S alt-grab async-teardown audio-help ctrl-grab curses daemonize enable-fips enable-kvm"
        " full-screen h help mem-prealloc no-acpi no-fd-bootchk no-frame no-hpet no-kvm no-quit"
        " no-reboot no-shutdown no-user-config nodefaults nographic nouserconfig old-param"
        " only-migratable portrait preconfig s sdl semihosting singlestep snapshot tdf usb version"
        " win2k-hack xen-attach xen-domid-restrict"
    ).split()
)

_REFUSED = {
    "daemonize": "cprctl becomes the QEMU, and the supervisor watches that process: leave it out",
    "incoming": "the state comes from cprd: leave it out",
    "S": "whether the guest runs is part of what was saved: leave it out",
    "loadvm": "the guest's state comes from cprd: leave it out",
    "preconfig": "nobody would end it: leave it out",
    "snapshot": "what the guest writes would go with its QEMU: leave it out",
}


class Command:
    """The words of one QEMU command. `program` is the index of the QEMU among them."""

    __slots__ = ("options", "program", "words")

    def __init__(self, words: Sequence[str]) -> None:
        """Raises InvalidInput when there is no QEMU, or an option that cannot be."""
        self.words = list(words)
        if not self.words:
            raise InvalidInput("no QEMU command: write it after --")
        self.program = next(
            (
                at
                for at, word in enumerate(self.words)
                if _PROGRAM.fullmatch(os.path.basename(word))
            ),
            0,
        )
        self.options = list(_options(self.words[self.program + 1 :]))
        for name, _ in self.options:
            if name in _REFUSED:
                raise InvalidInput(f"-{name} in the QEMU command: {_REFUSED[name]}")

    @property
    def wrappers(self) -> list[str]:
        return self.words[: self.program]

    def values(self, *names: str) -> Iterator[str]:
        for name, value in self.options:
            if name in names and value is not None:
                yield value

    def chardevs(self) -> dict[str, dict[str, str]]:
        """By id: the options of each -chardev, its kind under ""."""
        found = (keyed(value) for value in self.values("chardev"))
        return {options["id"]: options for options in found if "id" in options}

    def listening(self) -> list[tuple[str, str]]:
        """(option, path) of each UNIX socket that this QEMU would listen at."""
        found: list[tuple[str, str]] = []
        for option in ("qmp", "qmp-pretty", "monitor", "serial", "parallel"):
            for value in self.values(option):
                path = _server(value)
                if path:
                    found.append((f"-{option}", path))
        for options in self.chardevs().values():
            if options[""] == "socket" and _is_on(options, "server") and options.get("path"):
                found.append(("-chardev", options["path"]))  # noqa: PERF401
        for value in self.values("vnc"):
            if value.startswith("unix:"):
                found.append(("-vnc", value[5:].partition(",")[0]))  # noqa: PERF401
        return found

    def monitor_path(self) -> str:
        """Where its own QMP monitor listens; "" when it has none at a path."""
        for value in self.values("qmp", "qmp-pretty"):
            path = _server(value)
            if path:
                return path
        chardevs = self.chardevs()
        for value in self.values("mon"):
            options = keyed(value)
            chardev = chardevs.get(options.get("chardev") or options[""], {})
            if options.get("mode") == "control" and chardev.get("path"):
                return chardev["path"]
        return ""

    def truncating(self) -> list[str]:
        """Files that a new QEMU would empty: -chardev file without append=on."""
        files = [
            options["path"]
            for options in self.chardevs().values()
            if options[""] == "file" and "path" in options and not _is_on(options, "append")
        ]
        for value in self.values("serial", "monitor", "debugcon"):
            if value.startswith("file:"):
                files.append(value[5:])  # noqa: PERF401
        return files

    def incoming(self, *, monitor: int, main: int, cpr: int | str) -> list[str]:
        """The words that make it wait, stopped, for a state: descriptor numbers of a connected
        monitor, a connected main channel, and a listening CPR socket or (a str) where to listen."""
        address = (
            {"transport": "socket", "type": "unix", "path": cpr}
            if isinstance(cpr, str)
            else {"transport": "socket", "type": "fd", "str": str(cpr)}
        )
        channels = (
            ("main", {"transport": "socket", "type": "fd", "str": str(main)}),
            ("cpr", address),
        )
        added = ["-S", "-chardev", f"socket,id={MONITOR},fd={monitor}"]
        added += ["-mon", f"chardev={MONITOR},mode=control"]
        for kind, addr in channels:
            added += ["-incoming", json.dumps({"channel-type": kind, "addr": addr})]
        return self.words + added


def keyed(value: str) -> dict[str, str]:
    """The options in QEMU's KIND,KEY=VALUE,FLAG,... ("" is KIND; ",," is a comma; a JSON object is
    read as one)."""
    if value.startswith("{"):
        try:
            parsed = json.loads(value)
        except ValueError:
            return {"": ""}
        found = {str(key): str(item) for key, item in parsed.items()}
        found.setdefault("", found.get("qom-type", found.get("driver", "")))
        return found
    parts = [part.replace("\0", ",") for part in value.replace(",,", "\0").split(",")]
    found = {"": ""}
    for at, part in enumerate(parts):
        key, equals, rest = part.partition("=")
        if not equals and at == 0:
            found[""] = part
        elif not equals:
            found[key.removeprefix("no")] = "off" if key.startswith("no") else "on"
        else:
            found[key] = rest
    return found


def _options(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    rest = iter(words)
    for word in rest:
        if not word.startswith("-"):
            continue  # a disk image
        name = word[2:] if word.startswith("--") else word[1:]
        yield name, None if name in _BARE else next(rest, None)


def _server(value: str) -> str:
    """The path of unix:PATH,server... ("" for anything else)."""
    kind, _, rest = value.partition(":")
    if kind != "unix":
        return ""
    options = keyed(rest)
    return options[""] if _is_on(options, "server") else ""


def _is_on(options: dict[str, str], key: str) -> bool:
    return options.get(key, "off") in ("on", "yes", "true", "y")

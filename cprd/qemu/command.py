"""QEMU's command line: the options that cprctl must know, and the options that cprctl adds. Pure.

COMMAND may begin with wrappers (chroot, prlimit, taskset, setpriv, ...); the QEMU is the first word
with the name of a QEMU. Only the options named here are understood; all others pass through.
"""

from __future__ import annotations

import os

from cprd.errors import InvalidInput

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

MONITOR = "cprd-monitor"

# Options without an argument (qemu-options.hx of 10.0, and older ones); every other one takes the
# next word, but see _options.
_BARE = frozenset(
    (  # noqa: SIM905
        "S alt-grab async-teardown audio-help ctrl-grab curses daemonize enable-fips enable-kvm"
        " enable-sync-profile full-screen h help jitdump mem-prealloc no-acpi no-fd-bootchk"
        " no-frame no-hpet no-kvm no-quit no-reboot no-shutdown no-user-config nodefaults nographic"
        " nouserconfig old-param one-insn-per-tb only-migratable perfmap portrait preconfig s sdl"
        " semihosting singlestep snapshot tdf usb version win2k-hack xen-attach xen-domid-restrict"
    ).split()
)
_TEXT = ("append", "name")
"""Options whose value is free text, and may look like an option."""

_CAPABILITIES = frozenset(
    (  # noqa: SIM905
        "auto-converge background-snapshot colo dirty-bitmaps dirty-limit late-block-activate"
        " mapped-ram multifd pause-before-switchover postcopy-blocktime postcopy-preempt"
        " postcopy-ram rdma-pin-all release-ram switchover-ack xbzrle zero-blocks zero-copy-send"
    ).split()
)
"""Migration capabilities that a hand-over does without, and some of which exclude a hand-over."""

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

    def __init__(self, words: Sequence[str], *, running: bool = False) -> None:
        """Raises InvalidInput for an empty command, or an option that a hand-over excludes.
        `running`: the words of a QEMU that runs, where such options are allowed; none where nobody
        may see the words."""
        self.words = list(words)
        if not self.words and not running:
            raise InvalidInput("no QEMU command: write it after --")
        self.program = next(
            (at for at, word in enumerate(self.words) if is_qemu(word)),
            0,
        )
        self.options = list(_options(self.words[self.program + 1 :]))
        for name, why in () if running else self.refused():
            raise InvalidInput(f"-{name} in the QEMU command: {why}")
        for name, value in () if running else self.options:
            if name == "drive" and is_on(keyed(value or ""), "snapshot"):
                raise InvalidInput(
                    f"snapshot=on of -drive in the QEMU command: {_REFUSED['snapshot']}"
                )

    def refused(self) -> Iterator[tuple[str, str]]:
        """(option, reason) of each option that a hand-over excludes, but for those that cprctl
        itself has added to the words of a QEMU that runs."""
        added = ("S", "incoming") if MONITOR in self.chardevs() else ()
        for name, _ in self.options:
            if name in _REFUSED and name not in added:
                yield name, _REFUSED[name]

    def own(self) -> list[str]:
        """The words from the QEMU on, without those that cprctl has added to the words of a QEMU
        that runs (`incoming`)."""
        words = self.words[self.program :]
        for at in range(len(words) - 2):
            added = words[at : at + 3]
            if added[:2] == ["-S", "-chardev"] and f",id={MONITOR}," in added[2]:
                return words[:at]
        return words

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

    def characters(self) -> Iterator[tuple[str, str]]:
        """(option, value) of each option that takes a character device by itself."""
        options = ("qmp", "qmp-pretty", "monitor", "serial", "parallel", "debugcon", "gdb")
        for option in options:
            for value in self.values(option):
                yield option, value.removeprefix("mon:")

    def listening(self) -> list[tuple[str, str]]:
        """(option, path) of each UNIX socket at which this QEMU would listen, as far as its words
        tell. The kernel knows better for a QEMU that runs (process.py)."""
        found = [(f"-{option}", _server(value)) for option, value in self.characters()]
        for options in self.chardevs().values():
            if options[""] == "socket" and is_on(options, "server"):
                found.append(("-chardev", options.get("path", "")))  # noqa: PERF401
        for value in self.values("netdev"):
            options = keyed(value)
            if is_on(options, "server") and options.get("addr.type") == "unix":
                found.append(("-netdev", options.get("addr.path", "")))
        for option, display in self.vncs():
            if display.startswith("unix:"):
                found.append((option, display[5:]))
        return [(option, path) for option, path in found if path]

    def vncs(self) -> Iterator[tuple[str, str]]:
        """(option, display) of each VNC server."""
        for value in self.values("vnc"):
            yield "-vnc", keyed(value)[""]
        for value in self.values("display"):
            options = keyed(value)
            if "vnc" in options:
                yield "-display", options["vnc"]

    def monitors(self, *, people: bool = False) -> list[tuple[str, bool]]:
        """(path, pretty-printed or not) of each QMP monitor that listens at a path; with `people`
        also of the monitors for people (HMP)."""
        chardevs = self.chardevs()
        found: list[tuple[str, bool]] = []
        for option in ("qmp", "qmp-pretty", *(("monitor",) if people else ())):
            for value in self.values(option):
                named = chardevs.get(value.removeprefix("chardev:"), {})
                found.append(
                    (
                        _server(value.removeprefix("mon:")) or named.get("path", ""),
                        option == "qmp-pretty",
                    )
                )
        for value in self.values("mon"):
            options = keyed(value)
            chardev = chardevs.get(options.get("chardev") or options[""], {})
            if people or options.get("mode") == "control":
                found.append((chardev.get("path", ""), is_on(options, "pretty")))
        for value in self.values("object"):  # (from QEMU 11.1 on)
            options = keyed(value)
            if options[""] == "monitor-qmp" or (people and options[""] == "monitor-hmp"):
                chardev = chardevs.get(options.get("chardev", ""), {})
                found.append((chardev.get("path", ""), is_on(options, "pretty")))
        return [(path, pretty) for path, pretty in found if path]

    def monitor_path(self) -> str:
        """The path of its own QMP monitor, not pretty-printed if possible; "" for no monitor at a
        path."""
        monitors = sorted(self.monitors(), key=lambda monitor: monitor[1])
        return monitors[0][0] if monitors else ""

    def ids(self) -> set[str]:
        """The ids that -device, -object and the like give."""
        names = ("device", "object", "drive", "blockdev", "chardev", "netdev")
        found = (keyed(value) for value in self.values(*names))
        return {options.get("id") or options.get("node-name", "") for options in found} - {""}

    def only_pretty(self) -> str:
        """A message when all its QMP monitors are pretty-printed; "" otherwise."""
        monitors = self.monitors()
        if not monitors or not all(pretty for _, pretty in monitors):
            return ""
        return (
            f"the monitor at {monitors[0][0]} is pretty-printed (-qmp-pretty, pretty=on), and"
            " cprctl cannot speak to such a one: without another -qmp this VM cannot be saved"
        )

    def changes_user(self) -> str:
        """A message when this QEMU would change its user once it has begun; "" otherwise."""
        user = any("user" in keyed(value) for value in self.values("run-with"))
        if not user and not any(True for _ in self.values("runas")):
            return ""
        return (
            "a QEMU that changes its user (-run-with user=, -runas) cannot be handed over: let it"
            " begin as that user (as root: UID/NAME as the name), without that option"
        )

    def truncating(self) -> list[str]:
        """Files that a new QEMU would empty: -chardev file without append=on, logs."""
        files = [
            options["path"]
            for options in self.chardevs().values()
            if options[""] == "file" and "path" in options and not is_on(options, "append")
        ]
        for _, value in self.characters():
            if value.startswith("file:"):
                files.append(value[5:])
        files += [
            options["logfile"]
            for options in self.chardevs().values()
            if "logfile" in options and not is_on(options, "logappend")
        ]
        for name, said in self.options:
            options = keyed(said or "")
            if (name, options[""]) in (("object", "filter-dump"), ("trace", options[""])):
                files.append(options.get("file", ""))
            if (name, options[""]) == ("audiodev", "wav"):
                files.append(options.get("path", ""))
            if name == "D":
                files.append(said or "")
        return [path for path in files if path]

    def incoming(self, *, monitor: int, main: int, cpr: str) -> list[str]:
        """The command of a QEMU that waits, stopped, for a state. `monitor` and `main`: descriptor
        numbers of a connected monitor and a connected main channel; `cpr`: the path at which to
        listen for the CPR state. (From 10.2 on a descriptor would do; every version takes a
        path.)"""
        from _json import encode_basestring_ascii as quoted  # json takes 5 ms to import

        channels = {
            "main": f'"type": "fd", "str": "{main}"',
            "cpr": f'"type": "unix", "path": {quoted(cpr)}',
        }
        added = ["-S", "-chardev", f"socket,id={MONITOR},fd={monitor}"]
        added += ["-qmp", f"chardev:{MONITOR}"]  # (every version takes that; 11.1 warns of -mon)
        for kind, addr in channels.items():
            where = f'"addr": {{"transport": "socket", {addr}}}'
            added += ["-incoming", f'{{"channel-type": "{kind}", {where}}}']
        for value in self.values("global"):
            name, _, _ = value.partition("=")
            if name.startswith("migration.") and name[10:].removeprefix("x-") in _CAPABILITIES:
                added += ["-global", f"{name}=off"]  # the last one counts
        return self.words + added


def missing(old: dict[str, Any], command: Command) -> str:
    """A message about what COMMAND obviously lacks of a machine (machine.py), by the ids in its
    words: what was plugged since the start of the old QEMU, and devices; an empty string for
    nothing."""
    ids = command.ids()
    if any(True for _ in command.values("readconfig")):
        return ""
    late = {name for name, _ in old.get("plugged", ()) if name}
    plugged = [option for name, option in old.get("plugged", ()) if name and name not in ids]
    said = [
        f"device {name!r} ({kind}): it is missing"
        for name, kind in sorted(old.get("named", {}).items())
        if name not in ids and name not in late
    ]
    if plugged:
        said.insert(0, f"what was plugged into the guest's machine: add {' '.join(plugged)}")
    return f"COMMAND lacks {'; and '.join(said)}" if said else ""


def is_qemu(word: str) -> bool:
    """Whether a program has the name of a QEMU."""
    name = os.path.basename(word)
    return name in ("qemu-kvm", "kvm") or (name.startswith("qemu-system-") and _is_word(name[12:]))


def _is_word(text: str) -> bool:
    return text.replace("_", "0").isalnum()


def keyed(value: str) -> dict[str, str]:
    """The options in QEMU's KIND,KEY=VALUE,FLAG,... ("" is KIND; ",," is a comma). A JSON object is
    read as QEMU's dotted keys would have it: {"addr": {"type": "inet"}} is addr.type=inet."""
    if value.startswith("{"):
        import json

        try:
            parsed = json.loads(value)
        except ValueError:
            return {"": ""}
        found = dict(dotted("", parsed))
        kinds = (found.get(key) for key in ("qom-type", "driver", "type"))
        found.setdefault("", next((kind for kind in kinds if kind), ""))
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


def dotted(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from dotted(f"{prefix}.{key}" if prefix else str(key), item)
    elif isinstance(value, list):
        for at, item in enumerate(value):
            yield from dotted(f"{prefix}.{at}", item)
    else:
        yield prefix, ("on" if value else "off") if isinstance(value, bool) else str(value)


def _options(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """(name, value) of each option. A word that looks like an option counts as an option, also
    behind an unknown option: a newer QEMU's flag must not hide an option that we refuse."""
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if not word.startswith("-"):
            continue  # a disk image
        name = word[2:] if word.startswith("--") else word[1:]
        value = words[at] if at < len(words) and name not in _BARE else None
        if value is not None and name not in _TEXT and _is_option(value):
            value = None
        if value is not None:
            at += 1
        yield name, value


def _is_option(word: str) -> bool:
    """-NAME or --NAME of letters, digits, "_" and "-"."""
    name = word[1:].removeprefix("-")
    return word[:1] == "-" and name[:1].isalpha() and _is_word(name.replace("-", "_"))


def _server(value: str) -> str:
    """The path of unix:PATH,server... ("" for anything else)."""
    kind, _, rest = value.partition(":")
    if kind != "unix":
        return ""
    options = keyed(rest)
    return options[""] if is_on(options, "server") else ""


def is_on(options: dict[str, str], key: str) -> bool:
    """Whether a flag is set, in any spelling that QEMU reads."""
    return options.get(key, "off") in ("on", "yes", "true", "y")

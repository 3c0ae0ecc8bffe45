"""Whether a running QEMU can be handed over, and if not, which argument to change. Asks; changes
nothing that stays changed."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from cprd.qemu import drift, inventory, servers
from cprd.qemu.command import Command, is_on, keyed
from cprd.qemu.errors import MonitorRefused, Refused
from cprd.qemu.files import OpenFiles
from cprd.qemu.hold import KEPT
from cprd.qemu.process import command_line, deleted_files, tcp_ports
from cprd.qemu.source import MODE, UNDER_WAY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cprd.qemu.inventory import Inventory
    from cprd.qemu.monitor import Monitor

_ENDED = {
    "shutdown": "the guest has shut down: there is nothing to keep; quit this QEMU",
    "guest-panicked": "the guest has panicked: there is nothing to keep; reset or quit it",
    "internal-error": "QEMU stopped with an internal error: its state cannot be trusted",
    "inmigrate": "this QEMU itself waits for a state",
    "postmigrate": "its state was handed over already",
}


class Report:
    """`problems`: each prevents a hand-over; `notes`: worth knowing; `status`: the run state."""

    def __init__(self, status: str) -> None:
        self.status = status
        self.problems: list[str] = []
        self.notes: list[str] = []

    def refuse(self) -> str:
        """Raises Refused with all problems; returns the run state when there are none."""
        if self.problems:
            raise Refused(f"this VM cannot be handed over: {'; '.join(self.problems)}")
        return self.status


def examine(monitor: Monitor) -> Report:
    """Look at a running QEMU. Raises MonitorLost."""
    report = Report(monitor.status())
    problems, notes = report.problems, report.notes
    if report.status not in KEPT:
        said = f"the run state is {report.status!r}: wait, and try again"
        problems.append(_ENDED.get(report.status, said))
    if report.status == "io-error":
        notes.append(
            "the guest is stopped by an I/O error: it will be so in the next QEMU too; mend the"
            " storage, then `cont` there"
        )
    migration = monitor.migration()
    if migration in UNDER_WAY:
        problems.append(f"a migration is under way ({migration}): wait for it, or migrate_cancel")
    before = len(problems)
    _memory(monitor, problems, notes)
    explained = len(problems) > before
    problems += _tls(monitor)
    problems += _another_root(monitor)
    _lost(monitor, notes)
    removed = _temporary(monitor)
    problems += removed
    if not removed and monitor.process is not None:
        files = OpenFiles(monitor.process.pid)
        problems += drift.moved(inventory.drives(monitor, monitor.process.pid), files.has)
    problems += [
        f"block job {job.get('device', '?')!r} ({job.get('type', '?')}) is active and would be"
        " lost: wait for it, or block-job-cancel"
        for job in _ask(monitor, "query-block-jobs", [])
    ]
    problems += [
        f"QEMU says: {why}"
        for why in _blockers(monitor)
        if not (explained and "not compatible with CPR" in why)  # the same, without the cure
    ]
    return report


def _another_root(monitor: Monitor) -> list[str]:
    """A QEMU that has left its root (-run-with chroot=): QEMU cannot connect to the sockets of a
    hand-over, which lie beside its monitor."""
    if monitor.process is None or not monitor.where.startswith("/"):
        return []
    pid, place = monitor.process.pid, os.path.dirname(monitor.where)
    try:
        ours = os.stat(place)
        theirs = os.stat(f"/proc/{pid}/root{place}")
    except PermissionError:
        return []
    except OSError:
        theirs = None
    if theirs is not None and os.path.samestat(ours, theirs):
        return []
    return [
        f"this QEMU has another root and does not see {place}, where the sockets of a hand-over"
        " lie: start the VM without -run-with chroot=, or mount that directory there, too"
    ]


def _lost(monitor: Monitor, notes: list[str]) -> None:
    """What was set by a monitor, and is not in a state."""
    notes += [
        f"the export {row.get('id', '?')!r} ({row.get('type', '?')}) ends with this QEMU: add it"
        " again in the next (block-export-add)"
        for row in _ask(monitor, "query-block-exports", [])
    ]
    words = command_line(monitor.process.pid) if monitor.process is not None else []
    known = Command(words, running=True).ids()
    notes += [
        f"the monitor {row['name']!r} ends with this QEMU: add it again in the next (object-add)"
        for row in _ask(monitor, "qom-list", [], path="/objects")
        if row["type"] in (f"child<{kind}>" for kind in inventory.MONITORS)
        if words and row["name"] not in known and not row["name"].startswith("compat_monitor")
    ]
    bitmaps = {
        row.get("name", "?"): disk.get("device") or disk.get("qdev", "?")
        for disk in _ask(monitor, "query-block", [])
        for row in disk.get("inserted", {}).get("dirty-bitmaps", [])
        if not row.get("persistent")
    }
    notes += [
        f"the dirty bitmap {name!r} of disk {disk!r} is not persistent, and ends with this QEMU:"
        " the next backup with it has to be a full one"
        for name, disk in bitmaps.items()
    ]
    auth = _ask(monitor, "query-vnc", {}) or {}
    if auth.get("enabled") and auth.get("auth") not in (None, "none"):
        notes.append("the password of VNC ends with this QEMU: set it again in the next")


def _tls(monitor: Monitor) -> list[str]:
    found = _ask(monitor, "query-migrate-parameters", {}).get("tls-creds")
    if not found:
        return []
    return [
        f"its migrations are to use TLS (tls-creds={found}), which a hand-over through cprd does"
        " not speak: migrate-set-parameters tls-creds='' first"
    ]


def _memory(monitor: Monitor, problems: list[str], notes: list[str]) -> None:
    machine = _ask(monitor, "qom-list", [], path="/machine")
    properties = {row["name"] for row in machine}
    if "aux-ram-share" not in properties:
        version = ".".join(map(str, monitor.version))
        problems.append(f"QEMU {version} cannot hand over memory: it takes QEMU 10.0 or later")
        return
    if not _ask(monitor, "qom-get", False, path="/machine", property="aux-ram-share"):
        problems.append("start the VM with -machine ...,aux-ram-share=on (it cannot be set later)")
    if _ask(monitor, "qom-get", False, path="/machine", property="suppress-vmdesc"):
        problems.append(
            "start the VM without suppress-vmdesc=on: the end of its stream could not be told"
        )
    backends = _ask(monitor, "query-memdev", [])
    # Without -object QEMU makes one of its own, which is not shared and has no id, or a machine's.
    machines = _ask(monitor, "query-machines", [])
    defaults = {row["default-ram-id"] for row in machines if "default-ram-id" in row}
    own = [row for row in backends if row.get("id") in defaults and not row.get("share")]
    backends = [row for row in backends if "id" in row and row not in own]
    if own or not backends:
        problems.append(
            "the guest's memory is QEMU's own: start the VM with -object memory-backend-memfd,"
            "id=ram0,size=SIZE,share=on -machine ...,memory-backend=ram0"
        )
    for backend in backends:
        name = backend["id"]
        if not backend.get("share"):
            problems.append(
                f"memory backend {name!r} is private: add share=on to its -object (and let it be a"
                " memory-backend-memfd)"
            )
        kind = _ask(monitor, "qom-get", "", path=f"/objects/{name}", property="type")
        if kind == "memory-backend-file":
            notes.append(
                f"memory backend {name!r} is a file: it does not travel with the state, the next"
                " QEMU opens it by its path; nobody may remove or change it meanwhile"
            )


def _temporary(monitor: Monitor) -> list[str]:
    """Disks in a file without a name, as -snapshot makes them: the file goes with its QEMU, and so
    would all that the guest has written."""
    if monitor.process is None:
        return []
    removed = [path for path in deleted_files(monitor.process.pid) if path.startswith("/")]
    problems = []
    for row in _ask(monitor, "query-block", []):
        said = json.dumps(row)
        for path in removed:
            if json.dumps(path)[1:-1] in said:
                name = row.get("device") or row.get("qdev", "?")
                problems.append(
                    f"disk {name!r} lies in a file that has been removed ({path}) and goes with"
                    " this QEMU: start the VM without -snapshot and snapshot=on"
                )
                break
    return problems


def _blockers(monitor: Monitor) -> list[str]:
    """QEMU's own objections, asked for in the mode of a hand-over; the mode is put back."""
    parameters = _ask(monitor, "query-migrate-parameters", {})
    before = parameters.get("mode", "normal")
    if before != MODE:
        try:
            monitor.execute("migrate-set-parameters", mode=MODE)
        except MonitorRefused:
            return []  # said already: too old
    try:
        answer = _ask(monitor, "query-migrate", {})
        return [str(why) for why in answer.get("blocked-reasons", [])]
    finally:
        if before != MODE:
            monitor.execute("migrate-set-parameters", mode=before)


def _ask(monitor: Monitor, command: str, default: Any, **arguments: Any) -> Any:
    try:
        return monitor.execute(command, **arguments)
    except MonitorRefused:
        return default


def drift_of(monitor: Monitor, seen: Inventory | None = None) -> list[str]:
    """How a running QEMU differs from what its own command line would make now; nothing where the
    command line cannot be read. Raises MonitorLost."""
    if monitor.process is None:
        return []
    pid = monitor.process.pid
    command = Command(command_line(pid), running=True)
    if not command.words:
        return []
    seen = seen or inventory.take(monitor, pid, plugged=True)
    unfit = [f"-{name} is for the first start: {why}" for name, why in command.refused()]
    return unfit + drift.differences(seen, command)


class Conflict(NamedTuple):
    """Something that two QEMUs cannot have at the same time. `port`: of a TCP listener, 0 for any,
    -1 for no listener; `more`: how many ports above the option may try."""

    text: str
    port: int = -1
    more: int = 0

    def explains(self, port: int) -> bool:
        return self.port == 0 or self.port <= port <= self.port + self.more


def about_command_line(words: list[str], pid: int = 0) -> tuple[list[str], list[str]]:
    """(obstacles to an overlapping upgrade, notes), by the words of a command; and, for the QEMU
    `pid` that runs with these words, by the kernel: TCP sockets that no option explains. (Of a QEMU
    to come also the servers without a place; of a QEMU that runs servers.single knows them.)"""
    command = Command(words, running=True)
    conflicts = list(_conflicts(command))
    upgrade = [conflict.text for conflict in conflicts]
    if not pid:
        upgrade += servers.taken(command)
    for address, port in sorted(set(tcp_ports(pid))) if pid else ():
        if not any(conflict.explains(port) for conflict in conflicts):
            shown = f"[{address}]" if ":" in address else address
            upgrade.append(f"{shown}:{port} (TCP) {_LISTENS}")
    return upgrade, list(_notes(command))


_LISTENS = "listens in the old QEMU: save and start instead"


def _notes(command: Command) -> Iterator[str]:
    for path in command.truncating():
        yield (
            f"{path} would be emptied by the next QEMU: use -chardev file,...,append=on (of a"
            " logfile=: logappend=on), or move the file away first"
        )
    if command.only_pretty():
        yield command.only_pretty()
    for _, options in _networks(command):
        name = f"network {options.get('id', options[''])!r} ({options['']})"
        if options[""] in ("tap", "vhost-user", "vhost-vdpa"):
            yield f"{name}: its descriptor does not travel; the next QEMU opens it by name"
        if options[""] == "bridge":
            yield f"{name}: the next QEMU gets a tap of its own; the bridge has to learn that"


def _networks(command: Command) -> Iterator[tuple[str, dict[str, str]]]:
    """(value, options) of each network backend; the key "" has the kind."""
    for value in command.values("netdev", "nic", "net"):
        options = keyed(value)
        options[""] = options[""] or options.get("type", "")
        yield value, options


def _conflicts(command: Command) -> Iterator[Conflict]:
    if any(True for _ in command.values("pidfile")):
        yield Conflict("-pidfile is locked by the old QEMU: leave it out, or save and start")
    if command.changes_user():
        yield Conflict(command.changes_user())
    if any(is_on(keyed(value), "exit-with-parent") for value in command.values("run-with")):
        yield Conflict(
            "-run-with exit-with-parent=on: the new QEMU would be another parent's: leave it out,"
            " or save and start"
        )
    for value, options in _networks(command):
        if options[""] == "tap" and not any(key in options for key in ("fd", "fds", "helper")):
            yield Conflict(
                f"tap {options.get('ifname', '?')!r} is opened by the old QEMU: two at a time need"
                " a multi-queue tap; else save and start"
            )
        forwards = [part for part in value.split(",") if part.startswith("hostfwd=")]
        if value.startswith("{"):
            forwards = [f"hostfwd={it}" for key, it in options.items() if key.startswith("hostfwd")]
        for forward in forwards:
            yield Conflict(f"{forward} {_LISTENS}", _last_number(forward.partition("-")[0]))
        if "listen" in options:
            where = options["listen"]
            yield Conflict(f"-netdev socket,listen={where} {_LISTENS}", _last_number(where))
        if is_on(options, "server") and options.get("addr.type") == "inet":
            said = options.get("addr.port", "")
            yield Conflict(f"-netdev {options['']},addr.port={said} {_LISTENS}", _last_number(said))
    yield from _tcp_listeners(command)
    for value in command.values("device"):
        options = keyed(value)
        if options[""].startswith("vhost-vsock"):
            yield Conflict(
                f"{options['']} guest-cid={options.get('guest-cid', '?')} is the old QEMU's, and"
                " nobody else can have it meanwhile: save and start instead"
            )


def _tcp_listeners(command: Command) -> Iterator[Conflict]:
    """But for those of networks."""
    for option, value in command.characters():
        address = _listener(option, value)
        if address:
            more = _last_number(keyed(value).get("to", ""))
            port = _last_number(address)
            yield Conflict(f"-{option} {value} {_LISTENS}", port, max(0, more - port))
    if any(name == "s" for name, _ in command.options):
        yield Conflict(f"-s (-gdb tcp::1234) {_LISTENS}", 1234)
    for name, options in command.chardevs().items():
        if options[""] == "socket" and is_on(options, "server") and "port" in options:
            port, more = _last_number(options["port"]), _last_number(options.get("to", ""))
            yield Conflict(f"-chardev {name!r} (TCP) {_LISTENS}", port, max(0, more - port))
    for option, display in command.vncs():
        if display and not display.startswith(("unix:", "none")):
            # (With to= it may be a display above that one.)
            yield Conflict(f"{option} {display} {_LISTENS}", 5900 + _last_number(display), 255)
    for value in command.values("spice"):
        options = keyed(value)
        for key in ("port", "tls-port"):
            if key in options:
                yield Conflict(
                    f"-spice {key}={options[key]} {_LISTENS}", _last_number(options[key])
                )


def _listener(option: str, value: str) -> str:
    """The TCP address at which a character device listens; "" for none."""
    kind, _, rest = value.partition(":")
    if kind not in ("tcp", "telnet", "tn3270", "websocket"):
        return ""
    options = keyed(rest)
    # -gdb makes itself a server (gdbserver_start adds it).
    return options[""] if option == "gdb" or is_on(options, "server") else ""


def _last_number(text: str) -> int:
    """The port in HOST:PORT or the like; 0 when there is none."""
    digits = text[len(text.rstrip("0123456789")) :]
    return int(digits or 0)

"""Whether a VM can be handed over, and if not, which argument to change. Asks; changes nothing that
stays changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cprd.qemu.failure import MonitorRefused
from cprd.qemu.record import MODE, UNDER_WAY

if TYPE_CHECKING:
    from cprd.qemu.qmp import Monitor

KEPT = ("running", "suspended", "paused", "io-error", "prelaunch", "watchdog")
"""Run states that are worth keeping, and in which QEMU can migrate."""

_ENDED = {
    "shutdown": "the guest has shut down: there is nothing to keep; quit this QEMU",
    "guest-panicked": "the guest has panicked: there is nothing to keep; reset or quit it",
    "internal-error": "QEMU stopped with an internal error: its state cannot be trusted",
    "inmigrate": "this QEMU itself waits for a state",
    "postmigrate": "its state was handed over already",
}


class Report:
    """`problems` each prevent a hand-over; `notes` are worth knowing; `status` is the run state."""

    def __init__(self, status: str, problems: list[str], notes: list[str]) -> None:
        self.status = status
        self.problems = problems
        self.notes = notes


async def examine(monitor: Monitor) -> Report:
    """Look at a running QEMU. Raises MonitorLost."""
    problems: list[str] = []
    notes: list[str] = []
    status = await monitor.status()
    if status not in KEPT:
        problems.append(_ENDED.get(status, f"the run state is {status!r}: wait, and try again"))
    if status == "io-error":
        notes.append(
            "the guest is stopped by an I/O error: it will be so in the next QEMU too; mend the"
            " storage, then `cont` there"
        )
    migration = await monitor.migration()
    if migration in UNDER_WAY:
        problems.append(f"a migration is under way ({migration}): wait for it, or migrate_cancel")
    before = len(problems)
    await _memory(monitor, problems, notes)
    explained = len(problems) > before
    problems += [
        f"block job {job.get('device', '?')!r} ({job.get('type', '?')}) is active and would be"
        " lost: wait for it, or block-job-cancel"
        for job in await _ask(monitor, "query-block-jobs", [])
    ]
    problems += [
        f"QEMU says: {why}"
        for why in await _blockers(monitor)
        if not (explained and "not compatible with CPR" in why)  # the same, without the cure
    ]
    return Report(status, problems, notes)


async def _memory(monitor: Monitor, problems: list[str], notes: list[str]) -> None:
    machine = await _ask(monitor, "qom-list", [], path="/machine")
    properties = {row["name"] for row in machine}
    if "aux-ram-share" not in properties:
        version = ".".join(map(str, monitor.version))
        problems.append(f"QEMU {version} cannot hand over memory: it takes QEMU 10.0 or later")
        return
    if not await _ask(monitor, "qom-get", False, path="/machine", property="aux-ram-share"):
        problems.append("start the VM with -machine ...,aux-ram-share=on (it cannot be set later)")
    if await _ask(monitor, "qom-get", False, path="/machine", property="suppress-vmdesc"):
        problems.append(
            "start the VM without suppress-vmdesc=on: the end of its stream could not be told"
        )
    backends = await _ask(monitor, "query-memdev", [])
    # Without -object QEMU makes one of its own, which is not shared and has no id, or a machine's.
    machines = await _ask(monitor, "query-machines", [])
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
        kind = await _ask(monitor, "qom-get", "", path=f"/objects/{name}", property="type")
        if kind == "memory-backend-file":
            notes.append(
                f"memory backend {name!r} is a file: it does not travel with the state, the next"
                " QEMU opens it by its path; nobody may remove or change it meanwhile"
            )


async def _blockers(monitor: Monitor) -> list[str]:
    """What QEMU itself has against it, asked in the mode of a hand-over, which is put back."""
    parameters = await _ask(monitor, "query-migrate-parameters", {})
    before = parameters.get("mode", "normal")
    if before != MODE:
        try:
            await monitor.execute("migrate-set-parameters", mode=MODE)
        except MonitorRefused:
            return []  # said already: too old
    try:
        answer = await _ask(monitor, "query-migrate", {})
        return [str(why) for why in answer.get("blocked-reasons", [])]
    finally:
        if before != MODE:
            await monitor.execute("migrate-set-parameters", mode=before)


async def _ask(monitor: Monitor, command: str, default: Any, **arguments: Any) -> Any:
    try:
        return await monitor.execute(command, **arguments)
    except MonitorRefused:
        return default


def about_command_line(words: list[str]) -> tuple[list[str], list[str]]:
    """(what prevents an overlapping upgrade, notes) that only the command line can tell. Pure."""
    from cprd.errors import InvalidInput
    from cprd.qemu.command import Command, keyed

    upgrade: list[str] = []
    notes: list[str] = []
    command = _lenient(words, Command, InvalidInput)
    if command is None:
        return upgrade, notes
    notes += [
        f"{path} would be emptied by the next QEMU: use -chardev file,...,append=on"
        for path in command.truncating()
    ]
    if any(True for _ in command.values("pidfile")):
        upgrade.append("-pidfile is locked by the old QEMU: leave it out, or save and start")
    for value in command.values("netdev", "nic"):
        options = keyed(value)
        if options[""] in ("tap", "vhost-user", "vhost-vdpa"):
            travels = "its descriptor does not travel; the next QEMU opens it by name"
            notes.append(f"network {options.get('id', value)!r} ({options['']}): {travels}")
            if options[""] == "tap" and "fd" not in options and "fds" not in options:
                upgrade.append(
                    f"tap {options.get('ifname', '?')!r} is opened by the old QEMU: two at a time"
                    " need a multi-queue tap; else save and start"
                )
        upgrade += [
            f"{part} listens in the old QEMU: save and start instead"
            for part in value.split(",")
            if part.startswith("hostfwd=")
        ]
    for option in ("vnc", "gdb", "spice"):
        upgrade += [
            f"-{option} {value} listens in the old QEMU: save and start instead"
            for value in command.values(option)
            if not value.startswith(("unix:", "none"))
        ]
    return upgrade, notes


def _lenient(words: list[str], kind: Any, error: type[Exception]) -> Any:
    """A running QEMU's command line may have what ours may not (-S, -incoming, our monitor)."""
    cleaned: list[str] = []
    rest = iter(words)
    for word in rest:
        if word in ("-S", "-daemonize", "-snapshot", "-preconfig"):
            continue
        if word in ("-incoming", "-loadvm"):
            next(rest, None)
            continue
        cleaned.append(word)
    try:
        return kind(cleaned)
    except error:
        return None


def command_line(pid: int) -> list[str]:
    """The words of a running process; [] when they cannot be read."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return [word.decode("utf-8", "surrogateescape") for word in file.read().split(b"\0")][
                :-1
            ]
    except OSError:
        return []

"""The hold under a VM's name, and the doubt that a killed helper leaves.

The QEMU that was saved can end the doubt. If its guest runs, the state is stale, and dropped; if
the QEMU is `postmigrate`, nobody has run since, and the state is good; if the QEMU is gone, nobody
can tell any more. While cprctl asks, cprctl is the only client of that QEMU's monitor.
"""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import cprd
from cprd.errors import Busy, Damaged, NotHeld
from cprd.linux.child import in_a_child
from cprd.qemu import signals
from cprd.qemu.acting import owner_of
from cprd.qemu.errors import Failed, Incomplete, InDoubt, MonitorLost, Refused
from cprd.qemu.hold import LIVE, MAIN_KEY, UNFINISHED, Origin
from cprd.qemu.monitor import QUIT, Monitor
from cprd.qemu.private import is_marked, remove_mark
from cprd.qemu.process import Process
from cprd.qemu.signals import Deadline
from cprd.qemu.sockets import mend
from cprd.qemu.source import UNDER_WAY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cprd import Daemon, Shown

    Row = Shown

LOOK = 5.0  # s for a look into a hold
MEMORY = 256 << 20  # bytes that a look may take; a VM's manifest has a few KiB


class Settled(NamedTuple):
    """The outcome. `runs`: the pid of the QEMU that has the guest, None for none; `said`: for
    people."""

    runs: int | None = None
    said: str = ""


class Found(NamedTuple):
    """A hold of the very guest that was to be saved."""

    generation: int
    status: str
    said: str


# The row of a hold


def look(daemon: Daemon, name: str) -> tuple[Row | None, Origin | None]:
    """The row of a hold (None: nothing is held) and its section "qemu" (None: no such section).

    Another process looks: what is held may be made to hang or to swell. Raises Timeout,
    LimitExceeded."""
    path = daemon.path

    def show() -> Row:
        with cprd.connect(path) as ours:
            row = ours.show(name)
        row["sections"] = [each for each in row["sections"] if each["key"] == "qemu"]
        row["descriptors"] = [each for each in row["descriptors"] if each["name"] == MAIN_KEY]
        return row

    try:
        with suppress(Busy):
            daemon.wait(name, 0.0)  # (which also waits for a cprd that restarts)
        row = in_a_child(show, LOOK, memory=MEMORY)
    except NotHeld:
        return None, None
    for section in row.get("sections", ()):
        if section["key"] == "qemu" and section.get("value") is not None:
            try:
                return row, Origin.read(section["value"])
            except Damaged:
                return row, None
    return row, None


def row_of(daemon: Daemon, name: str) -> cprd.Row | None:
    """The row of a hold, without a look into the hold; None: nothing is held."""
    uid, bare = owner_of(name), name.rpartition("/")[2]
    rows = (row for row in daemon.list() if (row["uid"], row["name"]) == (uid, bare))
    return max(rows, key=lambda row: int(row["generation"]), default=None)


def is_unfinished(row: Row) -> bool:
    """hold.is_unfinished for a row: the main stream was seen to have no seals."""
    return any(
        (found["name"], found["id"]) == (MAIN_KEY, 0)
        and found["what"].startswith("memfd ")
        and found["what"].endswith(", no seals")
        for found in row.get("descriptors", ())
    )


@contextmanager
def _living(record: dict[str, int] | None, row: Row) -> Iterator[Process | None]:
    """The process of a record in a hold, while the process lives."""
    process = Process.find(record, row["uid"])
    try:
        yield process
    finally:
        if process is not None:
            process.close()


# Room for a new hold


def make_room(daemon: Daemon, name: str, path: str, *, replace: bool) -> Found | None:
    """Settle the hold under NAME, so that the QEMU at `path` can be saved. Returns Found when a
    killed helper has saved this very QEMU already.

    Raises Busy (another guest is held), Refused, Failed, InDoubt."""
    monitor = Monitor.connect(path)
    try:
        process = monitor.process
        _drop_stale(daemon, monitor)
        row, origin = look(daemon, name)
        status = monitor.status()
        if row is None:
            if status == "postmigrate":
                raise Refused(_handed_over(path, name))
            return None
        if process is not None and _was_moved_here(daemon, name, row, origin, process, status):
            return None
        same = origin is not None and process is not None and origin.old == process.record()
    finally:
        monitor.close()
    if row["phase"] in ("held", "in-doubt") and same:
        return _saved_already(daemon, name)
    if is_unfinished(row):
        try:
            settle(daemon, name)
        except Incomplete:
            return None
    if row["phase"] == "held" and replace:
        return None
    hint = "load it, drop it (cprctl drop), or save with --replace"
    if row["phase"] != "held":
        hint = "see cprctl show"
    raise Busy(
        f"{name!r} is held already ({row['phase']}: {row['reason'] or 'of another QEMU'}); {hint}."
        f" The guest is in its QEMU as before ({status})"
    )


def _was_moved_here(
    daemon: Daemon, name: str, row: Row, origin: Origin | None, process: Process, status: str
) -> bool:
    """Whether the held state went into this QEMU, by a helper that was killed afterwards: its
    source ends, and so does a hold that is older than the guest's memory."""
    if origin is not None and origin.new == process.record():  # an upgrade
        _end_predecessor(origin, row)
        daemon.drop(name, force=True)
        return True
    if row.get("acting") == process.pid and status != "postmigrate":  # a start
        _end_predecessor(origin, row)
        if status in LIVE:
            daemon.drop(name, force=True)
        return True  # (what it may not have run yet, its own save replaces)
    return False


def _saved_already(daemon: Daemon, name: str) -> Found | None:
    settled = settle(daemon, name)
    if settled.runs is not None:
        return None  # stale, and dropped by now
    row, origin = look(daemon, name)
    if row is None or origin is None:
        raise Failed(f"{name!r} went away while it was being settled")
    return Found(row["generation"], origin.status, settled.said)


def _drop_stale(daemon: Daemon, monitor: Monitor) -> None:
    """Drop what killed helpers left of this QEMU, under any name: the guest's memory is newer while
    the guest runs. Once the guest is handed over anew, nobody could tell the two any more."""
    process = monitor.process
    if process is None or monitor.status() not in (*LIVE, "paused"):
        return
    ours = os.geteuid()  # of the QEMU: nobody else's holds are looked into
    for row in daemon.list():
        if row["uid"] != ours or row["phase"] != "in-doubt" or row.get("acting"):
            continue
        full = f"{ours}/{row['name']}"
        _, origin = look(daemon, full)
        if origin is not None and origin.old == process.record():
            with suppress(NotHeld):
                daemon.drop(full, force=True)
            remove_mark(origin.untouched)


def _handed_over(path: str, name: str) -> str:
    """The message about a guest in a QEMU that has handed the guest over, when cprd has nothing.
    (No `cont` by us: that cprd holds nothing may as well mean that the guest runs elsewhere.)"""
    return (
        "the guest was handed over by this QEMU already (postmigrate), and nothing is held under"
        f" {name!r}. It is stopped there, whole. If you know that it runs in no other QEMU, and is"
        f" held nowhere (cprctl list), let it go on here, by `cont` at {path}; if it does run"
        " elsewhere, `quit` there"
    )


# The end of a doubt


def settle(daemon: Daemon, name: str) -> Settled:
    """End the doubt that a killed helper left under NAME. Afterwards the state is held and
    loadable, or (a guest runs) dropped. Raises Busy or InDoubt with the reason; NotHeld."""
    row, origin = look(daemon, name)
    if row is None:
        raise NotHeld(f"nothing is held under {name!r}")
    phase = row["phase"]
    if phase in ("held", "in-doubt") and origin is not None:
        _await_successor(origin, row)
    with _living(origin.old if origin else None, row) as old:
        if phase == "held":
            if old is not None and origin is not None:
                return _ask(daemon, name, row, origin, old)
            if origin is not None and is_unfinished(row):  # somebody released it
                _drop_unfinished(daemon, name, row, origin)
            return Settled()
        if phase == "in-doubt":
            return _settle_in_doubt(daemon, name, row, origin, old)
        raise Busy(f"{name!r}: {row['reason']}")


def may_force(daemon: Daemon, name: str) -> bool:
    """Ask every process that could know better before --force serves a state in doubt. True: the
    state is in doubt, and nobody objects. False: the state is not in doubt.

    Raises Busy or InDoubt when a QEMU lives that took this state, or whose running guest was saved;
    NotHeld."""
    row, origin = look(daemon, name)
    if row is None:
        raise NotHeld(f"nothing is held under {name!r}")
    if row["phase"] != "in-doubt":
        return False
    with _living(origin.new if origin else None, row) as new:
        pid = row.get("acting") or (new.pid if new is not None else None)
    if pid:
        raise InDoubt(
            f"{name!r}: pid {pid} has taken this state, and lives: its guest may run. Not even"
            " --force starts another beside it: end that QEMU first, or save it"
        )
    with _living(origin.old if origin else None, row) as old:
        if old is None and origin is not None and is_unfinished(row):
            _drop_unfinished(daemon, name, row, origin)
        if old is None or origin is None:
            return True
        settled = _ask(daemon, name, row, origin, old, forced=True)
    if settled.runs is not None:
        raise Busy(
            f"nothing to start: {settled.said}; what was held under {name!r} was older than that"
            " guest and has been dropped"
        )
    return True


def _settle_in_doubt(
    daemon: Daemon, name: str, row: Row, origin: Origin | None, old: Process | None
) -> Settled:
    if row.get("acting"):
        raise InDoubt(
            f"{name!r}: pid {row['acting']} has taken this state and its guest may run; if it does"
            f" not, end that QEMU and use --force. ({row['reason']})"
        )
    begun = origin is not None and "begun to act" in row["reason"]
    if origin is not None and old is None and is_unfinished(row):
        # The new QEMU of that upgrade has ended, too, and cannot have run what it did not get.
        _drop_unfinished(daemon, name, row, origin)
    if old is None or origin is None or begun or "began to act" in row["reason"]:
        raise InDoubt(
            f"{name!r}: {row['reason']}. The QEMU that was saved is gone, so nobody can tell"
            " whether its guest has run since; when you are sure that it has not, use --force"
        )
    return _ask(daemon, name, row, origin, old)


def _drop_unfinished(daemon: Daemon, name: str, row: Row, origin: Origin) -> NoReturn:
    daemon.drop(name, force=True)
    remove_mark(origin.untouched)
    raise Incomplete(f"{name!r}: {UNFINISHED}")


def _ask(
    daemon: Daemon, name: str, row: Row, origin: Origin, old: Process, *, forced: bool = False
) -> Settled:
    """The old QEMU lives: its own word decides. `forced`: a QEMU that its guest has left quits; the
    doubt itself stays, for may_force's caller to end."""
    mend(origin.qmp)
    try:
        monitor = Monitor.connect(origin.qmp)
    except (Refused, MonitorLost) as error:
        if old.wait(0.2):
            return settle(daemon, name)
        raise InDoubt(
            f"{name!r}: the QEMU that was saved (pid {old.pid}) still lives and does not answer:"
            f" {error}"
        ) from None
    try:
        if monitor.process is None or monitor.process.pid != old.pid:
            raise InDoubt(
                f"{name!r}: another QEMU listens at {origin.qmp} than the one that was saved (pid"
                f" {old.pid}), which still lives; end that one"
            )
        status = _at_rest(monitor)
        if status == "postmigrate":
            _refuse_postmigrate(name, row, origin, old, forced)
            if row["phase"] == "in-doubt" and not forced:
                daemon.release(name, force=True)
            monitor.end()
            remove_mark(origin.untouched)
            return Settled(said=f"the old QEMU (pid {old.pid}) had stopped its guest; it has quit")
        # Whatever it does now: it is the guest's QEMU, and what is held is older than its memory.
        daemon.drop(name, force=True)
        remove_mark(origin.untouched)
        return Settled(old.pid, f"the guest is in its QEMU (pid {old.pid}, {status})")
    finally:
        monitor.close()


def _refuse_postmigrate(name: str, row: Row, origin: Origin, old: Process, forced: bool) -> None:
    """Raises InDoubt where `postmigrate` does not tell that the state is good."""
    if is_unfinished(row):
        raise InDoubt(
            f"{name!r}: what an upgrade left there never was a guest's state, and the QEMU"
            f" (pid {old.pid}) has handed its guest over since, by another way"
            " (postmigrate). It is left alone: drop the hold (cprctl drop NAME --force); if"
            " the guest runs nowhere else, `cont` there"
        )
    doubted = row["phase"] == "in-doubt" and not forced
    if doubted and origin.untouched and not is_marked(origin.untouched):
        raise InDoubt(
            f"{name!r}: an upgrade was killed when its new QEMU had the guest, and that"
            " one is gone: nobody can tell whether it has run; when you are sure that"
            " it has not, use --force"
        )


def _at_rest(monitor: Monitor) -> str:
    """The run state, once a migration that lost its receiver has been given up."""
    deadline = Deadline(5.0)
    while True:
        status = monitor.status()
        migration = monitor.migration()
        if status == "postmigrate" and migration == "completed":
            return status
        if status not in ("finish-migrate", "postmigrate") and migration not in UNDER_WAY:
            return status
        if deadline.has_passed():
            raise InDoubt(f"QEMU stays in {status!r} with its migration in {migration!r}")
        signals.sleep(0.02)


def _await_successor(origin: Origin, row: Row) -> None:
    """Wait for the end of the QEMU that an upgrade was making: that QEMU ends with its helper."""
    with _living(origin.new, row) as new:
        if new is not None and not new.wait(3.0):
            raise InDoubt(
                f"the QEMU that an upgrade was starting (pid {new.pid}) still lives: if its guest"
                " runs, drop this hold (--force); if not, kill that QEMU"
            )


def _end_predecessor(origin: Origin | None, row: Row) -> None:
    """End the QEMU from which an upgrade took the guest, when its helper died before `quit`: that
    QEMU had completed, or the new one would not run. A killed QEMU leaves the paths of its sockets
    alone."""
    with _living(origin.old if origin else None, row) as old:
        if old is not None:
            old.kill()
            old.wait(QUIT)

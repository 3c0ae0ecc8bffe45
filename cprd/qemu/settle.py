"""What is already there under a VM's name: whether that leaves room for what is to be done now.

A killed helper leaves a hold in doubt. Who can end the doubt is the QEMU that was saved: if its
guest runs, the state is stale, and dropped; if it is `postmigrate`, nobody has run since, and the
state is good; if it is gone, nobody can tell any more. While we ask, we are the only client of its
monitor.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from cprd.errors import Busy, CprdError, Damaged, NotHeld
from cprd.qemu.failure import InDoubt, MonitorLost, NeverWhole, Refused
from cprd.qemu.hold import FILM, UNFINISHED, Origin
from cprd.qemu.overlap import mend
from cprd.qemu.private import remove_mark
from cprd.qemu.process import Process
from cprd.qemu.qmp import Monitor

if TYPE_CHECKING:
    from cprd import Daemon

QUIT = 20.0  # s until a QEMU that was told to quit is killed: it may have much memory to free


def full_name(daemon: Daemon, name: str) -> str:
    """NAME as it is held: as root also another uid's, when only one has it. Raises Busy."""
    if os.geteuid() != 0 or "/" in name:
        return name
    owners = sorted({row["uid"] for row in daemon.list() if row["name"] == name})
    if not owners or owners == [0]:
        return name
    if len(owners) > 1:
        names = ", ".join(f"{uid}/{name}" for uid in owners)
        raise Busy(f"several users hold {name!r}: say which one: {names}")
    return f"{owners[0]}/{name}"


def owned_name(name: str, uid: int) -> str:
    """NAME for a QEMU of `uid`: as root the hold of another uid's QEMU belongs to that one. Raises
    Refused for UID/NAME with another UID: it would give one user the memory of another's guest."""
    if os.geteuid() != 0 or uid == -1:
        return name
    owner, slash, rest = name.partition("/")
    if slash and owner.isdecimal() and int(owner) != uid:
        raise Refused(
            f"{name!r}: this QEMU is of uid {uid}, and so is its hold: {rest!r} or '{uid}/{rest}'"
        )
    return name if slash or uid == 0 else f"{uid}/{name}"


def look(daemon: Daemon, name: str) -> tuple[dict[str, Any] | None, Origin | None]:
    """The row of what is held (None: nothing) and its section "qemu" (None: it has none)."""
    try:
        row = daemon.show(name)
    except NotHeld:
        return None, None
    for section in row.get("sections", ()):
        if section["key"] == "qemu" and section.get("value") is not None:
            try:
                return row, Origin.read(section["value"])
            except Damaged:
                return row, None
    return row, None


def is_unfinished(row: dict[str, Any]) -> bool:
    """As hold.is_unfinished, of a row that was shown: seen to have no seals, not only not seen to
    have some."""
    return any(
        (found["name"], found["id"]) == (FILM, 0)
        and found["what"].startswith("memfd ")
        and found["what"].endswith(", no seals")
        for found in row.get("descriptors", ())
    )


def _drop_unfinished(daemon: Daemon, name: str, row: dict[str, Any], origin: Origin) -> NoReturn:
    daemon.drop(name, force=True)
    remove_mark(origin.untouched, row["uid"])
    raise NeverWhole(f"{name!r}: {UNFINISHED}")


class Settled:
    """What came of it. `runs` is the pid of a QEMU in which the guest is, None when in none."""

    def __init__(self, runs: int | None = None, said: str = "") -> None:
        self.runs = runs
        self.said = said


async def settle(daemon: Daemon, name: str) -> Settled:
    """End what a killed helper left under `name`. Afterwards it is free, or held and loadable, or
    (a guest runs) dropped. Raises Busy or InDoubt with the reason; NotHeld when nothing is."""
    row, origin = look(daemon, name)
    if row is None:
        raise NotHeld(f"nothing is held under {name!r}")
    phase = row["phase"]
    if phase in ("held", "in-doubt") and origin is not None:
        await _end_successor(origin, row["uid"])
    old = Process.find(origin.old, row["uid"]) if origin is not None else None
    try:
        if phase == "held":
            if old is not None and origin is not None:
                return await _ask(daemon, name, row, origin, old)
            if origin is not None and is_unfinished(row):  # somebody released it
                _drop_unfinished(daemon, name, row, origin)
            return Settled()
        if phase == "in-doubt":
            return await _in_doubt(daemon, name, row, origin, old)
        raise Busy(f"{name!r}: {row['reason']}")
    finally:
        if old is not None:
            old.close()


async def force(daemon: Daemon, name: str) -> bool:
    """What --force may do before a state in doubt is served: ask everybody who could know better.
    True: it is in doubt, and nobody objects. False: it is not in doubt, nothing is to be forced.

    Raises Busy or InDoubt where a QEMU lives that has taken this state, or from which it was taken
    and whose guest runs; NotHeld."""
    row, origin = look(daemon, name)
    if row is None:
        raise NotHeld(f"nothing is held under {name!r}")
    if row["phase"] != "in-doubt":
        return False
    new = Process.find(origin.new, row["uid"]) if origin is not None else None
    pid = row.get("acting") or (new.pid if new is not None else None)
    if new is not None:
        new.close()
    if pid:
        raise InDoubt(
            f"{name!r}: pid {pid} has taken this state, and lives: its guest may run. Not even"
            " --force starts another beside it: end that QEMU first, or save it"
        )
    old = Process.find(origin.old, row["uid"]) if origin is not None else None
    if old is None and origin is not None and is_unfinished(row):
        _drop_unfinished(daemon, name, row, origin)
    if old is None or origin is None:
        return True
    try:
        settled = await _ask(daemon, name, row, origin, old, forced=True)
    finally:
        old.close()
    if settled.runs is not None:
        raise Busy(
            f"nothing to start: {settled.said}; what was held under {name!r} was older than that"
            " guest and has been dropped"
        )
    return True


async def _in_doubt(
    daemon: Daemon, name: str, row: dict[str, Any], origin: Origin | None, old: Process | None
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
    return await _ask(daemon, name, row, origin, old)


async def _ask(
    daemon: Daemon,
    name: str,
    row: dict[str, Any],
    origin: Origin,
    old: Process,
    *,
    forced: bool = False,
) -> Settled:
    """The old QEMU lives: its own word decides. `forced`: when its guest has left it, it quits; the
    doubt itself stays, for who forces it to end."""
    mend(origin.qmp)
    try:
        monitor = await Monitor.connect(origin.qmp)
    except (Refused, MonitorLost) as error:
        if await old.wait(0.2):
            return await settle(daemon, name)
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
        status = await _at_rest(monitor)
        if status == "postmigrate":
            if is_unfinished(row):
                raise InDoubt(
                    f"{name!r}: what an upgrade left there never was a guest's state, and the QEMU"
                    f" (pid {old.pid}) has handed its guest over since, by another way"
                    " (postmigrate). It is left alone: drop the hold (cprctl drop NAME --force); if"
                    " the guest runs nowhere else, `cont` there"
                )
            if row["phase"] == "in-doubt" and not forced:
                if origin.untouched and not os.path.exists(origin.untouched):
                    raise InDoubt(
                        f"{name!r}: an upgrade was killed when its new QEMU had the guest, and that"
                        " one is gone: nobody can tell whether it has run; when you are sure that"
                        " it has not, use --force"
                    )
                daemon.release(name, force=True)
            await end(monitor, old)
            remove_mark(origin.untouched, row["uid"])
            return Settled(said=f"the old QEMU (pid {old.pid}) had stopped its guest; it has quit")
        # Whatever it does now: it is the guest's QEMU, and what is held is older than its memory.
        daemon.drop(name, force=True)
        remove_mark(origin.untouched, row["uid"])
        return Settled(old.pid, f"the guest is in its QEMU (pid {old.pid}, {status})")
    finally:
        await monitor.close()


async def _at_rest(monitor: Monitor) -> str:
    """The run state, once a migration that lost its receiver has been given up."""
    loop = asyncio.get_running_loop()
    until = loop.time() + 5.0
    while True:
        status = await monitor.status()
        migration = await monitor.migration()
        if status == "postmigrate" and migration == "completed":
            return status
        if status not in ("finish-migrate", "postmigrate") and migration not in (
            "setup",
            "active",
            "device",
            "failing",
            "cancelling",
        ):
            return status
        if loop.time() > until:
            raise InDoubt(f"QEMU stays in {status!r} with its migration in {migration!r}")
        await asyncio.sleep(0.02)


async def end(monitor: Monitor, process: Process | None) -> None:
    """Quit a QEMU whose guest has left it, and wait until it has ended; kill it if it must be."""
    with suppress(CprdError):
        await monitor.execute("quit")
    if process is None:
        return
    if not await process.wait(QUIT):
        process.kill()
        await process.wait(QUIT)


async def _end_successor(origin: Origin, uid: int) -> None:
    """The QEMU that an upgrade was making ends with its helper; wait until it has."""
    new = Process.find(origin.new, uid)
    if new is None:
        return
    try:
        if not await new.wait(3.0):
            raise InDoubt(
                f"the QEMU that an upgrade was starting (pid {new.pid}) still lives: if its guest"
                " runs, drop this hold (--force); if not, kill that QEMU"
            )
    finally:
        new.close()


async def end_predecessor(origin: Origin | None, uid: int) -> None:
    """The QEMU that an upgrade had taken the guest from, when its helper died before it could quit
    it: it had completed, or the new one would not run. Killed, it leaves the sockets' paths
    alone."""
    old = Process.find(origin.old, uid) if origin is not None else None
    if old is not None:
        old.kill()
        await old.wait(QUIT)
        old.close()

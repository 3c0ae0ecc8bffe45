"""`cprctl qemu save`: a running QEMU's guest goes into a hold, and the QEMU quits.

The order, and what a failure (or kill -9 of this process) leaves at each place:

    take cpr      guest runs                     -> guest runs on
    take main     guest stopped, QEMU waits      -> guest runs on (QEMU resumes by itself)
    prepare       kept, never served             -> guest runs on; a kill leaves the hold in doubt
    SHUT(0)       QEMU completes                 -> in doubt until QEMU is asked
    completed     QEMU can resume only by `cont` -> in doubt; postmigrate says that it is good
    commit        held, once this QEMU has ended -> held
    quit          nobody runs                    -> held
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from cprd.errors import Busy, CprdError, NotHeld, Timeout, Unavailable
from cprd.pause import point
from cprd.qemu import stream
from cprd.qemu.check import examine
from cprd.qemu.failure import Failed, InDoubt, MonitorLost, Refused
from cprd.qemu.hold import LIVE, Origin, pack
from cprd.qemu.private import PrivatePlace
from cprd.qemu.qmp import Monitor, socket_path
from cprd.qemu.record import Recorder, Settings, describe
from cprd.qemu.settle import end, end_predecessor, look, owned_name, settle

if TYPE_CHECKING:
    from cprd import Daemon, Prepared

TIMEOUT = 30.0  # s that QEMU may take for one step
COMMIT = 15.0  # s that cprd may be away while the guest stands still, before we give up on it


class Kept:
    """What came of a save: the hold's name and where it is kept."""

    def __init__(self, name: str, generation: int, kept: str, status: str, said: str = "") -> None:
        self.name = name
        self.generation = generation
        self.kept = kept
        self.status = status
        self.said = said


async def save(
    daemon: Daemon, name: str, qmp: str, *, replace: bool = False, timeout: float = TIMEOUT
) -> Kept:
    """Take the guest of the QEMU at `qmp` into a hold. Returns when it is held and QEMU is gone.

    Raises Refused or Failed (the guest is in its QEMU as before), InDoubt, MonitorBusy, Busy."""
    path = os.path.abspath(socket_path(qmp))
    point("qemu-save:begin")
    name, done = await make_room(daemon, name, path, replace=replace)
    if done is not None:
        return done
    monitor = await Monitor.connect(path)
    try:
        point("qemu-save:connected")
        if monitor.process is None:
            raise Refused(
                f"the process behind {path} cannot be seen (another pid namespace): run cprctl"
                " in the QEMU's own"
            )
        report = await examine(monitor)
        if report.problems:
            raise Refused(f"this VM cannot be handed over: {'; '.join(report.problems)}")
        return await _hand_over(daemon, name, path, monitor, report.status, replace, timeout)
    finally:
        await monitor.close()


async def make_room(
    daemon: Daemon, name: str, path: str, *, replace: bool
) -> tuple[str, Kept | None]:
    """The hold's full name, after what lies there has been settled; a Kept when that is this very
    QEMU's, saved already by a helper that was killed."""
    monitor = await Monitor.connect(path)
    try:
        process = monitor.process
        name = owned_name(name, process.uid if process is not None else -1)
        row, origin = look(daemon, name)
        if row is None:
            return name, None
        if origin is not None and process is not None and origin.new == process.record():
            # An upgrade whose helper was killed after the guest had gone on, in this QEMU.
            await end_predecessor(origin, row["uid"])
            daemon.drop(name, force=True)
            return name, None
        status = await monitor.status()
        acting = process is not None and row.get("acting") == process.pid
        if acting and status != "postmigrate":
            await end_predecessor(origin, row["uid"])
            if status in LIVE:
                daemon.drop(name, force=True)  # it runs: what is held is older than its memory
            return name, None  # (what it may not have run yet, its own save replaces)
        same = origin is not None and process is not None and origin.old == process.record()
    finally:
        await monitor.close()
    if row["phase"] in ("held", "in-doubt") and same:
        settled = await settle(daemon, name)
        if settled.runs is not None:
            return name, None  # stale, and dropped by now
        row, origin = look(daemon, name)
        if row is None or origin is None:
            raise Failed(f"{name!r} went away while it was being settled")
        return name, Kept(name, row["generation"], "", origin.status, settled.said)
    if row["phase"] == "held" and replace:
        return name, None
    hint = "load it, drop it (cprctl drop), or save with --replace"
    if row["phase"] != "held":
        hint = "see cprctl show"
    raise Busy(
        f"{name!r} is held already ({row['phase']}: {row['reason'] or 'of another QEMU'}); {hint}."
        f" The guest is in its QEMU as before ({status})"
    )


async def _hand_over(
    daemon: Daemon,
    name: str,
    path: str,
    monitor: Monitor,
    status: str,
    replace: bool,
    timeout: float,
) -> Kept:
    process = monitor.process
    assert process is not None
    place = PrivatePlace(path, process.uid)
    recorder: Recorder | None = None
    prepared: Prepared | None = None
    try:
        settings = await Settings.prepare(monitor)
        point("qemu-save:settings")
        try:
            recorder = Recorder(monitor, place, timeout)
            monitor.forget_events()
            await recorder.take_cpr()
            point("qemu-save:cpr")
            await recorder.take_main()
            point("qemu-save:main")
            origin = Origin(
                version=monitor.version,
                qmp=path,
                status=status,
                machine=stream.machine(recorder.main),
                old=process.record(),
                uid=process.uid,
            )
            prepared = daemon.prepare(
                name,
                pack(bytes(recorder.tape.data), recorder.tape.fds, recorder.main, origin),
                if_exists="replace" if replace else "error",
                after_exit=process.pidfd,
            )
            point("qemu-save:prepared")
        except (CprdError, OSError) as error:
            await take_back(recorder, settings, monitor, error)
        assert prepared is not None
        assert recorder is not None
        await complete(recorder, prepared, settings, monitor, name)
        point("qemu-save:completed")
        generation, kept = await commit(daemon, prepared, monitor, settings, name)
        point("qemu-save:committed")
        await end(monitor, process)
        point("qemu-save:ended")
        if not process.ended():
            raise Failed(
                f"{name} is held, but its QEMU (pid {process.pid}) does not end, not even by"
                " SIGKILL; nothing is served before it does"
            )
        return Kept(name, generation, kept, status)
    finally:
        if recorder is not None:
            recorder.close()
        place.close()


async def take_back(
    recorder: Recorder | None, settings: Settings, monitor: Monitor, error: Exception
) -> None:
    """Nothing was completed: leave the QEMU as it was found, then raise Failed."""
    try:
        status = await recorder.take_back() if recorder is not None else await monitor.status()
        await settings.restore(monitor)
        where = describe(status)
    except MonitorLost as lost:
        where = f"its QEMU does not answer any more ({lost}), and was not told to give it up"
    raise Failed(f"{_one_line(error)}; {where}") from error


async def complete(
    recorder: Recorder, prepared: Prepared, settings: Settings, monitor: Monitor, name: str
) -> None:
    """SHUT(0), and QEMU's word that it has completed. Raises Failed (the guest runs on) or
    InDoubt."""
    try:
        recorder.complete()
    except OSError as error:
        prepared.abort()
        await take_back(recorder, settings, monitor, error)
    point("qemu-save:shut")
    try:
        came = await recorder.completed()
    except MonitorLost as error:
        raise InDoubt(
            f"{name}: its QEMU was told that the state is whole, and does not say what came of it"
            f" ({error}). The hold is in doubt: run `cprctl qemu save` or `start` again, they ask"
            " that QEMU"
        ) from None
    if came != "completed":
        prepared.abort()
        await settings.restore(monitor)
        status = await monitor.status()
        raise Failed(f"QEMU's migration {came} in the last moment; {describe(status)}")


async def commit(
    daemon: Daemon, prepared: Prepared, monitor: Monitor, settings: Settings, name: str
) -> tuple[int, str]:
    """Make the prepared hold a hold: (generation, where kept). The guest stands still meanwhile.

    Only when cprd has answered that the hold is gone may the old QEMU go on."""
    loop = asyncio.get_running_loop()
    until = loop.time() + COMMIT
    while True:
        try:
            saved = prepared.commit()
            return saved.generation, saved.kept
        except (Unavailable, Timeout) as error:
            if loop.time() > until:
                raise InDoubt(
                    f"{name}: cprd went away before it could commit ({error}). The guest is"
                    " stopped, whole, in its QEMU; once cprd runs again, repeat `cprctl qemu save`"
                    " or `cprctl qemu start`: they ask that QEMU"
                ) from None
            await asyncio.sleep(0.1)
        except CprdError as error:
            if not _is_gone(daemon, prepared, name):
                raise InDoubt(f"{name}: cprd did not commit: {error}") from None
            await monitor.execute("cont")
            await settings.restore(monitor)
            raise Failed(
                f"cprd did not commit ({error}), and has nothing of it any more;"
                f" {describe(await monitor.status())}"
            ) from None


def _is_gone(daemon: Daemon, prepared: Prepared, name: str) -> bool:
    """Whether cprd itself answers that this generation is no more, and ends it if it can."""
    try:
        prepared.abort()
        return True
    except CprdError:
        pass
    try:
        row = daemon.show(name)
    except NotHeld:
        return True
    except CprdError:
        return False
    return bool(row["generation"] != prepared.generation)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__

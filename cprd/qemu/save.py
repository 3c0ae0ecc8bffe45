"""`cprctl qemu save`: a running QEMU's guest goes into a hold, and the QEMU quits.

The order, and what a failure (or kill -9 of this process) leaves at each place:

    take cpr      guest runs                     -> guest runs on
    take main     guest stopped, QEMU waits      -> guest runs on (QEMU resumes by itself)
    prepare       kept, never served             -> guest runs on, after a second at most
                                                    (a kill leaves the hold in doubt)
    SHUT(0)       QEMU completes                 -> in doubt until QEMU is asked
    completed     QEMU can resume only by `cont` -> in doubt; postmigrate says that it is good
    commit        held, once this QEMU has ended -> held
    quit          nobody runs                    -> held

A signal (interrupt.py) is a failure like any other up to SHUT(0), and waits from there on.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from cprd.errors import Busy, CprdError, NotHeld, Timeout, Unavailable
from cprd.linux.pause import point
from cprd.qemu import interrupt, stream
from cprd.qemu.check import KEPT, examine
from cprd.qemu.failure import (
    Failed,
    InDoubt,
    MonitorLost,
    MonitorRefused,
    NeverWhole,
    Refused,
)
from cprd.qemu.hold import LIVE, Origin, pack
from cprd.qemu.preparing import Away, Preparing
from cprd.qemu.private import PrivatePlace, remove_mark
from cprd.qemu.qmp import Monitor, socket_path
from cprd.qemu.record import Recorder, Settings, describe
from cprd.qemu.settle import end, end_predecessor, is_unfinished, look, owned_name, settle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cprd import Daemon, Prepared

TIMEOUT = 30.0  # s that QEMU may take for one step
TURNS = 3  # how often it is tried, when cprd was away for a moment
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
    for _ in range(TURNS - 1):
        try:
            return await _save(daemon, name, path, replace, timeout)
        except Away:
            continue
    return await _save(daemon, name, path, replace, timeout)


async def _save(daemon: Daemon, name: str, path: str, replace: bool, timeout: float) -> Kept:
    point("qemu-save:begin")
    with untouched():
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
        with untouched():
            interrupt.check()
        return await _hand_over(daemon, name, path, monitor, report.status, replace, timeout)
    finally:
        await monitor.close()


@contextmanager
def untouched() -> Iterator[None]:
    """A signal may end what is awaited in here, before anything was asked of the QEMU."""
    try:
        with interrupt.allowed():
            yield
    except interrupt.Interrupted as error:
        raise interrupt.Interrupted(f"{error}; the guest is in its QEMU as it was") from None


async def make_room(
    daemon: Daemon, name: str, path: str, *, replace: bool
) -> tuple[str, Kept | None]:
    """The hold's full name, after what lies there has been settled; a Kept when that is this very
    QEMU's, saved already by a helper that was killed."""
    monitor = await Monitor.connect(path)
    try:
        process = monitor.process
        name = owned_name(name, process.uid if process is not None else -1)
        await _drop_stale(daemon, monitor)
        row, origin = look(daemon, name)
        if row is None:
            if await monitor.status() == "postmigrate":
                raise Refused(_handed_over(path, name))
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
    if is_unfinished(row):
        try:
            await settle(daemon, name)
        except NeverWhole:
            return name, None
    if row["phase"] == "held" and replace:
        return name, None
    hint = "load it, drop it (cprctl drop), or save with --replace"
    if row["phase"] != "held":
        hint = "see cprctl show"
    raise Busy(
        f"{name!r} is held already ({row['phase']}: {row['reason'] or 'of another QEMU'}); {hint}."
        f" The guest is in its QEMU as before ({status})"
    )


async def _drop_stale(daemon: Daemon, monitor: Monitor) -> None:
    """What killed helpers left of this QEMU, under whatever name, is older than its guest's memory
    while that runs. Once it is handed over anew, nobody could tell the two any more."""
    process = monitor.process
    if process is None or await monitor.status() not in (*LIVE, "paused"):
        return
    for row in daemon.list():
        if row["phase"] != "in-doubt" or row.get("acting"):
            continue
        full = f"{row['uid']}/{row['name']}" if os.geteuid() == 0 else row["name"]
        _, origin = look(daemon, full)
        if origin is not None and origin.old == process.record():
            with suppress(NotHeld):
                daemon.drop(full, force=True)
            remove_mark(origin.untouched, row["uid"])


def _handed_over(path: str, name: str) -> str:
    """What to do with a guest in a QEMU that has handed it over, when cprd has nothing of it. (We
    do not `cont` it: that cprd holds nothing may as well mean that it runs elsewhere.)"""
    return (
        "the guest was handed over by this QEMU already (postmigrate), and nothing is held under"
        f" {name!r}. It is stopped there, whole. If you know that it runs in no other QEMU, and is"
        f" held nowhere (cprctl list), let it go on here, by `cont` at {path}; if it does run"
        " elsewhere, `quit` there"
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
    preparing: Preparing | None = None
    try:
        settings = await Settings.prepare(monitor)
        point("qemu-save:settings")
        try:
            interrupt.check()
            recorder = Recorder(monitor, place, timeout)
            monitor.forget_events()
            await recorder.take_cpr()
            point("qemu-save:cpr")
            with interrupt.allowed():
                await recorder.take_main()
                point("qemu-save:main")
            status = run_state(recorder.main, status)
            origin = Origin(
                version=monitor.version,
                qmp=path,
                status=status,
                machine=stream.machine(recorder.main),
                old=process.record(),
                uid=process.uid,
            )
            state = pack(bytes(recorder.tape.data), recorder.tape.fds, recorder.main, origin)
            how = "replace" if replace else "error"
            preparing = Preparing(
                daemon,
                name,
                process,
                lambda: daemon.prepare(name, state, if_exists=how, after_exit=process.pidfd),
            )
            prepared = preparing.answer()
            point("qemu-save:prepared")
            interrupt.hold_off()
            await complete(recorder, monitor, name)
        except InDoubt:
            raise
        except (CprdError, OSError) as error:
            rescued = await rescue(preparing, monitor)
            if rescued is None:
                raise await taken_back(error, recorder, preparing, settings, monitor) from error
            prepared = rescued
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


def run_state(main: bytearray, seen: str) -> str:
    """What the guest was doing when it was stopped, which may be another thing than when we looked
    (`seen`): its user may have paused it, its disk have failed. Raises Failed when nothing is worth
    keeping by now."""
    status = stream.run_state(main) or seen
    if status not in KEPT:
        raise Failed(f"the guest is {status!r} by now: there is nothing to keep")
    return status


async def taken_back(
    error: Exception,
    recorder: Recorder | None,
    preparing: Preparing | None,
    settings: Settings,
    monitor: Monitor,
) -> Failed:
    """Nothing was completed: let the guest go on, then see to what cprd may have of it. What is to
    be raised."""
    where = await take_back(recorder, settings, monitor)
    left = preparing.undo() if preparing is not None else ""
    again = preparing is not None and preparing.unanswered and not left
    return (Away if again else Failed)(f"{one_line(error)}; {where}{left}")


async def take_back(recorder: Recorder | None, settings: Settings, monitor: Monitor) -> str:
    """Leave the QEMU as it was found; where its guest is, in words."""
    try:
        status = await recorder.take_back() if recorder is not None else await monitor.status()
        await settings.restore(monitor)
        return describe(status)
    except CprdError as lost:
        if monitor.process is not None and await monitor.process.wait(1.0):
            return f"its QEMU (pid {monitor.process.pid}) has ended, and the guest with it"
        return f"its QEMU does not answer any more ({lost}), and was not told to give it up"


async def rescue(preparing: Preparing | None, monitor: Monitor) -> Prepared | None:
    """Something failed; but if this QEMU has ended since, and its guest stood to its end, what cprd
    was given is all that there is of it: that, if cprd has it."""
    if preparing is None or monitor.process is None or not monitor.process.ended():
        return None
    return preparing.late() if await monitor.rested() else None


async def complete(recorder: Recorder, monitor: Monitor, name: str) -> None:
    """SHUT(0), and QEMU's word that it has completed; or its end, without having let its guest run:
    then nobody can, and the state is as good. Raises Failed (to be taken back), InDoubt."""
    try:
        recorder.complete()
    except OSError as error:
        if await _has_rested(monitor):
            return
        raise Failed(f"QEMU hung up on its main channel ({error})") from None
    point("qemu-save:shut")
    try:
        came = await recorder.completed()
    except MonitorLost as error:
        if await _has_rested(monitor):
            return
        if monitor.process is not None and monitor.process.ended():
            raise Failed("QEMU let its guest run on in the last moment") from None
        raise InDoubt(
            f"{name}: its QEMU was told that the state is whole, and does not say what came of it"
            f" ({error}). The hold is in doubt: run `cprctl qemu save` or `start` again, they ask"
            " that QEMU"
        ) from None
    if came != "completed":
        raise Failed(f"QEMU's migration {came} in the last moment")


async def _has_rested(monitor: Monitor) -> bool:
    process = monitor.process
    return process is not None and await process.wait(1.0) and await monitor.rested()


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
            if not is_gone(daemon, prepared, name):
                raise InDoubt(f"{name}: cprd did not commit: {error}") from None
            raise Failed(
                f"cprd did not commit ({error}), and has nothing of it any more;"
                f" {await go_on(monitor, settings)}"
            ) from None


async def go_on(monitor: Monitor, settings: Settings) -> str:
    """`cont` to a QEMU that has completed, when cprd has answered that it has nothing of it; where
    the guest is then, in words."""
    try:
        await monitor.execute("cont")
    except MonitorRefused as refused:
        await settings.restore(monitor)
        return (
            f"the guest is stopped, whole, in its QEMU, which cannot run it either ({refused}): end"
            " what is in the way, then `cont` there"
        )
    except MonitorLost as lost:
        return f"its QEMU does not answer any more ({lost})"
    await settings.restore(monitor)
    try:
        return describe(await monitor.status())
    except CprdError as lost:
        return f"its QEMU does not answer any more ({lost})"


def is_gone(daemon: Daemon, prepared: Prepared, name: str) -> bool:
    """Whether cprd itself answers that this generation is no more, and ends it if it can."""
    try:
        prepared.abort()
        return True
    except (Unavailable, Timeout):
        return False
    except CprdError:
        pass
    try:
        row = daemon.show(name)
    except NotHeld:
        return True
    except CprdError:
        return False
    return bool(row["generation"] != prepared.generation)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__

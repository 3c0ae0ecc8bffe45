"""The helper of `cprctl qemu start`: claims, replays, and lets the guest run. See start.py."""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import cprd
from cprd.errors import Busy, CprdError, Damaged, NotHeld
from cprd.linux.pause import point
from cprd.qemu import interrupt, launch
from cprd.qemu.aside import aside
from cprd.qemu.failure import (
    Failed,
    InDoubt,
    MonitorGone,
    MonitorLost,
    MonitorRefused,
    NeverWhole,
    Refused,
)
from cprd.qemu.guard import Guard
from cprd.qemu.hold import LIVE, Held, Origin, is_unfinished
from cprd.qemu.private import PrivatePlace
from cprd.qemu.process import Process, readable
from cprd.qemu.replay import Replayer
from cprd.qemu.settle import force as force_it
from cprd.qemu.settle import full_name, settle
from cprd.qemu.supervisor import tell
from cprd.qemu.taken import refuse_taken
from cprd.qemu.version import forget

if TYPE_CHECKING:
    from cprd.qemu.command import Command
    from cprd.qemu.qmp import Monitor

LEASE = 30.0
GONE = "gone"  # instead of a run state: that QEMU has ended
KILLED = 10.0  # s that a killed QEMU may take to end


class Over(CprdError):
    """The state has been acted on, the hold has ended, and so has the guest."""


def helper(
    plumbing: launch.Plumbing,
    qemu: int,
    socket_path: str,
    name: str,
    command: Command,
    *,
    force: bool,
    timeout: float,
) -> int:
    """The whole of it; the helper's exit status, which nobody waits for."""
    process = Process.open(qemu)
    if process is None:
        return 1
    try:
        return interrupt.run(_help(plumbing, process, socket_path, name, command, force, timeout))
    except BaseException as error:
        from cprd.cli import exit_status

        status = exit_status(error) if isinstance(error, CprdError) else 1
        why = " ".join(str(error).split()) or type(error).__name__
        launch.say(plumbing.talk, fail=f"{name}: {why}", status=status)
        return 1


async def _help(
    plumbing: launch.Plumbing,
    process: Process,
    socket_path: str,
    name: str,
    command: Command,
    force: bool,
    timeout: float,
) -> int:
    with cprd.connect(socket_path) as daemon:
        point("qemu-start:connected")
        try:
            with interrupt.allowed():
                claim, forced = await claim_it(daemon, name, force=force)
        except NotHeld:
            launch.say(plumbing.talk, cold=True)
            return 0
        import qemu.qmp  # noqa: F401  (now, for QEMU's own start is what everybody waits for)

        try:
            point("qemu-start:claimed")
            refuse_taken(command)
            await _give(plumbing, process, claim, command, timeout)
        except (InDoubt, Over) as error:
            print(f"cprctl: {name}: {error}", file=sys.stderr)
            return 1
        except (CprdError, OSError) as error:
            why = " ".join(str(error).split()) or type(error).__name__
            forget(command)  # should it have been another version than we remembered
            if forced:
                why = f"{name}: {why}; it is in doubt as before: --force again, or drop it"
            else:
                try:
                    claim.reject(why)
                except CprdError as lost:
                    why += f" (and cprd was not told: {lost})"
                why = f"{name}: {why}; it is held as before"
            if not launch.say(plumbing.talk, fail=why, status=1):
                print(f"cprctl: {why}", file=sys.stderr)
            return 1
        finally:
            claim.close()
    return 0


async def claim_it(daemon: cprd.Daemon, name: str, *, force: bool) -> tuple[cprd.Claim, bool]:
    """Claim NAME, after settling what a killed helper left; and whether that took force: then it
    has begun to be acted on already, so that it is in doubt again, whatever comes of us.

    Raises NotHeld (cold is right), Busy."""
    name = full_name(daemon, name)
    try:
        if not (force and await force_it(daemon, name)):
            return await _claim(daemon, name), False
    except NeverWhole as gone:
        print(f"cprctl: {gone}", file=sys.stderr)
        return daemon.load(name, lease=LEASE), False  # NotHeld, by cprd's own word
    daemon.release(name, force=True)
    claim = daemon.load(name, wait=2.0, lease=LEASE)
    try:
        claim.begin()
    except BaseException:
        claim.close()
        raise
    return claim, True


async def _claim(daemon: cprd.Daemon, name: str) -> cprd.Claim:
    try:
        claim = daemon.load(name, lease=LEASE)
        if is_unfinished(claim.state):
            claim.reject("its QEMU ended before its state was whole")
            claim.close()
            raise Busy("what an upgrade left is not whole")
        if not _still_there(claim):
            return claim
        claim.reject("the QEMU that it was saved from has not ended yet")
        claim.close()
        raise Busy("a QEMU that an upgrade left has not ended yet")
    except Busy as busy:
        try:
            return await _after_settling(daemon, name)
        except NeverWhole:
            raise
        except NotHeld:
            # It was held when we came: who had it runs it, or has dropped it. Not for us to boot.
            raise Busy(f"{busy}; it went away meanwhile: look, and try again") from None


async def _after_settling(daemon: cprd.Daemon, name: str) -> cprd.Claim:
    settled = await settle(daemon, name)
    if settled.runs is not None:
        raise Busy(
            f"nothing to start: {settled.said}; what was held under {name!r} was older than"
            " that guest and has been dropped"
        )
    if settled.said:
        print(f"cprctl: {name}: {settled.said}", file=sys.stderr)
    return daemon.load(name, wait=2.0, lease=LEASE)


def _still_there(claim: cprd.Claim) -> bool:
    """Whether a QEMU of a killed upgrade lives: its hold is served before the old one has ended."""
    try:
        origin = Origin.read(claim.state["qemu"])
    except (KeyError, Damaged):
        return False  # said later
    for record in (origin.old, origin.new):
        process = Process.find(record)
        if process is not None:
            process.close()
            return True
    return False


async def _give(
    plumbing: launch.Plumbing,
    process: Process,
    claim: cprd.Claim,
    command: Command,
    timeout: float,
) -> None:
    """Everything between claim and confirm. After an exception other than InDoubt the new QEMU has
    ended, and nothing was acted on."""
    held = Held(claim.state)
    with interrupt.allowed():
        if not await readable(plumbing.talk.fileno(), 30.0):
            raise Refused("the QEMU command with -version does not end")
    word = launch.hear(plumbing.talk) or {"no_version": "the starting process ended"}
    if "no_version" in word:
        raise Refused(word["no_version"])
    version = tuple(word["version"])
    pieces = list(held.stream(version).pieces())
    place = PrivatePlace(command.monitor_path() or held.origin.qmp, held.origin.uid)
    guard = Guard.fork(plumbing.said, process.pidfd)
    plumbing.said = -1
    replayer = Replayer(process, plumbing.main, plumbing.monitor, timeout)
    renewing = Renewing(claim)
    try:
        launch.say(plumbing.talk, go=True, place=place.path, version=list(version), guard=guard.pid)
        point("qemu-start:go")
        with interrupt.allowed():
            await replayer.connect_cpr(place.at("cpr"))
            place.close()
            point("qemu-start:listening")
            await replayer.send_cpr(pieces)
            point("qemu-start:cpr")
            sending = asyncio.ensure_future(replayer.send_main(held.main))
            try:
                await replayer.end_cpr()
                await sending
                point("qemu-start:main")
                monitor = await replayer.greet()
                await replayer.loaded()
            finally:
                sending.cancel()
            point("qemu-start:loaded")
        interrupt.hold_off()
        await renewing.stop()
        await _run(claim, monitor, process, guard, held.origin.status)
    except (InDoubt, Over):
        raise
    except BaseException as error:
        await _end(process, replayer.monitor, claim, renewing, guard, error)
        said = guard.said()
        if isinstance(error, CprdError | OSError) and said:
            raise Failed(f"{error}: {said}") from error
        raise
    finally:
        await renewing.stop()
        guard.close()
        place.close()
        await replayer.close()


async def _end(
    process: Process,
    monitor: Monitor | None,
    claim: cprd.Claim,
    renewing: Renewing,
    guard: Guard,
    error: BaseException,
) -> None:
    """End the new QEMU, so that what is held can be given back. Raises InDoubt when that is not
    known to be right: the hold is in doubt then, as far as cprd can be told."""
    if await has_run(monitor):
        guard.disarm()
        why = (
            f"{error}; somebody else let the guest run, by another monitor of the new QEMU (pid"
            f" {process.pid}): it is left alone. The hold is in doubt until that QEMU is saved"
        )
    else:
        process.kill()
        if await process.wait(KILLED):
            return
        why = (
            f"{error}; the new QEMU (pid {process.pid}) does not end, not even by SIGKILL: look at"
            " what it waits for. The hold is in doubt; when that process has ended, use --force"
        )
    await renewing.stop()
    try:
        claim.begin(process.pidfd)
    except CprdError as lost:
        why += f" (and cprd was not told: {lost})"
    raise InDoubt(why) from error


async def _run(
    claim: cprd.Claim, monitor: Monitor, process: Process, guard: Guard, status: str
) -> None:
    """begin, cont, confirm. Raises InDoubt when nobody can say whether the guest runs."""
    claim.begin(process.pidfd)
    point("qemu-start:begun")
    guard.disarm()
    point("qemu-start:disarmed")
    if process.ended():
        raise Failed("the new QEMU ended before it was told to run its guest")
    now = await let_run(monitor, process) if status in LIVE else status
    point("qemu-start:running")
    await confirm(claim)
    point("qemu-start:confirmed")
    if now == GONE:
        raise Over("the new QEMU ended right after its guest had gone on, and the guest with it")
    if now not in LIVE and status in LIVE:
        print(f"cprctl: the guest went on, and is {now!r} since", file=sys.stderr)
    tell("READY=1\nSTATUS=The guest goes on.")


async def let_run(monitor: Monitor, process: Process) -> str:
    """`cont`; the run state that came of it, GONE when this QEMU has ended since.

    An answered error means that the guest does not run, and never did: MonitorRefused, Failed. Once
    `cont` is answered there is no way back, whatever the run state is a moment later: a full disk
    or somebody's `stop` may have stopped the guest again, but it has run. InDoubt: no answer."""
    try:
        await monitor.execute_at_once("cont")
    except MonitorGone as error:
        raise Failed(f"the new QEMU ended before it was told to run its guest ({error})") from None
    except MonitorLost as error:
        raise InDoubt(
            f"the new QEMU (pid {process.pid}) was told to run its guest and did not answer"
            f" ({error}); the hold is in doubt until that QEMU is saved, or released by force"
        ) from None
    point("qemu:cont")
    try:
        return await monitor.status()
    except MonitorLost:
        return GONE if await process.wait(2.0) else "unknown"
    except MonitorRefused:
        return "unknown"


async def has_run(monitor: Monitor | None) -> bool:
    """Whether a guest that was not told to has run all the same: COMMAND's own monitor is open to
    others from the start, and one of them may have said `cont`."""
    if monitor is None:
        return False
    with suppress(CprdError):  # what came before its answer has been read then
        await monitor.execute("query-status", 1.0)
    return monitor.has_seen("RESUME")


async def confirm(claim: cprd.Claim) -> None:
    """The guest runs: what was held must never be served again. Tries for a while if cprd is away;
    until it succeeds the hold is in doubt, which nobody serves."""
    loop = asyncio.get_running_loop()
    until = loop.time() + 60.0
    while True:
        try:
            claim.confirm()
            return
        except (cprd.Unavailable, cprd.Timeout) as error:
            if loop.time() > until or interrupt.came():
                raise InDoubt(
                    f"the guest runs, and cprd could not be told ({error}): the hold stays in doubt"
                    " until this QEMU is saved; drop it by force if you like"
                ) from None
            await asyncio.sleep(0.2)
        except CprdError as error:
            raise InDoubt(f"the guest runs, and cprd says: {error}") from None


class Renewing:
    """Keeps a claim's lease from ending while the new QEMU loads. It asks in a thread, so that a
    cprd that does not answer delays nothing else, and again when it fails: should the claim be lost
    all the same, `begin` will say so."""

    def __init__(self, claim: cprd.Claim) -> None:
        self._claim = claim
        self._asking: asyncio.Future[float] | None = None
        self._task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        pause = LEASE / 3
        while True:
            await asyncio.sleep(pause)
            self._asking = aside(self._claim.renew)
            await asyncio.wait({self._asking})
            failure = self._asking.exception()
            if isinstance(failure, cprd.Fenced):
                return
            pause = LEASE / 3 if failure is None else 1.0

    async def stop(self) -> None:
        """Afterwards the claim is free for other requests."""
        self._task.cancel()
        if self._asking is not None and not self._asking.done():
            await asyncio.wait({self._asking})

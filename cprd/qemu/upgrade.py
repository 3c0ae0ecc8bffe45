"""`cprctl qemu upgrade`: old and new QEMU overlap, and the guest stands still for a few milliseconds.

The order, and no other (docs/qemu.md says what each line is there for):

    new QEMU starts, stopped (-S), and waits              the guest runs in the old one
    old: migrate; CPR stream forwarded, checked, ended
    new: devices made, monitor answers                    from here on new is known to be good
    hang up on old's CPR channel                          old stops the guest
    main stream forwarded and stored, each piece at once
    prepare in cprd; only then new gets the last byte     a kill before: new dies, old resumes
    new: SHUT(0), it has loaded
    SHUT(0) to old, old says completed                    from here on old cannot resume by itself
    commit, claim, begin                                  a kill before begin: `start` finishes it
    cont, new runs                                        a kill: in doubt, until new is saved
    old quits, confirm
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from cprd.errors import CprdError
from cprd.pause import point
from cprd.qemu import launch, stream
from cprd.qemu.check import about_command_line, examine
from cprd.qemu.failure import Failed, InDoubt, MonitorLost, Refused
from cprd.qemu.guard import Guard
from cprd.qemu.hold import LIVE, Origin, pack
from cprd.qemu.overlap import SharedPaths
from cprd.qemu.private import PrivatePlace
from cprd.qemu.process import Process
from cprd.qemu.qmp import Monitor, event_is, socket_path, stamp
from cprd.qemu.record import Recorder, Settings, describe
from cprd.qemu.replay import Replayer
from cprd.qemu.resume import LEASE, confirm
from cprd.qemu.save import commit, complete, make_room, take_back
from cprd.qemu.settle import end
from cprd.qemu.supervisor import succeed
from cprd.qemu.version import version_of
from cprd.qemu.voice import onward

if TYPE_CHECKING:
    from cprd import Claim, Daemon
    from cprd.qemu.command import Command

TIMEOUT = 30.0


class Upgraded:
    """`pid` of the new QEMU, the guest's run state, and how long it stood still."""

    def __init__(self, pid: int, status: str, seconds: float | None) -> None:
        self.pid = pid
        self.status = status
        self.seconds = seconds

    @property
    def pause(self) -> str:
        return (
            "no time (it was not running)"
            if self.seconds is None
            else f"{self.seconds * 1e3:.1f} ms"
        )


async def upgrade(
    daemon: Daemon, name: str, qmp: str, command: Command, *, timeout: float = TIMEOUT
) -> Upgraded:
    """Move the guest of the QEMU at `qmp` into a new one. Returns when it runs there.

    Raises Refused or Failed (the guest is in the old QEMU as before), InDoubt, Busy."""
    path = os.path.abspath(socket_path(qmp))
    point("qemu-upgrade:begin")
    conflicts, _ = about_command_line(command.words[command.program :])
    if conflicts:
        raise Refused(f"cannot overlap: {'; '.join(conflicts)}")
    version = version_of(command)
    name, kept = await make_room(daemon, name, path, replace=False)
    if kept is not None:
        raise Failed(f"{name} is held now ({kept.said}): go on with `cprctl qemu start`")
    old = await Monitor.connect(path)
    try:
        if old.process is None:
            raise Refused(f"the process behind {path} cannot be seen (another pid namespace)")
        report = await examine(old)
        if report.problems:
            raise Refused(f"this VM cannot be handed over: {'; '.join(report.problems)}")
        point("qemu-upgrade:connected")
        move = _Move(daemon, name, path, command, version, old, report.status, timeout)
        try:
            return await move.run()
        finally:
            await move.close()
    finally:
        await old.close()


class _Move:
    """One upgrade. Owns all that is made on the way."""

    def __init__(
        self,
        daemon: Daemon,
        name: str,
        path: str,
        command: Command,
        version: tuple[int, ...],
        old: Monitor,
        status: str,
        timeout: float,
    ) -> None:
        assert old.process is not None
        self.daemon = daemon
        self.name = name
        self.path = path
        self.command = command
        self.version = version
        self.old = old
        self.old_process = old.process
        self.status = status
        self.timeout = timeout
        self.shared = SharedPaths(found for _, found in command.listening())
        self.place = PrivatePlace(path, old.process.uid)
        self.new_place = PrivatePlace(command.monitor_path() or path, old.process.uid)
        self.plumbing = launch.Plumbing()
        self.recorder: Recorder | None = None
        self.replayer: Replayer | None = None
        self.new: Process | None = None
        self.guard: Guard | None = None

    async def run(self) -> Upgraded:
        settings = await Settings.prepare(self.old)
        self.shared.before_new()
        try:
            await self._prepare_new()
            await self._forward()
        except (CprdError, OSError) as error:
            failure = await self._give_up_new(error)
            await take_back(self.recorder, settings, self.old, failure)
        assert self.recorder is not None
        try:
            await complete(self.recorder, self.prepared, settings, self.old, self.name)
        except (Failed, InDoubt) as error:
            failure = await self._give_up_new(error)
            raise failure from None
        point("qemu-upgrade:completed")
        return await self._finish(settings)

    async def _prepare_new(self) -> None:
        """The new QEMU, waiting, with the CPR state; the old one's guest runs."""
        self._fork()
        point("qemu-upgrade:forked")
        assert self.new is not None
        stderr = onward(self.old_process, 2)
        self.guard = Guard.fork(self.plumbing.said, self.new.pidfd, stderr, self.shared.give_back)
        os.close(stderr)
        self.plumbing.said = -1
        launch.say(
            self.plumbing.talk,
            go=True,
            place=self.new_place.path,
            version=list(self.version),
            guard=self.guard.pid,
        )
        self.replayer = Replayer(self.new, self.plumbing.main, self.plumbing.monitor, self.timeout)
        await self.replayer.connect_cpr(self.new_place.at("cpr"))
        point("qemu-upgrade:listening")
        self.recorder = Recorder(self.old, self.place, self.timeout)
        self.old.forget_events()
        await self.recorder.take_cpr()
        point("qemu-upgrade:cpr")
        await self.replayer.send_cpr(self._pieces())
        await self.replayer.end_cpr()
        self.monitor = await self.replayer.greet()
        if (now := await self.monitor.status()) != "inmigrate":
            raise Failed(f"the new QEMU is {now!r} where it should wait for its state")
        # New is good, as far as one can know without the guest's state. Nothing has stopped yet.
        point("qemu-upgrade:ready")

    def _pieces(self) -> list[tuple[bytes, int]]:
        from cprd import cpr

        assert self.recorder is not None
        state = self.recorder.state
        if self.version < (10, 2):
            state = cpr.downgrade(state)
        return list(cpr.encode(state).pieces())

    async def _forward(self) -> None:
        """The guest stops; its state goes to the new QEMU, and is kept."""
        assert self.recorder is not None
        assert self.replayer is not None
        assert self.new is not None
        recorder, replayer = self.recorder, self.replayer
        replayer.restart_clock()
        await recorder.take_main(replayer.send_main)
        point("qemu-upgrade:main")
        origin = Origin(
            version=self.old.version,
            qmp=self.path,
            status=self.status,
            machine=stream.machine(recorder.main),
            old=self.old_process.record(),
            new=self.new.record(),
            uid=self.old_process.uid,
        )
        tape = recorder.tape
        # No after_exit: we are to claim it ourselves while the old QEMU still lives. Whoever else
        # does, after our death, asks that QEMU first (settle.py).
        self.prepared = self.daemon.prepare(
            self.name, pack(bytes(tape.data), tape.fds, recorder.main, origin)
        )
        point("qemu-upgrade:prepared")
        try:
            await replayer.send_main(recorder.main[-1:])
            await replayer.loaded()
            point("qemu-upgrade:loaded")
        except BaseException:
            self.prepared.abort()
            raise

    async def _finish(self, settings: Settings) -> Upgraded:
        """The old QEMU cannot resume any more: whatever fails now, the state is held or in doubt."""
        assert self.new is not None
        assert self.guard is not None
        await self._committed(settings)
        point("qemu-upgrade:committed")
        try:
            claim = self.daemon.load(self.name, lease=LEASE)
        except CprdError as error:
            raise await self._roll_back(error, settings) from None
        try:
            return await self._let_run(claim, settings)
        finally:
            claim.close()

    async def _committed(self, settings: Settings) -> None:
        try:
            await commit(self.daemon, self.prepared, self.old, settings, self.name)
        except CprdError as error:
            raise await self._give_up_new(error) from None

    async def _let_run(self, claim: Claim, settings: Settings) -> Upgraded:
        assert self.new is not None
        assert self.guard is not None
        try:
            if claim.generation != self.prepared.generation:
                raise Failed("somebody else saved under this name meanwhile")
            point("qemu-upgrade:claimed")
            claim.begin(self.new.pidfd)
        except CprdError as error:
            await self._give_up_new(error)
            claim.reject(str(error))
            raise await self._roll_back(error, settings) from None
        point("qemu-upgrade:begun")
        self.guard.disarm()
        point("qemu-upgrade:disarmed")
        if self.status in LIVE:
            try:
                await self.monitor.execute("cont")
                if (now := await self.monitor.status()) not in LIVE:
                    raise Failed(f"the new QEMU answered cont, and is {now!r}")
            except MonitorLost as error:
                raise InDoubt(
                    f"the new QEMU (pid {self.new.pid}) was told to run its guest and did not"
                    f" answer ({error}); the hold is in doubt"
                ) from None
            except CprdError as error:
                failure = await self._give_up_new(error)
                claim.reject(str(failure))
                raise await self._roll_back(failure, settings) from None
        point("qemu-upgrade:running")
        pause = await self._pause()
        try:
            succeed(self.new.pid, "The guest goes on in a new QEMU.")
        except (CprdError, OSError) as error:
            print(f"cprctl: the service manager was not told: {error}", file=sys.stderr)
        self.shared.before_quit()
        await end(self.old, self.old_process)
        self.shared.after_quit()
        point("qemu-upgrade:ended")
        # Last, so that as long as the old QEMU is left, something held says whose it is.
        await confirm(claim)
        point("qemu-upgrade:confirmed")
        return Upgraded(self.new.pid, self.status, pause)

    async def _pause(self) -> float | None:
        """How long the guest stood still, by the clocks of both QEMUs."""
        if self.status not in LIVE:
            return None
        try:
            stopped = await self.old.event(event_is("STOP"), 1.0)
            resumed = await self.monitor.event(event_is("RESUME"), 1.0)
        except MonitorLost:
            return None
        return stamp(resumed) - stamp(stopped)

    async def _give_up_new(self, error: Exception) -> CprdError:
        """End the new QEMU, give the old one its paths back; the error with what the new one said."""
        if self.new is not None:
            self.new.kill()
            await self.new.wait(10.0)
        said = self.guard.said() if self.guard is not None else ""
        self.guard = None
        self.shared.give_back()
        text = " ".join(str(error).split()) + (f": {said}" if said else "")
        return type(error)(text) if isinstance(error, InDoubt) else Failed(text)

    async def _roll_back(self, error: Exception, settings: Settings) -> CprdError:
        """Committed, and not acted on: the new QEMU has to go, and the old one goes on, if cprd says
        that the hold is dropped; else it stays held."""
        failure = await self._give_up_new(error)
        try:
            self.daemon.drop(self.name)
            await self.old.execute("cont")
            await settings.restore(self.old)
            where = describe(await self.old.status())
        except CprdError as kept:
            where = (
                f"the guest is stopped, and held under {self.name!r} ({kept}): go on with"
                " `cprctl qemu start`"
            )
        return Failed(f"{failure}; {where}")

    def _fork(self) -> None:
        """Twice, so that the new QEMU is nobody's child when we end. It waits for its word."""
        plumbing = self.plumbing
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            try:
                if os.fork() == 0:
                    os.setsid()
                    launch.say(plumbing.talk_qemu, pid=os.getpid())
                    plumbing.keep_qemus()
                    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                    os.dup2(onward(self.old_process, 1), 1)
                    word = launch.hear(plumbing.talk_qemu)
                    if word is not None and "go" in word:
                        failure = launch.execute(self.command, plumbing, word)
                        what = f"{self.command.words[0]}: {failure.strerror}\n"
                        os.write(plumbing.said_qemu, what.encode())
            finally:
                os._exit(1)
        os.waitpid(child, 0)
        word = launch.hear(plumbing.talk)
        plumbing.keep_ours()
        self.new = Process.open(word["pid"]) if word else None
        if self.new is None:
            raise Failed("the new QEMU's process ended before it began")

    async def close(self) -> None:
        if self.guard is not None:
            self.guard.close()
        if self.replayer is not None:
            await self.replayer.close()
        if self.recorder is not None:
            self.recorder.close()
        self.plumbing.close()
        self.place.close()
        self.new_place.close()
        if self.new is not None:
            self.new.close()

"""`cprctl qemu upgrade`: old and new QEMU overlap, and the guest stands still for a few
milliseconds.

The order, and no other (docs/qemu.md says what each line is there for):

    new QEMU starts, stopped (-S), and waits              the guest runs in the old one
    old: migrate; CPR stream forwarded, checked, ended
    new: devices made, monitor answers                    from here on new is known to be good
    prepare in cprd, all but the main stream              a kill from here on: in doubt, and new
                                                          is ended; old is asked, and runs on
    hang up on old's CPR channel                          old stops the guest
    main stream forwarded and stored, each piece at once, then sealed: what is prepared is whole
    new: SHUT(0), it has loaded
    SHUT(0) to old, old says completed                    a kill: `start` finishes it
    the mark goes                                         a kill: in doubt
    cont, new runs                                        the same, until new is saved
    old quits, what was prepared is forgotten
"""

from __future__ import annotations

import asyncio
import fcntl
import gc
import json
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from cprd.errors import CprdError, Fenced, Timeout, Unavailable
from cprd.linux.memfd import SEALS
from cprd.linux.pause import point
from cprd.linux.stdio import flush
from cprd.qemu import interrupt, launch, stream
from cprd.qemu.check import about_command_line, examine
from cprd.qemu.failure import Failed, InDoubt, MonitorLost, Refused
from cprd.qemu.guard import Guard
from cprd.qemu.hold import FILM, LIVE, Origin, pack
from cprd.qemu.overlap import SharedPaths
from cprd.qemu.preparing import STANDING, Away, Preparing
from cprd.qemu.private import MARK, PrivatePlace
from cprd.qemu.process import Process
from cprd.qemu.qmp import Monitor, event_is, machine_type, socket_path, stamp
from cprd.qemu.record import Recorder, Settings
from cprd.qemu.replay import Replayer
from cprd.qemu.resume import GONE, KILLED, has_run, let_run
from cprd.qemu.save import (
    TURNS,
    commit,
    complete,
    go_on,
    is_gone,
    make_room,
    one_line,
    rescue,
    run_state,
    take_back,
    untouched,
)
from cprd.qemu.settle import end
from cprd.qemu.supervisor import succeed
from cprd.qemu.version import version_of
from cprd.qemu.voice import onward

if TYPE_CHECKING:
    from cprd import Daemon, Prepared
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
    for _ in range(TURNS - 1):
        try:
            return await _upgrade(daemon, name, path, command, version, timeout)
        except Away:
            continue
    return await _upgrade(daemon, name, path, command, version, timeout)


async def _upgrade(
    daemon: Daemon,
    name: str,
    path: str,
    command: Command,
    version: tuple[int, ...],
    timeout: float,
) -> Upgraded:
    with untouched():
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
        with untouched():
            interrupt.check()
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
        also = (found for _, found in command.listening())
        self.shared = SharedPaths(old.process.pid, command.words, also)
        self.place = PrivatePlace(path, old.process.uid)
        self.new_place = PrivatePlace(command.monitor_path() or path, old.process.uid)
        self.mark = os.path.join(self.place.path, MARK)
        self.plumbing = launch.Plumbing()
        self.recorder: Recorder | None = None
        self.replayer: Replayer | None = None
        self.new: Process | None = None
        self.guard: Guard | None = None
        self.preparing: Preparing | None = None
        self.film = -1  # the memfd in what is prepared that gets the main stream
        self.is_whole = False  # it has all of it
        self.keep_mark = False  # what was prepared may be left, and nobody has acted on it

    async def run(self) -> Upgraded:
        settings = await Settings.prepare(self.old)
        try:
            interrupt.check()
            await self._prepare_new()
            with interrupt.allowed():
                await self._forward()
            interrupt.hold_off()
            assert self.recorder is not None
            await complete(self.recorder, self.old, self.name)
        except InDoubt as error:
            self.keep_mark = True  # for whoever asks the old QEMU next
            raise await self._give_up_new(error) from None
        except (CprdError, OSError) as error:
            raise await self._back(error, settings) from error
        point("qemu-upgrade:completed")
        return await self._finish(settings)

    async def _back(self, error: Exception, settings: Settings) -> CprdError:
        """Before `completed`: the guest goes on in the old QEMU, at once; the rest comes later."""
        if self.new is not None:
            self.new.kill()
            await self.new.wait(STANDING)  # it may have the images, which the old one takes back
        prepared = await self._rescue()
        if prepared is not None:
            failure = await self._give_up_new(error)
            if isinstance(failure, InDoubt):
                return failure
            return await self._hold(prepared, settings, failure)
        where = await take_back(self.recorder, settings, self.old)
        failure = await self._give_up_new(error)
        left = self.preparing.undo() if self.preparing is not None else ""
        self.keep_mark = bool(left)
        again = self.preparing is not None and self.preparing.unanswered and not left
        return (Away if again else Failed)(f"{failure}; {where}{left}")

    async def _rescue(self) -> Prepared | None:
        return await rescue(self.preparing, self.old) if self.is_whole else None

    async def _hold(self, prepared: Prepared, settings: Settings, failure: CprdError) -> CprdError:
        """Both QEMUs have ended, and neither has run the guest since its state was taken."""
        try:
            await commit(self.daemon, prepared, self.old, settings, self.name)
        except Failed:  # a cprd that keeps it in memory was restarted; we have all of it still
            assert self.preparing is not None
            if prepared.kept != "memory":
                raise
            await commit(self.daemon, self.preparing.again(), self.old, settings, self.name)
        return Failed(
            f"{failure}; the old QEMU has ended, too. The guest is held, whole, under {self.name}:"
            " go on with `cprctl qemu start`"
        )

    async def _prepare_new(self) -> None:
        """The new QEMU, waiting, with the CPR state; the old one's guest runs."""
        self._fork()
        point("qemu-upgrade:forked")
        assert self.new is not None
        stderr = onward(self.old_process, 2)
        self.guard = Guard.fork(
            self.plumbing.said,
            self.new.pidfd,
            stderr,
            old=self.old_process.pidfd,
            shared=self.shared,
        )
        os.close(stderr)
        self.plumbing.said = -1
        point("qemu-upgrade:guarded")
        self.shared.before_new()  # the guard undoes it, should we be killed
        point("qemu-upgrade:named")
        launch.say(
            self.plumbing.talk,
            go=True,
            place=self.new_place.path,
            version=list(self.version),
            guard=self.guard.pid,
        )
        self.replayer = Replayer(self.new, self.plumbing.main, self.plumbing.monitor, self.timeout)
        with interrupt.allowed():
            await self.replayer.connect_cpr(self.new_place.at("cpr"))
            point("qemu-upgrade:listening")
        self.recorder = Recorder(self.old, self.place, self.timeout)
        self.old.forget_events()
        await self.recorder.take_cpr()
        point("qemu-upgrade:cpr")
        with interrupt.allowed():
            await self.replayer.send_cpr(self._pieces())
            await self.replayer.end_cpr()
            self.monitor = await self.replayer.greet()
        if (now := await self.monitor.status()) != "inmigrate":
            raise Failed(f"the new QEMU is {now!r} where it should wait for its state")
        self.shared.new_listens()
        self.place.create(MARK, json.dumps(self.old_process.record()))
        await self._prepare_hold()
        # New is good, as far as one can know without the guest's state. Nothing has stopped yet.
        point("qemu-upgrade:ready")

    async def _prepare_hold(self) -> None:
        """Prepare everything in cprd while the guest runs; the main stream is to go into a memfd in
        it, which is whole once it is sealed. So cprd is not asked while the guest stands still, and
        a refusal costs nothing."""
        assert self.recorder is not None
        tape = self.recorder.tape
        self.film = os.memfd_create(FILM, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        origin = self._origin(await machine_type(self.old))
        state = pack(bytes(tape.data), tape.fds, self.film, origin)
        self.preparing = Preparing(
            self.daemon,
            self.name,
            self.old_process,
            lambda: self.daemon.prepare(self.name, state, after_exit=self.old_process.pidfd),
        )
        self.prepared = self.preparing.answer()
        point("qemu-upgrade:prepared")
        stream.is_whole(b"{}")  # (the first time takes longer)
        stream.run_state(b"")

    def _origin(self, machine: str) -> Origin:
        assert self.new is not None
        return Origin(
            version=self.old.version,
            qmp=self.path,
            status=self.status,
            machine=machine,
            old=self.old_process.record(),
            new=self.new.record(),
            uid=self.old_process.uid,
            untouched=self.mark,
        )

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
        gc.disable()  # a collection takes a millisecond or two, and the guest stands from here
        replayer.restart_clock()
        await recorder.take_main(self._piece)
        point("qemu-upgrade:main")
        self.status = run_state(recorder.main, self.status)
        fcntl.fcntl(self.film, fcntl.F_ADD_SEALS, SEALS)
        self.is_whole = True
        point("qemu-upgrade:whole")
        await self.old.catch_up()  # it is for the new QEMU to do now
        await replayer.loaded()
        point("qemu-upgrade:loaded")
        assert self.preparing is not None
        if not self.old_process.ended():  # else there is nothing to go back to: see complete()
            self.preparing.check()

    async def _piece(self, data: bytes) -> None:
        assert self.replayer is not None
        await self.replayer.send_main(data)
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self.film, rest) :]

    async def _finish(self, settings: Settings) -> Upgraded:
        """The old QEMU has completed. What was prepared is never served; whether it may be after
        our death is told by the untouched mark, which goes before the new QEMU may run."""
        assert self.new is not None
        assert self.guard is not None
        self.place.remove(MARK)
        self.guard.disarm()
        point("qemu-upgrade:disarmed")
        now = await self._let_run(settings) if self.status in LIVE else self.status
        point("qemu-upgrade:running")
        pause = await self._pause()
        if now != GONE:
            try:
                succeed(self.new.pid, "The guest goes on in a new QEMU.")
            except (CprdError, OSError) as error:
                print(f"cprctl: the service manager was not told: {error}", file=sys.stderr)
        point("qemu-upgrade:succeeded")
        await end(self.old, self.old_process)
        point("qemu-upgrade:quit")
        self.shared.old_has_ended()  # the guard does it too, and without us
        point("qemu-upgrade:ended")
        await self._forget()
        point("qemu-upgrade:forgotten")
        if now == GONE:
            raise Failed(
                "the new QEMU ended right after its guest had gone on in it, and the guest with"
                " it: boot it anew"
            )
        return Upgraded(self.new.pid, now, pause)

    async def _let_run(self, settings: Settings) -> str:
        assert self.new is not None
        try:
            if self.new.ended():
                raise Failed("the new QEMU ended before it was told to run its guest")
            return await let_run(self.monitor, self.new)
        except InDoubt:
            raise
        except CprdError as error:
            if await has_run(self.monitor):
                raise InDoubt(
                    f"{error}; but somebody else let the guest run, by another monitor of the new"
                    f" QEMU (pid {self.new.pid}): it is left alone"
                ) from None
            failure = await self._give_up_new(error)
            if isinstance(failure, InDoubt):
                raise failure from None
            prepared = await self._rescue()
            if prepared is not None:
                raise await self._hold(prepared, settings, failure) from None
            with suppress(OSError):
                # It never ran, and has ended.
                self.place.create(MARK, json.dumps(self.old_process.record()))
            if not is_gone(self.daemon, self.prepared, self.name):
                self.keep_mark = True
                raise InDoubt(
                    f"{failure}; cprd does not answer, so that the old QEMU (pid"
                    f" {self.old_process.pid}) was not told to go on. The guest is stopped, whole,"
                    " in it; once cprd runs, repeat `cprctl qemu save` or `cprctl qemu start`:"
                    " they ask that QEMU"
                ) from None
            raise Failed(f"{failure}; {await go_on(self.old, settings)}") from None

    async def _forget(self) -> None:
        """The guest runs elsewhere now. Until cprd knows, the hold is prepared or in doubt, which
        nobody serves."""
        loop = asyncio.get_running_loop()
        until = loop.time() + 60.0
        while True:
            try:
                self.prepared.abort()
                return
            except Fenced:
                return  # it is gone already: a cprd that keeps its holds in memory was restarted
            except (Unavailable, Timeout) as error:
                if loop.time() > until or interrupt.came():
                    raise InDoubt(
                        f"the guest runs, and cprd could not be told ({error}): the hold stays in"
                        " doubt until this QEMU is saved; drop it by force if you like"
                    ) from None
                await asyncio.sleep(0.2)

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
        """End the new QEMU, give the old one its paths back; the error with what it said. InDoubt
        when it does not end."""
        said = ""
        ended = True
        if self.new is not None:
            self.new.kill()
            ended = await self.new.wait(KILLED)
            if not ended:
                said = (
                    f". The new QEMU (pid {self.new.pid}) does not end, not even by SIGKILL: look"
                    " at what it waits for"
                )
        if ended and self.guard is not None:
            said = self.guard.said()
            said = f": {said}" if said else ""
        if self.guard is not None:
            self.guard.close()
        self.guard = None
        self.shared.give_back()
        text = one_line(error) + said
        if isinstance(error, InDoubt):
            return type(error)(text)
        return Failed(text) if ended else InDoubt(text)

    def _fork(self) -> None:
        """Twice, so that the new QEMU is nobody's child when we end. It waits for its word."""
        plumbing = self.plumbing
        flush()
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
        self.shared.close()
        self.place.close(keep=MARK if self.keep_mark else "")
        self.new_place.close()
        if self.film >= 0:
            os.close(self.film)
            self.film = -1
        if self.new is not None:
            self.new.close()

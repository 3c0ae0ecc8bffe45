"""`cprctl qemu upgrade`: old and new QEMU overlap, and the guest stands still for a few
milliseconds.

The order, and no other (docs/qemu.md has the reason of each line):

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

import fcntl
import json
import os
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from cprd.errors import CprdError, Fenced
from cprd.linux.memfd import SEALS
from cprd.linux.pause import point
from cprd.linux.stdio import flush
from cprd.qemu import inventory, servers, signals, spawn, stream
from cprd.qemu.command import missing
from cprd.qemu.disks import without_times
from cprd.qemu.doubt import make_room
from cprd.qemu.errors import Failed, InDoubt, MonitorLost, Refused, one_line
from cprd.qemu.examine import about_command_line, examine
from cprd.qemu.handover import STANDING, Handover, repeated, untouched
from cprd.qemu.hold import LIVE, MAIN_KEY, Origin, pack, pieces
from cprd.qemu.inventory import Inventory, refuse_another
from cprd.qemu.monitor import Monitor, event_is, machine_type, socket_path
from cprd.qemu.private import MARK, PrivateDirectory
from cprd.qemu.process import GUARD, Process, guard_mark, output_of
from cprd.qemu.sockets import SharedPaths
from cprd.qemu.source import TIMEOUT, Source
from cprd.qemu.start import Overrides
from cprd.qemu.target import GONE, KILLED, Target
from cprd.qemu.tell import tell

if TYPE_CHECKING:
    from cprd import Daemon
    from cprd.cpr import CprState
    from cprd.qemu.command import Command


class UpgradeResult(NamedTuple):
    """`pid` of the new QEMU, the guest's run state, and the seconds of the guest's pause (None for
    a guest that did not run)."""

    pid: int
    status: str
    seconds: float | None

    @property
    def pause(self) -> str:
        """The guest's pause, for people."""
        if self.seconds is None:
            return "no time (it was not running)"
        return f"{self.seconds * 1e3:.1f} ms"


def upgrade(
    daemon: Daemon,
    name: str,
    qmp: str,
    command: Command,
    *,
    overrides: Overrides,
    timeout: float = TIMEOUT,
) -> UpgradeResult:
    """Move the guest of the QEMU at `qmp` into a new one. Blocks until the guest runs there.
    `overrides`: what COMMAND may have otherwise; `timeout`: seconds
    for each step of a QEMU.

    Raises Refused or Failed (the guest is in the old QEMU as before), InDoubt, Busy."""
    path = os.path.abspath(socket_path(qmp))
    point("qemu-upgrade:begin")
    conflicts, _ = about_command_line(command.words[command.program :])
    if conflicts:
        raise Refused(f"cannot overlap: {'; '.join(conflicts)}")
    return repeated(lambda: _upgrade(daemon, name, path, command, overrides, timeout))


def _upgrade(
    daemon: Daemon,
    name: str,
    path: str,
    command: Command,
    overrides: Overrides,
    timeout: float,
) -> UpgradeResult:
    with untouched():
        found = make_room(daemon, name, path, replace=False)
        if found is not None:
            raise Failed(f"{name} is held now ({found.said}): go on with `cprctl qemu start`")
        old = Monitor.connect(path)
    try:
        if old.process is None:
            raise Refused(f"the process behind {path} cannot be seen (another pid namespace)")
        status = examine(old).refuse()
        point("qemu-upgrade:connected")
        seen = inventory.take(old, old.process.pid, plugged=True)
        if (lacking := missing(seen.machine, command)) and not overrides.machine:
            raise Refused(lacking)
        if conflicts := servers.full(seen.drives, old.process.pid):
            raise Refused(f"cannot overlap: {'; '.join(conflicts)}")
        with untouched():
            signals.check()
        with PrivateDirectory(path) as directory:
            with Source(old, directory, timeout) as source:
                handover = Handover(daemon, name, source)
                with _Move(handover, path, command, directory, status) as move:
                    move.seen, move.overrides = seen, overrides
                    return move.run()
    finally:
        old.close()


class _New:
    """The new QEMU: its process, its guard, its sockets. Owns all of them."""

    def __init__(self, old: Process, command: Command, path: str) -> None:
        self.old = old
        self.command = command
        also = (found for _, found in command.listening())
        self.shared = SharedPaths(old.pid, command.words, also)
        self.directory = PrivateDirectory(command.monitor_path() or path)
        self.plumbing = spawn.Plumbing()
        self._process: Process | None = None
        self._target: Target | None = None
        self._guard: spawn.Guard | None = None

    @property
    def process(self) -> Process:
        assert self._process is not None, "start() comes first"
        return self._process

    @property
    def target(self) -> Target:
        assert self._target is not None, "start() comes first"
        return self._target

    def start(self, timeout: float) -> None:
        """Start the new QEMU, which waits, and connect to it. Raises Failed, Refused."""
        self._fork()
        point("qemu-upgrade:forked")
        stderr = output_of(self.old, 2)
        guard = self.plumbing.post_guard(
            self.process.pidfd, onward=stderr, old=self.old.pidfd, shared=self.shared
        )
        self._guard = self.plumbing.guard
        self._guard.arm()
        os.close(stderr)
        point("qemu-upgrade:guarded")
        self.shared.before_new()  # the guard undoes it, should we be killed
        point("qemu-upgrade:named")
        spawn.say(self.plumbing.talk, self.directory.at("cpr"), guard_mark(guard))
        self._target = Target(self.process, self.plumbing.main, self.plumbing.monitor, timeout)
        with signals.allowed():
            self.target.connect_cpr(self.directory.at("cpr"))
            point("qemu-upgrade:listening")

    def _fork(self) -> None:
        """The process that becomes the new QEMU: nobody's child, so that it outlives cprctl."""
        plumbing = self.plumbing
        flush()
        if not spawn.fork_twice():
            self._become_qemu()
        words = spawn.hear(plumbing.talk)
        plumbing.keep_ours()
        self._process = Process.open(int(words[0])) if words else None
        if self._process is None:
            raise Failed("the new QEMU's process ended before it began")

    def _become_qemu(self) -> None:
        plumbing = self.plumbing
        try:
            os.setsid()
            spawn.say(plumbing.talk_qemu, str(os.getpid()))
            plumbing.keep_qemus()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(output_of(self.old, 1), 1)
            if words := spawn.hear(plumbing.talk_qemu):
                cpr, os.environ[GUARD] = words
                failure = spawn.become_qemu(self.command, plumbing, cpr, os.geteuid())
                what = f"{self.command.words[0]}: {failure.strerror}\n"
                os.write(plumbing.stderr_qemu, what.encode())
        finally:
            os._exit(1)

    def load_cpr(self, state: CprState) -> None:
        """Send the CPR state, and wait until the new QEMU has made its devices. Raises Failed."""
        self.target.send_cpr(pieces(state))
        self.target.await_devices()
        self.target.greet()

    def disarm(self) -> None:
        """From now on the new QEMU outlives cprctl."""
        assert self._guard is not None
        self._guard.disarm()

    def kill(self, timeout: float) -> bool:
        """SIGKILL, if there is a new QEMU; whether none is left."""
        if self._process is None:
            return True
        self._process.kill()
        return self._process.wait(timeout)

    def give_up(self, error: Exception) -> CprdError:
        """End the new QEMU, and give the old QEMU its paths back. Returns the error with the new
        QEMU's last words; InDoubt when the new QEMU does not end."""
        said = ""
        ended = self.kill(KILLED)
        if not ended:
            said = (
                f". The new QEMU (pid {self.process.pid}) does not end, not even by SIGKILL: look"
                " at what it waits for"
            )
        if self._guard is not None:
            if ended:
                said = self._guard.report()
                said = f": {said}" if said else ""
            self._guard.close()
        self._guard = None
        self.shared.give_back()
        text = one_line(error) + said
        if isinstance(error, InDoubt):
            return type(error)(text)
        return Failed(text) if ended else InDoubt(text)

    def close(self) -> None:
        if self._guard is not None:
            self._guard.close()
        if self._target is not None:
            self._target.close()
        self.plumbing.close()
        self.shared.close()
        self.directory.close()
        if self._process is not None:
            self._process.close()


class _Move:
    """One upgrade. Borrows the handover and the directory; owns the rest."""

    def __init__(
        self,
        handover: Handover,
        path: str,
        command: Command,
        directory: PrivateDirectory,
        status: str,
    ) -> None:
        self.handover = handover
        self.source = handover.source
        self.old = handover.source.process
        self.path = path
        self.directory = directory
        self.status = status
        self.seen = Inventory("", [], {})
        self.overrides = Overrides()
        self.new = _New(self.old, command, path)
        self.main_fd = -1  # the memfd in what is prepared that gets the main stream
        self.is_whole = False  # it has all of the stream

    def __enter__(self) -> _Move:
        return self

    def __exit__(self, *exc: object) -> None:
        self.new.close()
        if self.main_fd >= 0:
            os.close(self.main_fd)

    def run(self) -> UpgradeResult:
        try:
            signals.check()
            self._prepare_new()
            with signals.allowed():
                self._switch_over()
            signals.hold_off()
            self.handover.complete()
        except InDoubt as error:
            self.directory.keep = MARK  # for whoever asks the old QEMU next
            raise self.new.give_up(error) from None
        except (CprdError, OSError) as error:
            raise self._take_back(error) from error
        point("qemu-upgrade:completed")
        return self._finish()

    def _prepare_new(self) -> None:
        """The new QEMU waits, with the CPR state; the old QEMU's guest runs."""
        self.new.start(self.source.timeout)
        self.source.take_cpr()
        point("qemu-upgrade:cpr")
        with signals.allowed():
            self.new.load_cpr(self.source.state)
        if (now := self.new.target.monitor.status()) != "inmigrate":
            raise Failed(f"the new QEMU is {now!r} where it should wait for its state")
        self._refuse_another_machine()
        self.new.shared.new_listens()
        self.directory.create(MARK, json.dumps(self.old.record()))
        self._prepare_hold()
        # New is good, as far as one can know without the guest's state. Nothing has stopped yet.
        point("qemu-upgrade:ready")

    def _refuse_another_machine(self) -> None:
        """Raises Refused when the new QEMU has other disks, or makes another machine."""
        monitor = self.source.monitor
        self.seen.drives = inventory.drives(monitor, self.old.pid)
        words = self.new.command.words[self.new.command.program :]
        target = self.new.target.monitor
        new = inventory.take(target, self.new.process.pid, words, plugged=False)
        refuse_another(self.seen, new, self.overrides, target, at_once=True)

    def _prepare_hold(self) -> None:
        """Prepare all in cprd while the guest runs. The main stream is to go into a memfd that is
        part of the state, and whole once sealed. So nobody waits for cprd while the guest stands
        still, and a refusal costs nothing."""
        self.main_fd = os.memfd_create(MAIN_KEY, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        monitor = self.source.monitor
        origin = Origin(
            version=monitor.version,
            qmp=self.path,
            status=self.status,
            machine=machine_type(monitor),
            old=self.old.record(),
            new=self.new.process.record(),
            uid=self.old.uid,
            untouched=os.path.join(self.directory.path, MARK),
            boot=self.seen.boot,
            drives=without_times(self.seen.drives),
        )
        received = self.source.received
        self.handover.prepare(
            pack(bytes(received.data), received.fds, self.main_fd, origin, self.seen.machine)
        )
        point("qemu-upgrade:prepared")
        stream.is_whole(b"{}")  # (the first time takes longer)
        stream.run_state(b"")

    def _switch_over(self) -> None:
        """The guest stops; its state goes to the new QEMU, and is kept."""
        target = self.new.target
        target.restart_clock()
        self.source.take_main(self._forward)
        point("qemu-upgrade:main")
        self.status = self.source.run_state(self.status)
        fcntl.fcntl(self.main_fd, fcntl.F_ADD_SEALS, SEALS)
        self.is_whole = True
        point("qemu-upgrade:whole")
        self.source.monitor.receive()  # events, while the new QEMU has work to do
        target.await_loaded()
        point("qemu-upgrade:loaded")
        if not self.old.ended():  # else there is nothing to go back to: see complete()
            self.handover.check_daemon()

    def _forward(self, data: memoryview) -> None:
        self.new.target.send_main(data)
        while data:
            data = data[os.write(self.main_fd, data) :]

    # The way back

    def _take_back(self, error: Exception) -> CprdError:
        """Before `completed`: the guest goes on in the old QEMU, at once; the rest comes later.
        Returns the failure to raise."""
        self.new.kill(STANDING)  # it may have the images, which the old one takes back
        if self.is_whole and self.handover.rescue():
            failure = self.new.give_up(error)
            return failure if isinstance(failure, InDoubt) else self._hold(failure)
        where = self.handover.take_back_source()
        failure = self.new.give_up(error)
        left = self.handover.undo()
        self.directory.keep = MARK if left else ""
        return self.handover.failure(f"{failure}; {where}{left}", left)

    def _hold(self, failure: CprdError) -> CprdError:
        """Both QEMUs have ended, and neither has run the guest since its state was taken: commit.
        Returns the failure to raise."""
        self.handover.commit_or_prepare_again()
        return Failed(
            f"{failure}; the old QEMU has ended, too. The guest is held, whole, under"
            f" {self.handover.name}: go on with `cprctl qemu start`"
        )

    # After the point of no return

    def _finish(self) -> UpgradeResult:
        """The old QEMU has completed. What was prepared is never served; whether it may be after
        our death is told by the mark, which goes before the new QEMU may run."""
        new = self.new
        self.directory.remove(MARK)
        new.disarm()
        point("qemu-upgrade:disarmed")
        now = self._let_run() if self.status in LIVE else self.status
        point("qemu-upgrade:running")
        pause = self._pause()
        if now != GONE:
            spawn.notify_main_pid(new.process.pid, "The guest goes on in a new QEMU.")
        point("qemu-upgrade:succeeded")
        self.source.monitor.end()
        point("qemu-upgrade:quit")
        new.shared.old_has_ended()  # the guard does it too, and without us
        point("qemu-upgrade:ended")
        self._forget()
        point("qemu-upgrade:forgotten")
        new.target.end_monitor()
        if now == GONE:
            raise Failed(
                "the new QEMU ended right after its guest had gone on in it, and the guest with"
                " it: boot it anew"
            )
        return UpgradeResult(new.process.pid, now, pause)

    def _let_run(self) -> str:
        try:
            return self.new.target.let_run()
        except InDoubt:
            raise
        except CprdError as error:
            raise self._not_run(error) from None

    def _not_run(self, error: CprdError) -> CprdError:
        """The new QEMU did not run the guest. Returns the failure to raise."""
        pid = self.new.process.pid
        if self.new.target.has_run():
            return InDoubt(
                f"{error}; but somebody else let the guest run, by another monitor of the new"
                f" QEMU (pid {pid}): it is left alone"
            )
        failure = self.new.give_up(error)
        if isinstance(failure, InDoubt):
            return failure
        if self.is_whole and self.handover.rescue():
            return self._hold(failure)
        with suppress(OSError):  # it never ran, and has ended
            self.directory.create(MARK, json.dumps(self.old.record()))
        if not self.handover.is_gone():
            self.directory.keep = MARK
            return InDoubt(
                f"{failure}; cprd does not answer, so that the old QEMU (pid {self.old.pid}) was"
                " not told to go on. The guest is stopped, whole, in it; once cprd runs, repeat"
                " `cprctl qemu save` or `cprctl qemu start`: they ask that QEMU"
            )
        return Failed(f"{failure}; {self.handover.resume_source()}")

    def _forget(self) -> None:
        """The guest runs elsewhere now. Raises InDoubt."""
        prepared = self.handover.prepared
        assert prepared is not None
        # Fenced: a cprd that keeps its holds in memory was restarted, and has nothing.
        tell(prepared.abort, gone=(Fenced,))

    def _pause(self) -> float | None:
        """The seconds of the guest's pause, by the clocks of both QEMUs."""
        if self.status not in LIVE:
            return None
        try:
            stopped = self.source.monitor.event(event_is("STOP"), 1.0)
            resumed = self.new.target.monitor.event(event_is("RESUME"), 1.0)
        except MonitorLost:
            return None
        return resumed[2] - stopped[2]

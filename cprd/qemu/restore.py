"""The helper of `cprctl qemu start`: claims the state, replays it, and lets the guest run."""

from __future__ import annotations

import _thread
import time

import cprd
from cprd.client.blocking import connect
from cprd.errors import Busy, CprdError, Fenced, NotHeld
from cprd.linux.pause import point
from cprd.linux.stdio import note
from cprd.protocol.messages import LEASE
from cprd.qemu import signals, spawn
from cprd.qemu.command import Command
from cprd.qemu.early import go, refuse_by_words, unservable
from cprd.qemu.errors import (
    Failed,
    GuestEnded,
    Incomplete,
    InDoubt,
    MonitorLost,
    one_line,
)
from cprd.qemu.hold import GARBLED, LIVE, Held, garbled
from cprd.qemu.process import Process
from cprd.qemu.sockets import refuse_taken
from cprd.qemu.spawn import Guard
from cprd.qemu.tell import tell

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from cprd.client.ahead import Ahead
    from cprd.qemu.files import OpenFiles
    from cprd.qemu.private import PrivateDirectory
    from cprd.qemu.start import Order
    from cprd.qemu.target import Target


def restore(
    plumbing: spawn.Plumbing,
    qemu: int,
    order: Order,
    ahead: Ahead | None,
    directory: PrivateDirectory | None,
) -> int:
    """Do all of it, for the process `qemu` that becomes the QEMU; or the rest (early.py): the load
    was sent `ahead`, and with a `directory` the QEMU is executed already. Returns the helper's exit
    status, for which nobody waits."""
    name, command = order.name, Command(order.words)
    process = Process.open(qemu)
    if process is None:
        return 1
    with ahead.daemon() if ahead else connect(order.socket) as daemon:
        point("qemu-start:connected")
        try:
            if directory is not None:  # the answer is here, and a signal ends the QEMU later
                claim, forced = _claim(daemon, name, force=False)
            else:
                with signals.allowed():
                    claim, forced = _claim(daemon, name, force=order.force)
        except NotHeld as error:
            if "; but uid" in str(error):  # cprd says to root who else has that name
                note(f"cprctl: {error}")
            if directory is not None:
                raise Busy(f"{error}; it was held a moment before: look, and try again") from None
            spawn.say(plumbing.talk, "cold")
            return 0
        try:
            point("qemu-start:claimed")
            if directory is None:
                refuse_taken(command)
            _Restore(plumbing, process, claim, command, order, directory).run()
        except (InDoubt, GuestEnded) as error:
            note(f"cprctl: {name}: {error}")
            return 1
        except (CprdError, OSError) as error:
            why = _give_back(claim, name, one_line(error), forced=forced)
            spawn.say_or_note(plumbing.talk, why, "CprdError", executed=directory is not None)
            return 1
        finally:
            claim.close()
        if order.agent:
            _set_time(name, order.agent)
    return 0


def _set_time(name: str, agent: str) -> None:
    """The guest runs, and nothing depends on its clock."""
    from cprd.qemu.agent import set_time

    try:
        set_time(agent)
    except Failed as error:
        note(f"cprctl: {name}: the guest's clock was not set: {error}")


def _give_back(claim: cprd.Claim, name: str, why: str, *, forced: bool) -> str:
    """Nothing was acted on: say so to cprd. Returns the message for people."""
    if forced:
        return f"{name}: {why}; it is in doubt as before: --force again, or drop it"
    try:
        claim.reject(why)
    except Fenced as over:
        return f"{name}: {why}; {over}: look whether it is held (cprctl list)"
    except CprdError as lost:
        why += f" (and cprd was not told: {lost})"
    return f"{name}: {why}; it is held as before"


# The claim


def _claim(daemon: cprd.Daemon, name: str, *, force: bool) -> tuple[cprd.Claim, bool]:
    """Claim NAME, after settling a doubt; and whether that took force: then the claim has begun
    already, so that the state is in doubt again, whatever becomes of the helper.

    Raises NotHeld (a cold boot is right), Busy."""
    try:
        if force:
            from cprd.qemu.doubt import may_force  # (late: the guest waits)

            force = may_force(daemon, name)
        if not force:
            return _claim_settled(daemon, name), False
    except Incomplete as gone:
        note(f"cprctl: {gone}")
        return daemon.load(name, lease=LEASE), False  # NotHeld, by cprd's own word
    daemon.release(name, force=True)
    claim = daemon.load(name, wait=2.0, lease=LEASE)
    try:
        claim.begin()
    except BaseException:
        claim.close()
        raise
    return claim, True


def _claim_settled(daemon: cprd.Daemon, name: str) -> cprd.Claim:
    try:
        claim = daemon.load(name, lease=LEASE)
        why = unservable(claim.state)
        if not why:
            return claim
        claim.reject(why)
        claim.close()
        raise Busy(why)
    except Busy as busy:
        try:
            return _claim_after_settling(daemon, name)
        except Incomplete:
            raise
        except NotHeld:
            # It was held when we came: who had it runs it, or has dropped it. Not for us to boot.
            raise Busy(f"{busy}; it went away meanwhile: look, and try again") from None


def _claim_after_settling(daemon: cprd.Daemon, name: str) -> cprd.Claim:
    from cprd.qemu.doubt import settle

    settled = settle(daemon, name)
    if settled.runs is not None:
        raise Busy(
            f"nothing to start: {settled.said}; what was held under {name!r} was older than"
            " that guest and has been dropped"
        )
    if settled.said:
        note(f"cprctl: {name}: {settled.said}")
    return daemon.load(name, wait=2.0, lease=LEASE)


# The replay


class _Restore:
    """One claimed state on its way into one new QEMU. Borrows all but what `run` makes."""

    def __init__(
        self,
        plumbing: spawn.Plumbing,
        process: Process,
        claim: cprd.Claim,
        command: Command,
        order: Order,
        directory: PrivateDirectory | None,
    ) -> None:
        self.plumbing = plumbing
        self.process = process
        self.claim = claim
        self.command = command
        self.directory = directory
        self.timeout = order.timeout
        self.overrides = order.overrides
        self.held = Held(claim.state)
        refuse_by_words(self.held, command, order.overrides)

    def run(self) -> None:
        """All between claim and confirm. After an exception other than InDoubt and GuestEnded the
        new QEMU has ended, and nothing was acted on."""
        directory = self.directory or go(self.plumbing, self.command)
        guard = self.plumbing.guard
        # While the new QEMU begins.
        from cprd.qemu import inventory
        from cprd.qemu.target import Target

        self._inventory = inventory
        target = Target(self.process, self.plumbing.main, self.plumbing.monitor, self.timeout)
        renewing = _Renewing(self.claim)
        try:
            with signals.allowed():
                self.held.read()
                self._replay(target, directory)
            signals.hold_off()
            renewing.stop()
            self._let_run(target, guard)
        except (InDoubt, GuestEnded):
            raise
        except BaseException as error:
            self._end(target, renewing, guard, error)
            said = guard.report()
            if isinstance(error, CprdError | OSError) and said:
                raise Failed(f"{error}: {said}") from error
            raise
        finally:
            renewing.stop()
            guard.close()
            directory.close()
            target.close()

    def _replay(self, target: Target, directory: PrivateDirectory) -> None:
        pieces = self.held.pieces()
        target.connect_cpr(directory.at("cpr"))
        point("qemu-start:listening")
        target.send_cpr(pieces)
        point("qemu-start:cpr")
        from cprd.qemu.stream import capabilities

        # A hold of an older cprctl may want what has to be set before the stream arrives.
        wanted = capabilities(self.held.main)
        words = self.command.words[self.command.program :]
        same = bool(words) and self.held.machine.get("command") == words
        # Other words may make a machine that the stream does not fit: then QEMU (11.1) ends before
        # anybody could say how the machines differ.
        early = same and not wanted
        rest = target.fill_main(self.held.main) if early else memoryview(self.held.main)
        inventory = self._inventory
        asked = target.ask_early(inventory.DISKS if same else inventory.QUESTIONS)
        directory.close()
        target.await_devices()
        if early:
            target.send_main(rest)
            point("qemu-start:main")
        files = inventory.OpenFiles(self.process.pid)  # all images are open; QEMU loads meanwhile
        target.greet()
        self._refuse_another_machine(target, asked, files)
        if not early:
            if wanted:
                target.set_capabilities(wanted)
            target.send_main(rest)
            point("qemu-start:main")
        target.await_loaded()
        point("qemu-start:loaded")

    def _refuse_another_machine(self, target: Target, asked: list[int], files: OpenFiles) -> None:
        """Raises Refused when the new QEMU has other disks, or makes another machine."""
        origin = self.held.origin
        allowed = self.overrides
        if origin.drives is None or (allowed.images and allowed.machine):
            return
        inventory = self._inventory
        words = self.command.words[self.command.program :]
        old = inventory.Inventory(origin.boot, origin.drives, self.held.machine)
        monitor, pid = target.monitor, self.process.pid
        try:
            if len(asked) == len(inventory.QUESTIONS):
                new = inventory.read(monitor, pid, words, asked)
            elif inventory.is_made(old, words, monitor):
                new = inventory.read_drives(monitor, files, asked)
            else:
                new = inventory.take(monitor, pid, words, plugged=False)
        except MonitorLost:
            target.await_loaded()  # raises the reason
            raise
        try:
            inventory.refuse_another(old, new, allowed, monitor, at_once=False)
        except GARBLED as error:
            raise garbled(error) from None

    def _let_run(self, target: Target, guard: Guard) -> None:
        """begin, cont, confirm. Raises InDoubt when nobody can say whether the guest runs."""
        from cprd.qemu.target import GONE

        status = self.held.origin.status
        self.claim.begin(self.process.pidfd)
        point("qemu-start:begun")
        guard.disarm()
        point("qemu-start:disarmed")
        target.check_alive()
        now = target.let_run() if status in LIVE else status
        point("qemu-start:running")
        tell(self.claim.confirm)
        point("qemu-start:confirmed")
        if now == GONE:
            raise GuestEnded(
                "the new QEMU ended right after its guest had gone on, and the guest with it"
            )
        if now not in LIVE and status in LIVE:
            note(f"cprctl: the guest went on, and is {now!r} since")
        spawn.notify("READY=1\nSTATUS=The guest goes on.")
        target.end_monitor()

    def _end(self, target: Target, renewing: _Renewing, guard: Guard, error: BaseException) -> None:
        """End the new QEMU, so that the state can be given back. Raises InDoubt when nobody knows
        whether that is right; the hold is in doubt then, as far as cprd can be told."""
        from cprd.qemu.target import KILLED

        pid = self.process.pid
        if target.has_run():
            guard.disarm()
            why = (
                f"{error}; somebody else let the guest run, by another monitor of the new QEMU (pid"
                f" {pid}): it is left alone. The hold is in doubt until that QEMU is saved"
            )
        else:
            self.process.kill()
            if self.process.wait(KILLED):
                return
            why = (
                f"{error}; the new QEMU (pid {pid}) does not end, not even by SIGKILL: look at"
                " what it waits for. The hold is in doubt; when that process has ended, use --force"
            )
        renewing.stop()
        try:
            self.claim.begin(self.process.pidfd)
        except CprdError as lost:
            why += f" (and cprd was not told: {lost})"
        raise InDoubt(why) from error


class _Renewing:
    """Keeps a claim's lease from ending while the new QEMU loads. A thread asks, so that a mute
    cprd delays nothing else, and asks again when a request fails: should the claim be lost all the
    same, `begin` will say so."""

    def __init__(self, claim: cprd.Claim) -> None:
        self._claim = claim
        self._asking = _thread.allocate_lock()
        self._over = False
        _thread.start_new_thread(self._run, ())

    def _run(self) -> None:
        signals.block()  # they are the main thread's
        pause = LEASE / 3
        while True:
            time.sleep(pause)
            with self._asking:
                if self._over:
                    return
                try:
                    self._claim.renew()
                    pause = LEASE / 3
                except cprd.Fenced:
                    return
                except CprdError:
                    pause = 1.0

    def stop(self) -> None:
        """Afterwards the claim is free for other requests. Wakes nobody: the guest waits. Safe to
        repeat."""
        with self._asking:
            self._over = True

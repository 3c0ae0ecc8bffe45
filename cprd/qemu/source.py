"""The source of a migration: a running QEMU, up to the point of no return.

`migrate` connects to the CPR channel and writes the CPR state from QEMU's main loop, so cprctl
accepts and reads at once; the guest runs. When cprctl hangs up on that channel, QEMU stops the
guest (the switchover), connects to the main channel and writes the stream. QEMU then waits, paused,
for the return path: SHUT(0) there completes the migration, a hang-up there makes the guest resume.
(Observed on 10.0 and 11.1.)

Two things must never happen: a hang-up on the CPR channel before its end (QEMU 11.1 may crash),
and, after a bad CPR stream, a hang-up while the main listener still listens (the guest would
stop).
"""

from __future__ import annotations

import gc
import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from cprd import cpr
from cprd.errors import CprdError, Damaged, LimitExceeded, Timeout
from cprd.linux import rights
from cprd.linux.rights import close_all
from cprd.qemu import signals, stream
from cprd.qemu.errors import Failed, MonitorRefused, Refused
from cprd.qemu.hold import KEPT, LIVE
from cprd.qemu.monitor import migration_is
from cprd.qemu.signals import Deadline
from cprd.vmstate.channel import Tape

if TYPE_CHECKING:
    from collections.abc import Callable

    from cprd.qemu.monitor import Monitor
    from cprd.qemu.private import PrivateDirectory
    from cprd.qemu.process import Process

TIMEOUT = 30.0  # s that QEMU may take for one step
MODE = "cpr-transfer"
UNDER_WAY = ("setup", "active", "device", "pre-switchover", "wait-unplug", "cancelling", "failing")
_CHUNK = 1 << 18
MAX_CPR = 4 << 20  # bytes of a CPR stream; a QEMU's has some hundred
MAX_MAIN = 256 << 20  # bytes of a main stream; without RAM it has some hundred KiB
_WANTED = {"events": True, "return-path": True}
_HARMLESS = frozenset(("events", "return-path", "validate-uuid"))
_AT_ONCE = 0.02  # s in which QEMU connects, unless something is wrong
_REST = 2.0  # s for the rest of a main stream, after a failure
_RESUMES = 1.0  # s in which QEMU resumes its guest after a migration that failed; it takes 1 ms


class Settings:
    """The migration settings of a QEMU before a hand-over, to be put back."""

    def __init__(self, mode: str, capabilities: dict[str, bool]) -> None:
        self.mode = mode
        self.capabilities = capabilities  # only those that we change

    @classmethod
    def prepare(cls, monitor: Monitor) -> Settings:
        """Make the settings that a hand-over needs. Raises Refused (an older QEMU)."""
        rows = monitor.execute("query-migrate-capabilities")
        now = {row["capability"]: row["state"] for row in rows}
        wanted = {
            name: name in _WANTED
            for name, state in now.items()
            if (state and name not in _HARMLESS) or (name in _WANTED and not state)
        }
        mode = monitor.execute("query-migrate-parameters").get("mode", "")
        settings = cls(str(mode), {name: now[name] for name in wanted})
        try:
            if wanted:
                _set_capabilities(monitor, wanted)
            monitor.execute("migrate-set-parameters", mode=MODE)
        except MonitorRefused as error:
            settings.restore(monitor)
            raise Refused(
                f"this QEMU ({'.'.join(map(str, monitor.version))}) cannot hand over its memory: it"
                f" takes QEMU 10.0 or later ({error})"
            ) from None
        return settings

    def restore(self, monitor: Monitor) -> None:
        """Put the settings back. Best effort: the guest does not depend on them."""
        with suppress(CprdError):
            if self.capabilities:
                _set_capabilities(monitor, self.capabilities)
        with suppress(CprdError):
            monitor.execute("migrate-set-parameters", mode=self.mode or "normal")


def _set_capabilities(monitor: Monitor, states: dict[str, bool]) -> None:
    rows = [{"capability": name, "state": state} for name, state in states.items()]
    monitor.execute("migrate-set-capabilities", capabilities=rows)


class Source:
    """One migration out of a QEMU. Borrows `monitor` and `directory`; owns its sockets and the
    descriptors of the CPR stream."""

    def __init__(self, monitor: Monitor, directory: PrivateDirectory, timeout: float) -> None:
        """Makes the settings of a hand-over. Raises Refused, MonitorLost."""
        assert monitor.process is not None
        self.monitor = monitor
        self.process: Process = monitor.process
        self.timeout = timeout
        self.received = Tape()
        self.state = cpr.CprState()
        self.main = bytearray()
        self._buffer = memoryview(bytearray(_CHUNK))  # (to make one takes a while)
        self._directory = directory
        self._ran = False
        self._migrate: int | None = None  # until it is answered
        self._cpr_listener: socket.socket | None = None
        self._main_listener: socket.socket | None = None
        self._cpr: socket.socket | None = None
        self._main: socket.socket | None = None
        self._settings = Settings.prepare(monitor)

    def take_cpr(self) -> None:
        """Send `migrate` and read the CPR stream to its end. The guest runs on.

        Raises MonitorRefused (QEMU will not), Timeout, Damaged, LimitExceeded, Refused."""
        self.monitor.forget_events()
        paths = {kind: self._directory.at(f"{kind}-in") for kind in ("cpr", "main")}
        self._cpr_listener = self._directory.listen("cpr-in")
        self._main_listener = self._directory.listen("main-in")
        unix = {"transport": "socket", "type": "unix"}
        channels = [
            {"channel-type": kind, "addr": {**unix, "path": path}} for kind, path in paths.items()
        ]
        deadline = Deadline(self.timeout)
        self._migrate = self.monitor.send("migrate", channels=channels)
        self._cpr = self._accept_cpr(self._cpr_listener, deadline)
        failure = self._drain(self._cpr, deadline)
        if not isinstance(failure, Timeout):  # else it is still writing, and does not answer
            self._take_answer()
        if failure is not None:
            raise failure
        try:
            self.state = cpr.parse(self.received.data, self.received.fds, self.received.offsets)
        except cpr.VMStateError as error:
            raise Damaged(f"QEMU's CPR stream is not whole: {error}") from None
        if not self.state.fds:
            raise Refused(
                "QEMU's CPR stream has no memory in it: start the VM with memory-backend-memfd,"
                "share=on and -machine aux-ram-share=on (cprctl qemu check)"
            )

    def _accept_cpr(self, listener: socket.socket, deadline: Deadline) -> socket.socket:
        """QEMU's CPR connection; or QEMU's refusal, which comes instead of a connection."""
        here, there = listener.fileno(), self.monitor.fileno()
        while True:
            request = self._migrate
            found = signals.any_readable((here, there) if request else (here,), deadline.left())
            if here in found:
                return listener.accept()[0]
            if not found:
                raise Timeout(f"QEMU did not connect within {self.timeout:g} s")
            self.monitor.receive()
            if request and (self.monitor.has_answered(request) or self.monitor.has_ended):
                self._take_answer()  # raises, unless QEMU has connected in this moment

    def _take_answer(self) -> None:
        """QEMU's answer to `migrate`, once. Raises MonitorRefused, MonitorLost."""
        request, self._migrate = self._migrate, None
        if request is not None:
            self.monitor.answer(request, self.timeout)

    def _drain(self, sock: socket.socket, deadline: Deadline) -> CprdError | None:
        """Read to the end, whatever comes; returns the first failure."""
        failure: CprdError | None = None
        while True:
            if deadline.has_passed() or not signals.readable(sock.fileno(), deadline.left()):
                return Timeout(f"QEMU's CPR stream did not end within {self.timeout:g} s")
            try:
                data, fds, flags = rights.receive(sock, 1 << 16, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError as error:
                return failure or Damaged(f"QEMU's CPR stream broke: {error}")
            if flags & socket.MSG_CTRUNC:
                close_all(fds)
                failure = LimitExceeded(
                    "descriptors of QEMU's CPR stream were lost: this process is at its"
                    " RLIMIT_NOFILE; raise it (ulimit -n, LimitNOFILE=)"
                )
                continue
            if data and len(self.received.data) + len(data) > MAX_CPR:
                close_all(fds)
                failure = failure or LimitExceeded(
                    f"QEMU's CPR stream is longer than {MAX_CPR >> 20} MiB"
                )
                continue
            self.received.feed(data, fds.tolist())
            if not data:
                return failure

    def take_main(self, forward: Callable[[memoryview], None] | None = None) -> None:
        """Hang up on the CPR channel: QEMU stops the guest and sends the main stream. `forward`
        gets each piece at once.

        Raises Timeout, Damaged; the guest resumes when this source is taken back."""
        assert self._cpr is not None
        assert self._main_listener is not None
        self._ran = self.monitor.status() in LIVE
        gc.disable()  # a collection takes a millisecond or two, and the guest stands from here
        self._cpr.close()
        deadline = Deadline(self.timeout)
        self._main = self._accept_main(self._main_listener, deadline)
        self._main.setblocking(False)
        self._read_main(self._main, forward, deadline)

    def finish_main(self) -> bool:
        """After a failure in between: read the main stream to its end. Returns whether the stream
        is whole. For a guest that stands still: gives up soon."""
        if self._main is not None:
            with suppress(CprdError):
                self._read_main(self._main, None, Deadline(min(self.timeout, _REST)))
        return self.is_whole

    def _read_main(
        self, main: socket.socket, forward: Callable[[memoryview], None] | None, deadline: Deadline
    ) -> None:
        while not stream.is_whole(self.main):
            if deadline.has_passed() or not signals.readable(main.fileno(), deadline.left()):
                raise Timeout(
                    f"QEMU's main stream did not end within {self.timeout:g} s; without the"
                    " description at its end (suppress-vmdesc=on) its end cannot be told"
                )
            try:
                data = self._buffer[: main.recv_into(self._buffer)]
            except BlockingIOError:
                continue
            except OSError as error:
                raise Damaged(f"QEMU's main stream broke: {error}") from None
            if not data:
                raise Damaged(
                    f"QEMU's main stream ends after {len(self.main)} bytes, not whole{self._why()}"
                )
            if len(self.main) + len(data) > MAX_MAIN:
                self.main.clear()
                raise LimitExceeded(
                    f"QEMU's main stream is longer than {MAX_MAIN >> 20} MiB: it is no state"
                    " without RAM"
                )
            try:
                if forward is not None:
                    forward(data)
            finally:
                self.main += data

    def _accept_main(self, listener: socket.socket, deadline: Deadline) -> socket.socket:
        """QEMU's main connection; or QEMU's event that the migration has failed."""
        here, there = listener.fileno(), self.monitor.fileno()
        # First without QEMU's events, which would wake us up while the guest stands still.
        found = signals.any_readable((here,), min(_AT_ONCE, deadline.left()))
        while True:
            if here in found:
                return listener.accept()[0]
            found = signals.any_readable((here, there), deadline.left())
            if here in found:
                continue
            self.monitor.receive()
            failed = self.monitor.seen(migration_is("failed", "cancelled"))
            if not found or failed or self.monitor.has_ended:
                raise Timeout("QEMU did not connect to its main channel")

    def _why(self) -> str:
        """QEMU's reason for a failed migration, as the end of a message."""
        with suppress(MonitorRefused):
            said = self.monitor.execute("query-migrate").get("error-desc")
            if said:
                return f": {_explained(str(said))}"
        return ""

    @property
    def is_whole(self) -> bool:
        """Whether the main stream has come to its end."""
        return stream.is_whole(self.main)

    def run_state(self, seen: str) -> str:
        """The guest's run state in the main stream: the user may have paused the guest, or a disk
        failed, since the look that found `seen`. Raises Failed when nothing is worth keeping."""
        status = stream.run_state(self.main) or seen
        if status not in KEPT:
            raise Failed(f"the guest is {status!r} by now: there is nothing to keep")
        return status

    def complete(self) -> None:
        """Send SHUT(0) on the return path. Sent is not completed: see `completed`."""
        assert self._main is not None
        self._main.sendall(stream.DONE)

    def completed(self) -> str:
        """The outcome by QEMU's word: "completed"; "failed" or "cancelled" (the guest runs on).
        Raises MonitorLost when QEMU does not say."""
        outcome = migration_is("completed", "failed", "cancelled")
        return self.monitor.event(outcome, self.timeout)[1]

    def take_back(self) -> str:
        """Before SHUT(0) was sent: hang up in the order that leaves the guest running, wait until
        QEMU has given up on the migration, and put the settings back. Returns the place of the
        guest, for people. Raises MonitorLost."""
        self._hang_up()
        with suppress(MonitorRefused):
            if self.monitor.migration() == "setup":
                self.monitor.execute("migrate_cancel")
        deadline = Deadline(self.timeout)
        while self.monitor.migration() in UNDER_WAY and deadline.left():
            signals.sleep(0.01)
        deadline = Deadline(min(deadline.left(), _RESUMES))
        while (status := self.monitor.status()) == "finish-migrate" and deadline.left():
            signals.sleep(0.005)
        if status == "finish-migrate" and self.monitor.migration() not in UNDER_WAY:
            status = _leave_finish_migrate(self.monitor, self._directory.at("gdb"), live=self._ran)
        self.restore()
        return describe(status)

    def restore(self) -> None:
        """Put the migration settings back."""
        self._settings.restore(self.monitor)

    def _hang_up(self) -> None:
        """The main listener first: QEMU then does not even stop the guest."""
        for sock in (self._main_listener, self._main, self._cpr, self._cpr_listener):
            if sock is not None:
                sock.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close everything. Safe to repeat."""
        self._hang_up()
        self.received.close()


def describe(status: str) -> str:
    """The place of the guest, for people, after a step was taken back."""
    if status in LIVE:
        return "the guest runs on in its QEMU"
    return f"the guest is in its QEMU as before ({status})"


def _explained(error: str) -> str:
    """QEMU's word for a failed migration, for people."""
    said, found, number = error.partition("migration_stop_vm failed, error ")
    if found and not said and number.isdigit():
        return f"the guest's disks could not be flushed ({os.strerror(int(number))})"
    return error


# Out of `finish-migrate`
#
# To hand over, QEMU stops the guest and flushes its disks. When a flush fails, the migration has
# failed, but (10.0, migration_connect) nobody puts the run state back: the guest stands, `cont` is
# refused ("Migration is not finalized yet"), and nothing in QMP leads out. QEMU's gdb stub does: a
# debugger that detaches lets the guest run. Without that an attempt to save would cost a guest
# whose disk has a bad moment.

_DETACH = b"$D#44"
_PATIENCE = 3.0


def _leave_finish_migrate(monitor: Monitor, path: str, *, live: bool) -> str:
    """Let a guest out of `finish-migrate`; returns the run state then. `path`: free, where its QEMU
    may listen. `live`: whether the guest ran before (if not, the guest is stopped again at once).

    A QEMU that has a gdb stub already keeps the stub, and stays stuck. Raises MonitorLost."""
    try:
        chardevs = monitor.execute("query-chardev")
        if any(row.get("label") == "gdb" for row in chardevs):
            return monitor.status()
        _gdb(monitor, f"unix:{path},server=on,wait=off")
        try:
            _detach(path)
            if not live:
                monitor.execute("stop")
        finally:
            _gdb(monitor, "none")
    except (CprdError, OSError):
        pass
    return monitor.status()


def _gdb(monitor: Monitor, where: str) -> None:
    monitor.execute(
        "human-monitor-command",
        **{"command-line": f"gdbserver {where}"},  # (no QMP for it)
    )


def _detach(path: str) -> None:
    """Be that debugger. QEMU has let the guest go when QEMU has answered."""
    deadline = Deadline(_PATIENCE)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        sock.connect(path)
        sock.sendall(_DETACH)
        answer = b""
        while b"OK" not in answer and signals.readable(sock.fileno(), deadline.left()):
            data = sock.recv(256)
            if not data:
                return
            answer += data

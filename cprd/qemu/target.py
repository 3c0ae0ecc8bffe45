"""The destination of a migration: a new QEMU that waits, stopped (-S), for a state.

The new QEMU listens at a path (or on an inherited socket), takes the CPR stream to its end, makes
its devices and hangs up. Its main channel and monitor are connected already: cprctl made both.
After the main stream the new QEMU says SHUT on the return path: 0 when the state is loaded. The
guest runs only after `cont`.
"""

from __future__ import annotations

import _socket as socket  # as in rights
import os
from contextlib import suppress

from cprd.errors import CprdError
from cprd.linux import rights
from cprd.linux.pause import point
from cprd.qemu import signals
from cprd.qemu.command import MONITOR
from cprd.qemu.errors import (
    Failed,
    InDoubt,
    MonitorBusy,
    MonitorGone,
    MonitorLost,
    MonitorRefused,
)
from cprd.qemu.monitor import Monitor, event_is
from cprd.qemu.signals import Deadline
from cprd.qemu.stream import Answers

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any, NoReturn

    from cprd.qemu.monitor import Request
    from cprd.qemu.process import Process

    Bytes = bytes | bytearray | memoryview

GONE = "gone"  # instead of a run state: that QEMU has ended
KILLED = 10.0  # s that a killed QEMU may take to end
_RETRY = 0.001  # s between two tries to connect to a path that QEMU is about to make


class Target:
    """One new QEMU. Owns its sockets (not `process`)."""

    def __init__(
        self, process: Process, main: socket.socket, monitor: socket.socket, timeout: float
    ) -> None:
        self.process = process
        self.timeout = timeout
        self._monitor: Monitor | None = None
        self._main = main
        self._main.setblocking(False)
        self._monitor_socket = monitor
        self._cpr: socket.socket | None = None
        self._deadline = Deadline(timeout)

    @property
    def monitor(self) -> Monitor:
        assert self._monitor is not None, "greet() comes first"
        return self._monitor

    def restart_clock(self) -> None:
        """Give the new QEMU `timeout` seconds from now on."""
        self._deadline = Deadline(self.timeout)

    def connect_cpr(self, path: str) -> None:
        """Connect to the CPR socket as soon as the new QEMU listens. Raises Failed."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._cpr = sock
        while True:
            try:
                sock.connect(path)
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if self.process.ended():
                    raise Failed("the new QEMU ended before it listened for its state") from None
                if self._deadline.has_passed():
                    raise Failed(f"the new QEMU did not listen within {self.timeout:g} s") from None
                signals.sleep(_RETRY)
            except PermissionError:
                raise Failed(
                    f"the new QEMU listens as another uid than {os.geteuid()}, with the state of"
                    " that user: the wrappers in the QEMU command have to change to that uid"
                ) from None
        sock.setblocking(False)

    def send_cpr(self, pieces: Iterable[tuple[bytes, int]]) -> None:
        """Send (bytes, -1), or a dummy byte with its descriptor, which stays the caller's; then the
        end, for which QEMU's loader waits."""
        assert self._cpr is not None
        for data, fd in pieces:
            rest = data
            while rest:
                try:
                    if fd >= 0:
                        rights.send(self._cpr, data, [fd])
                        break
                    rest = rest[self._cpr.send(rest, socket.MSG_NOSIGNAL) :]
                except BlockingIOError:
                    if not signals.writable(self._cpr.fileno(), self._deadline.left()):
                        raise Failed("the new QEMU does not read its CPR state") from None
                except OSError as error:
                    self._gone(f"while it read its CPR state ({error})")
        with suppress(OSError):
            self._cpr.shutdown(socket.SHUT_WR)

    def await_devices(self) -> None:
        """Wait until the new QEMU has taken its CPR state and made its devices. Raises Failed."""
        assert self._cpr is not None
        if not signals.readable(self._cpr.fileno(), self._deadline.left()):
            raise Failed("the new QEMU took its CPR state, and does not go on")
        self._cpr.close()

    def ask_early(self, questions: list[tuple[str, dict[str, Any]]]) -> list[Request]:
        """Send commands to a QEMU that has no monitor yet; `greet` comes afterwards."""
        self._monitor = Monitor(
            self._monitor_socket, f"the new QEMU (pid {self.process.pid})", None
        )
        with suppress(MonitorLost):  # said by `greet`
            return self._monitor.send_all(questions)
        return []

    def greet(self) -> None:
        """Greet the monitor, which answers only once the devices exist. Raises Failed."""
        if self._monitor is None:
            self.ask_early([])
        try:
            self.monitor.negotiate(max(0.1, self._deadline.left()))
        except (MonitorBusy, MonitorLost):
            self._gone("before its monitor answered")

    def set_capabilities(self, names: list[str]) -> None:
        """Turn on what the main stream asks for, before the stream is sent. Raises Failed."""
        rows = [{"capability": name, "state": True} for name in names]
        try:
            self.monitor.execute("migrate-set-capabilities", capabilities=rows)
        except (MonitorRefused, MonitorLost) as error:
            raise Failed(f"the new QEMU lacks what its state wants: {error}") from None

    def fill_main(self, data: Bytes) -> memoryview:
        """Send as much of the main stream as the socket takes at once; returns the rest."""
        rest = memoryview(data)
        with suppress(OSError):  # said by send_main
            while rest:
                rest = rest[self._main.send(rest, socket.MSG_NOSIGNAL) :]
        return rest

    def send_main(self, data: Bytes) -> None:
        """Send a piece of the main stream. Raises Failed."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._main.send(rest, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                if not signals.writable(self._main.fileno(), self._deadline.left()):
                    raise Failed("the new QEMU does not read its main stream") from None
            except OSError as error:
                self._gone(f"while it read its main stream ({error})")

    def await_loaded(self) -> None:
        """Wait until the new QEMU says that its state is loaded. Raises Failed."""
        answers = Answers()
        while True:
            if not signals.readable(self._main.fileno(), self._deadline.left()):
                raise Failed(f"the new QEMU did not load its state within {self.timeout:g} s")
            try:
                data = self._main.recv(4096)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if not data:
                self._gone("before it had loaded its state")
            value = answers.feed(data)
            if value:
                self._gone(f"when it loaded its state (it says {value})")
            if value == 0:
                return

    def check_alive(self) -> None:
        """Raises Failed when the new QEMU has ended."""
        if self.process.ended():
            raise Failed("the new QEMU ended before it was told to run its guest")

    def let_run(self) -> str:
        """Send `cont`; returns the run state that came of it, GONE when this QEMU has ended since.

        An answered error means that the guest does not run, and never did: MonitorRefused, Failed.
        Once `cont` is answered there is no way back, whatever the run state is a moment later: a
        full disk or somebody's `stop` may have stopped the guest again, but the guest has run.
        InDoubt: no answer."""
        self.check_alive()
        try:
            self.monitor.execute("cont")
        except MonitorGone as error:
            raise Failed(
                f"the new QEMU ended before it was told to run its guest ({error})"
            ) from None
        except MonitorLost as error:
            raise InDoubt(
                f"the new QEMU (pid {self.process.pid}) was told to run its guest and did not"
                f" answer ({error}); the hold is in doubt until that QEMU is saved, or released by"
                " force"
            ) from None
        point("qemu:cont")
        try:
            return self.monitor.status()
        except MonitorLost:
            return GONE if self.process.wait(2.0) else "unknown"
        except MonitorRefused:
            return "unknown"

    def has_run(self) -> bool:
        """Whether a guest that was not told to has run all the same: COMMAND's own monitor is open
        to others from the start, and another client may have said `cont`."""
        if self._monitor is None:
            return False
        with suppress(CprdError):  # what came before its answer has been read then
            self._monitor.execute("query-status", 1.0)
        return self._monitor.seen(event_is("RESUME")) is not None

    def end_monitor(self) -> None:
        """Let our monitor end with our connection, for a QEMU that can (11.1): else a monitor and
        its character device stay in that QEMU, of no use to anybody. Best effort."""
        with suppress(CprdError):
            for row in self.monitor.execute("qom-list", path="/objects"):
                where = {"path": f"/objects/{row['name']}"}
                if row["type"] != "child<monitor-qmp>":
                    continue
                if self.monitor.execute("qom-get", **where, property="chardev") == MONITOR:
                    self.monitor.execute(
                        "qom-set", **where, property="close-action", value="delete"
                    )

    def _gone(self, when: str) -> NoReturn:
        """Say that the new QEMU broke off: as a rule an end, which is waited for. Raises Failed."""
        ended = self.process.wait(2.0)
        raise Failed(f"the new QEMU {'ended' if ended else 'broke off'} {when}")

    def close(self) -> None:
        if self._monitor is not None:
            self._monitor.close()
        self._monitor_socket.close()
        self._main.close()
        if self._cpr is not None:
            self._cpr.close()

"""Taking a VM out of a running QEMU, up to the point from which it can no more be taken back.

Who waits for whom (facts observed on 10.0 and 11.1; docs/qemu.md draws it): `migrate` connects to
the CPR channel and writes to it from QEMU's main loop, so we accept and read at once; the guest
runs. QEMU stops the guest when we hang up on that channel, connects to the main channel and writes
it; then it waits, paused, for the return path. SHUT(0) there completes it; closing there makes it
resume.

What must never happen: hanging up on the CPR channel before its end (QEMU 11.1 may crash), and,
after a CPR stream that is no good, hanging up while our main listener still listens (the guest
would stop).
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from cprd import cpr
from cprd.errors import CprdError, Damaged, LimitExceeded, Timeout
from cprd.linux import rights
from cprd.linux.rights import close_all
from cprd.qemu import stream
from cprd.qemu.failure import MonitorRefused, Refused
from cprd.qemu.process import readable, soon_readable
from cprd.qemu.qmp import migration_is
from cprd.qemu.unstick import unstick, why
from cprd.vmstate.channel import Tape

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from cprd.qemu.private import PrivatePlace
    from cprd.qemu.qmp import Monitor

_CHUNK = 1 << 18
WANTED = {"events": True, "return-path": True}
HARMLESS = frozenset(("events", "return-path", "x-ignore-shared", "validate-uuid"))
UNDER_WAY = ("setup", "active", "device", "pre-switchover", "wait-unplug", "cancelling", "failing")
MODE = "cpr-transfer"
RESUMES = 1.0  # s in which QEMU resumes its guest after a migration that failed; it takes 1 ms


class Settings:
    """The migration settings of a QEMU as they were, to be put back."""

    def __init__(self, mode: str, capabilities: dict[str, bool]) -> None:
        self.mode = mode
        self.capabilities = capabilities  # only those that we change

    @classmethod
    async def prepare(cls, monitor: Monitor) -> Settings:
        """Set what a hand-over needs. Raises Refused when this QEMU cannot do it."""
        rows = await monitor.execute("query-migrate-capabilities")
        now = {row["capability"]: row["state"] for row in rows}
        wanted = {
            name: name in WANTED
            for name, state in now.items()
            if (state and name not in HARMLESS) or (name in WANTED and not state)
        }
        parameters = await monitor.execute("query-migrate-parameters")
        if parameters.get("tls-creds"):
            raise Refused(
                f"this QEMU's migrations are to use TLS (tls-creds={parameters['tls-creds']}),"
                " which a hand-over through cprd does not speak: migrate-set-parameters"
                " tls-creds='' first"
            )
        mode = str(parameters.get("mode", ""))
        settings = cls(mode, {name: now[name] for name in wanted})
        try:
            if wanted:
                await _set_capabilities(monitor, wanted)
            await monitor.execute("migrate-set-parameters", mode=MODE)
        except MonitorRefused as error:
            await settings.restore(monitor)
            raise Refused(
                f"this QEMU ({'.'.join(map(str, monitor.version))}) cannot hand over its memory: it"
                f" takes QEMU 10.0 or later ({error})"
            ) from None
        return settings

    async def restore(self, monitor: Monitor) -> None:
        """Best effort: the guest does not depend on it."""
        with suppress(CprdError):
            if self.capabilities:
                await _set_capabilities(monitor, self.capabilities)
        with suppress(CprdError):
            await monitor.execute("migrate-set-parameters", mode=self.mode or "normal")


async def _set_capabilities(monitor: Monitor, states: dict[str, bool]) -> None:
    rows = [{"capability": name, "state": state} for name, state in states.items()]
    await monitor.execute("migrate-set-capabilities", capabilities=rows)


class Recorder:
    """One migration out of a QEMU. Owns its sockets and the descriptors of the CPR stream."""

    def __init__(self, monitor: Monitor, place: PrivatePlace, timeout: float) -> None:
        self.monitor = monitor
        self.timeout = timeout
        self.tape = Tape()
        self.state = cpr.CprState()
        self.main = bytearray()
        self._paths = (place.at("cpr-in"), place.at("main-in"))
        self._way_out = place.at("gdb")
        self._ran = False
        self._cpr_listener = place.listen("cpr-in")
        self._main_listener = place.listen("main-in")
        for listener in (self._cpr_listener, self._main_listener):
            listener.setblocking(False)
        self._cpr: socket.socket | None = None
        self._main: socket.socket | None = None

    async def take_cpr(
        self, forward: Callable[[bytes, list[int]], Awaitable[None]] | None = None
    ) -> None:
        """`migrate`, and the CPR stream to its end. The guest runs on. `forward` sees each piece.

        Raises MonitorRefused (QEMU will not), Timeout, Damaged, LimitExceeded."""
        unix = {"transport": "socket", "type": "unix"}
        channels = [
            {"channel-type": kind, "addr": {**unix, "path": path}}
            for kind, path in zip(("cpr", "main"), self._paths, strict=True)
        ]
        migrating = asyncio.ensure_future(
            self.monitor.execute("migrate", self.timeout, channels=channels)
        )
        arriving = asyncio.ensure_future(readable(self._cpr_listener.fileno(), self.timeout))
        try:
            await asyncio.wait((migrating, arriving), return_when=asyncio.FIRST_COMPLETED)
            if not arriving.done():
                await migrating  # raises, as a rule
                if not await arriving:
                    raise Timeout(f"QEMU did not connect within {self.timeout:g} s")
            elif not arriving.result():
                raise Timeout(f"QEMU did not connect within {self.timeout:g} s")
            self._cpr = self._cpr_listener.accept()[0]
            failure = await self._drain(self._cpr, forward)
            await migrating
        finally:
            for task in (arriving, migrating):
                task.cancel()
            with suppress(Exception, asyncio.CancelledError):
                await migrating
        if failure is not None:
            raise failure
        try:
            self.state = cpr.parse(self.tape.data, self.tape.fds, self.tape.offsets)
        except cpr.VMStateError as error:
            raise Damaged(f"QEMU's CPR stream is not whole: {error}") from None
        if not self.state.fds:
            raise Refused(
                "QEMU's CPR stream has no memory in it: start the VM with memory-backend-memfd,"
                "share=on and -machine aux-ram-share=on (cprctl qemu check)"
            )

    async def _drain(
        self,
        sock: socket.socket,
        forward: Callable[[bytes, list[int]], Awaitable[None]] | None,
    ) -> CprdError | None:
        """To the end, whatever comes; what was wrong with it."""
        failure: CprdError | None = None
        loop = asyncio.get_running_loop()
        until = loop.time() + self.timeout
        while True:
            if not await readable(sock.fileno(), until - loop.time()):
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
            self.tape.feed(data, fds.tolist())
            if not data:
                return failure
            if forward is not None and failure is None:
                try:
                    await forward(data, fds.tolist())
                except (CprdError, OSError) as error:
                    failure = error if isinstance(error, CprdError) else Damaged(str(error))

    async def take_main(self, forward: Callable[[bytes], Awaitable[None]] | None = None) -> None:
        """Hang up on the CPR channel; QEMU stops the guest and sends the rest. `forward` gets each
        piece at once.

        Raises Timeout, Damaged; the guest resumes when this recorder is closed."""
        assert self._cpr is not None
        self._ran = await self.monitor.status() in ("running", "suspended")
        self._cpr.close()
        if not await soon_readable(self._main_listener.fileno(), 0.02):
            await self._connecting()
        self._main = self._main_listener.accept()[0]
        self._main.setblocking(False)
        loop = asyncio.get_running_loop()
        until = loop.time() + self.timeout
        while True:
            if not await soon_readable(self._main.fileno(), until - loop.time()):
                raise Timeout(
                    f"QEMU's main stream did not end within {self.timeout:g} s; without the"
                    " description at its end (suppress-vmdesc=on) its end cannot be told"
                )
            try:
                data = self._main.recv(_CHUNK)
            except BlockingIOError:
                continue
            except OSError as error:
                raise Damaged(f"QEMU's main stream broke: {error}") from None
            if not data:
                raise Damaged(
                    f"QEMU's main stream ends after {len(self.main)} bytes, not whole"
                    f"{await self._why()}"
                )
            self.main += data
            if forward is not None:
                await forward(data)
            if stream.is_whole(self.main):
                return

    async def _connecting(self) -> None:
        """Wait for QEMU's main connection, or for its word that there will be none."""
        failing = asyncio.ensure_future(
            self.monitor.event(migration_is("failed", "cancelled"), self.timeout)
        )
        arriving = asyncio.ensure_future(readable(self._main_listener.fileno(), self.timeout))
        try:
            await asyncio.wait((failing, arriving), return_when=asyncio.FIRST_COMPLETED)
            if not arriving.done() or not arriving.result():
                raise Timeout("QEMU did not connect to its main channel")
        finally:
            for task in (failing, arriving):
                task.cancel()
            with suppress(Exception, asyncio.CancelledError):
                await failing

    async def _why(self) -> str:
        """What QEMU says of its migration's failure."""
        with suppress(MonitorRefused):
            said = (await self.monitor.execute("query-migrate")).get("error-desc")
            if said:
                return f": {why(str(said))}"
        return ""

    def complete(self) -> None:
        """SHUT(0) on the return path. Sent is not yet completed: see `completed`."""
        assert self._main is not None
        self._main.sendall(stream.DONE)

    async def completed(self) -> str:
        """What QEMU says came of it: "completed", or "failed" or "cancelled" (the guest runs on).
        Raises MonitorLost when it does not say."""
        over = migration_is("completed", "failed", "cancelled")
        event = self.monitor.next_event(over, 0.02) or await self.monitor.event(over, self.timeout)
        return str(event["data"]["status"])

    async def take_back(self) -> str:
        """Before SHUT(0) was sent: let go in the order that leaves the guest running, and wait
        until QEMU has given up on the migration. The run state then. Raises MonitorLost."""
        self._main_listener.close()
        for sock in (self._main, self._cpr):
            if sock is not None:
                sock.close()
        self._cpr_listener.close()
        with suppress(MonitorRefused):
            if await self.monitor.migration() == "setup":
                await self.monitor.execute("migrate_cancel")
        loop = asyncio.get_running_loop()
        until = loop.time() + self.timeout
        while await self.monitor.migration() in UNDER_WAY and loop.time() < until:
            await asyncio.sleep(0.01)
        until = min(until, loop.time() + RESUMES)
        while (status := await self.monitor.status()) == "finish-migrate" and loop.time() < until:
            await asyncio.sleep(0.005)
        if status == "finish-migrate" and await self.monitor.migration() not in UNDER_WAY:
            status = await unstick(self.monitor, self._way_out, live=self._ran)
        return status

    def close(self) -> None:
        """Everything. Harmless again."""
        self._main_listener.close()
        self._cpr_listener.close()
        for sock in (self._main, self._cpr):
            if sock is not None:
                sock.close()
        self.tape.close()


def describe(status: str) -> str:
    """Where the guest is, in words, after a step was taken back."""
    if status in ("running", "suspended"):
        return "the guest runs on in its QEMU"
    return f"the guest is in its QEMU as before ({status})"

"""Giving a state to a new QEMU that waits for it, stopped, and hearing that it has loaded it.

The new QEMU listens at a path (or on an inherited socket), takes the CPR stream to its end, makes
its devices and hangs up; its main channel and monitor are connected already, because we made both.
After the main stream it says SHUT on the return path: 0 when it has loaded. It does not run: -S.
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from cprd.linux import rights
from cprd.qemu.failure import Failed, MonitorBusy, MonitorLost
from cprd.qemu.process import readable, soon_readable, writable
from cprd.qemu.qmp import Monitor
from cprd.qemu.stream import Answers

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cprd.qemu.process import Process

_PATIENT = 0.001  # s between two tries to connect to a path that QEMU is about to make


class Replayer:
    """One new QEMU. Owns its sockets (not `process`)."""

    def __init__(
        self, process: Process, main: socket.socket, monitor: socket.socket, timeout: float
    ) -> None:
        self.process = process
        self.timeout = timeout
        self.monitor: Monitor | None = None
        self._main = main
        self._main.setblocking(False)
        self._monitor = monitor
        self._cpr: socket.socket | None = None
        self._until = asyncio.get_running_loop().time() + timeout

    def _left(self) -> float:
        return max(0.0, self._until - asyncio.get_running_loop().time())

    def restart_clock(self) -> None:
        self._until = asyncio.get_running_loop().time() + self.timeout

    async def connect_cpr(self, path: str) -> None:
        """Connect to its CPR socket as soon as it listens. Raises Failed."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._cpr = sock
        while True:
            try:
                sock.connect(path)
                break
            except (FileNotFoundError, ConnectionRefusedError):
                self._alive("before it listened for its state")
                if not self._left():
                    raise Failed(f"the new QEMU did not listen within {self.timeout:g} s") from None
                await asyncio.sleep(_PATIENT)
        sock.setblocking(False)

    async def send_cpr(self, pieces: Iterable[tuple[bytes, int]]) -> None:
        """(bytes, -1), or a dummy byte with its descriptor, which stays the caller's."""
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
                    if not await writable(self._cpr.fileno(), self._left()):
                        raise Failed("the new QEMU does not read its CPR state") from None
                except OSError as error:
                    await self._gone(f"while it read its CPR state ({error})")

    async def end_cpr(self) -> None:
        """Nothing follows: its loader waits for this. Returns when it has made its devices."""
        assert self._cpr is not None
        with suppress(OSError):
            self._cpr.shutdown(socket.SHUT_WR)
        if not await readable(self._cpr.fileno(), self._left()):
            raise Failed("the new QEMU took its CPR state, and does not go on")
        self._cpr.close()

    async def greet(self) -> Monitor:
        """Its monitor: it answers only once its devices exist. Raises Failed."""
        try:
            self.monitor = await Monitor.over(
                self._monitor, f"the new QEMU (pid {self.process.pid})", max(0.1, self._left())
            )
        except (MonitorBusy, MonitorLost):
            await self._gone("before its monitor answered")
        assert self.monitor is not None
        return self.monitor

    async def send_main(self, data: bytes | bytearray | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._main.send(rest, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                if not await writable(self._main.fileno(), self._left()):
                    raise Failed("the new QEMU does not read its main stream") from None
            except OSError as error:
                await self._gone(f"while it read its main stream ({error})")

    async def loaded(self) -> None:
        """Wait until it says that it has loaded. Raises Failed."""
        answers = Answers()
        while True:
            if not await soon_readable(self._main.fileno(), self._left()):
                raise Failed(f"the new QEMU did not load its state within {self.timeout:g} s")
            try:
                data = self._main.recv(4096)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if not data:
                await self._gone("before it had loaded its state")
            value = answers.feed(data)
            if value is not None:
                if value:
                    await self._gone(f"when it loaded its state (it says {value})")
                return

    def _alive(self, when: str) -> None:
        if self.process.ended():
            raise Failed(f"the new QEMU ended {when}")

    async def _gone(self, when: str) -> None:
        """It broke off: as a rule because it ends, which is waited for so that it can be said."""
        ended = await self.process.wait(2.0)
        raise Failed(f"the new QEMU {'ended' if ended else 'broke off'} {when}")

    async def close(self) -> None:
        if self.monitor is not None:
            await self.monitor.close()
        else:
            self._monitor.close()
        self._main.close()
        if self._cpr is not None:
            self._cpr.close()


def unlink(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)

"""The same verbs with await, on trio.

    async with cprd.trio.connect() as daemon:
        async with daemon.load("web") as claim:
            ...

`daemon.load(...)` and `connect()` can be awaited, too: then the result is the block to enter, or to
close(). What can block (closing foreign descriptors) is done in a thread.
"""

from __future__ import annotations

import time
from _socket import socket
from collections.abc import Callable
from typing import Any

from cprd.client.awaiting import Claim, Connection, Daemon, LiveState, Loop, Prepared
from cprd.client.claim import Saved
from cprd.client.exchange import Answer, Common, Step
from cprd.client.sockets import is_lost, open_socket, receive_now, send_now
from cprd.errors import absent

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cprd.client.exchange import Steps

try:
    import trio
except ModuleNotFoundError as error:
    raise ImportError(absent("trio", "cprd.trio")) from error

__all__ = ["Claim", "Daemon", "LiveState", "Prepared", "Saved", "connect", "live"]


class _Connection(Connection):
    def __init__(self, path: str, common: Common) -> None:
        super().__init__(path, common)
        self._turn = trio.Lock()

    def take_turn_now(self) -> bool:
        return not self._turn.locked()  # and nobody else runs before the turn is ended

    def end_turn(self) -> None:
        if self._turn.statistics().owner is trio.lowlevel.current_task():
            self._turn.release()

    def close_socket(self, sock: socket) -> None:
        if sock.fileno() >= 0:
            trio.lowlevel.notify_closing(sock.fileno())
            sock.close()

    async def do(self, step: Step) -> Any:
        left = max(0.0, step.until - time.monotonic())
        with trio.CancelScope(deadline=trio.current_time() + left, shield=step.shielded):
            if step.kind == "turn":
                return await self._turn.acquire()
            if step.kind == "connect":  # waits only while the backlog is full
                return await trio.to_thread.run_sync(open_socket, self.path, left)
            if step.kind == "ask":
                await self._send(step.what[0])
                return await self._receive(room=step.what[1])
            if step.kind == "receive":
                return await self._receive()
            if step.kind == "watch":
                return await self._watch()
            if step.kind == "work":
                return await trio.to_thread.run_sync(step.what)
            await trio.sleep_forever()
        if step.kind != "sleep":
            raise TimeoutError
        return None

    def start(self, steps: Steps[None]) -> Callable[[], None]:
        """Drive `steps` in a task of the run itself, which ends with the run at the latest."""
        scope = trio.CancelScope()

        async def drive() -> None:
            with scope:
                await self.drive(steps)

        trio.lowlevel.spawn_system_task(drive)
        return scope.cancel

    async def _watch(self) -> None:
        while self.sock is not None and not is_lost(self.sock):
            try:
                await trio.lowlevel.wait_readable(self.sock.fileno())
            except trio.ClosedResourceError:
                return

    async def _send(self, data: bytes) -> None:
        assert self.sock is not None
        while True:
            try:
                return send_now(self.sock, data)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self.sock.fileno())

    async def _receive(self, *, room: bool = False) -> Answer:
        assert self.sock is not None
        while True:
            await trio.lowlevel.wait_readable(self.sock.fileno())
            try:
                return receive_now(self.sock, room)
            except BlockingIOError:
                continue


_loop = Loop(_Connection)
connect, live = _loop.connect, _loop.live

"""The driver of a connection on an asyncio loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from cprd.asyncio.waits import finish, in_thread, ready
from cprd.client.awaiting import Connection
from cprd.client.exchange import Answer, Common, Step
from cprd.client.sockets import is_lost, open_socket, receive_now, send_now

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cprd.client.exchange import Steps

_running: set[asyncio.Task[None]] = set()  # a loop alone does not keep tasks


class LoopConnection(Connection):
    def __init__(self, path: str, common: Common) -> None:
        super().__init__(path, common)
        self._turns: dict[object, asyncio.Future[None]] = {}  # by task; the first has the turn

    def take_turn_now(self) -> bool:
        return not self._turns  # and nobody else runs before the turn is ended

    def end_turn(self) -> None:
        task = _task()
        if self._turns and next(iter(self._turns)) is task:
            self._leave_line(task)

    def _leave_line(self, task: object) -> None:
        self._turns.pop(task, None)
        for first in self._turns.values():
            if not first.done():
                first.set_result(None)
            break

    async def do(self, step: Step) -> Any:
        if step.kind == "turn":
            return await self._take_turn(step)
        if step.kind == "connect":  # waits only while the backlog is full
            left = max(0.0, step.until - time.monotonic())
            return await in_thread(lambda: open_socket(self.path, left))
        if step.kind == "ask":
            await self._send(step, step.what[0])
            return await self._receive(step, room=step.what[1])
        if step.kind == "receive":
            return await self._receive(step)
        if step.kind == "watch":
            return await self._watch(step)
        if step.kind == "work":
            return await in_thread(step.what)
        never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            await finish(never, step.until, step.shielded)
        except TimeoutError:
            return None

    def start(self, steps: Steps[None]) -> Callable[[], None]:
        """Drive `steps` in a task of the loop, which ends with the loop at the latest."""
        loop = asyncio.get_running_loop()
        task = loop.create_task(self.drive(steps), name="cprd")
        _running.add(task)
        task.add_done_callback(_running.discard)

        def stop() -> None:  # of any thread
            if not loop.is_closed():
                loop.call_soon_threadsafe(task.cancel)

        return stop

    async def _watch(self, step: Step) -> None:
        loop = asyncio.get_running_loop()
        while self.sock is not None and not is_lost(self.sock):
            await ready(self.sock.fileno(), loop.add_reader, loop.remove_reader, step)

    async def _take_turn(self, step: Step) -> None:
        task, turn = _task(), asyncio.get_running_loop().create_future()
        self._turns[task] = turn
        if len(self._turns) == 1:
            return
        try:
            await finish(turn, step.until, step.shielded)
        except BaseException:
            self._leave_line(task)
            raise

    async def _send(self, step: Step, data: bytes) -> None:
        assert self.sock is not None
        loop = asyncio.get_running_loop()
        while True:
            try:
                return send_now(self.sock, data)
            except BlockingIOError:
                await ready(self.sock.fileno(), loop.add_writer, loop.remove_writer, step)

    async def _receive(self, step: Step, *, room: bool = False) -> Answer:
        assert self.sock is not None
        loop = asyncio.get_running_loop()
        while True:
            await ready(self.sock.fileno(), loop.add_reader, loop.remove_reader, step)
            try:
                return receive_now(self.sock, room)
            except BlockingIOError:
                continue


def _task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # garbage collection, after the end of the loop
        return None

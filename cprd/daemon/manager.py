"""The service manager, slow, mute or gone: messages of the daemon, and the wait for answers. No
client ever waits for the manager."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import trio

from cprd.errors import CprdError
from cprd.systemd import notify

T = TypeVar("T")

PATIENCE = 5.0  # s without an answer, after which the manager is called mute
AWAY = 1.0  # s until a manager that has gone is tried again
REPORT = 10.0  # s between two looks at the status line, where no signs of life are wanted


async def adrive(steps: notify.Steps[T], on_silence: Callable[[], None] | None = None) -> T:
    """Run steps of `cprd.systemd` to the end, however long the manager takes. Calls `on_silence`
    each time the manager leaves a step without an answer for PATIENCE. Can be cancelled, and leaves
    no descriptor then."""
    await trio.lowlevel.checkpoint_if_cancelled()
    try:
        while True:
            kind, fd = next(steps)
            wait = (
                trio.lowlevel.wait_readable if kind == "readable" else trio.lowlevel.wait_writable
            )
            if on_silence is not None:
                with trio.move_on_after(PATIENCE) as patience:
                    await wait(fd)
                if not patience.cancelled_caught:
                    continue
                on_silence()
            await wait(fd)
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        steps.close()


class Reporter:
    """Tells the manager: the daemon is ready, the number of holds, signs of life."""

    def __init__(self, address: str, status: Callable[[], str], watchdog: float | None) -> None:
        """`address`: $NOTIFY_SOCKET. `watchdog`: seconds between two signs of life, as the manager
        wants, or None. Raises InvalidInput."""
        self._manager = notify.Manager(address)
        self._status = status
        self._watchdog = watchdog
        self._pause = REPORT if watchdog is None else watchdog / 2
        self._news = trio.Event()
        self._due = self._told = 0  # READY=1: how often asked for, how often told
        self._note = ""  # before the status line, until that changes
        self._said = ""  # the status line that the manager has

    def ready(self, note: str = "") -> None:
        """Tell soon: the daemon serves (again); `note` goes before the status line."""
        self._due += 1
        self._note = note
        self._news.set()

    def say(self, message: bytes) -> None:
        """Tell the manager now, or never where a wait would be needed."""
        with notify.Manager(self._manager.address) as own:
            try:
                own.send_now(message)
            except (CprdError, OSError):
                pass  # RELOADING=1 and STOPPING=1 only colour what `systemctl status` shows

    async def tend(self) -> None:
        """For ever: tell the manager changes. To a manager that was away, tell everything again."""
        while True:
            self._news = trio.Event()
            pause, due, text = self._pause, self._due, self._status()
            try:
                message = self._message(due != self._told, text)
                if message:
                    await adrive(self._manager.tell(message))
                self._told, self._said = due, text
            except (CprdError, OSError):  # the store's task says so in the log
                self._told, self._said = -1, ""
                pause = min(pause, AWAY)
            with trio.move_on_after(pause):
                await self._news.wait()

    def _message(self, ready: bool, text: str) -> bytes:
        parts = [notify.READY] if ready else []
        if ready or text != self._said:
            if not ready:
                self._note = ""
            parts.append(notify.status(self._note + text))
        if self._watchdog is not None:
            parts.append(notify.WATCHDOG)
        return b"\n".join(parts)

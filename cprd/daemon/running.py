"""The daemon from the first socket to the last signal: tasks, and the effect of signals."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import trio

from cprd.daemon import log, reexec
from cprd.daemon.clock import now
from cprd.daemon.config import Config
from cprd.daemon.manager import Reporter
from cprd.daemon.releasing import Releasing
from cprd.daemon.server import Server, raise_nofile
from cprd.daemon.storage.fdstore import Store
from cprd.daemon.storage.notes import Notes
from cprd.daemon.storage.shelves import Keeper
from cprd.daemon.tending import tend
from cprd.errors import CprdError
from cprd.protocol.registry import Registry
from cprd.systemd import notify
from cprd.systemd.unit import store_outlives_stop

FIRST_ANSWER = 1.0  # s that the manager may take, before clients are served without its store


class Running:
    """One run of the daemon, with all parts."""

    def __init__(
        self, given: reexec.Given, settings: Config, signals: tuple[signal.Signals, ...]
    ) -> None:
        """Take over `given`, and read the holds. Each of `signals` may end a run."""
        raise_nofile()
        self.given = given
        self.signals = signals
        self.releasing = Releasing()
        self.releasing.adopt(given.passed)
        first = int(now() * 1e9)
        self.registry = Registry(settings.quota, first, _step)
        address = _notify_socket()
        self.keeper = Keeper(self.releasing, now, self.registry.replies, managed=bool(address))
        notes = Notes(_place_of_notes(given))
        self.daemon = Server(settings, self.keeper, self.releasing, self.registry, notes)
        found = self.keeper.adopt(given.pairs(), frozenset(given.durable), frozenset(given.once))
        self.daemon.adopt(*found)
        self.store: Store | None = None
        self.reporter: Reporter | None = None
        if address:
            self.store = Store(self.keeper, notify.Manager(address))
            self.reporter = Reporter(address, self.status, _watchdog())

    def status(self) -> str:
        """The line for `systemctl status`."""
        return f"{len(self.registry)} holds, kept: {self.keeper.kept}"

    async def run(self) -> bool:
        """Serve until a signal. Whether the daemon is to execute itself anew, or to end."""
        with trio.open_signal_receiver(*self.signals) as signals:
            # Blocked by the one that became us.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self.signals)
            collect_young_only()
            async with trio.open_nursery() as nursery:
                if self.store is not None:
                    nursery.start_soon(tend, "store", self.store.tend)
                    if self.keeper.kept != "store":  # so that the first client's holds are
                        with trio.move_on_after(FIRST_ANSWER):
                            await self.store.asked.wait()
                nursery.start_soon(tend, "releasing", self.releasing.tend)
                nursery.start_soon(self.daemon.serve, *(sock for _, sock in self.given.listeners))
                self._log_ready()
                if self.reporter is not None:
                    self.reporter.ready()
                    nursery.start_soon(tend, "report", self.reporter.tend)
                again = await self._until_told(signals)
                self.daemon.stopping = True
                nursery.cancel_scope.cancel()
        return again

    def become_new(self) -> NoReturn:
        """Execute the program anew, with everything that must stay open."""
        self.given.passed = self.releasing.pass_on()
        reexec.become_new(self.keeper.shelves(), self.given)

    def end(self) -> None:
        """Before the end of the daemon: releasers let go of what ends with the daemon, and the end
        waits for nobody. Blocks not."""
        self.keeper.abandon()
        until_closed = self.releasing.stop()
        self.keeper.close()
        if until_closed is not None:
            until_closed.close()

    def _log_ready(self) -> None:
        own = self.given.own
        log.event(
            "ready",
            pid=os.getpid(),
            socket=own.path if own is not None else "inherited",
            kept=self.keeper.kept,
            holds=len(self.registry),
        )

    async def _until_told(self, signals: AsyncIterator[int]) -> bool:
        """Wait for the end: whether the daemon is to execute itself anew."""
        async for number in signals:
            if number != signal.SIGHUP:
                await self._say_stopping(number)
                return False
            if await self._may_reload():
                return True
        raise AssertionError("signals do not end")

    async def _may_reload(self) -> bool:
        self.daemon.reloading = trio.Event()
        if self.reporter is not None:
            self.reporter.say(notify.reloading())
        if await trio.to_thread.run_sync(reexec.new_version_works):
            return True
        self.daemon.reloading.set()
        self.daemon.reloading = None
        if self.reporter is not None:
            self.reporter.ready("reload refused: cprd --check failed; ")
        return False

    async def _say_stopping(self, number: int) -> None:
        """Say how many holds end with the process, or with a stop of the unit."""
        if self.reporter is not None:
            self.reporter.say(notify.stopping(self.status()))
        holds = len(self.registry)
        lost = at_stop = 0
        why = None
        if self.keeper.kept != "store":
            lost = holds
        elif holds:
            outlives = await trio.to_thread.run_sync(store_outlives_stop, os.environ)
            at_stop = 0 if outlives else holds
            why = "systemd does not say whether the store outlives a stop"
            why = None if outlives is not None else why
        log.event(
            "stopping",
            level=log.WARNING if lost else log.INFO,
            signal=signal.Signals(number).name,
            lost=lost or None,
            lost_unless_restarted=at_stop or None,
            why=why,
        )


def collect_young_only() -> None:
    """Let Python's collector look at an object twice at most, for as long as the process lives.

    A look at all takes 10 ms and more, and many containers in a request start one. Nothing is lost:
    holds, connections and requests make no cycles, and are freed without the collector."""
    gc.freeze()
    gc.callbacks.append(_freeze)


def _freeze(phase: str, info: dict[str, Any]) -> None:
    if phase == "stop" and info["generation"]:
        gc.freeze()


def _step() -> int:
    """From one generation to the next, at random."""
    return 1 + int.from_bytes(os.urandom(2), "little")


def _place_of_notes(given: reexec.Given) -> str:
    """The directory for notes about live holds, beside the socket that cprd serves; an empty string
    where the socket has no path."""
    for _, sock in given.listeners:
        path = sock.getsockname()
        if isinstance(path, str) and path:
            return f"{path}.live"
    return ""


def _notify_socket() -> str:
    """$NOTIFY_SOCKET, where a service manager can be told; an empty string otherwise."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    try:
        if address:
            notify.Manager(address)
    except CprdError as error:
        log.event("no-manager", level=log.ERROR, why=str(error))
        return ""
    return address


def _watchdog() -> float | None:
    try:
        return notify.watchdog_interval(os.environ)
    except CprdError as error:
        log.event("no-watchdog", level=log.ERROR, why=str(error))
        return None

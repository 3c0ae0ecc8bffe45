"""The stage: a private cprd, the service, its clients, and the restarts.

Everything is bounded in time, and no process and no file is left behind (should this process be
killed, the kernel ends the children).
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import trio

import cprd
from cprd.demo.load import Load
from cprd.demo.timeline import Report, Restart
from cprd.errors import CprdError, LimitExceeded
from cprd.linux.nofile import limits, raise_soft_limit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_libc = ctypes.CDLL(None)

CLONE = Path(cprd.__file__).parents[1]
NAME = "demo"
KILLS = (1, 3, 6, 8)  # of ten restarts, by number from 0: kill -9
STEP = 15.0  # seconds that any single step may take
WARM_UP, TAIL = 1.0, 1.0  # seconds before the first restart and after the last


class Settings(NamedTuple):
    """The size of the demonstration."""

    connections: int = 500
    restarts: int = 10
    seconds: float = 14.0
    rate: float = 1500.0  # requests a second, of all clients together


class Progress(NamedTuple):
    """The state of the demonstration, to be shown."""

    restarts: int
    answers: int
    connected: int
    seconds: float
    doing: str


class Child:
    """A child: ended with SIGTERM, then SIGKILL, at the latest with this process."""

    def __init__(self, arguments: list[str], folder: Path, **extra: str) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("CPRD_")}
        environment |= {"CPRD_SOCKET": str(folder / "cprd.sock"), **extra}
        # The same cprd as here, wherever the demo is called from.
        paths = [str(CLONE), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        self.log = folder / "log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                cwd=folder,
                preexec_fn=_end_with_parent,  # noqa: PLW1509 - this process has one thread
            )
        self.pidfd = os.pidfd_open(self.process.pid)
        self.said = b""

    async def gone(self) -> int:
        """Wait for the end. Returns the exit status."""
        with self._in_time("end"):
            await trio.lowlevel.wait_readable(self.pidfd)
        status = self.process.wait()
        while data := os.read(self._stdout(), 4096):
            self.said += data
        return status

    async def ready(self) -> int:
        """Wait for the line "ready PORT". Returns the port."""
        with self._in_time("get ready"):
            while (port := self.number(b"ready", whole=True)) is None:
                await trio.lowlevel.wait_readable(self._stdout())
                data = os.read(self._stdout(), 4096)
                if not data:
                    raise CprdError(f"the demo's server did not start: {self.last_words()}")
                self.said += data
        return int(port)

    def number(self, word: bytes, *, whole: bool = False) -> float | None:
        """The number in the line "WORD NUMBER" of the output; None before."""
        for line in self.said.splitlines(keepends=True):
            if line.startswith(word) and (line.endswith(b"\n") or not whole):
                return float(line.split()[1])
        return None

    def _stdout(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    @contextmanager
    def _in_time(self, what: str) -> Iterator[None]:
        try:
            with trio.fail_after(STEP):
                yield
        except trio.TooSlowError:
            raise CprdError(
                f"a process of the demo did not {what} within {STEP:g} s: {self.last_words()}"
            ) from None

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def end(self) -> None:
        """End the process, and close what belongs to it."""
        try:
            if self.process.poll() is None:
                self.process.terminate()
                try:
                    self.process.wait(3)
                except subprocess.TimeoutExpired:
                    self.process.kill()
                    self.process.wait()
        finally:
            os.close(self.pidfd)
            if self.process.stdout is not None:
                self.process.stdout.close()


def _end_with_parent() -> None:
    _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, prctl(2)


def run(settings: Settings, progress: Callable[[Progress], None]) -> Report:
    """Run the demonstration. Raises CprdError when the stage breaks; the report has the verdict."""
    _make_room(settings.connections)
    # A short path: an address of AF_UNIX has 107 bytes.
    base = None if len(tempfile.gettempdir()) < 60 else "/tmp"
    folder = Path(tempfile.mkdtemp(prefix="cprd-demo-", dir=base))
    children: list[Child] = []
    try:
        return trio.run(_perform, settings, progress, folder, children)
    except BaseExceptionGroup as group:
        raise _cause(group) from None
    finally:
        for child in reversed(children):
            child.end()
        shutil.rmtree(folder, ignore_errors=True)


def _cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error to tell: an explained error, else the first."""
    for kind in (CprdError, KeyboardInterrupt, BaseException):
        found: BaseException | None = group.subgroup(kind)
        while isinstance(found, BaseExceptionGroup):
            found = found.exceptions[0]
        if found is not None:
            return found
    return group


def _make_room(connections: int) -> None:
    """Raise the soft RLIMIT_NOFILE, here and for the children. Raises LimitExceeded."""
    _, hard = limits()
    needed = 2 * connections + 100
    if hard < needed:
        raise LimitExceeded(
            f"{connections} connections need {needed} descriptors, and the hard RLIMIT_NOFILE is"
            f" {hard}: raise it (ulimit -Hn), or use --connections {max(1, (hard - 100) // 2)}"
        )
    raise_soft_limit(needed)


async def _perform(
    settings: Settings, progress: Callable[[Progress], None], folder: Path, children: list[Child]
) -> Report:
    begun = time.monotonic()
    load = Load(settings.connections, settings.rate, lambda: time.monotonic() - begun)
    play = _Play(settings, folder, children, load)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(_end_on_signal, nursery.cancel_scope)
        nursery.start_soon(_tell, progress, play)
        await play.set_up()
        begun = time.monotonic()  # the clock of the report
        nursery.start_soon(load.run, play.port)
        await play.restart_all()
        await trio.sleep(TAIL)
        play.seconds = load.clock()
        play.doing = "waiting for the last answers"
        with trio.move_on_after(STEP):
            await load.settle()
        lost = load.owed
        nursery.cancel_scope.cancel()
    load.close()
    if play.seconds == 0.0:
        raise KeyboardInterrupt
    return Report(
        connections=settings.connections,
        seconds=play.seconds,
        answers=load.answers,
        restarts=play.restarts,
        lost=lost,
        wrong=load.wrong,
        dropped=load.dropped,
        visits=load.visits,
        slowest=load.slowest,
    )


async def _end_on_signal(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGHUP) as signals:
        async for _ in signals:
            scope.cancel()


async def _tell(progress: Callable[[Progress], None], play: _Play) -> None:
    while True:
        progress(play.progress())
        await trio.sleep(0.2)


class _Play:
    """The course of events."""

    def __init__(self, settings: Settings, folder: Path, children: list[Child], load: Load) -> None:
        self.settings = settings
        self.folder = folder
        self.children = children
        self.load = load
        self.port = 0
        self.seconds = 0.0
        self.doing = "starting cprd and the server"
        self.restarts: list[Restart] = []

    def progress(self) -> Progress:
        load = self.load
        return Progress(
            len(self.restarts), len(load.answers), load.connected, load.clock(), self.doing
        )

    async def set_up(self) -> None:
        daemon = self._start(
            "-c", "import sys; from cprd.daemon.command import main; sys.exit(main())"
        )
        await _answers(daemon, self.folder / "cprd.sock")
        self.server = self._start("-m", "cprd.demo.server", NAME)
        self.port = await self.server.ready()
        self.doing = "connecting"
        await self.load.connect(self.port)

    async def restart_all(self) -> None:
        count = self.settings.restarts
        every = max(0.0, self.settings.seconds - WARM_UP - TAIL) / max(1, count)
        for number in range(count):
            self.doing = "serving"
            await trio.sleep(max(0.0, WARM_UP + number * every - self.load.clock()))
            kill = number % 10 in KILLS
            if kill:  # at any moment
                await trio.sleep(random.uniform(0, every / 4))
            await self._restart(kill=kill, crash=number == count // 2)
        self.doing = "serving"
        rest = self.settings.seconds - TAIL - self.load.clock()
        await trio.sleep(max(0.0, rest))

    async def _restart(self, *, kill: bool, crash: bool) -> None:
        """SIGTERM (or SIGKILL), wait for the end, start the next: as a service manager does."""
        self.doing = "killing the server" if kill else "restarting the server"
        asked = self.load.clock()
        self.server.process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        status = await self.server.gone()
        if status != (-signal.SIGKILL if kill else 0):
            raise CprdError(f"the demo's server ended with status {status}, see {self.server.log}")
        gone = self.load.clock()
        if crash:
            self.doing = "killing a fresh claimant"
            victim = self._start("-m", "cprd.demo.server", NAME, CPRD_DEMO_CRASH="1")
            if await victim.gone() != -signal.SIGKILL:
                raise CprdError("the successor that was to be killed lived on")
        self.server = self._start("-m", "cprd.demo.server", NAME)
        await self.server.ready()
        with_cprd = self.server.number(b"loaded") or 0.0
        self.restarts.append(Restart(asked, gone, self.load.clock(), crash, with_cprd, kill))

    def _start(self, *arguments: str, **extra: str) -> Child:
        child = Child(list(arguments), self.folder, **extra)
        self.children.append(child)
        return child


async def _answers(daemon: Child, path: Path) -> None:
    """Wait until the private cprd answers."""
    deadline = trio.current_time() + STEP
    while True:
        try:
            cprd.connect(path).close()
            return
        except cprd.Unavailable as error:
            if daemon.process.poll() is not None or trio.current_time() > deadline:
                raise CprdError(
                    f"the demo's own cprd did not start: {daemon.last_words()}"
                ) from error
        await trio.sleep(0.02)

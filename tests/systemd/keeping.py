"""A cprd in its own unit, to be stopped at its pause points, killed there, and asked again.

The unit is the one that we ship; only its program is started by way of a few lines that let a test
choose, while it runs, the point at which it stops: SIGUSR1 reads it from a file. The tests speak to
it from outside the machine, through its socket.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cprd

from .machine import Machine, MachineError
from .ours import install

PATIENCE = 30.0  # s, for whatever should have happened long ago
UNIT = "cprd.service"

PROGRAM = """
import os, signal, sys
import cprd.linux.pause, cprd.daemon.storage.shelf, cprd.daemon.storage.shelves
import cprd.daemon.storage.fdstore

def arm(*_):
    with open("/run/cprd/pause") as file:
        cprd.linux.pause._where = file.read()
    cprd.linux.pause._hits.clear()

signal.signal(signal.SIGUSR1, arm)
if os.path.exists("/run/cprd/pause-at-start"):
    cprd.linux.pause._where = open("/run/cprd/pause-at-start").read()
if os.path.exists("/run/cprd/settings"):
    exec(open("/run/cprd/settings").read())
from cprd.daemon.command import main
main()
"""


class Keeping:
    """cprd in a booted machine, with its unit started."""

    def __init__(self, machine: Machine, *, settings: str = "", drop_in: str = "") -> None:
        """`settings`: Python that its program runs at start. `drop_in`: for the unit."""
        self.machine = machine
        install(machine)
        self.place = machine.root / "run/cprd"
        (machine.root / "run/boot/cprd-test.py").write_text(PROGRAM)
        if settings:
            self.settings(settings)
        machine.unit(
            f"{UNIT}.d/test.conf",
            "[Service]\nExecStart=\nExecStart=test-python /run/boot/cprd-test.py\n"
            f"RestartSec=20ms\n{drop_in}",
        )
        machine.systemctl("start", "cprd.socket", UNIT)
        self.path = str(self.place / "cprd.sock")
        self.pid = machine.main_pid(UNIT)

    def settings(self, text: str) -> None:
        """Python that its program runs at each start from now on."""
        (self.place / "settings").write_text(text)
        (self.place / "settings").chmod(0o644)

    def connect(self) -> cprd.Daemon:
        return cprd.connect(self.path)

    def rows(self) -> dict[str, dict[str, Any]]:
        with self.connect() as daemon:
            return {row["name"]: row for row in daemon.list()}

    def phases(self) -> dict[str, str]:
        return {name: row["phase"] for name, row in self.rows().items()}

    def kept(self) -> str:
        with self.connect() as daemon:
            return str(daemon.status()["kept"])

    def await_kept(self, where: str) -> None:
        """Wait until it says so: shelves go to the store beside the requests."""
        end = time.monotonic() + PATIENCE
        while self.kept() != where:
            assert time.monotonic() < end, f"not kept in the {where}"
            time.sleep(0.01)

    # Stopping and killing

    def arm(self, where: str) -> None:
        """Let it stop at this pause point ("" for none), from now on."""
        file = self.place / "pause"
        file.write_text(where)
        file.chmod(0o644)
        self.quiet()
        os.kill(self.pid, signal.SIGUSR1)
        self.connect().close()  # handled by the time it answers

    def arm_at_start(self, where: str) -> None:
        """Let each start from now on stop there."""
        file = self.place / "pause-at-start"
        if where:
            file.write_text(where)
            file.chmod(0o644)
        else:
            file.unlink(missing_ok=True)

    def stands(self) -> bool:
        """Whether it has stopped itself."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except FileNotFoundError:
            return False
        return stat.rpartition(")")[2].split()[0] == "T"

    def quiet(self) -> None:
        """Wait until it has let go of all that has ended, which it does after it has answered."""
        with self.connect() as daemon:
            while daemon.status()["closing"]:
                time.sleep(0.002)

    def await_stop(self, unless: Callable[[], bool] = lambda: False) -> bool:
        """Wait until it stands; False when `unless` came true first, and nothing is left to do."""
        end = time.monotonic() + PATIENCE
        quiet: Task | None = None
        while not self.stands():
            if quiet is None and unless():
                quiet = Task(self.quiet)
            elif quiet is not None and quiet.done():
                return self.stands()
            assert time.monotonic() < end, self.machine.journal(UNIT)[-3000:]
            time.sleep(0.003)
        return True

    def await_start(self) -> None:
        """Wait for another main process than the one before."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                pid = self.machine.main_pid(UNIT)
            except (MachineError, OSError):
                pid = 0
            if pid not in (0, self.pid):
                self.pid = pid
                return
            assert time.monotonic() < end, self.machine.journal(UNIT)[-3000:]
            time.sleep(0.01)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """And wait for the next one."""
        os.kill(self.pid, number)
        self.await_start()

    def systemctl(self, *arguments: str) -> None:
        self.machine.systemctl(*arguments)
        self.pid = self.machine.main_pid(UNIT)


class Task:
    """A function in a thread of its own; its result or its error when it is asked for."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error

    def done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> Any:
        self._thread.join(PATIENCE)
        assert self.done(), "a client was not answered"
        if self._error is not None:
            raise self._error
        return self._result


class Thing:
    """A state with a number and the writing end of a pipe, whose reading end we keep: it tells
    whether anybody has the state."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.reading, self._writing = os.pipe()
        self.state = cprd.State()
        self.state["number"] = number
        self.state.save_fd("pipe", 0, self._writing)

    def saved(self) -> None:
        """We ourselves want no copy any more."""
        if self._writing >= 0:
            os.close(self._writing)
            self._writing = -1

    def let_go(self, seconds: float = 1.0) -> bool:
        """Whether everybody has let go of it, within so long."""
        poll = select.poll()
        poll.register(self.reading, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def close(self) -> None:
        self.saved()
        os.close(self.reading)

    def is_in(self, claim: cprd.Claim) -> bool:
        """Whether it came back whole: it is the very same pipe."""
        if claim.state["number"] != self.number or claim.state.fd_count != 1:
            return False
        os.write(claim.state.find_fd("pipe", 0), b"%d" % self.number)
        return os.read(self.reading, 99) == b"%d" % self.number


@contextlib.contextmanager
def things(*numbers: int) -> Iterator[list[Thing]]:
    made = [Thing(number) for number in numbers]
    yield made
    for thing in made:
        thing.close()

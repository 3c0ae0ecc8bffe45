"""A cprd to be stopped at its pause points, killed there, and asked again: whoever keeps what it
holds meanwhile, systemd (tests/systemd) or the parent of --keep (tests/keep).

Its program is started by way of a few lines that let a test choose, while it runs, the point at
which it stops: SIGUSR1 reads it from a file.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import cprd
from tests.support.patience import PATIENCE, patience, until
from tests.support.processes import state

SMALL = (
    "cprd.daemon.storage.shelf.WANTED_BUFFER = 8192\n"
    "cprd.daemon.storage.journal.MANY_BYTES = 2000\n"
    "cprd.daemon.storage.journal.TIMES = 1\n"
)

PROGRAM = """
import os, signal, sys

PLACE = "@PLACE@"
import cprd.linux.pause, cprd.daemon.storage.shelf, cprd.daemon.storage.shelves
import cprd.daemon.storage.fdstore, cprd.daemon.storage.journal, cprd.daemon.storage.record

def arm(*_):
    with open(PLACE + "/pause") as file:
        cprd.linux.pause.arm(file.read())

signal.signal(signal.SIGUSR1, arm)
if os.path.exists(PLACE + "/pause-at-start"):
    cprd.linux.pause.arm(open(PLACE + "/pause-at-start").read())
if os.path.exists(PLACE + "/settings"):
    exec(open(PLACE + "/settings").read())
from cprd.daemon.command import main
sys.exit(main())
"""


def program(place: str) -> str:
    """The program that starts cprd; `place` is the directory of its files, as cprd sees it."""
    return PROGRAM.replace("@PLACE@", place)


class Kept:
    """cprd and who keeps for it. Subclasses set `place` (the directory of its files), `path` (its
    socket) and `pid` (cprd's), before anything else is called."""

    place: Path
    path: str
    pid: int

    def await_start(self) -> None:
        """Wait until there is another cprd than `pid`, which this is then."""
        raise NotImplementedError

    def said(self) -> str:
        """What cprd and its keeper have logged."""
        raise NotImplementedError

    def stored(self) -> int:
        """How many descriptors its keeper keeps."""
        raise NotImplementedError

    def client(
        self,
        program: str,
        *arguments: str,
        user: str | None = None,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a Python program, for which cprd.connect() finds this cprd."""
        raise NotImplementedError

    def kill_client(self, child: subprocess.Popen[bytes]) -> None:
        raise NotImplementedError

    def settings(self, text: str) -> None:
        """Python that its program runs at each start from now on."""
        (self.place / "settings").write_text(text)
        (self.place / "settings").chmod(0o644)

    def connect(self) -> cprd.Daemon:
        return cprd.connect(self.path)

    def rows(self) -> dict[str, cprd.Row]:
        with self.connect() as daemon:
            return {row["name"]: row for row in daemon.list()}

    def phases(self) -> dict[str, str]:
        return {name: row["phase"] for name, row in self.rows().items()}

    def kept(self) -> str:
        with self.connect() as daemon:
            return str(daemon.status()["kept"])

    def await_kept(self, where: str) -> None:
        """Wait until it says so: shelves go to the store beside the requests."""
        until(lambda: self.kept() == where, lambda: f"not kept in the {where}")

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
        return state(self.pid) == "T"

    def quiet(self) -> None:
        """Wait until it has let go of all that has ended, which it does after it has answered."""
        with self.connect() as daemon:
            until(lambda: not daemon.status()["closing"], lambda: f"{daemon.status()}")

    def await_stop(self, unless: Callable[[], bool] = lambda: False) -> bool:
        """Wait until it stands; False when `unless` came true first, and nothing is left to do."""
        quiet: Task | None = None

        def over() -> bool:
            nonlocal quiet
            if self.stands():
                return True
            if quiet is None and unless():
                quiet = Task(self.quiet)
            return quiet is not None and quiet.done()

        until(over, lambda: self.said()[-3000:])
        return self.stands()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """And wait for the next one."""
        os.kill(self.pid, number)
        self.await_start()


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
        """Whether everybody has let go of it, within so long on idle cores."""
        poll = select.poll()
        poll.register(self.reading, select.POLLIN)
        return bool(poll.poll(patience(seconds) * 1000))

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

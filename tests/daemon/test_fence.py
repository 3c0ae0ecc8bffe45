"""The owner of a live hold is fenced while files of its uid block, or while cprd re-executes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cprd
from cprd.daemon.operators import FENCED
from cprd.linux.rights import close_all, unread
from tests.daemon.test_sweep import stops
from tests.support.blocking import Fuse, Lingering, Writeback, reload
from tests.support.child import Child, Line
from tests.support.daemon import DaemonProcess
from tests.support.patience import in_time, patience, until
from tests.support.processes import state

pytestmark = pytest.mark.usefixtures("nothing_leaks")


def own(line: Line, path: str) -> None:
    """Change the hold each time that a word comes."""
    live = cprd.live("chat", path)
    number = 0
    while True:
        try:
            live["count"] = number = number + 1
            line.say(f"kept {number}")
        except cprd.Fenced:
            line.say("Fenced")
        line.hear()


class Dropping:
    """drop by force, in a thread."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._drop)
        self.thread.start()

    def _drop(self) -> None:
        try:
            with cprd.connect(self.path) as daemon:
                daemon.drop("chat", force=True, timeout=60)
        except Exception as error:
            self.error = error

    def finish(self, seconds: float) -> None:
        self.thread.join(seconds)
        assert not self.thread.is_alive()
        if self.error is not None:
            raise self.error


def ask(owner: Child) -> str:
    owner.say()
    return owner.hear()


def phases(daemon: DaemonProcess) -> dict[str, str]:
    with daemon.connect() as client:
        return {row["name"]: row["phase"] for row in client.list()}


@pytest.fixture
def owner(new_daemon: DaemonProcess) -> Iterator[Child]:
    with Child(own, new_daemon.path) as child:
        assert child.hear() == "kept 1"
        yield child


@pytest.fixture(params=[Lingering, Writeback])
def blocked(
    request: pytest.FixtureRequest, new_daemon: DaemonProcess, owner: Child, tmp_path: Path
) -> Iterator[Lingering | Fuse]:
    """What cprd lets go of, and blocks, until `answer`. (The owner has no copies: was forked.)"""
    blocker: Lingering | Fuse = request.param(tmp_path)
    files = blocker.files()
    saved = cprd.State()
    saved.save_fds("file", enumerate(files))
    with new_daemon.connect() as client:
        client.save("ended", saved)
        close_all(files)
        blocker.mute()
        client.drop("ended")
        until(lambda: client.status()["closing"], lambda: "nothing blocks")
    yield blocker
    blocker.close()


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "blocked", [Writeback, pytest.param(Lingering, marks=pytest.mark.full)], indirect=True
)
def test_behind_files_that_block_a_drop_by_force_is_refused_in_time(
    new_daemon: DaemonProcess, owner: Child, blocked: Lingering | Fuse
) -> None:
    begin = time.monotonic()
    with pytest.raises(cprd.LimitExceeded, match=f"pid {owner.pid}, now: files of uid .* block"):
        Dropping(new_daemon.path).finish(FENCED + patience(5))
    assert time.monotonic() - begin > FENCED - 1
    assert ask(owner) == "kept 2"  # in peace
    assert phases(new_daemon) == {"chat": "live"}
    blocked.answer()
    until(lambda: not closing(new_daemon), lambda: "still blocked")
    assert ask(owner) == "Fenced"  # late, as the error said
    assert phases(new_daemon) == {"chat": "live"}
    owner.kill()
    with cprd.live("chat", new_daemon.path, wait=patience(5)) as state:
        assert state["count"] == 2
        state.confirm()
        state.end()


@pytest.mark.timeout(120)
def test_cprd_re_executes_while_a_fence_waits_for_files(
    new_daemon: DaemonProcess, owner: Child, blocked: Lingering | Fuse
) -> None:
    dropping = Dropping(new_daemon.path)
    until(lambda: closing(new_daemon) >= 2, lambda: "the fence does not wait")
    assert in_time(reload(new_daemon), 2)
    assert ask(owner) == "kept 2"
    blocked.answer()
    dropping.finish(FENCED + patience(5))
    assert ask(owner) == "Fenced"
    assert phases(new_daemon) == {}


def closing(daemon: DaemonProcess) -> int:
    with daemon.connect() as client:
        return sum(client.status()["closing"].values())


@pytest.mark.parametrize("where", ["daemon:fence", "daemon:fenced"])
def test_cprd_re_executes_before_and_after_a_fence(
    start_daemon: Callable[..., DaemonProcess], where: str
) -> None:
    daemon = start_daemon(env={"CPRD_PAUSE": where})
    with Child(own, daemon.path) as owner:
        assert owner.hear() == "kept 1"
        dropping = Dropping(daemon.path)
        stops(daemon.pid)
        os.kill(daemon.pid, signal.SIGHUP)
        while dropping.thread.is_alive():  # the next version stands still there as well
            if state(daemon.pid) == "T":
                os.kill(daemon.pid, signal.SIGCONT)
            dropping.thread.join(0.02)
        dropping.finish(0)
        assert ask(owner) == "Fenced"
        assert phases(daemon) == {}


def test_a_hold_that_ends_while_a_drop_leaves_its_turn_is_no_failure(
    new_daemon: DaemonProcess,
) -> None:
    live = cprd.live("chat", new_daemon.path)
    live["count"] = 1
    with new_daemon.connect() as client:
        refused: list[Exception] = []

        def drop() -> None:
            try:
                client.drop("chat", force=True)
            except cprd.NotHeld as error:
                refused.append(error)

        os.kill(new_daemon.pid, signal.SIGSTOP)  # and both requests are in line, in this order
        threads = []
        for request, line in ((drop, client.fileno()), (live.end, live._live.line.fileno())):
            threads.append(threading.Thread(target=request))
            threads[-1].start()
            until(lambda fd=line: unread(fd), lambda: "not asked")  # type: ignore[misc]
        os.kill(new_daemon.pid, signal.SIGCONT)
        for thread in threads:
            thread.join(patience(5))
            assert not thread.is_alive()
        assert len(refused) == 1
    assert not [line for line in new_daemon.log() if line.startswith("failed ")]

"""A process is killed with SIGKILL at every step of the protocol, one step after the other.

The steps are the pause points: a first walk learns them all, then each further walk stops at the
next one (SIGSTOP on itself) and is killed there. Afterwards what is held must be the old state or
the new one, whole, or in doubt and whole after release --force; and all its descriptors must work.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import cprd
from tests.support.checkout import CHECKOUT
from tests.support.child import Child
from tests.support.daemon import DaemonProcess
from tests.support.goods import Goods, goods
from tests.support.patience import PATIENCE, until
from tests.support.walk import NAME

pytestmark = pytest.mark.usefixtures("nothing_leaks")

MANY = 260  # more than one message takes: a tree


class Walker:
    """One process that walks through an act."""

    def __init__(
        self, path: str, client: str, act: str, cargo: Goods, env: dict[str, str] | None = None
    ) -> None:
        command = [sys.executable, "-m", "tests.support.walk", path, client, act]
        self.process = subprocess.Popen(
            [*command, *cargo.arguments()],
            pass_fds=cargo.fds(),
            env={**os.environ, "PYTHONPATH": str(CHECKOUT), **(env or {})},
            cwd=CHECKOUT,
        )

    def finish(self) -> None:
        assert self.process.wait(PATIENCE) == 0

    def stands(self) -> None:
        """Wait until it has stopped at its pause point."""
        stops(self.process.pid)

    def kill(self, *, may_have_ended: bool = False) -> None:
        self.process.kill()
        status = self.process.wait(PATIENCE)
        assert status == -signal.SIGKILL or (may_have_ended and status == 0)


def stops(pid: int) -> None:
    found = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert found is not None
    assert found.si_code == os.CLD_STOPPED, "it ended instead of standing at its pause point"


def learn(tmp_path: Path, path: str, client: str, act: str, cargo: Goods) -> list[str]:
    """All pause points of an act, in order."""
    log = tmp_path / "points"
    Walker(path, client, act, cargo, {"CPRD_PAUSE_LOG": str(log)}).finish()
    points = log.read_text().split()
    assert points
    return points


def phases(daemon: cprd.Daemon) -> list[str]:
    return [row["phase"] for row in daemon.list()]


def settled(daemon: cprd.Daemon) -> list[str]:
    """The phases, once cprd has learned of the death."""

    def quiet() -> bool:
        rows = daemon.list()
        return not [
            row
            for row in rows
            if row["phase"] in ("prepared", "claimed")
            or row["in_use_by"] is not None
            or (row["phase"] == "in-doubt" and row["claimant"])
        ]

    until(quiet, lambda: f"{daemon.list()}")
    return phases(daemon)


def take(daemon: cprd.Daemon, *candidates: Goods) -> str:
    """Load what is held, and hold it to whose it says that it is. Returns whose."""
    with daemon.load(NAME) as claim:
        tag = claim.state["tag"]
        [cargo] = [cargo for cargo in candidates if cargo.tag == tag]
        cargo.check(claim.state)
    return str(tag)


SAVES = [
    ("blocking", "save", 3),
    ("blocking", "save", MANY),
    ("trio", "save", 3),
    ("blocking", "prepare-commit", 3),
    ("trio", "prepare-commit", 3),
]


@pytest.mark.parametrize(("client", "act", "count"), SAVES)
def test_a_saver_killed_at_every_step_leaves_the_old_state_or_its_own(
    daemon: DaemonProcess, tmp_path: Path, client: str, act: str, count: int
) -> None:
    with daemon.connect() as connection:
        base = daemon.fds()
        with goods("new", count) as new:
            points = learn(tmp_path, daemon.path, client, act, new)
            assert take(connection, new) == "new"
        tree = {"pack:sent"} if count > 253 else set()
        assert {"pack:manifest", "pack:parked", "save:packed", *tree} <= set(points)
        outcomes = []
        for number, point in enumerate(points, 1):
            with goods("old", 2, base=1000) as old, goods("new", count) as new:
                connection.save(NAME, old.state())
                walker = Walker(daemon.path, client, act, new, {"CPRD_PAUSE": f"#{number}"})
                walker.stands()
                walker.kill()
                left = settled(connection)
                if left == ["held", "in-doubt"]:
                    with pytest.raises(cprd.Busy, match="between prepare and commit"):
                        connection.load(NAME)
                    connection.release(NAME, force=True)
                    left = ["in-doubt"]
                elif left != ["held"]:
                    pytest.fail(f"killed at {point} it left {left}")
                whose = take(connection, old, new)
                outcomes.append(f"{left[0]} {whose}")
                with pytest.raises(cprd.NotHeld):
                    connection.load(NAME)
        answered = points.index("save:answered")
        done = "held new" if act == "save" else "in-doubt new"
        assert outcomes[:answered] == ["held old"] * answered
        assert outcomes[answered] == done
        assert outcomes[-1] == "held new"
        daemon.await_fds(base, queues=1)


CLAIMS = [
    (client, act)
    for client in ("blocking", "trio")
    for act in ("confirm", "begin-confirm", "confirm-next", "reject")
]


@pytest.mark.parametrize(("client", "act"), CLAIMS)
def test_a_claimant_killed_at_every_step_loses_nothing(
    daemon: DaemonProcess, tmp_path: Path, client: str, act: str
) -> None:
    with daemon.connect() as connection:
        base = daemon.fds()
        with goods("old", base=1000) as old, goods("new") as new:
            connection.save(NAME, old.state())
            points = learn(tmp_path, daemon.path, client, act, new)
            if act in ("confirm-next", "reject"):
                connection.wait(NAME, 5)
                take(connection, old, new)
        assert points[0] == "load:before"
        for number, point in enumerate(points, 1):
            with goods("old", base=1000) as old, goods("new") as new:
                connection.save(NAME, old.state())
                walker = Walker(daemon.path, client, act, new, {"CPRD_PAUSE": f"#{number}"})
                walker.stands()
                walker.kill()
                left = settled(connection)
                passed = points[:number]
                if "confirm:answered" in passed:
                    if act == "confirm-next":
                        assert left == ["held"], point
                        assert take(connection, old, new) == "new"
                    else:
                        assert left == [], point
                    continue
                if "begin:answered" in passed:
                    assert left == ["in-doubt"], point
                    with pytest.raises(cprd.Busy, match="began to act"):
                        connection.load(NAME)
                    connection.release(NAME, force=True)
                else:
                    assert left == ["held"], point
                claimed = "load:claimed" in passed
                row = connection.list()[0]
                assert row["attempts"] == int(claimed), point
                assert bool(row["last_reject"]) == claimed, point
                assert take(connection, old, new) == "old"
        daemon.await_fds(base, queues=1)


# And the other side: the daemon stands still at each of its own steps, and goes on


def test_a_daemon_that_stands_still_at_every_step_only_makes_its_clients_wait(
    start_daemon: Callable[..., DaemonProcess], tmp_path: Path
) -> None:
    log = tmp_path / "points"
    log.touch()
    first = start_daemon(env={"CPRD_PAUSE_LOG": str(log)})
    at_start = len(log.read_text().split())

    def all_of(acts: tuple[str, ...], path: str) -> None:
        with goods("new") as cargo, cprd.connect(path) as connection:
            for act in acts:
                if act == "save":
                    connection.save(NAME, cargo.state(), if_exists="replace")
                elif act == "prepare":
                    connection.prepare(NAME, cargo.state(), if_exists="replace").commit()
                elif act == "reject":
                    claim = connection.load(NAME, wait=5)
                    claim.reject("so")
                    claim.close()
                elif act == "next":
                    with connection.load(NAME, wait=5) as claim:
                        claim.confirm(next=cargo.state(), after_exit=False)
                else:
                    with connection.load(NAME, wait=5) as claim:
                        cargo.check(claim.state)
                        claim.begin()
            with pytest.raises(cprd.NotHeld):
                connection.load(NAME)

    acts = ("save", "reject", "next", "prepare", "begin")
    all_of(acts, first.path)
    until(lambda: log.read_text().split().count("bundle:drain") >= 3, log.read_text)
    first.stop()
    points = log.read_text().split()
    wanted = {"journal:record", "keeper:put", "keeper:ended", "daemon:applied"}
    assert wanted | {"daemon:saved", "daemon:claimed", "daemon:confirmed"} <= set(points)
    for number in distinct(points, at_start):
        daemon = start_daemon(env={"CPRD_PAUSE": name_of(points, number)})
        with Child(lambda _, path: all_of(acts, path), daemon.path) as client:
            stops(daemon.pid)
            os.kill(daemon.pid, signal.SIGCONT)
            assert client.wait() == 0
        with daemon.connect() as connection:
            assert phases(connection) == []
        assert daemon.stop() == 0


def name_of(points: list[str], number: int) -> str:
    """NAME#K of a point. (Threads of cprd pass points, too: under load another point may be the
    one with that number.)"""
    name = points[number - 1]
    return f"{name}#{points[:number].count(name)}"


def distinct(points: list[str], since: int) -> list[int]:
    """The number of each first occurrence of a point after another: every kind of step once."""
    seen: set[tuple[str, str]] = set()
    numbers = []
    before = ""
    for number, point in enumerate(points, 1):
        if number > since and (before, point) not in seen:
            seen.add((before, point))
            numbers.append(number)
        before = point
    return numbers


def test_a_client_killed_while_the_daemon_stands_still_leaves_one_whole_state(
    start_daemon: Callable[..., DaemonProcess], tmp_path: Path
) -> None:
    """The client dies after it has asked and before cprd has done it, at each of cprd's steps."""
    log = tmp_path / "points"
    first = start_daemon(env={"CPRD_PAUSE_LOG": str(log)})
    with goods("old") as old, goods("new") as new:
        with first.connect() as connection:
            connection.save(NAME, old.state())
            already = len(log.read_text().split())
            connection.save(NAME, new.state(), if_exists="replace")
            until(lambda: "bundle:drained" in log.read_text(), log.read_text)
    first.stop()
    points = log.read_text().split()
    for number in range(already + 1, len(points) + 1):
        where = name_of(points, number)
        daemon = start_daemon(env={"CPRD_PAUSE": where})
        with goods("old", base=1000) as old, goods("new") as new:
            with daemon.connect() as connection:
                connection.save(NAME, old.state())
            walker = Walker(daemon.path, "blocking", "save", new)
            stops(daemon.pid)
            # Letting go of the old one, in a thread, may come after the answer.
            walker.kill(may_have_ended=where.startswith("bundle:drain"))
            os.kill(daemon.pid, signal.SIGCONT)
            with daemon.connect() as connection:
                assert phases(connection) == ["held"]
                assert take(connection, old, new) == "new"  # it was asked, so it was done
        daemon.stop()

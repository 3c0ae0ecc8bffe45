"""A client in C is killed at every step, as the Python clients are: what is left is the old state
or the new one, whole, or in doubt and whole after release --force."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

import pytest

import cprd
from tests.c.building import Programs
from tests.c.conftest import Build
from tests.daemon.test_sweep import settled, stops, take
from tests.support.daemon import DaemonProcess
from tests.support.goods import Goods, blob, goods
from tests.support.patience import PATIENCE
from tests.support.walk import NAME

pytestmark = [pytest.mark.usefixtures("nothing_leaks"), pytest.mark.xdist_group("c")]

SAVES = {"save": ["save", NAME, "--replace"], "prepare": ["save", NAME, "--replace", "--prepare"]}
LOADS = {
    "confirm": ["load", NAME],
    "begin-confirm": ["load", NAME, "--begin"],
    "reject": ["load", NAME, "--reject=not today"],
    "confirm-next": ["load", NAME, "--next"],
}


class Walker:
    """cprd-c on its way through one act."""

    def __init__(
        self, programs: Programs, path: str, act: list[str], cargo: Goods, place: Path, **env: str
    ) -> None:
        self.process = subprocess.Popen(
            [programs.command, *act],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=cargo.fds(),
            env={**os.environ, "CPRD_SOCKET": path, **env},
        )
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self.process.stdin as stdin:
            stdin.write(spec(cargo, place))

    def finish(self) -> None:
        assert self.process.wait(PATIENCE) == 0

    def kill_there(self) -> None:
        """Wait until it stands at its pause point, and kill it."""
        try:
            stops(self.process.pid)
        finally:
            self.process.kill()
            self.process.wait(PATIENCE)


def spec(cargo: Goods, place: Path) -> bytes:
    """The same state as `cargo.state()`, as cprd-c reads it."""
    tag, data = place / f"{cargo.tag}.tag", place / f"{cargo.tag}.blob"
    tag.write_bytes(bytes([0xA0 + len(cargo.tag)]) + cargo.tag.encode())
    data.write_bytes(blob(cargo.tag))
    lines = [f"fd eventfd {number} {fd}" for number, fd in enumerate(cargo.eventfds)]
    lines += [f"fd connection {n} {ours.fileno()}" for n, (ours, _) in enumerate(cargo.pairs)]
    return "\n".join([*lines, f"packed tag {tag}", f"raw blob {data}", ""]).encode()


def learn(programs: Programs, path: str, act: list[str], cargo: Goods, place: Path) -> list[str]:
    """All pause points of an act, in order."""
    log = place / "points"
    Walker(programs, path, act, cargo, place, CPRD_PAUSE_LOG=str(log)).finish()
    points = log.read_text().split()
    log.unlink()
    assert points
    return points


def test_a_saver_killed_at_every_step_leaves_the_old_state_or_its_own(
    daemon: DaemonProcess, tmp_path: Path, built: Build
) -> None:
    for act, count in (("save", 3), ("save", 260), ("prepare", 3)):
        kill_saver(daemon, tmp_path, built("pause"), act, count)


def kill_saver(
    daemon: DaemonProcess, tmp_path: Path, programs: Programs, act: str, count: int
) -> None:
    with daemon.connect() as connection:
        with goods("new", count) as new:
            points = learn(programs, daemon.path, SAVES[act], new, tmp_path)
            assert take(connection, new) == "new"
        tree = {"pack:sent"} if count > 253 else set()
        known = {"pack:manifest", "pack:parked", f"{act}:before", f"{act}:answered", *tree}
        assert known <= set(points)
        outcomes = []
        for number, point in enumerate(points, 1):
            with goods("old", 2, base=1000) as old, goods("new", count) as new:
                connection.save(NAME, old.state())
                armed = {"CPRD_PAUSE": f"#{number}"}
                Walker(programs, daemon.path, SAVES[act], new, tmp_path, **armed).kill_there()
                left = settled(connection)
                if left == ["held", "in-doubt"]:
                    with pytest.raises(cprd.Busy, match="between prepare and commit"):
                        connection.load(NAME)
                    connection.release(NAME, force=True)
                    left = ["in-doubt"]
                elif left != ["held"]:
                    pytest.fail(f"killed at {point} it left {left}")
                outcomes.append(f"{left[0]} {take(connection, old, new)}")
    if act == "save":
        assert outcomes == ["held old"] * (len(points) - 1) + ["held new"]
    else:
        committed = points.index("commit:answered")
        doubt = points.index("prepare:answered")
        wanted = ["held old"] * doubt + ["in-doubt new"] * (committed - doubt)
        assert outcomes == [*wanted, *["held new"] * (len(points) - committed)]


def test_a_claimant_killed_at_every_step_leaves_one_whole_state(
    daemon: DaemonProcess, tmp_path: Path, built: Build
) -> None:
    for act in LOADS:
        kill_claimant(daemon, tmp_path, built("pause"), act)


def kill_claimant(daemon: DaemonProcess, tmp_path: Path, programs: Programs, act: str) -> None:
    with daemon.connect() as connection:
        with goods("old") as old, goods("new") as new:
            connection.save(NAME, old.state())
            points = learn(programs, daemon.path, LOADS[act], new, tmp_path)
            if act in ("confirm-next", "reject"):
                take(connection, old, new)
        assert points[:3] == ["connect:before", "connect:answered", "load:before"]
        for number, point in enumerate(points, 1):
            with goods("old", base=1000) as old, goods("new") as new:
                connection.save(NAME, old.state())
                armed = {"CPRD_PAUSE": f"#{number}"}
                Walker(programs, daemon.path, LOADS[act], new, tmp_path, **armed).kill_there()
                left = settled(connection)
                passed = points[:number]
                if {"confirm:answered", "confirm_next:answered"} & {*passed}:
                    assert left == (["held"] if act == "confirm-next" else []), point
                    if left:
                        assert take(connection, old, new) == "new"
                    continue
                if "begin:answered" in passed:
                    assert left == ["in-doubt"], point
                    with pytest.raises(cprd.Busy, match="began to act"):
                        connection.load(NAME)
                    connection.release(NAME, force=True)
                else:
                    assert left == ["held"], point
                claimed = "load:answered" in passed
                [row] = connection.list()
                assert row["attempts"] == int(claimed), point
                assert bool(row["last_reject"]) == claimed, point
                assert take(connection, old, new) == "old"

"""An owner is killed with SIGKILL at every step of a take-over, with a real cprd; and cprd stands
still, or is killed, at each of its own steps meanwhile.

Whatever dies where: the next owner finds the old content or the new one, whole.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from cprd.linux import pause
from cprd.linux.pause import point
from cprd.live.shape import Shape
from tests.daemon.test_sweep import distinct, name_of, stops
from tests.support.child import Child, Line
from tests.support.daemon import DaemonProcess
from tests.support.live import Live
from tests.support.patience import until

pytestmark = pytest.mark.usefixtures("nothing_leaks")

NAME = "chat"
SMALL = Shape(keys=2, records=2, spread=2, root_records=3, part=2)
KEYS = 7  # of the hold: several segments, and several parts of a root


def begin(line: Line, path: str, reading: int) -> None:
    """Keep a pipe under some keys, some of them twice; and be killed."""
    live = Live(path, NAME, shape=SMALL)
    for id in range(KEYS):
        live.kept.save_fd("pipe", id, reading)
    live.kept.delete_fd("pipe", 2)
    live.kept.save_section("by", "first")
    line.say("begun")
    line.hear()


def take_over(line: Line, path: str, reading: int, where: str, log: str) -> None:
    """Take the hold over, change it, and leave it; stop at the pause point `where`."""
    line.hear()
    pause.arm(where, log)
    live = Live(path, NAME, shape=SMALL)
    point("owner:claimed")
    live.read()
    point("owner:read")
    live.confirm()
    point("owner:confirmed")
    with live.kept.batch() as batch:
        batch.save_section("by", "second")
        batch.delete_fd("pipe", 4)
        batch.save_fd("pipe", 9, reading)
    point("owner:changed")
    live.kept.delete_fd("pipe", 5)
    point("owner:deleted")
    pause.arm()
    line.say("left")
    line.hear()
    live.close()


FIRST = ("first", [0, 1, 3, 4, 5, 6])
SECOND = ("second", [0, 1, 3, 5, 6, 9])
THIRD = ("second", [0, 1, 3, 6, 9])


def what_is_held(path: str, inode: int) -> tuple[str, list[int]]:
    """Take what is there, look at it, and end it."""
    with Live(path, NAME, wait=10.0, shape=SMALL) as live:
        assert live.answer["found"]
        found = live.read()
        for _, _, fd in found.state.fds():
            assert os.fstat(fd).st_ino == inode
        held = (found.state["by"], [id for _, id, _ in found.state.fds()])
        live.confirm()
        live.end(keep=False)
    return held


def left_by_first(path: str, writing: int) -> None:
    with Child(begin, path, writing) as first:
        assert first.hear() == "begun"
        first.kill()


class Pipe:
    """As in a `with` block: the reading end tells whether anybody has the writing end."""

    def __enter__(self) -> Pipe:
        self.reading, self.writing = os.pipe()
        os.set_blocking(self.reading, False)
        self.inode = os.fstat(self.writing).st_ino
        return self

    def let_go(self) -> None:
        os.close(self.writing)
        self.writing = -1
        until(self._is_let_go, lambda: "it is held still")

    def _is_let_go(self) -> bool:
        try:
            return os.read(self.reading, 1) == b""
        except BlockingIOError:
            return False

    def __exit__(self, *error: object) -> None:
        for fd in (self.reading, self.writing):
            if fd >= 0:
                os.close(fd)


def learn(daemon: DaemonProcess, tmp_path: Path) -> list[str]:
    """All pause points of a take-over, in order."""
    log = tmp_path / "points"
    with Pipe() as pipe:
        left_by_first(daemon.path, pipe.writing)
        with Child(take_over, daemon.path, pipe.writing, "", str(log)) as owner:
            owner.say()
            assert owner.hear() == "left"
            owner.kill()
        assert what_is_held(daemon.path, pipe.inode) == THIRD
    return log.read_text().split()


def test_an_owner_killed_at_every_step_of_a_take_over_loses_nothing(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    points = learn(daemon, tmp_path)
    ours = [name for name in points if name.startswith("owner:")]
    assert ours == [f"owner:{step}" for step in ("claimed", "read", "confirmed", *_CHANGES)]
    assert {"live:read", "live:send", "live:sent", "live:peek", "live:drain"} <= set(points)
    seen = []
    for number in range(1, len(points) + 1):
        with Pipe() as pipe:
            left_by_first(daemon.path, pipe.writing)
            where = f"#{number}"
            with Child(take_over, daemon.path, pipe.writing, where, "") as owner:
                owner.say()
                stops(owner.pid)
                owner.kill()
            held = what_is_held(daemon.path, pipe.inode)
            passed = points[:number]
            expected = [FIRST]
            if "owner:confirmed" in passed:
                expected = [SECOND] if "owner:changed" in passed else [FIRST, SECOND]
            if "owner:changed" in passed:
                expected = [THIRD] if "owner:deleted" in passed else [SECOND, THIRD]
            assert held in expected, f"{where}: {points[number - 1]}"
            seen.append(held)
            pipe.let_go()
    assert {repr(held) for held in seen} == {repr(held) for held in (FIRST, SECOND, THIRD)}


_CHANGES = ("changed", "deleted")


def test_an_owner_that_is_killed_while_cprd_stands_still_loses_nothing(
    start_daemon: Callable[..., DaemonProcess], tmp_path: Path
) -> None:
    """The owner dies after it has asked for the confirm and before cprd has done that, at each of
    cprd's steps; and cprd itself goes on."""
    log = tmp_path / "cprd"
    log.touch()
    first = start_daemon(env={"CPRD_PAUSE_LOG": str(log)})
    with Pipe() as pipe:
        left_by_first(first.path, pipe.writing)
        before = len(log.read_text().split())
        with Child(take_over, first.path, pipe.writing, "", "") as owner:
            owner.say()
            assert owner.hear() == "left"
            points = log.read_text().split()
            owner.kill()
    first.stop()
    wanted = {"journal:record", "keeper:put", "journal:end", "keeper:ended", "daemon:applied"}
    assert wanted | {"note:written", "daemon:claimed", "daemon:confirmed"} <= set(points[before:])
    for number in distinct(points, before):
        daemon = start_daemon(env={"CPRD_PAUSE": name_of(points, number)})
        with Pipe() as pipe:
            left_by_first(daemon.path, pipe.writing)
            with Child(take_over, daemon.path, pipe.writing, "", "") as owner:
                owner.say()
                stops(daemon.pid)
                owner.kill()
            os.kill(daemon.pid, signal.SIGCONT)
            assert what_is_held(daemon.path, pipe.inode) in (FIRST, SECOND, THIRD)
            pipe.let_go()
        daemon.stop()


@pytest.mark.parametrize(
    "where", ["journal:record", "keeper:put", "daemon:applied", "daemon:put-back"]
)
def test_cprd_killed_at_each_step_of_a_put_back_is_put_back_to_again(
    new_daemon: DaemonProcess, where: str
) -> None:
    def own(line: Line, path: str, writing: int) -> None:
        live = Live(path, NAME, shape=SMALL)
        live.kept.save_fd("pipe", 0, writing)
        live.kept.save_section("by", "owner")
        line.say("begun")
        line.hear()
        live.put_back()  # repeats itself
        line.say("put back")
        line.hear()

    with Pipe() as pipe:
        with Child(own, new_daemon.path, pipe.writing) as owner:
            owner.hear()
            new_daemon.kill()
            new_daemon.env["CPRD_PAUSE"] = where
            new_daemon.start()
            owner.say()
            stops(new_daemon.pid)
            del new_daemon.env["CPRD_PAUSE"]
            new_daemon.restart()
            assert owner.hear() == "put back"
            owner.kill()
        assert what_is_held(new_daemon.path, pipe.inode) == ("owner", [0])
        pipe.let_go()


def claim_and_confirm(line: Line, path: str) -> None:
    """Take over once told, and say what was there: each request repeats itself."""
    line.hear()
    live = Live(path, NAME, wait=10.0, shape=SMALL)
    if not live.answer["found"]:
        line.say("nothing")
        line.hear()
    live.read()
    line.say("claimed")
    line.hear()
    live.confirm()
    live.kept.save_section("by", "second")
    line.say("confirmed")
    line.hear()


def test_cprd_in_memory_killed_at_any_step_once_it_is_claimed_loses_nothing(
    start_daemon: Callable[..., DaemonProcess], tmp_path: Path
) -> None:
    log = tmp_path / "cprd"
    log.touch()

    def passed() -> int:
        return len(log.read_text().split())

    def leave(daemon: DaemonProcess, writing: int) -> None:
        left_by_first(daemon.path, writing)
        with daemon.connect() as client:  # whose steps are over
            until(lambda: client.list()[0]["fds"] == len(FIRST[1]), lambda: str(client.list()))

    first = start_daemon(env={"CPRD_PAUSE_LOG": str(log)})
    with Pipe() as pipe:
        leave(first, pipe.writing)
        with Child(claim_and_confirm, first.path) as owner:
            before = passed()
            owner.say()
            assert owner.hear() == "claimed"
            claimed = passed()
            owner.say()
            assert owner.hear() == "confirmed"
            points = log.read_text().split()
            owner.kill()
    first.stop()
    for begin, end in ((before, claimed), (claimed, len(points))):
        assert {"note:written", "daemon:applied"} <= set(points[begin:end])
    for number in distinct(points, before):
        daemon = start_daemon(env={"CPRD_PAUSE": name_of(points, number)})
        with Pipe() as pipe:
            leave(daemon, pipe.writing)
            with Child(claim_and_confirm, daemon.path) as owner:
                owner.say()
                if number > claimed:
                    assert owner.hear() == "claimed"
                    owner.say()
                stops(daemon.pid)
                del daemon.env["CPRD_PAUSE"]
                daemon.restart()
                if number <= claimed:  # cprd alone had the hold
                    assert owner.hear() == "nothing"
                    owner.kill()
                else:
                    assert owner.hear() == "confirmed", name_of(points, number)
                    owner.kill()
                    assert what_is_held(daemon.path, pipe.inode) == ("second", FIRST[1])
            pipe.let_go()
        daemon.stop()
        assert not os.listdir(daemon.path + ".live")

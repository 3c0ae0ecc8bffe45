"""Live holds in C with a real cprd: owners in C and in Python are killed, and each finds what the
other left."""

from __future__ import annotations

import os
import socket
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import cprd
from tests.c.building import Programs
from tests.c.conftest import Build
from tests.support.child import Child, Line
from tests.support.daemon import DaemonProcess
from tests.support.live import Live
from tests.support.patience import PATIENCE, until

pytestmark = [pytest.mark.usefixtures("nothing_leaks"), pytest.mark.xdist_group("c")]

NAME = "chat"


@pytest.fixture
def pipes() -> Iterator[list[int]]:
    ends = [end for _ in range(20) for end in os.pipe()]
    yield ends[::2]
    for end in ends:
        os.close(end)


class Owner:
    """cprd-c live, told one change after the other."""

    def __init__(
        self, programs: Programs, path: str, fds: list[int], *words: str, **env: str
    ) -> None:
        self.process = subprocess.Popen(
            [programs.command, "live", NAME, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=fds,
            env={**os.environ, "CPRD_SOCKET": path, **env},
        )

    def hear(self) -> list[str]:
        """All lines up to an answer, which is the last."""
        assert self.process.stdout is not None
        lines: list[str] = []
        while not lines or not (lines[-1] == "ok" or ": " in lines[-1]):
            line = self.process.stdout.readline()
            assert line, self.end()
            lines.append(line.rstrip("\n"))
        return lines

    def tell(self, line: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.hear()[-1]

    def keep(self, fds: list[int], name: str = "c") -> None:
        for number, fd in enumerate(fds):
            assert self.tell(f"replace {name} {number} {fd}") == "ok"

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=PATIENCE)

    def end(self) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, said


def inodes(fds: list[int], name: str = "c") -> list[tuple[str, int, int]]:
    return [(name, number, os.fstat(fd).st_ino) for number, fd in enumerate(fds)]


def kept_in(state: cprd.State) -> list[tuple[str, int, int]]:
    return [(name, id, os.fstat(fd).st_ino) for name, id, fd in state.fds()]


def listed(lines: list[str]) -> list[tuple[str, int, int]]:
    found = [line.split() for line in lines if line.startswith("fd ")]
    return [(name, int(id), int(inode)) for _, name, id, _, inode in found]


def own_in_python(line: Line, path: str, fds: list[int]) -> None:
    """Begin a hold or take it, keep `fds` under another name and wait to be killed."""
    live = Live(path, NAME, wait=PATIENCE)
    if live.answer["found"]:
        live.confirm()
    for number, fd in enumerate(fds):
        live.kept.save_fd("python", number, fd)
    live.kept.save_section("by", "python")
    line.say("owned")
    line.hear()


def test_owners_in_c_and_in_python_follow_each_other_by_kill_9(
    daemon: DaemonProcess, built: Build, pipes: list[int], tmp_path: Path
) -> None:
    first = Owner(built("sanitized"), daemon.path, pipes)
    assert first.hear() == ["ok"]
    first.keep(pipes)
    (tmp_path / "text").write_bytes(b"from C")
    assert first.tell(f"raw said {tmp_path / 'text'}") == "ok"
    assert first.tell("write m 4096 7") == "ok"
    assert first.tell("delete c 3") == "ok"
    left = [key for key in inodes(pipes) if key[1] != 3]
    first.kill()
    with Child(own_in_python, daemon.path, pipes[:3]) as second:
        assert second.hear() == "owned"
        second.kill()
    third = Owner(built("sanitized"), daemon.path, pipes, "--wait=20")
    lines = third.hear()
    assert listed(lines) == left + inodes(pipes[:3], "python")
    assert [line.split()[1] for line in lines if " by " in line or " said " in line] == [
        "said",
        "by",
    ]
    assert third.tell("delete python 1") == "ok"
    assert third.tell("delete c 0") == "ok"
    assert third.tell("memory m 4096") == "ok"
    assert third.tell("memory m 8192").startswith("InvalidInput")
    third.kill()
    with Live(daemon.path, NAME, wait=PATIENCE) as live:
        assert live.answer["found"]
        assert live.answer["attempts"] == 1
        found = live.read()
        gone = {("c", 0), ("python", 1)}
        wanted = [key for key in left + inodes(pipes[:3], "python") if key[:2] not in gone]
        assert kept_in(found.state) == wanted
        assert os.pread(found.memories["m"], 2, 0) == b"\7\7"
        assert found.state["by"] == "python"
        live.confirm()
        live.end(keep=False)
    with daemon.connect() as connection:
        assert connection.list() == []


def test_a_saved_state_becomes_a_live_hold_in_c(
    daemon: DaemonProcess, built: Build, pipes: list[int]
) -> None:
    state = cprd.State()
    for number, fd in enumerate(pipes):
        state.save_fd("c", number, fd)
    state["small"] = {"a": 1}
    state["large"] = b"x" * 100_000
    with daemon.connect() as connection:
        connection.save(NAME, state)
    owner = Owner(built("sanitized"), daemon.path, pipes)
    assert listed(owner.hear()) == inodes(pipes)
    assert owner.tell("delete c 19") == "ok"
    owner.kill()
    with Live(daemon.path, NAME, wait=PATIENCE) as live:
        found = live.read()
        assert kept_in(found.state) == inodes(pipes[:19])
        assert found.state["small"] == {"a": 1}
        assert bytes(found.state["large"]) == b"x" * 100_000
        live.confirm()
        live.end(keep=False)


def test_what_was_saved_is_taken_however_many_large_sections_there_are(
    daemon: DaemonProcess, built: Build, tmp_path: Path
) -> None:
    state = cprd.State()
    for number in range(600):
        state[f"s{number}"] = bytes(5000)
    with daemon.connect() as connection:
        connection.save(NAME, state)
    large = tmp_path / "large"
    large.write_bytes(bytes([1]) * 5000)
    owner = Owner(built("sanitized"), daemon.path, [])
    owner.hear()
    assert owner.tell(f"raw s7 {large}") == "ok"
    assert "more than 512" in owner.tell(f"raw another {large}")
    assert owner.tell("drop s8") == "ok"
    assert owner.end() == (0, "")
    with daemon.connect() as connection, connection.load(NAME) as claim:
        assert len([*claim.state.sections()]) == 599
        assert bytes(claim.state["s7"]) == large.read_bytes()
        claim.confirm()


def test_unconfirmed_a_hold_cannot_be_changed_and_goes_back_whole(
    daemon: DaemonProcess, built: Build, pipes: list[int]
) -> None:
    first = Owner(built("sanitized"), daemon.path, pipes)
    first.hear()
    first.keep(pipes)
    first.kill()
    second = Owner(built("sanitized"), daemon.path, pipes, "--wait=20", "--unconfirmed")
    assert listed(second.hear()) == inodes(pipes)
    for line in (f"replace c 0 {pipes[1]}", "delete c 0", "clear", "memory m 4096", "end"):
        assert "is not confirmed yet" in second.tell(line)
    assert second.end() == (0, "")
    with daemon.connect() as connection:
        [row] = connection.list()
        assert (row["phase"], row["last_reject"]) == ("held", "closed without confirm")
    third = Owner(built("sanitized"), daemon.path, pipes, "--unconfirmed")
    assert listed(third.hear()) == inodes(pipes)
    assert third.tell("confirm") == "ok"
    assert third.tell("confirm") == "ok"
    assert third.tell("delete c 1") == "ok"
    assert third.tell("end") == "ok"
    assert third.tell("delete c 2").startswith("InvalidInput: this live hold has ended")
    assert third.end() == (0, "")
    with daemon.connect() as connection:
        assert connection.list() == []


def finds(daemon: DaemonProcess, kept: list[tuple[str, int, int]]) -> None:
    """Python takes the hold over, finds these descriptors, and ends the hold."""
    with Live(daemon.path, NAME, wait=PATIENCE) as live:
        assert kept_in(live.read().state) == kept
        live.confirm()
        live.end(keep=False)


def test_a_hold_in_the_memory_of_a_killed_cprd_is_put_back(
    daemon: DaemonProcess, built: Build, pipes: list[int]
) -> None:
    owner = Owner(built("sanitized"), daemon.path, pipes)
    owner.hear()
    owner.keep(pipes)
    assert owner.tell("check") == "ok"
    daemon.restart()
    assert owner.tell("delete c 0") == "ok"  # no cprd is needed
    assert owner.tell("check") == "ok"
    assert owner.tell("check") == "ok"
    owner.kill()
    finds(daemon, inodes(pipes)[1:])


def test_a_hold_in_the_memory_of_a_killed_cprd_is_put_back_by_its_end_as_well(
    daemon: DaemonProcess, built: Build, pipes: list[int]
) -> None:
    """The owner ends before anybody has asked whether cprd is still the same."""
    owner = Owner(built("sanitized"), daemon.path, pipes)
    owner.hear()
    owner.keep(pipes)
    daemon.restart()
    assert owner.end() == (0, "")
    finds(daemon, inodes(pipes))


def test_a_claim_goes_back_into_the_cprd_that_comes_after_a_killed_one(
    daemon: DaemonProcess, built: Build, pipes: list[int]
) -> None:
    first = Owner(built("sanitized"), daemon.path, pipes)
    first.hear()
    first.keep(pipes)
    first.kill()
    second = Owner(built("sanitized"), daemon.path, [], "--unconfirmed", "--wait=20")
    second.hear()
    daemon.restart()
    assert second.end() == (0, "")
    finds(daemon, inodes(pipes))


def test_a_hold_that_is_dropped_by_force_is_fenced(
    daemon: DaemonProcess, built: Build, pipes: list[int]
) -> None:
    owner = Owner(built("sanitized"), daemon.path, pipes)
    owner.hear()
    owner.keep(pipes)
    with daemon.connect() as connection:
        with pytest.raises(cprd.Busy):
            connection.drop(NAME)
        connection.drop(NAME, force=True)
        assert owner.tell("delete c 0").startswith("Fenced: ")
        assert owner.tell(f"replace c 1 {pipes[0]}").startswith("Fenced: ")
        assert owner.end() == (0, "")
        assert connection.list() == []


def test_a_deleted_connection_ends_though_nobody_took_it(
    daemon: DaemonProcess, built: Build
) -> None:
    near, far = socket.socketpair()
    with far:
        far.settimeout(PATIENCE)
        with near:
            first = Owner(built("sanitized"), daemon.path, [near.fileno()])
            first.hear()
            first.keep([near.fileno()])
        first.kill()
        second = Owner(built("sanitized"), daemon.path, [], "--wait=20")
        second.hear()
        assert second.tell("delete c 0") == "ok"
        assert far.recv(1) == b""
        assert second.tell("end") == "ok"
        assert second.end() == (0, "")


def test_what_an_owner_left_can_be_loaded(
    daemon: DaemonProcess, built: Build, pipes: list[int]
) -> None:
    programs = built("sanitized")
    owner = Owner(programs, daemon.path, pipes)
    owner.hear()
    owner.keep(pipes)
    assert owner.tell("write m 5000 65") == "ok"
    assert "in use" in programs.run(daemon.path, "load", NAME, status=4)
    owner.kill()
    said = programs.run(daemon.path, "load", NAME, "--wait=20").splitlines()
    assert listed(said) == inodes(pipes)
    assert said[-1] == f"raw memory.m 5000 {zlib.crc32(b'A' * 5000):08x}"
    with daemon.connect() as connection:
        assert connection.list() == []


def test_memory_that_has_no_place_in_a_state_is_no_damage(
    daemon: DaemonProcess, built: Build, tmp_path: Path
) -> None:
    """A section of that key is there already; whoever takes the hold over finds both."""
    programs = built("sanitized")
    owner = Owner(programs, daemon.path, [])
    owner.hear()
    (tmp_path / "text").write_bytes(b"a section")
    assert owner.tell("write m 4096 65") == "ok"
    assert owner.tell(f"raw memory.m {tmp_path / 'text'}") == "ok"
    owner.kill()
    said = programs.run(daemon.path, "load", NAME, "--wait=20", status=1)
    assert "key (memory.m, 0) is used already" in said
    with daemon.connect() as connection:
        [row] = connection.list()
        assert (row["phase"], row["attempts"]) == ("held", 0)
    owner = Owner(programs, daemon.path, [])
    owner.hear()
    assert owner.tell("memory m 4096") == "ok"
    assert owner.tell("end") == "ok"
    assert owner.end() == (0, "")


def test_a_successor_killed_at_every_step_loses_nothing(
    daemon: DaemonProcess, built: Build, pipes: list[int], tmp_path: Path
) -> None:
    programs = built("pause")
    first = Owner(programs, daemon.path, pipes)
    first.hear()
    first.keep(pipes)
    first.kill()
    log = tmp_path / "points"
    owner = Owner(programs, daemon.path, [], "--wait=20", CPRD_PAUSE_LOG=str(log))
    assert listed(owner.hear()) == inodes(pipes)
    owner.kill()
    points = log.read_text().split()
    assert {"live:answered", "live:read", "confirm:before", "confirm:answered"} <= set(points)
    for number in range(1, len(points) + 1):
        owner = Owner(programs, daemon.path, [], "--wait=20", CPRD_PAUSE=f"#{number}")
        found = os.waitid(os.P_PID, owner.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert found is not None
        assert found.si_code == os.CLD_STOPPED, points[number - 1]
        owner.kill()
    with daemon.connect() as connection:
        until(
            lambda: [row["phase"] for row in connection.list()] == ["held"],
            lambda: f"{connection.list()}",
        )
    owner = Owner(programs, daemon.path, [], "--wait=20")
    assert listed(owner.hear()) == inodes(pipes)
    assert owner.tell("end") == "ok"
    assert owner.end() == (0, "")

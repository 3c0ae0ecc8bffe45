"""What a library meets in a program: fork(), threads, other processes, a million changes."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgpack
import pytest

import cprd
from cprd.live.reader import read
from tests.c.building import SOURCE
from tests.c.conftest import Build
from tests.c.test_lost import Between, await_held
from tests.live.owning import Root, segments_of
from tests.live.test_sweep import parked
from tests.support.checkout import CHECKOUT
from tests.support.daemon import DaemonProcess
from tests.support.patience import PATIENCE, patience

pytestmark = [pytest.mark.usefixtures("nothing_leaks"), pytest.mark.xdist_group("c")]

NAME = "web"
MEMORY = "address,undefined"
SANITIZERS = [MEMORY, pytest.param("thread", marks=pytest.mark.full)]


Together = Callable[[str], str]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, built: Build) -> Together:
    """together(sanitizers): the program of together.c, built when asked for; "": none."""
    made: dict[str, str] = {}

    def program(sanitizers: str) -> str:
        if sanitizers not in made:
            place = tmp_path_factory.mktemp("together") / "together"
            options = ["-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{SOURCE}", "-g", "-pthread"]
            if sanitizers:
                options += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
            library = [SOURCE / "cprd.c", SOURCE / "cprd_live.c"]
            if sanitizers == MEMORY:
                library = [built("sanitized").place / "libcprd.a"]
            sources = map(str, [CHECKOUT / "tests/c/together.c", *library])
            command = ["gcc", *options, "-o", str(place), *sources]
            subprocess.run(command, check=True, timeout=patience(120))
            made[sanitizers] = str(place)
        return made[sanitizers]

    return program


def run(program: str, path: str, *words: str) -> None:
    done = subprocess.run(
        [program, *words],
        env={**os.environ, "CPRD_SOCKET": path},
        capture_output=True,
        text=True,
        timeout=patience(60),
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stdout + done.stderr


def test_a_forked_child_is_refused_and_its_parent_goes_on(
    daemon: DaemonProcess, together: Together
) -> None:
    run(together(MEMORY), daemon.path, "fork")
    with daemon.connect() as connection:
        assert connection.list() == []
        run(together(MEMORY), daemon.path, "fork-live")
        with connection.load(NAME, wait=PATIENCE) as claim:
            assert [(name, id) for name, id, _ in claim.state.fds()] == [("event", 1)]
            assert bytes(claim.state["memory.m"])[:9] == b"parent's\0"


def test_a_child_forked_beside_a_busy_thread_connects(
    daemon: DaemonProcess, together: Together
) -> None:
    run(together(""), daemon.path, "fork-threads")


def test_a_claim_goes_on_when_cprd_stood_still(
    new_daemon: DaemonProcess, together: Together
) -> None:
    run(together(MEMORY), new_daemon.path, "stopped")
    with new_daemon.connect() as connection:
        assert connection.list() == []


@pytest.mark.parametrize("sanitizers", SANITIZERS)
def test_threads_share_a_connection_or_have_their_own(
    daemon: DaemonProcess, together: Together, sanitizers: str
) -> None:
    for what in ("threads-one-connection", "threads", "threads-live"):
        run(together(sanitizers), daemon.path, what)
    with daemon.connect() as connection:
        assert connection.list() == []


@pytest.mark.parametrize("changes", [10_000, pytest.param(1_000_000, marks=pytest.mark.full)])
def test_many_changes_leave_what_the_keys_need(together: Together, changes: int) -> None:
    """900 keys are left of 1,000, and a section: 16 in a segment at most."""
    root = Root()
    ends = [root.tx.fileno(), root.rx.fileno()]
    program = together("" if changes > 100_000 else MEMORY)
    owner = subprocess.Popen(
        [program, "changes", *map(str, ends), str(changes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=ends,
        text=True,
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "900\n"
    open_there = len(os.listdir(f"/proc/{owner.pid}/fd"))
    said, _ = owner.communicate("\n", timeout=patience(60))
    assert (owner.returncode, said) == (0, "ok\n")
    segments = segments_of(root.kept)
    for fd in segments:
        os.close(fd)
    assert open_there <= 2 * len(segments) + 8
    assert len(segments) <= 1.5 * 900 / 16
    found = read(root.kept)
    assert len([*found.state.fds()]) == 900
    found.state.close()
    found.close()
    assert parked(root) == 900
    root.close()


@pytest.mark.parametrize("killed", [True, False])
def test_what_ended_at_a_limit_stays_away(together: Together, killed: bool) -> None:
    root = Root()
    ends = [root.tx.fileno(), root.rx.fileno()]
    owner = subprocess.Popen(
        [together(MEMORY), "limit", *map(str, ends)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=ends,
        text=True,
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "5\n"
    if killed:
        owner.kill()
    said, _ = owner.communicate("\n", timeout=patience(60))
    assert said == ("" if killed else "ok\n")
    found = read(root.kept)
    assert [id for _, id, _ in found.state.fds()] == sorted(n * 17 % 400 for n in range(395, 400))
    found.state.close()
    found.close()
    assert parked(root) > 5 if killed else parked(root) == 5
    root.close()


def test_a_lock_of_a_file_that_is_kept_stays(together: Together) -> None:
    root = Root()
    ends = [root.tx.fileno(), root.rx.fileno()]
    command = [together(MEMORY), "lock", *map(str, ends)]
    done = subprocess.run(
        command, pass_fds=ends, capture_output=True, text=True, timeout=patience(60), check=False
    )
    root.close()
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stdout + done.stderr


# -- processes by pidfd ---------------------------------------------------------------------------


@contextmanager
def process() -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process that ends with its stdin, and a pidfd."""
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    pidfd = os.pidfd_open(child.pid)
    try:
        yield child, pidfd
    finally:
        child.kill()
        child.communicate()
        os.close(pidfd)


class Seen(Between):
    """Requests that pass are written down. The client hears its own pid, not that of the test."""

    def __init__(self, place: Path, daemon: str) -> None:
        self.requests: list[dict[str, object]] = []
        super().__init__(place, daemon)

    def heard(self, data: bytes) -> None:
        self.requests.append(msgpack.unpackb(data))

    def said(self, client: socket.socket, data: bytes) -> bytes:
        answer = msgpack.unpackb(data)
        if "server" in answer.get("ok", {}):
            credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            answer["ok"]["pid"] = struct.unpack("3i", credentials)[0]
        return bytes(msgpack.packb(answer))


@pytest.fixture
def seen(tmp_path: Path, daemon: DaemonProcess) -> Iterator[Seen]:
    made = Seen(tmp_path, daemon.path)
    yield made
    made.close()


def named(seen: Seen, verb: str) -> tuple[object, object]:
    """pid and inode of the last such request."""
    request = [each for each in seen.requests if each["verb"] == verb][-1]
    return request.get("pid", 0), request.get("inode", 0)


def inode_of(pidfd: int) -> int:
    """As cprd is told: 0 where this kernel gives all pidfds one inode."""
    other = os.pidfd_open(os.getpid())
    try:
        alike = os.fstat(other).st_ino == os.fstat(pidfd).st_ino
        return 0 if alike else os.fstat(pidfd).st_ino
    finally:
        os.close(other)


def test_a_state_is_served_after_the_end_of_the_process_of_a_pidfd(
    daemon: DaemonProcess, seen: Seen, built: Build
) -> None:
    programs = built("sanitized")
    with process() as (child, pidfd), daemon.connect() as connection:
        programs.run(seen.path, "save", NAME, f"--after-exit={pidfd}", fds=(pidfd,))
        assert named(seen, "save") == (child.pid, inode_of(pidfd))
        [row] = connection.list()
        assert (row["phase"], row["in_use_by"]) == ("held", child.pid)
        said = programs.run(daemon.path, "load", NAME, status=4)
        assert f"pid {child.pid}" in said
        child.kill()
        child.communicate()
        programs.run(daemon.path, "load", NAME, "--wait=20")
        # Of a process that has ended, nothing is waited for.
        programs.run(seen.path, "save", NAME, f"--after-exit={pidfd}", fds=(pidfd,))
        assert named(seen, "save") == (0, 0)
        programs.run(daemon.path, "load", NAME)
        reading, writing = os.pipe()
        assert "is not a pidfd" in programs.run(
            daemon.path, "save", NAME, f"--after-exit={reading}", fds=(reading,), status=1
        )
        os.close(reading)
        os.close(writing)
        assert connection.list() == []


def test_begin_names_the_process_that_acts(daemon: DaemonProcess, seen: Seen, built: Build) -> None:
    programs = built("sanitized")
    with process() as (child, pidfd), daemon.connect() as connection:
        connection.save(NAME, cprd.State())
        programs.run(seen.path, "load", NAME, f"--begin={pidfd}", "--leave", fds=(pidfd,))
        assert named(seen, "begin") == (child.pid, inode_of(pidfd))
        await_held(connection, [("in-doubt", 0)])
        [row] = connection.list()
        assert row["acting"] == child.pid
        with pytest.raises(cprd.Busy):
            connection.load(NAME)
        # Still in doubt when the process has ended: by then it may have acted.
        child.kill()
        child.communicate()
        assert "in doubt" in programs.run(daemon.path, "load", NAME, status=4)
        programs.run(daemon.path, "release", NAME, "--force")
        said = programs.run(daemon.path, "load", NAME, f"--begin={pidfd}", fds=(pidfd,), status=1)
        assert "the process that is to act has ended" in said
        await_held(connection, [("held", 0)])  # nothing has begun, and the claim went back
        programs.run(daemon.path, "load", NAME, "--begin")
        assert connection.list() == []

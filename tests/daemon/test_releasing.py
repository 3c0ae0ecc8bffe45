"""Foreign files whose last close blocks, when a hold ends, at SIGHUP and at SIGTERM: nobody waits
but their owner, and once they answer nothing holds them any more."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cprd
from cprd.daemon import releasing
from cprd.daemon.forker import Forker
from cprd.linux.rights import close_all
from tests.support.checkout import CHECKOUT
from tests.support.child import Child, Line, become
from tests.support.daemon import DaemonProcess
from tests.support.memory import Memory
from tests.support.patience import PATIENCE, patience, until
from tests.support.processes import state

pytestmark = pytest.mark.usefixtures("nothing_leaks")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="two uids need root")

SOON = patience(1.0)  # s
UIDS = (23456, 23457)
MIB = 1 << 20


def connections(count: int) -> tuple[list[socket.socket], list[socket.socket]]:
    """TCP connections: our ends, and their peers."""
    ours, theirs = [], []
    with socket.create_server(("127.0.0.1", 0), backlog=16) as listener:
        for _ in range(count):
            ours.append(socket.create_connection(listener.getsockname()))
            theirs.append(listener.accept()[0])
    return ours, theirs


def state_with(fds: list[int]) -> cprd.State:
    saved = cprd.State()
    saved.save_fds("file", enumerate(fds))
    return saved


def await_ends(peers: list[socket.socket], seconds: float) -> None:
    """Each peer sees the end of its connection within so long."""
    end = time.monotonic() + seconds
    poll = select.poll()
    for peer in peers:
        poll.register(peer, select.POLLIN)
    waiting = {peer.fileno() for peer in peers}
    while waiting:
        found = poll.poll(max(0.0, end - time.monotonic()) * 1000)
        assert found, f"{len(waiting)} of {len(peers)} connections are held after {seconds:.1f} s"
        for fd, _ in found:
            poll.unregister(fd)
            waiting.discard(fd)


@pytest.mark.parametrize("end", ["confirm", "drop", "ttl"])
@pytest.mark.parametrize("count", [10, 1000])
def test_all_connections_see_their_end_at_once(daemon: DaemonProcess, count: int, end: str) -> None:
    with contextlib.ExitStack() as stack, daemon.connect() as connection:
        ours, theirs = connections(count)
        for peer in theirs:
            stack.enter_context(peer)
        saved = state_with([sock.fileno() for sock in ours])
        connection.save("web", saved, ttl=0.3 if end == "ttl" else None)
        for sock in ours:
            sock.close()
        if end == "drop":
            connection.drop("web")
        elif end == "confirm":
            with connection.load("web"):
                pass
        else:
            until(lambda: not connection.list(), lambda: "held")
        await_ends(theirs, SOON)


@pytest.mark.parametrize("mib", [256, pytest.param(4096, marks=pytest.mark.full)])
def test_much_memory_is_free_at_once(daemon: DaemonProcess, mib: int) -> None:
    memory = Memory(mib * MIB)
    with daemon.connect() as connection:
        saved = cprd.State()
        saved.save_fd("ram", 0, memory.fd)
        connection.save("web", saved)
        memory.saved()
        begin = time.monotonic()
        connection.drop("web")
        assert time.monotonic() - begin < patience(0.05)  # no waiting for the memory
        assert memory.free(SOON)
    memory.close()


# Blocking files


class Lingering:
    """253 sockets for each uid, whose last close waits a minute for peers that do not read."""

    def __init__(self, place: Path) -> None:
        self._peers: list[socket.socket] = []

    def files(self) -> list[int]:
        ours, theirs = connections(253)
        self._peers += theirs
        for sock in ours:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\x3c\0\0\0")
        for peer in theirs:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for sock in ours:
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock.send(b"x" * 65536)
        return [sock.detach() for sock in ours]

    def mute(self) -> None:
        """They block as they are."""

    def answer(self) -> None:
        for peer in self._peers:
            peer.close()

    close = answer


class Fuse:
    """A file that was written to through another descriptor, of a FUSE file system that has ceased
    to answer: whoever drops a reference writes back, in the kernel, beyond SIGKILL."""

    def __init__(self, place: Path) -> None:
        self.place = place / "mute"
        self.place.mkdir()
        program = CHECKOUT / "tests/support/mute_file_system.py"
        pipe = subprocess.PIPE
        command = [sys.executable, str(program), str(self.place), "writeback"]
        self.server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        assert self.server.stdout is not None
        if not self.server.stdout.readline():
            self.server.communicate()
            pytest.skip("this root may not mount a FUSE file system")
        self._writer: Child | None = None

    def files(self) -> list[int]:
        return [os.open(self.file, os.O_RDONLY)]

    @property
    def file(self) -> Path:
        return self.place / "file"

    def mute(self) -> None:
        self._writer = Child(writes, str(self.file))
        self._writer.hear()
        assert self.server.stdin is not None
        self.server.stdin.write("mute\n")
        self.server.stdin.flush()

    def answer(self) -> None:
        self.server.kill()
        self.server.communicate()

    def close(self) -> None:
        if self.server.returncode is None:
            self.answer()
        if self._writer is not None:
            with self._writer:
                pass
        ctypes.CDLL(None).umount2(os.fsencode(self.place), 2)


def writes(line: Line, path: str) -> None:
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, b"x" * 4096, 0)
    line.say("written")
    line.hear()  # open until it is killed


def saves(line: Line, path: str, uid: int, names: list[str], states: list[list[int]]) -> None:
    become(uid)
    with cprd.connect(path) as daemon:
        for name, fds in zip(names, states, strict=True):
            daemon.save(name, state_with(fds))
    line.say("saved")


def asks(line: Line, path: str) -> None:
    """Says how long another uid waits for answers, until told to stop: the 99th percentile."""
    become(UIDS[1] + 1)
    with cprd.connect(path) as daemon:
        line.say("here")
        waits: list[float] = []
        while len(waits) < 200 or not select.select([line.sock], [], [], 0.002)[0]:
            begin = time.monotonic()
            daemon.save("mine", cprd.State())
            with daemon.load("mine"):
                pass
            waits.append(time.monotonic() - begin)
        line.hear()
        waits.sort()
        line.say(waits[len(waits) * 99 // 100])


def releasers(pid: int) -> list[int]:
    """The processes below a cprd: those that fork, and those that were forked."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            found += [int(child), *releasers(int(child))]
    return found


def reload(daemon: DaemonProcess) -> float:
    """SIGHUP; the seconds until a client is served by the new version."""
    seen = len(daemon.log())
    begin = time.monotonic()
    os.kill(daemon.pid, signal.SIGHUP)
    daemon.await_log("ready ", since=seen)
    with daemon.connect() as connection:
        connection.status()
    return time.monotonic() - begin


@pytest.fixture
def blocker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lingering | Fuse]:
    made: Lingering | Fuse = request.param(tmp_path)
    yield made
    made.close()


@needs_root
@pytest.mark.parametrize(
    ("blocker", "reloads"),
    [(Lingering, 5), (Fuse, 20)],
    indirect=["blocker"],
    ids=["lingering", "fuse"],
)
def test_files_that_block_hold_up_nobody(
    new_daemon: DaemonProcess, blocker: Lingering | Fuse, reloads: int
) -> None:
    daemon = new_daemon
    plain: list[socket.socket] = []
    forked: set[int] = set()
    with contextlib.ExitStack() as stack:
        for uid in UIDS:
            states = []
            for _ in range(2):
                (ours,), (theirs,) = connections(1)
                plain.append(stack.enter_context(theirs))
                states.append([ours.detach(), *blocker.files()])
            with Child(saves, daemon.path, uid, ["ended", "kept"], states) as saver:
                saver.hear()
                assert saver.wait() == 0
            close_all(fd for one in states for fd in one)
        blocker.mute()
        with daemon.connect() as root:
            with Child(asks, daemon.path) as asker:
                asker.hear()
                for uid in UIDS:
                    root.drop(f"{uid}/ended", force=True)
                until(
                    lambda: set(root.status()["closing"]) >= set(map(str, UIDS)),
                    lambda: "not closing",
                )
                asker.say("enough")
                assert float(asker.hear()) < patience(0.05)
            forked.update(releasers(daemon.pid))
            for _ in range(reloads):
                assert reload(daemon) < patience(2)
                forked.update(releasers(daemon.pid))
            closing = root.status()["closing"]
            assert set(closing) >= set(map(str, UIDS))  # known still, and no more with each reload
            assert all(count < 10 for count in closing.values()), closing
        begin = time.monotonic()
        assert daemon.stop() == 0
        daemon.start()
        assert time.monotonic() - begin < patience(5)
        with daemon.connect() as root:
            assert root.list() == []
        blocker.answer()
        await_ends(plain, patience(5))
        until(lambda: not any(map(state, forked)), lambda: "a releaser is left")


# Killed


def kill_all(daemon: DaemonProcess, which: Callable[[list[int]], list[int]]) -> None:
    for pid in which(releasers(daemon.pid)):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "which", [lambda all: all[:1], lambda all: all[1:], lambda all: all], ids=["1st", "rest", "all"]
)
def test_releasers_that_are_killed_lose_nothing_and_leave_no_zombie(
    new_daemon: DaemonProcess, which: Callable[[list[int]], list[int]]
) -> None:
    daemon = new_daemon
    with daemon.connect() as connection:
        for number in range(3):
            forked = releasers(daemon.pid)
            killed = which(forked)
            kill_all(daemon, which)
            (ours,), (theirs,) = connections(1)
            with theirs:
                connection.save("web", state_with([ours.fileno()]))
                ours.close()
                connection.drop("web")
                if number == 1:
                    reload(daemon)
                await_ends([theirs], patience(3))
            until(
                lambda killed=killed: not any(map(state, killed)),  # type: ignore[misc]
                lambda: "a zombie",
            )
    until(lambda: "Z" not in map(state, releasers(daemon.pid)), lambda: "a zombie", PATIENCE)


def test_what_a_killed_releaser_had_not_drained_is_drained_by_the_next(
    new_daemon: DaemonProcess,
) -> None:
    """The slots lie on a shelf as well: the end of a releaser lets go of none of them."""
    daemon = new_daemon
    with contextlib.ExitStack() as stack, daemon.connect() as connection:
        until(lambda: len(releasers(daemon.pid)) == 2, lambda: "no releaser is warm")
        fork, warm = releasers(daemon.pid)
        os.kill(warm, signal.SIGSTOP)
        peers = []
        for number in range(30):  # more than are under way at once
            (ours,), (theirs,) = connections(1)
            peers.append(stack.enter_context(theirs))
            connection.save(f"{number}", state_with([ours.fileno()]))
            ours.close()
            connection.drop(f"{number}")
        assert sum(connection.status()["closing"].values()) == 30
        os.kill(warm, signal.SIGKILL)
        await_ends(peers, patience(2))
        until(lambda: not connection.status()["closing"], lambda: "unfinished closes")
        assert state(fork) not in ("", "Z")


def test_a_uid_whose_closes_stand_still_is_refused_until_they_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(releasing, "STILL", 0.2)
    forker = Forker()
    every = releasing.Releasing(forker)
    until(lambda: len(releasers(forker.pid)) == 1, lambda: "no releaser is warm")
    warm = releasers(forker.pid)[0]
    os.kill(warm, signal.SIGSTOP)
    for _ in range(releasing.MAX_PENDING + 1):
        every.close(5, [os.open(os.devnull, os.O_RDONLY)])
    assert every.blocked() == {5: releasing.MAX_PENDING + 1}
    assert not every.refuses(5)  # many, but they may be on their way
    until(lambda: every.refuses(5), lambda: "not refused")
    assert not every.refuses(6)
    os.kill(warm, signal.SIGCONT)

    def closed() -> bool:
        every.collect()
        return not every.blocked()

    until(closed, lambda: "not closed")
    assert not every.refuses(5)
    assert forker.sock is not None
    forker.sock.close()
    assert os.waitpid(forker.pid, 0)[0] == forker.pid  # it ends with its socket


def test_the_end_of_a_daemon_that_may_send_nothing_more_waits_for_nobody(
    start_daemon: Callable[..., DaemonProcess], tmp_path: Path
) -> None:
    """Without a releaser: the files are inherited by a process that closes them afterwards."""
    daemon = start_daemon()
    blocker = Lingering(tmp_path)
    with daemon.connect() as connection:
        until(lambda: len(releasers(daemon.pid)) == 2, lambda: "no releaser is warm")
        files = blocker.files()
        connection.save("web", state_with(files))
        close_all(files)
    os.kill(daemon.pid, signal.SIGSTOP)
    kill_all(daemon, lambda every: every)
    begin = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - begin < patience(2)
    blocker.close()

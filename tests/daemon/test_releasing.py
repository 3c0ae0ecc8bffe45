"""Releasers: what a hold had is let go of at once, whoever is killed meanwhile."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

import cprd
from cprd.daemon import releasing
from cprd.daemon.forker import Forker
from cprd.daemon.releaser import let_go, let_go_of_live
from cprd.linux.rights import close_all, queued, scm_fds, send
from tests.support.blocking import Lingering, await_ends, connections, releasers, reload
from tests.support.daemon import DaemonProcess
from tests.support.memory import Memory
from tests.support.patience import PATIENCE, in_time, patience, until
from tests.support.processes import state

pytestmark = pytest.mark.usefixtures("nothing_leaks")

SOON = patience(1.0)  # s
MIB = 1 << 20


def state_with(fds: list[int]) -> cprd.State:
    saved = cprd.State()
    saved.save_fds("file", enumerate(fds))
    return saved


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
        assert in_time(time.monotonic() - begin, 0.05)  # no waiting for the memory
        assert memory.free(SOON)
    memory.close()


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
    """The queues lie on a shelf as well: the end of a releaser lets go of none of them."""
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
    assert in_time(time.monotonic() - begin, 2)
    blocker.close()


def queue_with(fd: int) -> int:
    """A queue with a descriptor, borrowed. Owned by the caller."""
    inlet, outlet = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with inlet:
        send(inlet, b"x", [fd])
    return outlet.detach()


def test_queues_of_a_uid_are_drained_soon_whoever_else_has_files_that_block() -> None:
    forker = Forker()
    every = releasing.Releasing(forker)
    until(lambda: len(releasers(forker.pid)) == 1, lambda: "no releaser is warm")
    (warm,) = releasers(forker.pid)
    os.kill(warm, signal.SIGSTOP)
    ours, theirs = os.pipe()

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(every.tend)
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(releasing.AT_ONCE):
                every.close(5, [os.open(os.devnull, os.O_RDONLY)])
            await trio.testing.wait_all_tasks_blocked()
            every.drain(5, queue_with(0))  # the first one does not wait for more
            every.drain(6, queue_with(theirs))
            os.close(theirs)
            every.close(5, [os.open(os.devnull, os.O_RDONLY)])  # listens to all releasers
            with trio.fail_after(patience(1)):
                await trio.lowlevel.wait_readable(ours)
            assert every.pending(5) == releasing.AT_ONCE + 2
            os.kill(warm, signal.SIGCONT)
            with trio.fail_after(patience(5)):
                while every.blocked():
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()

    try:
        trio.run(run)
    finally:
        os.kill(warm, signal.SIGCONT)
    os.close(ours)
    assert forker.sock is not None
    forker.sock.close()
    assert os.waitpid(forker.pid, 0)[0] == forker.pid


def test_a_releaser_without_a_descriptor_left_says_of_no_live_hold_that_it_is_gone() -> None:
    """Whoever closes such a bundle drops the last references."""
    root_in, root = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    inlet, bundle = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    send(root_in, b"x", [0])
    send(inlet, b"x", [root.fileno()])
    before = queued(bundle)
    free = os.dup(0)
    os.close(free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for room in (0, 1, 2):
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + room, hard))
        try:
            with pytest.raises(OSError, match=r"Too many open files|no descriptor left"):
                let_go_of_live(bundle.fileno(), deep=True)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert queued(bundle) == before
        assert scm_fds(root.fileno()) == 1
    let_go_of_live(bundle.fileno(), deep=True)
    assert queued(bundle) == 0
    assert scm_fds(root.fileno()) == 0
    for one in (root_in, root, inlet, bundle):
        one.close()


@pytest.mark.parametrize("ahead", [b"", b"x"])
def test_a_message_ahead_of_a_root_keeps_no_live_hold_from_being_drained(ahead: bytes) -> None:
    reading, writing = os.pipe()
    root_in, root = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    inlet, bundle = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    send(root_in, b"x", [writing])
    inlet.send(ahead)
    send(inlet, b"x", [root.fileno()])
    bundle.shutdown(socket.SHUT_RD)
    for one in (root_in, root, inlet):
        one.close()
    os.close(writing)
    let_go_of_live(bundle.fileno(), deep=True)
    assert os.read(reading, 1) == b""
    os.close(reading)
    bundle.close()


def test_an_empty_message_ahead_and_an_unread_byte_behind_keep_nothing_from_being_drained() -> None:
    reading, writing = os.pipe()
    inlet, outlet = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with outlet:
        inlet.send(b"")
        socket.send_fds(inlet, [b"x"], [writing])
        os.close(writing)
        outlet.send(b"unread")  # so that the other end is reset
        outlet.shutdown(socket.SHUT_RD)
        inlet.close()
        let_go(outlet.fileno())
        assert os.read(reading, 1) == b""
    os.close(reading)

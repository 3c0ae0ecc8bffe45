"""Files whose close blocks, of two uids, everywhere that a client can leave files with cprd: nobody
else waits, cprd reloads and restarts at once, and once the files answer nothing holds them."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cprd
from cprd.daemon.releasing import AT_ONCE
from cprd.linux.rights import close_all, receive, send
from cprd.protocol import messages
from tests.daemon.test_hostile import answer, raw
from tests.support import wire
from tests.support.blocking import (
    Fuse,
    Lingering,
    Writeback,
    await_ends,
    connections,
    releasers,
    reload,
)
from tests.support.child import Child, Line, become
from tests.support.daemon import DaemonProcess
from tests.support.eventfds import opened
from tests.support.memory import Memory
from tests.support.patience import in_time, patience, until
from tests.support.processes import state

pytestmark = [
    pytest.mark.usefixtures("nothing_leaks"),
    pytest.mark.skipif(os.geteuid() != 0, reason="two uids need root"),
]

UIDS = (23456, 23457)
PLACES = ("request", "queue", "unread queue", "ended", "kept", "live ended", "live kept")
RELOADS = 20
MIB = 1 << 20

owned: list[object] = []  # for as long as the process of a leaver lives

Files = dict[str, list[int]]  # by place; a plain connection and files that block


def left_by(place: str, path: str, fds: list[int]) -> socket.socket | None:
    """Leave descriptors, borrowed, in one of PLACES. Returns the connection that matters."""
    if place in ("ended", "kept"):
        with cprd.connect(path) as daemon:
            state = cprd.State()
            state.save_fds("file", enumerate(fds))
            daemon.save(place, state)
        return None
    if place in ("live ended", "live kept"):
        live = cprd.live(place, path)
        live.confirm()
        for number, fd in enumerate(fds):
            live.save_fd("file", number, fd)
        owned.append(live)
        return None
    sock = raw(path)
    if place == "request":
        return sock
    if place == "queue":
        inlet = wire.queue(sock)
    else:
        sock.send(wire.request("queue"))
        _, received, _ = receive(sock, messages.MAX_ANSWER, socket.MSG_PEEK)
        inlet = socket.socket(fileno=received[0])
    park(inlet, fds)
    inlet.detach()  # open for as long as this process lives
    return sock


def park(sock: socket.socket, fds: list[int]) -> None:
    send(sock, b"a connection", fds[:1])
    send(sock, b"files", fds[1:])


def leaves(line: Line, path: str, uid: int, files: Files) -> None:
    """Leave files in all places; those of the request when told to."""
    become(uid)
    socks = {place: left_by(place, path, fds) for place, fds in files.items()}
    close_all(fd for place, fds in files.items() if place != "request" for fd in fds)
    line.say("left")
    line.hear()
    sock = socks.get("request")
    if sock is not None:
        park(sock, files["request"])
        close_all(files["request"])
    line.say("sent")
    line.hear()


def asks(line: Line, path: str) -> None:
    """Says how long another uid waits for answers: undisturbed, and from one word to the next; the
    99th percentile of each."""
    become(UIDS[1] + 1)
    with cprd.connect(path) as daemon:
        line.say(waited(daemon, lambda: True))
        line.hear()
        line.say(waited(daemon, lambda: bool(select.select([line.sock], [], [], 0.002)[0])))
        line.hear()


def waited(daemon: cprd.Daemon, enough: Callable[[], bool]) -> float:
    waits: list[float] = []
    while len(waits) < 200 or not enough():
        begin = time.monotonic()
        daemon.save("mine", cprd.State())
        with daemon.load("mine"):
            pass
        waits.append(time.monotonic() - begin)
    waits.sort()
    return waits[len(waits) * 99 // 100]


@contextlib.contextmanager
def nobody_waits(daemon: DaemonProcess) -> Iterator[Child]:
    """Another uid, which asks for the whole block; it is to be told to begin."""
    with Child(asks, daemon.path) as asker:
        undisturbed = float(asker.hear())
        yield asker
        asker.say("enough")
        took = float(asker.hear())
        assert took < 3 * undisturbed or in_time(took, 0.05)


@pytest.fixture
def blocker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lingering | Fuse]:
    made: Lingering | Fuse = request.param(tmp_path)
    yield made
    made.close()


@pytest.fixture
def old_daemon(start_daemon: Callable[..., DaemonProcess]) -> DaemonProcess:
    """As before Linux 6.16, where descriptors come with a message as well."""
    return start_daemon(env={"CPRD_NO_PASSRIGHTS": "1"})


@pytest.mark.timeout(600)
@pytest.mark.parametrize("blocker", [Lingering, Fuse, Writeback], indirect=True)
def test_files_that_block_hold_up_nobody_wherever_they_are(
    old_daemon: DaemonProcess, blocker: Lingering | Fuse
) -> None:
    daemon = old_daemon
    plain: list[socket.socket] = []
    forked: set[int] = set()
    with contextlib.ExitStack() as stack:
        leavers = []
        for uid in UIDS:
            files: Files = {}
            for place in PLACES:
                (ours,), (theirs,) = connections(1)
                plain.append(stack.enter_context(theirs))
                files[place] = [ours.detach(), *blocker.files()]
            leavers.append(stack.enter_context(Child(leaves, daemon.path, uid, files)))
            leavers[-1].hear()
            close_all(fd for fds in files.values() for fd in fds)
        root = stack.enter_context(daemon.connect())
        with nobody_waits(daemon) as asker:
            os.kill(daemon.pid, signal.SIGSTOP)  # until the copies in a request are the last
            for leaver in leavers:
                leaver.say("go on")
                assert leaver.hear() == "sent"
            blocker.mute()
            asker.say("begin")
            os.kill(daemon.pid, signal.SIGCONT)
            for leaver in leavers:
                leaver.kill()
            for uid in UIDS:
                root.drop(f"{uid}/ended", force=True)
                root.drop(f"{uid}/live ended", force=True)
            if blocker.last_reference_blocks:
                until(lambda: _blocked(root, 4), lambda: repr(root.status()["closing"]))
        with Child(leaves_live, daemon.path) as owner:
            owner.hear()
            owner.kill()
        until(lambda: _counted(root), lambda: "a live hold is not counted", patience(2))
        forked.update(releasers(daemon.pid))
        for _ in range(RELOADS):
            assert in_time(reload(daemon), 2)
            forked.update(releasers(daemon.pid))
        # Known still, and no more with each reload.
        if blocker.last_reference_blocks:
            until(lambda: _blocked(root, 1), lambda: repr(root.status()["closing"]))
        # (The live hold that is left is to be counted, each time: as much as is sent at once.)
        closing = root.status()["closing"]
        assert all(count <= len(PLACES) + AT_ONCE for count in closing.values()), closing
        begin = time.monotonic()
        assert daemon.stop() == 0
        daemon.start()
        root.list()
        assert in_time(time.monotonic() - begin, 5)
        assert root.list() == []
        blocker.answer()
        await_ends(plain, patience(5))
        until(lambda: not any(map(state, forked)), lambda: "a releaser is left")


@pytest.mark.parametrize("blocker", [Lingering], indirect=True)
def test_a_hold_that_cannot_be_taken_yet_is_fenced_once_however_often_that_is_asked(
    new_daemon: DaemonProcess, blocker: Lingering
) -> None:
    """Each request to a releaser that stands still keeps a descriptor in cprd: enough of them, and
    nobody is served any more."""
    daemon, (uid, _), many = new_daemon, UIDS, 40
    with contextlib.ExitStack() as stack:
        with opened(3) as fds:
            owner = stack.enter_context(Child(leaves, daemon.path, uid, {"live kept": [*fds]}))
            owner.hear()
        files = {"ended": blocker.files()}
        with Child(leaves, daemon.path, uid, files) as leaver:
            leaver.hear()
            close_all(files["ended"])
            leaver.kill()
        root = stack.enter_context(daemon.connect())
        root.drop(f"{uid}/ended", force=True)
        until(lambda: root.status()["closing"] == {str(uid): 1}, lambda: "nothing blocks")
        before = len(os.listdir(f"/proc/{daemon.pid}/fd"))
        asking = [stack.enter_context(raw(daemon.path)) for _ in range(many)]
        for sock in asking:
            sock.send(
                wire.request("drop", name=f"{uid}/live kept", force=True, nonce=os.urandom(16))
            )
        until(lambda: root.status()["closing"] == {str(uid): 2}, lambda: repr(root.status()))
        with daemon.connect() as last:  # whatever was asked before has been heard by now
            last.status()
        assert root.status()["closing"] == {str(uid): 2}
        assert len(os.listdir(f"/proc/{daemon.pid}/fd")) <= before + 2 * many + 4
        blocker.answer()
        answers = [answer(sock) for sock in asking]
        assert sum("ok" in each for each in answers if each) == 1, answers
        assert root.list() == []


def leaves_live(line: Line, path: str) -> None:
    become(UIDS[1] + 2)
    with opened(3) as fds:
        left_by("live kept", path, fds)
        line.say("left")
        line.hear()


def _counted(root: cprd.Daemon) -> bool:
    """Whether the hold of `leaves_live` is, though releasers of others are not done."""
    return any(row["uid"] == UIDS[1] + 2 and row["fds"] >= 3 for row in root.list())


def _blocked(root: cprd.Daemon, most: int) -> bool:
    """Whether so many releases of both uids are under way, or more."""
    closing = root.status()["closing"]
    return all(closing.get(str(uid), 0) >= most for uid in UIDS)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("place", PLACES[:-2])
def test_4_gib_hold_up_nobody_wherever_they_are(old_daemon: DaemonProcess, place: str) -> None:
    daemon = old_daemon
    memory = Memory(4096 * MIB)
    with contextlib.ExitStack() as stack:
        (ours,), (theirs,) = connections(1)
        stack.enter_context(theirs)
        files = {place: [ours.detach(), memory.fd]}
        leaver = stack.enter_context(Child(leaves, daemon.path, UIDS[0], files))
        leaver.hear()
        os.close(files[place][0])
        memory.saved()
        with nobody_waits(daemon) as asker:
            os.kill(daemon.pid, signal.SIGSTOP)
            leaver.say("go on")
            assert leaver.hear() == "sent"
            asker.say("begin")
            os.kill(daemon.pid, signal.SIGCONT)
            leaver.kill()
            if place == "ended":
                with daemon.connect() as root:
                    root.drop(f"{UIDS[0]}/ended", force=True)
            if place != "kept":
                assert memory.free(patience(5))
        begin = time.monotonic()
        assert daemon.stop() == 0
        daemon.start()
        assert in_time(time.monotonic() - begin, 5)
        assert memory.free(patience(5))
        await_ends([theirs], patience(5))
    memory.close()

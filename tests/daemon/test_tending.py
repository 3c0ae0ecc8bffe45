"""No task that only tends can end the daemon: each is made to fail, in a real cprd, which goes on
serving; then the task does again what it is there for."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

import cprd
from cprd.daemon import log, turns
from cprd.daemon.connection import Came, Connection, Peer
from cprd.daemon.releasing import Releasing
from cprd.daemon.tending import LONGEST_PAUSE, tend
from cprd.daemon.turns import Turns
from cprd.linux.processes import Watch
from cprd.protocol import messages
from tests.support import wire
from tests.support.daemon import DaemonProcess
from tests.support.notify_socket import NotifySocket
from tests.support.patience import PATIENCE, until
from tests.support.seeded import Seeded

FAIL_ONCE = """
import trio, {module} as module
real, left = module.{name}, [3]
{kind} failing(*args, **options):
    if left[0]:
        left[0] -= 1
        raise {error}
    return {await_}real(*args, **options)
module.{name} = failing
"""


def failing(
    module: str, name: str, *, is_async: bool, error: str = "RuntimeError('seeded')"
) -> str:
    """Lines that make a function fail the first three times that it is called."""
    kind, wait = ("async def", "await ") if is_async else ("def", "")
    return FAIL_ONCE.format(module=module, name=name, kind=kind, await_=wait, error=error)


@pytest.fixture
def seeded(tmp_path: Path) -> Iterator[Callable[..., Seeded]]:
    started: list[Seeded] = []

    def start(lines: str, **options: str) -> Seeded:
        started.append(Seeded(tmp_path, lines, **options))
        return started[0]

    yield start
    for one in started:
        assert one.stop() == 0


def serves(daemon: DaemonProcess) -> None:
    with daemon.connect() as connection:
        connection.save("web", cprd.State())
        with connection.load("web"):
            pass


def test_accepting(seeded: Callable[..., Seeded]) -> None:
    daemon = seeded(failing("cprd.daemon.server", "Server._open_reserve", is_async=False))
    for _ in range(3):
        serves(daemon)
    assert "task=accept" in daemon.await_log("task-failed")


def test_an_error_on_a_connection_ends_no_other(seeded: Callable[..., Seeded]) -> None:
    daemon = seeded(failing("cprd.daemon.connection", "Connection.take", is_async=False))

    def is_served() -> bool:
        try:
            serves(daemon)
        except cprd.Unavailable:
            return False
        return True

    until(is_served, lambda: str(daemon.log()))
    assert daemon.await_log("failed uid=")
    assert not [line for line in daemon.log() if line.startswith("task-failed")]


def test_watching_processes(seeded: Callable[..., Seeded]) -> None:
    """Whoever waits for a predecessor's end is served by the task alone."""
    daemon = seeded(failing("cprd.linux.processes", "Watch.collect", is_async=False))
    with subprocess.Popen(["sleep", "600"]) as predecessor, daemon.connect() as connection:
        pidfd = os.pidfd_open(predecessor.pid)
        connection.save("web", cprd.State(), after_exit=pidfd)
        os.close(pidfd)

        def load() -> None:
            with daemon.connect() as other, other.load("web", wait=PATIENCE):
                pass

        waiting = threading.Thread(target=load)
        waiting.start()
        until(lambda: connection.status()["connections"] == 2, lambda: "nobody waits")
        predecessor.kill()
    assert "task=processes" in daemon.await_log("task-failed")
    assert daemon.await_log("ended how=confirm")
    waiting.join()


def test_idle_connections(seeded: Callable[..., Seeded]) -> None:
    """Idle is a connection from the last answer on, however long that took."""
    idle = 1.0
    daemon = seeded(f"from cprd.protocol import messages\nmessages.IDLE = {idle}\n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(daemon.path)
        sock.send(wire.HELLO)
        assert wire.read_answer(sock.recv(messages.MAX_ANSWER))
        sock.send(wire.load("web", wait=2.5 * idle))
        with pytest.raises(cprd.NotHeld):
            wire.read_answer(sock.recv(messages.MAX_ANSWER))
        answered = time.monotonic()
        assert sock.recv(1) == b""
        assert time.monotonic() - answered > 0.9 * idle


def test_deadlines(seeded: Callable[..., Seeded]) -> None:
    daemon = seeded(failing("cprd.protocol.registry", "Registry.expire", is_async=False))
    serves(daemon)
    assert "task=deadlines" in daemon.await_log("task-failed")
    with daemon.connect() as connection:
        connection.save("short", cprd.State(), ttl=0.2)
    assert "name=short" in daemon.await_log('ended how="ttl over"')


def test_orphans(seeded: Callable[..., Seeded]) -> None:
    daemon = seeded(failing("cprd.daemon.steps", "Steps.end_orphans", is_async=True))
    serves(daemon)
    assert "task=orphans" in daemon.await_log("task-failed")


def test_the_log(seeded: Callable[..., Seeded]) -> None:
    daemon = seeded(failing("cprd.daemon.log", "write_behind", is_async=True))
    serves(daemon)
    assert "task=log" in daemon.await_log("task-failed")
    assert daemon.await_log("ended ")


@pytest.mark.parametrize(
    ("task", "name", "error"),
    [
        ("store", "cprd.daemon.storage.fdstore:Store.settle", "RuntimeError('seeded')"),
        ("store", "cprd.daemon.storage.fdstore:Store._try", "ValueError('seconds')"),
        ("report", "cprd.daemon.manager:Reporter._message", "RuntimeError('seeded')"),
    ],
)
def test_what_the_manager_is_told(
    seeded: Callable[..., Seeded], tmp_path: Path, task: str, name: str, error: str
) -> None:
    notify = NotifySocket(tmp_path / "notify")
    notify.read()
    module, _, function = name.partition(":")
    is_async = task == "store"
    lines = failing(module, function, is_async=is_async, error=error)
    daemon = seeded(lines, env={"NOTIFY_SOCKET": str(notify.path)})
    serves(daemon)
    assert f"task={task}" in daemon.await_log("task-failed")
    until(lambda: any(b"READY=1" in said for said in notify.said), lambda: str(notify.said))
    with daemon.connect() as connection:
        until(lambda: connection.status()["kept"] == "store", lambda: str(daemon.log()))
    daemon.stop()
    notify.close()


def test_a_failure_is_said_once_and_tried_less_and_less_often(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "event", lambda event, **fields: said.append(fields["why"]))

    async def run() -> int:
        tries = 0

        async def work() -> None:
            nonlocal tries
            tries += 1
            raise ValueError("the same" if tries % 100 else "another")

        with trio.move_on_after(10 * LONGEST_PAUSE):
            await tend("x", work)
        return tries

    tries = trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))
    assert 10 < tries < 25
    assert len(said) == 1
    assert "the same" in said[0]
    assert __file__ in said[0]


async def test_what_ends_well_is_not_begun_again() -> None:
    calls = []

    async def work() -> None:
        calls.append(1)

    await tend("x", work)
    assert calls == [1]


async def test_requests_are_served_even_where_time_is_over_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a machine so busy that nothing but looking fits into a piece of time."""
    monkeypatch.setattr(turns, "REQUESTS", 0.0)
    all_turns = Turns()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    releasing = Releasing()
    connection = Connection(theirs, Peer(5, 0), -1, releasing, all_turns, Watch())

    async def serve(_: Connection, came: Came) -> bool:
        return came == b"x"

    all_turns.add(connection)
    ours.send(b"x")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(all_turns.run)
        with trio.fail_after(PATIENCE):
            assert await all_turns.serve(connection, serve)
        nursery.cancel_scope.cancel()
    all_turns.remove(connection)
    connection.close()
    ours.close()
    releasing.stop()


async def test_connections_that_end_together_go_on_few_at_a_time() -> None:
    all_turns, releasing, watch = Turns(), Releasing(), Watch()
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(40)]
    ended: list[bool] = []
    most = 0

    async def serve(_: Connection, came: Came) -> bool:
        raise AssertionError(came)

    async def converse(connection: Connection) -> None:
        ended.append(await all_turns.serve(connection, serve))
        all_turns.remove(connection)
        connection.close()

    async with trio.open_nursery() as nursery:
        for ours, theirs in pairs:
            connection = Connection(theirs, Peer(5, 0), -1, releasing, all_turns, watch)
            all_turns.add(connection)
            nursery.start_soon(converse, connection)
            ours.close()
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(all_turns.run)
        with trio.fail_after(PATIENCE):
            while len(ended) < len(pairs):
                before = len(ended)
                await trio.lowlevel.checkpoint()
                most = max(most, len(ended) - before)
        nursery.cancel_scope.cancel()
    releasing.stop()
    assert not any(ended)
    assert 0 < most <= 2 * turns.HANDED_OVER  # two passes may lie between two looks


def test_ended_processes_are_reported_in_pieces() -> None:
    watch, reported = Watch(), []
    fds = [os.eventfd(1) for _ in range(3)]

    def slowly() -> None:
        reported.append(1)
        time.sleep(0.02)  # the work itself

    for fd in fds:
        watch.add(fd, slowly)
    assert not watch.collect(0.01)
    assert len(reported) == 1
    assert watch.collect()
    assert len(reported) == 3
    watch.epoll.close()
    for fd in fds:
        os.close(fd)


COUNT_AT_END = """
import gc
from cprd.daemon import log, running
young, end = running.collect_young_only, running.Running.end
def never_collect():
    young()
    gc.disable()
def count(self):
    end(self)
    log.event("garbage", count=gc.collect())
running.collect_young_only, running.Running.end = never_collect, count
"""


def test_no_request_and_no_connection_leaves_work_for_the_collector(tmp_path: Path) -> None:
    """So the collector need not look at what lives long: cycles would stay for ever."""
    daemon = Seeded(tmp_path, COUNT_AT_END)
    state = cprd.State()
    for _ in range(30):
        with daemon.connect() as one, daemon.connect() as other:
            one.save("web", state, ttl=600.0)
            with pytest.raises(cprd.AlreadyHeld):
                other.save("web", state)
            one.prepare("other", state).abort()
            claim = one.load("web")
            with pytest.raises(cprd.Busy):
                other.load("web", wait=0.001)
            claim.confirm(next=state, after_exit=False)
            claim.close()
            other.load("web").reject("so")
            one.drop("web")
            one.list()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(daemon.path)
            sock.send(b"noise")
            sock.recv(messages.MAX_ANSWER)
    assert daemon.stop() == 0
    [garbage] = [line for line in daemon.log() if line.startswith("garbage count=")]
    assert int(garbage.split("=")[1]) < 120  # the event loop's own, at the end


async def test_what_is_sent_ahead_is_served_though_nothing_tells_of_each_message() -> None:
    all_turns = Turns()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    releasing = Releasing()
    connection = Connection(theirs, Peer(5, 0), -1, releasing, all_turns, Watch())
    served = []

    async def serve(_: Connection, came: Came) -> bool | None:
        served.append(came)
        return len(served) == 10 or None

    all_turns.add(connection)
    sent = [b"%d" % number for number in range(10)]
    for message in sent[:4]:
        ours.send(message)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(all_turns.run)
        nursery.start_soon(all_turns.serve, connection, serve)
        with trio.fail_after(PATIENCE):
            while len(served) < 4:
                await trio.sleep(0.001)
            await trio.sleep(0.01)  # cprd sleeps: one event tells of all that follow
            for message in sent[4:]:
                ours.send(message)
            while len(served) < 10:
                await trio.sleep(0.001)
        nursery.cancel_scope.cancel()
    assert served == sent
    all_turns.remove(connection)
    connection.close()
    ours.close()
    releasing.stop()

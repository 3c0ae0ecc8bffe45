"""SIGKILL of the owner of a live hold, through the whole stack.

What the successor finds is what the model says after the last change that returned, or that and the
change in flight."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio

import cprd
import cprd.trio
from cprd.linux import pause
from cprd.linux.rights import close_all
from tests.live.owning import Model, Op, Things, Told
from tests.support.daemon import DaemonProcess
from tests.support.patience import PATIENCE, rest, until

pytestmark = pytest.mark.usefixtures("nothing_leaks")

MEMORY = 4096


def act(state: Any, things: Things, op: Op) -> None:
    """Make one change, as tests/live/owning.py says changes."""
    verb, *rest_ = op
    if verb == "save":
        state.save_fd(rest_[0], rest_[1], things.fds[rest_[2]], replace=True)
    elif verb == "delete":
        state.delete_fd(*rest_)
    elif verb == "section":
        state[rest_[0]] = rest_[1]
    elif verb == "drop":
        with contextlib.suppress(KeyError):
            del state[rest_[0]]
    elif verb == "memory":
        state.memory(rest_[0], MEMORY)
    elif verb == "write":
        state.memory(rest_[0], MEMORY)[0] = rest_[1]
    else:
        assert verb == "batch"
        with state.batch():
            for part in rest_:
                act(state, things, part)


def seen_in(state: cprd.LiveState) -> Any:
    """As Model.seen, memories apart: an unconfirmed successor maps none."""
    sections = [
        (key, bytes(value) if isinstance(value, memoryview) else value)
        for key, value in state.items()
    ]
    fds = [((name, id), os.fstat(fd).st_ino) for name, id, fd in state.fds()]
    return fds, sections


def random_op(chance: random.Random, things: Things, depth: int = 0) -> Op:
    kind = chance.random()
    key = (chance.choice("ab"), chance.randrange(6))
    if kind < 0.4:
        return ("save", *key, chance.randrange(len(things.fds)))
    if kind < 0.6:
        return ("delete", *key)
    if kind < 0.78:
        size = chance.choice((3, 3, 300, 5000))
        return ("section", chance.choice("xyz"), [chance.randrange(1000), "v" * size])
    if kind < 0.84 or depth:
        return ("drop", chance.choice("xyz"))
    if kind < 0.9:
        return ("write", chance.choice("mn"), chance.randrange(256))
    return ("batch", *(random_op(chance, things, 1) for _ in range(chance.randrange(2, 9))))


class Owner(Told):
    """A forked process that takes the hold, and makes the changes of `script`. It says in shared
    memory whether it has confirmed, and how many changes have returned."""

    def __init__(
        self,
        client: str,
        path: str,
        things: Things,
        script: list[Op],
        *,
        kill_at: str = "",
        from_begin: bool = False,
    ) -> None:
        """`kill_at`: a pause point, which counts from the begin of live() or of the changes."""
        super().__init__()
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            if from_begin:
                pause.arm(kill_at)
            if client == "trio":
                trio.run(self._on_trio, path, things, script, "" if from_begin else kill_at)
            else:
                with cprd.live("chat", path, wait=PATIENCE) as state:
                    state.confirm()
                    self._run(state, things, script, "" if from_begin else kill_at)
                    os._exit(0)  # and not by a polite end
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    async def _on_trio(self, path: str, things: Things, script: list[Op], kill_at: str) -> None:
        async with cprd.trio.live("chat", path, wait=PATIENCE) as state:
            await state.confirm()
            self._run(state, things, script, kill_at)
            os._exit(0)

    def _run(self, state: Any, things: Things, script: list[Op], kill_at: str) -> None:
        self._say(0, 1)
        if kill_at:
            pause.arm(kill_at)
        for number, op in enumerate(script):
            act(state, things, op)
            self._say(1, number + 1)

    def await_end(self) -> bool:
        """Wait for a pause point (True) or for the end (False), at the latest kill."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            flags = os.WSTOPPED | os.WEXITED | os.WNOWAIT | os.WNOHANG
            found = os.waitid(os.P_PID, self.pid, flags)
            if found is not None:
                if found.si_code == os.CLD_STOPPED:
                    return True
                assert (found.si_code, found.si_status) == (os.CLD_EXITED, 0), "the owner failed"
                return False
            rest(0.0005)
        raise AssertionError("the owner hangs")

    def kill(self) -> None:
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            _, self.status = os.waitpid(self.pid, 0)

    def close(self) -> None:
        self.kill()
        self._shared.close()


@contextlib.contextmanager
def things_of(pipes: int = 12, memfds: int = 2) -> Iterator[Things]:
    things = Things(pipes, memfds)
    try:
        yield things
    finally:
        things.close()


def check(path: str, before: Model, script: list[Op], done: int) -> int:
    """How many changes of the script are there: `done`, or that and the one in flight. Without a
    confirm: nothing changes."""
    with cprd.live("chat", path, wait=PATIENCE) as state:
        seen = seen_in(state)
        about = f"generation {state.generation}, attempt {state.attempts}, {state.last_end!r}"
    found, model = [], before.copy()
    for number, op in enumerate([None, *script]):
        if op is not None:
            model.apply(op)
        if seen == ([*model.fds.items()], [*model.sections.items()]):
            found.append(number)
    there = [number for number in (done, done + 1) if number in found]
    assert there, (
        f"{done} changes have returned; found what is there after {found}: {seen}, {about}"
    )
    return there[0]


def empty(path: str) -> None:
    with cprd.live("chat", path, wait=PATIENCE) as state, contextlib.suppress(cprd.CprdError):
        state.confirm()
        state.end()


def sweep(client: str, path: str, things: Things, script: list[Op], every: int) -> int:
    """Kill at each `every`-th point of live, confirm and the script, in a hold that is there
    before. How many kills."""
    before = Model(things)
    first: list[Op] = [("save", "a", n, n) for n in range(5)] + [("section", "x", 1)]
    kills, at = 0, 1
    while True:
        owner = Owner("blocking", path, things, first)
        assert not owner.await_end()
        owner.close()
        for op in first:
            before.apply(op)
        owner = Owner(client, path, things, script, kill_at=f"#{at}", from_begin=True)
        try:
            stopped = owner.await_end()
            owner.kill()
            done = owner.done
            check(path, before, script, done)
        finally:
            owner.close()
        empty(path)
        if not stopped:
            assert done == len(script)
            return kills
        kills += 1
        at += every
        before = Model(things)


SCRIPT: list[Op] = [
    ("save", "a", 0, 7),
    ("delete", "a", 1),
    ("section", "y", ["v" * 5000]),
    ("batch", ("save", "b", 1, 8), ("delete", "a", 2), ("section", "x", 2), ("save", "b", 2, 12)),
    ("write", "m", 7),
    ("save", "c", 0, 13),
    ("delete", "c", 0),
    ("drop", "y"),
    ("delete", "b", 1),
]


@pytest.mark.parametrize("client", ["blocking", "trio"])
def test_killed_at_pause_points_from_live_to_the_last_change(
    daemon: DaemonProcess, client: str
) -> None:
    with things_of() as things:
        kills = sweep(client, daemon.path, things, SCRIPT, every=2)
        print(f"{client}: {kills} kills")
        assert kills > 25


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("client", ["blocking", "trio"])
def test_killed_at_every_pause_point(daemon: DaemonProcess, client: str) -> None:
    with things_of() as things:
        print(f"{client}: {sweep(client, daemon.path, things, SCRIPT, every=1)} kills")


def hunted(client: str, path: str, kills: int, seed: int) -> tuple[int, int]:
    """An owner after the other, killed at random moments, one in three soon after its start. How
    many died unconfirmed, and with how many changes behind them in all."""
    chance = random.Random(seed)
    unconfirmed = changes = 0
    with things_of() as things:
        model = Model(things)
        for _ in range(kills):
            script = [random_op(chance, things) for _ in range(2000)]
            owner = Owner(client, path, things, script)
            try:
                if chance.random() < 0.67:
                    until(lambda owner=owner: owner.confirmed, lambda: "not confirmed")  # type: ignore[misc]
                    rest(chance.random() * 0.02)
                else:
                    rest(chance.random() * 0.03)
                owner.kill()
                done = owner.done
                changes += done
                unconfirmed += not owner.confirmed
                there = done
                if after_death(path, "chat") is not None:
                    there = check(path, model, script, done)
                for op in script[:there]:
                    model.apply(op)
                if there == done and after_death(path, "chat") is None:  # nothing was kept
                    assert not model.fds
                    assert not model.sections
            finally:
                owner.close()
        empty(path)
    return unconfirmed, changes


def after_death(path: str, name: str) -> str | None:
    """The phase, once cprd knows of a death. So many deaths in a row are a quarantine, which is
    undone."""
    found: list[str | None] = []

    def known() -> bool:
        with cprd.connect(path) as client:
            found.append({row["name"]: row["phase"] for row in client.list()}.get(name))
            if found[-1] == "quarantined":
                client.release(name)
        return found[-1] in (None, "held")

    until(known, lambda: f"{found[-1]}")
    return found[-1]


@pytest.mark.parametrize("client", ["blocking", "trio"])
def test_killed_at_random_moments(daemon: DaemonProcess, client: str) -> None:
    unconfirmed, changes = hunted(client, daemon.path, 12, seed=len(client))
    print(f"{client}: {unconfirmed} of 12 unconfirmed, {changes} changes")
    assert changes > 10


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("client", ["blocking", "trio"])
def test_killed_at_a_thousand_random_moments(daemon: DaemonProcess, client: str) -> None:
    print(client, hunted(client, daemon.path, 1000, seed=11))


# Connections


def serve(path: str, port: int) -> None:
    """A server of lines "N\\n", which answers "TALLY N\\n" once the tally is kept: a repeated line
    gets the answer that is kept. Ends by being killed."""
    with cprd.live("tally", path, wait=PATIENCE) as state:
        if state.has_fd("listener"):
            listener = state.take_socket("listener", blocking=False)
        else:
            listener = socket.create_server(("127.0.0.1", port), backlog=4096)
            listener.setblocking(False)
        clients = state.take_sockets("client", blocking=False)
        tallies = {id: state[f"client.{id}"] for id in clients}
        state.confirm()
        if not state.has_fd("listener"):
            state.save_fd("listener", listener)
        poll = select.epoll()
        poll.register(listener, select.EPOLLIN)
        by_fd = {}
        for id, sock in clients.items():
            by_fd[sock.fileno()] = (id, sock)
            poll.register(sock, select.EPOLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == listener.fileno():
                    with contextlib.suppress(BlockingIOError):
                        sock, _ = listener.accept()
                        sock.setblocking(False)
                        id = max(tallies, default=0) + 1
                        with state.batch():
                            state.save_fd("client", id, sock)
                            state[f"client.{id}"] = tallies[id] = [0, 0]
                        by_fd[sock.fileno()] = (id, sock)
                        poll.register(sock, select.EPOLLIN)
                    continue
                id, sock = by_fd[fd]
                line, end, _ = sock.recv(100, socket.MSG_PEEK).partition(b"\n")
                number = int(line)
                last, tally = tallies[id]
                if number != last:
                    tallies[id] = [number, tally + number]
                    state[f"client.{id}"] = tallies[id]
                sock.sendall(b"%d %d\n" % (tallies[id][1], number))
                # Last: a kill before leaves the line, to be answered again, before the next.
                sock.recv(len(line + end))


class Servers:
    """One server after the other, each forked."""

    def __init__(self, path: str, port: int) -> None:
        self.path, self.port = path, port
        self.pid = 0

    def start(self) -> None:
        self.pid = os.fork()
        if not self.pid:
            try:
                serve(self.path, self.port)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(1)

    def kill(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            self.pid = 0
            assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "the server failed"
            after_death(self.path, "tally")


class Disturbance:
    """A block in which `act` is called once, after so many seconds, in a thread."""

    def __init__(self, act: Callable[[], None], seconds: float) -> None:
        self.act, self.seconds = act, seconds
        self.thread = threading.Thread(target=self.run)
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            rest(self.seconds)
            self.act()
        except BaseException as error:
            self.error = error

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *exc: object) -> None:
        self.thread.join()
        if self.error is not None:
            raise self.error


def clients_through_kills(
    path: str, connections: int, kills: int, disturb: Callable[[], None] = lambda: None
) -> None:
    """Half of the kills come right at the take-over. `disturb` is called at a random moment of each
    round."""
    chance = random.Random(connections)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    servers = Servers(path, port)
    socks: list[socket.socket] = []
    try:
        servers.start()
        first = Reached(port)
        until(first.there, lambda: "no server")
        socks.append(first.sock)
        address = ("127.0.0.1", port)
        socks += [
            socket.create_connection(address, timeout=PATIENCE) for _ in range(1, connections)
        ]
        sums = [1] * connections
        last = [1] * connections
        for sock in socks:  # accepted and kept: a kill between the two ends a connection
            sock.sendall(b"1\n")
            assert answer(sock, b"") == b"1 1\n"
        said = [b"1 1\n"] * connections
        for round in range(kills + 1):
            asked = chance.sample(range(connections), max(1, connections // 2))
            for index in asked:
                last[index] += 1
                sums[index] += last[index]
                socks[index].sendall(b"%d\n" % last[index])
            with Disturbance(disturb, chance.random() * 0.1):
                if round == kills:
                    pass
                elif round % 2:
                    servers.kill()
                    servers.start()
                    rest(chance.random() * 0.02)  # at its take-over, or before, or soon after
                    servers.kill()
                    servers.start()
                else:
                    rest(chance.random() * 0.02)
                    servers.kill()
                    servers.start()
            for index in asked:
                wanted = b"%d %d\n" % (sums[index], last[index])
                heard = answer(socks[index], said[index])
                assert heard == wanted, f"round {round}, client {index}"
                said[index] = wanted
    finally:
        servers.kill()
        close_all([sock.detach() for sock in socks])
    with cprd.live("tally", path, wait=PATIENCE) as state:
        assert len(state.fd_keys("client")) == connections
        found = sorted(state[key][1] for key in state)
        assert found == sorted(sums)
        state.confirm()
        state.end()


def answer(sock: socket.socket, before: bytes) -> bytes:
    """The next answer. A server that was killed may have said the one before twice, or this one."""
    data = b""
    while not data.endswith(b"\n") or data.splitlines(keepends=True)[-1] == before:
        data += sock.recv(1000)
    lines = {*data.splitlines(keepends=True)} - {before}
    assert len(lines) == 1
    return lines.pop()


class Reached:
    """A connection to a server that is about to listen."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.sock: Any = None

    def there(self) -> bool:
        with contextlib.suppress(OSError):
            self.sock = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        return self.sock is not None


def test_200_connections_live_through_6_kills(daemon: DaemonProcess) -> None:
    clients_through_kills(daemon.path, 200, 6)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_2000_connections_live_through_20_kills(daemon: DaemonProcess) -> None:
    clients_through_kills(daemon.path, 2000, 20)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.full)])
def test_cprd_in_memory_killed_alone_is_given_the_hold_back_each_time(
    new_daemon: DaemonProcess, kills: int
) -> None:
    """And the death of the owner afterwards loses nothing."""

    def is_back() -> bool:
        with new_daemon.connect() as client:
            [row] = client.list()
        return row["phase"] == "live" and "put it back" not in row["reason"]

    def cprd_is_killed() -> None:
        for _ in range(kills):
            new_daemon.restart()
            until(is_back, lambda: "not put back")

    clients_through_kills(new_daemon.path, 50, 0, cprd_is_killed)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_five_minutes_of_changes_and_deaths(daemon: DaemonProcess) -> None:
    """Owners of both clients, killed at random moments, and clients of a server; at the end cprd
    has hardly more descriptors and memory."""
    hunted("blocking", daemon.path, 20, seed=0)  # to warm up
    fds, memory = daemon.fds(), resident(daemon.pid)
    end = time.monotonic() + 300
    rounds = changes = deaths = 0
    while time.monotonic() < end:
        rounds += 1
        for client in ("blocking", "trio"):
            deaths += 15
            changes += hunted(client, daemon.path, 15, seed=rounds)[1]
        clients_through_kills(daemon.path, 100, 4)
        deaths += 7
    # A releaser more or less; a descriptor lost with each death would be hundreds.
    until(lambda: daemon.fds() <= fds + 4, lambda: f"{daemon.fds()} descriptors, not {fds}")
    grown = resident(daemon.pid) - memory
    print(f"{rounds} rounds, {deaths} deaths, {changes} changes; cprd grew by {grown} KiB")
    assert grown < 10_000


def resident(pid: int) -> int:
    """KiB."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * 4

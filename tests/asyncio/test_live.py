"""Live holds on asyncio: a real server, killed, and its clients."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import cprd.asyncio
from cprd import Busy, Fenced, InvalidInput, State
from cprd.asyncio.connection import LoopConnection
from cprd.client.exchange import Step
from tests.support.checkout import CHECKOUT
from tests.support.daemon import DaemonProcess
from tests.support.descriptors import open_fds
from tests.support.loops import Run, cancelled_here, run_on
from tests.support.patience import PATIENCE, in_time, until

pytestmark = pytest.mark.usefixtures("nothing_leaks")


# In this process


def test_a_state_is_kept_at_every_change(run: Run, daemon: DaemonProcess) -> None:
    async def work() -> None:
        async with cprd.asyncio.connect(daemon.path) as client:
            state = await client.live("web")
            assert (state.found, state.confirmed) == (False, True)
            state["n"] = 1
            state.save_fd("in", 0)
            with pytest.raises(Busy, match="live"):
                await client.live("web")
            await state.close()
            state = await client.live("web")
            assert (state.found, state.confirmed) == (True, False)
            with pytest.raises(InvalidInput, match="confirm"):
                state["n"] = 2
            os.close(state.take_fd("in"))
            with pytest.raises(InvalidInput, match="never asked for"):
                await state.confirm(strict=True)
            assert state["n"] == 1
            await state.confirm(strict=True)
            with state.batch():
                state["n"] = 2
                state["m"] = 3
        await state.aclose()
        async with cprd.asyncio.live("web", daemon.path) as state:
            assert dict(state) == {"n": 2, "m": 3}
            os.close(state.take_fd("in"))
            await state.confirm()
            await state.end()
        with daemon.connect() as other:
            assert other.list() == []

    run(work())


def test_a_cancelled_block_before_confirm_gives_back(run: Run, daemon: DaemonProcess) -> None:
    async def own() -> None:
        async with cprd.asyncio.live("web", daemon.path):
            await cancelled_here()

    async def work() -> None:
        with pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(own())
        async with cprd.asyncio.live("web", daemon.path) as state:
            assert state.attempts == 2
            assert state["n"] == 1
            await state.confirm()

    with daemon.connect() as other:
        saved = State()
        saved["n"] = 1
        other.save("web", saved)
    run(work())


def test_a_hold_is_put_back_by_a_task(run: Run, daemon: DaemonProcess) -> None:
    """cprd keeps in memory: the next cprd has the hold again, unless somebody dropped it."""

    async def work() -> None:
        async with cprd.asyncio.live("web", daemon.path) as state:
            state["n"] = 1
            for number in range(2, 4):
                await asyncio.to_thread(daemon.restart)
                state["n"] = number  # in between, too
                async with asyncio.timeout(PATIENCE):
                    while daemon_says(daemon) != {"web": "live"}:
                        await asyncio.sleep(0.01)
            await asyncio.to_thread(drop, daemon)
            with pytest.raises(Fenced):
                state["n"] = 4

    run(work())


def daemon_says(daemon: DaemonProcess) -> dict[str, str]:
    with daemon.connect() as client:
        return {row["name"]: row["phase"] for row in client.list() if "put" not in row["reason"]}


def drop(daemon: DaemonProcess) -> None:
    with daemon.connect() as other:
        other.drop("web", force=True)


def test_leave_while_a_lingering_socket_is_let_go_of(run: Run, daemon: DaemonProcess) -> None:
    """Its last close waits in a thread: the other sockets must not be forgotten."""
    linger = struct.pack("ii", 1, 60)  # s: longer than any load delays what does not wait
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        peers, mine = [], []
        for _ in range(40):
            peers.append(stack.enter_context(socket.create_connection(listener.getsockname())))
            sock = stack.enter_context(listener.accept()[0])
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            sock.setblocking(False)
            mine.append(sock)
        with contextlib.suppress(BlockingIOError):
            while True:
                mine[20].send(b"x" * 65536)  # the peer does not read

        async def work() -> None:
            async with cprd.asyncio.live("web", daemon.path) as state:
                state.save_fds("client", enumerate(mine))
                mine.pop(20).close()
                begin = time.monotonic()
                state.delete_fd("client", 20)
                state.leave()
                assert in_time(time.monotonic() - begin, 0.9)
                for sock in mine:
                    with pytest.raises(BrokenPipeError):
                        sock.send(b"bye")
            for peer in peers:
                peer.close()  # and the last close of ours waits no longer

        run(work())
        drop(daemon)


@pytest.mark.parametrize("late", [False, True], ids=["before", "while"])
def test_a_cancellation_at_each_step_loses_nothing(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    at = count = 0
    do = LoopConnection.do

    async def counted(line: LoopConnection, step: Step) -> Any:
        nonlocal count
        task = asyncio.current_task()
        assert task is not None
        if task.get_name() == "owner":
            count += 1
            if count == at:
                if late:
                    asyncio.get_running_loop().call_soon(task.cancel)
                else:
                    task.cancel()
        return await do(line, step)

    async def own() -> None:
        async with cprd.asyncio.live("web", daemon.path) as state:
            assert state["n"] == 1
            os.close(state.take_fd("end"))
            await state.confirm()

    async def work() -> bool:
        nonlocal count
        count = 0
        task = asyncio.create_task(own(), name="owner")
        await asyncio.wait([task], timeout=PATIENCE)
        if not task.cancelled():
            task.result()
        async with cprd.asyncio.live("web", daemon.path, wait=5.0) as state:
            assert (state.found, dict(state), state.fd_keys()) == (True, {"n": 1}, [("end", 0)])
            os.close(state.take_fd("end"))
            await state.confirm()
        return task.cancelled()

    monkeypatch.setattr(LoopConnection, "do", counted)
    run = run_on("asyncio")
    one, other = socket.socketpair()
    with one, other, daemon.connect() as client:
        saved = State()
        saved["n"] = 1
        saved.save_fd("end", one)
        client.save("web", saved)
        assert not run(work())
        steps, before = count, open_fds()
        assert steps > 6
        cancelled = 0
        for step in range(1, steps + 1):
            at = step
            cancelled += run(work())
            until(lambda: open_fds() == before, lambda: f"{open_fds()} descriptors, not {before}")
        assert cancelled >= steps // 2


# A server, and its clients


class Server:
    """tests.asyncio.server, started again after each end. Serves at `port`."""

    def __init__(self, daemon: DaemonProcess, loop: str) -> None:
        self._command = [sys.executable, "-m", "tests.asyncio.server", loop, "lines"]
        self._env = {**daemon.env, "CPRD_SOCKET": daemon.path}
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, word: bytes) -> None:
        """Start, and wait until the server serves: "cold" or "warm"."""
        self.process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, env=self._env, cwd=CHECKOUT
        )
        assert self.process.stdout is not None
        said = self.process.stdout.readline().split()
        assert said[:1] == [word]
        self.port = int(said[1])

    def end(self, number: int) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        with self.process:
            return self.process.wait(PATIENCE)

    def __enter__(self) -> Server:
        self.start(b"cold")
        return self

    def __exit__(self, *error: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.end(signal.SIGKILL)


class Clients:
    """So many connections. Each line is sent again where an answer did not come."""

    def __init__(self, port: int, count: int) -> None:
        self.socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
        self.answers = [b""] * count

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *error: object) -> None:
        for sock in self.socks:
            sock.close()

    def say(self, number: int) -> None:
        for sock, answer in zip(self.socks, self.answers, strict=True):
            if answer != self.right(number):
                sock.sendall(b"%d words\n" % number)

    def right(self, number: int) -> bytes:
        return b"%d of %d words\n" % (number, number)

    def hear(self, number: int, enough: Callable[[int], bool], seconds: float) -> None:
        """Read until `enough` of the count of answers to line `number`."""
        end = time.monotonic() + seconds
        poll = select.poll()
        places = {sock.fileno(): place for place, sock in enumerate(self.socks)}
        for sock in self.socks:
            poll.register(sock, select.POLLIN)
        while not enough(sum(answer == self.right(number) for answer in self.answers)):
            assert time.monotonic() < end, self.answers
            for fd, _ in poll.poll(1000):
                place = places[fd]
                data = self.socks[place].recv(1000)
                assert data, "a client was told goodbye"
                lines = data.splitlines(keepends=True)
                assert set(lines) <= {self.right(number), self.right(number - 1)}, lines
                self.answers[place] = lines[-1]


@contextlib.contextmanager
def clients_of(server: Server, count: int) -> Iterator[Clients]:
    with Clients(server.port, count) as clients:
        clients.say(1)
        clients.hear(1, lambda answered: answered == count, PATIENCE)
        yield clients


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_clients_of_a_killed_server_notice_nothing(daemon: DaemonProcess, loop: str) -> None:
    """Killed in the midst of answers, three times, and asked to end in between."""
    run_on(loop)(asyncio.sleep(0))  # or skip
    count = 200
    with Server(daemon, loop) as server, clients_of(server, count) as clients:
        ends = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL]
        for number, end in enumerate(ends, 2):
            clients.say(number)
            clients.hear(number, lambda answered: answered >= count // 4, PATIENCE)
            assert server.end(end) == (0 if end == signal.SIGTERM else -end)
            server.start(b"warm")
            clients.say(number)
            clients.hear(number, lambda answered: answered == count, PATIENCE)
        with socket.create_connection(("127.0.0.1", server.port)) as late:
            late.sendall(b"1 late\n")
            assert late.recv(100) == b"1 of 1 late\n"
            clients.socks[0].shutdown(socket.SHUT_WR)
            assert clients.socks[0].recv(100) == b""  # let go of, and then closed
    with daemon.connect() as client:
        (row,) = client.list()
        assert row["phase"] == "held"
        assert client.drop("lines")


def test_a_server_killed_with_its_cprd_in_between_loses_nothing(daemon: DaemonProcess) -> None:
    with Server(daemon, "asyncio") as server, clients_of(server, 20) as clients:
        daemon.restart()
        until(lambda: daemon_says(daemon) == {"lines": "live"}, lambda: "not put back")
        clients.say(2)
        clients.hear(2, lambda answered: answered == 20, PATIENCE)
        server.end(signal.SIGKILL)
        server.start(b"warm")
        clients.say(3)
        clients.hear(3, lambda answered: answered == 20, PATIENCE)
        server.end(signal.SIGKILL)
    with daemon.connect() as client:
        until(lambda: client.list()[0]["phase"] == "held", lambda: repr(client.list()))
        assert client.drop("lines")

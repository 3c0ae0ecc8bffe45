"""The clients of the demonstration: many, never at rest, each with a list of expected answers."""

from __future__ import annotations

import random
from array import array
from collections import deque
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

AHEAD = 16  # answers that a client lets itself be owed
VISIT = 0.1  # seconds between short connections


class Load:
    """`count` connections that send about `rate` numbers a second in all, until `stop`."""

    def __init__(self, count: int, rate: float, clock: Callable[[], float]) -> None:
        self.count = count
        self.period = count / rate  # seconds between two bursts of one client
        self.clock = clock
        self.answers: array[float] = array("d")
        self.slowest = 0.0
        self.wrong = 0
        self.dropped = 0
        self.visits = 0
        self.connected = 0
        self.stopping = False
        self.clients: list[Client] = []

    @property
    def owed(self) -> int:
        """Requests sent and not answered yet."""
        return sum(len(client.pending) for client in self.clients)

    def answered(self, sent: float) -> None:
        now = self.clock()
        self.answers.append(now)
        self.slowest = max(self.slowest, now - sent)

    async def connect(self, port: int) -> None:
        """Open all connections. Raises OSError."""
        for seed in range(self.count):
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            self.clients.append(Client(self, stream, seed))
            self.connected += 1

    async def run(self, port: int) -> None:
        """Keep all clients busy until the nursery around this is cancelled."""
        async with trio.open_nursery() as nursery:
            for client in self.clients:
                nursery.start_soon(client.send)
                nursery.start_soon(client.receive)
            nursery.start_soon(self.visit, port)

    async def visit(self, port: int) -> None:
        """Short connections, one after another: during a restart they wait in the listener."""
        while not self.stopping:
            await trio.sleep(VISIT)
            try:
                async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                    await stream.send_all(b"7\n")
                    answer = b""
                    while not answer.endswith(b"\n"):
                        data = await stream.receive_some()
                        if not data:
                            raise trio.BrokenResourceError
                        answer += data
            except (OSError, trio.BrokenResourceError):
                self.dropped += 1
                continue
            self.visits += 1
            self.wrong += answer != b"1 7\n"

    async def settle(self) -> None:
        """Stop sending, and wait for the answers still owed (the caller bounds the wait)."""
        self.stopping = True
        while any(client.sending or (client.pending and client.alive) for client in self.clients):
            await trio.sleep(0.02)

    def close(self) -> None:
        """Hang up on the server."""
        for client in self.clients:
            client.alive = False
            client.stream.socket.close()


class Sent:
    """A number, and the time of the last byte sent."""

    __slots__ = ("at", "number")

    def __init__(self, at: float, number: int) -> None:
        self.at = at
        self.number = number


class Client:
    """A connection. `pending`: numbers without an answer so far."""

    def __init__(self, load: Load, stream: trio.SocketStream, seed: int) -> None:
        self.load = load
        self.stream = stream
        self.random = random.Random(seed)
        self.pending: deque[Sent] = deque()
        self.count = 0
        self.total = 0
        self.sending = False
        self.alive = True

    async def send(self) -> None:
        """Send bursts of one to three numbers. A quarter of the bursts is cut in the middle of a
        line; the rest comes later, often after a restart."""
        period = self.load.period
        await trio.sleep(self.random.uniform(0, 2 * period))
        try:
            while not self.load.stopping:
                if len(self.pending) < AHEAD:
                    self.sending = True
                    await self._burst()
                    self.sending = False
                await trio.sleep(self.random.uniform(1.5, 2.5) * period)
        except trio.BrokenResourceError:
            self._drop()
        finally:
            self.sending = False

    async def _burst(self) -> None:
        many = self.random.choice((1, 2, 3))  # two on average: hence a burst every two periods
        numbers = [self.random.randrange(1, 10**6) for _ in range(many)]
        data = b"".join(b"%d\n" % number for number in numbers)
        sent = [Sent(self.load.clock(), number) for number in numbers]
        self.pending.extend(sent)
        if self.random.random() < 0.25:
            cut = self.random.randrange(1, len(data))
            await self.stream.send_all(data[:cut])
            await trio.sleep(self.random.uniform(0, 0.3))
            data = data[cut:]
            for one in sent:
                one.at = self.load.clock()  # nobody could have answered before
        await self.stream.send_all(data)

    async def receive(self) -> None:
        """Check every answer against the count and the sum, which this client alone knows."""
        buffer = b""
        try:
            while data := await self.stream.receive_some():
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    self._check(line)
        except trio.BrokenResourceError:
            pass
        self._drop()

    def _check(self, line: bytes) -> None:
        if not self.pending:
            self.load.wrong += 1
            return
        sent = self.pending.popleft()
        self.count += 1
        self.total += sent.number
        if line == b"%d %d" % (self.count, self.total):
            self.load.answered(sent.at)
        else:
            self.load.wrong += 1

    def _drop(self) -> None:
        if self.alive:
            self.alive = False
            self.load.dropped += 1
            self.load.connected -= 1

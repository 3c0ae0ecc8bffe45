"""A small TCP service that keeps a running tally for each client, and survives every death.

A client sends numbers, each on a line. The answer to each is a line with the count and the sum of
all numbers of the connection so far. Every step is kept in a live hold before the step is taken: so
SIGTERM and SIGKILL may come at any moment, wherever each connection stands (half a line read, half
an answer sent). The successor goes on in the middle of the line.

    cprd-demo-server NAME [PORT]          (or python3 -m cprd.demo.server)

serves what is kept under NAME, or else opens PORT; prints "ready PORT", and the seconds with cprd.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING

import cprd
from cprd.demo import position
from cprd.errors import absent

if TYPE_CHECKING:
    from typing import Any

    import trio

LINE = 64  # bytes; a longer one is no number of ours


_TCP = (socket.AF_INET, socket.SOCK_STREAM)


class Tally:
    """A client: the connection, the tally, and bytes on the way in and out. `read`, `written`: the
    position of the connection once all that is noted here has been done."""

    def __init__(self, sock: socket.socket, count: int = 0, total: int = 0) -> None:
        self.sock = sock
        self.count = count
        self.total = total
        self.unread = b""  # the beginning of a line
        self.unsent = b""
        self.read = 0
        self.written = 0

    def take(self, data: bytes) -> None:
        """Add the numbers of every whole line; the answers wait in `unsent`."""
        *lines, self.unread = (self.unread + data).split(b"\n")
        for line in lines:
            self.count += 1
            self.total += int(line)
            self.unsent += b"%d %d\n" % (self.count, self.total)
        if len(self.unread) > LINE:
            raise ValueError("a line without an end")
        self.read += len(data)

    def note(self) -> list[Any]:
        return [self.count, self.total, self.unread, self.unsent, self.read, self.written]

    @classmethod
    def noted(cls, sock: socket.socket, note: list[Any]) -> Tally:
        """As the predecessor noted, and no byte done twice: a kill may have come before the read of
        what is noted as read, or after the send of what is noted as unsent."""
        tally = cls(sock, *note[:2])
        tally.unread, tally.unsent, tally.read, tally.written = note[2:]
        try:
            while (left := tally.read - position.read(sock)) > 0 and sock.recv(left):
                pass
            sent = position.written(sock) - tally.written
        except OSError:
            return tally  # gone, as the first read will tell
        tally.unsent = tally.unsent[max(0, sent) :]
        tally.written += max(0, sent)
        return tally


class Service:
    """The listener and all clients, which outlive the process, and the live hold."""

    def __init__(
        self, state: cprd.LiveState | Any, listener: socket.socket, clients: dict[int, Tally]
    ) -> None:
        self.state = state
        self.listener = listener
        self.clients = clients

    @classmethod
    def fresh(cls, state: Any, port: int) -> Service:
        listener = socket.create_server(("127.0.0.1", port), backlog=4096)
        state.save_fd("listener", listener)
        return cls(state, listener, {})

    @classmethod
    def restored(cls, state: Any) -> Service:
        """Takes every descriptor that was left, and owns all."""
        socks = state.take_sockets("client", *_TCP)
        notes = {id: state[f"client.{id}"] for id in socks}
        listener = state.take_sockets("listener", *_TCP)[0]
        clients = {id: Tally.noted(sock, notes[id]) for id, sock in socks.items()}
        return cls(state, listener, clients)

    def add(self, sock: socket.socket) -> int:
        """Keep a new client; returns the number."""
        id = max(self.clients, default=0) + 1
        client = self.clients[id] = Tally(sock)
        client.read, client.written = position.read(sock), position.written(sock)
        with self.state.batch():
            self.state.save_fd("client", id, sock)
            self.state[f"client.{id}"] = client.note()
        return id

    def note(self, id: int) -> None:
        self.state[f"client.{id}"] = self.clients[id].note()

    def remove(self, id: int) -> None:
        """Let go of a client: the close tells the client."""
        with self.state.batch():
            self.state.delete_fd("client", id)
            del self.state[f"client.{id}"]
        self.clients.pop(id).sock.close()


async def serve(service: Service, stopped: list[int]) -> None:
    """Serve until SIGTERM; not at all when `stopped` has a signal already."""
    import trio

    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_accept, service, nursery)
            for id in service.clients:
                nursery.start_soon(_talk, service, id)
            print("ready", service.listener.getsockname()[1], flush=True)
            if stopped:
                nursery.cancel_scope.cancel()
            async for _ in signals:
                nursery.cancel_scope.cancel()


async def _accept(service: Service, nursery: trio.Nursery) -> None:
    import trio

    service.listener.setblocking(False)
    while True:
        await trio.lowlevel.wait_readable(service.listener)
        try:
            sock, _ = service.listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            continue
        # Between accept and add nothing else may run: a connection in between ends with a kill.
        nursery.start_soon(_talk, service, service.add(sock))


async def _talk(service: Service, id: int) -> None:
    """Read numbers and send answers until the client hangs up."""
    import trio

    client = service.clients[id]
    sock = trio.socket.from_stdlib_socket(client.sock)
    try:
        while True:
            while client.unsent:
                sent = await sock.send(client.unsent)
                client.unsent = client.unsent[sent:]
                client.written += sent
            data = await sock.recv(4096, socket.MSG_PEEK)
            if not data:
                break
            client.take(data)
            service.note(id)  # the point of no return: before, nothing was read
            client.sock.recv(len(data))
    except (OSError, ValueError):
        pass  # gone, or talking something else
    service.remove(id)


def main() -> int:
    """The command. Exit status: 0 left to the successor, 1 failed, 2 usage."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="cprd-demo-server",
        description="A small TCP service that survives its own restarts and deaths: the one of"
        " `cprctl demo`.",
    )
    parser.add_argument("name", metavar="NAME", help="what it is kept under")
    parser.add_argument("port", metavar="PORT", type=int, nargs="?", default=0, help="when cold")
    given = parser.parse_args()
    try:
        run(given.name, given.port)
    except (cprd.CprdError, OSError) as error:
        print(f"cprd-demo-server: {error}", file=sys.stderr)
        return 1
    return 0


def run(name: str, port: int) -> None:
    """Take over or start, serve until SIGTERM. Raises CprdError, OSError (the port is taken)."""
    from importlib.util import find_spec

    if find_spec("trio") is None:  # not once something was taken
        raise cprd.Unavailable(absent("trio", "cprd-demo-server"))
    stopped: list[int] = []  # a SIGTERM before serve() ends it politely, too
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))

    import trio

    trio.run(_live, name, port, stopped)


async def _live(name: str, port: int, stopped: list[int]) -> None:
    import cprd.trio

    begun = time.monotonic()
    async with cprd.trio.live(name, wait=10.0) as state:
        if "CPRD_DEMO_CRASH" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
        if state.found:
            service = Service.restored(state)
            await state.confirm()
        else:
            service = Service.fresh(state, port)
        print(f"loaded {time.monotonic() - begun:.6f}")
        await serve(service, stopped)


if __name__ == "__main__":
    sys.exit(main())

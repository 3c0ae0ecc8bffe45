"""A small TCP service that keeps a running tally for each client, and survives its own restarts.

A client sends numbers, one a line; each is answered with a line of two: how many numbers this
connection has sent so far, and their sum. On SIGTERM the service stops at once, wherever each
connection stands (half a line read, half an answer sent), leaves everything with cprd and exits.
The next one goes on in the middle of that line.

    cprd-demo-server NAME [PORT]          (or python3 -m cprd.demo.server)

serves what is held under NAME, or else opens PORT. It prints "ready PORT" when it serves, and how
many seconds it spent with cprd.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING

import cprd
from cprd.errors import absent

if TYPE_CHECKING:
    import trio

LINE = 64  # bytes; a longer one is no number of ours


_TCP = (socket.AF_INET, socket.SOCK_STREAM)


class Tally:
    """One client: its connection, what it was told, and the bytes on their way in and out."""

    def __init__(self, sock: socket.socket, count: int = 0, total: int = 0) -> None:
        self.sock = sock
        self.count = count
        self.total = total
        self.unread = b""  # the beginning of a line
        self.unsent = b""

    def take(self, data: bytes) -> None:
        """Add the numbers of every whole line; the answers wait in `unsent`."""
        *lines, self.unread = (self.unread + data).split(b"\n")
        for line in lines:
            self.count += 1
            self.total += int(line)
            self.unsent += b"%d %d\n" % (self.count, self.total)
        if len(self.unread) > LINE:
            raise ValueError("a line without an end")


class Service:
    """The listener and all clients: what has to outlive the process."""

    def __init__(self, listener: socket.socket, clients: list[Tally]) -> None:
        self.listener = listener
        self.clients = set(clients)

    @classmethod
    def fresh(cls, port: int) -> Service:
        return cls(socket.create_server(("127.0.0.1", port), backlog=4096), [])

    @classmethod
    def restored(cls, state: cprd.State) -> Service:
        """Takes every descriptor of a loaded state, and owns it from now on."""
        clients = []
        socks = state.take_sockets("client", *_TCP)
        for id, (count, total, unread, unsent) in enumerate(state["clients"]):
            client = Tally(socks[id], count, total)
            client.unread, client.unsent = unread, unsent
            clients.append(client)
        return cls(state.take_sockets("listener", *_TCP)[0], clients)

    def state(self) -> cprd.State:
        """Everything, borrowed from here until it is saved."""
        state = cprd.State()
        clients = list(self.clients)
        state.save_fd("listener", self.listener)
        state.save_fds("client", enumerate(client.sock for client in clients))
        state["clients"] = [
            (client.count, client.total, client.unread, client.unsent) for client in clients
        ]
        return state


def _tcp(fd: int) -> socket.socket:
    return socket.socket(*_TCP, fileno=fd)


async def serve(service: Service, stopped: list[int]) -> None:
    """Serve until SIGTERM; not empty, `stopped` says that one came before. Cancelling is the whole
    hand-over: trio's receive and send either did their work or nothing, so at any moment `service`
    says exactly where each client stands."""
    import trio

    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_accept, service, nursery)
            for client in service.clients:
                nursery.start_soon(_talk, service, client)
            print("ready", service.listener.getsockname()[1], flush=True)
            if stopped:
                nursery.cancel_scope.cancel()
            async for _ in signals:
                nursery.cancel_scope.cancel()


async def _accept(service: Service, nursery: trio.Nursery) -> None:
    import trio

    listener = trio.socket.from_stdlib_socket(service.listener)
    while True:
        sock, _ = await listener.accept()
        client = Tally(_tcp(sock.detach()))
        service.clients.add(client)
        nursery.start_soon(_talk, service, client)


async def _talk(service: Service, client: Tally) -> None:
    """Read numbers and send answers until the client hangs up."""
    import trio

    sock = trio.socket.from_stdlib_socket(client.sock)
    try:
        while True:
            while client.unsent:
                sent = await sock.send(client.unsent)
                client.unsent = client.unsent[sent:]
            data = await sock.recv(4096)
            if not data:
                break
            client.take(data)
    except (OSError, ValueError):
        pass  # gone, or talking something else
    service.clients.discard(client)
    client.sock.close()


def main() -> int:
    """The command. Exit status: 0 saved, 1 it failed, 2 usage."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="cprd-demo-server",
        description="A small TCP service that survives its own restarts: the one of `cprctl demo`.",
    )
    parser.add_argument("name", metavar="NAME", help="what it is held under")
    parser.add_argument("port", metavar="PORT", type=int, nargs="?", default=0, help="when cold")
    given = parser.parse_args()
    try:
        run(given.name, given.port)
    except (cprd.CprdError, OSError) as error:
        print(f"cprd-demo-server: {error}", file=sys.stderr)
        return 1
    return 0


def run(name: str, port: int) -> None:
    """Load or start, serve until SIGTERM, save. Raises CprdError, OSError (the port is taken)."""
    from importlib.util import find_spec

    if find_spec("trio") is None:  # not once something was taken
        raise cprd.Unavailable(absent("trio", "cprd-demo-server"))
    begun = time.monotonic()
    stopped: list[int] = []  # before the load: what was taken must not go down with a SIGTERM
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    with cprd.connect() as daemon:
        try:
            with daemon.load(name) as claim:
                if "CPRD_DEMO_CRASH" in os.environ:
                    os.kill(os.getpid(), signal.SIGKILL)
                service = Service.restored(claim.state)
        except cprd.NotHeld:
            service = Service.fresh(port)
    print(f"loaded {time.monotonic() - begun:.6f}")

    import trio

    trio.run(serve, service, stopped)

    begun = time.monotonic()
    with cprd.connect() as daemon:
        daemon.save(name, service.state())
    print(f"saved {time.monotonic() - begun:.6f}")


if __name__ == "__main__":
    sys.exit(main())

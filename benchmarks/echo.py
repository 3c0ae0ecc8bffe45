"""The echo: what a request and an answer cost when they do nothing, the yardstick of small verbs.

A trio server on a SEQPACKET socket receives a msgpack map of about 100 bytes, decodes the map, and
sends a map back; a blocking client does the same on an open connection. No descriptor travels.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import msgpack
import trio

MAP = {"verb": "echo", "name": "bench", "nonce": bytes(16), "token": bytes(16), "number": 1 << 40}


async def answer(connection: trio.socket.SocketType) -> None:
    with connection:
        while data := await connection.recv(4096):
            await connection.send(msgpack.packb({"ok": msgpack.unpackb(data)}))


async def serve(listener: trio.socket.SocketType) -> None:
    async with trio.open_nursery() as nursery:
        while True:
            connection, _ = await listener.accept()
            nursery.start_soon(answer, connection)


@contextlib.contextmanager
def server() -> Iterator[tuple[str, int]]:
    """An echo server: (path of its socket, pid)."""
    with tempfile.TemporaryDirectory(prefix="cprd-echo.") as place:
        path = os.path.join(place, "echo.sock")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(path)
            listener.listen(128)
            fd = listener.fileno()
            process = subprocess.Popen([sys.executable, __file__, str(fd)], pass_fds=[fd])
        try:
            yield path, process.pid
        finally:
            process.kill()
            process.wait()


class Client:
    """A connection to the server. Blocks."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.connect(path)

    def echo(self) -> None:
        self.sock.send(msgpack.packb(MAP))
        msgpack.unpackb(self.sock.recv(4096))


if __name__ == "__main__":
    trio.run(serve, trio.socket.from_stdlib_socket(socket.socket(fileno=int(sys.argv[1]))))

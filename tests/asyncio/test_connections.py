"""quiesce, leave, adopt, streams: with real sockets, and a peer that notices every word."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cprd.asyncio
from cprd import InvalidInput, State
from tests.support.checkout import CHECKOUT
from tests.support.daemon import DaemonProcess
from tests.support.descriptors import open_fds
from tests.support.loops import Run
from tests.support.patience import PATIENCE

pytestmark = pytest.mark.usefixtures("nothing_leaks")

MUCH = b"x" * (1 << 24)  # more than the kernel takes for a peer that does not read


@contextlib.contextmanager
def tcp() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection: the server's end, and the client's with a timeout. Both are closed at the end,
    the server's unless somebody has taken the descriptor."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname(), timeout=PATIENCE)
        server, _ = listener.accept()
    with server, client:
        yield server, client


class Noting(asyncio.Protocol):
    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.changed = asyncio.Event()

    def note(self, what: Any) -> None:
        self.seen.append(what)
        self.changed.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.note("made")

    def data_received(self, data: bytes) -> None:
        self.note(data)

    def eof_received(self) -> None:
        self.note("eof")

    def connection_lost(self, error: Exception | None) -> None:
        self.note(("lost", error))

    async def until(self, what: Any) -> None:
        async with asyncio.timeout(PATIENCE):
            while what not in self.seen:
                self.changed.clear()
                await self.changed.wait()


class NotingInBuffers(Noting, asyncio.BufferedProtocol):
    """The same with small buffers of its own."""

    def get_buffer(self, sizehint: int) -> bytearray:
        self.buffer = bytearray(4)
        return self.buffer

    def buffer_updated(self, count: int) -> None:
        self.note(bytes(self.buffer[:count]))


def silent(client: socket.socket) -> bool:
    """Whether the peer has neither bytes nor an end."""
    client.setblocking(False)
    try:
        client.recv(1)
    except BlockingIOError:
        return True
    finally:
        client.settimeout(PATIENCE)
    return False


# Taking over


def test_what_the_predecessor_had_read_comes_first(run: Run) -> None:
    async def work() -> None:
        with tcp() as (server, client):
            client.sendall(b"second")
            transport, protocol = await cprd.asyncio.adopt(Noting, server.detach(), b"first")
            assert transport.get_protocol() is protocol
            await protocol.until(b"second")
            assert protocol.seen == ["made", b"first", b"second"]
            transport.write(b"answer")
            assert client.recv(10) == b"answer"
            client.close()
            await protocol.until(("lost", None))

    run(work())


def test_a_protocol_with_buffers_of_its_own_gets_it_in_pieces(run: Run) -> None:
    async def work() -> None:
        with tcp() as (server, client):
            client.sendall(b"last")
            fd = server.detach()
            transport, protocol = await cprd.asyncio.adopt(NotingInBuffers, fd, b"123456789")
            await protocol.until(b"last")
            assert protocol.seen == ["made", b"1234", b"5678", b"9", b"last"]
            transport.abort()
            await protocol.until(("lost", None))

    run(work())


def test_a_stream_goes_on_in_the_midst_of_a_line(run: Run) -> None:
    async def work() -> None:
        with tcp() as (server, client):
            client.sendall(b"f of a line\n")
            reader, writer = await cprd.asyncio.adopt_stream(server.detach(), b"line\nhal")
            assert await reader.readline() == b"line\n"
            assert await reader.readline() == b"half of a line\n"
            writer.write(b"answer")
            await writer.drain()
            assert client.recv(10) == b"answer"
            writer.close()
            await writer.wait_closed()
            assert client.recv(10) == b""

    run(work())


def test_what_is_no_connection_is_refused_and_closed(run: Run) -> None:
    async def work() -> None:
        before = open_fds()
        pipe, other = os.pipe()
        os.close(other)
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        listener = socket.create_server(("127.0.0.1", 0))
        for fd, what in (
            *((pipe, "is no socket"), (datagrams.detach(), "is no stream")),
            (listener.detach(), "start_server"),
        ):
            with pytest.raises(InvalidInput, match=what):
                await cprd.asyncio.adopt(Noting, fd)
        with pytest.raises(InvalidInput, match="no socket"):
            await cprd.asyncio.adopt_stream(-1)
        with tcp() as (server, client):

            def failing() -> Noting:
                raise ZeroDivisionError

            with pytest.raises(ZeroDivisionError):
                await cprd.asyncio.adopt(failing, server.detach())
            assert client.recv(1) == b""
        assert open_fds() == before

    run(work())


# Letting go


def test_a_peer_hears_nothing_of_a_connection_that_is_left(run: Run, daemon: DaemonProcess) -> None:
    """Not even where handlers clean up as they do at an end. And the successor goes on."""

    async def work() -> None:
        with tcp() as (server, client):
            reader, writer = await cprd.asyncio.adopt_stream(server.detach())
            async with cprd.asyncio.connect(daemon.path) as connection:
                client.sendall(b"line\nhalf")
                assert await reader.readline() == b"line\n"
                while not (data := cprd.asyncio.unread(writer, reader)):
                    await asyncio.sleep(0)
                assert await cprd.asyncio.quiesce([writer]) == []
                state = State()
                state.save_fd("client", 7, cprd.asyncio.socket_of(writer))
                state["client.7"] = data
                await connection.save("chat", state)
                cprd.asyncio.leave(writer, reader)
                writer.write(b"farewell")  # a handler that does not know
                writer.close()
                await writer.wait_closed()
                assert silent(client)
                client.sendall(b" a line\n")
                async with connection.load("chat") as claim:
                    fd, data = claim.state.take_fd("client", 7), bytes(claim.state["client.7"])
                reader, writer = await cprd.asyncio.adopt_stream(fd, data)
                assert await reader.readline() == b"half a line\n"
                writer.write(b"here again")
                assert client.recv(100) == b"here again"
                writer.close()
                await writer.wait_closed()

    run(work())


def test_bytes_on_the_way_are_refused_in_words(run: Run) -> None:
    async def work() -> None:
        with tcp() as (server, client):
            reader, writer = await cprd.asyncio.adopt_stream(server.detach(), b"half a line")
            with pytest.raises(InvalidInput, match=r"11 bytes were read .* hand them on"):
                cprd.asyncio.leave(writer, reader)
            waiting = asyncio.create_task(reader.readline())
            await asyncio.sleep(0)
            assert (
                cprd.asyncio.unread(writer, reader) == b"half a line"
            )  # though somebody waits for more
            assert cprd.asyncio.unread(writer, reader) == b""
            waiting.cancel()
            writer.write(MUCH)
            with pytest.raises(InvalidInput, match=r"bytes wait to be sent .* quiesce"):
                cprd.asyncio.leave(writer)
            assert await cprd.asyncio.quiesce([writer], timeout=0.05) == [writer]

            def read() -> int:
                count = 0
                while count < len(MUCH):
                    count += len(client.recv(1 << 20))
                return count

            reading = asyncio.create_task(asyncio.to_thread(read))
            assert await cprd.asyncio.quiesce([writer], timeout=PATIENCE) == []
            assert await reading == len(MUCH)
            client.sendall(b"unread")  # left in the kernel
            cprd.asyncio.leave(writer, reader)
            cprd.asyncio.leave(writer, reader)  # safe to repeat
            await writer.wait_closed()

    run(work())


def test_quiesce_stops_reading_and_forgets_what_closes(run: Run) -> None:
    async def work() -> None:
        with tcp() as (server, client), tcp() as (other_server, other_client):
            transport, protocol = await cprd.asyncio.adopt(Noting, server.detach())
            _, other = await cprd.asyncio.adopt_stream(other_server.detach())
            other.write(MUCH)
            asyncio.get_running_loop().call_later(0.05, other.transport.abort)
            assert await cprd.asyncio.quiesce([transport, other], timeout=PATIENCE) == []
            client.sendall(b"for the successor")
            transport.pause_reading()  # safe to repeat
            await asyncio.sleep(0.02)
            assert protocol.seen == ["made"]
            with pytest.raises(InvalidInput, match="forget the connection"):
                cprd.asyncio.socket_of(other)
            assert other_client.recv(1)
            transport.abort()
            await protocol.until(("lost", None))

    run(work())


def certificate(place: Path) -> ssl.SSLContext:
    command = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=test -days 1 -keyout k -out c"
    made = subprocess.run(command.split(), cwd=place, capture_output=True, check=False)
    assert made.returncode == 0, made.stderr
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(place / "c", place / "k")
    return context


def test_tls_is_refused_with_what_to_do_instead(run: Run, tmp_path: Path) -> None:
    context = certificate(tmp_path)
    trusting = ssl.create_default_context(cafile=str(tmp_path / "c"))

    async def work() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            for refusing in (cprd.asyncio.socket_of, cprd.asyncio.leave):
                with pytest.raises(InvalidInput, match="proxy in front"):
                    refusing(writer)
            with pytest.raises(InvalidInput, match="TLS"):
                await cprd.asyncio.quiesce([writer])
            raw = writer.get_extra_info("socket")
            if hasattr(asyncio.get_running_loop(), "_transports"):  # uvloop says nothing
                with pytest.raises(InvalidInput, match="speaks TLS"):
                    cprd.State().save_fd("client", raw)
            writer.write(b"still here")
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        async with server:
            port = server.sockets[0].getsockname()[1]
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", port, ssl=trusting, server_hostname="test"
            )
            assert await reader.read() == b"still here"
            with tcp() as (sock, _):
                _, plain = await cprd.asyncio.adopt_stream(sock.detach())
                cprd.State().save_fd("client", plain.get_extra_info("socket"))
                plain.transport.abort()
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    run(work())


def test_what_has_no_transport_is_refused(run: Run) -> None:
    async def work() -> None:
        for thing in (7, None, socket.socket):
            with pytest.raises(InvalidInput, match="wants a transport"):
                cprd.asyncio.leave(thing)

    run(work())


# The path of a listener

LISTENS = """
import asyncio, socket, sys
import cprd.asyncio

async def main():
    sock = socket.socket(fileno=int(sys.argv[1]))
    keep = cprd.asyncio.keep_path()
    server = await asyncio.start_unix_server(lambda *_: None, sock=sock, **keep)
    server.close()
    await server.wait_closed()
    print(keep)

asyncio.run(main())
"""


def unix_server(python: str, path: Path) -> str:
    """What a process says that served at `path` on a socket of ours, and closed the server."""
    import msgpack

    packages = [Path(msgpack.__file__).parents[1]] if python != sys.executable else []
    search = os.pathsep.join(map(str, [CHECKOUT, *packages]))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        command = [python, "-c", LISTENS, str(sock.fileno())]
        return subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": search},
            pass_fds=[sock.fileno()],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        ).stdout


def test_the_path_of_a_unix_listener_stays(run: Run, tmp_path: Path) -> None:
    async def work() -> None:
        path = str(tmp_path / "sock")
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path)
            keep = cprd.asyncio.keep_path()
            server = await asyncio.start_unix_server(lambda *_: None, sock=sock.dup(), **keep)
            server.close()
            await server.wait_closed()
            assert os.path.exists(path)

    run(work())


def newer() -> str:
    """A Python that removes paths unless told otherwise (3.13 or newer)."""
    known = [str(path) for path in Path.home().glob(".pyenv/versions/3.1[3-9].*/bin/python")]
    for python in (sys.executable, "python3.14", "python3.13", *known):
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            wanted = "import sys; print(sys.version_info >= (3, 13))"
            said = subprocess.run([python, "-c", wanted], capture_output=True, check=True)
            if said.stdout == b"True\n":
                return python
    pytest.skip("needs Python 3.13 or newer: apt-get install python3.13, or uv python install 3.13")


@pytest.mark.hardware
def test_the_path_stays_in_a_newer_python(tmp_path: Path) -> None:
    python = newer()
    assert "cleanup_socket" in unix_server(python, tmp_path / "sock")
    assert (tmp_path / "sock").exists()

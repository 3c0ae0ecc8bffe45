"""A server of `websockets` that ends politely: with leave() no client hears of the end."""

from __future__ import annotations

import asyncio

import pytest

import cprd.asyncio
from cprd import State
from tests.support.daemon import DaemonProcess
from tests.support.loops import Run
from tests.support.patience import PATIENCE

websockets = pytest.importorskip("websockets", reason="needs websockets: pip install 'cprd[test]'")

pytestmark = pytest.mark.usefixtures("nothing_leaks")

COUNT = 5


@pytest.mark.parametrize("how", ["leave", "state.leave", "not at all"])
def test_a_polite_end_says_goodbye_unless_the_connections_were_left(
    run: Run, daemon: DaemonProcess, how: str
) -> None:
    from websockets.asyncio.client import connect
    from websockets.asyncio.server import ServerConnection, serve

    async def echo(connection: ServerConnection) -> None:
        async for message in connection:
            await connection.send(message)

    async def work() -> None:
        async with cprd.asyncio.live("live", daemon.path) as live:
            server = await serve(echo, "127.0.0.1", 0)
            port = next(iter(server.sockets)).getsockname()[1]
            clients = [await connect(f"ws://127.0.0.1:{port}") for _ in range(COUNT)]
            for client in clients:
                await client.send("words")
                assert await client.recv() == "words"
            there = list(server.connections)
            assert len(there) == COUNT
            assert await cprd.asyncio.quiesce(there, timeout=PATIENCE) == []
            state = State()
            for number, connection in enumerate(there):
                state.save_fd("client", number, cprd.asyncio.socket_of(connection))
                live.save_fd("client", number, cprd.asyncio.socket_of(connection))
            async with cprd.asyncio.connect(daemon.path) as client_of_cprd:
                await client_of_cprd.save("saved", state)
            if how == "leave":
                for connection in there:
                    cprd.asyncio.leave(connection)
            else:
                if how == "state.leave":
                    live.leave()
                for connection in there:
                    connection.transport.resume_reading()
            server.close()
            async with asyncio.timeout(PATIENCE):
                await server.wait_closed()
            goodbyes = 0
            for client in clients:
                try:
                    async with asyncio.timeout(0.02):
                        await client.recv()
                except TimeoutError:
                    assert client.close_code is None
                except websockets.ConnectionClosed:
                    goodbyes += 1
            assert goodbyes == (COUNT if how == "not at all" else 0)
            for client in clients:
                client.transport.abort()

    run(work())
    with daemon.connect() as connection:
        connection.drop("saved")
        connection.drop("live")

"""The server of `websockets`: its clients notice no restart."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from tests.recipes.recipe import Recipe, left_in
from tests.support.daemon import DaemonProcess
from tests.support.patience import PATIENCE

websockets = pytest.importorskip("websockets", reason="needs websockets: pip install 'cprd[test]'")

pytestmark = pytest.mark.usefixtures("nothing_leaks")

COUNT = 50


async def clients_of(server: Recipe, *, halves: bool) -> None:
    """`halves`: a frame is sent in halves, before and after the end."""
    from websockets.asyncio.client import ClientConnection, connect
    from websockets.frames import Frame, Opcode

    uri = f"ws://127.0.0.1:{server.port}"
    clients = [await connect(uri, compression=None) for _ in range(COUNT)]

    async def hear(client: ClientConnection, words: str) -> None:
        async with asyncio.timeout(PATIENCE):
            assert await client.recv() == f"you said {words}"

    async def ask(client: ClientConnection, words: str) -> None:
        await client.send(words)
        await hear(client, words)

    await asyncio.gather(*[ask(client, "0") for client in clients])
    ends = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL)
    for number, end in enumerate(ends, 1):
        frame = Frame(Opcode.TEXT, b"in halves" * 20).serialize(mask=True)
        half = number * 3 if halves else 0
        clients[0].transport.write(frame[:half])
        for _ in range(3):  # the third one comes after the half
            await ask(clients[1], "after the half")
        await asyncio.to_thread(server.kill, end)
        for client in clients[1:]:  # while nobody runs
            await client.send(f"{number}")
        server.start()
        clients[0].transport.write(frame[half:])
        await hear(clients[0], "in halves" * 20)
        await asyncio.gather(*[hear(client, f"{number}") for client in clients[1:]])
    assert [client.close_code for client in clients] == [None] * COUNT
    await asyncio.gather(*[client.close() for client in clients])
    assert [client.close_code for client in clients] == [1000] * COUNT
    late = await connect(uri, compression=None)
    await ask(late, "late")  # by now the server has let go of the others
    await asyncio.to_thread(server.kill)
    late.transport.abort()


def test_fifty_of_fifty_websockets_survive_restarts(daemon: DaemonProcess, tmp_path: Path) -> None:
    with Recipe("websockets_server.py", daemon, tmp_path) as server:
        server.connect().close()
        asyncio.run(clients_of(server, halves=True))
    assert left_in(daemon, "websockets")[0] == [("listener", 0), ("client", COUNT + 1)]


@pytest.mark.full
def test_an_asgi_application_keeps_its_websockets(daemon: DaemonProcess, tmp_path: Path) -> None:
    pytest.importorskip("uvicorn", reason="needs uvicorn: pip install uvicorn")
    with Recipe("asgi.py", daemon, tmp_path) as server:
        server.connect().close()
        asyncio.run(clients_of(server, halves=False))
    assert left_in(daemon, "asgi")[0] == [("listener", 0), ("client", COUNT + 1)]

"""The chat servers of the page: killed again and again, and no client notices."""

from __future__ import annotations

import select
import signal
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.recipes.recipe import Lines, Recipe, left_in
from tests.support.daemon import DaemonProcess

pytestmark = pytest.mark.usefixtures("nothing_leaks")

CLIENTS = 10


@pytest.mark.parametrize("name", ["chat_asyncio.py", "chat_trio.py"])
def test_a_chat_goes_on_whatever_ends_its_server(
    name: str, daemon: DaemonProcess, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        chat = stack.enter_context(Recipe(name, daemon, tmp_path))
        clients: list[Lines] = []

        def join() -> None:
            clients.append(stack.enter_context(Lines(chat.connect())))
            clients[-1].send(b"I am here\n")
            heard = {client.line() for client in clients}
            assert len(heard) == 1
            ids.append(int(heard.pop().split(b":")[0]))

        ids: list[int] = []
        for _ in range(CLIENTS):
            join()
        assert len(set(ids)) == CLIENTS
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
            for client in clients:
                client.send(b"half")
            for _ in range(3):  # the third one comes after all halves, however a loop orders these
                clients[0].send(b" a line\nhalf")
                for client in clients:
                    assert client.line() == b"%d: half a line\n" % ids[0]
            chat.kill(number)
            assert select.select([client.sock for client in clients], [], [], 0)[0] == []
            clients[0].send(b" a line\n")  # while nobody runs
            chat.start()
            for client in clients:
                assert client.line() == b"%d: half a line\n" % ids[0]
            for speaker, id in zip(clients[1:], ids[1:], strict=True):
                speaker.send(b" a line\n")
                for client in clients:
                    assert client.line() == b"%d: half a line\n" % id
            gone = clients.pop()
            ids.pop()
            gone.sock.shutdown(socket.SHUT_WR)
            assert gone.sock.recv(100) == b""  # let go of, and closed
            join()
        chat.kill()
    fds, sections = left_in(daemon, "chat")
    assert fds[0] == ("listener", 0)
    assert sorted(sections) == sorted(f"rest.{id}" for _, id in fds[1:])
    assert len(fds) == 1 + CLIENTS

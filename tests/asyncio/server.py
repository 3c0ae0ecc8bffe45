"""A server on asyncio with a live hold, as a program. A line begins with its number, from 1 on, and
comes back; a line that comes again comes back again, and counts once.

python -m tests.asyncio.server LOOP NAME

Prints "cold PORT" or "warm PORT" when it serves. SIGTERM ends it politely, without a word to the
clients."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys

import cprd.asyncio
from cprd.asyncio import LiveState
from tests.support.loops import factories


async def main(name: str) -> None:
    async with cprd.asyncio.live(name, wait=60.0) as state:
        kept = state.fd_keys("client")
        fds = {id: state.take_fd("client", id) for _, id in kept}
        if state.found:
            listener = state.take_socket("listener", blocking=False)
            counts = {id: int(state[f"client.{id}"]) for id in fds}
        else:
            listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
            counts = {}
        await state.confirm(strict=True)
        if not state.found:
            state.save_fd("listener", listener)
        await serve(state, listener, fds, counts)


async def serve(
    state: LiveState, listener: socket.socket, fds: dict[int, int], counts: dict[int, int]
) -> None:
    tasks: set[asyncio.Task[None]] = set()
    writers: set[asyncio.StreamWriter] = set()
    next_id = max([0, *fds])

    async def talk(
        id: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: int
    ) -> None:
        writers.add(writer)
        while line := await reader.readline():
            if int(line.split()[0]) == count + 1:
                count += 1
                state[f"client.{id}"] = count
            writer.write(b"%d of %s" % (count, line))
            await writer.drain()
        with state.batch():
            state.delete_fd("client", id)
            del state[f"client.{id}"]
        writer.close()

    async def came(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal next_id
        id = next_id = next_id + 1
        with state.batch():
            state.save_fd("client", id, cprd.asyncio.socket_of(writer))
            state[f"client.{id}"] = 0
        await talk(id, reader, writer, 0)

    for id, fd in fds.items():
        reader, writer = await cprd.asyncio.adopt_stream(fd)
        tasks.add(asyncio.create_task(talk(id, reader, writer, counts[id])))
    server = await asyncio.start_server(came, sock=listener)
    port = listener.getsockname()[1]
    print("warm" if state.found else "cold", port, flush=True)
    over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    await over.wait()
    server.close()
    await cprd.asyncio.quiesce(writers)
    state.leave()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=factories[sys.argv[1]]) as runner:
        runner.run(main(sys.argv[2]))

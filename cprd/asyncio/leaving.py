"""Ending the use of connections in a process that hands them on, whatever the protocol.

Connections are named by a transport, or by anything with the attribute `transport`: a StreamWriter,
a connection of `websockets`, a request of aiohttp."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Iterable
from typing import Any, cast

from cprd.errors import InvalidInput
from cprd.state import HasFileno

LIMIT = 1 << 16  # bytes taken from a reader at once
_LOOK_EVERY = 0.005  # s: no transport says to a stranger that the write buffer is empty


def socket_of(connection: Any) -> HasFileno:
    """The socket of a connection, for State.save_fd: an object with fileno(), borrowed from the
    transport. Raises InvalidInput for TLS, and for a transport that is closed or has no socket."""
    transport = _transport(connection)
    sock = transport.get_extra_info("socket")
    if transport.is_closing() or sock is None or sock.fileno() < 0:
        raise InvalidInput(f"{transport!r:.200} is closed, or has no socket: forget the connection")
    return cast(HasFileno, sock)


async def quiesce(connections: Iterable[Any], timeout: float = 5.0) -> list[Any]:
    """Stop reading, and wait until nothing that was written is left in the transports.

    Peers that do not read keep bytes here: after `timeout` seconds such connections are returned.
    Close each of these (`transport.abort()`): a successor would go on in the midst of a message.
    Otherwise returns an empty list: what was read before is the program's, what comes is left in
    the kernel for the successor. Connections that close meanwhile are forgotten.

    Raises InvalidInput for TLS."""
    until = time.monotonic() + timeout
    left = [(connection, _transport(connection)) for connection in connections]
    while True:
        left = [pair for pair in left if not pair[1].is_closing()]
        for _, transport in left:  # each time: a protocol may have resumed reading
            transport.pause_reading()
        full = [connection for connection, transport in left if _unsent(transport)]
        if not full or time.monotonic() >= until:
            return full
        await asyncio.sleep(_LOOK_EVERY)


def unread(connection: Any, reader: asyncio.StreamReader) -> bytes:
    """Take out what a reader has received and nobody has read: at the end of a server, to be handed
    on. After quiesce(); no more is received. A handler that waits for the rest of a line goes on
    waiting. Empty where the connection failed."""
    if reader.exception() is not None:
        return b""
    transport = _transport(connection)
    taken = b""
    while data := _read_now(reader):
        taken += data
    if not transport.is_closing():
        transport.pause_reading()  # read() may have resumed
    return taken


def leave(connection: Any, reader: asyncio.StreamReader | None = None) -> None:
    """End the use of a connection in this process, without a word to the peer: no FIN, no farewell
    of the protocol. For a connection that is held elsewhere (saved, or in a live hold); of a
    connection that is held nowhere this is the end.

    The descriptor is closed at the next turn of the loop, and the protocol's connection_lost(None)
    is called. What the protocol writes from now on goes nowhere. `reader`: the stream's, searched
    for bytes that were read and not handled.

    Raises InvalidInput for TLS, for unsent bytes, and for unread bytes in `reader`; then the
    connection is left as the connection was."""
    transport = _transport(connection)
    if transport.is_closing():
        return
    if unsent := _unsent(transport):
        raise InvalidInput(
            f"{unsent} bytes wait to be sent on {transport!r:.200}: quiesce() first, or abort() the"
            " transport, which ends the message in its midst"
        )
    if reader is not None and (data := unread(transport, reader)):
        reader.feed_data(data)
        raise InvalidInput(
            f"{len(data)} bytes were read from {transport!r:.200} and not handled: take them by"
            " unread(connection, reader), and hand them on in a section (adopt_stream(fd, unread))"
        )
    transport.abort()  # closes the descriptor; shuts nothing down


def keep_path(loop: asyncio.AbstractEventLoop | None = None) -> dict[str, Any]:
    """Keyword arguments for start_unix_server and whatever passes arguments on to
    loop.create_unix_server, so that the end of the server leaves the socket's path where the
    successor's clients look: from Python 3.13 on, and on uvloop, a loop removes the path unless
    told otherwise.

        await asyncio.start_unix_server(serve, sock=sock, **cprd.asyncio.keep_path())
    """
    create = (loop or asyncio.get_running_loop()).create_unix_server
    known = "cleanup_socket" in inspect.signature(create).parameters
    return {"cleanup_socket": False} if known else {}


def _transport(connection: Any) -> asyncio.Transport:
    transport = getattr(connection, "transport", connection)
    if not isinstance(transport, asyncio.BaseTransport) and not hasattr(transport, "abort"):
        raise InvalidInput(f"wants a transport, or what has one, not {connection!r:.200}")
    if transport.get_extra_info("sslcontext") is not None:
        raise InvalidInput(
            f"{transport!r:.200} speaks TLS, whose keys live in this process and end with it: close"
            " the connection, so that the client comes again, or have a proxy in front speak TLS"
        )
    return cast(asyncio.Transport, transport)


def _unsent(transport: asyncio.Transport) -> int:
    return transport.get_write_buffer_size()


def _read_now(reader: asyncio.StreamReader) -> bytes:
    """What read() has at once: read() is begun, and given up where it would wait."""
    reading = reader.read(LIMIT)
    try:
        reading.send(None)
    except StopIteration as end:
        data: bytes = end.value
        return data
    except RuntimeError:  # another task waits in read(), which means: nothing is there
        return b""
    else:
        return b""
    finally:
        reading.close()

"""Going on with connections of a predecessor."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from typing import TypeVar, cast

from cprd.errors import InvalidInput

P = TypeVar("P", bound=asyncio.BaseProtocol)

LIMIT = 1 << 16  # bytes, as asyncio's own


async def adopt(
    protocol_factory: Callable[[], P], fd: int, unread: bytes = b""
) -> tuple[asyncio.Transport, P]:
    """Go on with an established connection: as loop.create_connection, from a descriptor, which
    the transport owns from now on (closed on an error, too). `unread`: what the predecessor read
    and did not handle; the protocol receives such bytes before all others.

    Raises InvalidInput for a descriptor that is no connected stream socket."""
    sock = _stream(fd)
    made: list[P] = []

    def make() -> asyncio.BaseProtocol:
        made.append(protocol_factory())
        return _First(made[0], unread)

    try:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_accepted_socket(make, sock)
    except BaseException:
        sock.close()
        raise
    return transport, made[0]


async def adopt_stream(
    fd: int, unread: bytes = b"", *, limit: int = LIMIT
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Go on with an established connection as asyncio.open_connection does. `fd`, `unread`: as
    adopt. `limit`: bytes, as of open_connection."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=limit, loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport, _ = await adopt(lambda: protocol, fd, unread)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


class _First(asyncio.Protocol):
    """Gives way to `protocol` as soon as a transport is made, before the transport reads."""

    def __init__(self, protocol: asyncio.BaseProtocol, unread: bytes) -> None:
        self._protocol = protocol
        self._unread = unread

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        protocol, unread = self._protocol, self._unread
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        if not unread or transport.is_closing():
            return
        if not isinstance(protocol, asyncio.BufferedProtocol):
            cast(asyncio.Protocol, protocol).data_received(unread)
            return
        while unread:
            buffer = memoryview(protocol.get_buffer(len(unread)))
            count = min(len(unread), len(buffer))
            buffer[:count] = unread[:count]
            protocol.buffer_updated(count)
            unread = unread[count:]


def _stream(fd: int) -> socket.socket:
    """The descriptor as a socket. Closes the descriptor on an error."""
    try:
        sock = socket.socket(fileno=fd)
    except (OSError, ValueError) as error:
        if isinstance(fd, int) and fd >= 0:
            os.close(fd)
        raise InvalidInput(f"descriptor {fd!r} is no socket: {error}") from None
    try:
        if sock.type != socket.SOCK_STREAM:
            raise InvalidInput(f"{sock!r} is no stream: use loop.create_datagram_endpoint(sock=)")
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise InvalidInput(f"{sock!r} listens: use asyncio.start_server(sock=)")
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock

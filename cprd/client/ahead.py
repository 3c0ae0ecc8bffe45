"""A load that is asked for before the client is imported, which takes longer than cprd's answer.

The words are the client's own, and so are the answers: `Ahead.daemon` goes on with the connection,
and the first hello and load of that Daemon are these. A connection that was lost meanwhile is made
anew by the client, as always; the load has the same nonce, and is done once.
"""

from __future__ import annotations

import _socket as socket  # as in rights
import fcntl
import os
import select
import struct

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from typing import Any

    from cprd.client.blocking import Daemon

VERSION, LEASE = 2, 30.0  # as in `messages`, which is imported late
_CONNECTS = 50_000  # us, while the backlog is full
_DONTWAIT = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class _Socket(socket.socket):
    """A socket on which the client's first words were `said`; `heard`: answers that were read."""

    def __init__(self) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.said: list[bytes] = []
        self.heard: list[Any] = []

    def send(self, data: Any, flags: int = 0, /) -> int:
        if self.said and data == self.said[0]:
            return len(self.said.pop(0))
        return super().send(data, flags)

    def recvmsg(self, *size_and_flags: int) -> Any:
        return self.heard.pop(0) if self.heard else super().recvmsg(*size_and_flags)


def ask(path: str, name: str) -> Ahead | None:
    """Ask the cprd at `path` for NAME. Blocks for 50 ms at most. None: the client will say why."""
    try:
        return Ahead(path, name)
    except (OSError, ValueError):
        return None


class Ahead:
    """A connection with a hello and a load on the way. Owns the socket until `daemon` is called."""

    def __init__(self, path: str, name: str) -> None:
        self.path = path
        self.nonce = os.urandom(16)
        self._sock = sock = _Socket()
        try:
            timeout = struct.pack("ll", 0, _CONNECTS)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
            sock.connect(path)
            fcntl.fcntl(sock.fileno(), fcntl.F_SETFL, os.O_APPEND)  # (as sockets.open_socket)
            for words in (
                _map(verb="hello", version=VERSION, id=1),
                _map(verb="load", name=name, lease=LEASE, nonce=self.nonce, id=2),
            ):
                sock.send(words, _DONTWAIT)
                sock.said.append(words)
        except BaseException:
            sock.close()
            raise

    def bundle(self, timeout: float) -> int:
        """Wait for both answers. Returns a copy of the bundle that was claimed, the caller's; -1
        for none, for that of a live hold, after `timeout` seconds, or for a lost connection."""
        import msgpack

        from cprd.linux.rights import close_all, receive

        poll = select.poll()
        poll.register(self._sock.fileno(), select.POLLIN)
        if not poll.poll(timeout * 1e3):
            return -1
        try:
            hello = self._sock.recvmsg(1 << 16, 0, _DONTWAIT)
            if not poll.poll(timeout * 1e3):
                self._sock.heard.append(hello)
                return -1
            data, fds, _ = receive(self._sock, 1 << 16, socket.MSG_PEEK | _DONTWAIT)
            self._sock.heard.append(hello)
        except OSError:
            return -1
        fields = msgpack.unpackb(data).get("ok", {}) if data else {}
        if len(fds) == 1 and not fields.get("live", True):
            return int(fds[0])
        close_all(fds)
        return -1

    def daemon(self) -> Daemon:
        """The client. Blocks and raises as cprd.connect."""
        from cprd.client import exchange
        from cprd.client.blocking import Connection, Daemon

        common = exchange.Common(None)
        common.nonces.append(self.nonce)
        connection = Connection(self.path, common)
        connection.ahead = self._sock
        connection.drive(exchange.connect(connection))
        return Daemon(connection)


def _map(**fields: Any) -> bytes:
    """A small map in msgpack."""
    items = [_packed(part) for item in fields.items() for part in item]
    return bytes([0x80 | len(fields)]) + b"".join(items)


def _packed(value: str | bytes | float) -> bytes:
    if isinstance(value, float):
        return b"\xcb" + struct.pack(">d", value)
    if isinstance(value, int):
        return bytes([value])
    if isinstance(value, bytes):
        return b"\xc4" + bytes([len(value)]) + value
    raw: bytes = value.encode()
    if len(raw) < 32:
        return bytes([0xA0 | len(raw)]) + raw
    return b"\xd9" + bytes([len(raw)]) + raw  # ValueError: longer than any name

"""One client's connection in the daemon: messages in, messages out, each bounded in time.

The daemon has to close descriptors that come in, and closing a foreign file can block: the closer
gets all that is not handed on, and the socket too (a close drops the queue).
"""

from __future__ import annotations

import errno
import os
import select
import socket
from array import array
from collections.abc import Callable
from typing import NamedTuple

import trio

from cprd.daemon.releasing import Releasing
from cprd.daemon.turns import Turns
from cprd.errors import LimitExceeded, ProtocolError
from cprd.linux.rights import receive, scm_fds, send
from cprd.protocol import messages

MAX_UNCLOSED = 64  # messages' worth of one uid's descriptors that may wait to be closed


class Peer(NamedTuple):
    """Who connected, as the kernel says. pid 0: in another pid namespace."""

    uid: int
    pid: int


class Blocked(LimitExceeded):
    """Files of the uid cannot be closed: the connection ends."""


class Request(NamedTuple):
    message: messages.Message
    fds: array[int]  # owned by whoever handles the request


class Connection:
    """Owns the socket and the peer's pidfd."""

    def __init__(
        self, sock: socket.socket, peer: Peer, pidfd: int, closer: Releasing, turns: Turns
    ) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.peer = peer
        self.pidfd = pidfd
        self.closer = closer
        self.turns = turns
        self.claims: set[tuple[int, bytes]] = set()  # (generation, token)
        self.prepared: set[int] = set()
        self.nonce = b""  # of the last request
        self.id: int | None = None  # of the last request, repeated by the answer

    async def receive(self, parse: Callable[[bytes], messages.Message]) -> Request | None:
        """The next request; None at the end of the connection. Raises ProtocolError."""
        self.id = None
        while True:
            await trio.lowlevel.wait_readable(self.sock)
            await self._room()
            await self.turns.take(self.peer.uid)
            try:
                data, fds, flags = receive(self.sock, messages.MAX_REQUEST + 1)
            except BlockingIOError:
                continue
            except OSError:
                return None
            break
        try:
            message = parse(data) if data else {"id": None}
            self.id = message.pop("id")
            if flags & socket.MSG_CTRUNC:
                raise LimitExceeded(
                    "cprd had no descriptor left to receive with: raise LimitNOFILE= of"
                    " cprd.service, or drop holds"
                )
            if not data:
                if fds:
                    raise ProtocolError("an empty message with descriptors")
                return None
            return Request(message, fds)
        except BaseException:
            self.release(fds)
            raise

    async def _room(self) -> None:
        """Wait while many descriptors of the uid wait to be closed. Raises Blocked in the end."""
        end = trio.current_time() + messages.SLOW
        while self.closer.pending(self.peer.uid) >= MAX_UNCLOSED:
            if trio.current_time() >= end:
                raise Blocked(f"files of uid {self.peer.uid} block when they are closed")
            await trio.sleep(0.02)

    def release(self, fds: array[int]) -> None:
        """Close descriptors of the client, in the closer."""
        if fds:
            self.closer.close(self.peer.uid, fds)

    async def answer(self, message: messages.Message, fds: tuple[int, ...] = ()) -> None:
        """Send an answer; `fds` stay the caller's. Raises BrokenPipeError when the client has gone,
        or does not read."""
        data = self._encoded(message)
        if self._send_now(data, fds):
            return  # as nearly always
        with trio.move_on_after(messages.SLOW):
            while True:
                try:
                    send(self.sock, data, fds)
                    return
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self.sock)
                except OSError as error:
                    if error.errno in (errno.ENOBUFS, errno.ENOMEM):
                        await trio.sleep(0.01)
                        continue
                    raise BrokenPipeError(str(error)) from None
        raise BrokenPipeError("the client does not read its answers")

    def answer_now(self, message: messages.Message, fds: tuple[int, ...] = ()) -> bool:
        """Send an answer if the client has room. `fds` stay the caller's."""
        return self._send_now(self._encoded(message), fds)

    def _encoded(self, message: messages.Message) -> bytes:
        return messages.encode(message if self.id is None else {**message, "id": self.id})

    def _send_now(self, data: bytes, fds: tuple[int, ...]) -> bool:
        try:
            send(self.sock, data, fds)
        except OSError:
            return False
        return True

    async def hung_up(self) -> str:
        """Wait for the end of the connection ("gone"), or for a message ("early")."""
        await trio.lowlevel.wait_readable(self.sock)
        try:
            return "early" if self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) else "gone"
        except BlockingIOError:
            return "early"
        except OSError:
            return "gone"

    def close(self) -> None:
        """Shut down now; close in the closer where foreign files may be queued."""
        trio.lowlevel.notify_closing(self.sock)
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        pidfd, self.pidfd = self.pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)
        fd = self.sock.detach()
        try:
            foreign = scm_fds(fd) != 0  # unread, and nothing can be added after shutdown()
        except OSError:
            foreign = True
        if foreign:
            self.closer.close(self.peer.uid, [fd])
        else:
            os.close(fd)


def is_over(sock: socket.socket) -> bool:
    """Whether the client has gone already."""
    poll = select.poll()
    poll.register(sock, 0)
    return bool(poll.poll(0))

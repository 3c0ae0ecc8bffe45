"""One client's connection in the daemon: messages in, messages out, each bounded in time.

Descriptors that come in are the daemon's to close, and closing a foreign file can block: whatever
is not handed on goes to the closer, and so does the socket itself (closing it drops what is still
queued).
"""

from __future__ import annotations

import errno
import os
import socket
from array import array
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import trio

from cprd.bundle.layout import scm_fds
from cprd.daemon.closer import Closer
from cprd.errors import LimitExceeded, ProtocolError
from cprd.linux.rights import receive, send
from cprd.protocol import messages
from cprd.protocol.registry import Peer

SLOW = 10.0  # s that a client may leave an answer unread before it is cut off
MAX_UNCLOSED = 64  # messages' worth of one uid's descriptors that may wait to be closed


class Blocked(LimitExceeded):
    """The uid's files cannot be closed: nothing more is taken from it, the connection ends."""


class Request(NamedTuple):
    message: messages.Message
    fds: array[int]  # owned by whoever handles the request


class Connection:
    """Owns the socket and the peer's pidfd."""

    def __init__(self, sock: socket.socket, peer: Peer, pidfd: int, closer: Closer) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.peer = peer
        self.pidfd = pidfd
        self.closer = closer
        self.claims: set[tuple[int, bytes]] = set()  # (generation, token)
        self.prepared: set[int] = set()
        self.nonce = b""  # of the last request
        self.early = False  # its client follows bundles that are being filled
        self.hear: Callable[[Connection, messages.Message, array[int]], Awaitable[None]] | None = (
            None
        )
        # What was announced, until what comes after it: owned, or why it cannot be done.
        self.announced: Request | LimitExceeded | None = None

    async def receive(self) -> Request | None:
        """The next request; None at the end of the connection. What is announced is given to `hear`
        (its descriptors are borrowed), and becomes a request once it is filled. Raises
        ProtocolError, LimitExceeded: what came gets that answer."""
        while True:
            await trio.lowlevel.wait_readable(self.sock)
            await self._room()
            try:
                data, fds, flags = receive(self.sock, messages.MAX_REQUEST + 1)
            except BlockingIOError:
                continue
            except OSError:
                return None
            try:
                if not data:
                    if fds:
                        raise ProtocolError("an empty message with descriptors")
                    return None
                request = await self._read(data, fds, bool(flags & socket.MSG_CTRUNC))
            except BaseException:
                self.release(fds)
                raise
            if request is not None:
                return request

    async def _read(self, data: bytes, fds: array[int], cut: bool) -> Request | None:
        """The request that a message is, which owns `fds` then; None where another one follows."""
        message = messages.decode(data, messages.MAX_REQUEST)
        verb = message.get("verb")
        if verb == "announce" and self.hear is not None:
            # Never answered, whatever is wrong with it.
            wanted = 1 + (message.get("after_exit") == "pidfd")
            if cut or len(fds) != wanted:  # not to pile up meanwhile; the save will be told
                self.release(fds)
            else:
                await self.hear(self, message, fds)
            self.announce(_cut_short() if cut else Request({**message, "verb": "save"}, fds))
            return None
        if verb == "filled" and self.hear is not None:
            self.release(fds)
            if not messages.check_request(message)[
                "save"
            ]:  # said to be sure, perhaps; not answered
                self.announce(None)
                return None
            announced, self.announced = self.announced, None
            if isinstance(announced, LimitExceeded):
                raise announced
            if announced is not None:
                try:
                    return Request(messages.check_request(announced.message), announced.fds)
                except BaseException:
                    self.release(announced.fds)
                    raise
        self.announce(None)  # nothing came of it
        if cut:
            raise _cut_short()
        return Request(messages.check_request(message), fds)

    async def _room(self) -> None:
        """Take nothing more from a uid whose descriptors wait to be closed: they are ours as long.
        Raises Blocked when that does not end."""
        end = trio.current_time() + SLOW
        while self.closer.pending(self.peer.uid) >= MAX_UNCLOSED:
            if trio.current_time() >= end:
                raise Blocked(f"files of uid {self.peer.uid} block when they are closed")
            await trio.sleep(0.02)

    def release(self, fds: array[int]) -> None:
        """Close descriptors that came from the client, elsewhere; `fds` is empty then."""
        if fds:
            self.closer.close(self.peer.uid, fds)
            del fds[:]

    def announce(self, announced: Request | LimitExceeded | None) -> None:
        """Own what was announced, in place of what was before."""
        before, self.announced = self.announced, announced
        if isinstance(before, Request):
            self.release(before.fds)

    def pass_on(self, fd: int) -> None:
        """Tell a client that waits of a bundle (borrowed) that is being filled, if that can be done
        at once."""
        try:
            send(self.sock, messages.EARLY, (fd,))
        except (OSError, LimitExceeded):
            pass  # it reads the bundle when it is there

    async def answer(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        """Send an answer; `fds` stay the caller's. Raises BrokenPipeError when the client has
        gone, or leaves its answers unread."""
        if self.answer_now(data, fds):
            return  # as nearly always; the rest is for whoever does not read
        with trio.move_on_after(SLOW):
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

    def answer_now(self, data: bytes, fds: tuple[int, ...] = ()) -> bool:
        """Send an answer if that can be done at once; `fds` stay the caller's."""
        try:
            send(self.sock, data, fds)
        except OSError:
            return False
        return True

    async def hung_up(self) -> str:
        """Wait for the end of the connection, or for a message where none may come."""
        await trio.lowlevel.wait_readable(self.sock)
        try:
            return "early" if self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) else "gone"
        except BlockingIOError:
            return "early"
        except OSError:
            return "gone"

    def close(self) -> None:
        """End it, now as far as the peer can see it, and let go of it in the peer's worker."""
        trio.lowlevel.notify_closing(self.sock)
        self.announce(None)
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


def _cut_short() -> LimitExceeded:
    return LimitExceeded(
        "cprd had no descriptor left to receive with: raise LimitNOFILE= of cprd.service, or drop"
        " holds"
    )

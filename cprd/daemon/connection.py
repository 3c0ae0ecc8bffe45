"""One client's connection in the daemon: messages in, messages out, each bounded in time.

No descriptor comes in. What a client parks for a save goes into a queue that the daemon makes, and
whose sending end the daemon hands out. What is parked can be a last reference, whose close blocks:
so `releasing` gets each queue that was not saved, and the socket of a client that sent descriptors.
"""

from __future__ import annotations

import errno
import os
import socket
import time
import types
from collections.abc import Callable, Generator
from typing import NamedTuple

import trio

from cprd.daemon.releasing import Releasing
from cprd.daemon.turns import Turns
from cprd.errors import LimitExceeded, ProtocolError
from cprd.linux.processes import Watch, is_ready
from cprd.linux.rights import (
    has_taken_no_rights,
    scm_fds,
    send,
    seqpacket_pair,
    take_no_rights,
    unread,
)
from cprd.protocol import messages

# Plain numbers: an `or` of two members of an enum takes 2 us.
_MOST = messages.MAX_REQUEST + 1
_CTRUNC, _DONTWAIT = int(socket.MSG_CTRUNC), int(socket.MSG_DONTWAIT)
_PEEK = int(socket.MSG_PEEK) | _DONTWAIT
LINGER = 1.0  # s at most between two looks whether a queue that was handed out has been read


class Peer(NamedTuple):
    """Who connected, as the kernel says. pid 0: in another pid namespace."""

    uid: int
    pid: int


class Intruding(ProtocolError):
    """Descriptors came with a message, which stays unread: the connection ends."""


Came = bytes | Intruding


@types.coroutine
def _leave_turn() -> Generator[None, None, None]:
    """Give a request back to `Turns`, which lets the task of the connection go on with the rest."""
    yield


class Connection:
    """Owns the socket, the peer's pidfd, and the receiving end of a queue that was handed out."""

    def __init__(
        self,
        sock: socket.socket,
        peer: Peer,
        pidfd: int,
        releasing: Releasing,
        turns: Turns,
        watch: Watch,
    ) -> None:
        sock.setblocking(False)
        # What was sent before that may have brought descriptors.
        self._no_rights = has_taken_no_rights(sock) or (take_no_rights(sock) and _has_none(sock))
        self.sock = sock
        self.peer = peer
        self.pidfd = pidfd
        self.releasing = releasing
        self.turns = turns
        self.claims: set[tuple[int, bytes]] = set()  # (generation, token), of live holds as well
        self.prepared: set[int] = set()
        self.nonce = b""  # of the last request
        self.id: int | None = None  # of the last request, repeated by the answer
        self.peer_ended = False
        self._queue: socket.SocketType | None = None  # the receiving end
        self._handed_out = False  # a sending end, which may be unread
        self.idle_since = time.monotonic()
        self.in_turn = False  # a request is served in a turn (turns.py)
        self.in_line = False  # for a turn
        self.told = False  # something has come since the last request
        self.ahead = False  # the client sends before the last answer, or did so lately
        self._waiting = False  # for a message or news, in a request
        self._news = False  # beside messages: the peer has ended, or the queue is abandoned
        self._given_up = False
        self._watch = watch
        if pidfd >= 0:
            watch.add(pidfd, self._ends)

    def take(self) -> Came | None:
        """What came: a message, an error where descriptors came with it, or nothing at the end of
        the connection and once `give_up` was called. None: nothing has come yet."""
        try:
            data = self._take()
        except BlockingIOError:
            return b"" if self._nothing_came() else None
        except Intruding as error:
            return error
        except OSError:
            return b""
        self.idle_since = time.monotonic()
        return data

    def read(self, came: Came, parse: Callable[[bytes], messages.Message]) -> messages.Message:
        """The request in what came. Raises ProtocolError."""
        self.id = None
        if isinstance(came, Intruding):
            raise came
        message = parse(came)
        self.id = message.pop("id")
        return message

    def _take(self) -> bytes:
        """One message. Raises Intruding, OSError."""
        if self._no_rights:  # nothing is there, and the kernel refuses what is sent
            return self.sock.recv(_MOST, _DONTWAIT)
        # First without taking: a real receive would drop descriptors, perhaps the last.
        data, _, flags, _ = self.sock.recvmsg(_MOST, 0, _PEEK)
        if flags & _CTRUNC:
            raise Intruding(
                "descriptors came with a message: cprd takes none. Ask for a queue, and park the"
                " bundle there (docs/protocol.md)"
            )
        self.sock.recv(1, _DONTWAIT)
        return data

    async def apart(self) -> None:
        """The request has to wait: the rest goes on in the task of the connection."""
        if self.in_turn:
            await _leave_turn()

    async def _readable(self) -> None:
        """Wait for a message, or other news."""
        if self._news:
            await trio.lowlevel.checkpoint()
            return
        self._waiting = True
        try:
            await trio.lowlevel.wait_readable(self.sock)
        except trio.ClosedResourceError:
            pass  # woken by `_tell`
        finally:
            self._waiting = False

    def _tell(self) -> None:
        self._news = True
        self.turns.wake(self)
        if self._waiting:
            trio.lowlevel.notify_closing(self.sock)  # costs nothing where no news come

    def _ends(self) -> None:
        """The process of the peer has ended. What it sent is served, nothing else: a connection
        that lies in a queue shows no end by itself."""
        self.peer_ended = True
        self._tell()

    def give_up(self) -> None:
        """Serve what was sent by now, and end the connection."""
        self._given_up = True
        self._tell()

    def _nothing_came(self) -> bool:
        """No message is there. Returns whether none will come; lets go of an abandoned queue: a
        client that gave up has closed the sending end."""
        if self._news:
            self._news = False
            if self._queue is not None and is_ready(self._queue.fileno()):
                self.drop_queue()
        return self.peer_ended or self._given_up

    @property
    def has_hung_up(self) -> bool:
        """Whether the client has closed the connection, or ended."""
        return self.peer_ended or is_ready(self.sock.fileno())

    # The queue of the next save

    def queue(self) -> int:
        """A new queue: the sending end, owned by the caller, to be handed out. The queue before,
        which was not saved, is let go of. Raises LimitExceeded."""
        if self._handed_out and unread(self.sock):
            raise LimitExceeded(
                "queue: the one before is unread: read all answers first. A connection has one"
                " queue at most on its way"
            )
        self.drop_queue()
        if self.releasing.refuses(self.peer.uid):
            raise LimitExceeded(
                f"files of uid {self.peer.uid} block when they are closed: end that first"
            )
        inlet, self._queue = seqpacket_pair()
        self._watch.add(self._queue.fileno(), self._tell, 0)
        self._handed_out = True
        return inlet.detach()

    def next_queue(self) -> int | None:
        """As `queue`; None where there is none to be had now."""
        try:
            return self.queue()
        except (LimitExceeded, OSError):
            return None

    def take_queue(self) -> int:
        """The receiving end of the queue, sealed: nothing can be added. Owned by the caller. Raises
        ProtocolError without a queue."""
        queue, self._queue = self._queue, None
        if queue is None:
            raise ProtocolError("no queue, or its sending end is closed: ask for one, and park")
        self._watch.remove(queue.fileno())
        try:
            queue.shutdown(socket.SHUT_RD)
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise
        return queue.detach()

    def drop_queue(self) -> None:
        """Let go of a queue that was not saved."""
        if self._queue is not None:
            self.let_go(self.take_queue())

    def let_go(self, fd: int) -> None:
        """Let go of a sealed queue or of a socket, owned from now on."""
        try:
            foreign = scm_fds(fd) != 0
        except OSError:
            foreign = True
        if foreign:
            self.releasing.close(self.peer.uid, [fd])
        else:
            os.close(fd)

    def _owes(self) -> bool:
        """Whether a sending end has not been read yet."""
        self._handed_out = self._handed_out and unread(self.sock) > 0
        return self._handed_out

    async def linger(self) -> None:
        """After the last answer: hang up, and wait until no sending end is unread. Unread, it is
        charged to cprd, whatever becomes of the connection."""
        self.drop_queue()
        if not self._owes():
            return
        self.sock.shutdown(socket.SHUT_WR)
        pause = 0.005  # the kernel tells of a peer's end a moment before emptying the queue there
        while self._owes():
            await trio.sleep(pause)
            pause = min(2 * pause, LINGER)

    async def answer(self, message: messages.Message, fds: tuple[int, ...] = ()) -> None:
        """Send an answer; `fds` stay the caller's. Raises BrokenPipeError when the client has gone,
        or does not read."""
        data = self._encoded(message)
        if self._send_now(data, fds):
            return  # as nearly always
        await self.apart()
        with trio.move_on_after(messages.SLOW):
            while True:
                try:
                    send(self.sock, data, fds)
                    return
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self.sock)
                    async with self.turns.few:
                        pass
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
        while True:
            await self._readable()
            try:
                came = self.sock.recv(1, _PEEK)
            except BlockingIOError:
                if not self._nothing_came():
                    continue
                came = b""
            except OSError:
                came = b""
            return "early" if came else "gone"

    def close(self) -> None:
        """Shut down now; let somebody else close where foreign files may be queued."""
        trio.lowlevel.notify_closing(self.sock)
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.drop_queue()
        pidfd, self.pidfd = self.pidfd, -1
        if pidfd >= 0:
            self._watch.remove(pidfd)
            os.close(pidfd)
        self.let_go(self.sock.detach())  # nothing can be added after shutdown()


def _has_none(sock: socket.socket) -> bool:
    """Whether no descriptor lies in the queue of a socket."""
    try:
        return scm_fds(sock.fileno()) == 0
    except OSError:
        return False

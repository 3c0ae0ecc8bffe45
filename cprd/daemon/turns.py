"""Whose turn it is: work of all uids in small pieces, so that nobody waits for the work of others.

One task begins all requests: a single request of each uid in a round, whatever the number of
connections. Nearly every request is served right there, without a pass of the event loop. A request
that has to wait (`Connection.apart`) goes on in the task of its connection. Work that no request
bounds (deadlines, claims of an ended connection, ended processes) pauses after each `PIECE`.
"""

from __future__ import annotations

import select
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any

import trio

if TYPE_CHECKING:
    import socket

    from cprd.daemon.connection import Came, Connection

    _Request = Coroutine[Any, Any, bool | None]
    Serve = Callable[[Connection, Came], _Request]

PIECE = 0.002  # s
REQUESTS = 0.0005  # s of requests, until new connections have a turn; all other tasks: PIECE
HANDED_OVER = 4  # requests in that time that go on in their tasks, or end their connections
NAP = 0.001  # s in which the next request saves a pass of the event loop
_EVENTS = select.EPOLLIN | select.EPOLLET


class Turns:
    """Counts the connections of each uid, and lets their requests take turns. `run` is to run as a
    task."""

    def __init__(self) -> None:
        self.connections: Counter[int] = Counter()  # by uid
        # Of tasks that go on: many connections may end, or have room, at the same moment.
        self.few = trio.Semaphore(HANDED_OVER)
        self._handed_over = 0  # in this piece: tasks of connections with something to do
        self._epoll = select.epoll()
        self._listeners = select.poll()
        self._asleep = False
        self._waiting: dict[Connection, tuple[trio.lowlevel.Task, Serve]] = {}  # for a request
        self._by_fd: dict[int, Connection] = {}
        self._piece = 0  # number of the present piece
        self._served: dict[Connection, int] = {}  # in a piece: more may have come before
        self._ready: dict[int, deque[Connection]] = {}  # by uid: something may have come
        self._over: dict[Connection, bool | Exception | _Request] = {}  # for their tasks

    def add(self, connection: Connection) -> None:
        """A new connection, until `remove`."""
        self.connections[connection.peer.uid] += 1
        self._by_fd[connection.sock.fileno()] = connection
        self._epoll.register(connection.sock, _EVENTS)

    def yield_to(self, listener: socket.socket) -> None:
        """Requests make room where somebody connects."""
        self._listeners.register(listener, select.POLLIN)

    def remove(self, connection: Connection) -> None:
        """Before the socket is closed."""
        self._served.pop(connection, None)
        del self._by_fd[connection.sock.fileno()]
        self._epoll.unregister(connection.sock)
        uid = connection.peer.uid
        self.connections[uid] -= 1
        if not self.connections[uid]:
            del self.connections[uid]

    def awaits(self, connection: Connection) -> bool:
        """Whether no request of a connection is served."""
        return connection in self._waiting

    async def serve(self, connection: Connection, serve: Serve) -> bool:
        """Call `serve` for what comes on a connection, a message in a turn, until `serve` returns
        something other than None. Returns that; False at the end of the connection."""

        def abort(_: Callable[[], Any]) -> trio.lowlevel.Abort:
            self._waiting.pop(connection, None)
            return trio.lowlevel.Abort.SUCCEEDED

        while True:
            connection.idle_since = time.monotonic()
            self._waiting[connection] = trio.lowlevel.current_task(), serve
            self.wake(connection)  # what came before now is not told of again
            await trio.lowlevel.wait_task_rescheduled(abort)
            over = self._over.pop(connection)
            if isinstance(over, Exception):
                raise over
            done = over if isinstance(over, bool) else await _Rest(over)
            if done is not None:
                return done

    def wake(self, connection: Connection) -> None:
        """Something may have come on a connection."""
        if connection in self._waiting and not connection.in_line:
            connection.in_line = True
            self._ready.setdefault(connection.peer.uid, deque()).append(connection)
            if self._asleep:
                self._asleep = False
                trio.lowlevel.notify_closing(self._epoll)

    async def run(self) -> None:
        """Begin requests. Until cancelled."""
        while True:
            self._asleep = not (self._ready or self._served)
            if self._asleep:
                try:
                    await trio.lowlevel.wait_readable(self._epoll)
                except trio.ClosedResourceError:
                    pass  # woken
                self._asleep = False
            else:
                await trio.lowlevel.checkpoint()
            self._serve_all()

    def _serve_all(self) -> None:
        """Serve what comes: a round at least, and for a piece and a nap at most."""
        pace, piece = Pace(REQUESTS), Pace()
        self._piece += 1
        self._handed_over = 0
        self._look(0)
        self._look_again(self._piece - 2)
        while True:
            if not self._ready:
                if self._served:
                    self._look(0 if self._handed_over else NAP)
                if not self._ready:
                    self._look_again(self._piece)
                if not self._ready:
                    return
            self._round()
            if piece.over or self._handed_over >= HANDED_OVER:
                return
            if pace.over:
                if self._others_wait:
                    return
                pace = Pace(REQUESTS)
            if self._ready:
                self._look(0)

    @property
    def _others_wait(self) -> bool:
        """Whether somebody connects, or a connection's task has something to do."""
        return len(self._waiting) < len(self._by_fd) or bool(self._listeners.poll(0))

    def _look(self, seconds: float) -> None:
        for fd, _ in self._epoll.poll(seconds, len(self._by_fd) or 1):
            connection = self._by_fd[fd]
            connection.told = True
            self._served.pop(connection, None)
            self.wake(connection)

    def _look_again(self, until: int) -> None:
        """Look at connections that were served in a piece up to `until`. Nothing tells of a message
        that had come before the one that was served then."""
        for connection, piece in tuple(self._served.items()):
            if piece > until:
                return
            del self._served[connection]
            self.wake(connection)

    def _round(self) -> None:
        """Serve a single request of each uid that has some."""
        for uid, line in list(self._ready.items()):
            most = self._handed_over + HANDED_OVER  # hundreds can end together
            while line and self._handed_over < most:
                connection = line.popleft()
                connection.in_line = False
                if connection in self._waiting and self._serve_one(connection):
                    break
            if not line:
                del self._ready[uid]

    def _serve_one(self, connection: Connection) -> bool:
        """Begin the request that came on a connection, if any. Returns whether any has."""
        task, serve = self._waiting[connection]
        try:
            came = connection.take()
        except Exception as error:  # ends this connection, and delays no other
            self._hand_over(connection, task, error)
            return False
        if came is None:
            connection.told = connection.ahead = False
            return False
        connection.ahead = connection.ahead or not connection.told
        connection.told = False
        if not came:
            self._hand_over(connection, task, False)
            return False
        connection.in_turn = True
        request = serve(connection, came)
        try:
            if request.send(None) is not None:
                raise RuntimeError("a request waits in its turn: apart() was not called")
        except StopIteration as end:
            if end.value is not None:
                self._hand_over(connection, task, end.value)
            elif connection.ahead:
                self.wake(connection)
            else:
                self._served[connection] = self._piece
        except Exception as error:
            self._hand_over(connection, task, error)
        else:
            self._hand_over(connection, task, request)
        connection.in_turn = False
        return True

    def _hand_over(
        self,
        connection: Connection,
        task: trio.lowlevel.Task,
        what: bool | Exception | _Request,
    ) -> None:
        """The task of a connection goes on."""
        del self._waiting[connection]
        self._handed_over += 1
        self._over[connection] = what
        trio.lowlevel.reschedule(task)


class _Rest(Awaitable["bool | None"]):
    """A request that was begun in its turn, and goes on in the task that awaits this."""

    def __init__(self, request: _Request) -> None:
        self._request = request

    def __await__(self) -> Generator[Any, Any, bool | None]:
        return self._request.__await__()


class Pace:
    """Pauses long work."""

    def __init__(self, piece: float = PIECE) -> None:
        self._piece = piece
        self._since = time.perf_counter()

    @property
    def over(self) -> bool:
        return time.perf_counter() - self._since >= self._piece

    async def pause(self) -> None:
        """Let everybody else go first, where a piece is done."""
        if self.over:
            await trio.lowlevel.checkpoint()
            self._since = time.perf_counter()

"""The server: accept, admit, greet, and one request after the other of each connection.

Between reading a request and having written the step down nothing awaits: requests are atomic
towards each other. What may take time (closing foreign files, waiting for a hold, a slow reader)
happens in releasers (releasing.py), or in the task of the connection concerned.
"""

from __future__ import annotations

import errno
import math
import os
import socket
import time
from functools import partial

import trio

from cprd.daemon import handlers, live, log, operators
from cprd.daemon.clock import now
from cprd.daemon.config import Config
from cprd.daemon.connection import Came, Connection, Peer
from cprd.daemon.releasing import Releasing
from cprd.daemon.room import Room
from cprd.daemon.steps import Roles, Steps
from cprd.daemon.storage.notes import Notes
from cprd.daemon.storage.shelf import Shelf
from cprd.daemon.storage.shelves import Keeper
from cprd.daemon.tending import tend
from cprd.daemon.turns import Pace, Turns
from cprd.daemon.waiters import no_descriptor
from cprd.errors import Busy, CprdError, Denied, LimitExceeded, NotHeld, ProtocolError
from cprd.linux import nofile, processes
from cprd.linux.rights import has_taken_no_rights, take_no_rights
from cprd.protocol import messages
from cprd.protocol.lifecycle import Hold
from cprd.protocol.registry import Registry, Step

RESERVED_FOR_ROOT = 8  # connections
ACCEPTING = 0.0015  # s in a round of the event loop
MOST_REFUSED = 1000  # uids

HANDLERS = {**handlers.HANDLERS, **live.HANDLERS, **operators.HANDLERS}
assert HANDLERS.keys() == messages.REQUESTS.keys() - {"hello"}


class Server:
    """All state of the daemon. `serve` runs it."""

    def __init__(
        self,
        config: Config,
        keeper: Keeper,
        releasing: Releasing,
        registry: Registry,
        notes: Notes | None = None,
    ) -> None:
        self.config = config
        self.keeper = keeper
        self.releasing = releasing
        self.registry = registry
        self.connections: set[Connection] = set()
        self.steps = Steps(registry, keeper, self.connections, releasing, notes)
        self.version = f"cprd {messages.RELEASE}"
        self.started = now()
        self.refused_accepts = 0
        self.reloading: trio.Event | None = None  # set once the outcome of SIGHUP is known
        self.stopping = False  # claims outlive this process: no connection's end ends them
        self.turns = Turns()
        self._refused: dict[int, tuple[float, int]] = {}  # by uid: when said, how many since
        # Stands for others, and is no user's own; -1: no uid does.
        self._overflow_uid = -1 if processes.every_uid_is_mapped() else processes.overflow_uid()
        self._reserve = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        soft = raise_nofile()
        self.max_connections = max(12, min(config.all_connections, soft // 16))
        self.room = Room(keeper, soft, self.max_connections)
        # A connection has two descriptors, a hold one and up to four pidfds. The rest: what is
        # received at once, and what the daemon itself has open.
        self.max_holds = max(4, (soft - 2 * self.max_connections - 253 - 32) // 5)

    @property
    def limits(self) -> dict[str, float]:
        return {
            "holds": self.config.holds,
            "all_holds": self.max_holds,
            "fds": self.config.fds,
            "connections": self.config.connections,
            "all_connections": self.max_connections,
            "lease": self.config.lease,
        }

    def adopt(self, left: list[tuple[Hold, Roles]], hidden: str) -> None:
        """Take over the holds of an earlier daemon, and their pidfds, which this owns now."""
        self.steps.adopt(left, hidden)
        self.steps.adopt_notes()

    def check_room(self, step: Step) -> None:
        """Raises LimitExceeded where cprd has no room for the new record of `step`."""
        if not step.put:
            return
        uid, generation = step.put[0].uid, step.put[0].generation
        self._check_releases(uid)
        self.room.check(uid)
        if generation in self.keeper.places:
            return
        most = self.max_holds - (0 if uid == 0 else max(1, self.max_holds // 20))
        if len(self.registry) - len(step.ended) >= most:
            raise LimitExceeded(
                f"cprd holds {len(self.registry)} states, as many as its RLIMIT_NOFILE allows:"
                " raise LimitNOFILE= of cprd.service, or drop holds"
            )
        mine = self.registry.usage(uid).holds
        if uid and mine - len(step.ended) >= self.max_holds // 2:
            raise LimitExceeded(
                f"uid {uid} has {mine} holds, half of what RLIMIT_NOFILE of cprd allows in all:"
                " raise LimitNOFILE= of cprd.service, or drop holds"
            )

    async def serve(self, *listeners: socket.socket) -> None:
        """Serve until cancelled. `listeners` are borrowed."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tend, "log", log.write_behind)
            nursery.start_soon(tend, "requests", self.turns.run)
            nursery.start_soon(tend, "idle connections", self._end_idle)
            nursery.start_soon(tend, "processes", self.steps.pidfds.watch)
            nursery.start_soon(tend, "deadlines", self.steps.watch_deadlines)
            nursery.start_soon(tend, "orphans", self.steps.end_orphans)
            nursery.start_soon(tend, "counting", self.steps.counting.count)
            nursery.start_soon(tend, "next shelf", self._write_shelves)
            nursery.start_soon(tend, "old shelves", self._close_shelves)
            nursery.start_soon(tend, "waiters", self.steps.waiters.serve_further)
            for listener in listeners:
                listener.setblocking(False)
                take_no_rights(listener)  # for what is sent before cprd has accepted
                self.turns.yield_to(listener)
                nursery.start_soon(tend, "accept", partial(self._accept, listener, nursery))

    async def _write_shelves(self) -> None:
        """Write shelves anew, in pieces. Until cancelled."""
        while True:
            wanted = trio.Event()
            self.keeper.compact_soon = wanted.set
            await wanted.wait()
            pace = Pace()
            self.keeper.begin_renewing()
            try:
                while self.keeper.fill():
                    await pace.pause()
            except LimitExceeded as error:
                log.event("shelf-not-compacted", level=log.WARNING, why=str(error))

    async def _close_shelves(self) -> None:
        """Close replaced shelves, in pieces: each can lead to thousands of ended holds. Until
        cancelled."""
        send, replaced = trio.open_memory_channel[Shelf](math.inf)
        self.keeper.close_shelf = send.send_nowait
        try:
            async for shelf in replaced:
                pace = Pace()
                while shelf.drop_first():
                    await pace.pause()
                shelf.close()
        finally:
            self.keeper.close_shelf = Shelf.close

    # Admission

    async def _accept(self, listener: socket.socket, nursery: trio.Nursery) -> None:
        while True:
            await trio.lowlevel.wait_readable(listener)
            self._open_reserve()
            pace = Pace(ACCEPTING)
            try:
                while not pace.over:
                    sock, _ = listener.accept()
                    self._admit(sock, nursery)
            except BlockingIOError:
                continue
            except OSError as error:
                self.refused_accepts += 1
                log.event("accept-failed", level=log.ERROR, why=error.strerror)
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    self._accept_and_close(listener)
                await trio.sleep(0.05)  # never exits, never spins

    def _admit(self, sock: socket.socket, nursery: trio.Nursery) -> None:
        """Serve a connection in a task; turn it away at once where it is too much."""
        try:
            peer = Peer(*processes.credentials(sock))
            gone = processes.is_ready(sock.fileno())
            if gone and has_taken_no_rights(sock):
                sock.close()  # at once: a loop of connect() is to delay nobody
                return
            refused = self._why_refused(peer)
            gone = gone or refused is not None
            pidfd = -1 if gone else processes.pidfd_of(sock, peer.pid)
            watch = self.steps.pidfds.watched
            connection = Connection(sock, peer, pidfd, self.releasing, self.turns, watch)
        except OSError as error:
            log.event("accept-failed", level=log.ERROR, why=error.strerror)
            sock.close()
            return
        if refused is not None:
            self._say_refused(peer, refused)
            connection.answer_now(messages.refusal(refused))
        if gone:
            connection.close()
            return
        self.connections.add(connection)
        self.turns.add(connection)
        nursery.start_soon(self._serve_one, connection)

    def _say_refused(self, peer: Peer, why: CprdError) -> None:
        """Log a refusal; of many of a uid a single line in each second, with their number."""
        at, times = self._refused.get(peer.uid, (0.0, 0))
        if now() < at + 1.0:
            self._refused[peer.uid] = at, times + 1
            return
        if len(self._refused) >= MOST_REFUSED:
            self._refused.clear()
        self._refused[peer.uid] = now(), 0
        more = times or None
        log.event("refused", level=log.WARNING, uid=peer.uid, pid=peer.pid, why=why, more=more)

    def _accept_and_close(self, listener: socket.socket) -> None:
        """Accept with the reserved descriptor and close: the client sees an end, not silence."""
        if self._reserve < 0:
            return  # not open again yet
        os.close(self._reserve)
        self._reserve = -1
        try:
            sock, _ = listener.accept()
            sock.shutdown(socket.SHUT_RDWR)  # seen at once; a releasing process may have no room
            uid, _ = processes.credentials(sock)
            if not has_taken_no_rights(sock):  # descriptors may have come
                self.releasing.close(uid, [sock.detach()])
        except OSError:
            pass
        else:
            sock.close()
        self._open_reserve()

    def _open_reserve(self) -> None:
        if self._reserve < 0:
            try:
                self._reserve = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                pass  # tried again at the next accept

    def _why_refused(self, peer: Peer) -> CprdError | None:
        if peer.uid == self._overflow_uid and peer.uid != os.geteuid():
            ours = processes.in_our_user_namespace(peer.pid)
            if not ours:
                return Denied(_foreign(peer.uid, known=ours is not None))
        mine = self.turns.connections[peer.uid]
        most = self.config.connections
        if peer.uid:
            most = min(most, self.max_connections // 2)
        if mine >= most:
            return LimitExceeded(
                f"uid {peer.uid} has {mine} connections; the quota is {most}:"
                " close some, or raise limits.connections in cprd's configuration"
            )
        reserved = 0 if peer.uid == 0 else RESERVED_FOR_ROOT
        if len(self.connections) >= self.max_connections - reserved:
            return LimitExceeded(
                f"cprd serves {len(self.connections)} connections, as many as it may: try again,"
                " or raise LimitNOFILE= of cprd.service and limits.all_connections"
            )
        try:
            self._check_releases(peer.uid)
        except LimitExceeded as error:
            return error
        return None

    def _check_releases(self, uid: int) -> None:
        """Raises LimitExceeded where too much of a uid waits to be let go of."""
        if self.releasing.refuses(uid):
            raise LimitExceeded(
                f"files of uid {uid} block when they are closed, and"
                f" {self.releasing.pending(uid)} closes wait for"
                " them: make them answer, or end the process that they wait for"
            )

    # One connection

    async def _serve_one(self, connection: Connection) -> None:
        """Serve a connection to the end."""
        try:
            await self._converse(connection)
            await self._end_claims(connection)
            await connection.linger()
        finally:
            with trio.CancelScope(shield=True):
                async with self.turns.few:
                    await self._end_claims(connection)
                    self.connections.discard(connection)
                    self.turns.remove(connection)
                    connection.close()

    async def _end_idle(self) -> None:
        """End connections on which nothing was asked for too long. Until cancelled."""
        while True:
            now = earliest = time.monotonic()
            for connection in self.connections:
                if connection.claims or connection.prepared or not self.turns.awaits(connection):
                    continue
                if connection.idle_since <= now - messages.IDLE:
                    connection.give_up()
                earliest = min(earliest, connection.idle_since)
            await trio.sleep(max(earliest - now + messages.IDLE, 1.0))

    async def _end_claims(self, connection: Connection) -> None:
        if not self.stopping:
            with trio.CancelScope(shield=True):
                await self.steps.end_claims(connection)

    async def _converse(self, connection: Connection) -> None:
        peer = connection.peer
        try:
            with trio.move_on_after(messages.FIRST_BYTE) as greeting:
                if not await self.turns.serve(connection, self._greet):
                    return
            if greeting.cancelled_caught:
                log.event("mute", level=log.WARNING, uid=peer.uid, pid=peer.pid)
                return
            await self.turns.serve(connection, self._serve_request)
        except BrokenPipeError:
            pass
        except trio.Cancelled:
            raise
        except Exception as error:
            log.event("failed", level=log.ERROR, uid=peer.uid, pid=peer.pid, why=repr(error))

    async def _greet(self, connection: Connection, came: Came) -> bool:
        """Answer hello. False: the end of the connection."""
        try:
            message = connection.read(came, messages.read_first)
            if message["verb"] != "hello":
                raise ProtocolError("the first message is hello")
        except CprdError as error:
            await self._refuse(connection, "hello", error)
            return False
        lease_by = ["connection", "process", "time"]
        if connection.pidfd < 0:
            lease_by.remove("process")
        await connection.answer(
            messages.ok(
                version=message["version"],  # which is spoken from here on
                server=self.version,
                uid=connection.peer.uid,
                pid=connection.peer.pid,
                lease_by=lease_by,
                kept=self.keeper.kept,
                limits={
                    "request": messages.MAX_REQUEST,
                    "answer": messages.MAX_ANSWER,
                    "lease": self.config.lease,
                    "holds": self.config.holds,
                    "fds": self.config.fds,
                },
            )
        )
        return True

    async def _serve_request(self, connection: Connection, came: Came) -> bool | None:
        """One request and the answer. False: the end of the connection."""
        try:
            message = connection.read(came, messages.read_request)
        except ProtocolError as error:
            await self._refuse(connection, "?", error)
            return None if isinstance(error, messages.BadRequest) else False  # noise comes next
        if connection.nonce:  # whoever asks again has read the answer before
            self.registry.replies.arrived(connection.peer.uid, connection.nonce)
        connection.nonce = message.get("nonce", b"")
        await self._handle(connection, message)
        return None

    async def _handle(self, connection: Connection, message: messages.Message) -> None:
        verb = message["verb"]
        try:
            if verb not in HANDLERS:
                raise ProtocolError("hello was said already")
            await HANDLERS[verb](self, connection, message)
        except CprdError as error:
            await self._refuse(connection, verb, error)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            await self._refuse(connection, verb, no_descriptor(error))

    async def _refuse(self, connection: Connection, verb: str, error: CprdError) -> None:
        peer = connection.peer
        level = log.INFO if isinstance(error, NotHeld | Busy) else log.WARNING
        log.event(
            "refused",
            level=level,
            verb=verb,
            uid=peer.uid,
            pid=peer.pid,
            error=type(error).__name__,
            why=str(error),
        )
        await connection.answer(messages.refusal(error))


def _foreign(uid: int, *, known: bool) -> str:
    if known:
        return (
            f"uid {uid} stands for a uid of another user namespace that has no mapping in cprd's:"
            " connect from a process whose uid is mapped there"
        )
    return (
        f"cprd cannot tell whether uid {uid} is the user of that number, or a uid of another user"
        " namespace without a mapping in cprd's (/proc of the process is hidden: ProtectProc= of"
        " cprd.service): connect as another user"
    )


def raise_nofile() -> int:
    """Raise the soft limit of descriptors to the hard limit. Returns the limit that holds."""
    try:
        _, hard = nofile.raise_soft_limit()
    except LimitExceeded as error:
        soft, hard = nofile.limits()
        log.event("limit-not-raised", level=log.WARNING, soft=soft, hard=hard, why=str(error))
        return soft
    return hard

"""The daemon: connections in, steps of the life cycle out.

Everything between reading a request and having written its step down happens without an await:
requests are atomic towards each other. What may take time (closing foreign files, waiting for a
hold, a slow reader) happens elsewhere: in the closer's threads, or in the task of the one
connection concerned.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from array import array
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import trio

from cprd.bundle import inspect
from cprd.daemon import log
from cprd.daemon.closer import Closer
from cprd.daemon.config import Config
from cprd.daemon.connection import Blocked, Connection, Request
from cprd.daemon.storage.shelves import NOT_STORED, Keeper
from cprd.errors import (
    Busy,
    CprdError,
    Damaged,
    Denied,
    Fenced,
    InvalidInput,
    LimitExceeded,
    NotHeld,
    ProtocolError,
)
from cprd.linux import nofile, processes
from cprd.linux.pause import point
from cprd.linux.rights import SCM_MAX_FD, close_all
from cprd.protocol import messages
from cprd.protocol.registry import (
    CLAIMED,
    DAMAGED,
    HELD,
    IN_DOUBT,
    PREPARED,
    Hold,
    Key,
    Peer,
    Registry,
    Step,
)

RESERVED_FOR_ROOT = 8  # connections
LET_GO_FIRST = 0.05  # s
ORPHANED = 60.0  # s after a restart
CROWD = 8  # connections of one uid from which on its requests take turns
MAX_PENDING = 1000  # closes of one uid that may wait before it is refused more


def now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Waiter:
    """A load (or wait) that waits for its turn. First come, first served.

    `tell` answers what was taken there and then, if the client reads: it waits no longer than it
    must, not for its task's turn."""

    __slots__ = ("done", "result", "scope", "take", "tell", "told")

    def __init__(
        self, take: Callable[[], Step | Hold], tell: Callable[[Step | Hold], bool] | None = None
    ) -> None:
        self.take = take
        self.tell = tell
        self.done = self.told = False
        self.scope = trio.CancelScope()  # of the wait, which its turn ends
        self.result: Step | Hold | CprdError | None = None


class Daemon:
    """All state of the daemon, and its verbs. `serve` runs it."""

    def __init__(self, config: Config, keeper: Keeper, closer: Closer, registry: Registry) -> None:
        self.config = config
        self.keeper = keeper
        self.closer = closer
        self.registry = registry
        self.started = now()
        self.refused_accepts = 0
        self.reloading: trio.Event | None = None  # set once it is known what came of SIGHUP
        self.stopping = False  # claims outlive this process: their connections' end is not theirs
        self.connections: set[Connection] = set()
        self._crowds: dict[int, int] = {}  # connections by uid
        self._turns: dict[int, trio.Lock] = {}
        self.watch = processes.Watch()
        self.pidfds: dict[int, dict[str, int]] = {}  # by generation and role; owned here
        self._waiters: dict[Key, deque[Waiter]] = {}
        self._deadline_moved = trio.Event()  # to before `_sleeps_until`
        self._sleeps_until = 0.0
        self._overflow_uid = processes.overflow_uid()
        self._spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        soft = raise_nofile()
        self.max_connections = max(12, min(config.all_connections, soft // 16))
        # Each connection has two descriptors, each hold two and up to four pidfds; a message can
        # bring 253 at once.
        self.max_holds = max(4, (soft - 2 * self.max_connections - 253 - 32) // 6)

    def adopt(self, left: list[tuple[Hold, dict[str, int]]], blind: str) -> None:
        """Take over what an earlier daemon left: holds, and their pidfds, which this owns now."""
        self.registry.blind = blind
        if blind:
            log.event("blind", level=log.ERROR, why=blind)
        for over in self.registry.adopt(hold for hold, _ in left):
            log.event("over", uid=over.uid, name=over.name, generation=over.generation)
            self.keeper.forget(over)
        for hold, pidfds in left:
            if self.registry.get(hold.generation) is None:
                _close_roles(pidfds)
                continue
            self._keep_pidfds(hold.generation, pidfds, _roles(hold))
            if hold.phase == HELD:
                continue
            log.event(
                "adopted",
                phase=hold.phase,
                uid=hold.uid,
                name=hold.name,
                generation=hold.generation,
                fds=hold.fds,
            )
        for given in self.keeper.answers():
            self.registry.remember(given["uid"], given["nonce"], given["answer"], given["at"])
            after = given.get("generation", 0) + 1
            self.registry.next_generation = max(self.registry.next_generation, after)

    async def _end_orphans(self) -> None:
        """A prepared save whose saver cannot be watched, and who has not come back."""
        orphans = [
            hold.generation
            for hold in self.registry
            if hold.phase == PREPARED and "saver" not in self.pidfds.get(hold.generation, {})
        ]
        if orphans:
            await trio.sleep(ORPHANED)
        for generation in orphans:
            if not any(generation in other.prepared for other in self.connections):
                self._observe(self.registry.saver_gone(generation))

    # Running

    async def serve(self, listener: socket.socket) -> None:
        """Serve until cancelled. `listener` is borrowed."""
        listener.setblocking(False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(log.write_behind)
            nursery.start_soon(self._watch_processes)
            nursery.start_soon(self._watch_deadlines)
            nursery.start_soon(self._end_orphans)
            nursery.start_soon(self._accept, listener, nursery)

    async def _accept(self, listener: socket.socket, nursery: trio.Nursery) -> None:
        while True:
            await trio.lowlevel.wait_readable(listener)
            self._have_spare()
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                continue
            except OSError as error:
                self.refused_accepts += 1
                log.event("accept-failed", level=log.ERROR, why=error.strerror)
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    self._accept_and_close(listener)
                await trio.sleep(0.05)  # never exits, never spins
                continue
            try:
                uid, pid = processes.credentials(sock)
                connection = Connection(
                    sock, Peer(uid, pid), processes.pidfd_of(sock, pid), self.closer
                )
            except OSError as error:
                log.event("accept-failed", level=log.ERROR, why=error.strerror)
                sock.close()
                continue
            nursery.start_soon(self._serve_one, connection)

    def _accept_and_close(self, listener: socket.socket) -> None:
        """No descriptor left: give up the spare one for as long as it takes to turn one away, so
        that the client sees an end and not silence."""
        if self._spare < 0:
            return  # it is still waited for
        os.close(self._spare)
        self._spare = -1
        try:
            sock, _ = listener.accept()
            uid, _ = processes.credentials(sock)
            self.closer.close(uid, [sock.detach()])
        except OSError:
            pass
        self._have_spare()

    def _have_spare(self) -> None:
        """Open the spare descriptor again, as soon as there is room for one."""
        if self._spare < 0:
            try:
                self._spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                pass  # tried again at the next accept

    async def _serve_one(self, connection: Connection) -> None:
        peer = connection.peer
        try:
            refused = self._why_refused(peer)
            self.connections.add(connection)
            self._crowds[peer.uid] = self._crowds.get(peer.uid, 0) + 1
            if refused is not None:
                log.event("refused", level=log.WARNING, uid=peer.uid, pid=peer.pid, why=refused)
                await connection.answer(messages.refusal(refused))
                return
            with trio.move_on_after(messages.FIRST_BYTE) as greeting:
                if not await self._greet(connection):
                    return
            if greeting.cancelled_caught:
                log.event("mute", level=log.WARNING, uid=peer.uid, pid=peer.pid)
                return
            while await self._serve_request(connection):
                pass
        except BrokenPipeError:
            pass
        except trio.Cancelled:
            raise
        except Exception as error:
            log.event("failed", level=log.ERROR, uid=peer.uid, pid=peer.pid, why=repr(error))
        finally:
            if connection in self.connections:
                self.connections.discard(connection)
                self._crowds[peer.uid] -= 1
                if not self._crowds[peer.uid]:
                    del self._crowds[peer.uid]
                    self._turns.pop(peer.uid, None)
            if not self.stopping:
                self._end_claims(connection)
            connection.close()

    def _why_refused(self, peer: Peer) -> CprdError | None:
        if peer.uid == self._overflow_uid and peer.uid != os.geteuid():
            return Denied(
                f"uid {peer.uid} is what every unmapped uid of another user namespace looks like:"
                " connect from a process whose uid is mapped here"
            )
        mine = self._crowds.get(peer.uid, 0)
        if mine >= self.config.connections:
            return LimitExceeded(
                f"uid {peer.uid} has {mine} connections; the quota is {self.config.connections}:"
                " close some, or raise limits.connections in cprd's configuration"
            )
        reserved = 0 if peer.uid == 0 else RESERVED_FOR_ROOT
        if len(self.connections) >= self.max_connections - reserved:
            return LimitExceeded(
                f"cprd serves {len(self.connections)} connections, as many as it may: try again,"
                " or raise LimitNOFILE= of cprd.service and limits.all_connections"
            )
        if self.closer.pending(peer.uid) > MAX_PENDING:
            return LimitExceeded(
                f"files of uid {peer.uid} block when they are closed: end that first"
            )
        return None

    async def _greet(self, connection: Connection) -> bool:
        try:
            request = await connection.receive(messages.read_request)
            if request is None:
                return False
            connection.release(request.fds)
            if request.fds:
                raise ProtocolError(f"hello: wants no descriptors, has {len(request.fds)}")
            if request.message["verb"] != "hello":
                raise ProtocolError("the first message is hello")
            if request.message["version"] != messages.VERSION:
                raise ProtocolError(
                    f"this cprd speaks version {messages.VERSION} of the protocol, the client"
                    f" version {request.message['version']}: upgrade the older one"
                )
        except CprdError as error:
            await self._refuse(connection, "hello", error)
            return False
        lease_by = ["connection", "process", "time"]
        if connection.pidfd < 0:
            lease_by.remove("process")
        from cprd import __version__

        await connection.answer(
            messages.ok(
                version=messages.VERSION,
                server=f"cprd {__version__}",
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

    async def _serve_request(self, connection: Connection) -> bool:
        """One request and its answer; False at the end of the connection."""
        verb = "?"
        request: Request | None = None
        try:
            if connection.claims or connection.prepared:
                request = await connection.receive(messages.read_request)
            else:
                with trio.move_on_after(messages.IDLE):
                    request = await connection.receive(messages.read_request)
            if request is None:
                return False
        except ProtocolError as error:
            await self._turn(connection)
            await self._refuse(connection, verb, error)
            return isinstance(error, messages.BadRequest)  # what follows noise is noise
        except LimitExceeded as error:
            await self._refuse(connection, verb, error)
            return not isinstance(error, Blocked)
        verb = request.message["verb"]
        if connection.nonce:  # it has got that answer
            self.registry.settled(connection.peer.uid, connection.nonce)
            self.keeper.settled(connection.peer.uid, connection.nonce)
        connection.nonce = request.message.get("nonce", b"")
        try:
            await self._turn(connection)
            if request.fds and verb not in _WITH_DESCRIPTORS:
                raise ProtocolError(f"{verb}: wants no descriptors with it, has {len(request.fds)}")
            await _VERBS[verb](self, connection, request)
        except CprdError as error:
            await self._refuse(connection, verb, error)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            await self._refuse(connection, verb, _no_descriptor(error))
        finally:
            connection.release(request.fds)
        return True

    async def _turn(self, connection: Connection) -> None:
        """Of a uid with many connections one request is served in each round of the event loop: a
        crowd makes its own members wait, and nobody else."""
        uid = connection.peer.uid
        if self._crowds.get(uid, 0) > CROWD:
            async with self._turns.setdefault(uid, trio.Lock()):
                await trio.lowlevel.checkpoint()

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

    # Changing

    def _perform(
        self,
        step: Step,
        *,
        bundle_fd: int = -1,
        pidfds: dict[int, dict[str, int]] | None = None,
        require_store: bool = False,
    ) -> None:
        """Write a step down, then make it true. `bundle_fd` is borrowed; `pidfds` (by generation
        and role; new ones only) are taken over, whatever comes of it. Raises LimitExceeded; then
        nothing has changed."""
        added = pidfds or {}
        known = {
            hold.generation: {
                **self.pidfds.get(hold.generation, {}),
                **added.get(hold.generation, {}),
            }
            for hold in step.put
        }
        wanted = {hold.generation: _roles(hold) for hold in step.put}
        try:
            self.keeper.write(
                step,
                bundle_fd,
                {
                    generation: {role: fd for role, fd in fds.items() if role in wanted[generation]}
                    for generation, fds in known.items()
                },
                require_store=require_store,
            )
        except BaseException:
            for roles in added.values():
                for fd in roles.values():
                    os.close(fd)
            raise
        self._apply(step, known, wanted)

    def _apply(
        self,
        step: Step,
        known: dict[int, dict[str, int]],
        wanted: dict[int, tuple[str, ...]],
    ) -> None:
        """Make a step true, with all that follows from it. Raises nothing."""
        before = {hold.generation: self.registry.get(hold.generation) for hold in step.put}
        self.registry.apply(step, now())
        point("daemon:applied")
        for generation, fds in known.items():
            self._keep_pidfds(generation, fds, wanted[generation])
        for ended in step.ended:
            self._disown(ended.hold)
            self._keep_pidfds(ended.hold.generation, self.pidfds.get(ended.hold.generation, {}), ())
            log.event(
                "ended",
                how=ended.how,
                uid=ended.hold.uid,
                name=ended.hold.name,
                generation=ended.hold.generation,
            )
        self.keeper.let_go(ended.hold for ended in step.ended)
        for hold in step.put:
            old = before[hold.generation]
            if old is None or old.phase != hold.phase:
                log.event(
                    hold.phase,
                    uid=hold.uid,
                    name=hold.name,
                    generation=hold.generation,
                    pid=hold.claimant or hold.saver,
                    fds=hold.fds,
                    attempts=hold.attempts or None,
                    why=hold.reason or (hold.last_reject if hold.phase == HELD else "") or None,
                )
            if old is not None and hold.phase == HELD and old.phase in (CLAIMED, IN_DOUBT):
                self._look_for_damage(hold)
            if old is not None and old.token and old.token != hold.token:
                self._disown(old)
        at = self.registry.next_deadline()
        if at is not None and at < self._sleeps_until:
            self._deadline_moved.set()
        for key in {hold.key for hold in (*step.put, *(ended.hold for ended in step.ended))}:
            self._serve_waiters(key)

    def _observe(self, step: Step) -> None:
        """Perform what has happened anyway (a process ended, a lease is over): where it cannot be
        written down it is true all the same, and found again from the pidfds at the next start."""
        try:
            self._perform(step)
        except (CprdError, OSError) as error:
            log.event("not-written", level=log.ERROR, why=str(error))
            known = {hold.generation: self.pidfds.get(hold.generation, {}) for hold in step.put}
            self._apply(step, known, {hold.generation: _roles(hold) for hold in step.put})

    def _keep_pidfds(self, generation: int, fds: dict[str, int], roles: tuple[str, ...]) -> None:
        """Of the pidfds of a hold keep those of `roles`, watched, and close the rest."""
        old = self.pidfds.pop(generation, {})
        kept: dict[str, int] = {}
        for role in {*fds, *old}:
            fd, former = fds.get(role, -1), old.get(role, -1)
            if former >= 0 and (role not in roles or former != fd):
                self.watch.remove(former)
                os.close(former)
            if role in roles and fd >= 0:
                kept[role] = fd
                if former != fd:
                    self.watch.add(fd, partial(self._process_ended, generation, role))
            elif fd >= 0 and fd != former:
                os.close(fd)
        if kept:
            self.pidfds[generation] = kept

    def _process_ended(self, generation: int, role: str) -> None:
        hold = self.registry.get(generation)
        if hold is None:
            return
        if role == "after_exit":
            self._observe(self.registry.predecessor_gone(now(), generation))
        elif role == "saver":
            self._observe(self.registry.saver_gone(generation))
        elif role == "acting":
            self._observe(self.registry.acting_gone(generation))
        else:
            self._observe(
                self.registry.claimant_gone(now(), generation, hold.token, "its process ended")
            )

    def _look_for_damage(self, hold: Hold) -> None:
        """A claimant that received instead of peeking has destroyed what it was given."""
        if not hold.parked:
            return
        try:
            fd = self.keeper.bundle(hold.generation)
            try:
                inspect.check(fd, hold.parked, seal=False)
            finally:
                os.close(fd)  # the slot has another: never the last one
        except Damaged as error:
            why = f"{error}; pid {hold.last_claimant} had claimed it last"
            self._observe(self.registry.found_damaged(hold.generation, why))
        except (CprdError, OSError):
            pass  # no descriptor to look with now; whoever loads it looks again

    def _end_claims(self, connection: Connection) -> None:
        for generation, token in connection.claims:
            how = "its connection ended"
            self._observe(self.registry.claimant_gone(now(), generation, token, how))
        for generation in connection.prepared:
            self._observe(self.registry.saver_gone(generation))
        connection.claims.clear()
        connection.prepared.clear()

    async def _watch_processes(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self.watch.epoll.fileno())
            self.watch.collect()

    async def _watch_deadlines(self) -> None:
        while True:
            while (step := self.registry.expire(now())) is not None:
                self._observe(step)
            self.registry.forget_old(now())
            at = self.registry.next_deadline()
            start = now()
            # Once a minute at least: the boot clock also counts while the machine sleeps.
            self._sleeps_until = start + 60.0 if at is None else min(at, start + 60.0)
            self._deadline_moved = trio.Event()
            with trio.move_on_after(max(0.0, self._sleeps_until - start)):
                await self._deadline_moved.wait()

    # Verbs: saving

    def _key(self, connection: Connection, name: str) -> Key:
        uid, bare = messages.split_name(name, connection.peer.uid)
        if uid != connection.peer.uid and connection.peer.uid != 0:
            raise Denied(f"uid {connection.peer.uid} may not touch names of uid {uid}; root may")
        return uid, bare

    def _predecessor(
        self, connection: Connection, how: str, fds: array[int], index: int
    ) -> tuple[int, int]:
        """(pid, pidfd) of who must end before a hold is served; (-1, -1) for nobody. The pidfd
        is the caller's: a copy of the connection's, or taken out of `fds`."""
        if how == "no":
            return -1, -1
        if how == "peer":
            if connection.pidfd < 0:
                raise LimitExceeded(
                    "after_exit: cprd cannot see when this process ends (it is in another pid"
                    " namespace, and the kernel has no SO_PEERPIDFD before Linux 6.5)"
                )
            return connection.peer.pid, os.dup(connection.pidfd)
        pid = self._process(fds[index], "after_exit")
        if pid < 0:
            return -1, -1  # it has ended already
        return pid, os.dup(fds[index])

    def _process(self, fd: int, what: str) -> int:
        try:
            return processes.pid_of(fd)
        except ValueError:
            raise InvalidInput(f"{what}: the descriptor that came with it is not a pidfd") from None

    def _offered(self, request: Request, pidfds: int) -> None:
        """Check and seal the bundle that came with a request."""
        message, fds = request
        if len(fds) != 1 + pidfds:
            raise ProtocolError(
                f"{message['verb']}: wants {1 + pidfds} descriptors with it, has {len(fds)}"
            )
        if message["fds"] >= message["parked"] * SCM_MAX_FD ** message["depth"]:
            raise Damaged("not the bundle that the request describes: counts differ")
        inspect.check(fds[0], message["parked"], seal=True)

    async def save(self, connection: Connection, request: Request) -> None:
        """save and prepare."""
        message, fds = request
        prepare = message["verb"] == "prepare"
        key = self._key(connection, message["name"])
        self._require(message["require"])
        self._refresh(key)
        self._offered(request, message["after_exit"] == "pidfd")
        pid, pidfd = self._predecessor(connection, message["after_exit"], fds, 1)
        roles = {"after_exit": pidfd} if pidfd >= 0 else {}
        try:
            if prepare and connection.pidfd >= 0:
                roles["saver"] = os.dup(connection.pidfd)
            step = self.registry.save(
                now(),
                connection.peer,
                key,
                nonce=message["nonce"],
                fds=message["fds"],
                size=message["bytes"],
                parked=message["parked"],
                if_exists=message["if_exists"],
                ttl=message["ttl"],
                after_exit=pid,
                token=messages.nonce() if prepare else b"",
                prepare=prepare,
            )
            if step.put and len(self.registry) - len(step.ended) >= self.max_holds:
                raise LimitExceeded(
                    f"cprd holds {len(self.registry)} states, as many as its RLIMIT_NOFILE allows:"
                    " raise LimitNOFILE= of cprd.service, or drop holds"
                )
        except BaseException:
            _close_roles(roles)
            raise
        if step.remembered:
            _close_roles(roles)
        else:
            generation = step.put[0].generation
            self._perform(
                step,
                bundle_fd=fds[0],
                pidfds={generation: roles},
                require_store=message["require"] == "store",
            )
            _close_parked(fds)
        if prepare:
            connection.prepared.add(step.answer["generation"])
        point("daemon:saved")
        await connection.answer(messages.ok(**step.answer, kept=self.keeper.kept))

    def _require(self, place: str | None) -> None:
        if place == "store" and self.keeper.kept != "store":
            raise LimitExceeded(NOT_STORED)

    async def commit(self, connection: Connection, request: Request) -> None:
        """commit and abort."""
        message = request.message
        key = self._key(connection, message["name"])
        verb = self.registry.commit if message["verb"] == "commit" else self.registry.abort
        step = verb(
            now(),
            connection.peer,
            key,
            message["generation"],
            message["token"],
            message["nonce"],
        )
        if not step.remembered:
            self._perform(step)
        connection.prepared.discard(message["generation"])
        await connection.answer(messages.ok(**step.answer, kept=self.keeper.kept))

    # Verbs: loading

    def _refresh(self, key: Key) -> None:
        """Learn of processes that ended, before the event loop comes to tell."""
        for hold in self.registry.of(key):
            for role, fd in list(self.pidfds.get(hold.generation, {}).items()):
                # What is learned of one role can end another's watch, and its number be used anew.
                mine = self.pidfds.get(hold.generation, {}).get(role) == fd
                if mine and processes.has_ended(fd):
                    self.watch.remove(fd)
                    self._process_ended(hold.generation, role)

    def _claim(self, connection: Connection, message: messages.Message, key: Key) -> Step:
        step = self.registry.load(
            now(),
            connection.peer,
            key,
            token=messages.nonce(),
            nonce=message["nonce"],
            lease=min(message["lease"], self.config.lease),
            generation=message["generation"],
        )
        if not step.remembered:
            hold = step.put[0]
            if hold.attempts > 1:
                before = self.registry.get(hold.generation)
                assert before is not None
                self._look_for_damage(before)
                self.registry.check_load(now(), key)
            roles = {"claimant": os.dup(connection.pidfd)} if connection.pidfd >= 0 else {}
            self._perform(step, pidfds={hold.generation: roles})
        self._own_claim(connection, step.answer["generation"], step.answer["token"])
        return step

    async def load(self, connection: Connection, request: Request) -> None:
        message = request.message
        key = self._key(connection, message["name"])
        self._refresh(key)
        try:
            step = self._claim(connection, message, key)
        except (NotHeld, Busy) as error:
            if not message["wait"] or isinstance(error, Damaged):
                raise
            tell = partial(self._tell_claim, connection)
            waiter = Waiter(partial(self._claim, connection, message, key), tell)
            found = await self._wait(connection, key, waiter, message["wait"])
            if found is None:  # the answer is the one that a load would get now
                self._refresh(key)
                found = self._claim(connection, message, key)
            assert isinstance(found, Step)
            if waiter.told:
                return
            step = found
        generation, token = step.answer["generation"], step.answer["token"]
        point("daemon:claimed")
        hold = self.registry.get(generation)
        if hold is None or hold.token != token:  # it ended between its turn and now
            raise Fenced(f"the claim on {key[1]!r} is over already: it was released or dropped")
        try:
            await self._answer_with_bundle(connection, hold, messages.ok(**self._claimed(step)))
        except BrokenPipeError:
            raise  # the end of the connection says it
        except (CprdError, OSError) as error:
            # The client never learns of this claim, so it would only end with the connection.
            connection.claims.discard((generation, token))
            how = f"cprd could not serve it: {error}"
            self._observe(self.registry.claimant_gone(now(), generation, token, how))
            raise

    def _tell_claim(self, connection: Connection, step: Step | Hold) -> bool:
        """Answer a claim that was waited for, at once. False: its task has to see to it."""
        assert isinstance(step, Step)
        point("daemon:claimed")
        fd = self.keeper.bundle(step.answer["generation"])
        try:
            return connection.answer_now(messages.ok(**self._claimed(step)), (fd,))
        finally:
            os.close(fd)

    def _claimed(self, step: Step) -> dict[str, Any]:
        return {**step.answer, "kept": self.keeper.kept}

    async def _answer_with_bundle(self, connection: Connection, hold: Hold, data: bytes) -> None:
        """An answer that brings a copy of a hold's bundle."""
        fd = self.keeper.bundle(hold.generation)
        if connection.answer_now(data, (fd,)):
            os.close(fd)  # the slot has another: not the last one
            return
        try:
            await connection.answer(data, (fd,))
        finally:  # while the client did not read, the hold may have ended
            self.closer.close(hold.uid, [fd])

    async def _wait(
        self, connection: Connection, key: Key, waiter: Waiter, seconds: float
    ) -> Step | Hold | None:
        """Wait for the waiter's turn: what it took then, or None when the time is over."""
        queue = self._waiters.setdefault(key, deque())
        queue.append(waiter)
        gone = ""
        try:
            waiter.scope.deadline = trio.current_time() + seconds
            with waiter.scope:
                self._serve_waiters(key)
                if not waiter.done:
                    gone = await connection.hung_up()
        finally:
            if waiter in queue:
                queue.remove(waiter)
            if not queue and self._waiters.get(key) is queue:
                del self._waiters[key]
        if gone == "gone" and not waiter.done:
            raise BrokenPipeError("the client has gone")
        if gone == "early":
            raise ProtocolError("a request came before the answer to the one before")
        if isinstance(waiter.result, CprdError):
            raise waiter.result
        return waiter.result

    def _serve_waiters(self, key: Key) -> None:
        """Serve those who wait for a name, in the order in which they came."""
        queue = self._waiters.get(key)
        while queue:
            waiter = queue.popleft()  # taking serves the queue again: it must not meet itself
            try:
                waiter.result = waiter.take()
            except (NotHeld, Busy) as error:
                if not isinstance(error, Damaged):
                    queue.appendleft(waiter)
                    return
                waiter.result = error  # no wait makes it whole again
            except CprdError as error:
                waiter.result = error
            except OSError as error:  # theirs alone, not of whoever made this step
                waiter.result = _no_descriptor(error)
            else:
                with contextlib.suppress(CprdError, OSError):  # its task meets it again
                    waiter.told = waiter.tell is not None and waiter.tell(waiter.result)
            waiter.done = True
            waiter.scope.cancel()

    async def wait(self, connection: Connection, request: Request) -> None:
        """Until a load would get it; nothing is claimed."""
        key = self._key(connection, request.message["name"])
        self._refresh(key)
        look = partial(self._look, key)
        try:
            hold = look()
        except (NotHeld, Busy):
            found = await self._wait(connection, key, Waiter(look), request.message["timeout"])
            if found is None:
                self._refresh(key)
                found = look()
            assert isinstance(found, Hold)
            hold = found
        await connection.answer(messages.ok(generation=hold.generation))

    def _look(self, key: Key) -> Hold:
        return self.registry.check_load(now(), key)

    async def renew(self, connection: Connection, request: Request) -> None:
        message = request.message
        key = self._key(connection, message["name"])
        lease = message["lease"]
        step = self.registry.renew(
            now(),
            key,
            message["generation"],
            message["token"],
            None if lease is None else min(lease, self.config.lease),
        )
        self._perform(step)
        self._adopt_claim(connection, message)
        await connection.answer(messages.ok(**step.answer))

    def _adopt_claim(self, connection: Connection, message: messages.Message) -> None:
        """A claim lives with the connection that last spoke for it (a client that reconnected)."""
        hold = self.registry.get(message["generation"])
        if hold is not None and hold.token == message["token"]:
            self._own_claim(connection, hold.generation, hold.token)

    def _disown(self, hold: Hold) -> None:
        """What a token spoke for is over: no connection's end means anything to it any more."""
        if hold.token:
            for connection in self.connections:
                connection.claims.discard((hold.generation, hold.token))
                connection.prepared.discard(hold.generation)

    def _own_claim(self, connection: Connection, generation: int, token: bytes) -> None:
        """The end of this connection ends the claim from now on, and that of no other."""
        if (generation, token) not in connection.claims:
            for other in self.connections:
                other.claims.discard((generation, token))
            connection.claims.add((generation, token))

    async def begin(self, connection: Connection, request: Request) -> None:
        message, fds = request
        key = self._key(connection, message["name"])
        if len(fds) != int(message["process"]):
            raise ProtocolError("begin: wants a pidfd with process=true, and none without")
        acting = self._process(fds[0], "process") if message["process"] else 0
        if acting < 0:
            raise InvalidInput("begin: the process that is to act has ended")
        step = self.registry.begin(
            now(),
            connection.peer,
            key,
            message["generation"],
            message["token"],
            message["nonce"],
            acting,
        )
        if not step.remembered:
            roles = {"acting": os.dup(fds[0])} if message["process"] else {}
            self._perform(step, pidfds={message["generation"]: roles})
        self._adopt_claim(connection, message)
        await connection.answer(messages.ok(kept=self.keeper.kept))

    async def confirm(self, connection: Connection, request: Request) -> None:
        message = request.message
        key = self._key(connection, message["name"])
        step = self.registry.confirm(
            now(),
            connection.peer,
            key,
            message["generation"],
            message["token"],
            message["nonce"],
        )
        if not step.remembered:
            self._perform(step)
            await self._let_go_first(step.ended[0].hold.uid)
        connection.claims.discard((message["generation"], message["token"]))
        point("daemon:confirmed")
        await connection.answer(messages.ok(kept=self.keeper.kept))

    async def confirm_next(self, connection: Connection, request: Request) -> None:
        message, fds = request
        key = self._key(connection, message["name"])
        self._offered(request, message["after_exit"] == "pidfd")
        pid, pidfd = self._predecessor(connection, message["after_exit"], fds, 1)
        roles = {"after_exit": pidfd} if pidfd >= 0 else {}
        try:
            step = self.registry.confirm_next(
                now(),
                connection.peer,
                key,
                message["generation"],
                message["token"],
                message["nonce"],
                fds=message["fds"],
                size=message["bytes"],
                parked=message["parked"],
                ttl=message["ttl"],
                after_exit=pid,
            )
        except BaseException:
            _close_roles(roles)
            raise
        if step.remembered:
            _close_roles(roles)
        else:
            self._perform(step, bundle_fd=fds[0], pidfds={step.put[0].generation: roles})
            _close_parked(fds)
            await self._let_go_first(step.ended[0].hold.uid)
        connection.claims.discard((message["generation"], message["token"]))
        point("daemon:confirmed")
        await connection.answer(messages.ok(**step.answer, kept=self.keeper.kept))

    async def _let_go_first(self, uid: int) -> None:
        """Wait a moment for what a confirm let go of, before the claimant hears of it and closes
        its own copy: whoever closes last pays for every descriptor, and here that is whoever they
        belong to. Only worth a moment: another of this uid's files may block."""
        done = trio.Event()
        token = trio.lowlevel.current_trio_token()

        def tell() -> None:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(done.set)

        self.closer.run(uid, tell)
        with trio.move_on_after(LET_GO_FIRST):
            await done.wait()

    async def reject(self, connection: Connection, request: Request) -> None:
        message = request.message
        key = self._key(connection, message["name"])
        generation = message["generation"]
        step = self.registry.reject(
            now(),
            connection.peer,
            key,
            generation,
            message["token"],
            message["nonce"],
            message["why"],
        )
        if not step.remembered:
            if message["damaged"]:
                # One step after the other, with nobody served in between.
                self._perform(self.registry.found_damaged(generation, message["why"]))
            else:
                self._perform(step)
        connection.claims.discard((generation, message["token"]))
        await connection.answer(messages.ok(kept=self.keeper.kept))

    # Verbs: by hand, and looking

    async def drop(self, connection: Connection, request: Request) -> None:
        """drop and release."""
        message = request.message
        key = self._key(connection, message["name"])
        self._refresh(key)
        verb = self.registry.drop if message["verb"] == "drop" else self.registry.release
        step = verb(now(), connection.peer, key, force=message["force"], nonce=message["nonce"])
        if not step.remembered:
            self._perform(step)
        await connection.answer(messages.ok(**step.answer, kept=self.keeper.kept))

    def _visible(self, peer: Peer) -> Iterator[Hold]:
        for hold in self.registry:
            if peer.uid in (0, hold.uid):
                yield hold

    async def list(self, connection: Connection, request: Request) -> None:
        """A page of rows by generation, after the one named; `more` says where to go on."""
        self.watch.collect()
        after = request.message["after"] or 0
        rows: list[dict[str, Any]] = []
        size = 0
        more = None
        at = now()
        visible = [hold for hold in self._visible(connection.peer) if hold.generation > after]
        for hold in sorted(visible, key=lambda hold: hold.generation):
            row = hold.row(at)
            size += len(messages.encode(row))
            if size > messages.PAGE and rows:
                more = rows[-1]["generation"]
                break
            rows.append(row)
        await connection.answer(messages.ok(holds=rows, more=more))

    async def show(self, connection: Connection, request: Request) -> None:
        """Everything about one hold, and a copy of its bundle to peek into."""
        key = self._key(connection, request.message["name"])
        self._refresh(key)
        hold = self.registry.top(key)
        row = hold.row(now())
        if hold.generation not in self.keeper.slots or hold.phase == DAMAGED:
            await connection.answer(messages.ok(hold=row))
            return
        await self._answer_with_bundle(connection, hold, messages.ok(hold=row))

    async def status(self, connection: Connection, request: Request) -> None:
        """Of the one that goes on: while cprd is about to become a new version, the answer waits.
        (The unit's last line of a reload asks for it.)"""
        del request
        if self.reloading is not None:
            await self.reloading.wait()
        from cprd import __version__

        peer = connection.peer
        phases: dict[str, int] = {}
        for hold in self._visible(peer):
            phases[hold.phase] = phases.get(hold.phase, 0) + 1
        uids = {
            str(uid): {"holds": usage.holds, "fds": usage.fds}
            for uid, usage in self.registry.usages().items()
            if peer.uid in (0, uid)
        }
        if len(uids) > 200:
            most = sorted(uids, key=lambda uid: -uids[uid]["fds"])[:200]
            uids = {uid: uids[uid] for uid in most}
        await connection.answer(
            messages.ok(
                server=f"cprd {__version__}",
                pid=os.getpid(),
                uptime=now() - self.started,
                kept=self.keeper.kept,
                blind=self.registry.blind or None,
                phases=phases,
                uids=uids,
                connections=len(self.connections),
                refused_accepts=self.refused_accepts,
                closing={
                    str(uid): count
                    for uid, count in self.closer.blocked().items()
                    if peer.uid in (0, uid)
                },
                limits={
                    "holds": self.config.holds,
                    "all_holds": self.max_holds,
                    "fds": self.config.fds,
                    "connections": self.config.connections,
                    "all_connections": self.max_connections,
                    "lease": self.config.lease,
                },
            )
        )


Handler = Callable[[Daemon, Connection, Request], Awaitable[None]]


async def _hello_again(daemon: Daemon, connection: Connection, request: Request) -> None:
    raise ProtocolError("hello was said already")


_VERBS: dict[str, Handler] = {
    "hello": _hello_again,
    "save": Daemon.save,
    "prepare": Daemon.save,
    "commit": Daemon.commit,
    "abort": Daemon.commit,
    "load": Daemon.load,
    "renew": Daemon.renew,
    "begin": Daemon.begin,
    "confirm": Daemon.confirm,
    "confirm_next": Daemon.confirm_next,
    "reject": Daemon.reject,
    "release": Daemon.drop,
    "drop": Daemon.drop,
    "wait": Daemon.wait,
    "list": Daemon.list,
    "show": Daemon.show,
    "status": Daemon.status,
}
assert _VERBS.keys() == messages.REQUESTS.keys()
_WITH_DESCRIPTORS = frozenset(("save", "prepare", "confirm_next", "begin"))
"""All others are refused when descriptors come with them: a waiting load would keep them open."""


def _no_descriptor(error: OSError) -> LimitExceeded:
    return LimitExceeded(
        f"cprd has no descriptor left ({error.strerror}): raise LimitNOFILE= of cprd.service, or"
        " drop holds"
    )


def _roles(hold: Hold) -> tuple[str, ...]:
    """Whose pidfds matter for a hold as it is now."""
    roles: tuple[str, ...] = ("after_exit",) if hold.after_exit >= 0 else ()
    if hold.phase == PREPARED:
        roles += ("saver",)
    if hold.claimant or hold.phase == CLAIMED:  # pid 0: not seen, and watched all the same
        roles += ("claimant",)
    if hold.acting:
        roles += ("acting",)
    return roles


def _close_parked(fds: array[int]) -> None:
    """Close what came with a save: the bundle lies in a slot now and the rest are pidfds, so none
    of these is a last copy that could block."""
    close_all(fds)
    del fds[:]


def _close_roles(roles: dict[str, int]) -> None:
    for fd in roles.values():
        os.close(fd)


def raise_nofile() -> int:
    """The soft limit of descriptors, raised to the hard one where that is allowed: cprd is there
    to have many."""
    try:
        _, hard = nofile.raise_soft_limit()
    except LimitExceeded as error:
        soft, hard = nofile.limits()
        log.event("limit-not-raised", level=log.WARNING, soft=soft, hard=hard, why=str(error))
        return soft
    return hard

"""Verbs of savers and claimants: a request in, a step of the life cycle, an answer out."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

from cprd.bundle import inspect
from cprd.daemon.clock import now
from cprd.daemon.connection import Connection, Request
from cprd.daemon.storage.shelves import NOT_STORED
from cprd.daemon.waiters import Waiter
from cprd.errors import (
    Busy,
    CprdError,
    Damaged,
    Fenced,
    InvalidInput,
    LimitExceeded,
    NotHeld,
    ProtocolError,
)
from cprd.linux import processes
from cprd.linux.pause import point
from cprd.linux.rights import SCM_MAX_FD, close_all
from cprd.protocol import messages, replies
from cprd.protocol.lifecycle import Hold
from cprd.protocol.names import Key, key_for
from cprd.protocol.registry import Caller, Offer, Step, Ticket

if TYPE_CHECKING:
    from cprd.daemon.server import Server

    Handler = Callable[[Server, Connection, Request], Awaitable[None]]


def key_of(connection: Connection, message: messages.Message) -> Key:
    return key_for(message["name"], connection.peer.uid)


def ticket_of(connection: Connection, message: messages.Message) -> Ticket:
    return Ticket(key_of(connection, message), message["generation"], message["token"])


def caller_of(connection: Connection, message: messages.Message, *identity: int) -> Caller:
    """Who asks. `identity`: what cprd sees of a request beyond the fields."""
    uid, pid = connection.peer
    nonce = message.get("nonce", b"")
    digest = replies.digest(message, *identity) if nonce else b""
    return Caller(uid, pid, now(), nonce, digest, message["verb"])


# Saving


class Offered:
    """A bundle and perhaps a pidfd that came with a request. Owns `roles`."""

    def __init__(self, connection: Connection, request: Request) -> None:
        """Check and seal the bundle. Raises ProtocolError, Damaged, InvalidInput, LimitExceeded."""
        message, self.fds = request
        wanted = 2 if message["after_exit"] == "pidfd" else 1
        if len(self.fds) != wanted:
            raise ProtocolError(
                f"{message['verb']}: wants {wanted} descriptors with it, has {len(self.fds)}"
            )
        if message["fds"] >= message["parked"] * SCM_MAX_FD ** message["depth"]:
            raise Damaged("not the bundle that the request describes: counts differ")
        inspect.check(self.fds[0], message["parked"], seal=True)
        self.caller = caller_of(connection, message, os.fstat(self.fds[0]).st_ino)
        self.roles: dict[str, int] = {}
        pid = self._predecessor(connection, message["after_exit"])
        self.offer = Offer(message["fds"], message["bytes"], message["parked"], message["ttl"], pid)

    def _predecessor(self, connection: Connection, how: str) -> int:
        """The pid that must end before a load, with a pidfd in `roles`; -1: none."""
        if how == "no":
            return -1
        if how == "peer":
            if connection.pidfd < 0:
                raise LimitExceeded(
                    "after_exit: cprd cannot see when this process ends (it is in another pid"
                    " namespace, and the kernel has no SO_PEERPIDFD before Linux 6.5)"
                )
            pid, fd = connection.peer.pid, connection.pidfd
        else:
            pid, fd = _pid_of(self.fds[1], "after_exit"), self.fds[1]
        if pid >= 0:
            self.roles["after_exit"] = os.dup(fd)
        return pid

    def perform(self, server: Server, step: Step, *, require_store: bool = False) -> None:
        """Perform the step that holds the bundle, unless the step answers a repetition."""
        roles, self.roles = self.roles, {}
        if not step.changes:
            close_all(roles.values())
            return
        server.steps.perform(
            step,
            bundle_fd=self.fds[0],
            pidfds={step.put[0].generation: roles},
            require_store=require_store,
        )
        # The slot has the bundle now, and the rest are pidfds: no last copy that could block.
        close_all(self.fds)
        del self.fds[:]

    def close(self) -> None:
        close_all(self.roles.values())


def _pid_of(fd: int, field: str) -> int:
    try:
        return processes.pid_of(fd)
    except ValueError:
        why = f"{field}: the descriptor that came with it is not a pidfd"
        raise InvalidInput(why) from None


async def save(server: Server, connection: Connection, request: Request) -> None:
    """save and prepare."""
    message = request.message
    prepare = message["verb"] == "prepare"
    key = key_of(connection, message)
    needs_store = message["require"] == "store"
    if needs_store and server.keeper.kept != "store":
        raise LimitExceeded(NOT_STORED)
    server.steps.refresh(key)
    offered = Offered(connection, request)
    try:
        if prepare and connection.pidfd >= 0:
            offered.roles["saver"] = os.dup(connection.pidfd)
        step = server.registry.save(
            offered.caller,
            key,
            offered.offer,
            replacing=message["if_exists"] == "replace",
            token=messages.nonce() if prepare else b"",
        )
        server.check_room(step)
        offered.perform(server, step, require_store=needs_store)
    finally:
        offered.close()
    if prepare:
        connection.prepared.add(step.answer["generation"])
    point("daemon:saved")
    await connection.answer(messages.ok(**step.answer, kept=server.keeper.kept))


async def commit(server: Server, connection: Connection, request: Request) -> None:
    """commit and abort."""
    message = request.message
    verb = server.registry.commit if message["verb"] == "commit" else server.registry.abort
    step = verb(caller_of(connection, message), ticket_of(connection, message))
    if step.changes:
        server.steps.perform(step)
    connection.prepared.discard(message["generation"])
    await connection.answer(messages.ok(**step.answer, kept=server.keeper.kept))


# Loading


def _claim(server: Server, connection: Connection, message: messages.Message, key: Key) -> Step:
    caller = caller_of(connection, message, connection.peer.pid)
    step = server.registry.load(
        caller,
        key,
        token=messages.nonce(),
        lease=min(message["lease"], server.config.lease),
        generation=message["generation"],
    )
    if step.changes:
        hold = step.put[0]
        if hold.attempts > 1:
            before = server.registry.get(hold.generation)
            assert before is not None
            server.steps.look_for_damage(before)
            server.registry.check_load(caller.now, key)
        roles = {"claimant": os.dup(connection.pidfd)} if connection.pidfd >= 0 else {}
        server.steps.perform(step, pidfds={hold.generation: roles})
    server.steps.own_claim(connection, step.answer["generation"], step.answer["token"])
    return step


async def load(server: Server, connection: Connection, request: Request) -> None:
    message = request.message
    key = key_of(connection, message)
    server.steps.refresh(key)
    claim = partial(_claim, server, connection, message, key)
    try:
        step = claim()
    except (NotHeld, Busy) as error:
        if not message["wait"] or isinstance(error, Damaged):
            raise
        waiter = Waiter(claim, partial(_tell_claim, server, connection))
        found = await server.steps.waiters.wait(connection, key, waiter, message["wait"])
        if waiter.told:
            return
        if found is None:  # the answer is the answer that a load gets now
            server.steps.refresh(key)
            found = claim()
        step = found
    generation, token = step.answer["generation"], step.answer["token"]
    point("daemon:claimed")
    hold = server.registry.get(generation)
    if hold is None or hold.token != token:  # the claim ended since its turn
        raise Fenced(f"the claim on {key[1]!r} is over already: it was released or dropped")
    try:
        await answer_with_bundle(server, connection, hold, _claimed(server, step))
    except BrokenPipeError:
        raise  # the end of the connection ends the claim
    except (CprdError, OSError) as error:
        # The client never learns of this claim.
        connection.claims.discard((generation, token))
        how = f"cprd could not serve it: {error}"
        server.steps.observe(server.registry.claimant_gone(now(), generation, token, how))
        raise


def _tell_claim(server: Server, connection: Connection, step: Step) -> bool:
    """Answer a claim that was waited for, at once. False: the task of the load has to answer."""
    point("daemon:claimed")
    fd = server.keeper.bundle(step.answer["generation"])
    try:
        return connection.answer_now(_claimed(server, step), (fd,))
    finally:
        os.close(fd)


def _claimed(server: Server, step: Step) -> messages.Message:
    return messages.ok(**step.answer, kept=server.keeper.kept)


async def answer_with_bundle(
    server: Server, connection: Connection, hold: Hold, message: messages.Message
) -> None:
    """Answer, with a copy of the bundle."""
    fd = server.keeper.bundle(hold.generation)
    if connection.answer_now(message, (fd,)):
        os.close(fd)  # the slot has another: not the last one
        return
    try:
        await connection.answer(message, (fd,))
    finally:  # while the client did not read, the hold may have ended
        server.closer.close(hold.uid, [fd])


async def wait(server: Server, connection: Connection, request: Request) -> None:
    """Wait until a load gets the hold; nothing is claimed."""
    key = key_of(connection, request.message)
    server.steps.refresh(key)

    def look() -> Hold:
        return server.registry.check_load(now(), key)

    try:
        hold = look()
    except (NotHeld, Busy):
        timeout = request.message["timeout"]
        found = await server.steps.waiters.wait(connection, key, Waiter(look), timeout)
        if found is None:
            server.steps.refresh(key)
            found = look()
        hold = found
    await connection.answer(messages.ok(generation=hold.generation))


# With a claim


def _adopt_claim(server: Server, connection: Connection, message: messages.Message) -> None:
    """A claim hangs on the connection that last spoke for the claim."""
    hold = server.registry.get(message["generation"])
    if hold is not None and hold.token == message["token"]:
        server.steps.own_claim(connection, hold.generation, hold.token)


async def renew(server: Server, connection: Connection, request: Request) -> None:
    message = request.message
    lease = message["lease"]
    step = server.registry.renew(
        caller_of(connection, message),
        ticket_of(connection, message),
        None if lease is None else min(lease, server.config.lease),
    )
    if step.changes:
        server.steps.perform(step)
    _adopt_claim(server, connection, message)
    await connection.answer(messages.ok(**step.answer))


async def begin(server: Server, connection: Connection, request: Request) -> None:
    message, fds = request
    if len(fds) != int(message["process"]):
        raise ProtocolError("begin: wants a pidfd with process=true, and none without")
    acting = _pid_of(fds[0], "process") if fds else 0
    if acting < 0:
        raise InvalidInput("begin: the process that is to act has ended")
    ticket = ticket_of(connection, message)
    step = server.registry.begin(caller_of(connection, message), ticket, acting)
    server.check_room(step)
    if step.changes:
        roles = {"acting": os.dup(fds[0])} if fds else {}
        server.steps.perform(step, pidfds={ticket.generation: roles})
    _adopt_claim(server, connection, message)
    await connection.answer(messages.ok(kept=server.keeper.kept))


async def confirm(server: Server, connection: Connection, request: Request) -> None:
    message = request.message
    ticket = ticket_of(connection, message)
    step = server.registry.confirm(caller_of(connection, message), ticket)
    if step.changes:
        server.steps.perform(step)
    await _confirmed(server, connection, ticket, step)


async def confirm_next(server: Server, connection: Connection, request: Request) -> None:
    ticket = ticket_of(connection, request.message)
    offered = Offered(connection, request)
    try:
        step = server.registry.confirm_next(offered.caller, ticket, offered.offer)
        offered.perform(server, step)
    finally:
        offered.close()
    await _confirmed(server, connection, ticket, step)


async def _confirmed(server: Server, connection: Connection, ticket: Ticket, step: Step) -> None:
    connection.claims.discard((ticket.generation, ticket.token))
    point("daemon:confirmed")
    await connection.answer(messages.ok(**step.answer, kept=server.keeper.kept))


async def reject(server: Server, connection: Connection, request: Request) -> None:
    message = request.message
    ticket = ticket_of(connection, message)
    caller = caller_of(connection, message)
    step = server.registry.reject(caller, ticket, message["why"], damaged=message["damaged"])
    if step.changes:
        server.steps.perform(step)
    connection.claims.discard((ticket.generation, ticket.token))
    await connection.answer(messages.ok(kept=server.keeper.kept))


HANDLERS: dict[str, Handler] = {
    "save": save,
    "prepare": save,
    "commit": commit,
    "abort": commit,
    "load": load,
    "wait": wait,
    "renew": renew,
    "begin": begin,
    "confirm": confirm,
    "confirm_next": confirm_next,
    "reject": reject,
}

"""Verbs of savers and claimants: a request in, a step of the life cycle, an answer out."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

from cprd.bundle import inspect
from cprd.daemon.clock import now
from cprd.daemon.connection import Connection
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
)
from cprd.linux import processes
from cprd.linux.pause import point
from cprd.linux.rights import SCM_MAX_FD, close_all
from cprd.protocol import living, messages, replies
from cprd.protocol.lifecycle import Hold
from cprd.protocol.names import Key, key_for
from cprd.protocol.registry import Caller, Offer, Registry, Step, Ticket

if TYPE_CHECKING:
    from cprd.daemon.server import Server
    from cprd.protocol.messages import Message

    Handler = Callable[[Server, Connection, Message], Awaitable[None]]


def key_of(connection: Connection, message: Message) -> Key:
    return key_for(message["name"], connection.peer.uid)


def ticket_of(connection: Connection, message: Message) -> Ticket:
    return Ticket(key_of(connection, message), message["generation"], message["token"])


def caller_of(connection: Connection, message: Message, *identity: int) -> Caller:
    """Who asks. `identity`: what cprd sees of a request beyond the fields."""
    uid, pid = connection.peer
    nonce = message.get("nonce", b"")
    digest = replies.digest(message, *identity) if nonce else b""
    return Caller(uid, pid, now(), nonce, digest, message["verb"])


# Saving


class Offered:
    """The bundle that a request speaks of, and perhaps a pidfd. Owns `bundle` and `roles`."""

    def __init__(self, connection: Connection, message: Message, *, live: bool = False) -> None:
        """Take, seal and check the bundle; `live`: the root of a live hold, whose owner the peer
        is. Raises ProtocolError, Damaged, InvalidInput, LimitExceeded."""
        self.connection = connection
        self.roles: dict[str, int] = {}
        if live:
            check_owner(connection)
        self.bundle = connection.take_queue()
        try:
            # The same request comes from the same process, in a queue of its own.
            self.caller = caller_of(connection, message, connection.peer.pid)
            self.offer = self._root(message) if live else self._state(message)
        except BaseException:
            self.close()
            raise

    def _root(self, message: Message) -> Offer:
        parked = inspect.check(self.bundle, 1)
        self.roles["owner"] = os.dup(self.connection.pidfd)
        return Offer(0, 0, parked, message.get("ttl"), live=True)

    def _state(self, message: Message) -> Offer:
        parked = self._check(message)
        pid = self._predecessor(message)
        return Offer(message["fds"], message["bytes"], parked, message["ttl"], pid)

    def _check(self, message: Message) -> int:
        """How many descriptors are parked in the root. Raises Damaged."""
        parked = inspect.check(self.bundle, message["parked"])
        most = parked * SCM_MAX_FD ** message["depth"] - 1  # one is the manifest
        if message["fds"] > most:
            raise Damaged(
                f"not the bundle that the request describes: fds says {message['fds']}, and a"
                f" root of depth {message['depth']} with {parked} descriptors has at most"
                f" {most} below"
            )
        return parked

    def _predecessor(self, message: Message) -> int:
        """The pid that must end before a load, with a pidfd in `roles`; -1: none."""
        how, connection = message["after_exit"], self.connection
        if how == "no":
            return -1
        if how == "peer":
            if connection.pidfd < 0:
                raise LimitExceeded(
                    "after_exit: cprd cannot see when this process ends (it is in another pid"
                    " namespace, and the kernel has no SO_PEERPIDFD before Linux 6.5)"
                )
            self.roles["after_exit"] = os.dup(connection.pidfd)
            return connection.peer.pid
        fd = _open_process(connection, message, "after_exit")
        if fd < 0:
            return -1
        self.roles["after_exit"] = fd
        pid: int = message["pid"]
        return pid

    def perform(self, server: Server, step: Step, *, require_store: bool = False) -> None:
        """Perform the step that holds the bundle, unless the step answers a repetition."""
        if not step.changes:
            return
        roles, self.roles = self.roles, {}
        server.steps.perform(
            step,
            bundle_fd=self.bundle,
            pidfds={step.put[0].generation: roles},
            require_store=require_store,
        )
        os.close(self.bundle)  # the shelf has another: not the last one
        self.bundle = -1

    def close(self) -> None:
        close_all(self.roles.values())
        if self.bundle >= 0:
            self.connection.let_go(self.bundle)


def check_owner(connection: Connection) -> None:
    """Raises LimitExceeded where the peer cannot own a live hold."""
    if connection.pidfd < 0:
        raise LimitExceeded(
            "a live hold: cprd cannot see when this process ends (it is in another pid namespace,"
            " and the kernel has no SO_PEERPIDFD before Linux 6.5)"
        )


def _open_process(connection: Connection, message: Message, field: str) -> int:
    """A pidfd of the process that a request names, owned by the caller; -1 when it has ended.
    Raises InvalidInput, LimitExceeded."""
    pid = message["pid"]
    if not pid:
        raise InvalidInput(f"{field}: a process is named by pid and inode of its pidfd")
    if not connection.peer.pid:
        raise LimitExceeded(
            f"{field}: cprd lives in another pid namespace than this process, and cannot tell what"
            f" pid {pid} means: let that process connect by itself"
        )
    return processes.open_identity(pid, message["inode"])


def said(answer: Message) -> Message:
    """An answer without the tokens that are none."""
    return {field: value for field, value in answer.items() if value != b""}


async def queue(server: Server, connection: Connection, message: Message) -> None:
    """Hand out the sending end of a new queue, for the next save."""
    del server, message
    await _hand_out(connection, messages.ok(), connection.queue())


async def _hand_out(connection: Connection, answer: Message, inlet: int) -> None:
    """Answer with the sending end of a queue, owned from now on."""
    try:
        await connection.answer(answer, (inlet,))
    finally:
        os.close(inlet)


async def _answer_saved(connection: Connection, message: Message, answer: Message) -> None:
    """Answer, with the queue for the next save where that was asked for."""
    inlet = connection.next_queue() if message["queue"] else None
    if inlet is None:
        await connection.answer(answer)
    else:
        await _hand_out(connection, answer, inlet)


async def save(server: Server, connection: Connection, message: Message) -> None:
    """save and prepare."""
    prepare = message["verb"] == "prepare"
    key = key_of(connection, message)
    needs_store = message["require"] == "store"
    if needs_store and server.keeper.kept != "store":
        raise LimitExceeded(NOT_STORED)
    server.steps.refresh(key)
    offered = Offered(connection, message)
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
    answer = messages.ok(**said(step.answer), kept=server.keeper.kept)
    await _answer_saved(connection, message, answer)


async def commit(server: Server, connection: Connection, message: Message) -> None:
    """commit and abort."""
    verb = server.registry.commit if message["verb"] == "commit" else server.registry.abort
    step = verb(caller_of(connection, message), ticket_of(connection, message))
    server.steps.perform(step)
    connection.prepared.discard(message["generation"])
    await connection.answer(messages.ok(**step.answer, kept=server.keeper.kept))


# Loading


def _claim(
    server: Server, connection: Connection, message: Message, key: Key, caller: Caller
) -> Step:
    step = server.registry.load(
        caller,
        key,
        token=messages.nonce(),
        lease=min(message["lease"], server.config.lease),
        generation=message["generation"],
    )
    return claim(server, connection, caller, key, step)


def claim(
    server: Server,
    connection: Connection,
    caller: Caller,
    key: Key,
    step: Step,
    *,
    taken_over: bool = False,
) -> Step:
    """Perform the step of a claim, once the bundle was found whole."""
    if step.changes:
        hold = step.put[0]
        if hold.attempts > 1:
            before = server.registry.get(hold.generation)
            assert before is not None
            server.steps.look_for_damage(before)
            server.registry.check_load(caller.now, key)
        roles = {"claimant": os.dup(connection.pidfd)} if connection.pidfd >= 0 else {}
        server.steps.perform(step, pidfds={hold.generation: roles}, taken_over=taken_over)
    server.steps.own_claim(connection, step.answer["generation"], step.answer["token"])
    claimed = server.registry.get(step.answer["generation"])
    if claimed is not None and claimed.live:
        step.answer["last_end"] = server.steps.last_end(claimed)
    return step


async def load(server: Server, connection: Connection, message: Message) -> None:
    key = key_of(connection, message)
    await wait_for_turn(
        server, connection, message, partial(_claim, server, connection, message, key)
    )


async def wait_for_turn(
    server: Server,
    connection: Connection,
    message: Message,
    claim_as: Callable[[Caller], Step],
) -> None:
    """Claim, now or when it is this request's turn, and answer with the bundle."""
    key = key_of(connection, message)
    caller = caller_of(connection, message, connection.peer.pid)
    server.steps.refresh(key)
    server.steps.look_for_exec(key, connection, caller)

    def take() -> Step:
        return claim_as(caller._replace(now=now()))

    try:
        step = take()
    except (NotHeld, Busy) as error:
        if not message["wait"] or isinstance(error, Damaged):
            raise
        waiter = Waiter(take, partial(_tell_claim, server, connection))
        found = await server.steps.waiters.wait(connection, key, waiter, message["wait"])
        if waiter.told:
            return
        if found is None:  # the answer is the answer that a load gets now
            server.steps.refresh(key)
            found = take()
        step = found
    if not step.answer.get("found", True):
        await connection.answer(_claimed(server, step))
        return
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
    if not step.answer.get("found", True):
        return connection.answer_now(_claimed(server, step))
    point("daemon:claimed")
    bundle = server.keeper.bundle(step.answer["generation"])
    return connection.answer_now(_claimed(server, step), (bundle,))


def _claimed(server: Server, step: Step) -> Message:
    return messages.ok(**step.answer, kept=server.keeper.kept)


async def answer_with_bundle(
    server: Server, connection: Connection, hold: Hold, message: Message
) -> None:
    """Answer, with a copy of the bundle."""
    bundle = server.keeper.bundle(hold.generation)
    if connection.answer_now(message, (bundle,)):
        return
    fd = os.dup(bundle)
    try:
        await connection.answer(message, (fd,))
    finally:  # while the client did not read, the hold may have ended
        server.releasing.close(hold.uid, [fd])


async def wait(server: Server, connection: Connection, message: Message) -> None:
    """Wait until a load gets the hold; nothing is claimed."""
    key = key_of(connection, message)
    server.steps.refresh(key)

    def look() -> Hold:
        return server.registry.check_load(now(), key)

    try:
        hold = look()
    except (NotHeld, Busy):
        timeout = message["timeout"]
        found = await server.steps.waiters.wait(connection, key, Waiter(look), timeout)
        if found is None:
            server.steps.refresh(key)
            found = look()
        hold = found
    await connection.answer(messages.ok(generation=hold.generation))


# With a claim


def _adopt_claim(server: Server, connection: Connection, message: Message) -> None:
    """A claim hangs on the connection that last spoke for the claim."""
    hold = server.registry.get(message["generation"])
    if hold is not None and hold.token == message["token"]:
        server.steps.own_claim(connection, hold.generation, hold.token)


async def renew(server: Server, connection: Connection, message: Message) -> None:
    lease = message["lease"]
    step = server.registry.renew(
        caller_of(connection, message),
        ticket_of(connection, message),
        None if lease is None else min(lease, server.config.lease),
    )
    server.steps.perform(step)
    _adopt_claim(server, connection, message)
    await connection.answer(messages.ok(**step.answer))


async def begin(server: Server, connection: Connection, message: Message) -> None:
    acting = message["pid"]
    roles: dict[str, int] = {}
    if acting:
        roles["acting"] = _open_process(connection, message, "begin")
        if roles["acting"] < 0:
            raise InvalidInput("begin: the process that is to act has ended")
    ticket = ticket_of(connection, message)
    try:
        step = server.registry.begin(caller_of(connection, message), ticket, acting)
        server.check_room(step)
        if step.changes:
            added, roles = roles, {}
            server.steps.perform(step, pidfds={ticket.generation: added})
    finally:
        close_all(roles.values())
    _adopt_claim(server, connection, message)
    await connection.answer(messages.ok(kept=server.keeper.kept))


async def ended(server: Server, connection: Connection, message: Message) -> None:
    """A client whose kernel has no inodes for processes saw the process of its after_exit or begin
    end, and cprd may watch another, of the same pid."""
    key = key_of(connection, message)
    hold = server.registry.get(message["generation"])
    if hold is not None and hold.key == key:
        server.steps.process_ended(hold, message["pid"])
    await connection.answer(messages.ok())


async def confirm(server: Server, connection: Connection, message: Message) -> None:
    ticket = ticket_of(connection, message)
    step = server.registry.confirm(caller_of(connection, message), ticket)
    server.steps.perform(step)
    _confirmed(connection, ticket)
    await connection.answer(messages.ok(**step.answer, kept=server.keeper.kept))


async def confirm_next(server: Server, connection: Connection, message: Message) -> None:
    ticket = ticket_of(connection, message)
    offered = Offered(connection, message, live=message["live"])
    try:
        confirm = living.confirm_next if offered.offer.live else Registry.confirm_next
        step = confirm(server.registry, offered.caller, ticket, offered.offer)
        offered.perform(server, step)
    finally:
        offered.close()
    if step.answer["token"]:
        server.steps.own_claim(connection, step.answer["generation"], step.answer["token"])
    _confirmed(connection, ticket)
    answer = messages.ok(**said(step.answer), kept=server.keeper.kept)
    await _answer_saved(connection, message, answer)


def _confirmed(connection: Connection, ticket: Ticket) -> None:
    connection.claims.discard((ticket.generation, ticket.token))
    point("daemon:confirmed")


async def reject(server: Server, connection: Connection, message: Message) -> None:
    ticket = ticket_of(connection, message)
    caller = caller_of(connection, message)
    step = server.registry.reject(
        caller,
        ticket,
        message["why"],
        damaged=message["damaged"],
        attempt=message["attempt"],
    )
    server.steps.perform(step)
    connection.claims.discard((ticket.generation, ticket.token))
    await connection.answer(messages.ok(kept=server.keeper.kept))


HANDLERS: dict[str, Handler] = {
    "queue": queue,
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
    "ended": ended,
}

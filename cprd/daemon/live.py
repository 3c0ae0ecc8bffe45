"""Verbs of owners of live holds. For cprd the bundle is a queue with a single descriptor: the root.

The root, and all that is kept below, is the client's. cprd reads nothing of it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from cprd.daemon.connection import Connection
from cprd.daemon.handlers import (
    Offered,
    caller_of,
    check_owner,
    claim,
    key_of,
    ticket_of,
    wait_for_turn,
)
from cprd.linux.pause import point
from cprd.protocol import living, messages
from cprd.protocol.names import Key
from cprd.protocol.registry import Caller, Offer, Step

if TYPE_CHECKING:
    from cprd.daemon.handlers import Handler
    from cprd.daemon.server import Server
    from cprd.protocol.messages import Message


async def live(server: Server, connection: Connection, message: Message) -> None:
    """Begin a live hold, where no record bears the name; otherwise a load."""
    key = key_of(connection, message)
    check_owner(connection)
    take = partial(_begin_or_load, server, connection, message, key)
    await wait_for_turn(server, connection, message, take)


def _begin_or_load(
    server: Server, connection: Connection, message: Message, key: Key, caller: Caller
) -> Step:
    offer = Offer(0, 0, 1, message["ttl"], live=True)
    step = living.begin_or_load(
        server.registry,
        caller,
        key,
        offer,
        token=messages.nonce(),
        lease=min(message["lease"], server.config.lease),
    )
    if step.answer["found"]:
        return claim(server, connection, caller, key, step, taken_over=True)
    if step.changes:
        server.check_room(step)
        offered = Offered(connection, message, live=True)
        try:
            offered.perform(server, step)
        finally:
            offered.close()
    server.steps.own_claim(connection, step.answer["generation"], step.answer["token"])
    point("daemon:live")
    return step


async def put_back(server: Server, connection: Connection, message: Message) -> None:
    """The owner brings the root again, which ended with a cprd that held in memory only."""
    offered = Offered(connection, message, live=True)
    try:
        step = living.put_back(
            server.registry, offered.caller, ticket_of(connection, message), offered.offer
        )
        server.check_room(step)
        offered.perform(server, step)
    finally:
        offered.close()
    server.steps.own_claim(connection, step.answer["generation"], step.answer["token"])
    point("daemon:put-back")
    await connection.answer(messages.ok(**step.answer, kept=server.keeper.kept))


async def end(server: Server, connection: Connection, message: Message) -> None:
    """The owner owns no more: the hold is gone, or for the next owner."""
    ticket = ticket_of(connection, message)
    caller = caller_of(connection, message)
    step = living.end(server.registry, caller, ticket, keep=message["keep"])
    server.steps.perform(step)
    connection.claims.discard((ticket.generation, ticket.token))
    await connection.answer(messages.ok(kept=server.keeper.kept))


HANDLERS: dict[str, Handler] = {
    "live": live,
    "put_back": put_back,
    "end": end,
}

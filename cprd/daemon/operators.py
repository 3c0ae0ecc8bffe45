"""Verbs of operators: drop and release by hand, and looking."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import trio

from cprd.daemon import log
from cprd.daemon.clock import now
from cprd.daemon.connection import Connection
from cprd.daemon.handlers import answer_with_bundle, caller_of, key_of
from cprd.errors import LimitExceeded
from cprd.linux.pause import point
from cprd.protocol import messages
from cprd.protocol.lifecycle import LIVE, Hold
from cprd.protocol.messages import pid_text
from cprd.protocol.registry import Step

if TYPE_CHECKING:
    from typing import Any

    from cprd.daemon.handlers import Handler
    from cprd.daemon.server import Server
    from cprd.protocol.messages import Message

FENCED = 10.0  # s that a releaser may take to fence an owner
MOST_UIDS = 200  # in one answer to status


def _owned(step: Step) -> Hold | None:
    """The hold that a step takes from a living owner."""
    return next((ended.hold for ended in step.ended if ended.hold.phase == LIVE), None)


async def _fence(server: Server, connection: Connection, hold: Hold) -> None:
    """Let the owner of a live hold change nothing any more. Raises LimitExceeded where that cannot
    be done in time, for files of the uid block when they are closed."""
    bundle = os.dup(server.keeper.bundle(hold.generation))  # of a hold that may end soon
    await connection.apart()
    point("daemon:fence")
    with trio.move_on_after(FENCED) as waiting:
        await server.releasing.fence(hold.uid, bundle)
    if waiting.cancelled_caught:
        raise LimitExceeded(
            f"{hold.name!r} cannot be taken from its owner, {pid_text(hold.saver)}, now: files of"
            f" uid {hold.uid} block when they are closed; make them answer, or end the owner. Once"
            " they answer, the owner is fenced; drop the hold again then"
        )
    log.event("fenced", uid=hold.uid, name=hold.name, generation=hold.generation, pid=hold.saver)
    point("daemon:fenced")


async def drop(server: Server, connection: Connection, message: Message) -> None:
    """drop and release."""
    key = key_of(connection, message)
    server.steps.refresh(key)
    verb = server.registry.drop if message["verb"] == "drop" else server.registry.release
    caller = caller_of(connection, message)
    step = verb(caller, key, force=message["force"])
    fenced: Hold | None = None
    while (owned := _owned(step)) is not None and owned != fenced:
        await _fence(server, connection, owned)
        fenced = owned
        step = verb(caller, key, force=message["force"])  # what is true by now
    server.steps.perform(step)
    await connection.answer(messages.ok(**step.answer, kept=server.keeper.kept))


async def list_holds(server: Server, connection: Connection, message: Message) -> None:
    """A page of rows by generation, after generation `after`; `more` says where to go on."""
    while not server.steps.pidfds.collect():
        await connection.apart()
        await trio.lowlevel.checkpoint()
    after = message["after"]
    rows: list[Message] = []
    size = 0
    more = None
    at = now()
    for hold in server.registry.visible(connection.peer.uid, after):
        row = messages.without_none(hold.row(at))
        size += len(messages.encode(row))
        if size > messages.PAGE and rows:
            more = rows[-1]["generation"]
            break
        rows.append(row)
    await connection.answer(messages.ok(holds=rows, more=more))


async def show(server: Server, connection: Connection, message: Message) -> None:
    """The row of one hold, and a copy of the bundle to peek into."""
    key = key_of(connection, message)
    server.steps.refresh(key)
    hold = server.registry.top(key)
    answer = messages.ok(hold=messages.without_none(hold.row(now())))
    if hold.generation not in server.keeper.places:
        await connection.answer(answer)
        return
    await answer_with_bundle(server, connection, hold, answer)


async def status(server: Server, connection: Connection, message: Message) -> None:
    """Facts about this daemon. While a new version starts, the answer waits for that version.

    (The last line of the unit's reload asks.)"""
    del message
    reloading = server.reloading
    if reloading is not None:
        await connection.apart()
        await reloading.wait()
    uid = connection.peer.uid
    await connection.answer(
        messages.ok(
            server=server.version,
            pid=os.getpid(),
            uptime=now() - server.started,
            kept=server.keeper.kept,
            blind=server.registry.hidden or None,
            phases=dict(server.registry.phases(uid)),
            uids=_usages(server, uid),
            # How much others do is nobody's business but root's.
            connections=server.turns.connections[uid] if uid else len(server.connections),
            refused_accepts=0 if uid else server.refused_accepts,
            closing={
                str(other): count
                for other, count in server.releasing.blocked().items()
                if uid in (0, other)
            },
            limits=server.limits,
        )
    )


def _usages(server: Server, uid: int) -> dict[str, Any]:
    """Holds and descriptors of each uid that `uid` may see, most descriptors first."""
    uids = {
        str(other): {"holds": usage.holds, "fds": usage.fds}
        for other, usage in server.registry.usages().items()
        if uid in (0, other)
    }
    most = sorted(uids, key=lambda other: -uids[other]["fds"])[:MOST_UIDS]
    return {other: uids[other] for other in most}


HANDLERS: dict[str, Handler] = {
    "release": drop,
    "drop": drop,
    "list": list_holds,
    "show": show,
    "status": status,
}

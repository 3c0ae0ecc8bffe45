"""The verbs of a live hold: each returns a step, and changes nothing. No I/O, no clock.

A live hold has an owner, a process that runs and changes what is kept. The owner is watched by
pidfd; the token is for the requests of the owner.
"""

from __future__ import annotations

import hashlib

from cprd.errors import Fenced
from cprd.protocol.lifecycle import (
    GONE_TOO_OFTEN,
    LIVE,
    MOST_DEATHS,
    NEXT_AWAY,
    NOT_PUT_BACK,
    OWNER_GONE,
    SOON,
    Hold,
    changed,
)
from cprd.protocol.messages import pid_text
from cprd.protocol.names import Key
from cprd.protocol.registry import Caller, Offer, Registry, Step, Ticket, end_of, remembering


def begin_or_load(
    registry: Registry, caller: Caller, key: Key, offer: Offer, *, token: bytes, lease: float
) -> Step:
    """`live`: a live hold that begins, where no record bears the name; else a load. Raises as
    `Registry.load` does, but never NotHeld; LimitExceeded; Fenced for a repeated request whose
    hold has ended."""
    first = registry.recall(caller, key)
    if first is not None and "found" in first.answer:
        mine = registry.get(first.answer["generation"])
        if mine is None or mine.phase != LIVE or mine.token != first.answer["token"]:
            raise Fenced(f"the live hold {key[1]!r} that began with this request has ended since")
        return Step(answer=first.answer)
    if registry.of(key):
        step = registry.load(caller, key, token=token, lease=lease)
        step.answer = {**step.answer, "found": True}
        return step
    registry.check_hidden(key)
    registry.check_quota(key[0], 0, ())
    hold = changed(registry.new(caller, key, offer), token=token, fds=0)
    answer = {"generation": hold.generation, "token": token, "found": False}
    return remembering(caller, Step(answer=answer, put=(hold,)), answer)


def end(registry: Registry, caller: Caller, by: Ticket, *, keep: bool) -> Step:
    """The owner owns no more: the hold is for the next owner (`keep`), or gone. Raises Fenced."""
    first = registry.recall(caller, by.key)
    if first is not None:
        return Step(answer=first.answer)
    hold = _away(registry, by) or registry.mine(by, "close" if keep else "end")
    if not keep:
        step = Step(ended=(end_of(hold, "end"),))
    elif not hold.away:
        step = Step(put=(_left(caller.now, hold, "close", "closed by its owner", 0),))
    else:
        raise Fenced(f"the live hold {by.key[1]!r} is not here: cprd has ended since; put it back")
    return remembering(caller, step, step.answer)


def _away(registry: Registry, by: Ticket) -> Hold | None:
    """The hold of a ticket, where the owner alone has the root. The ticket of a claim counts after
    confirm, too: the answer may have been lost with cprd."""
    for hold in registry.of(by.key):
        meant = hold.away and by.generation in (hold.generation, hold.took)
        if meant and hold.token == shortened(by.token):
            return hold
    return None


def owner_gone(registry: Registry, now: float, generation: int, how: str) -> Step:
    """The process of an owner ended: the hold is for the next owner."""
    hold = registry.get(generation)
    if hold is None or not hold.allows(OWNER_GONE):
        return Step()
    if hold.away:
        return Step(ended=(end_of(hold, NOT_PUT_BACK),))
    soon = hold.took and now - hold.created < SOON
    deaths = hold.deaths + 1 if soon else 0
    if deaths < MOST_DEATHS:
        return Step(put=(_left(now, hold, OWNER_GONE, how, deaths),))
    left = _left(now, hold, GONE_TOO_OFTEN, how, deaths)
    reason = (
        f"{deaths} owners in a row ended within {SOON:g} s after they had taken it over, the last"
        f" one, {pid_text(hold.saver)}: {how}"
    )
    # No ttl runs: an operator is to look.
    return Step(put=(changed(left, reason=reason, expires=None, ttl_left=hold.ttl_left),))


def counted(registry: Registry, counted: Hold, segments: int, fds: int) -> Step:
    """What was counted in a hold whose owner has ended; nothing changes where somebody has the hold
    by now."""
    hold = registry.get(counted.generation)
    if hold != counted or not hold.live:
        return Step()
    if not segments and hold.allows("found empty"):
        return Step(ended=(end_of(hold, "found empty"),))
    return Step(put=(changed(hold, phase=hold.after("counted"), fds=fds),)) if fds else Step()


def _left(now: float, hold: Hold, event: str, how: str, deaths: int) -> Hold:
    """The record of a hold whose owner owns no more."""
    return changed(
        hold,
        phase=hold.after(event),
        token=b"",
        deaths=deaths,
        last_end=how,
        expires=None if hold.ttl_left is None else now + hold.ttl_left,
        ttl_left=None,
    )


def put_back(registry: Registry, caller: Caller, by: Ticket, offer: Offer) -> Step:
    """The owner brings the root anew, after the end of a cprd that held in memory only. The step
    changes nothing where cprd has the root. Raises Fenced."""
    hold = _away(registry, by)
    if hold is None:
        registry.mine(by, "put back")
        return Step(answer={"generation": by.generation, "token": by.token})
    phase = hold.after("put back")
    here = changed(hold, phase=phase, away=False, token=by.token, parked=offer.parked)
    return Step(answer={"generation": here.generation, "token": by.token}, put=(here,), by=caller)


def confirm_next(registry: Registry, caller: Caller, by: Ticket, offer: Offer) -> Step:
    """As `Registry.confirm_next`, by the next owner, who keeps the token; also where cprd kept in
    memory only, and has ended since the claim. Raises Fenced, Busy."""
    hold = _away(registry, by) if registry.recall(caller, by.key) is None else None
    if hold is None:
        return registry.confirm_next(caller, by, offer, token=by.token)
    if hold.generation != by.generation:
        step = put_back(registry, caller, by, offer)
    else:
        new = changed(registry.new(caller, by.key, offer), token=by.token)
        new = changed(new, took=hold.generation, deaths=hold.deaths)
        answer = {"generation": new.generation, "token": by.token}
        ended = end_of(hold, NEXT_AWAY)._replace(heir=True)
        step = Step(answer=answer, ended=(ended,), put=(new,))
    return remembering(caller, step, step.answer)


def away(note: Hold) -> Hold:
    """The record of a live hold whose root the owner alone has."""
    return changed(note, phase=LIVE, live=True, away=True)


def is_noted(hold: Hold, token: bytes) -> bool:
    """Whether a note with this token is of a record: of the same owner, or claimant."""
    return bool(hold.token) and token == (hold.token if hold.away else shortened(hold.token))


def shortened(token: bytes) -> bytes:
    """What is noted of a token: enough to know the token again."""
    return hashlib.blake2b(token, digest_size=len(token)).digest()

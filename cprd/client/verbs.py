"""The verbs of a Daemon, once for every client (see exchange.py)."""

from __future__ import annotations

import os
from collections.abc import Callable

from cprd.bundle.unpack import unpack
from cprd.client import claim as claims
from cprd.client.claim import Saved, Ticket, check_seconds, check_state, check_timeout, rejection
from cprd.client.exchange import Call, Line, Work, check_not_here
from cprd.client.owed import owe
from cprd.errors import CprdError, Damaged, Fenced, InvalidInput, LimitExceeded, Unavailable
from cprd.linux.pause import point
from cprd.protocol import messages
from cprd.state import State

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from typing import Any, TypeVar

    from cprd.client.claim import AfterExit
    from cprd.client.exchange import Verb
    from cprd.protocol.rows import Row, Shown, Status

    T = TypeVar("T")


def save(line: Line, name: str, state: State, *options: Any) -> Verb[Saved]:
    answer = yield from _save(line, "save", name, state, *options)
    line.common.replaced(name, answer["generation"])
    point("save:answered")
    return Saved(answer)


def prepare(
    line: Line, make: Callable[[claims.Prepared], T], name: str, state: State, *options: Any
) -> Verb[T]:
    answer = yield from _save(line, "prepare", name, state, *options)
    point("save:answered")
    return make(claims.Prepared(line, Ticket(name, answer), answer["kept"]))


def _save(
    line: Line,
    verb: str,
    name: str,
    state: State,
    if_exists: str,
    ttl: float | None,
    after_exit: AfterExit,
    require: str | None,
    timeout: float | None,
) -> Verb[dict[str, Any]]:
    """An interrupted prepare is taken back: with nobody who could commit, the hold would be in
    doubt."""
    check_name(name)
    check_state(state)
    check_timeout(timeout)
    if if_exists not in ("error", "replace"):
        raise InvalidInput(f'if_exists wants "error" or "replace", not {if_exists!r}')
    if require not in (None, "memory", "store"):
        raise InvalidInput(f'require wants None, "memory" or "store", not {require!r}')
    bundle = claims.Bundle(line, state, ttl, after_exit)
    try:
        message = {"verb": verb, "name": name, **bundle.fields, "if_exists": if_exists}
        if require == "store":
            message["require"] = require
        message["nonce"] = messages.nonce()
        point("save:packed")

        def abort(fields: dict[str, Any]) -> Call:
            return Ticket(name, fields).call("abort")

        undo = abort if verb == "prepare" else None
        answer = yield Call(message, park=bundle.park, timeout=timeout, undo=undo)
        given: dict[str, Any] = answer.fields
        yield from bundle.answered(name, given["generation"])
        return given
    finally:
        bundle.close()  # after the answer: the daemon's copy is never the last one


def load(
    line: Line,
    make: Callable[[claims.Claim], T],
    name: str,
    wait: float,
    lease: float,
    generation: int | None,
    timeout: float | None,
) -> Verb[T]:
    """Claim, read all of the state, and `make` the claim. What cannot be read, or is interrupted,
    is given back with the reason."""
    check_name(name)
    check_seconds("wait", wait, messages.MAX_WAIT)
    check_seconds("lease", lease, messages.MAX_LEASE, messages.MIN_LEASE)
    check_timeout(timeout)
    if generation is not None and (type(generation) is not int or not 0 <= generation < 1 << 64):
        raise InvalidInput(f"generation wants what a save returned, not {generation!r:.100}")
    check_not_here(line, name)
    point("load:before")
    message = {"verb": "load", "name": name, "lease": lease, "nonce": line.common.nonce()}
    answer = yield Call(
        message if generation is None else {**message, "generation": generation},
        wait=wait,
        timeout=timeout,
        undo=lambda fields: rejection(Ticket(name, fields), "interrupted"),
        ends_with_connection=True,
    )
    fields = answer.fields
    ticket = Ticket(name, fields)
    bundle = -1
    state: State | None = None
    claim: claims.Claim | None = None
    try:
        bundle = answer.bundle()
        point("load:claimed")
        state = _left_live(bundle) if fields["live"] else unpack(bundle)
        point("load:unpacked")
        claim = claims.Claim(line, ticket, fields, bundle, state)
        return make(claim)
    except BaseException as error:
        if claim is not None and claim.open:
            raise  # the program's by now
        if state is not None:
            state.close()
        if bundle >= 0:
            os.close(bundle)
        yield from give_back(line, ticket, fields, error)
        raise


def _left_live(bundle: int) -> State:
    """The state of a live hold whose owner has ended; memory comes as sections "memory.NAME"."""
    from cprd.linux.memfd import mapping, sealed_memfd
    from cprd.live.carrier import root_of
    from cprd.live.reader import read  # 10 ms to import

    root = root_of(bundle)
    try:
        found = read(root)
    finally:
        os.close(root)
    try:
        for name, memfd in found.memories.items():
            key = f"memory.{name}"
            mapped = mapping(memfd)
            copy = sealed_memfd(key, [memoryview(mapped)] if mapped else [])
            try:
                found.state.save_section_fd(key, copy)
            finally:
                os.close(copy)
        found.state.forget_asked()
    except BaseException:
        found.state.close()
        raise
    finally:
        found.close()
    return found.state


def give_back(
    line: Line, ticket: Ticket, fields: dict[str, Any], error: BaseException
) -> Verb[None]:
    """A state that could not be read is given back now, not with the lease. Raises Damaged, which
    names the saver; Fenced where the claim is over."""
    if isinstance(error, GeneratorExit):
        return
    damaged = isinstance(error, Damaged)
    counts = not isinstance(error, LimitExceeded)  # no room here says nothing about the state
    why = str(error) if isinstance(error, CprdError) else f"{type(error).__name__}: {error}"
    call = rejection(ticket, why, damaged=damaged, attempt=counts)
    try:
        yield call
    except Unavailable:
        owe(line.path, call.message)
    except Fenced:
        if damaged:
            raise  # cprd empties the bundle of a hold that has ended
    except CprdError:
        pass  # the end of the connection or of the lease has to do
    if damaged:
        pid, uid = fields["saver"], fields["saver_uid"]
        by = messages.handled_by(pid, uid, fields["last_claimant"])
        raise Damaged(
            f"{ticket.name!r} is damaged and will not be served again: {why}; {by}",
            pid=pid or None,
            phase="damaged",
        ) from None


def drop(verb: str, name: str, force: bool, timeout: float | None) -> Verb[int]:
    """drop and release."""
    check_name(name)
    check_timeout(timeout)
    if not isinstance(force, bool):
        raise InvalidInput(f"force wants True or False, not {force!r:.100}")
    message = {"verb": verb, "name": name, "force": force, "nonce": messages.nonce()}
    answer = yield Call(message, timeout=timeout)
    return int(answer.fields["generation"])


def wait(name: str, timeout: float) -> Verb[int]:
    check_name(name)
    check_seconds("timeout", timeout, messages.MAX_WAIT)
    message = {"verb": "wait", "name": name, "timeout": timeout}
    answer = yield Call(message, wait=timeout, ends_with_connection=True)
    return int(answer.fields["generation"])


def rows(timeout: float | None) -> Verb[list[Row]]:
    """list: all pages."""
    check_timeout(timeout)
    found: list[Row] = []
    after: int | None = 0
    while True:
        answer = yield Call({"verb": "list", "after": after}, timeout=timeout)
        found += answer.fields["holds"]
        after = answer.fields["more"]
        if after is None:
            found.sort(key=lambda row: (row["uid"], row["name"], row["generation"]))
            return found


def show(name: str, timeout: float | None) -> Verb[Shown]:
    row, bundle = yield from row_and_bundle(name, timeout)
    if row["live"]:
        from cprd.live.inspect import describe_live as look
    else:
        from cprd.bundle.inspect import describe_bundle as look
    shown: Shown = yield Work(lambda: look(row, bundle))
    return shown


def row_and_bundle(name: str, timeout: float | None) -> Verb[tuple[dict[str, Any], int]]:
    """The row of a hold, and the bundle, which the caller owns (-1: none to look into)."""
    check_name(name)
    check_timeout(timeout)
    answer = yield Call({"verb": "show", "name": name}, timeout=timeout)
    return answer.fields["hold"], answer.bundle() if answer.fds or answer.cut else -1


def status(timeout: float | None) -> Verb[Status]:
    check_timeout(timeout)
    answer = yield Call({"verb": "status"}, timeout=timeout)
    fields: Status = answer.fields
    return fields


def check_name(name: str) -> None:
    """NAME or UID/NAME. Raises InvalidInput."""
    if not isinstance(name, str):
        raise InvalidInput(f"name {name!r}: wants a str")
    messages.split_name(name, 0)

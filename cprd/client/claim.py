"""Claims and prepared saves, once for every client: what they know, and verbs (see exchange.py)."""

from __future__ import annotations

import os
import sys
from _warnings import warn as _warn  # takes no import, which fails while the interpreter ends

from cprd.bundle.pack import pack
from cprd.client.exchange import BRIEF, Call, Line, Work
from cprd.client.owed import owe
from cprd.errors import CprdError, Fenced, InvalidInput, LimitExceeded, Unavailable
from cprd.linux.pause import point
from cprd.protocol import messages
from cprd.state import State, open_descriptor

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from typing import Any

    from cprd.client.exchange import Verb
    from cprd.protocol.rows import Greeting, Kept
    from cprd.state import HasFileno

    AfterExit = bool | int | HasFileno | None


class Saved:
    """The outcome of a save. `generation`: the number of the hold, greater than all before.
    `kept`: "store" (survives a crash of cprd) or "memory" (survives a restart of cprd only)."""

    __slots__ = ("generation", "kept")

    def __init__(self, fields: dict[str, Any]) -> None:
        self.generation: int = fields["generation"]
        self.kept: Kept = fields["kept"]

    def __repr__(self) -> str:
        return f"<cprd.Saved: generation {self.generation}, kept: {self.kept}>"


class Ticket:
    """The right to speak for a claim or a prepared save. `over`: nothing is left to be said."""

    __slots__ = ("_calls", "generation", "name", "over", "token")

    def __init__(self, name: str, fields: dict[str, Any]) -> None:
        self.name = name
        self.generation: int
        self.token: bytes
        self.renumber(fields)
        self.over = False
        self._calls: dict[tuple[Any, ...], Call] = {}

    def call(self, verb: str, /, *, timeout: float | None = None, **fields: Any) -> Call:
        """A request with a nonce of its own, whose outcome an interrupt waits for."""
        message = {"verb": verb, "name": self.name, "generation": self.generation}
        message |= {"token": self.token, "nonce": messages.nonce(), **fields}
        return Call(message, timeout=timeout, until_known=True)

    def parting(self, verb: str, **fields: Any) -> Call:
        """As `call`, because the program leaves: brief, in a cancelled task, too, and an interrupt
        does not wait for the outcome."""
        call = self.call(verb, timeout=BRIEF, **fields)
        call.until_known, call.shielded = False, True
        return call

    def renumber(self, fields: dict[str, Any]) -> None:
        """Speak for the hold of an answer from now on."""
        self.generation = fields["generation"]
        self.token = fields["token"]

    def last(self, verb: str, timeout: float | None, **fields: Any) -> Call:
        """As `call`, for what ends the ticket: after a Timeout, the same words once more are the
        same request and get the first answer."""
        key = (verb, *fields.values())
        call = self._calls.get(key) or self.call(verb, **fields)
        self._calls[key] = call
        call.timeout = timeout
        return call


class Process:
    """A process that a request names: pid and inode of the pidfd, which is borrowed."""

    def __init__(self, line: Line, field: str, pidfd: int | HasFileno) -> None:
        """Raises InvalidInput, LimitExceeded."""
        from cprd.linux import processes  # takes 5 ms to import

        self._pidfd = fd = open_descriptor(field, pidfd)
        try:
            self.pid, self.inode = processes.identity(fd)
        except (ValueError, OSError):
            raise InvalidInput(f"{field}: descriptor {fd} is not a pidfd") from None
        self.has_ended = self.pid < 0
        if self.pid == 0 or line.greeting.get("pid") not in (None, os.getpid()):
            raise LimitExceeded(
                f"{field}: cprd lives in another pid namespace, and cannot tell which process that"
                " is: let that process connect by itself"
            )

    def fields(self) -> dict[str, int]:
        return {"pid": self.pid, "inode": self.inode}

    def seen_ended(self, name: str, generation: int) -> Verb[None]:
        """After the answer: without an inode (before Linux 6.9) cprd may watch another process,
        that got the pid in between."""
        from cprd.linux import processes

        if not self.inode and processes.has_ended(self._pidfd):
            message = {"verb": "ended", "name": name, "generation": generation}
            yield Call({**message, "pid": self.pid})


class Bundle:
    """What a request that saves says and parks. Owns what packing made, until close()."""

    def __init__(self, line: Line, state: State, ttl: float | None, after_exit: AfterExit) -> None:
        self._process: Process | None = None
        how = "no"
        if after_exit is True:
            how = "peer"
        elif after_exit is not False and after_exit is not None:
            process = Process(line, "after_exit", after_exit)
            if not process.has_ended:
                how, self._process = "process", process
        if ttl is not None:
            check_seconds("ttl", ttl, messages.MAX_TTL, messages.MIN_LEASE)
        self._packed = packed = pack(state, line.common.forbidden())
        self.park = packed.park
        self.close = packed.close
        said = {"fds": packed.fds, "bytes": packed.size, "parked": packed.parked}
        self.fields: dict[str, Any] = {**said, "depth": packed.depth, "after_exit": how}
        if ttl is not None:
            self.fields["ttl"] = ttl
        if self._process is not None:
            self.fields |= self._process.fields()

    def answered(self, name: str, generation: int) -> Verb[None]:
        if self._process is not None:
            yield from self._process.seen_ended(name, generation)


def rejection(ticket: Ticket, why: str, *, damaged: bool = False, attempt: bool = True) -> Call:
    """Give a claim back because the program left. The end of the connection says the same (unless
    the state is damaged), so the request is brief. `attempt`: whether the claim counts as such."""
    fields: dict[str, Any] = {"why": cut(why), "damaged": damaged}
    if not attempt:
        fields["attempt"] = False
    call = ticket.parting("reject", **fields)
    if damaged:
        call.timeout = None
    return call


class Prepared:
    """A save that is kept and not served yet."""

    def __init__(self, line: Line, ticket: Ticket, kept: Kept) -> None:
        self.line = line
        self.ticket = ticket
        self.kept = kept
        self.open = False

    def taken(self) -> None:
        """The program has the prepared save: from now on `end` is due."""
        self.line.hold(self.ticket)
        self.open = True

    def commit(self, timeout: float | None) -> Verb[Saved]:
        check_timeout(timeout)
        point("commit:before")
        answer = yield self.ticket.last("commit", timeout)
        self.end()
        self.line.common.replaced(self.ticket.name, self.ticket.generation)
        point("commit:answered")
        return Saved(answer.fields)

    def abort(self, timeout: float | None) -> Verb[None]:
        check_timeout(timeout)
        yield self.ticket.last("abort", timeout)
        self.end()

    def end(self) -> None:
        """The connection is needed no longer. Safe to repeat."""
        self.ticket.over = True
        if self.open:
            self.open = False
            self.line.part(self.ticket)


class Claim:
    """An exclusive lease on a hold. Owns `bundle`, and `state` with the descriptors not taken."""

    def __init__(
        self, line: Line, ticket: Ticket, fields: dict[str, Any], bundle: int, state: State
    ) -> None:
        self.line = line
        self.ticket = ticket
        self.bundle = bundle
        self.state = state
        self.attempts: int = fields["attempts"]
        self.last_reject: str = fields["last_reject"]
        self.lease: float = fields["lease"]
        self.begun = False
        self.open = False
        self._stuck = False  # the daemon may have to learn of the end by that of the connection
        self._ends = False  # with the claim, nobody has what was not taken

    def taken(self) -> None:
        """The program has the claim: from now on `close` is due."""
        self.line.common.claimed(self.ticket)
        self.line.hold(self.ticket)
        self.open = True

    def renew(self, lease: float | None, timeout: float | None) -> Verb[float]:
        check_timeout(timeout)
        if lease is not None:
            check_seconds("lease", lease, messages.MAX_LEASE, messages.MIN_LEASE)
        ticket = self.ticket
        message = {"verb": "renew", "name": ticket.name, "generation": ticket.generation}
        message["token"] = ticket.token
        if lease is not None:
            message["lease"] = lease
        answer = yield Call(message, timeout=timeout)
        return float(answer.fields["lease"])

    def begin(self, process: int | HasFileno | None, timeout: float | None) -> Verb[None]:
        check_timeout(timeout)
        actor = None if process is None else Process(self.line, "process", process)
        if actor is not None and actor.has_ended:
            raise InvalidInput("begin: the process that is to act has ended")
        point("begin:before")
        call = self.ticket.call("begin", timeout=timeout, **(actor.fields() if actor else {}))
        before, self.begun = self.begun, True
        try:
            yield call
        except (InvalidInput, LimitExceeded, Fenced):  # refused: nothing has begun by this
            self.begun = before
            raise
        except BaseException:
            if call.number is None:
                self.begun = before
            else:
                self._stuck = True  # whether it has begun, only the daemon knows
            raise
        if actor is not None:
            yield from actor.seen_ended(self.ticket.name, self.ticket.generation)
        point("begin:answered")

    def confirm(
        self,
        next: State | None,
        after_exit: AfterExit,
        ttl: float | None,
        strict: bool,
        timeout: float | None,
    ) -> Verb[Saved | None]:
        check_timeout(timeout)
        self._check()
        if strict:
            untaken = self.state.untaken()
            if untaken:
                raise InvalidInput(
                    f"{named(untaken)} of {self.ticket.name!r} were never asked for; nothing was"
                    " confirmed"
                )
        saved = None
        if next is None:
            point("confirm:before")
            yield self.ticket.last("confirm", timeout)
            self.ticket.over = self._ends = True
        else:
            saved = yield from self._confirm_next(next, after_exit, ttl, timeout)
        point("confirm:answered")
        # As long as the bundle is here, what was taken and closed since is open.
        yield Work(self._unpark)
        return saved

    def _confirm_next(
        self, next: State, after_exit: AfterExit, ttl: float | None, timeout: float | None
    ) -> Verb[Saved]:
        check_state(next)
        bundle = Bundle(self.line, next, ttl, after_exit)
        try:
            point("confirm:before")
            call = self.ticket.call("confirm_next", timeout=timeout, **bundle.fields)
            call.park = bundle.park
            answer = yield call
            self.ticket.over = True
            saved = Saved(answer.fields)
            yield from bundle.answered(self.ticket.name, saved.generation)
            return saved
        finally:
            bundle.close()

    def reject(self, why: str, timeout: float | None) -> Verb[None]:
        check_timeout(timeout)
        self._check()
        if not isinstance(why, str):
            raise InvalidInput(f"why wants a str, not {why!r:.100}")
        point("reject:before")
        yield self.ticket.last("reject", timeout, why=cut(why), damaged=False)
        self.ticket.over = True
        point("reject:answered")

    def _check(self) -> None:
        """In doubt, a claim may be ended after close(), too."""
        if self.ticket.over or not (self.open or self.begun):
            raise Fenced("this claim has been confirmed, rejected or closed already")

    def leave(self, error: BaseException | None) -> Verb[None]:
        """The end of the block of a claim."""
        try:
            if not self.ticket.over and self.open:
                if error is None:
                    yield from self.confirm(None, True, None, False, None)
                elif not self.begun:
                    yield from self._give_back(f"{type(error).__name__}: {error}")
        finally:
            yield from self.close()

    def close(self) -> Verb[None]:
        if not self.open:
            return
        self.open = False
        try:
            if not self.begun:
                yield from self._give_back("closed without confirm")
        finally:
            try:
                yield Work(self.let_go)
            finally:
                self.line.common.forget(self.ticket)
                self.line.part(self.ticket, stuck=self._stuck)

    def _give_back(self, why: str) -> Verb[None]:
        if self.ticket.over:
            return
        self.ticket.over = self._stuck = True
        call: Call | None = None
        try:
            call = rejection(self.ticket, why)
            yield call
        except Fenced:
            pass  # it was over already
        except BaseException as error:
            # The end of the connection says it as well, to a cprd that is there.
            if call is not None:
                owe(self.line.path, call.message)
            if isinstance(error, CprdError):
                return
            raise
        self._stuck = False

    def let_go(self) -> None:
        untaken = self.state.untaken() if self._ends and not self.state.closed else []
        try:
            self.state.close()
        finally:
            self._unpark()
        if untaken:
            warn(
                f"{named(untaken)} of {self.ticket.name!r} were never asked for, and end with the"
                " claim: was the state saved by a newer program?"
            )

    def _unpark(self) -> None:
        bundle, self.bundle = self.bundle, -1
        if bundle >= 0:
            os.close(bundle)


class DaemonFace:
    """What a Daemon knows of its connection, in every client."""

    def __init__(self, connection: Any) -> None:
        self._line = connection
        self._user = object()
        connection.users.add(self._user)

    def fileno(self) -> int:
        """The connection's socket, owned by the Daemon; -1 while there is none."""
        number: int = self._line.fileno()
        return number

    @property
    def path(self) -> str:
        """The path of the daemon's socket."""
        path: str = self._line.path
        return path

    @property
    def greeting(self) -> Greeting:
        """What the daemon said first: version, server, limits, kept, lease_by; uid and pid of this
        process, as the daemon sees them."""
        greeting: Greeting = self._line.greeting.copy()
        return greeting

    def _check_open(self) -> None:
        if self._line.mine() and not self._line.users:
            raise Unavailable("the connection has been closed: connect() anew")


class PreparedFace:
    """The attributes of a Prepared, in every client."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._line: Any = prepared.line
        self.generation: int = prepared.ticket.generation
        self.kept: Kept = prepared.kept  # "memory" or "store"
        prepared.taken()


class ClaimFace:
    """The attributes of a Claim, in every client."""

    def __init__(self, claim: Claim) -> None:
        self._claim = claim
        self._line: Any = claim.line
        self.state = claim.state
        self.generation = claim.ticket.generation
        self.attempts = claim.attempts  # loads of this hold, this load included
        self.last_reject = claim.last_reject  # why the claim before was given back, or ""
        self.lease = claim.lease  # seconds
        claim.taken()


def check_state(state: State) -> None:
    if not isinstance(state, State):
        raise InvalidInput(f"wants a cprd.State, not {state!r:.100}")


def check_timeout(timeout: float | None) -> None:
    if timeout is not None:
        check_seconds("timeout", timeout, messages.MAX_WAIT)


def check_seconds(what: str, seconds: float, limit: float, least: float = 0.0) -> None:
    """Raises InvalidInput unless `seconds` is a number that the daemon takes."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise InvalidInput(f"{what} wants seconds, not {seconds!r}")
    if not least <= seconds <= limit:
        raise InvalidInput(f"{what} wants {least:g} to {limit:g} seconds, not {seconds!r}")


def named(keys: list[tuple[str, int] | str]) -> str:
    """Keys of descriptors and sections for a message, not all of many."""
    texts = [f"section {key!r}" if isinstance(key, str) else f"{key}" for key in keys[:8]]
    more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
    return ", ".join(texts) + more


def warn(text: str) -> None:
    """A RuntimeWarning at the line of the program that called cprd."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("cprd"):
        level, frame = level + 1, frame.f_back
    _warn(text, RuntimeWarning, level)


def cut(why: str) -> str:
    """A reason as long as it may be on the wire."""
    return why.encode("utf-8", "replace")[: messages.MAX_REASON].decode("utf-8", "ignore")

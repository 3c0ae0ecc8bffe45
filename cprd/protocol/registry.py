"""The verbs of the life cycle: each returns a step, and changes nothing. No I/O, no clock.

A `Step` says which holds end, which records are put, and the answer. The daemon writes the step
down where the step outlives the daemon, and then calls `Registry.apply`. So nothing is true before
it is written, and nothing is answered before it is true. `lifecycle.TRANSITIONS` decides what a
verb may do in a phase.

The daemon watches processes by pidfd and reports their ends: a pid in a record means the process
that the record meant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from cprd.errors import AlreadyHeld, Busy, Damaged, Fenced
from cprd.protocol.holds import Holds
from cprd.protocol.lifecycle import (
    DAMAGED,
    HELD,
    NOTHING,
    SAVED_BY_ACTING,
    TRANSITIONS,
    Hold,
    busy,
    changed,
    ending_event,
    why_not,
)
from cprd.protocol.messages import handled_by, pid_text
from cprd.protocol.names import Key
from cprd.protocol.replies import Reply, newest


class Caller(NamedTuple):
    """Who asks, when, and with which request. uid and pid as the kernel says."""

    uid: int
    pid: int
    now: float = 0.0
    nonce: bytes = b""
    digest: bytes = b""
    verb: str = ""


class Ticket(NamedTuple):
    """What a claimant or a saver shows: the token of generation `generation`."""

    key: Key
    generation: int
    token: bytes


class Offer(NamedTuple):
    """A bundle to hold, as the saver describes the bundle."""

    fds: int
    size: int
    parked: int = 0
    ttl: float | None = None
    after_exit: int = -1  # pid
    live: bool = False  # the root of a live hold


class Ended(NamedTuple):
    hold: Hold
    how: str  # the event
    heir: bool = False  # the segments of a live hold belong to the next owner now


class Step:
    """What a verb changes once the step is applied."""

    __slots__ = ("answer", "by", "ended", "put", "reply")

    def __init__(
        self,
        answer: dict[str, Any] | None = None,
        ended: tuple[Ended, ...] = (),
        put: tuple[Hold, ...] = (),
        by: Caller | None = None,
    ) -> None:
        """`by`: who asked for the step; None: a deadline or the end of a process."""
        self.answer = {} if answer is None else answer
        self.ended = ended
        self.put = put
        self.by = by
        self.reply: Reply | None = None  # to remember

    @property
    def changes(self) -> bool:
        return bool(self.put or self.ended)


_MEANT = {
    **dict.fromkeys(("commit", "abort"), "prepared save"),
    **dict.fromkeys(("put back", "close", "end"), "live hold"),
}

P = ParamSpec("P")
About = TypeVar("About", Key, Ticket)
Verb = Callable[Concatenate["Registry", Caller, About, P], Step]


def once(verb: Verb[About, P]) -> Verb[About, P]:
    """Answer a repeated request from memory; remember the answer to a new one."""

    @wraps(verb)
    def ask(
        self: Registry, caller: Caller, about: About, /, *rest: P.args, **named: P.kwargs
    ) -> Step:
        first = self.recall(caller, about.key if isinstance(about, Ticket) else about)
        if first is not None:
            return Step(answer=first.answer)
        step = verb(self, caller, about, *rest, **named)
        return remembering(caller, step, step.answer) if step.changes else step

    return ask


class Registry(Holds):
    """All holds, and the verbs. Only `apply` and `adopt` change anything."""

    # Saving

    @once
    def save(
        self, caller: Caller, key: Key, offer: Offer, *, replacing: bool = False, token: bytes = b""
    ) -> Step:
        """save; with a token the first half of a save: prepare.

        Raises AlreadyHeld, Busy, LimitExceeded."""
        events = self._replaced(caller, key, offer.after_exit, replacing=replacing)
        ended = () if token else events
        self.check_quota(key[0], offer.fds, tuple(old.hold for old in ended))
        hold = self.new(caller, key, offer)
        if token:
            phase = TRANSITIONS[NOTHING, "prepare"]
            hold = changed(hold, phase=phase, token=token, expires=None, ttl_left=offer.ttl)
        answer = {"generation": hold.generation, "token": token}
        return Step(answer=answer, ended=ended, put=(hold,))

    def new(self, caller: Caller, key: Key, offer: Offer) -> Hold:
        """A record of the next generation; of a live hold, without a token yet."""
        runs = offer.after_exit < 0 and not offer.live
        return Hold(
            uid=key[0],
            name=key[1],
            generation=self.next_generation,
            phase=TRANSITIONS[NOTHING, "live" if offer.live else "save"],
            fds=offer.fds,
            size=offer.size,
            parked=offer.parked,
            created=caller.now,
            expires=_expires(caller.now, offer.ttl, runs=runs),
            ttl_left=_stopped(offer.ttl, runs=runs),
            saver=caller.pid,
            saver_uid=-1 if caller.uid == key[0] else caller.uid,
            after_exit=offer.after_exit,
            live=offer.live,
        )

    def _replaced(
        self, caller: Caller, key: Key, predecessor: int, *, replacing: bool
    ) -> tuple[Ended, ...]:
        """What a new hold ends. Raises AlreadyHeld, Busy."""
        self.check_hidden(key)  # a hidden record would come to light later, and be ended
        ended = []
        for hold in self.of(key):
            event = ending_event(hold, caller.pid, predecessor)
            by_the_acting = event == SAVED_BY_ACTING and hold.allows(event)
            if not by_the_acting and not replacing:
                raise AlreadyHeld(
                    f"{key[1]!r} is held already ({hold.phase}, generation {hold.generation}); save"
                    ' with if_exists="replace" (--replace), or drop it first'
                )
            if not hold.allows(event):
                text = f"{key[1]!r} cannot be replaced: {why_not(hold, caller.now)}"
                raise busy(hold, text, Busy)
            ended.append(end_of(hold, event))
        return tuple(ended)

    @once
    def commit(self, caller: Caller, by: Ticket) -> Step:
        """prepared -> held; older records of the name end. Raises Fenced."""
        hold = self.mine(by, "commit")
        new = changed(
            hold,
            phase=hold.after("commit"),
            token=b"",
            expires=_expires(caller.now, hold.ttl_left, runs=hold.after_exit < 0),
            ttl_left=_stopped(hold.ttl_left, runs=hold.after_exit < 0),
        )
        answer = {"generation": new.generation}
        return Step(answer=answer, ended=self._under(hold), put=(new,))

    def _under(self, hold: Hold) -> tuple[Ended, ...]:
        """The ends of all that a prepared save was put over."""
        ended = []
        for old in self.older(hold):
            event = ending_event(old, hold.saver, hold.after_exit)
            ended.append(end_of(old, event if old.allows(event) else "newer committed"))
        return tuple(ended)

    @once
    def abort(self, caller: Caller, by: Ticket) -> Step:
        """prepared -> gone. Raises Fenced."""
        del caller
        return Step(ended=(end_of(self.mine(by, "abort"), "abort"),))

    def saver_gone(self, generation: int) -> Step:
        """The process or the connection of a prepared save ended: in doubt."""
        hold = self.get(generation)
        if hold is None or not hold.allows("saver gone"):
            return Step()
        reason = f"its saver ({pid_text(hold.saver)}) ended between prepare and commit"
        phase = hold.after("saver gone")
        return Step(put=(changed(hold, phase=phase, token=b"", reason=reason),))

    def predecessor_gone(self, now: float, generation: int) -> Step:
        """The process that `after_exit` named has ended: the hold can be loaded, and the ttl
        runs."""
        hold = self.get(generation)
        if hold is None or hold.after_exit < 0:
            return Step()
        new = changed(hold, after_exit=-1)
        if new.allows("ttl over") and new.expires is None:
            new = changed(new, expires=_expires(now, hold.ttl_left, runs=True), ttl_left=None)
        return Step(put=(new,))

    # Loading

    def load(
        self, caller: Caller, key: Key, *, token: bytes, lease: float, generation: int | None = None
    ) -> Step:
        """Claim a hold. Raises NotHeld, Busy, Damaged; Fenced when another generation is held.

        A repeated load gets the first answer only while that claim lasts."""
        first = self.recall(caller, key)
        if first is not None:
            mine = self.get(first.answer["generation"])
            if (
                mine is not None
                and (mine.key, mine.token) == (key, first.answer["token"])
                and mine.allows("lease over")
                and mine.claimant == caller.pid
            ):
                return Step(answer=_loaded(mine))
        hold = self.check_load(caller.now, key)
        if generation is not None and hold.generation != generation:
            raise Fenced(
                f"{key[1]!r} has generation {hold.generation} by now; {generation} was asked for"
            )
        now = caller.now
        new = changed(
            hold,
            phase=hold.after("load"),
            attempts=hold.attempts + 1,
            claimant=caller.pid,
            token=token,
            lease=lease,
            deadline=now + lease,
            expires=None,
            ttl_left=None if hold.expires is None else max(0.0, hold.expires - now),
        )
        step = Step(answer=_loaded(new), put=(new,))
        return remembering(caller, step, {"generation": new.generation, "token": token})

    def check_load(self, now: float, key: Key) -> Hold:
        """The hold that a load gets now. Raises NotHeld, Busy, Damaged."""
        top = self.top(key)
        for hold in reversed(self.of(key)):
            why = why_not(hold, now)
            if why:
                text = f"{key[1]!r} is held, and cannot be loaded now: {why}"
                raise busy(hold, text, Damaged if hold.phase == DAMAGED else Busy)
        return top

    def renew(self, caller: Caller, by: Ticket, lease: float | None) -> Step:
        """Begin the lease anew; in doubt no lease runs. Raises Fenced."""
        hold = self.mine(by, "renew")
        assert hold.after("renew") == hold.phase
        if not hold.allows("lease over"):
            return Step(answer={"lease": 0.0})
        lease = hold.lease if lease is None else lease
        new = changed(hold, lease=lease, deadline=caller.now + lease)
        return Step(answer={"lease": lease}, put=(new,))

    @once
    def begin(self, caller: Caller, by: Ticket, acting: int = 0) -> Step:
        """Acting begins and cannot be undone: in doubt until confirm. Raises Fenced."""
        del caller
        hold = self.mine(by, "begin")
        acting = acting or hold.acting
        who = f"; {pid_text(acting)} acts on it" if acting else ""
        new = changed(
            hold,
            phase=hold.after("begin"),
            begun=True,
            acting=acting,
            last_claimant=0,
            deadline=0.0,
            reason=f"{pid_text(hold.claimant)} has begun to act on it and has not confirmed{who}",
        )
        return Step(put=(new,))

    def acting_gone(self, generation: int) -> Step:
        """The process that `begin` named has ended: the pid means nothing any more."""
        hold = self.get(generation)
        if hold is None or not hold.acting:
            return Step()
        reason = f"{hold.reason}; {pid_text(hold.acting)} has ended since"
        return Step(put=(changed(hold, acting=0, reason=reason),))

    @once
    def confirm(self, caller: Caller, by: Ticket) -> Step:
        """The point of no return: the hold ends. Raises Fenced."""
        del caller
        return Step(ended=(end_of(self.mine(by, "confirm"), "confirm"),))

    @once
    def confirm_next(self, caller: Caller, by: Ticket, offer: Offer, *, token: bytes = b"") -> Step:
        """Confirm, and hold the successor's own state in the same step; `token` is for the owner
        of a live hold.

        Raises Fenced, LimitExceeded; Busy when a newer save was prepared under the name."""
        hold = self.mine(by, "confirm next")
        for newer in self.of(by.key):
            if newer.generation > by.generation:  # the next state must not lie under an older one
                text = f"{by.key[1]!r} cannot be held anew: {why_not(newer, caller.now)}"
                raise busy(newer, text, Busy)
        if not offer.live:
            self.check_quota(by.key[0], offer.fds, (hold,))
        new = self.new(caller, by.key, offer)
        if offer.live:
            new = changed(new, token=token, took=hold.generation, deaths=hold.deaths)
        answer = {"generation": new.generation, "token": new.token}
        ended = end_of(hold, "confirm next")._replace(heir=hold.live and new.live)
        return Step(answer=answer, ended=(ended,), put=(new,))

    @once
    def reject(
        self, caller: Caller, by: Ticket, why: str, *, damaged: bool = False, attempt: bool = True
    ) -> Step:
        """The claimant gives the hold back, for another to try. Raises Fenced.

        `damaged`: the claimant has found that the hold is not whole. `attempt`: whether the claim
        counts as an attempt."""
        hold = self.mine(by, "reject")
        if damaged:
            return self.found_damaged(by.generation, why)
        back = _back(caller.now, hold, "reject", why or "rejected without a reason")
        return Step(put=(changed(back, attempts=back.attempts - (not attempt)),))

    def claimant_gone(self, now: float, generation: int, token: bytes, how: str) -> Step:
        """The connection or the process of a claimant ended without confirm.

        The hold goes back; after `begin` the hold stays in doubt, and says so."""
        hold = self.get(generation)
        if hold is None or hold.token != token or not hold.allows("claimant gone"):
            return Step()
        phase = hold.after("claimant gone")
        if phase == HELD:
            why = f"{pid_text(hold.claimant)} did not confirm: {how}"
            return Step(put=(_back(now, hold, "claimant gone", why),))
        if not hold.claimant and hold.last_claimant:
            return Step()  # said already
        who = f"; {pid_text(hold.acting)} acts on it" if hold.acting else ""
        reason = f"{pid_text(hold.claimant)} began to act on it, and then {how}, unconfirmed{who}"
        last = hold.claimant
        new = changed(hold, phase=phase, reason=reason, claimant=0, last_claimant=last)
        return Step(put=(new,))

    def expire(self, now: float) -> Step | None:
        """The first lease or ttl that is over, or None. Call again after applying the step."""
        hold = self.first_to_end()
        if hold is None or hold.ends_at is None or hold.ends_at > now:
            return None
        if hold.allows("ttl over"):
            return Step(ended=(end_of(hold, "ttl over"),))
        why = f"{pid_text(hold.claimant)} did not confirm: its lease of {hold.lease:g} s is over"
        return Step(put=(_back(now, hold, "lease over", why),))

    def found_damaged(self, generation: int, why: str) -> Step:
        """The bundle is not whole: never served again. The reason names the saver."""
        hold = self.get(generation)
        if hold is None or not hold.allows("found damaged"):
            return Step()
        new = changed(
            hold,
            phase=hold.after("found damaged"),
            reason=f"{why[:1024]}; {handled_by(hold.saver, hold.saved_by, hold.last_claimant)}",
            token=b"",
            deadline=0.0,
            expires=None,
            claimant=0,
            last_claimant=hold.claimant or hold.last_claimant,
        )
        return Step(put=(new,))

    # By hand

    @once
    def drop(self, caller: Caller, key: Key, *, force: bool) -> Step:
        """End a hold without a successor. Raises NotHeld; Busy when force is needed, or no use."""
        hold = self.top(key)
        event = "drop" if hold.allows("drop") else "drop by force"
        why = why_not(hold, caller.now)
        if not hold.allows(event) or hold.away:  # nobody could fence the owner
            text = f"{key[1]!r} cannot be dropped: {why}; end that process, then drop it by force"
            raise busy(hold, text, Busy)
        if event == "drop by force" and not force:
            raise busy(hold, f"{key[1]!r} is dropped only by force (--force): {why}", Busy)
        return Step(answer={"generation": hold.generation}, ended=(end_of(hold, event),))

    @once
    def release(self, caller: Caller, key: Key, *, force: bool) -> Step:
        """in doubt -> held, by an operator who knows that nothing acted. Raises NotHeld, Busy."""
        hold = self.top(key)
        answer = {"generation": hold.generation}
        if hold.allows("release"):
            assert hold.after("release") == hold.phase
            return Step(answer=answer)
        why = why_not(hold, caller.now)
        if not hold.allows("release by force"):
            instead = ""
            if hold.allows("commit"):
                instead = "; wait until it commits or aborts, or end it: then this is in doubt, and"
                instead += " can be released"
            elif hold.allows("lease over"):
                instead = "; should it reject, or end, this is served again without a release"
            raise busy(hold, f"{key[1]!r} cannot be released: {why}{instead}", Busy)
        if not force:
            raise busy(hold, f"{key[1]!r} is released only by force (--force): {why}", Busy)
        said = f"released by force: {hold.reason}"
        new = _back(caller.now, hold, "release by force", said)
        return Step(answer=answer, ended=self._under(hold), put=(new,))

    # Changing

    def apply(self, step: Step) -> None:
        """Make a step true. The caller has written the step down before."""
        for ended in step.ended:
            self.remove(ended.hold.generation)
        for hold in step.put:
            self.put(hold)
        if step.reply is not None:
            self.replies.remember(step.reply)

    def adopt(self, holds: Iterable[Hold]) -> list[Hold]:
        outdated = super().adopt(holds)
        self.pass_generation(newest(self.replies))
        return outdated

    def recall(self, caller: Caller, key: Key) -> Reply | None:
        """The first answer to this request. Raises ProtocolError when another request had the
        nonce."""
        if not caller.nonce:
            return None
        return self.replies.recall(caller.uid, caller.nonce, caller.digest, caller.verb, key[1])

    def mine(self, by: Ticket, event: str) -> Hold:
        """The hold that a ticket speaks for, where the table allows `event`. Raises Fenced."""
        what = _MEANT.get(event, "claim")
        hold, name = self.get(by.generation), by.key[1]
        if hold is None or hold.key != by.key:
            raise Fenced(f"the {what} on {name!r} is over: generation {by.generation} has ended")
        if not by.token or hold.token != by.token or not hold.allows(event):
            why = hold.reason if hold.phase != HELD else hold.last_reject
            raise Fenced(
                f"the {what} on {name!r} is over: it is {hold.phase} now"
                + (f" ({why})" if why else "")
            )
        return hold


def remembering(caller: Caller, step: Step, answer: dict[str, Any]) -> Step:
    """The step, with the answer as the first answer to this request of `caller`."""
    step.by = caller
    if caller.nonce:
        step.reply = Reply(caller.uid, caller.nonce, answer, caller.now, caller.digest)
    return step


def end_of(hold: Hold, event: str) -> Ended:
    assert hold.after(event) == NOTHING
    return Ended(hold, event)


def _back(now: float, hold: Hold, event: str, why: str) -> Hold:
    """The record of a hold that can be loaded again."""
    return changed(
        hold,
        phase=hold.after(event),
        last_reject=why[:1024],
        reason="",
        claimant=0,
        last_claimant=hold.claimant or hold.last_claimant,  # gone while in doubt
        token=b"",
        lease=0.0,
        deadline=0.0,
        acting=0,
        begun=False,
        expires=_expires(now, hold.ttl_left, runs=hold.after_exit < 0),
        ttl_left=_stopped(hold.ttl_left, runs=hold.after_exit < 0),
        deaths=0 if event == "release by force" else hold.deaths,
    )


def _expires(now: float, ttl: float | None, *, runs: bool) -> float | None:
    """When a ttl is over. A ttl runs while the hold is served: neither before the commit nor while
    the predecessor lives."""
    return now + ttl if runs and ttl is not None else None


def _stopped(ttl: float | None, *, runs: bool) -> float | None:
    """The rest of a ttl that does not run."""
    return None if runs else ttl


def _loaded(hold: Hold) -> dict[str, Any]:
    return {
        "generation": hold.generation,
        "token": hold.token,
        "attempts": hold.attempts,
        "last_reject": hold.last_reject,
        "lease": hold.lease,
        "saver": hold.saver,
        "saver_uid": hold.saved_by,
        "last_claimant": hold.last_claimant or None,
        "live": hold.live,
        "last_end": hold.last_end,
    }

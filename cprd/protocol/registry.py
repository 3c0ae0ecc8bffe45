"""The life cycle of holds: one table, and the verbs that walk it. No I/O, and no clock of its own.

A verb does not change anything. It returns a `Step`: which holds end, which are put in their place,
and the answer. The daemon writes the step down where it outlives the daemon, and only then calls
`Registry.apply`. So what was not written never happened, and what was answered was written.

Times are seconds of CLOCK_BOOTTIME, given by the caller. Processes are pids whose pidfds the caller
watches: it reports their end, so that a pid here always means the process that it meant.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from cprd.errors import AlreadyHeld, Busy, Damaged, Fenced, LimitExceeded, NotHeld

PREPARED = "prepared"
HELD = "held"
CLAIMED = "claimed"
IN_DOUBT = "in-doubt"
DAMAGED = "damaged"
UNREADABLE = "unreadable"
NOTHING = "-"

TRANSITIONS: dict[tuple[str, str], str] = {
    (NOTHING, "prepare"): PREPARED,
    (NOTHING, "save"): HELD,
    (PREPARED, "commit"): HELD,
    (PREPARED, "abort"): NOTHING,
    (PREPARED, "saver gone"): IN_DOUBT,
    (HELD, "load"): CLAIMED,
    (HELD, "replace"): NOTHING,
    (HELD, "drop"): NOTHING,
    (HELD, "ttl over"): NOTHING,
    (HELD, "release"): HELD,
    (HELD, "found damaged"): DAMAGED,
    (CLAIMED, "confirm"): NOTHING,
    (CLAIMED, "confirm next"): NOTHING,
    (CLAIMED, "reject"): HELD,
    (CLAIMED, "claimant gone"): HELD,
    (CLAIMED, "lease over"): HELD,
    (CLAIMED, "begin"): IN_DOUBT,
    (CLAIMED, "drop by force"): NOTHING,
    (CLAIMED, "found damaged"): DAMAGED,
    (IN_DOUBT, "begin"): IN_DOUBT,
    (IN_DOUBT, "claimant gone"): IN_DOUBT,
    (IN_DOUBT, "confirm"): NOTHING,
    (IN_DOUBT, "confirm next"): NOTHING,
    (IN_DOUBT, "reject"): HELD,
    (IN_DOUBT, "saved by the acting process"): NOTHING,
    (IN_DOUBT, "replace"): NOTHING,
    (IN_DOUBT, "release by force"): HELD,
    (IN_DOUBT, "drop by force"): NOTHING,
    (IN_DOUBT, "found damaged"): DAMAGED,
    (DAMAGED, "drop by force"): NOTHING,
    (UNREADABLE, "drop by force"): NOTHING,
}
"""(phase, event) -> phase. What is not here is refused. "confirm next", "replace" and a save by the
acting process end the old hold in the same step that puts the new one (held). "replace" of what is
in doubt: only what lies under a prepared save that its operator commits or releases."""

PHASES = (PREPARED, HELD, CLAIMED, IN_DOUBT, DAMAGED, UNREADABLE)

Key = tuple[int, str]


@dataclass(frozen=True, slots=True)
class Hold:
    """One record. Frozen: a transition makes another one."""

    uid: int
    name: str
    generation: int
    phase: str
    fds: int = 0  # descriptors under keys, as the saver said
    size: int = 0  # bytes of its sections, as the saver said
    created: float = 0.0
    expires: float | None = None  # when the ttl ends; None while it does not run, or has no end
    ttl_left: float | None = None  # what is left of the ttl while it does not run
    attempts: int = 0  # how often it was loaded
    last_reject: str = ""
    reason: str = ""  # why it is in doubt, damaged, unreadable
    saver: int = 0  # pid; 0 where it cannot be seen
    after_exit: int = -1  # pid of the process that must end before it is served; -1: none
    claimant: int = 0  # pid
    last_claimant: int = 0
    token: bytes = b""  # of the claim, or of the prepared save
    lease: float = 0.0
    deadline: float = 0.0  # when the lease ends (claimed)
    acting: int = 0  # pid of the process that acts on it (begin)
    parked: int = 0  # descriptors in the root of its bundle, as the saver said; 0: not known
    begun: bool = False  # in doubt by begin, not by a saver that vanished
    born: bytes = b""  # nonce of the request that made it
    last: bytes = b""  # nonce of the request that made it what it is

    @property
    def key(self) -> Key:
        return (self.uid, self.name)

    def row(self, now: float) -> dict[str, Any]:
        """What `list` shows of it."""
        left = self.ttl_left if self.expires is None else max(0.0, self.expires - now)
        return {
            "name": self.name,
            "generation": self.generation,
            "phase": self.phase,
            "uid": self.uid,
            "fds": self.fds,
            "bytes": self.size,
            "age": max(0.0, now - self.created),
            "expires": left,
            "attempts": self.attempts,
            "reason": why_not(self, now)
            or (f"rejected: {self.last_reject}" * bool(self.last_reject)),
            "last_reject": self.last_reject,
            "claimant": self.claimant or None,
            "acting": self.acting or None,
        }


def why_not(hold: Hold, now: float) -> str:
    """Why a hold is not served now; "" when it is."""
    if hold.phase == PREPARED:
        return f"prepared by {_pid(hold.saver)}, which has not committed yet"
    if hold.phase == CLAIMED:
        left = max(0.0, hold.deadline - now)
        return f"claimed by {_pid(hold.claimant)}, whose lease has {left:.1f} s left"
    if hold.phase == HELD:
        if hold.after_exit >= 0:
            return f"its predecessor, {_pid(hold.after_exit)}, has not ended yet"
        return ""
    if hold.phase == IN_DOUBT:
        return (
            f"in doubt: {hold.reason}; make sure that it does not run elsewhere, then release it"
            " (cprctl release NAME --force) or drop it (cprctl drop NAME --force)"
        )
    if hold.phase == DAMAGED:
        return f"damaged: {hold.reason}; it can only be dropped (cprctl drop NAME --force)"
    return f"unreadable: {hold.reason}; run the newer cprd again, or drop it (--force)"


def _pid(pid: int) -> str:
    return f"pid {pid}" if pid > 0 else "a process of another pid namespace"


class Peer(NamedTuple):
    """Who asks: uid and pid as the kernel says (pid 0: cannot be seen)."""

    uid: int
    pid: int


class Ended(NamedTuple):
    hold: Hold
    how: str  # the event


@dataclass(frozen=True, slots=True)
class Step:
    """What a verb will change once it is applied."""

    answer: dict[str, Any] = field(default_factory=dict)
    ended: tuple[Ended, ...] = ()
    put: tuple[Hold, ...] = ()
    nonce: bytes = b""
    uid: int = 0  # whose nonce it is
    remembered: bool = False  # this is the first answer of an earlier request: nothing changes


@dataclass(frozen=True, slots=True)
class Quota:
    """Limits for one uid."""

    holds: int = 2000
    fds: int = 1_000_000
    connections: int = 500


@dataclass(slots=True)
class Usage:
    holds: int = 0
    fds: int = 0


REMEMBERED = 256  # answers a uid that have arrived, as far as is known
UNSETTLED = 4096  # answers a uid that may not have arrived
REMEMBERED_FOR = 300.0  # s


class _Answers:
    """The first answers to one uid's requests, by nonce, older first: (when, answer).

    Whoever goes on asking on the same connection has got the answer before; the others may be
    asked for again, however much else goes on meanwhile."""

    __slots__ = ("settled", "unsettled")

    def __init__(self) -> None:
        self.unsettled: OrderedDict[bytes, tuple[float, dict[str, Any]]] = OrderedDict()
        self.settled: OrderedDict[bytes, tuple[float, dict[str, Any]]] = OrderedDict()

    def get(self, nonce: bytes) -> tuple[float, dict[str, Any]] | None:
        return self.unsettled.get(nonce) or self.settled.get(nonce)

    def prune(self, now: float) -> None:
        for answers, most in ((self.unsettled, UNSETTLED), (self.settled, REMEMBERED)):
            while len(answers) > most or (
                answers and now - next(iter(answers.values()))[0] > REMEMBERED_FOR
            ):
                answers.popitem(last=False)


class Registry:
    """All holds, in memory. Every method but `apply` and `remember` leaves it as it was."""

    def __init__(self, quota: Quota | None = None, first_generation: int = 1) -> None:
        self.quota = quota or Quota()
        self.next_generation = first_generation
        self.blind = ""  # why there may be a record whose name nobody can read; "": there is none
        self._by_key: dict[Key, tuple[Hold, ...]] = {}
        self._by_generation: dict[int, Hold] = {}
        self._usage: dict[int, Usage] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._answers: dict[int, _Answers] = {}

    # Looking

    def __iter__(self) -> Iterator[Hold]:
        return iter(self._by_generation.values())

    def __len__(self) -> int:
        return len(self._by_generation)

    def of(self, key: Key) -> tuple[Hold, ...]:
        """The records of one name, older first: at most one of them was ever committed."""
        return self._by_key.get(key, ())

    def get(self, generation: int) -> Hold | None:
        return self._by_generation.get(generation)

    def top(self, key: Key) -> Hold:
        """The record that speaks for a name. Raises NotHeld, or Busy when nobody can know."""
        records = self.of(key)
        if not records:
            self._check_blind(key)
            raise NotHeld(f"nothing is held under {key[1]!r}")
        return records[-1]

    def _check_blind(self, key: Key) -> None:
        """Of a name without a record. Raises Busy when it may have one that is out of sight."""
        if self.blind and not self.of(key):
            raise Busy(
                f"{key[1]!r} may be held, out of this cprd's sight: {self.blind}; run the newer"
                " cprd again (docs/operations.md: blind)"
            )

    def usage(self, uid: int) -> Usage:
        return self._usage.get(uid, Usage())

    def usages(self) -> dict[int, Usage]:
        return self._usage

    def next_deadline(self) -> float | None:
        """When `expire` has to be called next."""
        while self._deadlines:
            at, generation = self._deadlines[0]
            hold = self._by_generation.get(generation)
            if hold is not None and _deadline(hold) == at:
                return at
            heapq.heappop(self._deadlines)
        return None

    # Saving

    def save(
        self,
        now: float,
        peer: Peer,
        key: Key,
        *,
        nonce: bytes,
        fds: int,
        size: int,
        parked: int = 0,
        if_exists: str = "error",
        ttl: float | None = None,
        after_exit: int = -1,
        token: bytes = b"",
        prepare: bool = False,
    ) -> Step:
        """save, or with `prepare` (and a token) its first half.

        Raises AlreadyHeld, Busy, LimitExceeded."""
        again = self._recall(peer.uid, nonce)
        if again is not None:
            return again
        for hold in self.of(key):
            if nonce and hold.born == nonce:
                if prepare and not hold.token:
                    raise Fenced(
                        f"the prepared save on {key[1]!r} is over: it is {hold.phase} by now"
                    )
                return Step(answer=_saved(hold), remembered=True)
        replaced = self._replaced(now, key, peer, after_exit, if_exists)
        self._check_quota(key[0], fds, () if prepare else replaced)
        hold = Hold(
            uid=key[0],
            name=key[1],
            generation=self.next_generation,
            phase=TRANSITIONS[NOTHING, "prepare" if prepare else "save"],
            fds=fds,
            size=size,
            parked=parked,
            created=now,
            expires=_expires(now, ttl, runs=not prepare and after_exit < 0),
            ttl_left=_waiting(ttl, runs=not prepare and after_exit < 0),
            saver=peer.pid,
            after_exit=after_exit,
            token=token if prepare else b"",
            born=nonce,
            last=nonce,
        )
        return Step(
            answer=_saved(hold),
            ended=() if prepare else _replacing(replaced),
            put=(hold,),
            nonce=nonce,
            uid=peer.uid,
        )

    def _replaced(
        self, now: float, key: Key, peer: Peer, predecessor: int, if_exists: str
    ) -> tuple[Hold, ...]:
        """What a new hold under this name would end. Raises AlreadyHeld or Busy."""
        self._check_blind(key)  # it would be over one that comes to light again, and end it
        for hold in self.of(key):
            if (
                hold.phase == IN_DOUBT
                and hold.acting > 0
                and hold.acting in (peer.pid, predecessor)
            ):
                continue
            if if_exists != "replace":
                raise AlreadyHeld(
                    f"{key[1]!r} is held already ({hold.phase}, generation {hold.generation}); save"
                    ' with if_exists="replace" (--replace), or drop it first'
                )
            mine = hold.phase == CLAIMED or (hold.phase == IN_DOUBT and hold.begun)
            if hold.phase == HELD or (mine and 0 < hold.claimant == peer.pid):
                continue
            raise Busy(f"{key[1]!r} cannot be replaced: {why_not(hold, now)}")
        return self.of(key)

    def _check_quota(self, uid: int, fds: int, replaced: tuple[Hold, ...]) -> None:
        usage = self.usage(uid)
        if usage.holds - len(replaced) + 1 > self.quota.holds:
            raise LimitExceeded(
                f"uid {uid} has {usage.holds} holds; the quota is {self.quota.holds}: drop some, or"
                " raise limits.holds in cprd's configuration"
            )
        total = usage.fds - sum(hold.fds for hold in replaced) + fds
        if total > self.quota.fds:
            raise LimitExceeded(
                f"uid {uid} would have {total} descriptors held; the quota is {self.quota.fds}:"
                " drop holds, or raise limits.fds in cprd's configuration"
            )

    def commit(
        self, now: float, peer: Peer, key: Key, generation: int, token: bytes, nonce: bytes
    ) -> Step:
        """prepared -> held; what it replaces ends. Raises Fenced."""
        hold = self._by_generation.get(generation)
        if hold is not None and nonce and hold.last == nonce:
            return Step(answer=_saved(hold), remembered=True)
        again = self._recall(peer.uid, nonce)
        if again is not None:
            return again
        hold = self._mine(key, generation, token, (PREPARED,), "prepared save")
        older = tuple(other for other in self.of(key) if other.generation < generation)
        new = replace(
            hold,
            phase=TRANSITIONS[PREPARED, "commit"],
            token=b"",
            expires=_expires(now, hold.ttl_left, runs=hold.after_exit < 0),
            ttl_left=_waiting(hold.ttl_left, runs=hold.after_exit < 0),
            last=nonce,
        )
        return Step(
            answer=_saved(new), ended=_replacing(older), put=(new,), nonce=nonce, uid=peer.uid
        )

    def abort(
        self, now: float, peer: Peer, key: Key, generation: int, token: bytes, nonce: bytes
    ) -> Step:
        """prepared -> gone. Raises Fenced."""
        del now
        again = self._recall(peer.uid, nonce)
        if again is not None:
            return again
        hold = self._mine(key, generation, token, (PREPARED,), "prepared save")
        return _end(hold, "abort", nonce=nonce, uid=peer.uid)

    def saver_gone(self, generation: int) -> Step:
        """The process (or connection) of a prepared save ended: in doubt."""
        hold = self._by_generation.get(generation)
        if hold is None or hold.phase != PREPARED:
            return Step()
        return Step(
            put=(
                replace(
                    hold,
                    phase=TRANSITIONS[PREPARED, "saver gone"],
                    token=b"",
                    reason=f"its saver ({_pid(hold.saver)}) ended between prepare and commit",
                ),
            )
        )

    def predecessor_gone(self, now: float, generation: int) -> Step:
        """The process that `after_exit` names has ended: what is held can be loaded, and its ttl
        runs."""
        hold = self._by_generation.get(generation)
        if hold is None or hold.after_exit < 0:
            return Step()
        new = replace(hold, after_exit=-1)
        if hold.phase == HELD and hold.expires is None:
            new = replace(new, expires=_expires(now, hold.ttl_left, runs=True), ttl_left=None)
        return Step(put=(new,))

    # Loading

    def load(
        self,
        now: float,
        peer: Peer,
        key: Key,
        *,
        token: bytes,
        nonce: bytes,
        lease: float,
        generation: int | None = None,
    ) -> Step:
        """Claim what is held. Raises NotHeld, Busy, Fenced (it has another generation)."""
        hold = self.check_load(now, key, peer, nonce)
        if hold.phase == CLAIMED:
            return Step(answer=_loaded(hold, hold.last_claimant), remembered=True)
        if generation is not None and hold.generation != generation:
            raise Fenced(
                f"{key[1]!r} has generation {hold.generation} by now; {generation} was asked for"
            )
        new = replace(
            hold,
            phase=TRANSITIONS[HELD, "load"],
            attempts=hold.attempts + 1,
            claimant=peer.pid,
            token=token,
            lease=lease,
            deadline=now + lease,
            expires=None,
            ttl_left=None if hold.expires is None else max(0.0, hold.expires - now),
            last=nonce,
        )
        return Step(answer=_loaded(new, hold.last_claimant), put=(new,))

    def check_load(
        self, now: float, key: Key, peer: Peer | None = None, nonce: bytes = b""
    ) -> Hold:
        """The hold that a load would get now (or, for a repeated load, already has).

        Raises what a load would raise: NotHeld, Busy, Damaged."""
        records = self.of(key)
        top = self.top(key)
        repeated = nonce and top.phase == CLAIMED and top.last == nonce
        if repeated and peer is not None and top.claimant == peer.pid:
            return top
        for hold in reversed(records):
            why = why_not(hold, now)
            if why:
                kind = Damaged if hold.phase == DAMAGED else Busy
                raise kind(f"{key[1]!r} is held, and cannot be loaded now: {why}")
        return top

    def renew(
        self, now: float, key: Key, generation: int, token: bytes, lease: float | None
    ) -> Step:
        """Begin the lease anew. Raises Fenced."""
        hold = self._mine(key, generation, token, (CLAIMED, IN_DOUBT), "claim")
        if hold.phase == IN_DOUBT:
            return Step(answer={"lease": 0.0})
        lease = hold.lease if lease is None else lease
        return Step(
            answer={"lease": lease}, put=(replace(hold, lease=lease, deadline=now + lease),)
        )

    def begin(
        self,
        now: float,
        peer: Peer,
        key: Key,
        generation: int,
        token: bytes,
        nonce: bytes,
        acting: int = 0,
    ) -> Step:
        """From here on acting cannot be undone: in doubt, until confirm. Raises Fenced."""
        del now
        hold = self._by_generation.get(generation)
        if hold is not None and nonce and hold.last == nonce and hold.token == token:
            return Step(answer={}, remembered=True)
        hold = self._mine(key, generation, token, (CLAIMED, IN_DOUBT), "claim")
        acting = acting or hold.acting
        who = f"; {_pid(acting)} acts on it" if acting else ""
        new = replace(
            hold,
            phase=TRANSITIONS[hold.phase, "begin"],
            begun=True,
            acting=acting,
            last_claimant=0,
            deadline=0.0,
            reason=f"{_pid(hold.claimant)} has begun to act on it and has not confirmed{who}",
            last=nonce,
        )
        return Step(put=(new,), nonce=nonce, uid=peer.uid)

    def acting_gone(self, generation: int) -> Step:
        """The process that `begin` named has ended; its pid means nothing any more."""
        hold = self._by_generation.get(generation)
        if hold is None or not hold.acting:
            return Step()
        reason = f"{hold.reason}; {_pid(hold.acting)} has ended since"
        return Step(put=(replace(hold, acting=0, reason=reason),))

    def confirm(
        self, now: float, peer: Peer, key: Key, generation: int, token: bytes, nonce: bytes
    ) -> Step:
        """The point of no return: the hold ends. Raises Fenced."""
        del now
        again = self._recall(peer.uid, nonce)
        if again is not None:
            return again
        hold = self._mine(key, generation, token, (CLAIMED, IN_DOUBT), "claim")
        return _end(hold, "confirm", nonce=nonce, uid=peer.uid)

    def confirm_next(
        self,
        now: float,
        peer: Peer,
        key: Key,
        generation: int,
        token: bytes,
        nonce: bytes,
        *,
        fds: int,
        size: int,
        parked: int = 0,
        ttl: float | None,
        after_exit: int,
    ) -> Step:
        """Confirm, and hold the successor's own next state in the same step."""
        for hold in self.of(key):
            if nonce and hold.born == nonce:
                return Step(answer=_saved(hold), remembered=True)
        again = self._recall(peer.uid, nonce)
        if again is not None:
            return again
        hold = self._mine(key, generation, token, (CLAIMED, IN_DOUBT), "claim")
        for newer in self.of(key):
            if newer.generation > generation:  # it would end up under what it is newer than
                raise Busy(f"{key[1]!r} cannot be held anew: {why_not(newer, now)}")
        self._check_quota(key[0], fds, (hold,))
        new = Hold(
            uid=key[0],
            name=key[1],
            generation=self.next_generation,
            phase=TRANSITIONS[NOTHING, "save"],
            fds=fds,
            size=size,
            parked=parked,
            created=now,
            expires=_expires(now, ttl, runs=after_exit < 0),
            ttl_left=_waiting(ttl, runs=after_exit < 0),
            saver=peer.pid,
            after_exit=after_exit,
            born=nonce,
            last=nonce,
        )
        return Step(
            answer=_saved(new),
            ended=(Ended(hold, "confirm next"),),
            put=(new,),
            nonce=nonce,
            uid=peer.uid,
        )

    def reject(
        self,
        now: float,
        peer: Peer,
        key: Key,
        generation: int,
        token: bytes,
        nonce: bytes,
        why: str,
    ) -> Step:
        """The claimant gives it back, whole, for another to try. Raises Fenced."""
        hold = self._by_generation.get(generation)
        if hold is not None and nonce and hold.last == nonce and hold.phase == HELD:
            return Step(answer={}, remembered=True)
        again = self._recall(peer.uid, nonce)
        if again is not None:
            return again
        hold = self._mine(key, generation, token, (CLAIMED, IN_DOUBT), "claim")
        new = self._back(now, hold, "reject", why or "rejected without a reason", nonce)
        return Step(put=(new,), nonce=nonce, uid=peer.uid)

    def claimant_gone(self, now: float, generation: int, token: bytes, how: str) -> Step:
        """The claim's connection or process ended without confirm: the hold goes back, unless the
        claimant had begun to act: then it stays in doubt and says so."""
        hold = self._by_generation.get(generation)
        if hold is None or hold.token != token or hold.phase not in (CLAIMED, IN_DOUBT):
            return Step()
        if hold.phase == CLAIMED:
            why = f"{_pid(hold.claimant)} did not confirm: {how}"
            return Step(put=(self._back(now, hold, "claimant gone", why, b""),))
        if not hold.claimant and hold.last_claimant:
            return Step()  # said already
        who = f"; {_pid(hold.acting)} acts on it" if hold.acting else ""
        reason = f"{_pid(hold.claimant)} began to act on it, and then {how}, unconfirmed{who}"
        new = replace(
            hold,
            phase=TRANSITIONS[IN_DOUBT, "claimant gone"],
            reason=reason,
            claimant=0,
            last_claimant=hold.claimant,
        )
        return Step(put=(new,))

    def _back(self, now: float, hold: Hold, event: str, why: str, nonce: bytes) -> Hold:
        return replace(
            hold,
            phase=TRANSITIONS[hold.phase, event],
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
            ttl_left=_waiting(hold.ttl_left, runs=hold.after_exit < 0),
            last=nonce,
        )

    def expire(self, now: float) -> Step | None:
        """The first lease or ttl that is over, or None. To be called again after applying it."""
        at = self.next_deadline()
        if at is None or at > now:
            return None
        hold = self._by_generation[self._deadlines[0][1]]
        if hold.phase == CLAIMED:
            why = f"{_pid(hold.claimant)} did not confirm: its lease of {hold.lease:g} s is over"
            return Step(put=(self._back(now, hold, "lease over", why, b""),))
        return _end(hold, "ttl over")

    # By hand

    def drop(self, now: float, peer: Peer, key: Key, *, force: bool, nonce: bytes) -> Step:
        """End it without a successor. Raises NotHeld, Busy (force is needed, or no use)."""
        again = self._recall(peer.uid, nonce)
        if again is not None:
            return again
        hold = self.top(key)
        event = "drop" if hold.phase == HELD else "drop by force"
        if (hold.phase, event) not in TRANSITIONS:
            raise Busy(
                f"{key[1]!r} cannot be dropped: {why_not(hold, now)}; end that process, then drop"
                " it by force"
            )
        if event == "drop by force" and not force:
            raise Busy(f"{key[1]!r} is dropped only by force (--force): {why_not(hold, now)}")
        return _end(hold, event, nonce=nonce, uid=peer.uid, answer={"generation": hold.generation})

    def release(self, now: float, peer: Peer, key: Key, *, force: bool, nonce: bytes) -> Step:
        """in doubt -> held, for whoever knows that nothing acted. Raises NotHeld, Busy."""
        again = self._recall(peer.uid, nonce)
        if again is not None:
            return again
        hold = self.top(key)
        if hold.phase == HELD:
            return Step(answer={"generation": hold.generation}, remembered=True)
        if (hold.phase, "release by force") not in TRANSITIONS:
            instead = {
                PREPARED: "; wait until it commits or aborts, or end it: then this is in doubt, and"
                " can be released",
                CLAIMED: "; should it reject, or end, this is served again without a release",
            }.get(hold.phase, "")
            raise Busy(f"{key[1]!r} cannot be released: {why_not(hold, now)}{instead}")
        if not force:
            raise Busy(f"{key[1]!r} is released only by force (--force): {why_not(hold, now)}")
        new = self._back(now, hold, "release by force", f"released by force: {hold.reason}", nonce)
        older = tuple(other for other in self.of(key) if other.generation < hold.generation)
        return Step(
            answer={"generation": hold.generation},
            ended=_replacing(older),
            put=(new,),
            nonce=nonce,
            uid=peer.uid,
        )

    def found_damaged(self, generation: int, why: str) -> Step:
        """What is held is not whole any more: never served again."""
        hold = self._by_generation.get(generation)
        if hold is None or (hold.phase, "found damaged") not in TRANSITIONS:
            return Step()
        phase = TRANSITIONS[hold.phase, "found damaged"]
        new = replace(
            hold,
            phase=phase,
            reason=why[:1024],
            token=b"",
            deadline=0.0,
            expires=None,
            claimant=0,
            last_claimant=hold.claimant or hold.last_claimant,
        )
        return Step(put=(new,))

    # Changing

    def apply(self, step: Step, now: float) -> None:
        """Make a step true. The caller has written it down before."""
        for ended in step.ended:
            self._remove(ended.hold)
        for hold in step.put:
            old = self._by_generation.get(hold.generation)
            if old is not None:
                self._remove(old)
            self._add(hold)
        if step.nonce:
            self.remember(step.uid, step.nonce, step.answer, now)

    def _add(self, hold: Hold) -> None:
        records = [*self.of(hold.key), hold]
        records.sort(key=lambda record: record.generation)
        self._by_key[hold.key] = tuple(records)
        self._by_generation[hold.generation] = hold
        usage = self._usage.setdefault(hold.uid, Usage())
        usage.holds += 1
        usage.fds += hold.fds
        self.next_generation = max(self.next_generation, hold.generation + 1)
        at = _deadline(hold)
        if at is not None:
            heapq.heappush(self._deadlines, (at, hold.generation))
            if len(self._deadlines) > 64 + 4 * len(self._by_generation):
                self._deadlines = [
                    (when, record.generation)
                    for record in self
                    if (when := _deadline(record)) is not None
                ]
                heapq.heapify(self._deadlines)

    def _remove(self, hold: Hold) -> None:
        generation = hold.generation
        old = self._by_generation.pop(generation, None)
        if old is None:
            return
        rest = tuple(record for record in self.of(old.key) if record.generation != generation)
        if rest:
            self._by_key[old.key] = rest
        else:
            del self._by_key[old.key]
        usage = self._usage[old.uid]
        usage.holds -= 1
        usage.fds -= old.fds
        if not usage.holds:
            del self._usage[old.uid]

    def adopt(self, holds: Iterable[Hold]) -> list[Hold]:
        """Take over the records that an earlier daemon left. Returns those that are over: older
        than a committed one of the same name (the daemon died between writing the new one
        and ending the old one)."""
        over: list[Hold] = []
        for hold in sorted(holds, key=lambda record: record.generation):
            committed = hold.phase in (HELD, CLAIMED) or (hold.phase == IN_DOUBT and hold.begun)
            if committed:
                for older in self.of(hold.key):
                    if older.phase != UNREADABLE:
                        self._remove(older)
                        over.append(older)
            self._add(hold)
        return over

    def remember(self, uid: int, nonce: bytes, answer: dict[str, Any], now: float) -> None:
        """Keep the first answer of a request for a while, should it be repeated."""
        answers = self._answers.setdefault(uid, _Answers())
        answers.unsettled[nonce] = (now, answer)
        answers.prune(now)

    def settled(self, uid: int, nonce: bytes) -> None:
        """Its answer has arrived. It is remembered for a while all the same."""
        answers = self._answers.get(uid)
        found = answers.unsettled.pop(nonce, None) if answers is not None else None
        if answers is not None and found is not None:
            answers.settled[nonce] = found
            answers.prune(found[0])

    def forget_old(self, now: float) -> None:
        """Forget answers that nobody has asked for in time; to be called now and then."""
        for uid, answers in list(self._answers.items()):
            answers.prune(now)
            if not answers.unsettled and not answers.settled:
                del self._answers[uid]

    def _recall(self, uid: int, nonce: bytes) -> Step | None:
        answers = self._answers.get(uid)
        found = answers.get(nonce) if answers is not None and nonce else None
        return None if found is None else Step(answer=found[1], remembered=True)

    def _mine(
        self, key: Key, generation: int, token: bytes, phases: tuple[str, ...], what: str
    ) -> Hold:
        """The hold that this token speaks for. Raises Fenced, with what came in between."""
        hold = self._by_generation.get(generation)
        if hold is None or hold.key != key:
            raise Fenced(f"the {what} on {key[1]!r} is over: generation {generation} has ended")
        if not token or hold.token != token or hold.phase not in phases:
            why = hold.reason if hold.phase != HELD else hold.last_reject
            raise Fenced(
                f"the {what} on {key[1]!r} is over: it is {hold.phase} now"
                + (f" ({why})" if why else "")
            )
        return hold


def _deadline(hold: Hold) -> float | None:
    if hold.phase == CLAIMED:
        return hold.deadline
    return hold.expires if hold.phase == HELD else None


def _expires(now: float, ttl: float | None, *, runs: bool) -> float | None:
    """When a ttl is over. A ttl runs while the hold is served, and so neither before the commit nor
    as long as the predecessor lives."""
    return now + ttl if runs and ttl is not None else None


def _waiting(ttl: float | None, *, runs: bool) -> float | None:
    """What is left of a ttl that does not run."""
    return None if runs else ttl


def _saved(hold: Hold) -> dict[str, Any]:
    return {"generation": hold.generation, "token": hold.token}


def _loaded(hold: Hold, last_claimant: int) -> dict[str, Any]:
    return {
        "generation": hold.generation,
        "token": hold.token,
        "attempts": hold.attempts,
        "last_reject": hold.last_reject,
        "last_claimant": last_claimant,
        "lease": hold.lease,
        "fds": hold.fds,
    }


def _end(
    hold: Hold,
    event: str,
    *,
    nonce: bytes = b"",
    uid: int = 0,
    answer: dict[str, Any] | None = None,
) -> Step:
    assert TRANSITIONS[hold.phase, event] == NOTHING
    return Step(answer=answer or {}, ended=(Ended(hold, event),), nonce=nonce, uid=uid)


def _replacing(holds: tuple[Hold, ...]) -> tuple[Ended, ...]:
    """The events by which a new hold of the same name ends these."""
    return tuple(Ended(hold, _replaced_by(hold)) for hold in holds)


def _replaced_by(hold: Hold) -> str:
    if hold.phase == CLAIMED:
        return "confirm next"  # only the claimant itself gets so far
    if hold.phase == IN_DOUBT and hold.acting:
        return "saved by the acting process"
    return "replace"

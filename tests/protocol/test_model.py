"""The life cycle against a plain model of it, driven by hypothesis through thousands of steps.

The model knows the design's table and nothing of the code: small mutable records, one rule after
another. After every step both must tell the same story, also across a restart from the records, and
across a death between writing a new record and ending the old one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from cprd.errors import AlreadyHeld, Busy, CprdError, Damaged, Fenced, LimitExceeded, NotHeld
from cprd.protocol import holds, living
from cprd.protocol.holds import Quota
from cprd.protocol.lifecycle import Hold
from cprd.protocol.registry import Caller, Offer, Registry, Step
from cprd.protocol.registry import Ticket as Shown

UID = 1000
NAMES = ("a", "b")
QUOTA = Quota(holds=4, fds=45)
EXAMPLES, STEPS = 350, 60
MOST_DEATHS = 1
NOTED = ("uid", "name", "generation", "created", "ttl_left", "took", "deaths")
steps_taken = 0


@dataclasses.dataclass
class Record:
    """What the design says of a record."""

    generation: int
    phase: str
    fds: int
    ttl: float | None  # what is left of it while it does not run
    expires: float | None = None
    after: int | None = None
    claimant: int | None = None
    claim_pid: int = 0  # the claimant that is told of later
    token: bytes = b""
    lease: float = 0.0
    lease_ends: float = 0.0
    acting: int | None = None
    begun: bool = False
    attempts: int = 0
    live: bool = False
    away: bool = False  # cprd, which kept in memory only, has ended since
    owner: int | None = None
    taking_over: bool = False  # claimed to become live
    took: int = 0
    created: float = 0.0
    deaths: int = 0

    def serve_again(self, now: float) -> None:
        self.phase = "held"
        self.claimant = self.acting = None
        self.begun = self.taking_over = False
        self.owner = None
        self.token = b""
        self.run_ttl(now)

    def run_ttl(self, now: float) -> None:
        """It runs from when what is held can be loaded."""
        if self.after is None and self.ttl is not None:
            self.expires, self.ttl = now + self.ttl, None


@dataclasses.dataclass
class Ticket:
    kind: str  # "claim", "prepared" or "owner"
    name: str
    generation: int
    token: bytes
    slot: int  # whose: the number of a peer


def action(verb: str, weight: int, **arguments: Any) -> list[Any]:
    # one_of takes the same strategy only once, however often it is named
    return [st.tuples(st.just(verb), st.fixed_dictionaries(arguments)) for _ in range(weight)]


TICKET = st.integers(0, 5)
SLOT = st.integers(0, 3)
NAME = st.sampled_from(NAMES)
FDS = st.integers(0, 14)
FLAG = st.booleans()
ACTIONS = st.one_of(
    *action(
        "save",
        5,
        name=NAME,
        slot=st.integers(0, 7),  # above 3: whoever claims, as often as everybody else together
        replace=st.sampled_from([False, True, True]),
        prepare=st.sampled_from([False, False, True]),
        fds=FDS,
        ttl=st.sampled_from([None, None, 7.0, 40.0]),
        after=st.sampled_from([None, None, None, None, None, "self", "acting", 0]),
    ),
    *action("commit_or_abort", 3, choice=TICKET, commit=FLAG),
    *action("load", 9, name=NAME, slot=SLOT, lease=st.sampled_from([5.0, 30.0])),
    *action("renew", 1, choice=TICKET, lease=st.sampled_from([None, 9.0])),
    *action("begin", 3, choice=TICKET, acting=st.sampled_from([None, 0, 1, 2])),
    *action("confirm", 5, choice=TICKET, next=FLAG, fds=FDS, after=FLAG),
    *action("reject", 2, choice=TICKET),
    *action("live", 4, name=NAME, slot=SLOT),
    *action("confirm_live", 5, choice=TICKET),
    *action("put_back", 2, choice=TICKET),
    *action("end_live", 2, choice=TICKET, keep=FLAG),
    *action("count", 1, name=NAME, segments=st.integers(0, 2), fds=FDS),
    *action("the_daemon_dies_with_its_memory", 1),
    *action("drop", 1, name=NAME, force=FLAG),
    *action("release", 1, name=NAME, force=FLAG),
    *action("find_damage", 1, name=NAME, seldom=st.integers(0, 9)),
    *action("process_ends", 3, slot=SLOT, both_ends=FLAG),
    *action("connection_ends", 1, choice=TICKET, kind=st.sampled_from(["claim", "prepared"])),
    *action("time_passes", 2, seconds=st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0, 9.0, 31.0])),
    *action("the_answer_was_lost", 3),
    *action("the_daemon_restarts", 1),
    *action("the_daemon_dies_in_its_next_step", 1),
)
"""One rule for all of them: hypothesis leaves out rules, and few lives are led without a save."""


def shown(ticket: Ticket) -> Shown:
    return Shown((UID, ticket.name), ticket.generation, ticket.token)


class LifeCycle(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.registry = Registry(QUOTA, first_generation=1)
        self.model: dict[str, list[Record]] = {name: [] for name in NAMES}
        self.pids = [11, 12, 13, 14]
        self.next_pid = 20
        self.nonces = 0
        self.tickets: list[Ticket] = []
        self.generations: set[int] = set()
        self.confirmed: set[int] = set()
        self.again: tuple[Callable[[], Step], dict[str, Any]] | None = None
        self.crash = False
        self.restarts = 0

    # Asking the registry, and holding it to what the model expects

    def nonce(self) -> bytes:
        self.nonces += 1
        return self.nonces.to_bytes(16, "big")

    def caller(self, pid: int) -> Caller:
        nonce = self.nonce()
        return Caller(UID, pid, self.now, nonce, b"of" + nonce)

    def ask(
        self, verb: Callable[[], Step], expected: type[CprdError] | None
    ) -> dict[str, Any] | None:
        """The answer, or None when it was refused as expected."""
        before = list(self.registry)
        try:
            step = verb()
        except CprdError as error:
            refused: type[CprdError] | None = type(error)
        else:
            refused = None
        assert refused is expected
        assert list(self.registry) == before, "a verb changed something before it was applied"
        if refused is not None:
            return None
        crashed = self.crash
        self.apply(step)
        # A record has the reply to the request that made it; other replies lie on the shelf.
        self.again = (verb, step.answer) if step.put or not crashed else None
        return step.answer

    def apply(self, step: Step) -> None:
        for hold in step.put:
            if self.registry.get(hold.generation) is None:
                assert hold.generation not in self.generations, "a generation was used again"
                self.generations.add(hold.generation)
        if not self.crash:
            self.registry.apply(step)
            return
        self.crash = False
        records = {hold.generation: hold for hold in self.registry}
        if step.put:  # written; and the daemon dies before it ends what this replaces
            records.update({hold.generation: hold for hold in step.put})
        else:
            for ended in step.ended:
                del records[ended.hold.generation]
        self.start_anew(list(records.values()))
        if step.put and step.reply is not None:  # lies in the record that was written
            self.registry.replies.remember(step.reply)

    def start_anew(self, records: list[Any]) -> None:
        self.restarts += 1  # the boot clock, which the first generation comes from, went on
        self.registry = Registry(QUOTA, first_generation=1000 * self.restarts)
        self.registry.adopt(reversed(records))
        self.again = None

    @rule(what=ACTIONS)
    def go_on(self, what: tuple[str, dict[str, Any]]) -> None:
        global steps_taken
        verb, arguments = what
        if ("choice" in arguments and not self.tickets) or (
            verb == "the_answer_was_lost" and self.again is None
        ):
            return
        steps_taken += 1
        getattr(self, verb)(**arguments)

    # The model's own reading of the design

    def every(self) -> Iterator[tuple[str, Record]]:
        for name, records in self.model.items():
            for record in records:
                yield name, record

    def find(self, ticket: Ticket) -> Record | None:
        for record in self.model[ticket.name]:
            if record.generation == ticket.generation and record.token == ticket.token:
                return record
        return None

    def end(self, name: str, record: Record) -> None:
        self.model[name].remove(record)

    def may_load(self, name: str) -> type[CprdError] | None:
        records = self.model[name]
        if not records:
            return NotHeld
        for record in reversed(records):
            if record.phase == "damaged":
                return Damaged
            if record.phase != "held" or record.after is not None:
                return Busy
        return None

    def may_save(self, name: str, pid: int, after: int | None, *, replace: bool) -> Any:
        in_the_way = [
            record
            for record in self.model[name]
            if not (
                record.phase == "in-doubt"
                and record.acting is not None
                and record.acting in (pid, after)
            )
        ]
        if in_the_way and not replace:
            return AlreadyHeld
        for record in in_the_way:
            mine = record.phase == "claimed" or (record.phase == "in-doubt" and record.begun)
            if record.phase != "held" and not (mine and record.claimant == pid):
                return Busy
        return None

    def over_quota(self, fds: int, replaced: list[Record]) -> bool:
        rest = [record for _, record in self.every() if record not in replaced]
        too_many = len(rest) + 1 > QUOTA.holds
        return too_many or sum(record.fds for record in rest) + fds > QUOTA.fds

    # Rules: saving

    def save(
        self,
        name: str,
        slot: int,
        *,
        replace: bool,
        prepare: bool,
        fds: int,
        ttl: float | None,
        after: Any,
    ) -> None:
        claimants = [r.claimant for r in self.model[name] if r.claimant in self.pids]
        slot = self.pids.index(claimants[0]) if slot > 3 and claimants else slot % 4
        pid = self.pids[slot]
        if after == "self":
            after = pid
        elif after == "acting":
            after = next((r.acting for r in self.model[name] if r.acting is not None), None)
        elif after is not None:
            after = self.pids[after]
        replaced = [] if prepare else list(self.model[name])
        expected = self.may_save(name, pid, after, replace=replace)
        if expected is None and self.over_quota(fds, replaced):
            expected = LimitExceeded
        token, caller = (self.nonce() if prepare else b""), self.caller(pid)
        offer = Offer(fds, 0, ttl=ttl, after_exit=-1 if after is None else after)
        answer = self.ask(
            lambda: self.registry.save(caller, (UID, name), offer, replacing=replace, token=token),
            expected,
        )
        if answer is None:
            return
        self.new(name, answer["generation"], fds, ttl, after)
        record = self.model[name][-1]
        if prepare:
            record.phase, record.token, record.ttl, record.expires = "prepared", token, ttl, None
            self.tickets.append(Ticket("prepared", name, record.generation, token, slot))
        else:
            self.model[name] = [record]

    def new(self, name: str, generation: int, fds: int, ttl: float | None, after: Any) -> None:
        record = Record(generation, "held", fds, ttl=ttl, after=after)
        record.run_ttl(self.now)
        self.model[name].append(record)

    def ticket(self, choice: int, kind: str = "claim") -> Ticket:
        """Mostly one that still speaks for something; sometimes one of long ago."""
        alive = [t for t in self.tickets if self.find(t) is not None and t.kind == kind]
        few = alive if alive and choice < 5 else self.tickets
        return few[-1 - choice % min(len(few), 6)]

    def commit_or_abort(self, choice: int, commit: bool) -> None:
        ticket = self.ticket(choice, "prepared")
        record = self.find(ticket)
        expected = None if record is not None and record.phase == "prepared" else Fenced
        caller, by = self.caller(self.pids[ticket.slot]), shown(ticket)

        def verb() -> Step:
            ask = self.registry.commit if commit else self.registry.abort
            return ask(caller, by)

        answer = self.ask(verb, expected)
        if answer is None:
            return
        assert record is not None
        if commit:
            record.serve_again(self.now)
            self.model[ticket.name] = [record]
        else:
            self.end(ticket.name, record)

    # Rules: loading

    def held(self, name: str) -> str:
        """A name under which there is something; `name` when there is nothing at all."""
        return name if self.model[name] else next((n for n in NAMES if self.model[n]), name)

    def load(self, name: str, slot: int, lease: float) -> None:
        name = self.held(name)
        token, pid = self.nonce(), self.pids[slot]
        caller = self.caller(pid)
        answer = self.ask(
            lambda: self.registry.load(caller, (UID, name), token=token, lease=lease),
            self.may_load(name),
        )
        if answer is not None:
            self.claimed(name, slot, token, lease, answer)

    def claimed(
        self, name: str, slot: int, token: bytes, lease: float, answer: dict[str, Any]
    ) -> None:
        [record] = self.model[name]
        pid = self.pids[slot]
        assert answer["generation"] == record.generation
        assert record.generation not in self.confirmed, "served after confirm"
        record.phase, record.claimant, record.claim_pid = "claimed", pid, pid
        record.token, record.lease, record.lease_ends = token, lease, self.now + lease
        record.ttl = None if record.expires is None else max(0.0, record.expires - self.now)
        record.expires = None
        record.attempts += 1
        assert answer["attempts"] == record.attempts
        self.tickets.append(Ticket("claim", name, record.generation, token, slot))

    def claim(self, ticket: Ticket) -> tuple[Record | None, type[CprdError] | None]:
        record = self.find(ticket)
        good = record is not None and (
            record.phase == "claimed" or (record.phase == "in-doubt" and record.begun)
        )
        return record, None if good else Fenced

    def renew(self, choice: int, lease: float | None) -> None:
        ticket = self.ticket(choice)
        record, expected = self.claim(ticket)
        caller, by = self.caller(0), shown(ticket)
        answer = self.ask(lambda: self.registry.renew(caller, by, lease), expected)
        self.again = None  # it has no nonce: to renew twice is to renew
        if answer is not None and record is not None and record.phase == "claimed":
            record.lease = record.lease if lease is None else lease
            record.lease_ends = self.now + record.lease

    def begin(self, choice: int, acting: int | None) -> None:
        ticket = self.ticket(choice)
        record, expected = self.claim(ticket)
        pid = 0 if acting is None else self.pids[acting]
        caller, by = self.caller(self.pids[ticket.slot]), shown(ticket)
        answer = self.ask(lambda: self.registry.begin(caller, by, pid), expected)
        if answer is not None and record is not None:
            record.phase, record.begun = "in-doubt", True
            record.acting = pid or record.acting

    def confirm(self, choice: int, next: bool, fds: int, after: bool) -> None:
        ticket = self.ticket(choice)
        record, expected = self.claim(ticket)
        pid = self.pids[ticket.slot]
        caller, by = self.caller(pid), shown(ticket)
        if next and record is not None and expected is None:
            if self.model[ticket.name][-1] is not record:
                expected = Busy  # a prepared save of the same name would come to lie under it
            elif self.over_quota(fds, [record]):
                expected = LimitExceeded

        def verb() -> Step:
            if not next:
                return self.registry.confirm(caller, by)
            offer = Offer(fds, 0, after_exit=pid if after else -1)
            return self.registry.confirm_next(caller, by, offer)

        answer = self.ask(verb, expected)
        if answer is None or record is None:
            return
        self.confirmed.add(record.generation)
        self.end(ticket.name, record)
        if next:
            self.new(ticket.name, answer["generation"], fds, None, pid if after else None)

    # Rules: live holds

    def live(self, name: str, slot: int) -> None:
        token, pid = self.nonce(), self.pids[slot]
        caller, offer = self.caller(pid), Offer(0, 0, 1, live=True)
        found = bool(self.model[name])
        expected = self.may_load(name)
        if not found:
            expected = LimitExceeded if self.over_quota(0, []) else None
        answer = self.ask(
            lambda: living.begin_or_load(
                self.registry, caller, (UID, name), offer, token=token, lease=30.0
            ),
            expected,
        )
        if answer is None:
            return
        assert answer["found"] == found
        if found:
            self.claimed(name, slot, token, 30.0, answer)
            self.model[name][-1].taking_over = True
        else:
            self.own(name, slot, answer)

    def own(self, name: str, slot: int, answer: dict[str, Any], old: Record | None = None) -> None:
        self.new(name, answer["generation"], 0, None, None)
        record = self.model[name][-1]
        record.phase, record.token, record.live = "live", answer["token"], True
        record.owner, record.created = self.pids[slot], self.now
        if old is not None:
            record.took, record.deaths = old.generation, old.deaths
        self.tickets.append(Ticket("owner", name, record.generation, record.token, slot))

    def away(self, ticket: Ticket) -> Record | None:
        """What cprd knows of by a note alone, for its owner, also by the ticket of the claim."""
        for record in self.model[ticket.name]:
            meant = ticket.generation in (record.generation, record.took)
            if record.away and meant and record.token == ticket.token:
                return record
        return None

    def confirm_live(self, choice: int) -> None:
        ticket = self.ticket(choice)
        record, expected = self.claim(ticket)
        away = self.away(ticket)
        if away is not None:
            record, expected = away, None
        elif expected is None and self.model[ticket.name][-1] is not record:
            expected = Busy
        caller, by = self.caller(self.pids[ticket.slot]), shown(ticket)
        offer = Offer(0, 0, 1, live=True)
        answer = self.ask(lambda: living.confirm_next(self.registry, caller, by, offer), expected)
        if answer is None or record is None:
            return
        assert answer["token"] == ticket.token
        if record is away and record.generation != ticket.generation:
            record.away = False  # it was confirmed before
            assert answer["generation"] == record.generation
            return
        self.confirmed.add(record.generation)
        self.end(ticket.name, record)
        self.own(ticket.name, ticket.slot, answer, record)

    def put_back(self, choice: int) -> None:
        ticket = self.ticket(choice, "owner")
        away, record = self.away(ticket), self.find(ticket)
        there = away is not None or (record is not None and record.phase == "live")
        caller, by = self.caller(self.pids[ticket.slot]), shown(ticket)
        offer = Offer(0, 0, 1, live=True)
        verb = lambda: living.put_back(self.registry, caller, by, offer)  # noqa: E731
        answer = self.ask(verb, None if there else Fenced)
        if away is not None:
            away.away = False
            if away.generation != ticket.generation:
                self.again = None  # the ticket of a claim is for once
        if answer is not None:
            assert answer["token"] == ticket.token

    def end_live(self, choice: int, keep: bool) -> None:
        ticket = self.ticket(choice, "owner")
        away, record = self.away(ticket), self.find(ticket)
        there = record is not None and record.phase == "live" and not record.away
        expected = None if there or (away is not None and not keep) else Fenced
        caller, by = self.caller(self.pids[ticket.slot]), shown(ticket)
        answer = self.ask(lambda: living.end(self.registry, caller, by, keep=keep), expected)
        record = away or record
        if answer is None or record is None:
            return
        if not keep:
            self.end(ticket.name, record)
        else:
            record.deaths = 0
            record.phase = "held"
            record.serve_again(self.now)

    def owner_ends(self, name: str, record: Record) -> None:
        self.apply(living.owner_gone(self.registry, self.now, record.generation, "so"))
        if record.away:
            self.end(name, record)
            return
        soon = bool(record.took) and self.now - record.created < 10
        record.deaths = record.deaths + 1 if soon else 0
        if record.deaths < MOST_DEATHS:
            record.serve_again(self.now)
        else:
            record.phase, record.token, record.owner = "quarantined", b"", None

    def count(self, name: str, segments: int, fds: int) -> None:
        for record in list(self.model[name]):
            if not record.live or record.phase not in ("held", "quarantined"):
                continue
            hold = self.registry.get(record.generation)
            assert hold is not None
            self.apply(living.counted(self.registry, hold, segments, fds))
            if not segments and record.phase == "held":
                self.end(name, record)
            elif fds:
                record.fds = fds
        self.again = None

    def the_daemon_dies_with_its_memory(self) -> None:
        """Of live holds, and of claims that are to become live, there are notes."""
        notes = []
        for name, record in list(self.every()):
            hold = self.registry.get(record.generation)
            assert hold is not None
            if not (record.phase == "live" or (record.taking_over and record.claimant is not None)):
                self.end(name, record)
                continue
            token = hold.token if record.away else living.shortened(hold.token)
            known = {field: getattr(hold, field) for field in NOTED}
            saver = hold.saver if record.phase == "live" else hold.claimant
            notes.append(living.away(Hold(**known, phase="", token=token, saver=saver)))
            record.owner = record.owner if record.phase == "live" else record.claimant
            record.phase, record.live, record.away = "live", True, True
            record.claimant = record.acting = None
            record.begun = record.taking_over = False
            record.fds = record.attempts = 0
        self.crash = False
        self.start_anew(notes)

    def reject(self, choice: int) -> None:
        ticket = self.ticket(choice)
        record, expected = self.claim(ticket)
        caller, by = self.caller(self.pids[ticket.slot]), shown(ticket)
        answer = self.ask(lambda: self.registry.reject(caller, by, "so"), expected)
        if answer is not None and record is not None:
            record.serve_again(self.now)

    # Rules: by hand

    def drop(self, name: str, force: bool) -> None:
        name, caller = self.held(name), self.caller(99)
        records = self.model[name]
        expected: type[CprdError] | None = None
        if not records:
            expected = NotHeld
        elif records[-1].phase != "held" and (
            not force or records[-1].phase == "prepared" or records[-1].away
        ):
            expected = Busy
        answer = self.ask(lambda: self.registry.drop(caller, (UID, name), force=force), expected)
        if answer is not None:
            self.end(name, records[-1])

    def release(self, name: str, force: bool) -> None:
        name, caller = self.held(name), self.caller(99)
        records = self.model[name]
        expected: type[CprdError] | None = None
        if not records:
            expected = NotHeld
        elif records[-1].phase != "held" and (
            records[-1].phase not in ("in-doubt", "quarantined") or not force
        ):
            expected = Busy
        answer = self.ask(lambda: self.registry.release(caller, (UID, name), force=force), expected)
        if answer is not None and records[-1].phase != "held":
            records[-1].deaths = 0
            records[-1].serve_again(self.now)
            self.model[name] = records[-1:]

    def find_damage(self, name: str, seldom: int) -> None:
        if seldom or not self.model[name]:  # it has no way back, so that it must stay rare
            return
        record = self.model[name][-1]
        self.apply(self.registry.found_damaged(record.generation, "a part is missing"))
        if record.phase in ("held", "claimed", "in-doubt"):
            record.phase, record.token, record.expires = "damaged", b"", None
            record.claimant = None
        self.again = None

    # Rules: what happens to processes, to time and to the daemon

    def process_ends(self, slot: int, both_ends: bool) -> None:
        pid = self.pids[slot]
        self.pids[slot], self.next_pid = self.next_pid, self.next_pid + 1
        for name, record in list(self.every()):
            generation, token = record.generation, record.token
            if record.phase == "prepared" and self.is_of(generation, token, slot):
                record.phase, record.token = "in-doubt", b""
                self.apply(self.registry.saver_gone(generation))
            if record.after == pid:
                record.after = None
                if record.phase == "held":
                    record.run_ttl(self.now)
                self.apply(self.registry.predecessor_gone(self.now, generation))
            if record.claimant == pid:
                self.claimant_gone(name, record)
                if both_ends:  # its connection ends as well, and is told of second
                    gone = self.registry.claimant_gone(self.now, generation, token, "so")
                    assert not gone.put
            if record.phase == "live" and record.owner == pid:
                self.owner_ends(name, record)
            if record.acting == pid:
                record.acting = None
                self.apply(self.registry.acting_gone(generation))
        self.again = None

    def is_of(self, generation: int, token: bytes, slot: int) -> bool:
        return any(
            (ticket.generation, ticket.token, ticket.slot) == (generation, token, slot)
            for ticket in self.tickets
        )

    def claimant_gone(self, name: str, record: Record) -> None:
        step = self.registry.claimant_gone(self.now, record.generation, record.token, "so")
        self.apply(step)
        if record.phase == "claimed":
            record.serve_again(self.now)
        else:
            record.claimant = None  # and it stays in doubt

    def connection_ends(self, choice: int, kind: str) -> None:
        ticket = self.ticket(choice, kind)
        record = self.find(ticket)
        if ticket.kind == "claim":
            if record is not None and record.claimant is not None:
                self.claimant_gone(ticket.name, record)
            else:  # the late news of a claim that is over changes nothing
                assert not self.registry.claimant_gone(
                    self.now, ticket.generation, ticket.token, "so"
                ).put
        elif record is not None and record.phase == "prepared":
            record.phase, record.token = "in-doubt", b""
            self.apply(self.registry.saver_gone(ticket.generation))
        else:
            assert not self.registry.saver_gone(ticket.generation).put
        self.again = None

    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for name, record in list(self.every()):
            if record.phase == "claimed" and record.lease_ends <= self.now:
                record.serve_again(self.now)
            if record.expires is not None and record.expires <= self.now:
                self.end(name, record)
        while (step := self.registry.expire(self.now)) is not None:
            self.apply(step)
        self.again = None

    def the_answer_was_lost(self) -> None:
        """The same request, said again, gets its first answer and changes nothing."""
        assert self.again is not None
        verb, answer = self.again
        step = verb()
        assert step.answer == answer
        assert not step.put
        assert not step.ended

    def the_daemon_restarts(self) -> None:
        self.start_anew(list(self.registry))

    def the_daemon_dies_in_its_next_step(self) -> None:
        self.crash = True

    # What holds after every step

    @invariant()
    def both_tell_the_same(self) -> None:
        for name, records in self.model.items():
            found: list[tuple[Any, ...]] = [
                (
                    hold.generation,
                    hold.phase,
                    hold.fds,
                    hold.attempts,
                    hold.token,
                    None if hold.after_exit < 0 else hold.after_exit,
                    hold.claimant or None,
                    hold.acting or None,
                    hold.begun,
                    hold.live,
                    hold.away,
                    hold.deaths,
                )
                for hold in self.registry.of((UID, name))
            ]
            expected: list[tuple[Any, ...]] = [
                (
                    record.generation,
                    record.phase,
                    record.fds,
                    record.attempts,
                    living.shortened(record.token) if record.away else record.token,
                    record.after,
                    record.claimant,
                    record.acting,
                    record.begun,
                    record.live,
                    record.away,
                    record.deaths,
                )
                for record in records
            ]
            if any(record.phase == "damaged" for record in records):  # who claimed is history then
                found, expected = [row[:4] for row in found], [row[:4] for row in expected]
            assert found == expected

    @invariant()
    def one_claimant_and_one_committed_record_at_most(self) -> None:
        for name in NAMES:
            phases = [hold.phase for hold in self.registry.of((UID, name))]
            assert len(phases) <= 2
            claims = [
                hold
                for hold in self.registry.of((UID, name))
                if hold.phase == "claimed" or (hold.phase == "in-doubt" and hold.begun)
            ]
            assert len(claims) <= 1
            assert phases.count("held") + len(claims) <= 1
            # Only a save that nobody has committed lies over another record.
            if len(phases) == 2:
                assert phases[1] in ("prepared", "in-doubt", "damaged")

    @invariant()
    def what_a_load_would_get_is_what_the_design_says(self) -> None:
        for name in NAMES:
            expected = self.may_load(name)
            try:
                hold = self.registry.check_load(self.now, (UID, name))
            except CprdError as error:
                refused: type[CprdError] | None = type(error)
            else:
                refused = None
            assert refused is expected
            if refused is None:
                assert hold.generation == self.model[name][-1].generation
                assert hold.generation not in self.confirmed

    @invariant()
    def the_sums_are_right(self) -> None:
        records = [record for _, record in self.every()]
        usage = self.registry.usage(UID)
        assert usage.holds == len(records) == len(self.registry) <= QUOTA.holds
        assert usage.fds == sum(record.fds for record in records)
        if not any(record.live for record in records):  # which are counted when they end
            assert usage.fds <= QUOTA.fds
        ends = [record.lease_ends for record in records if record.phase == "claimed"]
        ends += [record.expires for record in records if record.expires is not None]
        assert self.registry.next_deadline() == (min(ends) if ends else None)


def test_ten_thousand_steps_of_the_life_cycle_agree_with_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    global steps_taken
    monkeypatch.setattr(living, "MOST_DEATHS", MOST_DEATHS)
    monkeypatch.setattr(holds, "AWAKE", 1)
    steps_taken = 0
    run_state_machine_as_test(
        LifeCycle,
        settings=hypothesis.settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            derandomize=True,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        ),
    )
    assert steps_taken >= 10_000

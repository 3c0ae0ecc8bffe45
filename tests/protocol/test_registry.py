"""The life cycle, walked verb by verb: the table as data, each verb in each phase, refusals."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, get_args

import pytest

from cprd.errors import (
    AlreadyHeld,
    Busy,
    CprdError,
    Damaged,
    Fenced,
    LimitExceeded,
    NotHeld,
    ProtocolError,
)
from cprd.protocol import living
from cprd.protocol.holds import Quota
from cprd.protocol.lifecycle import (
    CLAIMED,
    DAMAGED,
    HELD,
    IN_DOUBT,
    LIVE,
    MOST_DEATHS,
    NOTHING,
    PREPARED,
    QUARANTINED,
    TRANSITIONS,
    UNREADABLE,
    Hold,
    changed,
)
from cprd.protocol.registry import Caller, Offer, Registry, Step, Ticket
from cprd.protocol.replies import Reply
from cprd.protocol.rows import Phase

SAVER = Caller(1000, 101)
OTHER = Caller(1000, 202)
THIRD = Caller(1000, 303)
QEMU = 404
KEY = (1000, "web")


@dataclass
class World:
    """A registry with a clock that only moves when told to, and requests with nonces."""

    registry: Registry = field(default_factory=Registry)
    now: float = 1000.0
    nonces: int = 0
    owners: bytes = b"o" * 16  # token

    def nonce(self) -> bytes:
        self.nonces += 1
        return self.nonces.to_bytes(16, "big")

    def by(self, who: Caller, nonce: bytes = b"") -> Caller:
        """Who asks now, with a nonce; the request is new with each nonce."""
        nonce = nonce or self.nonce()
        return who._replace(now=self.now, nonce=nonce, digest=b"of" + nonce)

    def do(self, step: Step) -> dict[str, Any]:
        self.registry.apply(step)
        return step.answer

    @property
    def top(self) -> Hold:
        return self.registry.top(KEY)

    # The verbs, each with what is usual.

    def save(
        self,
        peer: Caller = SAVER,
        *,
        nonce: bytes = b"",
        replacing: bool = False,
        token: bytes = b"",
        fds: int = 1,
        ttl: float | None = None,
        after_exit: int = -1,
    ) -> dict[str, Any]:
        offer = Offer(fds, 0, ttl=ttl, after_exit=after_exit)
        caller = self.by(peer, nonce)
        return self.do(self.registry.save(caller, KEY, offer, replacing=replacing, token=token))

    def prepare(self, peer: Caller = SAVER, **how: Any) -> dict[str, Any]:
        return self.save(peer, token=b"p" * 16, **how)

    @property
    def prepared(self) -> Ticket:
        return Ticket(KEY, self.top.generation, b"p" * 16)

    def commit(self, peer: Caller = SAVER, nonce: bytes = b"") -> dict[str, Any]:
        return self.do(self.registry.commit(self.by(peer, nonce), self.prepared))

    def abort(self) -> None:
        self.do(self.registry.abort(self.by(SAVER), self.prepared))

    def load(
        self,
        peer: Caller = OTHER,
        token: bytes = b"c" * 16,
        *,
        nonce: bytes = b"",
        lease: float = 30.0,
        generation: int | None = None,
    ) -> dict[str, Any]:
        caller = self.by(peer, nonce)
        step = self.registry.load(caller, KEY, token=token, lease=lease, generation=generation)
        return self.do(step)

    @property
    def claim(self) -> Ticket:
        return Ticket(KEY, self.registry.of(KEY)[0].generation, b"c" * 16)

    def begin(self, acting: int = 0) -> None:
        self.do(self.registry.begin(self.by(OTHER), self.claim, acting))

    def confirm(self) -> None:
        self.do(self.registry.confirm(self.by(OTHER), self.claim))

    def confirm_next(self) -> dict[str, Any]:
        return self.do(self.registry.confirm_next(self.by(OTHER), self.claim, Offer(1, 0)))

    def live(self, peer: Caller = OTHER, nonce: bytes = b"") -> dict[str, Any]:
        caller, offer = self.by(peer, nonce), Offer(0, 0, 1, live=True)
        step = living.begin_or_load(self.registry, caller, KEY, offer, token=b"o" * 16, lease=30.0)
        return self.do(step)

    @property
    def owner(self) -> Ticket:
        return Ticket(KEY, self.registry.of(KEY)[0].generation, self.owners)

    def confirm_live(self, claim: bytes = b"c" * 16) -> dict[str, Any]:
        by, offer = Ticket(KEY, self.top.generation, claim), Offer(0, 0, 1, live=True)
        self.owners = claim
        return self.do(living.confirm_next(self.registry, self.by(OTHER), by, offer))

    def end(self, *, keep: bool) -> None:
        self.do(living.end(self.registry, self.by(OTHER), self.owner, keep=keep))

    def put_back(self) -> None:
        offer = Offer(0, 0, 1, live=True)
        self.do(living.put_back(self.registry, self.by(OTHER), self.owner, offer))

    def owner_gone(self, how: str = "killed by SIGKILL") -> None:
        step = living.owner_gone(self.registry, self.now, self.top.generation, how)
        self.do(step)

    def reject(self, why: str = "too old") -> None:
        self.do(self.registry.reject(self.by(OTHER), self.claim, why))

    def renew(self) -> None:
        self.do(self.registry.renew(self.by(OTHER), self.claim, None))

    def claimant_gone(self) -> None:
        _, generation, token = self.claim
        self.do(self.registry.claimant_gone(self.now, generation, token, "its process ended"))

    def drop(self, *, force: bool = False) -> None:
        self.do(self.registry.drop(self.by(THIRD), KEY, force=force))

    def release(self, *, force: bool = True) -> None:
        self.do(self.registry.release(self.by(THIRD), KEY, force=force))


def nothing() -> World:
    return World()


def prepared() -> World:
    world = World()
    world.prepare()
    return world


def held() -> World:
    world = World()
    world.save()
    return world


def claimed() -> World:
    world = held()
    world.load()
    return world


def begun() -> World:
    world = claimed()
    world.begin(acting=QEMU)
    return world


def vanished() -> World:
    world = prepared()
    world.do(world.registry.saver_gone(world.top.generation))
    return world


def damaged() -> World:
    world = held()
    world.do(world.registry.found_damaged(world.top.generation, "a part is missing"))
    return world


def unreadable() -> World:
    world = World()
    world.registry.adopt([Hold(1000, "web", 7, UNREADABLE, reason="version 9")])
    return world


def live() -> World:
    world = World()
    world.live()
    return world


def away() -> World:
    world = live()
    noted(world, world.top)
    return world


def claim_away() -> World:
    world = claimed()
    noted(world, changed(world.top, saver=world.top.claimant))
    return world


def noted(world: World, hold: Hold) -> None:
    """cprd, which keeps in memory only, has ended, and another cprd found the note of `hold`."""
    fields = ("uid", "name", "generation", "created", "ttl_left", "saver", "took", "deaths")
    known = {field: getattr(hold, field) for field in fields}
    note = Hold(**known, phase="", token=living.shortened(hold.token))
    world.registry = Registry(first_generation=world.registry.next_generation)
    world.registry.adopt([living.away(note)])


def quarantined() -> World:
    world = live()
    world.owner_gone()
    for _ in range(MOST_DEATHS):
        assert world.top.phase == HELD
        world.load()
        world.confirm_live()
        world.now += 9
        world.owner_gone()
    return world


STAGES: dict[str, Callable[[], World]] = {
    "nothing": nothing,
    "prepared": prepared,
    "held": held,
    "claimed": claimed,
    "begun": begun,
    "vanished": vanished,
    "live": live,
    "away": away,
    "claim away": claim_away,
    "quarantined": quarantined,
    "damaged": damaged,
    "unreadable": unreadable,
}
VERBS: dict[str, Callable[[World], object]] = {
    "save": lambda world: world.save(THIRD),
    "replace": lambda world: world.save(THIRD, replacing=True),
    "replace by claimant": lambda world: world.save(OTHER, replacing=True),
    "save by acting": lambda world: world.save(Caller(1000, QEMU)),
    "save after acting": lambda world: world.save(THIRD, after_exit=QEMU),
    "prepare": lambda world: world.prepare(THIRD),
    "commit": World.commit,
    "abort": World.abort,
    "load": lambda world: world.load(THIRD, token=b"t" * 16),
    "renew": World.renew,
    "begin": World.begin,
    "confirm": World.confirm,
    "confirm next": World.confirm_next,
    "confirm live": World.confirm_live,
    "live": World.live,
    "close": lambda world: world.end(keep=True),
    "end": lambda world: world.end(keep=False),
    "put back": World.put_back,
    "reject": World.reject,
    "drop": World.drop,
    "drop by force": lambda world: world.drop(force=True),
    "release": lambda world: world.release(force=False),
    "release by force": World.release,
}

# What each verb leads to in each stage: the phase of the name afterwards, or the error.
# ("again": held, and a new generation.)
EXPECTED: dict[str, dict[str, str | type[CprdError]]] = {
    "nothing": {
        **dict.fromkeys(("save", "replace", "replace by claimant", "save by acting"), "again"),
        "save after acting": "again",
        "prepare": PREPARED,
        "load": NotHeld,
        **dict.fromkeys(("drop", "drop by force", "release", "release by force"), NotHeld),
    },
    "prepared": {
        **dict.fromkeys(("save", "save by acting", "save after acting", "prepare"), AlreadyHeld),
        **dict.fromkeys(("replace", "replace by claimant", "load"), Busy),
        "commit": HELD,
        "abort": NOTHING,
        **dict.fromkeys(("renew", "begin", "confirm", "confirm next", "reject"), Fenced),
        **dict.fromkeys(("drop", "drop by force", "release", "release by force"), Busy),
    },
    "held": {
        **dict.fromkeys(("save", "save by acting", "save after acting", "prepare"), AlreadyHeld),
        **dict.fromkeys(("replace", "replace by claimant"), "again"),
        "load": CLAIMED,
        **dict.fromkeys(("commit", "abort"), Fenced),
        **dict.fromkeys(("renew", "begin", "confirm", "confirm next", "reject"), Fenced),
        **dict.fromkeys(("drop", "drop by force"), NOTHING),
        **dict.fromkeys(("release", "release by force"), HELD),
    },
    "claimed": {
        **dict.fromkeys(("save", "save by acting", "save after acting", "prepare"), AlreadyHeld),
        "replace": Busy,
        "replace by claimant": "again",
        "load": Busy,
        **dict.fromkeys(("commit", "abort"), Fenced),
        "renew": CLAIMED,
        "begin": IN_DOUBT,
        "confirm": NOTHING,
        "confirm next": "again",
        "reject": HELD,
        "drop": Busy,
        "drop by force": NOTHING,
        **dict.fromkeys(("release", "release by force"), Busy),
    },
    "begun": {
        **dict.fromkeys(("save", "prepare"), AlreadyHeld),
        **dict.fromkeys(("save by acting", "save after acting", "replace by claimant"), "again"),
        **dict.fromkeys(("replace", "load"), Busy),
        **dict.fromkeys(("commit", "abort"), Fenced),
        "renew": IN_DOUBT,
        "begin": IN_DOUBT,
        "confirm": NOTHING,
        "confirm next": "again",
        "reject": HELD,
        "drop": Busy,
        "drop by force": NOTHING,
        "release": Busy,
        "release by force": HELD,
    },
    "vanished": {
        **dict.fromkeys(("save", "save by acting", "save after acting", "prepare"), AlreadyHeld),
        **dict.fromkeys(("replace", "replace by claimant", "load"), Busy),
        **dict.fromkeys(("commit", "abort"), Fenced),
        **dict.fromkeys(("renew", "begin", "confirm", "confirm next", "reject"), Fenced),
        "drop": Busy,
        "drop by force": NOTHING,
        "release": Busy,
        "release by force": HELD,
    },
    **{
        stage: {
            **dict.fromkeys(
                ("save", "save by acting", "save after acting", "prepare"), AlreadyHeld
            ),
            **dict.fromkeys(("replace", "replace by claimant"), Busy),
            "load": Damaged if stage == "damaged" else Busy,
            **dict.fromkeys(("commit", "abort"), Fenced),
            **dict.fromkeys(("renew", "begin", "confirm", "confirm next", "reject"), Fenced),
            "drop": Busy,
            "drop by force": NOTHING,
            **dict.fromkeys(("release", "release by force"), Busy),
        }
        for stage in ("damaged", "unreadable")
    },
    **{
        stage: {
            **dict.fromkeys(
                ("save", "save by acting", "save after acting", "prepare"), AlreadyHeld
            ),
            **dict.fromkeys(("replace", "replace by claimant", "load"), Busy),
            **dict.fromkeys(("commit", "abort"), Fenced),
            **dict.fromkeys(("renew", "begin", "confirm", "confirm next", "reject"), Fenced),
            "drop": Busy,
            "drop by force": Busy if "away" in stage else NOTHING,
            "release": Busy,
            "release by force": HELD if stage == "quarantined" else Busy,
        }
        for stage in ("live", "away", "claim away", "quarantined")
    },
}
for stage, expected in EXPECTED.items():
    if stage != "nothing":
        owned = {"close": Fenced, "end": Fenced, "put back": Fenced}
        expected |= {**owned, "live": expected["load"], "confirm live": expected["confirm next"]}
EXPECTED["nothing"]["live"] = LIVE
EXPECTED["claimed"]["confirm live"] = EXPECTED["begun"]["confirm live"] = LIVE
EXPECTED["live"] |= {"close": HELD, "end": NOTHING, "put back": LIVE}
EXPECTED["away"] |= {"end": NOTHING, "put back": LIVE}
EXPECTED["claim away"]["confirm live"] = LIVE


def phase(world: World) -> str:
    records = world.registry.of(KEY)
    return records[-1].phase if records else NOTHING


@pytest.mark.parametrize(
    ("stage", "verb"), [(stage, verb) for stage, verbs in EXPECTED.items() for verb in verbs]
)
def test_each_verb_in_each_phase(stage: str, verb: str) -> None:
    world = STAGES[stage]()
    before = world.registry.of(KEY)
    next_generation = world.registry.next_generation
    expected = EXPECTED[stage][verb]
    if isinstance(expected, str):
        VERBS[verb](world)
        if expected == "again":
            assert phase(world) == HELD
            assert [hold.generation for hold in world.registry.of(KEY)] == [next_generation]
        else:
            assert phase(world) == expected
        return
    with pytest.raises(CprdError) as refused:
        VERBS[verb](world)
    assert type(refused.value) is expected
    assert "web" in str(refused.value)
    assert world.registry.of(KEY) == before  # a refusal changes nothing
    assert world.registry.next_generation == next_generation


def test_the_expectations_leave_no_verb_out() -> None:
    on_nothing = {"commit", "abort", "renew", "begin", "confirm", "confirm next", "reject"}
    on_nothing |= {"confirm live", "close", "end", "put back"}
    for stage, verbs in EXPECTED.items():
        assert VERBS.keys() - verbs.keys() == (on_nothing if stage == "nothing" else set())


def test_the_table_says_what_the_design_says() -> None:
    """The phases and what ends them, word for word: a change of it is meant, or wrong."""
    ends: dict[str, set[str]] = {}
    for (before, event), after in TRANSITIONS.items():
        assert before in (NOTHING, *get_args(Phase))
        assert after in (NOTHING, *get_args(Phase))
        ends.setdefault(before, set()).add(f"{event} -> {after}")
    assert ends[PREPARED] == {"commit -> held", "abort -> -", "saver gone -> in-doubt"}
    assert ends[CLAIMED] >= {
        "confirm -> -",
        "confirm next -> -",
        "reject -> held",
        "claimant gone -> held",
        "lease over -> held",
        "begin -> in-doubt",
        "drop by force -> -",
    }
    served = {how for how, after in TRANSITIONS.items() if after == CLAIMED}
    assert served == {(HELD, "load"), (CLAIMED, "renew")}
    assert ends[QUARANTINED] == {
        *("release by force -> held", "drop by force -> -", "counted -> quarantined"),
    }
    assert ends[LIVE] == {
        *("put back -> live", "close -> held", "owner gone -> held", "end -> -"),
        *("owner gone too often -> quarantined", "owner gone, and not put back -> -"),
        *("drop by force -> -", "confirm next, cprd ended -> -"),
    }
    assert {before for (before, event), _ in TRANSITIONS.items() if event == "load"} == {HELD}
    for kept in (DAMAGED, UNREADABLE):
        assert ends[kept] == {"drop by force -> -", "newer committed -> -"}
    # Nothing leaves doubt on its own: neither a death nor time.
    assert not [e for e in ends[IN_DOUBT] if re.match(r"(ttl|lease)", e)]
    assert "claimant gone -> in-doubt" in ends[IN_DOUBT]


def test_every_transition_was_reached_by_some_verb() -> None:
    """The table holds nothing that the verbs never do."""
    reached = set()
    real = dict(TRANSITIONS)

    class Noting(dict[tuple[str, str], str]):
        def __getitem__(self, key: tuple[str, str]) -> str:
            reached.add(key)
            return real[key]

    import cprd.protocol.lifecycle
    import cprd.protocol.registry

    noting = Noting(real)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cprd.protocol.lifecycle, "TRANSITIONS", noting)
        patch.setattr(cprd.protocol.registry, "TRANSITIONS", noting)
        for stage, make in STAGES.items():
            for verb in EXPECTED[stage]:
                world = make()
                try:
                    VERBS[verb](world)
                except CprdError:
                    pass
            world = make()
            for generation in [hold.generation for hold in world.registry]:
                world.do(world.registry.claimant_gone(world.now, generation, b"c" * 16, "so"))
            world = make()
            for generation in [hold.generation for hold in world.registry]:
                world.do(world.registry.found_damaged(generation, "so"))
            for generation in [hold.generation for hold in world.registry]:
                world.do(living.owner_gone(world.registry, world.now, generation, "so"))
        for over in (live, quarantined):
            world = over()
            world.owner_gone()
            world.do(living.counted(world.registry, world.top, 2, 5))
            world.do(living.counted(world.registry, world.top, 0, 0))
        world = claimed()
        world.now += 31
        step = world.registry.expire(world.now)
        assert step is not None
        world = World()
        world.save(ttl=1.0)
        world.now += 2
        assert world.registry.expire(world.now) is not None
        for over in (begun, damaged, unreadable):
            world = over()
            key, generation = KEY, world.top.generation + 1
            world.registry.adopt([Hold(*key, generation, PREPARED, token=b"p" * 16)])
            world.commit()
            assert [hold.generation for hold in world.registry.of(KEY)] == [generation]
    assert real.keys() == reached


# What a death leaves


def test_a_claimant_that_dies_gives_it_back_with_the_reason() -> None:
    world = claimed()
    world.claimant_gone()
    assert world.top.phase == HELD
    assert "pid 202 did not confirm: its process ended" in world.top.last_reject
    answer = world.load(THIRD, token=b"t" * 16)
    assert (answer["attempts"], world.top.last_claimant) == (2, OTHER.pid)


def test_the_death_of_an_earlier_claimant_ends_no_later_claim() -> None:
    world = claimed()
    generation = world.top.generation
    world.reject()
    world.load(THIRD, token=b"t" * 16)
    world.do(world.registry.claimant_gone(world.now, generation, b"c" * 16, "late news"))
    assert (world.top.phase, world.top.claimant) == (CLAIMED, THIRD.pid)


def test_after_begin_a_death_leaves_doubt_and_says_who_acts() -> None:
    world = begun()
    world.claimant_gone()
    assert world.top.phase == IN_DOUBT
    assert "pid 202 began to act on it" in world.top.reason
    assert f"pid {QEMU} acts on it" in world.top.reason
    with pytest.raises(Busy, match="release it"):
        world.load(THIRD)


def test_a_process_that_acted_and_ended_is_nobody_any_more() -> None:
    """Its pid may be another process's by now: a save by that one replaces nothing."""
    world = begun()
    world.do(world.registry.acting_gone(world.top.generation))
    assert f"pid {QEMU} has ended since" in world.top.reason
    with pytest.raises(AlreadyHeld):
        world.save(Caller(1000, QEMU))


def test_a_reject_after_the_claimant_came_back_from_begin_is_served_again() -> None:
    world = begun()
    world.reject("QEMU did not even start")
    assert (world.top.phase, world.top.acting, world.top.begun) == (HELD, 0, False)
    world.load(THIRD, token=b"t" * 16)
    world.do(world.registry.claimant_gone(world.now, world.top.generation, b"t" * 16, "so"))
    assert world.top.phase == HELD  # the doubt of the first claim is not the second one's


def test_a_saver_of_another_pid_namespace_is_not_called_pid_0() -> None:
    world = World()
    world.prepare(Caller(1000, 0))
    with pytest.raises(Busy, match="another pid namespace"):
        world.load(THIRD)


# What lies under a prepared save


def test_an_older_hold_stays_under_a_prepared_one_and_is_not_served_meanwhile() -> None:
    world = held()
    old = world.top.generation
    world.prepare(replacing=True)
    assert [hold.phase for hold in world.registry.of(KEY)] == [HELD, PREPARED]
    with pytest.raises(Busy, match="prepared"):
        world.load()
    world.abort()
    assert world.load()["generation"] == old


def test_commit_ends_the_older_hold_in_the_same_step() -> None:
    world = held()
    old = world.top.generation
    new = world.prepare(replacing=True)["generation"]
    step = world.registry.commit(world.by(SAVER), world.prepared)
    assert [(ended.hold.generation, ended.how) for ended in step.ended] == [(old, "replace")]
    world.do(step)
    assert [hold.generation for hold in world.registry.of(KEY)] == [new]


def test_a_save_in_doubt_that_is_released_ends_what_lay_under_it() -> None:
    world = held()
    new = world.prepare(replacing=True)["generation"]
    world.do(world.registry.saver_gone(new))
    world.release()
    assert [hold.generation for hold in world.registry.of(KEY)] == [new]


def test_what_cannot_be_released_says_what_to_do_instead() -> None:
    world = held()
    world.prepare(replacing=True)
    with pytest.raises(Busy, match=r"cannot be released: prepared by .* or end it: then"):
        world.release()
    with pytest.raises(Busy, match=r"cannot be released: claimed by .* without a release"):
        claimed().release()


def test_a_save_in_doubt_that_is_dropped_lets_what_lay_under_it_be_served() -> None:
    world = held()
    old = world.top.generation
    world.prepare(replacing=True)
    world.do(world.registry.saver_gone(world.top.generation))
    world.drop(force=True)
    assert world.load()["generation"] == old


def test_a_claimant_that_prepared_cannot_also_confirm_next() -> None:
    """Both would be committed, and after the newer one the older would be served: a state twice."""
    world = claimed()
    world.prepare(OTHER, replacing=True)
    with pytest.raises(Busy, match="prepared"):
        world.confirm_next()
    world.commit(OTHER)
    assert [hold.phase for hold in world.registry.of(KEY)] == [HELD]


# Time


def test_a_ttl_does_not_run_while_claimed() -> None:
    world = World()
    world.save(ttl=10.0)
    world.now += 4
    world.load(lease=100.0)
    assert world.top.ttl_left == 6.0
    world.now += 50
    assert world.registry.expire(world.now) is None
    world.reject()
    assert world.registry.next_deadline() == world.now + 6
    world.now += 6
    step = world.registry.expire(world.now)
    assert step is not None
    assert [ended.how for ended in step.ended] == ["ttl over"]
    world.do(step)
    assert phase(world) == NOTHING


def test_a_ttl_begins_with_commit_not_with_prepare() -> None:
    world = World()
    world.prepare(ttl=10.0)
    world.now += 1000
    assert world.registry.expire(world.now) is None
    world.commit()
    assert world.registry.next_deadline() == world.now + 10


def test_a_lease_that_is_over_gives_back_once_and_a_renewed_one_later() -> None:
    world = claimed()
    world.now += 20
    world.renew()
    world.now += 20
    assert world.registry.expire(world.now) is None
    world.now += 10
    step = world.registry.expire(world.now)
    assert step is not None
    world.do(step)
    assert "lease of 30 s is over" in world.top.last_reject
    with pytest.raises(Fenced, match="lease of 30 s is over"):
        world.confirm()
    assert world.registry.expire(world.now) is None


def test_doubt_has_no_end_in_time() -> None:
    for stage in (begun, vanished):
        world = stage()
        world.now += 1e9
        assert world.registry.next_deadline() is None
        assert world.registry.expire(world.now) is None


def test_many_renewals_do_not_pile_up() -> None:
    world = claimed()
    for _ in range(1000):
        world.now += 1
        world.renew()
    assert len(world.registry._deadlines) <= 64 + 4
    assert world.registry.next_deadline() == world.now + 30


# Not before the predecessor has ended


def test_what_waits_for_its_predecessor_is_busy_with_its_pid() -> None:
    world = World()
    world.save(after_exit=SAVER.pid)
    with pytest.raises(Busy, match="predecessor, pid 101, has not ended"):
        world.load()
    row = world.top.row(world.now)
    assert (row["phase"], row["in_use_by"]) == (HELD, 101)
    assert row["reason"].startswith("in use by pid 101:")
    world.do(world.registry.predecessor_gone(world.now, world.top.generation))
    world.load()


def test_a_ttl_begins_with_the_end_of_the_predecessor() -> None:
    world = World()
    world.save(after_exit=SAVER.pid, ttl=10.0)
    assert world.top.row(world.now)["expires"] == 10.0
    world.now += 100
    assert world.registry.expire(world.now) is None
    world.do(world.registry.predecessor_gone(world.now, world.top.generation))
    assert world.registry.next_deadline() == world.now + 10


# Requests that are repeated


NEW = Offer(1, 0)
SAID_TWICE: list[tuple[Callable[[], World], Callable[[World, Caller], Step]]] = [
    (nothing, lambda w, c: w.registry.save(c, KEY, NEW)),
    (nothing, lambda w, c: w.registry.save(c, KEY, NEW, token=b"p" * 16)),
    (prepared, lambda w, c: w.registry.commit(c, Ticket(KEY, 1, b"p" * 16))),
    (prepared, lambda w, c: w.registry.abort(c, Ticket(KEY, 1, b"p" * 16))),
    (held, lambda w, c: w.registry.load(c, KEY, token=b"t" * 16, lease=9)),
    (claimed, lambda w, c: w.registry.begin(c, Ticket(KEY, 1, b"c" * 16))),
    (claimed, lambda w, c: w.registry.confirm(c, Ticket(KEY, 1, b"c" * 16))),
    (claimed, lambda w, c: w.registry.reject(c, Ticket(KEY, 1, b"c" * 16), "so")),
    (claimed, lambda w, c: w.registry.reject(c, Ticket(KEY, 1, b"c" * 16), "so", damaged=True)),
    (claimed, lambda w, c: w.registry.confirm_next(c, Ticket(KEY, 1, b"c" * 16), NEW)),
    (held, lambda w, c: w.registry.drop(c, KEY, force=False)),
    (begun, lambda w, c: w.registry.release(c, KEY, force=True)),
]


@pytest.mark.parametrize(("stage", "ask"), SAID_TWICE)
def test_a_request_repeated_after_a_lost_answer_gets_its_first_answer(
    stage: Callable[[], World], ask: Callable[[World, Caller], Step]
) -> None:
    world = stage()
    caller = world.by(OTHER)
    first = ask(world, caller)
    assert first.changes
    world.do(first)
    records = list(world.registry)
    again = ask(world, caller)
    assert again.answer == first.answer
    assert not again.changes
    assert list(world.registry) == records


@pytest.mark.parametrize(("stage", "ask"), SAID_TWICE)
def test_a_nonce_answers_for_no_other_request(
    stage: Callable[[], World], ask: Callable[[World, Caller], Step]
) -> None:
    world = stage()
    for _, other in SAID_TWICE:
        caller = world.by(OTHER)
        reply = Reply(OTHER.uid, caller.nonce, {"generation": 1, "token": b""}, 0.0, b"another")
        world.registry.replies.remember(reply)
        with pytest.raises(ProtocolError, match="came with another request"):
            other(world, caller)
    caller = world.by(OTHER)
    world.do(ask(world, caller))
    for _, other in SAID_TWICE:
        with pytest.raises(ProtocolError, match="Nothing was changed"):
            other(world, caller._replace(digest=b"of another"))


def test_a_repeated_load_by_another_process_is_a_load() -> None:
    world = held()
    world.load(nonce=b"n" * 16)
    with pytest.raises(Busy):
        world.load(THIRD, nonce=b"n" * 16)


def test_a_repeated_load_whose_claim_is_over_is_a_new_load() -> None:
    """Its first answer would be a claim that is fenced."""
    world = held()
    world.load(nonce=b"n" * 16)
    world.claimant_gone()
    assert world.load(token=b"d" * 16, nonce=b"n" * 16)["attempts"] == 2
    assert world.load(token=b"e" * 16, nonce=b"n" * 16)["token"] == b"d" * 16


def test_a_repeated_prepare_that_is_in_doubt_by_now_speaks_for_nothing() -> None:
    world = World()
    world.prepare(nonce=b"n" * 16)
    world.do(world.registry.saver_gone(world.top.generation))
    assert world.prepare(nonce=b"n" * 16)["token"] == b"p" * 16  # its first answer
    with pytest.raises(Fenced, match="in-doubt"):
        world.commit()


def test_one_uids_nonce_means_nothing_to_another() -> None:
    world = held()
    caller = world.by(THIRD)
    world.do(world.registry.drop(caller, KEY, force=False))
    with pytest.raises(NotHeld):
        world.registry.drop(caller._replace(uid=2000), (2000, "web"), force=False)


# Generations


def test_a_generation_is_never_used_again() -> None:
    world = World(Registry(first_generation=50))
    seen = []
    for _ in range(5):
        seen.append(world.save()["generation"])
        world.drop()
    world.registry.adopt([Hold(1, "far", 900, HELD)])
    seen.append(world.save()["generation"])
    assert seen == [50, 51, 52, 53, 54, 901]


def test_a_load_of_a_certain_generation_refuses_another() -> None:
    world = held()
    with pytest.raises(Fenced, match="by now"):
        world.load(generation=world.top.generation + 1)
    world.load(generation=world.top.generation)


# Quotas


def test_quotas_count_what_a_uid_has_and_forgive_what_is_replaced() -> None:
    world = World(Registry(Quota(holds=2, fds=10)))
    world.save(fds=6)
    key = (1000, "two")
    with pytest.raises(LimitExceeded, match="11 descriptors"):
        world.registry.save(world.by(SAVER), key, Offer(5, 0))
    world.do(world.registry.save(world.by(SAVER), key, Offer(4, 0)))
    third = (1000, "three")
    with pytest.raises(LimitExceeded, match=r"limits\.holds"):
        world.registry.save(world.by(SAVER), third, Offer(0, 0))
    with pytest.raises(LimitExceeded):  # both are kept until commit
        world.prepare(replacing=True, fds=1)
    world.save(replacing=True, fds=6)
    stranger = (2000, "web")
    world.do(world.registry.save(world.by(Caller(2000, 1)), stranger, Offer(9, 0)))
    world.drop()
    usage = world.registry.usage(1000)
    assert (usage.holds, usage.fds) == (1, 4)


# After a restart


def test_of_two_committed_records_the_newer_wins_and_the_older_is_over() -> None:
    registry = Registry()
    old, new = Hold(1000, "web", 3, HELD), Hold(1000, "web", 5, HELD)
    other = Hold(1000, "two", 4, HELD)
    assert registry.adopt([new, other, old]) == [old]
    assert registry.of(KEY) == (new,)
    assert registry.next_generation == 6


def test_what_lies_under_a_prepared_record_is_kept_over_a_restart() -> None:
    old, new = Hold(1000, "web", 3, HELD), Hold(1000, "web", 5, PREPARED)
    for top in (new, changed(new, phase=IN_DOUBT, reason="its saver ended")):
        registry = Registry()
        assert registry.adopt([old, top]) == []
        assert registry.of(KEY) == (old, top)


def test_while_a_record_cannot_be_named_no_name_is_said_to_be_free() -> None:
    registry = Registry()
    registry.hidden = "a record that cannot be read"
    with pytest.raises(Busy, match="may be held"):
        registry.check_load(0.0, KEY)


# Live holds


def test_a_live_hold_begins_or_is_loaded() -> None:
    world = World()
    first = world.live(nonce=b"n" * 16)
    assert (first["found"], world.top.phase, world.top.saver) == (False, LIVE, OTHER.pid)
    assert world.live(nonce=b"n" * 16) == first  # a lost answer
    with pytest.raises(Busy, match="in use by pid 202, which keeps it live") as busy:
        world.live(THIRD)
    assert (busy.value.pid, busy.value.phase) == (202, LIVE)
    row = world.top.row(world.now)
    assert (row["in_use_by"], row["live"], row["fds"]) == (202, True, 0)
    world.owner_gone()
    taken = world.live(THIRD)
    assert (taken["found"], taken["live"], taken["last_end"]) == (True, True, "killed by SIGKILL")
    assert taken["generation"] == first["generation"]
    with pytest.raises(Fenced, match="has ended since"):
        world.live(nonce=b"n" * 16)
    world.confirm_live(b"o" * 16)
    assert (world.top.phase, world.top.took) == (LIVE, first["generation"])


def test_twenty_early_deaths_in_a_row_quarantine() -> None:
    world = quarantined()
    assert world.top.phase == QUARANTINED
    assert "20 owners in a row ended within 10 s" in world.top.row(world.now)["reason"]
    world.release()
    assert (world.top.phase, world.top.deaths) == (HELD, 0)
    for _ in range(MOST_DEATHS - 1):
        world.load()
        world.confirm_live()
        world.owner_gone()
    world.load()
    world.confirm_live()
    world.now += 11
    world.owner_gone()
    assert (world.top.phase, world.top.deaths) == (HELD, 0)


def test_neither_a_close_nor_a_failed_claim_counts_as_a_death() -> None:
    world = live()
    world.owner_gone()
    for _ in range(2 * MOST_DEATHS):
        world.load()
        world.reject()
        world.load()
        world.confirm_live()
        world.end(keep=True)
    assert (world.top.phase, world.top.deaths, world.top.attempts) == (HELD, 0, 0)
    assert world.top.last_end == "closed by its owner"


def test_what_is_not_put_back_ends_with_its_owner() -> None:
    world = away()
    assert "which has not put it back" in world.top.row(world.now)["reason"]
    world.owner_gone()
    assert phase(world) == NOTHING
    world = away()
    generation = world.top.generation
    world.put_back()
    assert (world.top.phase, world.top.generation) == (LIVE, generation)
    world.put_back()  # again: nothing to do
    world.owner_gone()
    assert phase(world) == HELD


def test_a_rejection_may_leave_the_attempt_uncounted() -> None:
    world = held()
    world.load()
    world.do(world.registry.reject(world.by(OTHER), world.claim, "no room", attempt=False))
    assert (world.top.phase, world.top.attempts) == (HELD, 0)


def test_what_was_live_is_counted_once_nobody_has_it() -> None:
    world = live()
    world.owner_gone()
    before = world.top
    world.do(living.counted(world.registry, before, 2, 5))
    assert (world.top.phase, world.top.fds, world.registry.usage(1000).fds) == (HELD, 5, 5)
    before = world.top
    world.load()
    world.do(living.counted(world.registry, before, 0, 0))  # too late
    assert (world.top.phase, world.top.fds) == (CLAIMED, 5)
    world.reject()
    world.do(living.counted(world.registry, world.top, 0, 0))
    assert phase(world) == NOTHING  # empty
    world = quarantined()
    world.do(living.counted(world.registry, world.top, 0, 0))
    assert phase(world) == QUARANTINED  # an operator is to look


def test_a_live_hold_may_be_left_while_the_quota_is_over() -> None:
    world = World(Registry(Quota(holds=2, fds=3)))
    world.save(fds=3)
    world.load()
    world.confirm_live()
    world.owner_gone()
    assert world.top.phase == HELD


def test_a_confirm_whose_answer_ended_with_cprd_is_repeated() -> None:
    """Whichever note the next cprd finds: of the claim, or of the new owner."""
    for answered in (False, True):
        world = claimed()
        ticket, claim = world.claim, world.top
        offer = Offer(0, 0, 1, live=True)
        if answered:
            world.confirm_live()
            noted(world, world.top)
        else:
            noted(world, claim)
        there = world.top
        caller = world.by(OTHER)
        step = living.confirm_next(world.registry, caller, ticket, offer)
        answer = world.do(step)
        assert living.confirm_next(world.registry, caller, ticket, offer).answer == answer
        assert (world.top.phase, world.top.away, world.top.took) == (LIVE, False, claim.generation)
        assert (answer["generation"] == there.generation) == answered
        owner = Ticket(KEY, answer["generation"], answer["token"])
        world.do(living.end(world.registry, world.by(OTHER), owner, keep=True))
        assert world.top.phase == HELD


def test_what_was_claimed_is_put_back_for_the_next_owner() -> None:
    world = claim_away()
    ticket = world.claim
    with pytest.raises(Fenced):
        living.end(world.registry, world.by(OTHER), ticket, keep=True)
    offer = Offer(0, 0, 1, live=True)
    world.do(living.put_back(world.registry, world.by(OTHER), ticket, offer))
    world.do(living.end(world.registry, world.by(OTHER), ticket, keep=True))
    assert (world.top.phase, world.top.live) == (HELD, True)

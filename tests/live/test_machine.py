"""Any changes in any order against a dict, with crashes at any step and take-overs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from cprd.live.reader import read
from cprd.live.shape import SHAPE, Shape
from tests.live.owning import MIDDLE, SMALL, Child, Model, Op, Root, Things, seen_in
from tests.live.test_sweep import BIG
from tests.support.descriptors import nothing_leaks_inside

NAMES = st.sampled_from(["a", "b\u00e9", "c" * 255])
IDS = st.integers(0, 5)
KEYS = st.sampled_from(["s", "t", "\u00fc", "k" * 255])
VALUES: st.SearchStrategy[Any] = st.one_of(
    st.integers(0, 3), st.binary(max_size=3), st.just({"x": [1, None]}), st.just(BIG), st.just(b"")
)
PIPES, MEMFDS = 12, 3
SIMPLE: st.SearchStrategy[Op] = st.one_of(
    st.tuples(st.just("save"), NAMES, IDS, st.integers(0, PIPES + MEMFDS - 1)),
    st.tuples(st.just("delete"), NAMES, IDS),
    st.tuples(st.just("section"), KEYS, VALUES),
    st.tuples(st.just("drop"), KEYS),
)
OTHER: st.SearchStrategy[Op] = st.one_of(
    st.tuples(st.just("memory"), st.just("m")),
    st.tuples(st.just("write"), st.just("m"), st.integers(1, 255)),
    st.tuples(st.just("forget"), st.just("m")),
    st.just(("clear",)),
)
BATCHES = st.lists(SIMPLE, min_size=1, max_size=12).map(lambda ops: ("batch", *ops))
OPS = st.one_of(SIMPLE, SIMPLE, SIMPLE, BATCHES, OTHER)


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.things = Things(PIPES, MEMFDS)
        self.model = Model(self.things)
        self.root = Root()
        self.child: Child | None = None

    @initialize(shape=st.sampled_from([SMALL, MIDDLE, SHAPE]))
    def begin(self, shape: Shape) -> None:
        self.shape = shape
        self.child = Child(self.root, self.things, shape, [])

    @rule(op=OPS)
    def change(self, op: Op) -> None:
        assert self.child is not None
        if not self.makes_sense(op):
            return
        self.child.tell(op)
        self.model.apply(op)

    @rule(op=OPS, kill_at=st.integers(1, 12))
    def crash(self, op: Op, kill_at: int) -> None:
        assert self.child is not None
        if not self.makes_sense(op):
            return
        before = self.model.copy()
        child, self.child = self.child, None
        returned = child.tell(op, kill_at)
        self.model.apply(op)
        seen = seen_in(read(self.root.kept))
        if seen != self.model.seen():
            assert seen == before.seen(), (seen, before.seen(), self.model.seen())
            assert not returned, (seen, self.model.seen())
            self.model = before
        old, self.root = self.root, Root()
        try:
            self.child = Child(self.root, self.things, self.shape, [], before=old)
            self.child.tell(("drop", "absent"))  # the old root is read by now
        finally:
            old.close()

    def makes_sense(self, op: Op) -> bool:
        """A write to memory that is not there would be two changes."""
        return op[0] != "write" or op[1] in self.model.memories

    def teardown(self) -> None:
        if self.child is not None:
            self.child.finish()
            assert seen_in(read(self.root.kept)) == self.model.seen()
        self.root.close()
        self.things.close()


def _run(examples: int, steps: int) -> None:
    with nothing_leaks_inside():
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                suppress_health_check=[*HealthCheck],
            ),
        )


def test_any_changes_with_crashes() -> None:
    _run(10, 30)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_10000_changes_with_crashes() -> None:
    _run(200, 50)

"""What may block is let go of late, by a slow thread: meanwhile a successor finds what is kept,
after each change and after each release."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from cprd.linux.rights import scm_fds
from cprd.live import reader
from cprd.live.owner import Owner
from cprd.live.shape import SHAPE, Shape
from cprd.live.takeover import take_over
from tests.live.owning import HOLD, MIDDLE, SMALL, Model, Op, Root, Things, act, seen_in
from tests.live.test_interrupts import Interrupt
from tests.live.test_sweep import BIG

PIPES, MEMFDS = 12, 2
SUCCEED: Op = ("succeed",)


class Late:
    """An owner in this process. Its hold is read without a fence, so that changes go on."""

    def __init__(self, shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reader, "shut", lambda fd: None)
        self.shape = shape
        self.releases: list[Callable[[], None]] = []
        self.things = Things(PIPES, MEMFDS)
        self.model = Model(self.things)
        self.root = Root()
        self.owner = Owner(*self.root.ends(), HOLD, shape=shape, defer=self.releases.append)

    def change(self, op: Op) -> None:
        act(self.owner, self.things, op)
        self.model.apply(op)
        self.check(op)

    def interrupted(self, op: Op, at: int) -> None:
        """A change that is interrupted at a step, if there is one: made, or not."""
        before = self.model.copy()
        self.model.apply(op)
        try:
            with Interrupt(at, opcodes=True):
                act(self.owner, self.things, op)
        except KeyboardInterrupt:
            if seen_in(reader.read(self.root.kept)) == before.seen():
                self.model = before
        self.check(op)

    def release(self) -> None:
        self.releases.pop(0)()
        self.check("a release")

    def check(self, after: object) -> None:
        assert seen_in(reader.read(self.root.kept)) == self.model.seen(), after

    def check_parked(self) -> None:
        """Where nothing is late, nothing but what is kept is in flight."""
        segments = self.owner._ledger.pool.segments.values()
        files = sum(value == BIG for value in self.model.sections.values())
        if not self.releases:
            parked = sum(scm_fds(segment.rx.fileno()) for segment in segments)
            assert parked == len(self.model.fds) + files

    def succeed(self) -> None:
        """The owner dies, whatever is late. Its successor makes one change, which settles all."""
        self.owner.close()
        self.releases.clear()
        root, self.root = self.root, Root()
        found = reader.read(root.kept)
        ends, defer = self.root.ends(), self.releases.append
        self.owner = take_over(found, *ends, shape=self.shape, defer=defer)
        found.state.close()
        root.close()
        self.check("a take-over")
        self.owner.settle()
        self.check("settled")

    def close(self) -> None:
        self.owner.close()
        self.root.close()
        self.things.close()


@pytest.mark.usefixtures("nothing_leaks")
@pytest.mark.parametrize(
    ("shape", "script"),
    [
        # The end of "big" lies with key 0, whose segment has nothing else to keep soon after.
        (
            SHAPE,
            [
                *[("save", "a", 0, 0), ("section", "big", BIG)],
                *[("batch", ("delete", "a", 0), ("drop", "big"))],
                *[("save", "a", 1, 1), ("save", "a", 1, 2)],
            ],
        ),
        # The root ends "big", and is written anew just when "big" is kept again.
        (
            SMALL,
            [
                *[("section", "big", BIG), SUCCEED, ("drop", "big")],
                *[("save", "a", 0, 0), ("section", "big", 1)],
            ],
        ),
        # The section stays where the descriptor was.
        (
            SHAPE,
            [
                *[("batch", ("save", "a", 1, 1), ("section", "s", 1)), ("save", "b", 0, 0)],
                *[("batch", ("delete", "b", 0), ("delete", "a", 1))],
            ],
        ),
    ],
    ids=["again", "not after", "let go of"],
)
def test_a_change_while_releases_are_late(
    shape: Shape, script: list[Op], monkeypatch: pytest.MonkeyPatch
) -> None:
    late = Late(shape, monkeypatch)
    try:
        for op in script:
            if op == SUCCEED:
                late.succeed()
            else:
                late.change(op)
        while late.releases:
            late.release()
        late.check_parked()
    finally:
        late.close()


def random_op(chance: random.Random, depth: int = 0) -> Op:
    kind = chance.random()
    key = (chance.choice("ab"), chance.randrange(6))
    if kind < 0.4:
        return ("save", *key, chance.randrange(PIPES + MEMFDS))
    if kind < 0.6:
        return ("delete", *key)
    if kind < 0.8:
        return ("section", chance.choice("xyz"), chance.choice((1, 2, b"v" * 300, BIG)))
    if kind < 0.9 or depth:
        return ("drop", chance.choice("xyz"))
    return ("batch", *(random_op(chance, 1) for _ in range(chance.randrange(2, 9))))


def walk(shape: Shape, steps: int, interrupts: float, monkeypatch: pytest.MonkeyPatch) -> None:
    late = Late(shape, monkeypatch)
    chance = random.Random(steps)
    try:
        for _ in range(steps):
            if chance.random() < interrupts:
                late.interrupted(random_op(chance), chance.randrange(1, chance.choice((400, 3000))))
            else:
                late.change(random_op(chance))
            while late.releases and chance.random() < 0.5:
                late.release()
            if not interrupts:
                late.check_parked()
            if chance.random() < 0.02:
                late.succeed()
        late.owner.settle()
        while late.releases:
            late.release()
        late.check_parked()
    finally:
        late.close()


@pytest.mark.usefixtures("nothing_leaks")
@pytest.mark.parametrize("steps", [200, pytest.param(30000, marks=pytest.mark.full)])
@pytest.mark.parametrize("shape", [SMALL, MIDDLE, SHAPE])
def test_any_changes_with_late_releases(
    shape: Shape, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk(shape, steps, 0, monkeypatch)


@pytest.mark.parametrize("steps", [200, pytest.param(10000, marks=pytest.mark.full)])
@pytest.mark.parametrize("shape", [SMALL, MIDDLE])
def test_any_changes_with_late_releases_and_interrupts(
    shape: Shape, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(A memfd that was just made may stay open; nothing else.)"""
    walk(shape, steps, 0.5, monkeypatch)

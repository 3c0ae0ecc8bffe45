"""SIGKILL of the owner at every pause point: what is found is what the last change that returned
left, or that and the change in flight; never anything else. A successor goes on from there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from cprd.linux.rights import close_all, scm_fds
from cprd.live.owner import Owner
from cprd.live.reader import read
from cprd.live.shape import SHAPE, Shape
from cprd.live.takeover import take_over
from tests.live.owning import MIDDLE, SMALL, Child, Model, Op, Root, Things, act, fenced, seen_in

pytestmark = pytest.mark.usefixtures("nothing_leaks")


@pytest.fixture(scope="module")
def things() -> Iterator[Things]:
    made = Things()
    yield made
    made.close()


def saves(count: int, first: int = 0) -> list[Op]:
    return [("save", "c", n, n % 24) for n in range(first, first + count)]


BIG = bytes(range(256)) * 20
BATCH: Op = (
    "batch",
    ("save", "c", 0, 9),
    ("save", "n", 0, 3),
    ("delete", "c", 2),
    ("delete", "c", 5),
    ("section", "s", {"batch": True}),
    ("section", "new", [1, 2]),
    ("drop", "t"),
)
LARGE: Op = (
    "batch",
    *[("save", "l", n, n % 24) for n in range(9)],
    ("save", "l", 100, 25),
    ("delete", "c", 1),
    ("delete", "c", 4),
    ("section", "big", BIG),
    ("section", "s", 1),
)
SCRIPTS: dict[str, list[Op]] = {
    "append": saves(10),
    "delete": [*saves(7), *[("delete", "c", n) for n in (3, 0, 6, 1, 2, 5, 4)]],
    "replace": [*saves(5), *[("save", "c", n, n + 10) for n in (1, 4, 1, 0)]],
    "sections": [
        *[("section", f"s{n % 4}", {"n": n}) for n in range(9)],
        *[("drop", "s1"), ("section", "s1", b"again"), ("drop", "s0"), ("drop", "s3")],
    ],
    "large sections": [
        *[("section", "s", BIG), ("section", "s", BIG[1:]), ("section", "s", 1)],
        *[("section", "s", BIG), ("drop", "s"), ("section", "t", BIG)],
    ],
    "files": [
        *[("save", "f", 0, 24), ("save", "f", 1, 25), ("save", "f", 0, 26)],
        *[("delete", "f", 1), ("save", "f", 1, 27), ("delete", "f", 0), ("save", "f", 2, 28)],
    ],
    "batch": [*saves(6), ("section", "s", 1), ("section", "t", 2), BATCH, ("delete", "n", 0)],
    "large batch": [*saves(6), ("section", "s", b"0"), LARGE, ("drop", "big"), *saves(2, 6)],
    "memory": [
        *[("memory", "m"), ("write", "m", 7), ("memory", "n"), ("forget", "m")],
        *[("write", "n", 9), ("memory", "m"), ("forget", "n")],
    ],
    "merge": [*saves(16), *[("delete", "c", n) for n in range(16) if n % 4], *saves(3, 20)],
    "clear": [*saves(5), ("section", "s", BIG), ("memory", "m"), ("clear",), *saves(3)],
}
AFTER: list[Op] = [
    *[("delete", "c", 0), ("save", "c", 1, 23), ("section", "s", "after"), ("drop", "t")],
    *[("delete", "f", 0), ("save", "x", 1, 2), ("save", "f", 9, 29), ("forget", "m")],
    ("batch", ("delete", "c", 3), ("save", "x", 2, 5), ("section", "both", 1)),
]


def states(things: Things, script: list[Op], start: Model | None = None) -> list[Model]:
    """The model before and after each change."""
    model = start.copy() if start is not None else Model(things)
    found = [model]
    for op in script:
        model = model.copy()
        model.apply(op)
        found.append(model)
    return found


def is_one_of(seen: object, expected: list[Model], done: int) -> Model:
    """The state of `expected` that was found: after `done` changes, or one more."""
    for model in expected[done : done + 2]:
        if model.seen() == seen:
            return model
    raise AssertionError(
        f"after {done} changes found {seen}, not {[m.seen() for m in expected[done : done + 2]]}"
    )


def go_on(root: Root, things: Things, shape: Shape, model: Model) -> None:
    """A successor takes over, in this process, and makes changes; its successor finds them."""
    new = Root()
    found = read(root.kept)
    owner = take_over(found, *new.ends(), hold=5, shape=shape)
    found.state.close()
    root.close()
    try:
        for op in AFTER:
            act(owner, things, op)
            model.apply(op)
        assert not owner.unfinished
        # Nothing else than what is kept is in flight.
        assert parked(new) == len(model.fds) + len(model.memories) + sum(
            value in (BIG, BIG[1:]) for value in model.sections.values()
        )
    finally:
        owner.close()
    assert seen_in(read(new.kept)) == model.seen()
    new.close()


def parked(root: Root) -> int:
    """How many descriptors lie in the segments of a root."""
    segments = fenced(root.kept)
    try:
        return sum(scm_fds(fd) for fd in segments)
    finally:
        close_all(segments)


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(
    "shape",
    [SMALL, SHAPE, pytest.param(MIDDLE, marks=pytest.mark.full)],
    ids=["small", "real", "middle"],
)
def test_killed_anywhere_nothing_is_lost(things: Things, name: str, shape: Shape) -> None:
    script = SCRIPTS[name]
    expected = states(things, script)
    kills = 0
    for kill_at in itertools.count(1):
        root = Root()
        child = Child(root, things, shape, script, kill_at=kill_at)
        child.end()
        stopped = child.stopped_or_ended()
        child.kill() if stopped else child.close()
        found = read(root.kept)
        model = is_one_of(seen_in(found), expected, child.done)
        assert stopped or child.done == len(script)
        go_on(root, things, shape, model.copy())
        if not stopped:
            break
        kills += 1
    assert kills > len(script)
    print(f"{name}: {kills} kills")


TAKE_OVER: dict[str, list[Op]] = {
    "delete": [("delete", "c", 3), ("delete", "c", 0), ("delete", "c", 1), *saves(2, 30)],
    "replace": [("save", "c", 2, 20), ("section", "s", 2), ("save", "f", 0, 26)],
    "batch": [BATCH, ("delete", "f", 0), ("drop", "s"), ("write", "m", 3)],
    "large batch": [LARGE, ("delete", "l", 1), ("forget", "m")],
    "clear": [("clear",), *saves(2)],
}
KEPT: list[Op] = [
    *[*saves(7), ("save", "f", 0, 24), ("section", "s", 1), ("section", "t", 2)],
    *[("memory", "m"), ("write", "m", 4), ("section", "big", BIG)],
]


@pytest.mark.parametrize("name", TAKE_OVER)
@pytest.mark.parametrize("shape", [SMALL, SHAPE], ids=["small", "real"])
@pytest.mark.parametrize("unclean", [False, True], ids=["clean", "unclean"])
def test_killed_anywhere_at_a_take_over(
    things: Things, name: str, shape: Shape, unclean: bool
) -> None:
    """Until cprd has confirmed the new root the old one is whole, from then on the new one.

    Unclean: the predecessor died between the commit of a change and the end of the change."""
    script = TAKE_OVER[name]
    kills = 0
    for kill_at in itertools.count(1):
        old, new = Root(), Root()
        if unclean:
            child = Child(old, things, shape, [*KEPT, BATCH], kill_at=2, at_op=len(KEPT))
            child.end()
            assert child.stopped_or_ended()
            child.kill()
            start = is_one_of(seen_in(read(old.kept)), states(things, [*KEPT, BATCH]), child.done)
        else:
            Child(old, things, shape, KEPT).finish()
            start = states(things, KEPT)[-1]
        expected = states(things, script, start)
        child = Child(new, things, shape, script, before=old, kill_at=kill_at)
        child.end()
        stopped = child.stopped_or_ended()
        child.kill() if stopped else child.close()
        if child.confirmed:
            old.close()
            seen = seen_in(read(new.kept))
            model = is_one_of(seen, expected, child.done)
            go_on(new, things, shape, model.copy())
        else:
            new.close()
            assert seen_in(read(old.kept)) == start.seen()
            old.close()
        if not stopped:
            break
        kills += 1
    assert kills > len(script)
    print(f"{name}: {kills} kills")


def test_the_sweep_passes_every_step(things: Things, tmp_path: Path) -> None:
    """Before and after each sending, copying, draining and closing."""
    passed: set[str] = set()
    for name in ("merge", "large batch", "delete"):
        root, log = Root(), tmp_path / name
        Child(root, things, SMALL, SCRIPTS[name], log=str(log)).finish()
        root.close()
        passed |= set(log.read_text().split())
    assert passed == {
        *("live:send", "live:sent", "live:peek", "live:peeked", "live:drain", "live:drained"),
        *("live:close", "live:closed", "live:fill", "live:filled"),
    }


def test_an_owner_that_begins_and_dies_leaves_an_empty_hold(things: Things) -> None:
    root = Root()
    assert seen_in(read(root.kept)) == ([], [], [])
    root.close()
    root = Root()
    owner = Owner(*root.ends(), 9)
    owner.close()
    found = read(root.kept)
    assert found.hold == 9
    assert seen_in(found) == ([], [], [])
    root.close()

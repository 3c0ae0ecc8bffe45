"""KeyboardInterrupt between any two steps of a change: it counts wholly or not at all, the next
change finishes the rest, and no descriptor stays open."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest

from cprd.live.owner import Owner
from cprd.live.reader import read
from cprd.live.records import entry_size
from cprd.live.segment import SHARED
from cprd.live.shape import Shape
from tests.live.owning import HOLD, MIDDLE, SMALL, Model, Op, Root, Things, act, seen_in
from tests.live.test_sweep import BATCH, BIG, LARGE, saves
from tests.support.descriptors import open_fds

BEFORE: list[Op] = [
    *(*saves(9), ("save", "f", 0, 24), ("section", "s", 1), ("section", "t", BIG)),
    ("memory", "n"),
]
CHANGES: dict[str, Op] = {
    "save": ("save", "c", 20, 3),
    "replace": ("save", "c", 4, 20),
    "delete": ("delete", "c", 5),
    "delete a file": ("delete", "f", 0),
    "section": ("section", "s", 2),
    "large section": ("section", "t", BIG[1:]),
    "batch": BATCH,
    "large batch": LARGE,
    "merge": ("batch", *[("delete", "c", n) for n in (1, 3, 6, 7, 8)]),
    "memory": ("memory", "m"),
    "forget": ("forget", "n"),
    "clear": ("clear",),
}
NEXT: list[Op] = [("save", "after", 0, 5), ("delete", "c", 0), ("section", "s", 5)]


class Interrupt:
    """Raises KeyboardInterrupt, or another `error`, at the `at`-th step of Python within cprd.live,
    or other files."""

    def __init__(
        self,
        at: int,
        opcodes: bool,
        files: tuple[str, ...] = ("/cprd/live/",),
        error: type[BaseException] = KeyboardInterrupt,
    ) -> None:
        self.error = error
        self.left = at
        self.opcodes = opcodes
        self.files = files

    def __enter__(self) -> Interrupt:
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        mine = any(file in code.co_filename for file in self.files)
        if not mine or code.co_qualname.startswith("Made."):
            return None  # what comes in a finalizer is reported and dropped
        frame.f_trace_opcodes = self.opcodes
        if event == ("opcode" if self.opcodes else "line"):
            self.left -= 1
            if self.left == 0:
                raise self.error
        return self._trace


@pytest.fixture(scope="module")
def things() -> Iterator[Things]:
    made = Things()
    yield made
    made.close()


@pytest.mark.usefixtures("nothing_leaks")
@pytest.mark.parametrize("shape", [SMALL, MIDDLE], ids=["small", "middle"])
@pytest.mark.parametrize("name", CHANGES)
def test_interrupted_at_any_line_the_next_change_goes_on(
    things: Things, name: str, shape: Shape
) -> None:
    step = (7 if "batch" in name else 2) if shape is SMALL else 11
    at = 1
    while interrupt(things, CHANGES[name], shape, at, opcodes=False):
        at += step
    assert at > 20


@pytest.mark.full
@pytest.mark.parametrize("name", CHANGES)
def test_interrupted_at_any_opcode_the_next_change_goes_on(things: Things, name: str) -> None:
    """(A memfd that was just made may stay open; nothing else.)"""
    at = 1
    while interrupt(things, CHANGES[name], SMALL, at, opcodes=True):
        at += 5 if "batch" in name else 1
    assert at > 100


@pytest.mark.parametrize("name", ["save", "section"])
def test_a_handler_that_raises_an_os_error_is_no_failure_of_the_kernel(
    things: Things, name: str
) -> None:
    """A TimeoutError of an alarm, say, as soon as the record was sent."""
    at = 130
    while interrupt(things, CHANGES[name], MIDDLE, at, opcodes=True, error=TimeoutError):
        at += 1
    assert at > 300


def interrupt(
    things: Things,
    op: Op,
    shape: Shape,
    at: int,
    opcodes: bool,
    error: type[BaseException] = KeyboardInterrupt,
) -> bool:
    """One round; whether the interrupt came."""
    root = Root()
    owner = Owner(*root.ends(), HOLD, shape=shape)
    model = Model(things)
    for before in BEFORE:
        act(owner, things, before)
        model.apply(before)
    old = model.copy()
    model.apply(op)
    interrupted = False
    try:
        with Interrupt(at, opcodes, error=error):
            act(owner, things, op)
    except error:
        interrupted = True
    for after in [*NEXT, ("memory", "m"), ("memory", "n")]:
        act(owner, things, after)
        old.apply(after)
        model.apply(after)
    assert not owner.unfinished
    assert counted(owner) == counted_anew(owner), at
    owner.close()
    seen = seen_in(read(root.kept))
    root.close()
    assert seen in ([model.seen(), old.seen()] if interrupted else [model.seen()]), at
    return interrupted


Counts = tuple[int, int, bool, list[int]]


def counted(owner: Owner) -> Counts:
    """What the pool and its segments say of keys, segments with keys, and bytes."""
    owner._quick.end_run()  # what a run took is counted at the end
    pool = owner._ledger.pool
    return pool.kept, pool._filled, pool.spreads, [each.size for each in pool.segments.values()]


def counted_anew(owner: Owner) -> Counts:
    pool = owner._ledger.pool
    shared = [each for each in pool.segments.values() if each.kind == SHARED and each.tx]
    filled = sum(1 for each in shared if each.keys)
    sizes = [
        sum(entry_size(key, kept[2]) for key, kept in each.keys.items())
        for each in pool.segments.values()
    ]
    spreads = filled + len(pool._inherited) < pool.spread
    return sum(len(each.keys) for each in shared), filled, spreads, sizes


@pytest.mark.usefixtures("nothing_leaks")
def test_an_interrupt_leaves_no_copy_of_a_descriptor(things: Things) -> None:
    """So the peer of a connection that is deleted later is told at once."""
    for at in range(1, 100_000):
        root = Root()
        owner = Owner(*root.ends(), HOLD)
        for op in saves(8):
            act(owner, things, op)
        before = open_fds()
        try:
            with Interrupt(at, opcodes=False):
                owner.delete_fd("c", 3)
        except KeyboardInterrupt:
            owner.delete_fd("c", 4)
            assert open_fds() == before, at
            owner.close()
            root.close()
            continue
        owner.close()
        root.close()
        break
    assert at > 20


@pytest.mark.usefixtures("nothing_leaks")
def test_a_change_inside_a_change_is_refused(things: Things) -> None:
    from cprd import InvalidInput

    root = Root()
    owner = Owner(*root.ends(), HOLD)

    class Fd:
        def fileno(self) -> int:
            return things.fds[0]

    calls: list[BaseException] = []

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_name == "send" and not calls:
            try:
                owner.delete_fd("c", 0)
            except InvalidInput as error:
                calls.append(error)
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        owner.save_fd("c", 1, Fd())
    finally:
        sys.settrace(before)
    assert "inside another one" in str(calls[0])
    owner.save_fd("c", 2, things.fds[1])
    assert owner.kept == 2
    owner.close()
    root.close()

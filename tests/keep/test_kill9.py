"""kill -9 of cprd under --keep, at each step of each verb, and in a stream of clients: the sweeps
that run on a real systemd as well, here without root and in any clone."""

from __future__ import annotations

import contextlib
import random
import time

import pytest

from tests.support.keeping import SMALL, things
from tests.support.live_sweeps import LIVE_VERBS, DropByForce, LiveStep, TakeOver, sweep_live
from tests.support.patience import until
from tests.support.sweeps import VERBS, Confirm, Step, Stream, sweep, sweep_rewriting, sweep_start

from .conftest import Keep
from .keeping import KeptByParent

BY_DEFAULT = (Confirm,)


@pytest.mark.parametrize(
    "verb",
    [verb if verb in BY_DEFAULT else pytest.param(verb, marks=pytest.mark.full) for verb in VERBS],
)
def test_killed_at_each_step_it_is_done_once(keeping: KeptByParent, verb: type[Step]) -> None:
    assert sweep(keeping, verb) >= 2
    keeping.await_kept("store")


@pytest.mark.parametrize(
    "verb",
    [
        verb if verb in (TakeOver, DropByForce) else pytest.param(verb, marks=pytest.mark.full)
        for verb in LIVE_VERBS
    ],
)
def test_killed_at_each_step_of_a_live_hold_it_is_done_once(
    keeping: KeptByParent, verb: type[LiveStep]
) -> None:
    assert sweep_live(keeping, verb) >= 2
    keeping.await_kept("store")


@pytest.mark.full
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("settings", ["", SMALL])
def test_killed_at_each_step_and_again_after_the_answer(
    keep: Keep, verb: type[Step], settings: str
) -> None:
    """Small shelves are written anew in between, and small journals moved."""
    assert sweep(keep(settings=settings), verb, again=True) >= 2


@pytest.mark.full
def test_killed_at_each_step_of_writing_a_shelf_anew(keep: Keep) -> None:
    sweep_rewriting(keep(settings=SMALL))


@pytest.mark.full
def test_killed_at_each_step_of_its_start(keeping: KeptByParent) -> None:
    sweep_start(keeping)


@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.full)])
@pytest.mark.timeout(900)
def test_killed_over_and_over_under_twenty_clients_nothing_acknowledged_is_lost(
    keeping: KeptByParent, kills: int
) -> None:
    """Each client checks each of its own answers; what stands beside them has to stay whole; and
    nothing gathers in the parent."""
    away: list[float] = []
    with contextlib.ExitStack() as stack:
        standing = stack.enter_context(things(*range(20)))
        with keeping.connect() as daemon:
            for thing in standing:
                daemon.save(f"standing{thing.number}", thing.state, require="store")
                thing.saved()
        clients = Stream(keeping, 20, user=None)
        stack.callback(clients.end)
        for _ in range(kills):
            clients.advance(random.randrange(1, 40))
            before = time.monotonic()
            keeping.kill()
            away.append(time.monotonic() - before)
        clients.advance(40)
        with keeping.connect() as daemon:
            for thing in standing:
                with daemon.load(f"standing{thing.number}") as claim:
                    assert claim.attempts == 1
                    assert thing.is_in(claim)
                assert thing.let_go()
        keeping.await_kept("store")
        until(lambda: keeping.stored() <= 7, lambda: f"{keeping.stored()} descriptors are kept")
    print(f"away after kill -9: {min(away):.2f} to {max(away):.2f} s, {kills} kills")
    print(f"{clients.rounds} rounds")

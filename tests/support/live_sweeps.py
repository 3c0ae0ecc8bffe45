"""kill -9 of cprd at each step of each verb of a live hold. For every keeper: see `Kept`.

The owner is this process; the small client (live.py) repeats a request to the next cprd. So each
request has to come true once, and what is kept has to stay whole.
"""

from __future__ import annotations

import os
from typing import Any

from cprd.errors import Fenced
from cprd.live.reader import Found
from cprd.protocol.lifecycle import CLAIMED, HELD, LIVE
from tests.support.child import Child, Line
from tests.support.keeping import Kept, Task, Thing, things
from tests.support.live import Live
from tests.support.patience import until
from tests.support.sweeps import GONE

MANY = 40  # keys: more than a segment


def fill(live: Live, thing: Thing) -> None:
    """Keep the pipe of `thing` under many keys."""
    owner = live.kept
    for id in range(MANY):
        owner.save_fd("pipe", id, thing.state.find_fd("pipe", 0))
    owner.save_section("number", thing.number)


def is_whole(found: Found, thing: Thing) -> bool:
    """Whether all of it came back."""
    inode = os.fstat(thing.reading).st_ino
    keys = [(name, id, os.fstat(fd).st_ino) for name, id, fd in found.state.fds()]
    return found.state["number"] == thing.number and keys == [
        ("pipe", id, inode) for id in range(MANY)
    ]


class LiveStep:
    """One live hold under a name of its own. `act` is what cprd dies of; afterwards the hold is in
    phase `after`."""

    after = LIVE

    def __init__(self, keeping: Kept, name: str, thing: Thing) -> None:
        self.keeping, self.name, self.thing = keeping, name, thing
        self.live: Live | None = None
        self.before()

    def before(self) -> None:
        self.live = self.begun()

    def act(self) -> None:
        raise NotImplementedError

    def begun(self) -> Live:
        live = Live(self.keeping.path, self.name)
        fill(live, self.thing)
        return live

    @property
    def mine(self) -> Live:
        assert self.live is not None
        return self.live

    def close(self) -> None:
        if self.live is not None:
            self.live.close()


class Begin(LiveStep):
    def before(self) -> None:
        pass

    def act(self) -> None:
        self.live = self.begun()


class Close(LiveStep):
    after = HELD

    def act(self) -> None:
        self.mine.end(keep=True)


class End(LiveStep):
    after = GONE

    def act(self) -> None:
        self.mine.end(keep=False)


class Take(LiveStep):
    """Claim what another owner left."""

    after = CLAIMED

    def before(self) -> None:
        former = self.begun()
        former.end(keep=True)
        former.close()

    def act(self) -> None:
        self.live = Live(self.keeping.path, self.name)
        assert self.live.answer["found"]


class TakeOver(Take):
    """Confirm: the old hold ends shallow, and the same segments go on under the new root."""

    after = LIVE

    def before(self) -> None:
        super().before()
        super().act()

    def act(self) -> None:
        self.mine.confirm()


class DropByForce(LiveStep):
    after = GONE

    def act(self) -> None:
        with self.keeping.connect() as daemon:
            daemon.drop(self.name, force=True)
        try:
            self.mine.kept.save_section("late", 1)
        except Fenced:
            return
        raise AssertionError("acknowledged after the drop")


class OwnerKilled(LiveStep):
    after = HELD

    def before(self) -> None:
        def own(line: Line) -> None:
            live = self.begun()
            line.say("begun")
            line.hear()
            live.close()

        self.owner = Child(own)
        assert self.owner.hear() == "begun"

    def act(self) -> None:
        self.owner.kill()
        until(lambda: self.keeping.phases()[self.name] == HELD, lambda: "no end of the owner")

    def close(self) -> None:
        with self.owner:
            pass


LIVE_VERBS = [Begin, Close, End, Take, TakeOver, DropByForce, OwnerKilled]


def sweep_live(keeping: Kept, verb: type[LiveStep]) -> int:
    """Kill cprd at each point of one verb, and at none. How many points there are."""
    at = 0
    stopped = True
    while stopped:
        at += 1
        name = f"{verb.__name__}{at}"
        with things(at) as (thing,):
            step = verb(keeping, name, thing)
            try:
                keeping.arm(f"#{at}")
                task = Task(step.act)
                stopped = keeping.await_stop(task.done)
                if stopped:
                    keeping.kill()
                else:
                    keeping.arm("")
                task.result()
                phases = keeping.phases()
                assert phases.get(name, GONE) == step.after, f"{name}: {phases}"
                _finish(step)
            finally:
                step.close()
            thing.saved()
            assert thing.let_go(), f"{name}: not let go of"
            assert not keeping.phases()
    print(f"{verb.__name__}: {at - 1} points")
    return at - 1


def _finish(step: LiveStep) -> None:
    """Go on with what is there: change it, leave it, find it whole, and end it."""
    if step.after == GONE:
        return
    if step.after == LIVE:
        owner = step.mine.kept
        owner.save_section("after", 1)
        owner.delete_section("after")
        owner.delete_fd("pipe", 7)
        owner.save_fd("pipe", 7, step.thing.state.find_fd("pipe", 0))
        owner.delete_fd("pipe", 7)
        _put_in_order(owner, step.thing)
        step.mine.end(keep=True)
    with step.mine if step.after == CLAIMED else Live(step.keeping.path, step.name) as live:
        assert live.answer["found"]
        assert is_whole(live.read(), step.thing)
        live.confirm()
        live.end(keep=False)


def _put_in_order(owner: Any, thing: Thing) -> None:
    """Key 7 and all after key 7 anew, in order."""
    with owner.batch() as batch:
        for id in range(8, MANY):
            batch.delete_fd("pipe", id)
    with owner.batch() as batch:
        for id in range(7, MANY):
            batch.save_fd("pipe", id, thing.state.find_fd("pipe", 0))

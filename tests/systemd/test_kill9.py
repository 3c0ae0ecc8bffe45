"""kill -9 of cprd at each step of each verb, on a real systemd, in the unit that we ship.

The client's library hides each of these deaths: it repeats its request to the next cprd. So each
request has to come true once, however often cprd died over it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cprd
from cprd.protocol.registry import CLAIMED, HELD, IN_DOUBT, PREPARED

from .keeping import UNIT, Keeping, Task, Thing, things
from .machine import Machine

GONE = ""


@pytest.fixture
def keeping(systemd: Machine) -> Keeping:
    return Keeping(systemd)


class Step:
    """One hold under a name of its own, and a connection to cprd. `act` is what cprd dies of;
    afterwards the hold is in phase `after`, and what `ends` names is let go of by everybody."""

    after = HELD
    ends: tuple[int, ...] = ()

    def __init__(self, daemon: cprd.Daemon, name: str, old: Thing, new: Thing) -> None:
        self.daemon, self.name, self.old, self.new = daemon, name, old, new
        self.claim: cprd.Claim | None = None
        self.prepared: cprd.Prepared | None = None
        self.before()

    def before(self) -> None:
        """What is there when cprd is killed over `act`."""
        self.daemon.save(self.name, self.old.state)

    def act(self) -> None:
        raise NotImplementedError

    def load(self) -> cprd.Claim:
        self.claim = self.daemon.load(self.name, lease=600)
        return self.claim


class Save(Step):
    def before(self) -> None:
        pass

    def act(self) -> None:
        self.daemon.save(self.name, self.old.state, require="store")


class Replace(Step):
    ends = (0,)

    def act(self) -> None:
        self.daemon.save(self.name, self.new.state, if_exists="replace")


class Prepare(Step):
    after = PREPARED

    def before(self) -> None:
        pass

    def act(self) -> None:
        self.prepared = self.daemon.prepare(self.name, self.old.state)


class Commit(Step):
    ends = (0,)

    def before(self) -> None:
        self.daemon.save(self.name, self.old.state)
        self.prepared = self.daemon.prepare(self.name, self.new.state, if_exists="replace")

    def act(self) -> None:
        assert self.prepared is not None
        self.prepared.commit()


class Abort(Commit):
    ends = (1,)

    def act(self) -> None:
        assert self.prepared is not None
        self.prepared.abort()


class Load(Step):
    after = CLAIMED

    def act(self) -> None:
        claim = self.load()
        assert claim.attempts == 1
        assert self.old.is_in(claim)


class Begin(Step):
    after = IN_DOUBT

    def before(self) -> None:
        super().before()
        self.load()

    def act(self) -> None:
        assert self.claim is not None
        self.claim.begin()


class Confirm(Begin):
    after = GONE
    ends = (0,)

    def act(self) -> None:
        assert self.claim is not None
        self.claim.confirm()
        self.claim.close()


class ConfirmNext(Begin):
    after = HELD
    ends = (0,)

    def act(self) -> None:
        assert self.claim is not None
        self.claim.confirm(next=self.new.state, after_exit=False)
        self.claim.close()


class ConfirmBegun(Confirm):
    def before(self) -> None:
        super().before()
        assert self.claim is not None
        self.claim.begin()


class Reject(Begin):
    after = HELD

    def act(self) -> None:
        assert self.claim is not None
        self.claim.reject("not today")
        self.claim.close()


class Drop(Step):
    after = GONE
    ends = (0,)

    def act(self) -> None:
        self.daemon.drop(self.name)


class Release(Begin):
    after = HELD

    def before(self) -> None:
        super().before()
        assert self.claim is not None
        self.claim.begin()

    def act(self) -> None:
        with cprd.connect(self.daemon._connection.path) as other:
            other.release(self.name)


VERBS = [
    *(Save, Replace, Prepare, Commit, Abort, Load, Begin, Confirm, ConfirmNext),
    *(ConfirmBegun, Reject, Drop, Release),
]


def sweep(keeping: Keeping, verb: type[Step], again: bool = False) -> int:
    """Kill it at each point of one verb, and at none. With `again`, once more after the answer.
    How many points there are."""
    previous: tuple[str, str] | None = None
    at = 0
    stopped = True
    while stopped:
        at += 1
        name = f"{verb.__name__}{at}"
        with contextlib.ExitStack() as stack:
            old, new = stack.enter_context(things(2 * at, 2 * at + 1))
            daemon = stack.enter_context(keeping.connect())
            step = verb(daemon, name, old, new)
            keeping.arm(f"#{at}")
            task = Task(step.act)
            stopped = keeping.await_stop(task.done)
            if stopped:
                keeping.kill()
            else:
                keeping.arm("")
            task.result()
            for thing in (old, new):
                thing.saved()
            for index in step.ends:
                assert (old, new)[index].let_go(), f"{name}: still held 1 s after its end"
            if again:
                keeping.kill()
            phases = keeping.phases()
            assert phases.get(name, GONE) == step.after, f"{name}: {phases}"
            if previous is not None:  # answered by the one before, and that was killed since
                assert phases.get(previous[0], GONE) == previous[1], previous
            whole(keeping, step, old, new)
            previous = None if step.after == GONE else (name, HELD)
            assert set(phases) <= {name, f"{verb.__name__}{at - 1}"}
            clean(daemon, name, at)
            for index, thing in enumerate((old, new)):
                stays = step.after != GONE and index == (0 in step.ends)
                assert stays or thing.let_go(), f"{name}: not let go of"
    with keeping.connect() as daemon:
        clean(daemon, f"{verb.__name__}{at + 1}", at + 1)
        assert not keeping.phases()
    print(f"{verb.__name__}: {at - 1} points")
    return at - 1


def whole(keeping: Keeping, step: Step, old: Thing, new: Thing) -> None:
    """What is there is all there; and what was claimed can be gone on with."""
    there = new if 0 in step.ends else old
    if step.after == PREPARED:
        assert step.prepared is not None
        step.prepared.commit()
    elif step.after in (CLAIMED, IN_DOUBT):
        assert step.claim is not None
        step.claim.reject("and back")
        step.claim.close()
    elif step.after == GONE:
        return
    with keeping.connect() as daemon:
        claim = daemon.load(step.name)
        assert there.is_in(claim)
        claim.reject("and back")
        claim.close()


def clean(daemon: cprd.Daemon, name: str, at: int) -> None:
    """Drop all but what is to be looked at after the next kill."""
    for row in daemon.list():
        if row["name"] != name:
            daemon.drop(row["name"], force=True)


@pytest.mark.parametrize("verb", VERBS)
def test_killed_at_each_step_it_is_done_once(keeping: Keeping, verb: type[Step]) -> None:
    assert sweep(keeping, verb) >= 2
    keeping.await_kept("store")


SMALL = (
    "cprd.daemon.storage.shelf.WANTED_BUFFER = 8192\ncprd.daemon.storage.shelves.MAX_RECORDS = 2\n"
)


@pytest.mark.full
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("settings", ["", SMALL])
def test_killed_at_each_step_and_again_after_the_answer(
    systemd: Machine, verb: type[Step], settings: str
) -> None:
    """With small shelves and slots these are written anew in between."""
    assert sweep(Keeping(systemd, settings=settings), verb, again=True) >= 2


REWRITE = [
    *("shelf:slots", "shelf:outcomes", "shelf:filled", "shelf:complete", "keeper:compacted"),
    *("store:offer", "store:asked", "store:remove", "store:removed", "keeper:replaced"),
]


def test_killed_at_each_step_of_writing_a_shelf_anew(systemd: Machine) -> None:
    """Small shelves, so that this takes some 20 requests: standing holds in all phases, of which
    one is rejected over and over until its slot is written anew."""
    keeping = Keeping(systemd, settings=SMALL)
    with contextlib.ExitStack() as stack:
        held, rejected, doubted = made = stack.enter_context(things(1, 2, 3))
        daemon = stack.enter_context(keeping.connect())
        daemon.save("held", held.state)
        daemon.save("rejected", rejected.state)
        daemon.save("doubted", doubted.state)
        claim = daemon.load("doubted")
        claim.begin()
        for thing in made:
            thing.saved()

        def stream() -> None:
            for number in range(40):
                daemon.save("x", cprd.State())
                if number % 4 == 0:
                    daemon.load("rejected").close()
                daemon.drop("x")

        for where in REWRITE:
            keeping.arm(where)
            task = Task(stream)
            assert keeping.await_stop(task.done), f"{where} was not passed"
            keeping.kill()
            task.result()
            expected = {"held": HELD, "rejected": HELD, "doubted": IN_DOUBT}
            assert keeping.phases() == expected, where
            keeping.await_kept("store")
        claim.confirm()
        claim.close()
        assert doubted.let_go()
        for name, thing in (("held", held), ("rejected", rejected)):
            with daemon.load(name) as claim:
                assert thing.is_in(claim)
            assert thing.let_go()


def test_killed_at_each_step_of_its_start(keeping: Keeping) -> None:
    """What came in from the store is written anew, stored, and what it replaces taken out."""
    with contextlib.ExitStack() as stack:
        held, doubted = stack.enter_context(things(1, 2))
        daemon = stack.enter_context(keeping.connect())
        daemon.save("held", held.state)
        daemon.save("doubted", doubted.state)
        claim = daemon.load("doubted")
        claim.begin()
        held.saved()
        doubted.saved()
        at = 0
        keeping.arm_at_start("#1")
        while True:
            at += 1
            keeping.kill()
            ready = Task(keeping.phases)
            if not keeping.await_stop(ready.done):
                break
            keeping.arm_at_start(f"#{at + 1}")
        assert at > 4
        keeping.arm_at_start("")
        assert ready.result() == {"held": HELD, "doubted": IN_DOUBT}
        keeping.await_kept("store")
        # Nothing gathers in the store: a shelf, a spare one, and for a moment a canary.
        keeping.kill()
        keeping.await_kept("store")
        assert int(keeping.machine.show(UNIT, "NFileDescriptorStore")) <= 7
        with daemon.load("held") as loaded:
            assert held.is_in(loaded)
        claim.confirm()
        claim.close()
        assert held.let_go()
        assert doubted.let_go()


def test_killed_while_its_clients_are_gone_as_well(keeping: Keeping) -> None:
    """Nobody repeats the request: it was done, or it was not."""
    program = Path(keeping.machine.root) / "run/boot/one.py"
    program.write_text(
        "import sys, os, cprd\n"
        "state = cprd.State(); state['n'] = 1; state.save_fd('e', 0, os.eventfd(3))\n"
        "daemon = cprd.connect()\n"
        "if sys.argv[1] == 'prepare': p = daemon.prepare('web', state); p.commit()\n"
        "else:\n"
        "    daemon.save('web', state)\n"
        "    daemon.load('web').confirm(); print('confirmed', flush=True)\n"
    )
    seen = set()
    for verb, points in (("prepare", (1, 3, 5, 7)), ("confirm", (6, 9, 11, 13))):
        for at in points:
            keeping.arm(f"#{at}")
            client = keeping.machine.popen("test-python", "/run/boot/one.py", verb)
            assert keeping.await_stop(lambda client=client: client.poll() is not None)  # type: ignore[misc]
            keeping.machine.signal(client, signal.SIGKILL)
            client.wait()
            keeping.kill()
            rows = keeping.rows()
            seen.add((verb, rows["web"]["phase"] if rows else GONE))
            if rows:
                assert rows["web"]["fds"] == 1
                with keeping.connect() as daemon:
                    if rows["web"]["phase"] == IN_DOUBT:
                        daemon.release("web")
                    with daemon.load("web", wait=5) as claim:
                        assert claim.state["n"] == 1
                        assert claim.state.fd_count == 1
            assert not keeping.phases()
    assert ("prepare", IN_DOUBT) in seen
    assert ("confirm", GONE) in seen
    assert ("confirm", HELD) in seen


ROUNDS = """
import os, select, sys, cprd
name = sys.argv[1]
number = 0
with cprd.connect() as daemon:
    before = 0
    while True:
        number += 1
        reading, writing = os.pipe()
        state = cprd.State()
        state["number"] = number
        state.save_fd("pipe", 0, writing)
        if number % 2:
            saved = daemon.save(name, state)
        else:
            prepared = daemon.prepare(name, state)
            saved = prepared.commit()
        os.close(writing)
        assert saved.generation > before, (saved.generation, before)
        before = saved.generation
        with daemon.load(name, wait=20) as claim:
            assert claim.generation == saved.generation, (claim.generation, saved.generation)
            assert claim.state["number"] == number and claim.attempts == 1
            if number % 5 == 0:
                claim.reject("again")
        if number % 5 == 0:
            with daemon.load(name, wait=20) as claim:
                assert claim.state["number"] == number and claim.attempts == 2
                claim.begin()
        assert all(row["name"] != name for row in daemon.list()), "confirmed, and there again"
        poll = select.poll()
        poll.register(reading, select.POLLIN)
        assert poll.poll(1000), "confirmed, and still held 1 s later"
        os.close(reading)
        print(".", end="", flush=True)
"""


class Stream:
    """Clients in processes of their own, round after round. A dot for each round of any."""

    def __init__(self, keeping: Keeping, clients: int) -> None:
        (keeping.machine.root / "run/boot/rounds.py").write_text(ROUNDS)
        self.machine = keeping.machine
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        self.dots = reading
        self.errors = keeping.machine.root / "run/boot/errors"
        with open(self.errors, "wb") as errors:
            self.clients = [
                keeping.machine.popen(
                    *("test-python", "/run/boot/rounds.py", f"client{number}"),
                    stdout=writing,
                    stderr=errors,
                    user="daemon" if number % 3 == 0 else None,
                )
                for number in range(clients)
            ]
        os.close(writing)
        self.rounds = 0

    def advance(self, rounds: int) -> None:
        """Wait until they have made so many more."""
        wanted = self.rounds + rounds
        while self.rounds < wanted:
            self.look()
            assert select.select([self.dots], [], [], 60)[0], "no round in 60 s"
            self.rounds += len(os.read(self.dots, 4096))
        self.look()

    def look(self) -> None:
        """Raise what any of them ended with."""
        if any(client.poll() is not None for client in self.clients):
            raise AssertionError(self.errors.read_text())

    def end(self) -> None:
        for client in self.clients:
            if client.poll() is None:
                self.machine.signal(client, signal.SIGKILL)
        for client in self.clients:
            client.wait()
        os.close(self.dots)


@pytest.fixture
def stream(keeping: Keeping) -> Iterator[Callable[[int], Stream]]:
    with contextlib.ExitStack() as stack:

        def start(clients: int) -> Stream:
            one = Stream(keeping, clients)
            stack.callback(one.end)
            return one

        yield start


def disturb(keeping: Keeping, stream: Stream, how: list[str], rounds: int) -> None:
    for what in how:
        stream.advance(random.randrange(1, rounds))
        if what == "kill":
            keeping.kill()
        elif what == "daemon-reexec":
            keeping.systemctl("daemon-reexec")
        else:
            keeping.systemctl(what, UNIT)
    stream.advance(rounds)


def test_killed_restarted_and_reloaded_under_load_no_client_sees_it(
    keeping: Keeping, stream: Callable[[int], Stream]
) -> None:
    clients = stream(5)
    disturb(keeping, clients, ["kill", "kill", "restart", "reload", "daemon-reexec", "kill"], 60)
    assert clients.rounds > 60


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_hundred_restarts_under_twenty_clients(
    keeping: Keeping, stream: Callable[[int], Stream]
) -> None:
    how = random.choices(["kill", "restart", "reload", "daemon-reexec"], [7, 1, 1, 1], k=100)
    disturb(keeping, stream(20), how, 200)
    assert keeping.kept() == "store"
    listed = json.loads(keeping.machine.run("cprctl", "list", "--json"))
    assert len(listed) <= 20


def test_a_daemon_reload_and_a_sigterm_in_the_midst_of_a_load_are_not_noticed(
    keeping: Keeping,
) -> None:
    with things(1) as (thing,), keeping.connect() as daemon:
        daemon.save("web", thing.state, require="store")
        thing.saved()
        keeping.arm("daemon:claimed")
        task = Task(lambda: daemon.load("web"))
        assert keeping.await_stop()
        keeping.machine.systemctl("daemon-reload")
        os.kill(keeping.pid, signal.SIGTERM)
        os.kill(keeping.pid, signal.SIGCONT)
        keeping.await_start()
        claim = task.result()
        assert claim.attempts == 1
        assert thing.is_in(claim)
        keeping.machine.systemctl("daemon-reload")
        claim.confirm()
        claim.close()
        assert thing.let_go()
        assert not keeping.phases()

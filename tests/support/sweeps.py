"""kill -9 of cprd at each step of each verb, of its start, and of writing a shelf anew; and under
clients that go round after round. For every keeper: see `Kept`.

The client's library hides each of these deaths: it repeats its request to the next cprd. So each
request has to come true once, however often cprd died over it.
"""

from __future__ import annotations

import contextlib
import os
import select
import tempfile

import cprd
from cprd.protocol.lifecycle import CLAIMED, HELD, IN_DOUBT, PREPARED
from tests.support.keeping import Kept, Task, Thing, things
from tests.support.patience import PATIENCE, patience

GONE = ""


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
        with cprd.connect(self.daemon._line.path) as other:
            other.release(self.name)


VERBS = [
    *(Save, Replace, Prepare, Commit, Abort, Load, Begin, Confirm, ConfirmNext),
    *(ConfirmBegun, Reject, Drop, Release),
]


def sweep(keeping: Kept, verb: type[Step], again: bool = False) -> int:
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


def whole(keeping: Kept, step: Step, old: Thing, new: Thing) -> None:
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


REWRITE = [
    *("shelf:queues", "shelf:pidfds", "shelf:filled", "shelf:complete", "keeper:compacted"),
    *(
        "store:offer",
        "store:asked",
        "store:remove",
        "store:removed",
        "journal:moved",
        "journal:freed",
    ),
]


def sweep_rewriting(keeping: Kept) -> None:
    """Shelves are to be SMALL, so that this takes some 20 requests: standing holds in all phases,
    of which one is rejected over and over until the journal is moved."""
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
                kept = daemon.save("x", cprd.State()).kept
                if number % 4 == 0:
                    daemon.load("rejected").close()
                try:
                    daemon.drop("x")
                except cprd.NotHeld:  # a store that is slower than this stream has no shelf yet
                    assert kept == "memory"

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


def sweep_start(keeping: Kept) -> None:
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
        # Nothing gathers in the store: a shelf, a spare one, and for a moment a probe.
        keeping.kill()
        keeping.await_kept("store")
        assert keeping.stored() <= 7
        with daemon.load("held") as loaded:
            assert held.is_in(loaded)
        claim.confirm()
        claim.close()
        assert held.let_go()
        assert doubted.let_go()


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
        assert poll.poll(BOUND * 1000), "confirmed, and still held"
        os.close(reading)
        print(".", end="", flush=True)
""".replace("BOUND", repr(patience(1)))


LIVE_ROUNDS = """
import mmap, os, random, signal, struct, sys, time, cprd
name = sys.argv[1]
returned = mmap.mmap(-1, 8)  # shared: the number of the last change that returned

def own(end):
    last, = struct.unpack("q", returned)
    with cprd.live(name, wait=20) as state:
        number = state["number"] if state.found else 0
        assert number in (last, last + 1), (number, last)
        assert [id for _, id, _ in state.fds()] == [number] * (number > 0), (number, [*state.fds()])
        state.confirm()
        until = number + 20 if end else 1 << 40
        while number < until:
            number += 1
            with state.batch():
                state["number"] = number
                state.delete_fd("null", number - 1)
                state.save_fd("null", number, null)
            returned[:] = struct.pack("q", number)
        state.end()

null = os.open("/dev/null", os.O_RDONLY)
round = 0
while True:
    round += 1
    end = round % 10 == 0
    child = os.fork()
    if not child:
        own(end)
        os._exit(0)
    if not end:
        time.sleep(random.uniform(0, 0.03))  # anywhere: in live(), at the take-over, in a change
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (0 if end else -signal.SIGKILL), status
    if end:
        returned[:] = bytes(8)
    print(".", end="", flush=True)
"""


class Stream:
    """Clients in processes of their own, round after round. A dot for each round of any. Every
    fourth has a live hold, whose owner is killed in each round."""

    def __init__(self, keeping: Kept, clients: int, *, user: str | None = "daemon") -> None:
        """`user`: whom every third client belongs to."""
        self.keeping = keeping
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        self.dots = reading
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  # until end()
        self.clients = [
            keeping.client(
                *(LIVE_ROUNDS if number % 4 == 1 else ROUNDS, f"client{number}"),
                stdout=writing,
                stderr=self.errors,
                user=user if number % 3 == 0 else None,
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
            assert select.select([self.dots], [], [], PATIENCE)[0], "no round"
            self.rounds += len(os.read(self.dots, 4096))
        self.look()

    def look(self) -> None:
        """Raise what any of them ended with."""
        if any(client.poll() is not None for client in self.clients):
            self.errors.seek(0)
            raise AssertionError(self.errors.read().decode(errors="replace"))

    def end(self) -> None:
        for client in self.clients:
            if client.poll() is None:
                self.keeping.kill_client(client)
        for client in self.clients:
            client.wait()
        self.errors.close()
        os.close(self.dots)

"""The shelf and the journal: killed at each step of each change, full, torn in half, refused.

Where a test kills, it does so in a forked child that has the shelves as systemd's store has them:
this process keeps its own descriptors of them, and takes over what the child left.
"""

from __future__ import annotations

import os
import resource
import select
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import cprd
from cprd.bundle.unpack import unpack
from cprd.daemon.releaser import DRAIN, WHOLE, let_go, let_go_of_live
from cprd.daemon.releasing import Releasing
from cprd.daemon.storage import journal, record, shelf, shelves, slot
from cprd.daemon.storage.shelf import Shelf
from cprd.daemon.storage.shelves import Keeper
from cprd.errors import LimitExceeded
from cprd.linux.rights import close_all
from cprd.protocol import holds
from cprd.protocol.lifecycle import CLAIMED, HELD, UNREADABLE, Hold
from cprd.protocol.registry import Caller, Ended, Offer, Registry, Step, Ticket
from cprd.protocol.replies import KEPT_FOR, Replies, Reply
from tests.daemon import test_recorded as recorded
from tests.support.bundles import Bundle, pack

NOW = 1000.0
EMPTY = Offer(0, 0)
KILLED = 99
Point = Callable[[str], None]


class AtOnce(Releasing):
    """Releases in this process, so that a sweep kills before and after."""

    def __init__(self) -> None:
        self.draining = set()  # no process is wanted

    def close(self, uid: int, fds: Iterable[int]) -> None:
        for fd in fds:
            os.close(fd)

    def drain(
        self,
        uid: int,
        fd: int,
        how: bytes = DRAIN,
        done: Callable[[bytes], None] | None = None,
    ) -> None:
        if how == DRAIN:
            let_go(fd)
        else:
            let_go_of_live(fd, deep=how == WHOLE)
        os.close(fd)
        if done is not None:
            done(b"")


def a_keeper(releasing: Releasing | None = None, *, managed: bool = False) -> Keeper:
    return Keeper(releasing or AtOnce(), lambda: NOW, Replies(), managed=managed)


def caller(nonce: int = 0) -> Caller:
    """One with a request that is the same whenever the number is."""
    said = b"%016d" % nonce if nonce else os.urandom(16)
    return Caller(1000, 4242, NOW, said, b"of" + said)


class Desk:
    """What the daemon does with a step, without the daemon."""

    def __init__(self, kept: Keeper | None = None, first_generation: int = 1) -> None:
        self.keeper = kept or a_keeper()
        self.registry = Registry(first_generation=first_generation)
        self.registry.replies = self.keeper.replies
        self.pipes: dict[int, int] = {}  # number of a state -> the writing end that is in it

    def adopt(
        self, pairs: dict[int, tuple[socket.socket, socket.socket]], *, stored: bool = True
    ) -> str:
        """As at the daemon's start; why there may be holds that nobody can name."""
        found, blind = self.keeper.adopt(pairs, frozenset(pairs if stored else ()))
        for over in self.registry.adopt(hold for hold, _ in found):
            self.keeper.forget(over)
        return blind

    def perform(self, step: Step, number: int = 0) -> dict[str, Any]:
        if step.changes:
            packed = self.pack(number) if number else None
            try:
                self.keeper.write(step, packed.fd if packed else -1, {})
            finally:
                if packed is not None:
                    packed.close()
            self.registry.apply(step)
            self.keeper.let_go(step.ended)
        return step.answer

    def pack(self, number: int) -> Bundle:
        state = cprd.State()
        state["number"] = number
        if number in self.pipes:
            state.save_fd("pipe", 0, self.pipes[number])
        return pack(state)

    def number(self, hold: Hold) -> int:
        state = unpack(self.keeper.bundle(hold.generation))
        try:
            found: int = state["number"]
            return found
        finally:
            state.close()

    def snapshot(self) -> list[tuple[str, str, int]]:
        """(name, phase, number of its state), older first."""
        holds = sorted(self.registry, key=lambda hold: (hold.name, hold.generation))
        return [(hold.name, hold.phase, self.number(hold)) for hold in holds]

    def save(
        self, name: str, number: int, nonce: int = 0, *, how: str = "replace", prepare: bool = False
    ) -> dict[str, Any]:
        step = self.registry.save(
            caller(nonce),
            (1000, name),
            EMPTY,
            replacing=how == "replace",
            token=TOKEN if prepare else b"",
        )
        return self.perform(step, number)

    def load(self, name: str, nonce: int = 0) -> dict[str, Any]:
        return self.perform(
            self.registry.load(caller(nonce), (1000, name), token=TOKEN, lease=30.0)
        )

    def reject(self, name: str) -> None:
        top = self.registry.top((1000, name))
        ticket = Ticket(top.key, top.generation, TOKEN)
        self.perform(self.registry.reject(caller(), ticket, "no"))

    def drop(self, name: str, nonce: int = 0) -> dict[str, Any]:
        return self.perform(self.registry.drop(caller(nonce), (1000, name), force=True))


TOKEN = b"t" * 16


class Op(NamedTuple):
    verb: str
    name: str = ""
    number: int = 0


SCRIPT = [
    Op("save", "a", 1),
    Op("save", "b", 2),
    Op("prepare", "c", 3),
    Op("commit", "c"),
    Op("load", "a"),
    Op("reject", "a"),
    Op("load", "a"),
    Op("begin", "a"),
    Op("confirm", "a"),
    Op("save", "b", 4),
    Op("load", "b"),
    Op("confirm_next", "b", 5),
    Op("prepare", "c", 6),
    Op("commit", "c"),
    Op("compact"),
    Op("prepare", "d", 7),
    Op("abort", "d"),
    Op("load", "c"),
    Op("begin", "c"),
    Op("drop", "b"),
    Op("release", "c"),
    Op("drop", "c"),
]


def act(desk: Desk, index: int, generation: int) -> None:
    """Do SCRIPT[index] at `desk`: to the hold of that generation, where it is about one."""
    verb, name, number = SCRIPT[index]
    by, ticket = caller(index + 1), Ticket((1000, name), generation, TOKEN)
    registry = desk.registry
    if verb in ("save", "prepare"):
        desk.save(name, number, index + 1, prepare=verb == "prepare")
    elif verb == "compact":
        desk.keeper.compact()
    elif verb in ("commit", "abort"):
        walk = registry.commit if verb == "commit" else registry.abort
        desk.perform(walk(by, ticket))
    elif verb == "load":
        desk.load(name, index + 1)
    elif verb == "begin":
        desk.perform(registry.begin(by, ticket))
    elif verb == "confirm":
        desk.perform(registry.confirm(by, ticket))
    elif verb == "confirm_next":
        desk.perform(registry.confirm_next(by, ticket, EMPTY), number)
    elif verb == "reject":
        desk.perform(registry.reject(by, ticket, "no"))
    elif verb == "release":
        desk.perform(registry.release(by, ticket.key, force=True))
    else:
        assert verb == "drop"
        desk.drop(name, index + 1)


def generation_of(desk: Desk, index: int) -> int:
    records = desk.registry.of((1000, SCRIPT[index].name))
    return records[-1].generation if records else 0


def ends(shelves: list[Shelf]) -> dict[int, tuple[socket.socket, socket.socket]]:
    return {one.number: (one.outlet, one.tx) for one in shelves}


def stored(kept: Keeper) -> Keeper:
    """With a shelf and a spare that count as stored."""
    kept.shelf.durable = kept.shelf.was_durable = True
    kept.spare = kept.new_spare()
    kept.spare.durable = kept.spare.was_durable = True
    return kept


@pytest.fixture
def few_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal is moved every few records; each change meets a hold at rest."""
    monkeypatch.setattr(journal, "MANY_BYTES", 1500)
    monkeypatch.setattr(holds, "AWAKE", 0)


def arm(at: int) -> None:
    """End this process without a word at the `at`-th point from now on."""
    left = at

    def point(name: str) -> None:
        nonlocal left
        left -= 1
        if not left:
            os._exit(KILLED)

    for module in (shelves, shelf, slot, journal):
        module.point = point  # type: ignore[attr-defined]


def has_ended(pipe: int) -> bool:
    """Whether nobody has the writing end any more."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    return bool(poll.poll(0))


@pytest.mark.usefixtures("nothing_leaks")
def test_killed_at_any_step_of_any_change_all_that_was_answered_is_there(few_records: None) -> None:
    desk = Desk(stored(a_keeper(managed=True)))
    generations, snapshots = [], [desk.snapshot()]
    for index in range(len(SCRIPT)):
        generations.append(generation_of(desk, index))
        act(desk, index, generations[-1])
        snapshots.append(desk.snapshot())
    close(desk)

    at = 0
    status = KILLED
    steps = set()
    while status == KILLED:
        at += 1
        status, done = killed_at(at, generations, snapshots)
        steps.add(done)
    assert status == 0
    assert done == len(SCRIPT)
    assert at > 2 * len(SCRIPT)
    assert steps == set(range(len(SCRIPT) + 1))  # killed within each of them


def close(desk: Desk) -> None:
    desk.keeper.close()


def leave(desk: Desk) -> dict[int, tuple[socket.socket, socket.socket]]:
    """End a cprd. Its shelves, as the store has them."""
    left = ends(desk.keeper.shelves())
    for place in desk.keeper.places.values():
        place.close()
    for one in desk.keeper.journals:
        one.close()
    return left


def killed_at(at: int, generations: list[int], snapshots: list[Any]) -> tuple[int, int]:
    """The script in a child that is killed at its `at`-th point. How it ended, and how many of its
    changes were answered."""
    before = Desk(stored(a_keeper(managed=True)))
    pipes = {op.number: os.pipe() for op in SCRIPT if op.number}
    answered, answers = os.pipe()
    child = os.fork()
    if not child:
        try:
            for number, (_, writing) in pipes.items():
                before.pipes[number] = writing
            arm(at)
            for index in range(len(SCRIPT)):
                act(before, index, generations[index])
                os.write(answers, b".")
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
    os.close(answers)
    for _, writing in pipes.values():
        os.close(writing)
    with open(answered, "rb") as file:
        done = len(file.read())
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    after = Desk(first_generation=1_000_000)
    assert not after.adopt(leave(before))
    found = after.snapshot()
    where = f"killed at point {at}, after {done} answers"
    assert found in snapshots[done : done + 2], where
    there = {number for _, _, number in found}
    assert {n for n, (reading, _) in pipes.items() if not has_ended(reading)} == there, where

    # What was answered, and what was not, is asked for again: it is done once.
    if done < len(SCRIPT):
        expected = found == snapshots[done + 1]
        act(after, done, generations[done])
        assert after.snapshot() == snapshots[done + 1], (where, expected)
    close(after)
    for reading, _ in pipes.values():
        os.close(reading)
    return status, done


@pytest.mark.usefixtures("nothing_leaks")
def test_each_answer_is_given_again_after_a_restart(few_records: None) -> None:
    """Also where the hold has gone on since, or is gone."""
    for last in range(len(SCRIPT)):
        desk = Desk(stored(a_keeper(managed=True)))
        generations = []
        for index in range(last + 1):
            generations.append(generation_of(desk, index))
            act(desk, index, generations[-1])
        before = desk.snapshot()
        again = Desk(first_generation=1_000_000)
        again.adopt(leave(desk))
        since = [
            index
            for index in range(max(0, last - 3), last + 1)
            if SCRIPT[index].verb in ("save", "commit", "abort", "confirm", "confirm_next")
            or (SCRIPT[index].verb in ("reject", "drop", "release") and index == last)
        ]
        for index in since:
            act(again, index, generations[index])
            assert again.snapshot() == before, (SCRIPT[last], SCRIPT[index])
        close(again)


@pytest.fixture
def small_shelves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "WANTED_BUFFER", 8192)


@pytest.fixture
def desk() -> Iterator[Desk]:
    one = Desk()
    yield one
    close(one)


@pytest.mark.usefixtures("nothing_leaks", "small_shelves")
def test_a_shelf_of_ended_slots_is_written_anew_without_them(desk: Desk) -> None:
    first = desk.keeper.shelf.number
    room = desk.keeper.shelf.room
    desk.save("stays", 1)
    for _ in range(5 * room):
        desk.save("goes", 2)
        desk.drop("goes")
    assert desk.keeper.shelf.number >= first + 3
    assert desk.keeper.shelf.messages <= room
    assert desk.snapshot() == [("stays", HELD, 1)]
    assert len(desk.keeper.replies.pending(NOW)) > room


@pytest.mark.usefixtures("nothing_leaks", "small_shelves")
def test_more_holds_than_a_shelf_has_room_for_are_refused_and_the_rest_stays(desk: Desk) -> None:
    kept = 0
    try:
        while kept < 100_000:
            desk.save(f"n{kept}", kept + 1)
            kept += 1
    except LimitExceeded as error:
        refusal = str(error)
    assert "wmem_max" in refusal
    assert kept > 500
    assert len(desk.snapshot()) == kept
    desk.drop("n0")
    left = Desk(first_generation=10**6)
    pairs = ends(desk.keeper.shelves())
    copies = {number: (out.dup(), tx.dup()) for number, (out, tx) in pairs.items()}
    left.adopt(copies)
    assert left.snapshot() == desk.snapshot()
    close(left)


@pytest.mark.usefixtures("nothing_leaks", "small_shelves", "few_records")
@pytest.mark.parametrize("confirmed", [False, True])
def test_while_the_store_is_full_the_stored_shelf_leads_to_all_changes(confirmed: bool) -> None:
    """Another one takes over that only this process has; and a kill would leave the old one."""
    kept = a_keeper(managed=True)
    kept.shelf.durable = kept.shelf.was_durable = True
    desk = Desk(kept)
    desk.save("precious", 1)
    while kept.kept == "store":  # until it has to be written anew, with no spare to be had
        desk.save("other", 2)
        desk.drop("other")
    assert [old.durable for old in kept.retired] == [True]
    for _ in range(10):
        desk.load("precious")
        desk.reject("precious")
    if confirmed:
        desk.drop("precious")
    survivor = kept.retired[0]
    again = Desk()
    again.adopt({survivor.number: (survivor.outlet.dup(), survivor.tx.dup())})
    if confirmed:
        assert again.snapshot() == []
    else:
        assert again.snapshot() == [("precious", HELD, 1)]
        assert again.registry.top((1000, "precious")).attempts == 10
    close(again)
    close(desk)


@pytest.mark.usefixtures("nothing_leaks")
def test_a_shelf_without_its_inlet_is_read_and_left_for_another(desk: Desk) -> None:
    desk.save("a", 1)
    stray, gone = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    gone.close()
    again = Desk()
    number = desk.keeper.shelf.number
    again.adopt({number: (desk.keeper.shelf.outlet.dup(), stray)})
    assert again.snapshot() == [("a", HELD, 1)]
    again.save("b", 2)
    assert again.keeper.shelf.number > number
    third = Desk()
    third.adopt({again.keeper.shelf.number: _copies(again)})
    assert third.snapshot() == [("a", HELD, 1), ("b", HELD, 2)]
    close(third)
    close(again)


def _copies(desk: Desk) -> tuple[socket.socket, socket.socket]:
    return desk.keeper.shelf.outlet.dup(), desk.keeper.shelf.tx.dup()


@pytest.mark.usefixtures("nothing_leaks")
def test_two_shelves_of_which_none_replaces_the_other_become_one() -> None:
    """A newer cprd comes back to its own, and to that of the older one which could not read it."""
    desks = []
    for number, name in ((3, "a"), (6, "b")):
        one = Desk(first_generation=number)
        one.keeper.last_number = number - 1
        one.keeper.compact()
        one.save(name, number)
        assert one.keeper.shelf.number == number
        desks.append(one)
    both = Desk()
    both.adopt({number: pair for one in desks for number, pair in leave(one).items()}, stored=False)
    assert both.snapshot() == [("a", HELD, 3), ("b", HELD, 6)]
    assert both.keeper.shelf.number == 6
    assert len(both.keeper.shelves()) == 1
    last = Desk()
    last.adopt({both.keeper.shelf.number: _copies(both)})
    assert last.snapshot() == both.snapshot()
    close(both)
    close(last)


@pytest.mark.usefixtures("nothing_leaks")
def test_a_hold_on_two_shelves_is_one(desk: Desk) -> None:
    """Killed between the new shelf's completion and the old one's end, with what is in between
    lost: each of them leads to the same holds."""
    desk.save("a", 1)
    first = desk.keeper.shelf.number, _copies(desk)
    twin = Shelf.create(first[0] + 5)
    desk.keeper.add_places(twin, desk.keeper.places.items())
    twin.complete(desk.keeper.journal_fds())
    again = Desk()
    again.adopt({first[0]: first[1], twin.number: (twin.outlet, twin.tx)})
    assert again.snapshot() == [("a", HELD, 1)]
    close(again)


def mix(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """One shelf with "a" of this version, then "b" by a newer record of the shelf, and "c" with a
    newer record in the journal as well. An upgrade took the shelf over; then comes a downgrade."""
    desk.save("a", 1)
    with monkeypatch.context() as newer:
        newer.setattr(shelf, "VERSION", 3)
        desk.save("b", 2)
        newer.setattr(record, "VERSION", 9)
        desk.save("c", 3)
    return desk


@pytest.fixture
def mixed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Desk:
    return mix(desk, monkeypatch)


def restarted(desk: Desk, *, stored: bool = True) -> tuple[Desk, str]:
    """Another one that has the shelves which systemd's store has, and why it is blind."""
    pairs = {one.number: (one.outlet.dup(), one.tx.dup()) for one in desk.keeper.shelves()}
    again = Desk(first_generation=10**6)
    return again, again.adopt(pairs, stored=stored)


def phases(desk: Desk) -> dict[str, str]:
    return {hold.name: hold.phase for hold in desk.registry}


def queues_on(one: Shelf) -> list[int]:
    """The generation of each hold that a shelf leads to."""
    read, _ = shelf.read(one.outlet)
    close_all([*read.journals, *(queue.fd for queue in read.queues)])
    return [queue.generation for queue in read.queues]


@pytest.mark.usefixtures("nothing_leaks")
def test_one_newer_record_on_a_shelf_hides_nothing_else_that_lies_on_it(mixed: Desk) -> None:
    again, blind = restarted(mixed)
    assert not blind
    assert phases(again) == {"a": HELD, "b": HELD, "c": UNREADABLE}
    assert [one.number for one in again.keeper.untouchable] == [mixed.keeper.shelf.number]
    assert again.number(again.registry.top((1000, "b"))) == 2
    close(again)


@pytest.mark.usefixtures("nothing_leaks", "few_records")
def test_what_lies_on_a_shelf_that_is_left_alone_is_neither_lost_nor_doubled(
    mixed: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of both shelves is rewritten, lost or found again, and however often."""
    alone = mixed.keeper.shelf.number, mixed.keeper.shelf.messages
    desks = [mixed]
    for number in range(4):
        again, blind = restarted(desks[-1])
        desks.append(again)
        assert not blind
        lying = queues_on(again.keeper.shelf)
        assert len(lying) == len(set(lying)) >= 3
        if number == 0:
            again.save("b", 4)
            again.save("d", 5)
            again.drop("a")
            again.save("a", 6)
        if number == 2:
            again.keeper.compact()
        for _ in range(2):
            again.load("b")
            again.reject("b")
        assert phases(again) == {"a": HELD, "b": HELD, "c": UNREADABLE, "d": HELD}
        numbers = {name: again.number(again.registry.top((1000, name))) for name in "abd"}
        assert numbers == {"a": 6, "b": 4, "d": 5}
        assert [one.number for one in again.keeper.untouchable] == [alone[0]]
        assert again.keeper.untouchable[0].messages == alone[1]  # nothing was written to it

    # Its own shelf has everything, should the other one have got lost.
    last = desks[-1].keeper.shelf
    own = Desk(first_generation=10**6)
    own.adopt({last.number: (last.outlet.dup(), last.tx.dup())})
    assert phases(own) == phases(desks[-1])
    close(own)

    # The newer one comes back: it finds both, as one.
    monkeypatch.setattr(record, "VERSION", 9)
    newer, blind = restarted(desks[-1])
    assert not blind
    assert phases(newer) == {"a": UNREADABLE, "b": UNREADABLE, "c": HELD, "d": UNREADABLE}
    assert newer.number(newer.registry.top((1000, "c"))) == 3
    close(newer)
    for one in desks[1:]:
        close(one)


@pytest.mark.usefixtures("nothing_leaks", "few_records")
def test_the_stored_shelf_that_is_left_alone_leads_to_all_changes(
    mixed: Desk,
) -> None:
    """As long as its own shelf is not stored: the old one is what a kill would leave."""
    again, _ = restarted(mixed)
    assert not again.keeper.shelf.durable
    for _ in range(4):
        again.load("b")
        again.reject("b")
    survivor = again.keeper.untouchable[0]
    killed = Desk()
    killed.adopt({survivor.number: (survivor.outlet.dup(), survivor.tx.dup())})
    assert killed.registry.top((1000, "b")).attempts == 4
    close(killed)
    close(again)


@pytest.mark.usefixtures("nothing_leaks")
@pytest.mark.parametrize(
    ("kind", "descriptors"), [(b"x", 2), (b"q", 1), (b"s", 3)], ids=["kind", "queue", "odd"]
)
def test_a_record_that_may_be_anything_leaves_it_blind_until_the_newer_one_is_back(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, kind: bytes, descriptors: int
) -> None:
    desk.save("a", 1)
    with monkeypatch.context() as newer:
        newer.setattr(shelf, "VERSION", 3)
        desk.keeper.shelf._append(shelf._head(kind) + b"\x80", [0] * descriptors)
    again, blind = restarted(desk)
    assert f"shelf {desk.keeper.shelf.number} cannot be read: a record of version 3" in blind
    assert phases(again) == {"a": HELD}
    again.registry.hidden = blind
    for how in ("error", "replace"):
        for prepare in (False, True):
            with pytest.raises(cprd.Busy, match="version 3"):
                again.save("b", 2, how=how, prepare=prepare)
    again.save("a", 3)  # one that has a record of its own is known to be the only one
    third, blind = restarted(again)
    assert blind
    assert third.snapshot() == [("a", HELD, 3)]
    close(third)
    close(again)


@pytest.mark.usefixtures("nothing_leaks")
@pytest.mark.parametrize("kind", [b"h", b"o"])
def test_a_newer_message_that_leads_to_no_hold_hides_nothing(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, kind: bytes
) -> None:
    """It stays, though: a newer cprd may need it."""
    desk.save("a", 1)
    with monkeypatch.context() as newer:
        newer.setattr(shelf, "VERSION", 3)
        desk.keeper.shelf._append(shelf._head(kind) + shelf._pack({"what": "ever"}))
    again, blind = restarted(desk)
    assert not blind
    assert again.snapshot() == [("a", HELD, 1)]
    assert len(again.keeper.untouchable) == 1
    close(again)


@pytest.mark.usefixtures("nothing_leaks")
def test_what_a_newer_shelf_replaces_does_not_count_and_its_spare_never_did(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.save("a", 1)
    old = desk.keeper.shelf.number, _copies(desk)
    monkeypatch.setattr(shelf, "VERSION", 3)
    desk.keeper.compact()
    spare = desk.keeper.new_spare()
    desk.drop("a")
    desk.save("b", 2)
    monkeypatch.undo()
    again = Desk(first_generation=10**6)
    pairs = {old[0]: old[1], desk.keeper.shelf.number: _copies(desk)}
    pairs[spare.number] = spare.outlet, spare.tx
    assert not again.adopt(pairs)
    assert again.snapshot() == [("b", HELD, 2)]
    assert [one.number for one in again.keeper.untouchable] == [desk.keeper.shelf.number]
    close(again)


@pytest.mark.parametrize(
    ("damaged_byte", "unreadable"),
    [(40, {"b"}), (3, {"a", "b", "c"}), (0, {"a", "b", "c"})],
    ids=["record", "large-size", "small-size"],
)
def test_behind_damage_of_the_journal_no_hold_is_served_in_an_outdated_state(
    desk: Desk, damaged_byte: int, unreadable: set[str]
) -> None:
    """The last change of "b" is damaged: what lies behind a size is lost to sight, and stays."""
    for number, name in enumerate("abc", 1):
        desk.save(name, number)
    for name in "abc":
        desk.load(name)
    at = desk.keeper.places[desk.registry.top((1000, "b")).generation].at + damaged_byte
    journals = desk.keeper.journals
    size = os.fstat(journals[0].fd).st_size
    os.pwrite(journals[0].fd, b"\x08", at)
    expected = {name: UNREADABLE if name in unreadable else CLAIMED for name in "abc"}
    before = desk
    for _ in range(2):
        again, blind = restarted(before)
        assert "damaged" in blind
        assert phases(again) == expected
        assert os.fstat(journals[0].fd).st_size == size
        assert {again.number(hold) for hold in again.registry} == {1, 2, 3}
        if before is not desk:
            close(before)
        before = again
    again.drop("b")  # what is written from now on is read again
    last, _ = restarted(again)
    del expected["b"]
    assert phases(last) == expected
    for one in (again, last):
        close(one)


def end(desk: Desk, name: str) -> None:
    """Write down the end of a hold, and no more."""
    desk.keeper._end([Ended(desk.registry.top((1000, name)), "drop")], [])


class Noting(AtOnce):
    """Notes the uids whose releasers would have drained."""

    def __init__(self) -> None:
        super().__init__()
        self.uids: list[int] = []

    def drain(
        self,
        uid: int,
        fd: int,
        how: bytes = DRAIN,
        done: Callable[[bytes], None] | None = None,
    ) -> None:
        self.uids.append(uid)
        super().drain(uid, fd, how, done)


@pytest.mark.usefixtures("nothing_leaks")
def test_an_end_empties_the_bundle_and_leaves_the_queue_to_the_next_shelf(desk: Desk) -> None:
    """After a restart nothing of a client is left to be drained."""
    reading, desk.pipes[1] = os.pipe()
    desk.save("a", 1)
    os.close(desk.pipes.pop(1))
    desk.perform(desk.registry.drop(caller(), (1000, "a"), force=False))
    assert has_ended(reading)
    os.close(reading)
    parked, _ = desk.keeper.in_flight()
    assert parked == 2  # the queue and the journal
    releasing = Noting()
    again = Desk(a_keeper(releasing))
    again.adopt({desk.keeper.shelf.number: _copies(desk)})
    assert again.snapshot() == []
    assert again.keeper.in_flight()[0] == parked
    assert releasing.uids == []
    close(again)
    for number in range(shelves.MANY_ENDED + 2):
        desk.save("b", number + 2)
        desk.perform(desk.registry.drop(caller(), (1000, "b"), force=False))
        assert desk.keeper.shelf.in_flight <= shelves.MANY_ENDED + 3
    assert desk.keeper.shelf.number > 1


@pytest.mark.usefixtures("nothing_leaks")
@pytest.mark.parametrize("pieces", range(6))
def test_a_shelf_that_is_written_anew_in_pieces_misses_nothing(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    """Killed after each piece, with changes in between, and after the last one."""
    monkeypatch.setattr(shelves, "A_RECORD", 2)
    for number in range(5):
        desk.save(f"{number}", number + 1)
    desk.keeper.begin()
    first = desk.keeper.shelf
    for piece in range(pieces):
        desk.save(f"new {piece}", 10 + piece, nonce=piece + 1)
        desk.save(f"{piece}", 20 + piece, how="replace")
        desk.perform(desk.registry.drop(caller(50 + piece), (1000, f"{4 - piece}"), force=False))
        desk.keeper.fill()
    every = desk.snapshot()
    for _ in range(2):
        again = Desk(first_generation=10**6)
        left = ends(desk.keeper.shelves())
        assert not again.adopt({n: (out.dup(), tx.dup()) for n, (out, tx) in left.items()})
        assert again.snapshot() == every
        for piece in range(pieces):
            assert again.registry.recall(caller(50 + piece), (1000, f"{4 - piece}")) is not None
        close(again)
        desk.keeper.compact()
    assert desk.keeper.next is None
    assert desk.keeper.shelf is not first


@pytest.mark.usefixtures("nothing_leaks")
def test_a_live_hold_that_ends_while_a_shelf_is_written_anew_can_still_be_let_go_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the next cprd, where this one is killed before a releaser has."""
    monkeypatch.setattr(shelves, "A_RECORD", 1)
    releasing = AtOnce()
    monkeypatch.setattr(releasing, "drain", lambda uid, fd, *_: os.close(fd))  # not yet
    desk = Desk(a_keeper(releasing))
    desk.save("a", 1)
    desk.save("b", 2)
    kept = desk.keeper
    kept.begin()
    assert kept.fill()  # "a" alone
    ended = Ended(desk.registry.top((1000, "b"))._replace(live=True), "end")
    kept.write(Step(ended=(ended,)), -1, {})
    kept.let_go((ended,))
    while kept.fill():
        pass
    assert ended.hold.generation in queues_on(kept.shelf)
    close(desk)


def test_a_spare_that_is_stored_meanwhile_takes_over_before_a_shelf_that_is_not() -> None:
    """No shelf of the store is forgotten, and what was stored stays stored."""
    kept = a_keeper(managed=True)
    desk = Desk(kept)
    desk.save("a", 1)
    kept.begin()
    assert kept.fill()
    unstored = kept.next
    stored(kept)
    spare = kept.spare
    while kept.fill():
        pass
    assert kept.shelf is spare
    assert kept.shelf.durable
    assert unstored in kept.retired
    close(desk)


@pytest.mark.usefixtures("nothing_leaks")
def test_what_ended_before_a_restart_is_drained_by_its_owners_releaser(desk: Desk) -> None:
    """Files that block when they are closed are to hold up their owner, not root."""
    desk.save("a", 1)
    desk.save("b", 2)
    end(desk, "b")  # and killed before it was drained
    releasing = Noting()
    again = Desk(a_keeper(releasing))
    again.adopt({desk.keeper.shelf.number: _copies(desk)})
    assert again.snapshot() == [("a", HELD, 1)]
    assert releasing.uids == [1000]
    close(again)


@pytest.mark.usefixtures("nothing_leaks")
def test_what_ended_on_a_shelf_that_was_replaced_is_drained_by_its_owners_releaser(
    desk: Desk,
) -> None:
    """And not by whoever closes that shelf, which is the event loop."""
    reading, desk.pipes[2] = os.pipe()
    desk.keeper.managed = True
    desk.save("a", 1)
    desk.save("b", 2)
    os.close(desk.pipes[2])
    end(desk, "b")
    desk.keeper.places.pop(desk.registry.top((1000, "b")).generation).close()
    # Killed before it was drained, and after the shelf was written anew.
    desk.keeper.compact()
    left = ends(desk.keeper.shelves())
    assert len(left) == 2
    releasing = Noting()
    again = Desk(a_keeper(releasing, managed=True))
    again.adopt({number: (out.dup(), tx.dup()) for number, (out, tx) in left.items()})
    assert again.snapshot() == [("a", HELD, 1)]
    assert releasing.uids == [1000]
    assert has_ended(reading)
    os.close(reading)
    close(again)


@pytest.mark.usefixtures("nothing_leaks")
def test_killed_at_any_step_of_taking_over_two_shelves_nothing_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that is left alone, and its own, which does not lead yet to what came to the other."""
    at, status = 0, KILLED
    while status == KILLED:
        at += 1
        mixed = mix(Desk(), monkeypatch)
        before, _ = restarted(mixed)
        before.save("d", 4)
        with monkeypatch.context() as newer:
            newer.setattr(shelf, "VERSION", 3)
            mixed.save("e", 5)
            end(mixed, "b")
        child = os.fork()
        if not child:
            try:
                arm(at)
                restarted(before)
                os._exit(0)
            except BaseException as error:
                os.write(2, repr(error).encode())
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        after, blind = restarted(before)
        assert not blind
        assert phases(after) == {"a": HELD, "c": UNREADABLE, "d": HELD, "e": HELD}, at
        assert after.number(after.registry.top((1000, "e"))) == 5
        for one in (mixed, before, after):
            close(one)
    assert status == 0
    assert at > 3


@pytest.mark.usefixtures("nothing_leaks")
def test_killed_at_any_step_of_taking_over_slots_nothing_is_lost() -> None:
    """Of a shelf of the version before: one hold, one that has ended, and an answer."""
    at, status = 0, KILLED
    while status == KILLED:
        at += 1
        state = cprd.State()
        reading, writing = os.pipe()
        state.save_fd("pipe", 0, writing)
        held = pack(state)
        state.close()
        os.close(writing)
        slots = [recorded.queue((recorded.HELD_RECORD, [held.fd])) for _ in range(2)]
        held.close()
        slots[1][1].send(recorded.LAST_RECORD)
        slots[1][0].setblocking(False)
        let_go(slots[1][0].fileno())
        on_shelf = [(recorded.SHELF_SLOTS, [end.fileno() for end in ends]) for ends in slots]
        messages = (recorded.SHELF_HEADER, []), *on_shelf, (recorded.SHELF_COMPLETE, [])
        outlet, inlet = recorded.queue(*messages)
        for ends in slots:
            for end in ends:
                end.close()
        child = os.fork()
        if not child:
            try:
                arm(at)
                Desk().adopt({7: (outlet, inlet)})
                os._exit(0)
            except BaseException as error:
                os.write(2, repr(error).encode())
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for _ in range(2):  # the next one, and the one after that
            after = Desk()
            after.adopt({7: (outlet.dup(), inlet.dup())})
            assert list(after.registry) == [recorded.HELD_HOLD], at
            unpack(after.keeper.bundle(recorded.GENERATION)).close()
            assert not has_ended(reading)
            assert {reply.nonce for reply in after.keeper.replies} == {recorded.SAVED.nonce}
            close(after)
        outlet.close()
        inlet.close()
        os.close(reading)
    assert status == 0
    assert at > 4


@pytest.mark.usefixtures("nothing_leaks")
def test_old_answers_are_not_kept_for_ever() -> None:
    clock = NOW
    desk = Desk(Keeper(AtOnce(), lambda: clock, Replies()))
    for _ in range(3):
        desk.save("a", 1)
        desk.drop("a")
    clock += 2 * KEPT_FOR
    desk.keeper._moves = desk.keeper._move_journal()
    desk.keeper.renew()
    again = Desk()
    again.adopt(leave(desk))
    assert not list(again.keeper.replies)
    close(again)


def test_a_journal_is_moved_in_pieces_however_many_answers_are_pending() -> None:
    desk, again = Desk(), Desk()
    desk.save("a", 1)
    for number in range(2000):
        desk.keeper.replies.remember(Reply(1000, b"%016d" % number, {}, NOW, b"%016d" % number))
    desk.keeper._moves, most = desk.keeper._move_journal(), 0
    more = True
    while more:
        before = desk.keeper.journal.end
        more = desk.keeper.fill()
        most = max(most, desk.keeper.journal.end - before)
    assert most < 10_000
    again.adopt(leave(desk))
    assert len(list(again.keeper.replies)) == 2001
    close(again)


def as_another_user(work: Callable[[], None], uid: int, limit: int) -> str:
    """Run `work` as `uid` without capabilities, with a hard RLIMIT_NOFILE of `limit`; what it
    raised, or ""."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            work()
            os._exit(0)
        except BaseException as error:
            os.write(writing, repr(error).encode())
            os._exit(1)
    os.close(writing)
    with open(reading) as file:
        said = file.read()
    os.waitpid(child, 0)
    return said


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_too_many_descriptors_in_flight_are_refused_and_nothing_changes() -> None:
    """cprd's own limit, not its clients': the error says which, and what is held stays whole."""

    def work() -> None:
        desk = Desk()
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        others = [socket.socketpair() for _ in range(3)]
        null = os.open("/dev/null", os.O_RDONLY)
        desk.save("a", 1)
        for number, (one, _) in enumerate(others):
            try:
                while True:
                    socket.send_fds(one, [b"x"], [null] * (40 - 13 * number))
            except OSError:
                continue
        try:
            for number in range(soft):
                desk.save(f"n{number}", 2)
            raise AssertionError("no limit was met")
        except LimitExceeded as error:
            refusal = str(error)
        assert "ETOOMANYREFS" in refusal
        assert desk.snapshot()[0] == ("a", HELD, 1)
        for one, other in others:
            one.close()
            other.close()
        desk.save("b", 3)
        assert ("b", HELD, 3) in desk.snapshot()
        desk.keeper.compact()

    assert as_another_user(work, 61_234, 200) == ""


def test_what_cannot_be_written_for_want_of_descriptors_leaves_no_descriptor(
    tmp_path: Path,
) -> None:
    """EMFILE at the only descriptor that a save needs here."""
    desk = Desk()
    desk.save("a", 1)
    packed = desk.pack(2)
    step = desk.registry.save(caller(), (1000, "b"), EMPTY)
    before = len(os.listdir("/proc/self/fd"))
    highest = max(int(fd) for fd in os.listdir("/proc/self/fd")) + 1
    taken = [os.open("/dev/null", os.O_RDONLY) for _ in range(highest - before + 1)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(taken) + 1, limits[1]))
        while True:
            try:
                taken.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                break
        with pytest.raises(LimitExceeded, match="LimitNOFILE"):
            desk.keeper.write(step, packed.fd, {})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in taken:
            os.close(fd)
    assert len(os.listdir("/proc/self/fd")) == before
    desk.keeper.write(step, packed.fd, {})
    packed.close()
    close(desk)

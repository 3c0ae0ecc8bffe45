"""Live holds in C: what a killed owner left is what its last change left, for a successor in Python
and for a successor in C; and the other way round."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cprd.linux.rights import close_all
from cprd.live.reader import read
from tests.c.building import Programs
from tests.c.conftest import Build
from tests.c.owner import COwner
from tests.live.owning import (
    MIDDLE,
    SMALL,
    Child,
    Model,
    Op,
    Root,
    Things,
    fenced,
    seen_in,
    segments_of,
)
from tests.live.test_sweep import AFTER, BIG, SCRIPTS, go_on, is_one_of, parked, states

pytestmark = [pytest.mark.usefixtures("nothing_leaks"), pytest.mark.xdist_group("c")]

DEFAULT = {"large batch", "delete"}  # of the scripts, swept in each run
SUCCESSIONS = [
    (name, kill)
    if (name, kill) in (("large batch", 60), ("delete", 25))
    else pytest.param(name, kill, marks=pytest.mark.full)
    for name in SCRIPTS
    for kill in (25, 60)
]
EACH = [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.full) for name in SCRIPTS]


@pytest.fixture(scope="module")
def things() -> Iterator[Things]:
    made = Things()
    yield made
    made.close()


@pytest.mark.parametrize(
    "kind", ["sanitized", "small", pytest.param("sanitized small", marks=pytest.mark.full)]
)
@pytest.mark.parametrize("name", SCRIPTS)
def test_what_an_owner_in_c_kept_is_found_in_python_and_taken_on(
    things: Things, tmp_path: Path, built: Build, name: str, kind: str
) -> None:
    root = Root()
    expected = states(things, SCRIPTS[name])[-1]
    owner = COwner(built(kind), things, root, SCRIPTS[name], tmp_path)
    assert not owner.run()
    assert seen_in(read(root.kept)) == expected.seen()
    # Nothing else than what is kept is in flight.
    large = sum(
        isinstance(value, bytes) and len(value) > 4096 for value in expected.sections.values()
    )
    assert parked(root) == len(expected.fds) + len(expected.memories) + large
    go_on(root, things, SMALL, expected)


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_an_owner_in_python_kept_is_found_in_c_and_taken_on(
    things: Things, tmp_path: Path, built: Build, name: str
) -> None:
    root, new = Root(), Root()
    expected = states(things, SCRIPTS[name])[-1]
    child = Child(root, things, MIDDLE, SCRIPTS[name])
    child.finish()
    taker = COwner(built("sanitized"), things, new, AFTER, tmp_path, take=root.kept)
    root_seen(taker, expected)
    for op in AFTER:
        expected.apply(op)
    assert seen_in(read(new.kept)) == expected.seen()
    root.close()
    new.close()


def root_seen(taker: COwner, expected: Model) -> None:
    """That the successor lists what is expected, in order."""
    assert not taker.run()
    found = [line.split() for line in taker.listed if line.startswith("fd ")]
    assert [((name, int(id)), int(inode)) for _, name, id, _, inode in found] == [
        *expected.fds.items()
    ]
    keys = [line.split()[1] for line in taker.listed if line.split()[0] in ("raw", "packed")]
    assert keys == [*expected.sections]


@pytest.mark.parametrize("name", EACH)
def test_an_owner_killed_at_every_step_leaves_what_its_last_change_left(
    things: Things, tmp_path: Path, built: Build, name: str
) -> None:
    script = SCRIPTS[name]
    expected = states(things, script)
    programs = built("small")
    for number in range(1, len(points_of(programs, things, script, tmp_path)) + 1):
        root = Root()
        owner = COwner(programs, things, root, script, tmp_path, kill_at=number)
        assert owner.run()
        if owner.began:
            model = is_one_of(seen_in(read(root.kept)), expected, owner.done)
            if number % 7 == 0:
                go_on(root, things, SMALL, model.copy())
        root.close()


def points_of(
    programs: Programs, things: Things, script: list[Op], place: Path, take: int = -1
) -> list[str]:
    log = place / "points"
    log.unlink(missing_ok=True)
    root = Root()
    assert not COwner(programs, things, root, script, place, points=log, take=take).run()
    root.close()
    return log.read_text().split()


def left_by(things: Things, script: list[Op], kill_at: int) -> tuple[Root, int]:
    """The root of an owner in Python that was killed in the midst, and its finished changes."""
    root = Root()
    child = Child(root, things, SMALL, script, kill_at=kill_at)
    child.end()
    if child.stopped_or_ended():
        child.kill()
    else:
        child.close()
    return root, child.done


@pytest.mark.parametrize(("name", "kill_first"), SUCCESSIONS)
def test_a_successor_killed_at_every_step_loses_nothing(
    things: Things, tmp_path: Path, built: Build, name: str, kill_first: int
) -> None:
    """The predecessor in Python was killed in the midst of its work; the successor in C at each of
    its own steps. Before its root is known somewhere, the old root counts; then the new one."""
    programs = built("small")
    after = AFTER[:4]
    root, done = left_by(things, SCRIPTS[name], kill_first)
    found = seen_in(read(root.kept))
    start = is_one_of(found, states(things, SCRIPTS[name]), done)
    root.close()
    for number in itertools.count(1):
        root, _ = left_by(things, SCRIPTS[name], kill_first)
        new = Root()
        owner = COwner(programs, things, new, after, tmp_path, take=root.kept, kill_at=number)
        killed = owner.run()
        if not owner.taken:
            assert seen_in(read(root.kept)) == start.seen()
        else:
            is_one_of(seen_in(read(new.kept)), states(things, after, start), owner.done)
        root.close()
        new.close()
        if not killed:
            break


def test_a_key_whose_deletion_lies_in_another_segment_stays_away_when_that_one_is_drained(
    things: Things, tmp_path: Path, built: Build
) -> None:
    """The predecessor was killed after a batch: one segment has the deletions, others the keys.
    Then the successor ends the last key of each segment, and is killed at each of its steps."""
    before: list[Op] = [("save", "c", n, n) for n in range(6)]
    batch: Op = ("batch", *[("delete", "c", n) for n in (0, 2, 4)])
    after: list[Op] = [*[("delete", "c", n) for n in (1, 3, 5)], ("save", "x", 0, 1)]
    start = states(things, [*before, batch])[-1]
    kill_at = tried = 0
    while not tried:
        kill_at += 1
        for number in itertools.count(1):
            root, new = Root(), Root()
            child = Child(root, things, SMALL, [*before, batch], kill_at=kill_at, at_op=6)
            child.end()
            assert child.stopped_or_ended()
            child.kill()
            if seen_in(read(root.kept)) != start.seen():  # not committed yet
                root.close()
                new.close()
                break
            assert parked(root) > len(start.fds)
            owner = COwner(
                *(built("small"), things, new, after, tmp_path), take=root.kept, kill_at=number
            )
            tried += owner.run()
            if owner.taken:
                root.close()
                left = is_one_of(seen_in(read(new.kept)), states(things, after, start), owner.done)
                go_on(new, things, SMALL, left.copy())
            else:
                assert seen_in(read(root.kept)) == start.seen()
                root.close()
                new.close()
            if tried < number:
                break
    assert tried > len(after)


def test_a_successor_of_an_owner_killed_over_a_large_change_rewrites_its_root(
    things: Things, tmp_path: Path, built: Build
) -> None:
    """Each of the many segments still holds what the change ended; moving what is left of them
    takes more records than the root may have."""
    save: list[Op] = [("save", "c", n, n % 24) for n in range(60)]
    delete: Op = ("batch", *[("delete", "c", n) for n in range(0, 60, 2)])
    log = tmp_path / "log"
    root = Root()
    child = Child(root, things, SMALL, [*save, delete], log=str(log))
    child.end()
    assert not child.stopped_or_ended()
    child.close()
    root.close()
    points = log.read_text().split()
    expected = states(things, [*save, delete])
    sent = max(n for n, point in enumerate(points) if point == "live:sent")
    last = points[: sent - 1]
    for kill_at in range(len(last) - 100, len(last), 9):
        root, done = left_by(things, [*save, delete], kill_at)
        new = Root()
        start = is_one_of(seen_in(read(root.kept)), expected, done).copy()
        taker = COwner(built("small"), things, new, AFTER, tmp_path, take=root.kept)
        root_seen(taker, start)
        for op in AFTER:
            start.apply(op)
        assert seen_in(read(new.kept)) == start.seen()
        assert parked(new) == len(start.fds)
        root.close()
        new.close()


def test_successors_name_no_empty_segments_of_their_predecessors(
    things: Things, tmp_path: Path, built: Build
) -> None:
    script: list[Op] = [("save", "c", 0, 0), *[("section", "s", BIG), ("drop", "s")] * 6]
    root = Root()
    assert not COwner(built("plain"), things, root, script, tmp_path).run()
    for _ in range(6):
        new = Root()
        assert not COwner(built("plain"), things, new, script, tmp_path, take=root.kept).run()
        root.close()
        root = new
    segments = segments_of(root.kept)
    root.close()
    close_all(segments)
    assert len(segments) <= 10


def test_what_makes_no_sense_is_refused_and_a_fenced_owner_changes_nothing(
    things: Things, tmp_path: Path, built: Build
) -> None:
    root = Root()
    words = [built("sanitized").command, "own", str(root.tx.fileno())]
    process = subprocess.Popen(
        [*words, str(root.rx.fileno()), "77"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=[root.tx.fileno(), root.rx.fileno(), *things.fds],
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ok\n"

    def says(line: str) -> str:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(line + "\n")
        process.stdin.flush()
        return process.stdout.readline().strip()

    assert says(f"save c 0 {things.fds[0]}") == "ok"
    assert says(f"save c 0 {things.fds[1]}").startswith("InvalidInput: key (c, 0) is used already")
    assert "is a socket of the live hold itself" in says(f"save c 1 {root.tx.fileno()}")
    assert says("save c 1 999").startswith("InvalidInput: fd 999 of (c, 1) is not open")
    assert says("memory m 4096") == "ok"
    assert says("memory m 8192").startswith("InvalidInput: memory 'm' has another size")
    close_all(fenced(root.kept))
    assert says(f"save c 1 {things.fds[1]}").startswith("Fenced: ")
    assert says("delete c 0").startswith("Fenced: ")
    process.communicate()
    assert process.returncode == 0
    assert [key for key, _ in seen_in(read(root.kept))[0]] == [("c", 0)]
    root.close()

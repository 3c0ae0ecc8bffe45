"""What a change of a live hold costs, against s6-fdholderd (C) in the same run.

    .venv/bin/python benchmarks/live.py [--rounds N] [FIGURE ...]

    few         a life (save_fd and delete_fd) with 10 kept, over s6's store and retrieve-and-delete
    many        the same with 9,000 kept; save_fd alone over store alone, median and mean
    section     a section of 100 bytes over save_fd
    takeover    of 9,000 keys: what was left is read, and a new root written; in flight at the peak

The two by turns, 200 lives in a turn. Wants ulimit -Hn >= 12000; without the Debian packages s6,
libs6-dev, skalibs-dev and a C compiler the figures that compare with s6 are left out, and said so.
Exit status: 0 when every figure is within its bound, 1 when not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks.stage import verdict
from cprd.linux.rights import close_all, scm_fds
from cprd.live.owner import Owner
from cprd.live.queue import make_pair
from cprd.live.reader import read
from cprd.live.takeover import take_over

HERE = Path(__file__).parent
TURN = 200  # lives
FIGURES = ("few", "many", "section", "takeover")
Lives = list[tuple[float, float]]
"""Microseconds: of keeping, of letting go."""


class Yardstick:
    """A private s6-fdholderd, and its client, with so many kept."""

    def __init__(self, place: Path, kept: int) -> None:
        rules = place / "rules"
        (rules / "uid/default/env").mkdir(parents=True)
        (rules / "gid").mkdir()
        (rules / "uid/default/allow").touch()
        for name in ("STORE", "RETRIEVE"):
            (rules / f"uid/default/env/S6_FDHOLDER_{name}_REGEX").write_text(".*\n")
        command = [
            "s6-fdholder-daemon",
            "-1",
            "-c",
            "64",
            "-n",
            "12000",
            "-i",
            str(rules),
            f"{place}/s",
        ]
        self.daemon = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert self.daemon.stdout is not None
        self.daemon.stdout.readline()  # it is ready
        self.client = subprocess.Popen(
            [place / "s6life", place / "s", str(kept)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def lives(self, count: int) -> Lives:
        assert self.client.stdin is not None
        assert self.client.stdout is not None
        print(count, file=self.client.stdin, flush=True)
        found = []
        while line := self.client.stdout.readline().strip():
            stored, ended = line.split()
            found.append((float(stored), float(ended)))
        return found

    def end(self) -> None:
        self.client.stdin.close()  # type: ignore[union-attr]
        self.client.wait()
        self.daemon.terminate()
        self.daemon.wait()


@contextlib.contextmanager
def yardstick(kept: int) -> Iterator[Yardstick | None]:
    """None, with words, where it cannot be had."""
    with tempfile.TemporaryDirectory(prefix="cprd-bench.") as name:
        place = Path(name)
        build: list[str | Path] = [
            "cc",
            "-O2",
            "-o",
            place / "s6life",
            HERE / "s6life.c",
            "-ls6",
            "-lskarnet",
        ]
        missing = shutil.which("s6-fdholder-daemon") is None or shutil.which("cc") is None
        if missing or subprocess.run(build, stderr=subprocess.DEVNULL, check=False).returncode:
            print("not compared with s6-fdholderd: install s6, libs6-dev, skalibs-dev and gcc")
            yield None
            return
        stick = Yardstick(place, kept)
        try:
            yield stick
        finally:
            stick.end()


class Ours:
    """A live hold with so many kept, of one owner: this process."""

    def __init__(self, kept: int) -> None:
        tx, rx = make_pair()
        self.root = os.dup(rx.fileno())
        self.owner = Owner(tx, rx, 1)
        self.fd = os.eventfd(0)
        self.ids = list(range(kept))
        self.next = kept
        for id in self.ids:
            self.owner.save_fd("client", id, self.fd)

    def lives(self, count: int) -> Lives:
        found = []
        save, delete, clock = self.owner.save_fd, self.owner.delete_fd, time.perf_counter
        for _ in range(count):
            at = random.randrange(len(self.ids))
            begin = clock()
            save("client", self.next, self.fd)
            saved = clock()
            delete("client", self.ids[at])
            ended = clock()
            self.ids[at] = self.next
            self.next += 1
            found.append(((saved - begin) * 1e6, (ended - saved) * 1e6))
        return found

    def sections(self, count: int) -> list[float]:
        value = b"x" * 100
        found = []
        for number in range(count):
            key = f"section{number % 2000}"
            begin = time.perf_counter()
            self.owner.save_section(key, value)
            found.append((time.perf_counter() - begin) * 1e6)
        return found

    def close(self) -> None:
        self.owner.close()
        close_all([self.root, self.fd])


def compare(kept: int, bound: float, rounds: int) -> list[bool]:
    """Lives with so many kept, by turns."""
    ours = Ours(kept)
    with yardstick(kept) as stick:
        mine: Lives = []
        theirs: Lives = []
        ours.lives(10 * TURN)  # to warm up
        for _ in range(rounds):
            mine += ours.lives(TURN)
            theirs += stick.lives(TURN) if stick is not None else []
    ours.close()
    saves, deletes = zip(*mine, strict=True)
    words = (
        f"save_fd mean {statistics.mean(saves):.1f} median {statistics.median(saves):.1f} us,"
        f" delete_fd mean {statistics.mean(deletes):.1f} median {statistics.median(deletes):.1f} us"
    )
    if not theirs:
        print(f"{kept} kept: {words}")
        return []
    stores, retrieves = zip(*theirs, strict=True)
    words += (
        f"; store mean {statistics.mean(stores):.1f} median {statistics.median(stores):.1f} us,"
        f" retrieve-and-delete mean {statistics.mean(retrieves):.1f} us"
    )
    life = statistics.median(sum(pair) for pair in mine)
    their_life = statistics.median(sum(pair) for pair in theirs)
    mean = statistics.mean(saves) + statistics.mean(deletes)
    their_mean = statistics.mean(stores) + statistics.mean(retrieves)
    good = [verdict(f"a life, {kept} kept, means", mean / their_mean, bound, " x", words)]
    good.append(
        verdict(f"a life, {kept} kept, medians", life / their_life, bound, " x", f"{life:.1f} us")
    )
    if kept > 1000:
        median = statistics.median(saves) / statistics.median(stores)
        average = statistics.mean(saves) / statistics.mean(stores)
        good.append(verdict("save_fd, median", median, 0.8, " x", "over s6's store"))
        good.append(verdict("save_fd, mean", average, 1.3, " x", "over s6's store"))
    return good


def sections(rounds: int) -> bool:
    ours = Ours(1000)
    ours.sections(4000)
    kept: list[float] = []
    saved: list[float] = []
    for _ in range(rounds):
        kept += ours.sections(TURN)
        saved += [save for save, _ in ours.lives(TURN)]
    ours.close()
    ratio = statistics.mean(kept) / statistics.mean(saved)
    words = (
        f"section mean {statistics.mean(kept):.1f} median {statistics.median(kept):.1f} us;"
        f" save_fd mean {statistics.mean(saved):.1f} median {statistics.median(saved):.1f} us"
    )
    return verdict("a section of 100 bytes over save_fd", ratio, 1.0, " x", words)


def takeovers(rounds: int) -> list[bool]:
    took = []
    peak = 0.0
    for _ in range(rounds):
        ours = Ours(9000)
        ours.lives(1000)
        ours.owner.close()
        begin = time.perf_counter()
        found = read(ours.root)
        tx, rx = make_pair()
        new = os.dup(rx.fileno())
        owner = take_over(found, tx, rx)
        took.append((time.perf_counter() - begin) * 1e3)
        parked = scm_fds(ours.root) + scm_fds(new)
        for segment in owner._ledger.pool.segments.values():
            parked += scm_fds(segment.rx.fileno())
        peak = max(peak, parked / 9000)
        owner.close()
        found.state.close()
        close_all([new])
        ours.close()
    words = f"of {rounds}: read, and a new root written; best {min(took):.1f} ms"
    return [
        verdict("take-over of 9,000 keys", statistics.median(took), 100, " ms", words),
        verdict("in flight at its peak", peak, 1.15, " a key", "old root and new root together"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figures", nargs="*", default=FIGURES, metavar="FIGURE")
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 12_000:
        raise SystemExit("raise the hard limit of descriptors to 12000 (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    good: list[bool] = []
    if "few" in options.figures:
        good += compare(10, 1.5, options.rounds)
    if "many" in options.figures:
        good += compare(9000, 3.0, options.rounds)
    if "section" in options.figures:
        good.append(sections(options.rounds))
    if "takeover" in options.figures:
        good += takeovers(max(9, options.rounds // 3))
    return not all(good)


if __name__ == "__main__":
    sys.exit(main())

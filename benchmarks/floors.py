"""The whole path of 1 to 10,000 descriptors, connections open, against C.

    .venv/bin/python benchmarks/floors.py [--pairs N]

From a dict of ids to descriptors in the old process to the same dict in a successor that comes
afterwards, by bulk verbs: build a State, save, load, take, confirm. By turns with two programs:

    floor_held.c   an array to an array through a third process that holds; nothing has a name,
                   nothing outlives that process. What remains is the kernel's part.
    s6path.c       s6-fdholderd by libs6, store and retrieve-and-delete one by one (there is no verb
                   for many that could be compared: a dump takes 253 at most). Left out, and said
                   so, without the Debian packages s6, libs6-dev and skalibs-dev.
                   Also by CPU time of both ends and the holder, as busy machines want.

Exit status: 0 when every figure is within its bound, 1 when not.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import cprd
from benchmarks.stage import cpu_seconds, private_cprd, spread, verdict
from cprd.linux.nofile import raise_soft_limit

HERE = os.path.dirname(os.path.abspath(__file__))
# count -> bounds: cprd / floor_held at most, s6 / cprd at least (for 1: cprd / s6 at most)
COUNTS: dict[int, tuple[float, float]] = {
    1: (float("inf"), 8.0),
    1000: (float("inf"), 20.0),
    5000: (float("inf"), 50.0),
    10_000: (4.0, 50.0),
}
WARM_UP = 3
Took = tuple[float, float]  # seconds: on the wall, and of CPU time


def succeed(path: str, count: int) -> None:
    """The successor: at each line it loads, takes all, confirms; it writes how long that took, on
    the wall and of CPU time."""
    raise_soft_limit()
    with cprd.connect(path) as daemon:
        print("ready", flush=True)
        for _ in sys.stdin:
            begun, used = time.monotonic(), time.process_time()
            claim = daemon.load("bench")
            found = claim.state.take_fds("client")
            claim.confirm()
            took, used = time.monotonic() - begun, time.process_time() - used
            if len(found) != count:
                raise SystemExit("descriptors are missing")
            claim.close()
            for fd in found.values():
                os.close(fd)
            print(took, used, flush=True)


class Ours:
    """An old process, this one, and a successor, for one count."""

    def __init__(self, path: str, count: int) -> None:
        self.daemon = cprd.connect(path)
        self.fds = {id: os.eventfd(0) for id in range(count)}
        self.successor = subprocess.Popen(
            [sys.executable, os.path.join(HERE, "floors.py"), "--succeed", path, str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._line()

    def _line(self) -> str:
        assert self.successor.stdout is not None
        return self.successor.stdout.readline()

    def once(self) -> Took:
        """Seconds on the wall, and of CPU time of both processes."""
        begun, used = time.monotonic(), time.process_time()
        state = cprd.State()
        state.save_fds("client", self.fds)
        self.daemon.save("bench", state)
        saved, used = time.monotonic() - begun, time.process_time() - used
        assert self.successor.stdin is not None
        self.successor.stdin.write("go\n")
        self.successor.stdin.flush()
        loaded, more = map(float, self._line().split())
        return saved + loaded, used + more

    def close(self) -> None:
        self.successor.communicate()
        self.daemon.close()
        for fd in self.fds.values():
            os.close(fd)


def compiled(place: str, name: str, *libraries: str) -> str | None:
    """The program of a source file here; None where it cannot be had."""
    program = os.path.join(place, name)
    command = [os.environ.get("CC", "cc"), "-O2", "-o", program, os.path.join(HERE, f"{name}.c")]
    if shutil.which(command[0]) is None:
        return None
    made = subprocess.run([*command, *libraries], stderr=subprocess.DEVNULL, check=False)
    return program if made.returncode == 0 else None


def run(*command: str) -> float:
    """Seconds of one round of a program in C."""
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return sum(map(int, done.stdout.splitlines()[-1].split())) / 1e9


@contextlib.contextmanager
def fdholder(place: str) -> Iterator[tuple[str, int]]:
    """The socket and the pid of a private s6-fdholderd that grants everything; ("", 0) where there
    is none."""
    if shutil.which("s6-fdholder-daemon") is None:
        yield "", 0
        return
    rules = os.path.join(place, "rules")
    env = os.path.join(rules, "uid/default/env")
    os.makedirs(env)
    os.makedirs(os.path.join(rules, "gid"))
    open(os.path.join(rules, "uid/default/allow"), "w").close()
    for name in ("STORE", "RETRIEVE"):
        with open(os.path.join(env, f"S6_FDHOLDER_{name}_REGEX"), "w") as file:
            file.write(".*\n")
    path = os.path.join(place, "s")
    command = ["s6-fdholder-daemon", "-1", "-c", "64", "-n", "12000", "-i", rules, path]
    daemon = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert daemon.stdout is not None
    daemon.stdout.readline()  # it is ready
    try:
        yield path, daemon.pid
    finally:
        daemon.terminate()
        daemon.wait()


def s6_once(s6path: str, socket: str, count: int) -> Took:
    """The second of two rounds, and the client's CPU time for both."""
    before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    wall = run(s6path, socket, str(count), "2")
    return wall, sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before


def with_holder(pid: int, once: Callable[[], Took], rounds: int) -> Took:
    """What `once` took, with the CPU time of the holder beside; of one of so many rounds."""
    before = cpu_seconds(pid)
    wall, used = once()
    return wall, (used + cpu_seconds(pid) - before) / rounds


def by_cpu_time(count: int, ours: list[float], theirs: list[float]) -> bool:
    """Says more than the wall where other jobs run: each round trip waits for those."""
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    both = f"{spread(ours, 1e6, 'us')}, {spread(theirs, 1e6, 'us')}"
    what = f"CPU time, holder's too: s6-fdholderd / whole path of {count}"
    return verdict(what, ratio, math.inf, "", both)


def figures(count: int, ours: list[float], floors: list[float], theirs: list[float]) -> list[bool]:
    most, than_s6 = COUNTS[count]
    times = spread(ours, 1e6, "us")
    ratio = statistics.median(a / b for a, b in zip(ours, floors, strict=True))
    what = f"whole path of {count}"
    good = [
        verdict(f"{what} / floor_held.c", ratio, most, "", f"{times}, {spread(floors, 1e6, 'us')}")
    ]
    if theirs:
        both = f"{times}, {spread(theirs, 1e6, 'us')}"
        if count == 1:
            ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            good.append(verdict(f"{what} / s6-fdholderd", ratio, than_s6, "", both))
        else:
            ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
            what = f"s6-fdholderd / {what}"
            good.append(verdict(what, ratio, than_s6, "", both, at_least=True))
    return good


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=15, metavar="N", help="at least 9")
    parser.add_argument("--succeed", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.succeed:
        succeed(options.succeed[0], int(options.succeed[1]))
        return 0
    if options.pairs < 9:
        parser.error("at least 9 pairs")
    raise_soft_limit()
    good: list[bool] = []
    with (
        tempfile.TemporaryDirectory(prefix="cprd-bench.") as place,
        private_cprd() as (path, pid),
        fdholder(place) as (s6, s6_pid),
    ):
        floor = compiled(place, "floor_held")
        s6path = compiled(place, "s6path", "-ls6", "-lskarnet") if s6 else None
        if floor is None:
            raise SystemExit("wants a C compiler")
        if s6path is None:
            print("not compared with s6-fdholderd: install s6, libs6-dev and skalibs-dev")
        for count in COUNTS:
            ours = Ours(path, count)
            mine: list[Took] = []
            floors: list[float] = []
            theirs: list[Took] = []
            for number in range(WARM_UP + options.pairs):
                each = with_holder(pid, ours.once, 1)
                bare = run(floor, str(count), "3")
                s6_took: list[Took] = []
                if s6path:
                    once = partial(s6_once, s6path, s6, count)
                    s6_took.append(with_holder(s6_pid, once, 2))
                if number >= WARM_UP:
                    mine.append(each)
                    floors.append(bare)
                    theirs += s6_took
            ours.close()
            walls, used = (
                [[took[at] for took in each] for each in (mine, theirs)] for at in (0, 1)
            )
            good += figures(count, walls[0], floors, walls[1])
            if theirs and count > 1:  # starting s6path takes more than one descriptor
                good.append(by_cpu_time(count, *used))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())

"""What a hand-over costs, against what it is measured by.

    .venv/bin/python benchmarks/handover.py [--pairs N] [FIGURE ...]

    names       10,000 descriptors under one name each against the C floor, wall clock (no bound)
    ids         10,000 descriptors under one name and 10,000 ids, the same (no bound)
    idle        as names, each after 50 ms in which all three processes slept (no bound)
    daemon      CPU time of the daemon for 15,000 descriptors against that for 10, at one pace; and
                the same of a daemon that makes cprd's system calls and nothing else
    hurried     as daemon, each confirmed as soon as it can be (no bound)
    memory      a section of 1 GiB against one of 1 KiB, the whole hand-over, wall clock

Exit status: 0 when every figure is within its bound, 1 when not.
"""

from __future__ import annotations

import argparse
import fcntl
import math
import os
import pickle
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import cprd
from benchmarks.stage import bare_daemon, cpu_seconds, median, pairs, private_cprd, verdict
from cprd.linux.memfd import SEALS

MANY = 10_000
MOST = 15_000  # for the CPU time of the daemon
HAND_OVERS = 20  # for one measurement of the daemon's CPU time
IN_A_ROW = 5  # hand-overs whose median is one measurement
AT_WORK = 0.001  # s before each, for the successor to be waiting in the daemon; if it is not yet,
# this hand-over takes longer
ASLEEP = 0.05
# How long a claim is kept, whatever is in it: how soon the confirmation comes decides how much of
# the daemon is still in the CPU's caches.
KEEP = 0.01


class Successor:
    """Another live process that takes over what is saved, as often as it is told to."""

    def __init__(self, path: str) -> None:
        self._told, tell = os.pipe()
        hear, self._said = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(tell)
            os.close(hear)
            try:
                self._serve(path)
            except EOFError:
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        os.close(self._told)
        os.close(self._said)
        self._tell = os.fdopen(tell, "wb")
        self._hear = os.fdopen(hear, "rb")

    def _serve(self, path: str) -> None:
        warnings.simplefilter("ignore")  # the descriptors end with the claim, all but one unasked
        with os.fdopen(self._told, "rb") as told, os.fdopen(self._said, "wb") as said:
            with cprd.connect(path) as daemon:
                while True:
                    last, section, keep = pickle.load(told)
                    with daemon.load("bench", wait=60.0) as claim:
                        had = time.monotonic()
                        if last is not None and claim.state.find_fd(*last) < 0:
                            raise SystemExit("a descriptor is missing")
                        if section:
                            assert claim.state["ram"][0] == 1
                        time.sleep(keep)
                    pickle.dump((had, time.monotonic()), said)
                    said.flush()

    def await_one(
        self, last: tuple[str, int] | None, *, section: bool = False, keep: float = 0.0
    ) -> None:
        """Tell it to load what comes next, to look up `last` and the section's first byte, and to
        keep the claim for so many seconds."""
        pickle.dump((last, section, keep), self._tell)
        self._tell.flush()

    def result(self) -> tuple[float, float]:
        """When it had all descriptors, and when it had confirmed and closed them."""
        had, done = pickle.load(self._hear)
        return had, done

    def close(self) -> None:
        self._tell.close()
        os.waitpid(self.pid, 0)
        self._hear.close()


def with_descriptors(count: int, key: Callable[[int], tuple[str, int]]) -> cprd.State:
    state = cprd.State()
    for number in range(count):
        state.save_fd(*key(number), os.eventfd(0))
    return state


def let_go(state: cprd.State) -> None:
    for _, _, fd in list(state.fds()):
        os.close(fd)


def hand_over(
    daemon: cprd.Daemon,
    successor: Successor,
    state: cprd.State,
    pause: float = AT_WORK,
    **kind: Any,
) -> tuple[float, float]:
    """One hand-over to a successor that waits for it: seconds from the call of save() until it has
    all descriptors, and until it has confirmed and let go of them."""
    last = None
    for name, id, _ in state.fds():
        last = (name, id)
    successor.await_one(last, **kind)
    time.sleep(pause)
    start = time.monotonic()
    daemon.save("bench", state)
    had, done = successor.result()
    return had - start, done - start


def floor_program(place: str) -> str:
    source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "direct_pass.c")
    program = os.path.join(place, "direct_pass")
    subprocess.run([os.environ.get("CC", "cc"), "-O2", "-o", program, source], check=True)
    return program


def against_the_floor(
    count: int,
    what: str,
    key: Callable[[int], tuple[str, int]],
    *,
    in_a_row: int = IN_A_ROW,
    pause: float = AT_WORK,
) -> bool:
    """The floor program is at work from its start to its end: its descriptors are as new as its
    CPUs are awake. So are ours, unless `pause` lets them sleep. The floor passes them with both
    processes at work at once; here load follows save, so no bound compares the two."""
    with tempfile.TemporaryDirectory() as place, private_cprd() as (path, _):
        program = floor_program(place)

        def floor() -> float:
            return statistics.median(floor_once() for _ in range(in_a_row))

        def floor_once() -> float:
            done = subprocess.run(
                [program, str(MANY)], check=True, capture_output=True, text=True, close_fds=True
            )
            return int(done.stdout) / 1e9

        def ours() -> float:
            return statistics.median(
                hand_over(client, successor, state, pause)[0] for _ in range(in_a_row)
            )

        successor = Successor(path)
        state = with_descriptors(MANY, key)
        with cprd.connect(path) as client:
            measured = pairs(count, ours, floor)
        successor.close()
        let_go(state)
    mine, yours = median(measured, 0), median(measured, 1)
    detail = (
        f"{mine * 1e3:.2f} ms against {yours * 1e3:.2f} ms, medians of {count} pairs of {in_a_row}"
    )
    return verdict(what, mine / yours, math.inf, "", detail)


def names(count: int) -> bool:
    return against_the_floor(count, "10,000 names / C floor", lambda n: (f"conn.{n}", 0))


def ids(count: int) -> bool:
    return against_the_floor(count, "10,000 ids / C floor", lambda n: ("conn", n))


def idle(count: int) -> bool:
    """What a restart out of the blue meets: cold caches, and CPUs that have to be woken up."""
    return against_the_floor(
        count,
        "10,000 names after idling / C floor",
        lambda n: (f"conn.{n}", 0),
        in_a_row=1,
        pause=ASLEEP,
    )


def daemon(count: int) -> bool:
    good = daemon_time(count, "daemon's CPU, 15,000 / 10 descriptors", KEEP, 1.1, private_cprd())
    what = "the same of a daemon without logic"
    return daemon_time(count, what, KEEP, math.inf, bare_daemon()) and good


def hurried(count: int) -> bool:
    """Ten are read and confirmed within half a millisecond, 15,000 in some more: so much later is
    the daemon woken up for it."""
    what = "daemon's CPU, 15,000 / 10, each confirmed at once"
    return daemon_time(count, what, 0.0, math.inf, private_cprd())


def daemon_time(
    count: int,
    what: str,
    keep: float,
    bound: float,
    daemon: AbstractContextManager[tuple[str, int]],
) -> bool:
    with daemon as (path, pid):
        successor = Successor(path)
        many = with_descriptors(MOST, lambda n: ("conn", n))
        few = with_descriptors(10, lambda n: ("conn", n))
        with cprd.connect(path) as client:

            def cpu(state: cprd.State) -> float:
                before = cpu_seconds(pid)
                for _ in range(HAND_OVERS):
                    hand_over(client, successor, state, ASLEEP, keep=keep)
                time.sleep(0.05)  # what it does afterwards counts
                return (cpu_seconds(pid) - before) / HAND_OVERS

            measured = pairs(count, lambda: cpu(many), lambda: cpu(few))
        successor.close()
        let_go(many)
        let_go(few)
    mine, yours = median(measured, 0), median(measured, 1)
    detail = (
        f"{mine * 1e6:.0f} us of CPU a hand-over against {yours * 1e6:.0f} us, medians of {count}"
        f" pairs of {HAND_OVERS} hand-overs"
    )
    return verdict(what, mine / yours, bound, "", detail)


def sealed(size: int) -> int:
    """A memfd with `size` bytes that are really there."""
    fd = os.memfd_create("bench", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    block = b"\1" * min(size, 1 << 20)
    for _ in range(size // len(block)):
        os.write(fd, block)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return fd


def memory(count: int) -> bool:
    with private_cprd() as (path, _):
        successor = Successor(path)
        large, small = cprd.State(), cprd.State()
        fds = sealed(1 << 30), sealed(1 << 10)
        large.save_section_fd("ram", fds[0])
        small.save_section_fd("ram", fds[1])
        with cprd.connect(path) as client:
            measured = pairs(
                count,
                lambda: hand_over(client, successor, large, section=True)[1],
                lambda: hand_over(client, successor, small, section=True)[1],
            )
        successor.close()
        for fd in fds:
            os.close(fd)
    mine, yours = median(measured, 0), median(measured, 1)
    detail = f"{mine * 1e3:.2f} ms against {yours * 1e3:.2f} ms, medians of {count} pairs"
    return verdict("section of 1 GiB / of 1 KiB", mine / yours, 1.2, "", detail)


FIGURES = {
    **{"names": names, "ids": ids, "idle": idle},
    **{"daemon": daemon, "hurried": hurried, "memory": memory},
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=21, metavar="N", help="at least 9")
    parser.add_argument("figure", nargs="*", metavar="FIGURE", help=", ".join(FIGURES))
    options = parser.parse_args()
    unknown = [figure for figure in options.figure if figure not in FIGURES]
    if unknown or options.pairs < 9:
        parser.error(f"unknown figure {unknown[0]}" if unknown else "at least 9 pairs")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < MOST + 500:
        raise SystemExit(f"wants a hard limit of {MOST + 500} descriptors (ulimit -Hn): is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    results = [FIGURES[figure](options.pairs) for figure in options.figure or FIGURES]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())

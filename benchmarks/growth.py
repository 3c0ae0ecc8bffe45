"""How costs grow: against descriptors, holds, bytes, connections, live keys.

    .venv/bin/python benchmarks/growth.py [--rounds N] [--picture FILE] [CURVE ...]

    descriptors   a whole hand-over (build, save, load, take, confirm) of 1 to 19,000
    holds         a hand-over of one beside 1 to 10,000 holds
    bytes         a hand-over of a section of 1 KiB to 4 GiB
    clients       a hand-over of one, by 1 to 200 connected clients in turn
    live          a change of a live hold with 10 to 19,000 keys

Where a limit of the machine (RLIMIT_NOFILE, memory) ends a curve before that, a line says which.
Prints CPU time of cprd and of the clients (the clock on the wall says more about what else the
machine does), medians with the middle half, and a picture of all (matplotlib). A cost is called
flat when the largest takes at most 1.5 times the smallest; docs/performance.md says why each is
what it is.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import cprd
from benchmarks.floors import Ours as Path
from benchmarks.live import Ours as Live
from benchmarks.picture import curves
from benchmarks.stage import cpu_seconds, private_cprd
from cprd.linux.nofile import limits, raise_soft_limit

Points = list[tuple[float, float, float, float]]  # x, lower quartile, median, upper quartile (us)
CONFIG = "[limits]\nholds = 20000\n"
SPARE = 500  # descriptors that a process needs besides those that it hands over


def quartiles(x: float, seconds: list[float]) -> tuple[float, float, float, float]:
    low, middle, high = statistics.quantiles([each * 1e6 for each in seconds], n=4)
    return x, low, middle, high


def timed(rounds: int, once: Callable[[], object], pid: int, repeat: int = 1) -> list[float]:
    """CPU seconds of `once`, ours and those of cprd, each the mean of `repeat` calls."""
    once()
    took = []
    for _ in range(rounds):
        begun = time.process_time() + cpu_seconds(pid)
        for _ in range(repeat):
            once()
        took.append((time.process_time() + cpu_seconds(pid) - begun) / repeat)
    return took


def of_one() -> cprd.State:
    state = cprd.State()
    state.save_fd("one", 0, os.eventfd(0))
    return state


def hand_over(daemon: cprd.Daemon, state: cprd.State) -> None:
    daemon.save("bench", state)
    with daemon.load("bench") as claim:
        for fd in claim.state.take_fds("one").values():
            os.close(fd)
        for key in claim.state:
            assert claim.state[key] is not None


def descriptors(rounds: int) -> Points:
    points: Points = []
    _, hard = limits()
    with private_cprd() as (path, pid):
        for count in (1, 10, 100, 1000, 3000, 10_000, 19_000):
            if count + SPARE > hard:
                print(f"descriptors: no {count} here: the hard RLIMIT_NOFILE is {hard}")
                break
            ends = Path(path, count)
            ends.once()
            found, repeat = [], 20 if count <= 100 else 3
            for _ in range(rounds):
                before = cpu_seconds(pid)
                clients = sum(ends.once()[1] for _ in range(repeat))
                found.append((clients + cpu_seconds(pid) - before) / repeat)
            ends.close()
            points.append(quartiles(count, found))
    return points


def holds(rounds: int) -> Points:
    points: Points = []
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as config:
        config.write(CONFIG)
        config.flush()
        options = ("--config", config.name)
        with private_cprd(options=options) as (path, pid), cprd.connect(path) as daemon:
            state, held = of_one(), 0
            for count in (1, 10, 100, 1000, 2500, 5000, 10_000):
                try:
                    while held < count:
                        daemon.save(f"standing{held}", state)
                        held += 1
                except cprd.LimitExceeded as error:
                    print(f"holds: {held} at most here: {error}")
                    held -= 1
                    daemon.drop(f"standing{held}")
                took = timed(rounds, partial(hand_over, daemon, state), pid, 20)
                points.append(quartiles(held, took))
                if held < count:
                    break
    return points


def sections(rounds: int) -> Points:
    points: Points = []
    with open("/proc/meminfo") as file:
        room = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))
    with private_cprd() as (path, pid), cprd.connect(path) as daemon:
        for bits in (10, 14, 16, 20, 24, 28, 30, 32):
            if 4 << bits > room * 1024:  # the bytes and the memfd, in half of the memory
                print(f"bytes: no 2 ** {bits} here: MemAvailable is {room} kB")
                break
            state = cprd.State()
            state["ram"] = bytes(1 << bits)
            few = rounds if bits < 28 else 5
            points.append(
                quartiles(
                    1 << bits,
                    timed(few, partial(hand_over, daemon, state), pid, 20 if bits <= 20 else 1),
                )
            )
    return points


def clients(rounds: int) -> Points:
    points: Points = []
    with private_cprd() as (path, pid):
        state = of_one()
        connected: list[cprd.Daemon] = []
        for count in (1, 10, 50, 100, 200):
            connected += [cprd.connect(path) for _ in range(count - len(connected))]
            turns = cycle(connected)
            took = timed(rounds, lambda turns=turns: hand_over(next(turns), state), pid, 200)  # type: ignore[misc]
            points.append(quartiles(count, took))
        for one in connected:
            one.close()
    return points


def live(rounds: int) -> Points:
    points: Points = []
    for count in (10, 100, 1000, 9000, 19_000):
        ours = Live(count)
        found = []
        for _ in range(rounds):
            begun = time.process_time()
            ours.lives(100)
            found.append((time.process_time() - begun) / 100)
        points.append(quartiles(count, found))
        ours.close()
    return points


CURVES: dict[str, tuple[Callable[[int], Points], str]] = {
    "descriptors": (descriptors, "descriptors"),
    "holds": (holds, "holds beside"),
    "bytes": (sections, "bytes of a section"),
    "clients": (clients, "clients in turn"),
    "live": (live, "keys of a live hold"),
}


def described(points: Points) -> Iterator[str]:
    for x, low, middle, high in points:
        yield f"    {x:>13,.0f}: {middle:,.0f} us ({low:,.0f} to {high:,.0f})"
    first, last = points[0], points[-1]
    ratio, more = last[2] / first[2], last[0] / first[0]
    kind = "flat" if ratio <= 1.5 else f"{last[2] / last[0] * 1000:.3g} ns each at the end"
    yield f"    {more:,.0f} times as many cost {ratio:,.1f} times as much: {kind}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="at least 5")
    parser.add_argument("--picture", default="growth.svg", metavar="FILE")
    parser.add_argument("curve", nargs="*", metavar="CURVE", help=", ".join(CURVES))
    options = parser.parse_args()
    names = options.curve or list(CURVES)
    if unknown := [name for name in names if name not in CURVES]:
        parser.error(f"unknown curve {unknown[0]}")
    raise_soft_limit()
    drawn = []
    for name in names:
        measure, label = CURVES[name]
        points = measure(max(5, options.rounds))
        print(name, *described(points), sep="\n", flush=True)
        drawn.append((name, label, points))
    curves(drawn, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What small hand-overs cost: one descriptor, connections open, against three echoes.

    .venv/bin/python benchmarks/small.py [--pairs N] [FIGURE ...]

    one         save, load and confirm of one descriptor, by turns with three echoes (echo.py)
    rate        hand-overs a second of 16 clients against the echoes a second of 16 clients

Beside the clock, `one` shows CPU time of client and server: on a machine where others work, that
says more. `rate` is bound by the CPU of the server where a machine has more than two CPUs.

Exit status: 0 when every figure is within its bound, 1 when not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import cprd
from benchmarks import echo
from benchmarks.stage import cpu_seconds, private_cprd, spread, verdict

ROUNDS = 300
CLIENTS = 16
SECONDS = 2.0  # of one measurement of a rate


class HandOver:
    """One descriptor, from a connection to another one."""

    def __init__(self, path: str, name: str = "bench") -> None:
        self.old, self.new = cprd.connect(path), cprd.connect(path)
        self.name = name
        self.fd = os.eventfd(0)

    def once(self) -> list[float]:
        """Seconds of save, load and confirm."""
        state = cprd.State()
        state.save_fd("client", 7, self.fd)
        times = [time.perf_counter()]
        self.old.save(self.name, state)
        times.append(time.perf_counter())
        claim = self.new.load(self.name)
        times.append(time.perf_counter())
        fd = claim.state.take_fd("client", 7)
        claim.confirm()
        times.append(time.perf_counter())
        os.close(fd)
        claim.close()
        return [after - before for before, after in pairwise(times)]


def one(rounds: int) -> bool:
    with private_cprd() as (path, pid), echo.server() as (echoes, echo_pid):
        ours, client = HandOver(path), echo.Client(echoes)
        for _ in range(50):
            ours.once()
            client.echo()
        steps: list[list[float]] = []
        three: list[float] = []
        cpu = [cpu_seconds(pid), cpu_seconds(echo_pid)]
        mine = [0.0, 0.0]
        for _ in range(rounds):
            start = time.process_time()
            steps.append(ours.once())
            middle, begun = time.process_time(), time.perf_counter()
            for _ in range(3):
                client.echo()
            three.append(time.perf_counter() - begun)
            mine[0] += middle - start
            mine[1] += time.process_time() - middle
        cpu = [cpu_seconds(pid) - cpu[0], cpu_seconds(echo_pid) - cpu[1]]
    for name, values in zip(("save", "load", "confirm"), zip(*steps, strict=True), strict=True):
        print(f"{name}: {spread(values, 1e6, 'us')}")
    print(f"three echoes: {spread(three, 1e6, 'us')}")
    used = [(own + server) / rounds * 1e6 for own, server in zip(mine, cpu, strict=True)]
    print(
        f"CPU of client and server: {mine[0] / rounds * 1e6:.0f} + {cpu[0] / rounds * 1e6:.0f} us,"
        f" three echoes {mine[1] / rounds * 1e6:.0f} + {cpu[1] / rounds * 1e6:.0f} us:"
        f" {used[0] / used[1]:.1f}"
    )
    ratio = statistics.median(sum(each) / other for each, other in zip(steps, three, strict=True))
    return verdict(
        "save, load and confirm of one / three echoes",
        ratio,
        3.0,
        "",
        spread([sum(each) for each in steps], 1e6, "us"),
    )


def work(kind: str, path: str, number: str) -> None:
    """A client: works from the word on for `SECONDS`, and writes how often."""
    once: Callable[[], object] = (
        HandOver(path, f"bench{number}").once if kind == "cprd" else echo.Client(path).echo
    )
    once()
    print("ready", flush=True)
    sys.stdin.readline()
    times = 0
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        once()
        times += 1
    print(times, flush=True)


def rate_of(kind: str, path: str) -> float:
    clients = [
        subprocess.Popen(
            [sys.executable, __file__, "--work", kind, path, str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(CLIENTS)
    ]
    for client in clients:
        assert client.stdout is not None
        if client.stdout.readline() != "ready\n":
            raise SystemExit("a client did not start")
    for client in clients:
        assert client.stdin is not None
        client.stdin.write("go\n")
        client.stdin.flush()
    return sum(int(client.communicate()[0]) for client in clients) / SECONDS


def rate(rounds: int) -> bool:
    ours: list[float] = []
    echoes: list[float] = []
    busy: list[float] = []
    with private_cprd() as (path, pid), echo.server() as (echo_path, echo_pid):
        for _ in range(max(3, rounds // 60)):
            before = cpu_seconds(pid), cpu_seconds(echo_pid)
            ours.append(rate_of("cprd", path))
            echoes.append(rate_of("echo", echo_path))
            used = cpu_seconds(pid) - before[0], cpu_seconds(echo_pid) - before[1]
            busy.append((used[1] / echoes[-1] * 3) / (used[0] / ours[-1]))
    ratio = statistics.median(mine / (other / 3) for mine, other in zip(ours, echoes, strict=True))
    detail = f"{spread(ours, 1, '')} hand-overs, {spread(echoes, 1, '')} echoes a second; by the"
    detail += f" CPU time of both servers alone {statistics.median(busy):.2f}"
    return verdict(
        "hand-overs a second, 16 clients / (echoes a second / 3)",
        ratio,
        0.35,
        "",
        detail,
        at_least=True,
    )


FIGURES = {"one": one, "rate": rate}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=ROUNDS, metavar="N", help="at least 9")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("figure", nargs="*", metavar="FIGURE", help=", ".join(FIGURES))
    options = parser.parse_args()
    if options.work:
        work(*options.work)
        return 0
    unknown = [figure for figure in options.figure if figure not in FIGURES]
    if unknown or options.pairs < 9:
        parser.error(f"unknown figure {unknown[0]}" if unknown else "at least 9 pairs")
    results = [FIGURES[figure](options.pairs) for figure in options.figure or FIGURES]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())

"""What small hand-overs cost: one descriptor, connections open, against three echoes.

    .venv/bin/python benchmarks/small.py [--pairs N] [FIGURE ...]

    one         save, load and confirm of one descriptor, by turns with three echoes (echo.py)
    cold        the same, each after 200 ms in which all slept: what a restart out of the blue meets
    rate        hand-overs a second of 16 clients against the echoes a second of 16 clients; beside
                that the same with the C client, where cc is
    floor       `one` and `rate` on a daemon that makes cprd's system calls and nothing else
                (bare_daemon.py); and the C client (examples/c) on both; wants cc

Beside the clock, `one` shows CPU time of client and server: on a machine where others work, that
says more. `rate` is bound by the CPU of the server where a machine has more than two CPUs.

Exit status: 0 when every figure is within its bound, 1 when not.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import cprd
from benchmarks import echo
from benchmarks.stage import bare_daemon, cpu_seconds, private_cprd, spread, verdict

HERE = os.path.dirname(os.path.abspath(__file__))
ROUNDS = 300
CLIENTS = 16
ASLEEP = 0.2  # s
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
    return _one(rounds, private_cprd(), "save, load and confirm of one / three echoes", 3.0)


def _one(
    rounds: int, daemon: AbstractContextManager[tuple[str, int]], what: str, bound: float
) -> bool:
    with daemon as (path, pid), echo.server() as (echoes, echo_pid):
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
        what,
        ratio,
        bound,
        "",
        spread([sum(each) for each in steps], 1e6, "us"),
    )


def cold(rounds: int) -> bool:
    with private_cprd() as (path, _), echo.server() as (echoes, _):
        ours, client = HandOver(path), echo.Client(echoes)
        steps: list[list[float]] = []
        three: list[float] = []
        for _ in range(max(9, rounds // 10)):
            time.sleep(ASLEEP)
            steps.append(ours.once())
            time.sleep(ASLEEP)
            begun = time.perf_counter()
            for _ in range(3):
                client.echo()
            three.append(time.perf_counter() - begun)
    for name, values in zip(("save", "load", "confirm"), zip(*steps, strict=True), strict=True):
        print(f"{name}: {spread(values, 1e6, 'us')}")
    whole = [sum(each) for each in steps]
    return verdict(
        "save, load and confirm of one / three echoes, each after 200 ms",
        statistics.median(whole) / statistics.median(three),
        math.inf,
        "",
        f"{spread(whole, 1e6, 'us')}, {spread(three, 1e6, 'us')}",
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


def rate_in_c(program: str, path: str) -> float:
    """As `rate_of`, with the C client."""
    clients = [
        subprocess.Popen(
            [program, path, "300", f"bench{number}"], stdout=subprocess.PIPE, text=True
        )
        for number in range(CLIENTS)
    ]
    return sum(1e9 / float(client.communicate()[0].split()[1]) for client in clients)


def rate(rounds: int) -> bool:
    what = "hand-overs a second, 16 clients / (echoes a second / 3)"
    return _rate(rounds, private_cprd(), what, 0.35)


def _rate(
    rounds: int, daemon: AbstractContextManager[tuple[str, int]], what: str, bound: float
) -> bool:
    ours: list[float] = []
    in_c: list[float] = []
    echoes: list[float] = []
    busy: list[float] = []
    with (
        tempfile.TemporaryDirectory(prefix="cprd-bench.") as place,
        daemon as (path, pid),
        echo.server() as (echo_path, echo_pid),
    ):
        program = compiled(place) if shutil.which(os.environ.get("CC", "cc")) else None
        for _ in range(max(3, rounds // 60)):
            before = cpu_seconds(pid), cpu_seconds(echo_pid)
            ours.append(rate_of("cprd", path))
            echoes.append(rate_of("echo", echo_path))
            used = cpu_seconds(pid) - before[0], cpu_seconds(echo_pid) - before[1]
            busy.append((used[1] / echoes[-1] * 3) / (used[0] / ours[-1]))
            if program:
                in_c.append(rate_in_c(program, path))
    ratio = statistics.median(mine / (other / 3) for mine, other in zip(ours, echoes, strict=True))
    detail = f"{spread(ours, 1, '')} hand-overs, {spread(echoes, 1, '')} echoes a second; by the"
    detail += f" CPU time of both servers alone {statistics.median(busy):.2f}"
    if in_c:
        pairs_in_c = zip(in_c, echoes, strict=True)
        of_c = statistics.median(mine / (other / 3) for mine, other in pairs_in_c)
        detail += f"; with the C client {of_c:.2f}, {spread(in_c, 1, '')}"
    return verdict(
        what,
        ratio,
        bound,
        "",
        detail,
        at_least=True,
    )


def compiled(place: str) -> str:
    """small_client.c with the C client."""
    program, sources = os.path.join(place, "client"), os.path.join(HERE, "../examples/c")
    parts = ("cprd", "cprd_live")
    command = [os.environ.get("CC", "cc"), "-O2", "-I", sources, "-o", program]
    command += [os.path.join(sources, f"{part}.c") for part in parts]
    command += [os.path.join(HERE, "small_client.c"), "-lm", "-pthread"]
    subprocess.run(command, check=True)
    return program


def floor(rounds: int) -> bool:
    _one(
        rounds,
        bare_daemon(),
        "save, load and confirm without cprd's logic / three echoes",
        math.inf,
    )
    _rate(rounds, bare_daemon(), "16 clients without cprd's logic / (echoes / 3)", 0.0)
    if shutil.which(os.environ.get("CC", "cc")) is None:
        print("floor: wants a C compiler")
        return True
    each: dict[str, list[tuple[float, float, float]]] = {"cprd": [], "bare daemon": []}
    with (
        tempfile.TemporaryDirectory(prefix="cprd-bench.") as place,
        private_cprd() as cprd_itself,
        bare_daemon() as bare,
    ):
        program, count = compiled(place), 300
        for _ in range(max(9, rounds // 20)):
            for what, (path, pid) in (("cprd", cprd_itself), ("bare daemon", bare)):
                before = cpu_seconds(pid)
                client = subprocess.run(
                    [program, path, str(count), "bench"], capture_output=True, check=True
                )
                used = (cpu_seconds(pid) - before) / (count + 100)  # to warm up
                own, wall = (int(number) / 1e9 for number in client.stdout.split())
                each[what].append((used, own, wall))
    for what, measured in each.items():
        used_by = [spread(column, 1e6, "us") for column in zip(*measured, strict=True)]
        print(f"{what}: CPU {used_by[0]}, C client: CPU {used_by[1]}, wall {used_by[2]}")
    ours, bare_ones = each.values()
    return verdict(
        "one by the C client, CPU time of cprd / of its system calls alone",
        statistics.median(mine[0] / other[0] for mine, other in zip(ours, bare_ones, strict=True)),
        math.inf,
        "",
        f"{spread([mine[0] for mine in ours], 1e6, 'us')}",
    )


FIGURES = {"one": one, "cold": cold, "rate": rate, "floor": floor}


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

"""What the benchmarks share: a private cprd, pairs of measurements, and the verdict on a figure."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from tests.support.checkout import compile_for_children

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@contextlib.contextmanager
def private_cprd(
    env: Mapping[str, str] | None = None, *, options: Sequence[str] = ()
) -> Iterator[tuple[str, int]]:
    """A cprd of our own, with `env` and `options` besides: (path of its socket, pid). Cprd is
    compiled, as where it is installed."""
    compile_for_children()
    with tempfile.TemporaryDirectory(prefix="cprd-bench.") as place:
        path = os.path.join(place, "cprd.sock")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("CPRD_", "LISTEN_"))}
        process = subprocess.Popen(
            [sys.executable, "-m", "cprd.daemon.command", "--socket", path, *options],
            stderr=subprocess.PIPE,
            env={**kept, "PYTHONPATH": ROOT, **(env or {})},
        )
        try:
            assert process.stderr is not None
            while b" ready " not in (line := process.stderr.readline()):
                if not line:
                    raise SystemExit("cprd did not start")
            # Its log goes to somebody who reads it, as a service's does.
            reader = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
            process.stderr.close()
            yield path, process.pid
        finally:
            process.terminate()
            process.wait()
        reader.wait()


@contextlib.contextmanager
def bare_daemon() -> Iterator[tuple[str, int]]:
    """A daemon that makes system calls only: (path of its socket, pid)."""
    with tempfile.TemporaryDirectory(prefix="cprd-bare.") as place:
        path = os.path.join(place, "bare.sock")
        command = [sys.executable, os.path.join(ROOT, "benchmarks/bare_daemon.py"), path]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None
            if process.stdout.readline() != b"ready\n":
                raise SystemExit("the bare daemon did not start")
            yield path, process.pid
        finally:
            process.kill()
            process.wait()


def cpu_seconds(pid: int) -> float:
    """CPU time of a process with all its threads, ended ones too: what clock_getcpuclockid(3)
    names."""
    return time.clock_gettime((~pid << 3) | 2)


def pairs(
    count: int, ours: Callable[[], float], yardstick: Callable[[], float]
) -> list[tuple[float, float]]:
    """`count` measurements of each, by turns: whatever disturbs the machine disturbs both."""
    for _ in range(3):  # to warm up
        ours()
        yardstick()
    return [(ours(), yardstick()) for _ in range(count)]


def median(measured: list[tuple[float, float]], which: int) -> float:
    return statistics.median(pair[which] for pair in measured)


def spread(values: Sequence[float], scale: float, unit: str) -> str:
    """Median and middle half of `values`, times `scale`."""
    low, middle, high = statistics.quantiles([value * scale for value in values], n=4)
    digits = 0 if middle >= 100 else 2
    return f"{middle:.{digits}f} {unit} ({low:.{digits}f} to {high:.{digits}f})"


class Figure(NamedTuple):
    """One result, for a table: `bound` is the most, or the least where `at_least`."""

    what: str
    value: float
    bound: float
    unit: str
    detail: str
    at_least: bool

    @property
    def good(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    @property
    def limit(self) -> str:
        if self.bound == math.inf:
            return "no bound"
        return f"at {'least' if self.at_least else 'most'} {self.bound:g}{self.unit}"


FIGURES = "CPRD_FIGURES"  # names a file that gets each figure, a JSON array a line


def verdict(
    what: str, value: float, bound: float, unit: str, detail: str, *, at_least: bool = False
) -> bool:
    """Print one figure, and append the figure to the file of $CPRD_FIGURES; whether the figure is
    within its bound."""
    figure = Figure(what, value, bound, unit, detail, at_least)
    if name := os.environ.get(FIGURES):
        with open(name, "a") as file:
            print(json.dumps(figure), file=file)
    print(f"{what}: {value:.2f}{unit} ({figure.limit}){'' if figure.good else '  MISSED'}")
    print(f"    {detail}", flush=True)
    return figure.good


def qemu_options(description: str | None, pairs: int) -> argparse.Namespace:
    """The options that every figure about a QEMU has; `pairs` is the default of --pairs."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=pairs)
    parser.add_argument("--machine", default="q35")
    parser.add_argument("--memory", default="128M")
    return parser.parse_args()

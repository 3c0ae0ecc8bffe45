"""What starting costs, beside what it is measured by.

    .venv/bin/python benchmarks/startup.py [--pairs N] [FIGURE ...]

    import      `import cprd` over a bare Python
    load        `cprctl load NAME -- true` over `python -c 'import msgpack, argparse'`
    ready       exec of cprd until READY over `python -c 'import trio, msgpack'`

Two figures each: wall clock and CPU time (user and system). On a machine where others work, the CPU
time says more.

Exit status: 0 when every figure is within its bound, 1 when not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import cprd
from benchmarks.stage import ROOT, cpu_seconds, private_cprd, spread, verdict


class Took(NamedTuple):
    """Seconds."""

    wall: float
    cpu: float


def environment(**more: str) -> dict[str, str]:
    env = {**os.environ, "PYTHONPATH": ROOT, **more}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # compiled once, as where it is installed
    return env


def run(command: Sequence[str], env: dict[str, str]) -> Took:
    start = time.perf_counter()
    process = subprocess.Popen(command, env=env)
    _, status, usage = os.wait4(process.pid, 0)
    took = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} failed")
    return Took(took, usage.ru_utime + usage.ru_stime)


def python(code: str) -> Took:
    return run([sys.executable, "-c", code], environment())


def compare(
    count: int, what: str, ours: Callable[[], Took], yardstick: Callable[[], Took], bound: float
) -> bool:
    """Verdicts on the difference in ms, or with a bound below 10 on the ratio."""
    for _ in range(2):  # to warm up, and to compile
        ours()
        yardstick()
    measured = [(ours(), yardstick()) for _ in range(count)]
    good = []
    for kind in Took._fields:
        pairs = [(getattr(mine, kind), getattr(yours, kind)) for mine, yours in measured]
        detail = f"{spread([pair[0] for pair in pairs], 1e3, 'ms')} against"
        detail += f" {spread([pair[1] for pair in pairs], 1e3, 'ms')}"
        if bound < 10:
            value = statistics.median(mine / yours for mine, yours in pairs)
            good.append(verdict(f"{what}, {kind}", value, bound, "", detail))
        else:
            value = statistics.median(mine - yours for mine, yours in pairs) * 1e3
            good.append(verdict(f"{what}, {kind}", value, bound, " ms", detail))
    return all(good)


def imported(count: int) -> bool:
    what = "import cprd, over bare Python"
    return compare(count, what, lambda: python("import cprd"), lambda: python("pass"), 15)


def load(count: int) -> bool:
    beside = os.path.join(os.path.dirname(sys.executable), "cprctl")
    cprctl = [beside] if os.path.exists(beside) else [sys.executable, "-m", "cprd.cli"]
    with private_cprd() as (path, _), cprd.connect(path) as client, open(os.devnull) as null:
        env = environment(CPRD_SOCKET=path)
        state = cprd.State()
        state.save_fd("null", 0, null)

        def ours() -> Took:
            client.save("bench", state)
            return run([*cprctl, "load", "bench", "--", "true"], env)

        what = "cprctl load, over importing msgpack and argparse"
        good = compare(count, what, ours, lambda: python("import msgpack, argparse"), 30)
        if client.list():
            raise SystemExit("cprctl load has not confirmed")
    return good


def ready(count: int) -> bool:
    with tempfile.TemporaryDirectory(prefix="cprd-bench.") as place:
        command = [sys.executable, "-m", "cprd.daemon.command", "--socket", f"{place}/s"]

        def ours() -> Took:
            start = time.perf_counter()
            process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE)
            assert process.stderr is not None
            while b" ready " not in (line := process.stderr.readline()):
                if not line:
                    raise SystemExit("cprd did not start")
            took = Took(time.perf_counter() - start, cpu_seconds(process.pid))
            process.terminate()
            process.communicate()
            return took

        what = "exec of cprd until READY / importing trio and msgpack"
        return compare(count, what, ours, lambda: python("import trio, msgpack"), 1.5)


FIGURES = {"import": imported, "load": load, "ready": ready}


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
    results = [FIGURES[figure](options.pairs) for figure in options.figure or FIGURES]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())

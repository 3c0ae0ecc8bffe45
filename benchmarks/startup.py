"""What starting costs, beside what it is measured by.

    .venv/bin/python benchmarks/startup.py [--pairs N] [FIGURE ...]

    import      `import cprd` over a bare Python
    load        `cprctl load NAME -- true` over `true`

Exit status: 0 when every figure is within its bound, 1 when not.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import cprd
from benchmarks.stage import ROOT, median, pairs, private_cprd, verdict


def seconds(command: Sequence[str], env: dict[str, str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, env=env)
    return time.perf_counter() - start


def imported(count: int) -> bool:
    # Without site: an editable install, if there is one, would be paid for on both sides.
    path = os.pathsep.join([ROOT, *(entry for entry in sys.path if "site-packages" in entry)])
    env = {**os.environ, "PYTHONPATH": path}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # compiled once, as where it is installed
    python = [sys.executable, "-S", "-c"]
    measured = pairs(
        count,
        lambda: seconds([*python, "import cprd"], env),
        lambda: seconds([*python, "pass"], env),
    )
    mine, yours = median(measured, 0), median(measured, 1)
    detail = f"{mine * 1e3:.1f} ms against {yours * 1e3:.1f} ms, medians of {count} pairs"
    return verdict("import cprd, over bare Python", (mine - yours) * 1e3, 20, " ms", detail)


def load(count: int) -> bool:
    beside = os.path.join(os.path.dirname(sys.executable), "cprctl")
    cprctl = [beside] if os.path.exists(beside) else [sys.executable, "-m", "cprd.cli"]
    with private_cprd() as (path, _), cprd.connect(path) as client, open(os.devnull) as null:
        env = {**os.environ, "CPRD_SOCKET": path, "PYTHONPATH": ROOT}
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        state = cprd.State()
        state.save_fd("null", 0, null)

        def ours() -> float:
            client.save("bench", state)
            return seconds([*cprctl, "load", "bench", "--", "true"], env)

        measured = pairs(count, ours, lambda: seconds(["true"], env))
        if client.list():
            raise SystemExit("cprctl load has not confirmed")
    mine, yours = median(measured, 0), median(measured, 1)
    detail = f"{mine * 1e3:.1f} ms against {yours * 1e3:.1f} ms, medians of {count} pairs"
    return verdict("cprctl load, over its command", (mine - yours) * 1e3, 100, " ms", detail)


FIGURES = {"import": imported, "load": load}


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

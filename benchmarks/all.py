"""All figures, one program after the other: a table with bounds and spread, and pictures.

    .venv/bin/python benchmarks/all.py [--quick] [--picture FILE] [PROGRAM ...]

Each program measures by turns with its yardstick. `--quick` takes the fewest pairs. Programs that
want QEMU or a systemd run by name only. The picture, and that of how costs grow (growth.svg), want
matplotlib, which is in the extra `bench`: python3 tools/bootstrap.py all bench.

Exit status: 0 when every figure is within its bound, 1 when not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks.picture import bars
from benchmarks.stage import FIGURES, Figure

HERE = os.path.dirname(os.path.abspath(__file__))
# Program -> the option for the fewest pairs
PROGRAMS = {
    "floors": ("--pairs", "9"),
    "whole_path": ("--pairs", "9"),
    "small": ("--pairs", "60"),
    "handover": ("--pairs", "9"),
    "startup": ("--pairs", "9"),
    "standing": ("--pairs", "9"),
    "live": ("--rounds", "9"),
    "growth": ("--rounds", "5"),
}
BY_NAME = ("store", "qemu_start", "qemu_blackout", "qemu_upgrade")


def run(name: str, options: tuple[str, ...], file: str) -> int:
    """Run a program, whose figures `file` gets. Returns the exit status."""
    print(f"--- {name}", flush=True)
    command = [sys.executable, os.path.join(HERE, f"{name}.py"), *options]
    return subprocess.run(command, env={**os.environ, FIGURES: file}, check=False).returncode


def table(figures: list[Figure]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table("figure", "measured", "bound", "median and middle half")
    for figure in figures:
        value = f"{figure.value:.2f}{figure.unit}"
        colour = "green" if figure.good else "red"
        shown.add_row(figure.what, f"[{colour}]{value}[/]", figure.limit, figure.detail)
    Console(width=None if sys.stdout.isatty() else 150).print(shown)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the fewest pairs")
    parser.add_argument("--picture", default="figures.svg", metavar="FILE")
    known = [*PROGRAMS, *BY_NAME]
    parser.add_argument("program", nargs="*", metavar="PROGRAM", help=", ".join(known))
    options = parser.parse_args()
    names = options.program or list(PROGRAMS)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown program {unknown[0]}")
    with tempfile.TemporaryDirectory(prefix="cprd-bench.") as place:
        file = os.path.join(place, "figures")
        open(file, "w").close()
        failed = [
            name
            for name in names
            if run(name, PROGRAMS.get(name, ()) if options.quick else (), file)
        ]
        with open(file) as lines:
            figures = [Figure(*json.loads(line)) for line in lines]
    table(figures)
    bars(figures, options.picture)
    if failed:
        print(f"missed, or not measured: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""cprctl list: a row a hold."""

from __future__ import annotations

import argparse

from cprd.cli.arguments import connect
from cprd.cli.table import print_json, seconds, show_rows

HEADS = [
    "name",
    "generation",
    "phase",
    "uid",
    "fds",
    "bytes",
    "age",
    "expires",
    "attempts",
    "reason",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="an array of objects, for programs")


def run(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        holds = daemon.list()
    if args.json:
        print_json(holds)
    else:
        rows = [[_cell(head, hold.get(head)) for head in HEADS] for hold in holds]
        show_rows(HEADS, rows, right=(1, 3, 4, 5, 6, 7, 8))
    return 0


def _cell(head: str, value: object) -> str:
    if head in ("age", "expires"):
        return seconds(value)
    return "" if value is None else str(value)

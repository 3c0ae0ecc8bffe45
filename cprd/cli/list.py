"""cprctl list: a row a hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from cprd.cli import Verbs


def add_parser(verbs: Verbs) -> None:
    parser = verbs.add_parser("list", help="what is held", description=__doc__)
    parser.add_argument("--json", action="store_true", help="an array of objects, for programs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from cprd.cli.connection import connect
    from cprd.cli.table import print_json, seconds, show_rows

    with connect(args) as daemon:
        holds = daemon.list()
    if args.json:
        print_json(holds)
        return 0
    heads = [
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
    timed = {"age", "expires"}
    rows = [
        [seconds(hold.get(k)) if k in timed else _word(hold.get(k)) for k in heads]
        for hold in holds
    ]
    show_rows(heads, rows, right=(1, 3, 4, 5, 6, 7, 8))
    return 0


def _word(value: object) -> str:
    return "" if value is None else str(value)

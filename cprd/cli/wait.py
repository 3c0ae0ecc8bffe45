"""cprctl wait: return when NAME can be loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from cprd.cli import Verbs


def add_parser(verbs: Verbs) -> None:
    from cprd.cli.owner import add_name
    from cprd.cli.spans import DAY, seconds

    parser = verbs.add_parser("wait", help="wait until a hold can be loaded", description=__doc__)
    add_name(parser)
    parser.add_argument(
        "--timeout",
        type=seconds(DAY),
        default=float(DAY),
        metavar="S",
        help="give up after S seconds, with exit status 3 or 4 (default: a day)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from cprd.cli.connection import connect

    with connect(args) as daemon:
        daemon.wait(args.name, args.timeout)
    return 0

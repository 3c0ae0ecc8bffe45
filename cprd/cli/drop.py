"""cprctl drop: end a hold, and let go of everything that it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from cprd.cli import Verbs


def add_parser(verbs: Verbs) -> None:
    from cprd.cli.owner import add_name

    parser = verbs.add_parser("drop", help="end a hold and let go of it", description=__doc__)
    add_name(parser)
    parser.add_argument(
        "--force",
        action="store_true",
        help="even if it is claimed, in doubt, damaged or unreadable",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from cprd.cli.connection import connect

    with connect(args) as daemon:
        daemon.drop(args.name, force=args.force)
    return 0

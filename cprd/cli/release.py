"""cprctl release: give back by force what is in doubt.

Only after making sure that nobody acts on it: a state served twice is acted on twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from cprd.cli import Verbs


def add_parser(verbs: Verbs) -> None:
    from cprd.cli.owner import add_name

    parser = verbs.add_parser("release", help="serve again what is in doubt", description=__doc__)
    add_name(parser)
    parser.add_argument(
        "--force",
        action="store_true",
        required=True,
        help="required: it says that nobody acts on this state",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from cprd.cli.connection import connect

    with connect(args) as daemon:
        daemon.release(args.name, force=True)
    return 0

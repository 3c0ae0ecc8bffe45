"""cprctl wait: return when NAME can be loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from cprd.cli import Verbs


def add_parser(verbs: Verbs) -> None:
    parser = verbs.add_parser("wait", help="wait until a hold can be loaded", description=__doc__)
    parser.add_argument("name", metavar="NAME")
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="S",
        help="give up after S seconds, with exit status 3 or 4 (default: never)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from contextlib import suppress

    from cprd.cli.connection import connect
    from cprd.errors import Busy, NotHeld

    with connect(args) as daemon:
        if args.timeout is not None:
            daemon.wait(args.name, args.timeout)
            return 0
        while True:
            with suppress(NotHeld, Busy):
                daemon.wait(args.name)
                return 0
    return 0

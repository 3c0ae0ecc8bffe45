"""cprctl drop: end a hold, and let go of everything that it holds."""

from __future__ import annotations

import argparse

from cprd.cli.arguments import add_name, connect


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_name(parser)
    parser.add_argument(
        "--force",
        action="store_true",
        help="even if it is claimed, in doubt, damaged or unreadable",
    )


def run(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        daemon.drop(args.name, force=args.force)
    return 0

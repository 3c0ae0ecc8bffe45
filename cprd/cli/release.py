"""cprctl release: give back by force what is in doubt.

Only after making sure that nobody acts on it: a state served twice is acted on twice.
"""

from __future__ import annotations

import argparse

from cprd.cli.arguments import add_name, connect


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_name(parser)
    parser.add_argument(
        "--force",
        action="store_true",
        required=True,
        help="required: it says that nobody acts on this state",
    )


def run(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        daemon.release(args.name, force=True)
    return 0

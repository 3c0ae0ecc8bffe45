"""cprctl wait: return when NAME can be loaded."""

from __future__ import annotations

import argparse

from cprd.cli.arguments import DAY, add_name, connect, seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_name(parser)
    parser.add_argument(
        "--timeout",
        type=seconds(DAY),
        default=float(DAY),
        metavar="S",
        help="give up after S seconds, with exit status 3 or 4 (default: a day)",
    )


def run(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        daemon.wait(args.name, args.timeout)
    return 0

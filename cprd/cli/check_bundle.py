"""cprctl check-bundle: everything that is wrong with what a client has saved.

Looks at each part of a bundle, and of a live hold once its owner has ended, and says all that is
wrong. Takes nothing. Exit status 1 when anything is wrong.
"""

from __future__ import annotations

import argparse
from typing import Any

from cprd.bundle.check import check_bundle
from cprd.cli.arguments import add_name, socket_of
from cprd.cli.table import print_json
from cprd.client.blocking import Connection
from cprd.client.exchange import Common, connect
from cprd.client.verbs import row_and_bundle
from cprd.errors import Busy
from cprd.linux.child import in_a_child
from cprd.linux.stdio import say
from cprd.live.check import check_live


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_name(parser)
    parser.add_argument("--json", action="store_true", help="one object, for programs")


def run(args: argparse.Namespace) -> int:
    found = in_a_child(lambda: _look(args))
    wrong = found["wrong"]
    if args.json:
        print_json(found)
    elif wrong:
        for line in wrong:
            say(f"{args.name}: {line}")
    else:
        segments = f"{found['segments']} segments, " if "segments" in found else ""
        say(
            f"{args.name}: whole: {segments}{found['descriptors']} descriptors,"
            f" {found['sections']} sections"
        )
    return 1 if wrong else 0


def _look(args: argparse.Namespace) -> dict[str, Any]:
    """In a child: `wrong`, a list of sentences, and counts. Raises CprdError."""
    line = Connection(socket_of(args), Common(None))
    line.drive(connect(line))
    row, bundle = line.run(row_and_bundle(args.name, None))
    if bundle < 0:
        raise Busy(f"{args.name!r} cannot be looked into: {row['phase']}: {row['reason']}")
    if not row["live"]:
        return check_bundle(bundle, row)
    if row["phase"] in ("live", "claimed", "in-doubt"):
        raise Busy(f"{args.name!r} is read once its owner has ended: {row['reason']}")
    return check_live(bundle)

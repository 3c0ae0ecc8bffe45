"""cprctl check-bundle: everything that is wrong with what a client has saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from cprd.cli import Verbs


def add_parser(verbs: Verbs) -> None:
    from cprd.cli.owner import add_name

    parser = verbs.add_parser(
        "check-bundle",
        help="all that is wrong with a bundle, for people who write clients",
        description="Looks at each part of a bundle, and of a live hold once its owner has ended,"
        " and says all that is wrong. Takes nothing. Exit status 1 when anything is wrong.",
    )
    add_name(parser)
    parser.add_argument("--json", action="store_true", help="one object, for programs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from cprd.cli.table import print_json
    from cprd.linux.child import in_a_child
    from cprd.linux.stdio import say

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
    from cprd.bundle.check import check_bundle
    from cprd.client.blocking import Connection
    from cprd.client.exchange import Common, connect
    from cprd.client.verbs import row_and_bundle
    from cprd.errors import Busy
    from cprd.linux.paths import default_socket

    line = Connection(args.socket or default_socket(user=args.user), Common(None))
    line.drive(connect(line))
    row, bundle = line.run(row_and_bundle(args.name, None))
    if bundle < 0:
        raise Busy(f"{args.name!r} cannot be looked into: {row['phase']}: {row['reason']}")
    if not row["live"]:
        return check_bundle(bundle, row)
    if row["phase"] in ("live", "claimed", "in-doubt"):
        raise Busy(f"{args.name!r} is read once its owner has ended: {row['reason']}")
    from cprd.live.check import check_live

    return check_live(bundle)

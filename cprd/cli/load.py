"""cprctl load: take what is held under NAME, confirm, and become CMD, which goes on with it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from time import monotonic
from typing import Any

from cprd import Claim, Daemon
from cprd.cli.arguments import DAY, SHORTEST, add_name, connect, seconds
from cprd.cli.become import (
    Crew,
    Deferred,
    RaisedLimit,
    become,
    check_names,
    check_room,
    not_become,
    program,
)
from cprd.errors import Fenced, NotHeld
from cprd.linux.child import in_a_child
from cprd.protocol.messages import LEASE

Look = Callable[[], dict[str, Any]]

TRIES = 5  # replaced again and again between look and claim: somebody saves in a loop


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "cprctl load NAME [--owner USER] [--wait S] [--lease S] -- CMD [ARG ...]"
    parser.epilog = (
        "CMD finds its descriptors as from systemd: LISTEN_FDS, LISTEN_PID, LISTEN_FDNAMES"
        " (NAME or NAME.ID; ':' and what is not printable as %XX), then the sections, each a sealed"
        " memfd named section.KEY (raw bytes as they were saved, other values as msgpack)."
    )
    add_name(parser)
    parser.add_argument(
        "--wait", type=seconds(DAY), default=0.0, metavar="S", help="wait up to S seconds for it"
    )
    parser.add_argument(
        "--lease",
        type=seconds(DAY, SHORTEST),
        default=LEASE,
        metavar="S",
        help="the claim's longest life",
    )
    parser.set_defaults(takes_command=True)


def run(args: argparse.Namespace) -> int:
    file = program(args.command)
    limit = RaisedLimit()
    crew = Crew()
    try:
        with connect(args) as daemon:
            look = look_at(args)
            wait, lease = args.wait, args.lease
            with claim_that_fits(daemon, args.name, look, limit, wait=wait, lease=lease) as claim:
                crew.take(claim.state)
                deferred = Deferred()
                claim.confirm()
                crew.warm = True
        become(file, args.command, crew, limit, deferred)
    except BaseException as error:
        if crew.warm is None:
            raise
        not_become(error, args.name, lambda: save_back(args, crew))


def look_at(args: argparse.Namespace) -> Look:
    """How to look at what is held: from a child, on a connection of its own, so that closing
    what it saw holds nobody up and takes no room below this process's RLIMIT_NOFILE."""

    def look() -> dict[str, Any]:
        with connect(args) as daemon:
            return dict(daemon.show(args.name))

    return lambda: in_a_child(look)


def claim_that_fits(
    daemon: Daemon,
    name: str,
    look: Look,
    limit: RaisedLimit,
    *,
    wait: float = 0.0,
    lease: float = LEASE,
) -> Claim:
    """Claim `name` after a look: if its names fit one variable, and its descriptors below the hard
    limit. What is claimed is the generation that was looked at. Raises LimitExceeded."""
    end = monotonic() + wait
    tries = TRIES
    while True:
        if wait:
            daemon.wait(name, max(0.0, end - monotonic()))
        left = max(0.0, end - monotonic())
        try:
            shown = look()
            check_names(shown)
            check_room(len(shown["descriptors"]) + len(shown["sections"]), limit)
            return daemon.load(name, wait=left, lease=lease, generation=shown["generation"])
        except NotHeld:
            # Of all who waited for it one has had it, which is no reason to wait no longer.
            if not left:
                raise
        except Fenced:
            tries -= not left
            if not tries:
                raise


def save_back(args: argparse.Namespace, crew: Crew) -> str:
    """Hold everything again under its name; says so."""
    with connect(args) as daemon:
        saved = daemon.save(args.name, crew.as_state(), if_exists="replace")
    return f"{args.name} is held again, as generation {saved.generation}"

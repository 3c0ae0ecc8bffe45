"""Arguments that several verbs share: NAME and --owner, spans of time, and the daemon's socket."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import cprd
from cprd.errors import InvalidInput
from cprd.linux.paths import default_socket

DAY = 24 * 3600  # cprd.protocol.messages.MAX_WAIT, MAX_LEASE
YEARS = 10 * 365 * DAY  # cprd.protocol.messages.MAX_TTL
SHORTEST = 0.1  # cprd.protocol.messages.MIN_LEASE


def add_name(parser: argparse.ArgumentParser) -> None:
    """The argument NAME, and --owner. NAME is one's own, for root too."""
    parser.add_argument("name", metavar="NAME", help="your own; as root UID/NAME, another user's")
    parser.add_argument("--owner", metavar="USER", help="as root: NAME of that user (or uid)")


def full_name(name: str, owner: str | None) -> str:
    """NAME, or UID/NAME with an --owner. Raises InvalidInput for two owners that differ."""
    if owner is None:
        return name
    from cprd.linux.identity import uid_of

    uid = uid_of(owner)
    before, slash, bare = name.rpartition("/")
    if slash and before != str(uid):
        raise InvalidInput(f"{name!r} and --owner {owner} (uid {uid}): two owners; which one?")
    return f"{uid}/{bare}"


def seconds(most: int, least: float = 0) -> Callable[[str], float]:
    """For argparse: a number of seconds, `least` to `most`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not least <= value <= most:  # nan is not, either
            wants = f"{least:g} to {most}"
            raise argparse.ArgumentTypeError(f"{text} is not a number of seconds, {wants}")
        return value

    return parse


def socket_of(args: argparse.Namespace) -> str:
    """--socket, else $CPRD_SOCKET, else the default (with --user the user's own). Never decided by
    what happens to exist."""
    path: str = args.socket or default_socket(user=args.user)
    return path


def connect(args: argparse.Namespace) -> cprd.Daemon:
    """Speak to the daemon; the caller closes it. Raises Unavailable when nobody answers."""
    return cprd.connect(socket_of(args))

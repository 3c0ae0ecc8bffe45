"""Which daemon cprctl speaks to: --socket, else $CPRD_SOCKET, else the default (with --user the
user's own). Never decided by what happens to exist."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from cprd import Daemon


def connect(args: argparse.Namespace) -> Daemon:
    """Speak to the daemon; the caller closes it. Raises Unavailable when nobody answers."""
    import cprd
    from cprd.linux.paths import default_socket

    return cprd.connect(args.socket or default_socket(user=args.user))

"""Where the daemon's socket is, for it and for its clients: by what was asked for, never by what
happens to exist."""

from __future__ import annotations

import os

from cprd.errors import InvalidInput

SYSTEM = "/run/cprd/cprd.sock"


def default_socket(*, user: bool = False) -> str:
    """$CPRD_SOCKET, else the user's socket when that is asked for, else the system's.

    Raises InvalidInput where $XDG_RUNTIME_DIR is wanted and not set."""
    path = os.environ.get("CPRD_SOCKET")
    if path:
        return path
    if not user:
        return SYSTEM
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if not runtime:
        raise InvalidInput("--user wants $XDG_RUNTIME_DIR, which is not set; name a --socket PATH")
    return os.path.join(runtime, "cprd", "cprd.sock")

"""cprd hands state and open descriptors across a process restart.

import cprd

with cprd.connect() as daemon:              # the exiting process
    state = cprd.State()
    state.save_fd("listener", 0, sock)
    state["sessions"] = {...}
    daemon.save("web", state)

with cprd.connect() as daemon:              # the restarted one
    with daemon.load("web") as claim:
        sock = socket.socket(fileno=claim.state.take_fd("listener", 0))
"""

import sys

from cprd.errors import (
    AlreadyHeld,
    Busy,
    CprdError,
    Damaged,
    Denied,
    Fenced,
    InvalidInput,
    LimitExceeded,
    MissingKey,
    NotHeld,
    ProtocolError,
    Timeout,
    Unavailable,
)

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING or not sys.argv[:1] or not sys.argv[0].endswith("cprctl"):
    # All at once: a later import may fail, in a program that has changed its root, say.
    import cprd.live  # noqa: F401  # before the function of that name, to be replaced by no import
    from cprd.client.blocking import Claim, Daemon, Prepared, Saved, connect, live
    from cprd.protocol.messages import RELEASE
    from cprd.state import State

    __version__ = RELEASE

if TYPE_CHECKING:
    from cprd import asyncio as asyncio
    from cprd import cpr as cpr
    from cprd import trio as trio
    from cprd import vmstate as vmstate
    from cprd.client.blocking_live import LiveState as LiveState
    from cprd.protocol.rows import Greeting as Greeting
    from cprd.protocol.rows import Row as Row
    from cprd.protocol.rows import Shown as Shown
    from cprd.protocol.rows import Status as Status
else:

    def __getattr__(name: str) -> object:
        """Other modules of cprd, cprd.LiveState and the shapes of rows: imported when asked for.
        So is the client in cprctl, some of whose verbs have no time for it."""
        from importlib import import_module

        if name in ("asyncio", "cpr", "trio", "vmstate"):
            return import_module(f"cprd.{name}")
        for module, names in _MODULES.items():
            if name in names:
                return getattr(import_module(f"cprd.{module}"), name)
        raise AttributeError(f"module 'cprd' has no attribute {name!r}")

    _MODULES = {
        "client.blocking": ("Claim", "Daemon", "Prepared", "Saved", "connect", "live"),
        "client.blocking_live": ("LiveState",),
        "protocol.rows": ("Greeting", "Row", "Shown", "Status"),
        "state": ("State",),
    }


__all__ = [
    "AlreadyHeld",
    "Busy",
    "Claim",
    "CprdError",
    "Daemon",
    "Damaged",
    "Denied",
    "Fenced",
    "InvalidInput",
    "LimitExceeded",
    "MissingKey",
    "NotHeld",
    "Prepared",
    "ProtocolError",
    "Saved",
    "State",
    "Timeout",
    "Unavailable",
    "connect",
    "live",
]

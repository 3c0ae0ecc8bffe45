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

import cprd.live  # noqa: F401  # before the function of that name, which is not to be replaced later
from cprd.client.blocking import Claim, Daemon, Prepared, Saved, connect, live
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
from cprd.protocol import messages
from cprd.state import State

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
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
        """Other modules of cprd, cprd.LiveState and the shapes of rows: imported when asked for."""
        from importlib import import_module

        if name in ("asyncio", "cpr", "trio", "vmstate"):
            return import_module(f"cprd.{name}")
        if name == "LiveState":
            return import_module("cprd.client.blocking_live").LiveState
        if name in ("Greeting", "Row", "Shown", "Status"):
            return getattr(import_module("cprd.protocol.rows"), name)
        raise AttributeError(f"module 'cprd' has no attribute {name!r}")


__version__ = messages.RELEASE

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

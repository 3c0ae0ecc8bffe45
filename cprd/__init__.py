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

from cprd.client import Claim, Daemon, Prepared, Saved, connect
from cprd.errors import (
    AlreadyHeld,
    Busy,
    CprdError,
    Damaged,
    Denied,
    Fenced,
    InvalidInput,
    LimitExceeded,
    NotHeld,
    ProtocolError,
    Timeout,
    Unavailable,
)
from cprd.state import State

__version__ = "0.1.0"

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
    "NotHeld",
    "Prepared",
    "ProtocolError",
    "Saved",
    "State",
    "Timeout",
    "Unavailable",
    "connect",
]

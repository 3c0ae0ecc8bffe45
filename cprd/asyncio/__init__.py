"""The same verbs with await, on asyncio (uvloop, too), and a server's work with connections.

    async with cprd.asyncio.connect() as daemon:
        async with daemon.load("web") as claim:
            reader, writer = await cprd.asyncio.adopt_stream(claim.state.take_fd("client", 7))

`daemon.load(...)` and `connect()` can be awaited, too: then the result is the block to enter, or to
close(). What can block (closing foreign descriptors) is done in a thread of the loop's executor.

Before the end a server calls `quiesce`, saves, and lets go of connections by `leave`, so that no
peer hears of the end; the successor takes connections over by `adopt` or `adopt_stream`.
"""

from __future__ import annotations

from cprd.asyncio.adopting import adopt, adopt_stream
from cprd.asyncio.connection import LoopConnection
from cprd.asyncio.leaving import keep_path, leave, quiesce, socket_of, unread
from cprd.client.awaiting import Claim, Daemon, LiveState, Loop, Prepared
from cprd.client.claim import Saved

__all__ = [
    "Claim",
    "Daemon",
    "LiveState",
    "Prepared",
    "Saved",
    "adopt",
    "adopt_stream",
    "connect",
    "keep_path",
    "leave",
    "live",
    "quiesce",
    "socket_of",
    "unread",
]

_loop = Loop(LoopConnection)
connect, live = _loop.connect, _loop.live

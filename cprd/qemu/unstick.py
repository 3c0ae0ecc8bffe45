"""Getting a guest out of `finish-migrate`, where QEMU leaves it when its disks cannot be flushed.

To hand over, QEMU stops the guest and flushes its disks. When a flush fails, the migration has
failed, but (10.0, migration_connect) nobody puts the run state back: the guest stands, `cont` is
refused ("Migration is not finalized yet"), and nothing in QMP leads out. QEMU's gdb stub does: a
debugger that detaches lets the guest run. Without that an attempt to save would cost a guest whose
disk has a bad moment.
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import TYPE_CHECKING

from cprd.errors import CprdError
from cprd.qemu.process import readable, writable

if TYPE_CHECKING:
    from cprd.qemu.qmp import Monitor

_DETACH = b"$D#44"
_PATIENCE = 3.0


async def unstick(monitor: Monitor, path: str, *, live: bool) -> str:
    """Let a guest in `finish-migrate` out of it; the run state then. `path`: free, and where its
    QEMU may listen. `live`: whether the guest ran before (if not, it is stopped again at once).

    A QEMU that has a gdb stub already keeps it, and stays stuck. Raises MonitorLost."""
    try:
        chardevs = await monitor.execute("query-chardev")
        if any(row.get("label") == "gdb" for row in chardevs):
            return await monitor.status()
        await _gdb(monitor, f"unix:{path},server=on,wait=off")
        try:
            await _detach(path)
            if not live:
                await monitor.execute("stop")
        finally:
            await _gdb(monitor, "none")
    except (CprdError, OSError):
        pass
    return await monitor.status()


async def _gdb(monitor: Monitor, where: str) -> None:
    await monitor.execute(
        "human-monitor-command",
        **{"command-line": f"gdbserver {where}"},  # (no QMP for it)
    )


async def _detach(path: str) -> None:
    """Be that debugger. It has detached when QEMU has answered."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.connect(path)
        await writable(sock.fileno(), _PATIENCE)
        sock.sendall(_DETACH)
        until = asyncio.get_running_loop().time() + _PATIENCE
        answer = b""
        while b"OK" not in answer:
            if not await readable(sock.fileno(), until - asyncio.get_running_loop().time()):
                return
            data = sock.recv(256)
            if not data:
                return
            answer += data
    finally:
        sock.close()


def why(error: str) -> str:
    """QEMU's word for a failed migration, for people. Pure."""
    said, found, number = error.partition("migration_stop_vm failed, error ")
    if found and not said and number.isdigit():
        return f"the guest's disks could not be flushed ({os.strerror(int(number))})"
    return error

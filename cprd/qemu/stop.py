"""`cprctl qemu stop`, for ExecStop=: the guest goes into a hold; when that makes no sense or fails,
it is shut down as by its power button, and waited for. A supervisor kills what is left
afterwards."""

from __future__ import annotations

import asyncio
import os

import cprd
from cprd.errors import CprdError, Unavailable
from cprd.qemu.failure import Failed, InDoubt, MonitorBusy, Refused
from cprd.qemu.qmp import Monitor, event_is
from cprd.qemu.save import save
from cprd.qemu.settle import end

_OVER = ("shutdown", "guest-panicked", "internal-error")
RESTARTED = 3.0  # s for cprd's socket to come back: it may be restarted together with us


async def stop(
    socket_path: str,
    name: str,
    qmp: str,
    *,
    timeout: float,
    powerdown: float,
    down_marker: str,
) -> str:
    """What was done. Raises when the guest neither is held nor has ended."""
    try:
        monitor = await Monitor.connect(qmp)
    except Refused:
        return "no QEMU is there any more: the guest ended by itself"
    process = monitor.process
    try:
        if await monitor.status() in _OVER:
            await end(monitor, process)
            return "the guest had ended; its QEMU has quit"
    finally:
        await monitor.close()
    if os.path.exists(down_marker):
        return f"the machine goes down for good; {await shut_down(qmp, powerdown, insist=True)}"
    try:
        with await connect(socket_path) as daemon:
            kept = await save(daemon, name, qmp, timeout=timeout)
        return f"held ({kept.status}, generation {kept.generation})"
    except (InDoubt, MonitorBusy):
        raise
    except CprdError as error:
        why = f"not saved: {' '.join(str(error).split())}"
    try:
        return f"{why}; {await shut_down(qmp, powerdown)}"
    except Failed as error:
        raise Failed(f"{why}; {error}") from None


async def connect(path: str) -> cprd.Daemon:
    """As cprd.connect; tries for a while when nobody listens."""
    loop = asyncio.get_running_loop()
    until = loop.time() + RESTARTED
    while True:
        try:
            return cprd.connect(path)
        except Unavailable:
            if loop.time() > until:
                raise
        await asyncio.sleep(0.05)


async def shut_down(qmp: str, timeout: float, *, insist: bool = False) -> str:
    """Press the power button, and wait for the end of QEMU. After `timeout` s: raises Failed, or
    (`insist`: it would be killed soon, its images left as they are) lets QEMU quit."""
    try:
        monitor = await Monitor.connect(qmp)
    except Refused:
        return "its QEMU has ended meanwhile"
    try:
        status = await monitor.status()
        if status in ("paused", "io-error", "watchdog", "suspended"):
            await monitor.execute("system_wakeup" if status == "suspended" else "cont")
        await monitor.execute("system_powerdown")
        if monitor.process is None:
            await monitor.event(event_is("SHUTDOWN"), timeout)
        elif not await monitor.process.wait(timeout):
            if await monitor.status() in _OVER:
                await end(monitor, monitor.process)
            elif insist:
                await end(monitor, monitor.process)
                return (
                    f"the guest did not shut down within {timeout:g} s of its power button: its"
                    " QEMU has quit, with its images closed"
                )
            else:
                raise Failed(
                    f"the guest did not shut down within {timeout:g} s of its power button: it"
                    " still runs"
                )
        return "the guest was shut down"
    finally:
        await monitor.close()

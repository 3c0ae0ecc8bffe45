"""`cprctl qemu stop`, for ExecStop=: the guest goes into a hold; when that makes no sense or fails,
it is shut down as by its power button, and waited for. A supervisor kills what is left
afterwards."""

from __future__ import annotations

import asyncio
import os

import cprd
from cprd.errors import CprdError, Unavailable
from cprd.qemu import interrupt
from cprd.qemu.failure import Failed, InDoubt, MonitorBusy, Nobody
from cprd.qemu.process import Process
from cprd.qemu.qmp import Monitor, event_is, socket_path
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
        with interrupt.allowed():
            monitor = await Monitor.connect(qmp)
    except Nobody as error:
        _really_gone(qmp, error)
        return "no QEMU is there any more: the guest ended by itself"
    process = monitor.process
    try:
        if await monitor.status() in _OVER:
            await end(monitor, process)
            return "the guest had ended; its QEMU has quit"
    finally:
        await monitor.close()
    interrupt.check()
    if os.path.exists(down_marker):
        return f"the machine goes down for good; {await shut_down(qmp, powerdown, insist=True)}"
    try:
        with await connect(socket_path) as daemon:
            kept = await save(daemon, name, qmp, timeout=timeout)
        return f"held ({kept.status}, generation {kept.generation})"
    except (InDoubt, MonitorBusy):
        raise
    except CprdError as error:
        if interrupt.came():  # who asked for the end of this did not ask for that of the guest
            raise
        why = f"not saved: {' '.join(str(error).split())}"
    try:
        return f"{why}; {await shut_down(qmp, powerdown)}"
    except Failed as error:
        raise Failed(f"{why}; {error}") from None


def _really_gone(qmp: str, error: Nobody) -> None:
    """Nobody listens at the monitor's path. Raises Failed where that may be for another reason than
    the end of QEMU: the path is mistyped, or has been taken away."""
    place = os.path.dirname(os.path.abspath(socket_path(qmp)))
    if not os.path.isdir(place):
        raise Failed(f"{error} ({place} is no directory)")
    named = os.environ.get("MAINPID", "")
    if not named.isdigit() or int(named) in (0, os.getpid()):
        return
    main = Process.open(int(named))
    if main is None:
        return
    try:
        if not main.ended():
            raise Failed(
                f"{error}. The unit's main process (pid {main.pid}) lives: if that is the QEMU, its"
                " monitor is at another path"
            )
    finally:
        main.close()


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
    except Nobody as error:
        _really_gone(qmp, error)
        return "its QEMU has ended meanwhile"
    try:
        status = await monitor.status()
        if status == "postmigrate" and not insist:
            raise Failed(
                "its guest is stopped, whole, in its QEMU, which has handed it over (postmigrate):"
                " it cannot see a power button, and is left as it is"
            )
        if status in ("paused", "io-error", "watchdog", "suspended"):
            await monitor.execute("system_wakeup" if status == "suspended" else "cont")
        await monitor.execute("system_powerdown")
        if monitor.process is None:
            await monitor.event(event_is("SHUTDOWN"), timeout)
        elif not await _ends(monitor.process, timeout):
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


async def _ends(process: Process, timeout: float) -> bool:
    try:
        with interrupt.allowed():
            return await process.wait(timeout)
    except interrupt.Interrupted as error:
        raise Failed(
            f"{error}; the guest's power button was pressed, and it may shut down"
        ) from None

"""`cprctl qemu save`: a running QEMU's guest goes into a hold, and the QEMU quits.

The order, and the outcome of a failure (or kill -9 of this process) at each place:

    take cpr      guest runs                     -> guest runs on
    take main     guest stopped, QEMU waits      -> guest runs on (QEMU resumes by itself)
    prepare       kept, never served             -> guest runs on, after a second at most
                                                    (a kill leaves the hold in doubt)
    SHUT(0)       QEMU completes                 -> in doubt until QEMU is asked
    completed     QEMU can resume only by `cont` -> in doubt; postmigrate says that it is good
    commit        held, once this QEMU has ended -> held
    quit          nobody runs                    -> held

A signal (signals.py) is a failure like any other up to SHUT(0), and waits from there on.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from cprd.errors import CprdError
from cprd.linux.pause import point
from cprd.qemu import inventory, signals, stream
from cprd.qemu.disks import without_times
from cprd.qemu.doubt import make_room
from cprd.qemu.errors import Failed, InDoubt, MonitorLost, MonitorRefused, Refused
from cprd.qemu.examine import drift_of, examine
from cprd.qemu.handover import Handover, repeated, untouched
from cprd.qemu.hold import Origin, pack
from cprd.qemu.monitor import Monitor, socket_path
from cprd.qemu.private import PrivateDirectory
from cprd.qemu.process import command_line
from cprd.qemu.source import TIMEOUT, Source

if TYPE_CHECKING:
    from cprd import Daemon
    from cprd.qemu.disks import Drive
    from cprd.qemu.inventory import Inventory


class SaveResult(NamedTuple):
    """The full name of the hold, its generation, where cprd keeps it ("" when unknown), the guest's
    run state, and how the machine differs from the command line of its QEMU (the next COMMAND has
    to differ so, too)."""

    name: str
    generation: int
    kept: str
    status: str
    drift: tuple[str, ...] = ()


def save(
    daemon: Daemon, name: str, qmp: str, *, replace: bool = False, timeout: float = TIMEOUT
) -> SaveResult:
    """Take the guest of the QEMU at `qmp` into a hold. Blocks until the guest is held and QEMU is
    gone. `timeout`: seconds for each step of QEMU.

    Raises Refused or Failed (the guest is in its QEMU as before), InDoubt, MonitorBusy, Busy."""
    path = os.path.abspath(socket_path(qmp))
    return repeated(lambda: _save(daemon, name, path, replace, timeout))


def _save(daemon: Daemon, name: str, path: str, replace: bool, timeout: float) -> SaveResult:
    point("qemu-save:begin")
    with untouched():
        found = make_room(daemon, name, path, replace=replace)
        if found is not None:
            return SaveResult(name, found.generation, "", found.status)
        monitor = Monitor.connect(path)
    try:
        point("qemu-save:connected")
        if monitor.process is None:
            raise Refused(
                f"the process behind {path} cannot be seen (another pid namespace): run cprctl"
                " in the QEMU's own"
            )
        status = examine(monitor).refuse()
        seen = inventory.take(monitor, monitor.process.pid, plugged=True)
        drift = drift_of(monitor, seen)
        words = command_line(monitor.process.pid)
        seen.machine["command"] = inventory.made_by(seen.machine, drift, words)
        with untouched():
            signals.check()
        with PrivateDirectory(path) as directory:
            with Source(monitor, directory, timeout) as source:
                point("qemu-save:settings")
                saved = _hand_over(Handover(daemon, name, source), path, status, seen, replace)
                monitor.quit()  # it takes a while, in which all else is cleared away
        monitor.await_end()
        point("qemu-save:ended")
        if not monitor.process.ended():
            raise Failed(
                f"{name} is held, but its QEMU (pid {monitor.process.pid}) does not end, not even"
                " by SIGKILL; nothing is served before it does"
            )
        return saved._replace(drift=tuple(drift))
    finally:
        monitor.close()


def _hand_over(
    handover: Handover, path: str, status: str, seen: Inventory, replace: bool
) -> SaveResult:
    name, source = handover.name, handover.source
    try:
        signals.check()
        source.take_cpr()
        point("qemu-save:cpr")
        with signals.allowed():
            source.take_main()
            point("qemu-save:main")
        origin = Origin(
            version=source.monitor.version,
            qmp=path,
            status=source.run_state(status),
            machine=stream.machine(source.main),
            old=source.process.record(),
            uid=source.process.uid,
            boot=seen.boot,
            drives=_left(source, seen),
        )
        received = source.received
        state = pack(bytes(received.data), received.fds, source.main, origin, seen.machine)
        handover.prepare(state, "replace" if replace else "error")
        point("qemu-save:prepared")
        signals.hold_off()
        handover.complete()
    except InDoubt:
        raise
    except (CprdError, OSError) as error:
        if not handover.rescue():
            raise handover.take_back(error) from error
    point("qemu-save:completed")
    saved = handover.commit()
    point("qemu-save:committed")
    return SaveResult(name, saved.generation, saved.kept, origin.status)


def _left(source: Source, seen: Inventory) -> list[Drive]:
    """The drives as the guest left them; as they were before, for a QEMU that has ended."""
    try:
        return inventory.drives(source.monitor, source.process.pid)
    except (MonitorLost, MonitorRefused):
        return without_times(seen.drives)

"""`cprctl qemu stop`, for ExecStop=: the guest goes into a hold; when that makes no sense or fails,
the guest is shut down as by its power button, and waited for. A supervisor kills the rest
afterwards."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import cprd
from cprd.errors import CprdError, Unavailable
from cprd.linux import identity
from cprd.qemu import signals
from cprd.qemu.errors import Failed, InDoubt, MonitorBusy, NoListener, one_line
from cprd.qemu.monitor import Monitor, event_is, socket_path
from cprd.qemu.process import Process, guard_of
from cprd.qemu.signals import Deadline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_ENDED = ("shutdown", "guest-panicked", "internal-error")
_PASSED_ON = 5.0  # s for a guard to pass on QEMU's last words; nobody may read them
_RESTARTED = 3.0  # s for cprd's socket to come back: it may be restarted together with us


def stop(qmp: str, save: Callable[[], str], *, powerdown: float, down_marker: str) -> str:
    """Save, or shut the guest of the QEMU at `qmp` down. Returns a line for people. `save` puts the
    guest into a hold; `powerdown`: seconds for the guest to shut down; `down_marker`: a path that
    exists when the machine goes down for good. Raises when the guest neither is held nor has
    ended.

    The guard of the QEMU has ended as well: systemd refuses to start the next QEMU (SendSIGKILL=no)
    beside any process of the unit."""
    guards: list[Process] = []
    try:
        said = _stop(qmp, save, powerdown, down_marker, guards)
        for guard in guards:
            guard.wait(_PASSED_ON)
        return said
    finally:
        for guard in guards:
            guard.close()


def _stop(
    qmp: str,
    save: Callable[[], str],
    powerdown: float,
    down_marker: str,
    guards: list[Process],
) -> str:
    """As `stop`; the guard of the QEMU goes into `guards`, and is the caller's."""
    try:
        with _connected(qmp) as monitor:
            guard = guard_of(monitor.process) if monitor.process is not None else None
            if guard is not None:
                guards.append(guard)
            if monitor.status() in _ENDED:
                monitor.end()
                return "the guest had ended; its QEMU has quit"
    except NoListener as error:
        _check_end(qmp, error)
        return "no QEMU is there any more: the guest ended by itself"
    signals.check()
    if os.path.exists(down_marker):
        return f"the machine goes down for good; {_shut_down(qmp, powerdown, insist=True)}"
    try:
        return save()
    except (InDoubt, MonitorBusy):
        raise
    except CprdError as error:
        if signals.came():  # who asked for the end of this did not ask for that of the guest
            raise
        why = f"not saved: {one_line(error)}"
    try:
        return f"{why}; {_shut_down(qmp, powerdown)}"
    except Failed as error:
        raise Failed(f"{why}; {error}") from None


@contextmanager
def _connected(qmp: str) -> Iterator[Monitor]:
    """A power button is for every QEMU, also for a QEMU that has changed its user: root connects as
    root, and acts as that user while the monitor is open."""
    acting = os.geteuid()
    with signals.allowed():
        monitor = Monitor.connect(qmp, changed_user=True)
    try:
        yield monitor
    finally:
        monitor.close()
        if os.geteuid() != acting:
            identity.act_as_ourselves()


def connect(path: str) -> cprd.Daemon:
    """cprd.connect, for a while when nobody listens."""
    deadline = Deadline(_RESTARTED)
    while True:
        try:
            return cprd.connect(path)
        except Unavailable:
            if deadline.has_passed():
                raise
        signals.sleep(0.05)


def _check_end(qmp: str, error: NoListener) -> None:
    """Nobody listens at the monitor's path. Raises Failed where the reason may be another than the
    end of QEMU: the path is mistyped, or was removed."""
    directory = os.path.dirname(os.path.abspath(socket_path(qmp)))
    if not os.path.isdir(directory):
        raise Failed(f"{error} ({directory} is no directory)")
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


def _shut_down(qmp: str, timeout: float, *, insist: bool = False) -> str:
    """Press the power button, and wait for the end of QEMU. After `timeout` s: raises Failed, or
    (`insist`: the QEMU would be killed soon, its images left as they are) lets QEMU quit."""
    try:
        with _connected(qmp) as monitor:
            return _press(monitor, timeout, insist=insist)
    except NoListener as error:
        _check_end(qmp, error)
        return "its QEMU has ended meanwhile"


def _press(monitor: Monitor, timeout: float, *, insist: bool) -> str:
    status = monitor.status()
    if status == "postmigrate" and not insist:
        raise Failed(
            "its guest is stopped, whole, in its QEMU, which has handed it over (postmigrate):"
            " it cannot see a power button, and is left as it is"
        )
    if status in ("paused", "io-error", "watchdog", "suspended"):
        monitor.execute("system_wakeup" if status == "suspended" else "cont")
    monitor.execute("system_powerdown")
    if monitor.process is None:
        monitor.event(event_is("SHUTDOWN"), timeout)
    elif not _ends(monitor.process, timeout):
        if monitor.status() in _ENDED:
            monitor.end()
        elif insist:
            monitor.end()
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


def _ends(process: Process, timeout: float) -> bool:
    try:
        with signals.allowed():
            return process.wait(timeout)
    except signals.Interrupted as error:
        raise Failed(
            f"{error}; the guest's power button was pressed, and it may shut down"
        ) from None

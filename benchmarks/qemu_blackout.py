"""How long a guest stands still in a restart of its unit, against a unit without cprctl.

    .venv/bin/python benchmarks/qemu_blackout.py [--pairs N] [--machine TYPE] [--memory SIZE]

Ours: `cprctl qemu stop`, then `cprctl qemu start`; the blackout is STOP of the old QEMU to RESUME
of the new, by QEMU's clocks. The yardstick, by turns: a SIGTERM to the QEMU of the same command,
then that command again, to QMP's "running". No service manager: both would wait for the same one.

Exit status: 0 when the difference is within its bound, 1 when not.
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks.stage import private_cprd, qemu_options, verdict
from cprd.errors import CprdError
from cprd.qemu.monitor import Monitor, event_is
from tests.qemu.machine import Machine

BOUND = 60.0  # ms above the yardstick
POLL = 0.0005  # s
PHASES = [
    *("STOP to the end of the old QEMU", "to the end of `stop`", "to the exec of the new QEMU"),
    "to RESUME",
]


class Installed(Machine):
    """A VM whose cprctl is the installed program, as in a unit."""

    def argv(self, *words: str) -> list[str]:
        program = os.path.join(os.path.dirname(sys.executable), "cprctl")
        return [program, *words] if os.path.exists(program) else super().argv(*words)


def main() -> int:
    args = qemu_options(__doc__, pairs=9)
    ours: list[list[float]] = []
    plain: list[float] = []
    with private_cprd() as (socket, _), tempfile.TemporaryDirectory(prefix="cprd-vm.") as place:
        watch = f"{place}/watch"
        vm = Installed(
            Path(place),
            socket,
            *("-qmp", f"unix:{watch},server=on,wait=off"),
            machine=args.machine,
            memory=args.memory,
        )
        try:
            while len(ours) < args.pairs + 2:
                vm.start()
                vm.goes_on(5)
                mine = _restart(vm, watch)
                vm.goes_on(5)
                theirs = _plain(vm)
                _end(vm)
                if mine:
                    ours.append(mine)
                    plain.append(theirs)
        finally:
            vm.close()
    del ours[:2], plain[:2]  # to warm up
    for at, what in enumerate(PHASES):
        found = [row[at] for row in ours]
        print(f"{what}: median {statistics.median(found):.1f} ms ({min(found):.1f} at best)")
    whole = [sum(row) for row in ours]
    detail = ", ".join(
        f"{what} {statistics.median(found):.1f} ms ({min(found):.1f} to {max(found):.1f})"
        for what, found in (("blackout", whole), ("without cprctl", plain))
    )
    value = statistics.median(whole) - statistics.median(plain)
    return (
        0 if verdict("restart, blackout above a plain unit's", value, BOUND, " ms", detail) else 1
    )


def _restart(vm: Machine, watch: str) -> list[float]:
    """ms of each phase; [] when the machine was too busy to look in time."""
    old = vm.processes[-1]
    seen = Monitor.connect(watch)
    stop = subprocess.Popen(
        vm.argv("qemu", "stop", vm.name, "--qmp", vm.qmp),
        env=vm.env,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    stopped = seen.event(event_is("STOP"), 30)[2]
    old.wait()
    ended = time.time()
    assert stop.wait() == 0
    done = time.time()
    seen.close()
    vm.start()
    executed = _executed(vm.processes[-1].pid)
    new = _connect(watch)
    if new.status() == "running" and new.seen(event_is("RESUME")) is None:
        new.close()
        return []
    resumed = new.event(event_is("RESUME"), 30)[2]
    new.close()
    times = [stopped, ended, done, executed, resumed]
    return [(later - sooner) * 1e3 for sooner, later in itertools.pairwise(times)]


def _executed(pid: int) -> float:
    while b"-incoming" not in Path(f"/proc/{pid}/cmdline").read_bytes():
        time.sleep(POLL)
    return time.time()


def _connect(path: str) -> Monitor:
    while True:
        try:
            return Monitor.connect(path)
        except CprdError:
            time.sleep(POLL)


def _plain(vm: Machine) -> float:
    """ms from SIGTERM to the next one running."""
    old = vm.processes[-1]
    vm.log.unlink()
    begun = time.perf_counter()
    old.terminate()
    old.wait()
    vm.processes.append(
        subprocess.Popen(vm.command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    )
    monitor = _connect(vm.qmp)
    while monitor.status() != "running":
        time.sleep(POLL)
    took = (time.perf_counter() - begun) * 1e3
    monitor.close()
    return took


def _end(vm: Machine) -> None:
    vm.processes[-1].kill()
    vm.processes[-1].wait()
    vm.log.unlink(missing_ok=True)
    for name in ("qmp", "watch"):
        (vm.place / name).unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())

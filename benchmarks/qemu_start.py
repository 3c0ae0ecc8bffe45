"""What `cprctl qemu start` costs, against the same command's cold start.

    .venv/bin/python benchmarks/qemu_start.py [--pairs N] [--machine TYPE] [--memory SIZE]

    exec    from the exec of QEMU to the guest running, against cold from exec to QMP "running"
    whole   from the exec of cprctl to the guest running, against the same cold start

Exit status: 0 when every figure is within its bound, 1 when not.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks.qemu_blackout import Installed
from benchmarks.stage import private_cprd, qemu_options, verdict
from tests.qemu.machine import Machine

EXEC = 10.0  # ms above cold
WHOLE = 60.0  # ms above cold
POLL = 0.0002  # s


def main() -> int:
    args = qemu_options(__doc__, pairs=9)
    cold: list[float] = []
    execs: list[float] = []
    wholes: list[float] = []
    with private_cprd() as (socket, _), tempfile.TemporaryDirectory(prefix="cprd-vm.") as place:
        vm = Installed(Path(place), socket, machine=args.machine, memory=args.memory)
        try:
            for turn in range(args.pairs + 2):
                took = _cold(vm)
                vm.goes_on(5)
                saved = vm.save()
                assert saved.returncode == 0, saved.stderr
                from_exec, whole = _warm(vm)
                vm.goes_on(5)
                _end(vm)
                if turn >= 2:
                    cold.append(took)
                    execs.append(from_exec)
                    wholes.append(whole)
        finally:
            vm.close()
    base = statistics.median(cold)
    good = True
    for what, found, bound in (("exec", execs, EXEC), ("whole", wholes, WHOLE)):
        value = statistics.median(found)
        detail = f"median {value:.1f} ms ({min(found):.1f} to {max(found):.1f}), cold {base:.1f} ms"
        good &= verdict(f"start, {what}, above cold", value - base, bound, " ms", detail)
    return 0 if good else 1


def _cold(vm: Machine) -> float:
    """ms from the exec of QEMU to QMP's "running"."""
    if vm.log.exists():
        vm.log.unlink()
    begun = time.perf_counter()
    vm.processes.append(
        subprocess.Popen(vm.command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    )
    while not os.path.exists(vm.qmp):
        time.sleep(POLL)
    while vm._status() != "running":
        time.sleep(POLL)
    return (time.perf_counter() - begun) * 1e3


def _warm(vm: Machine) -> tuple[float, float]:
    """ms from the exec of QEMU, and from that of cprctl, until the helper has seen it run."""
    log = vm.place / "points"
    log.unlink(missing_ok=True)
    begun = time.perf_counter()
    vm.start(env={"CPRD_PAUSE_LOG": str(log)})
    executed = _await(log, b"qemu-start:exec\n")
    running = _await(log, b"qemu-start:running\n")
    return (running - executed) * 1e3, (running - begun) * 1e3


def _await(log: Path, line: bytes) -> float:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if log.exists() and line in log.read_bytes():
            return time.perf_counter()
        time.sleep(POLL)
    raise SystemExit(f"never {line!r}")


def _end(vm: Machine) -> None:
    for process in vm.processes:
        process.kill()
        process.wait()
    vm.processes.clear()
    Path(vm.qmp).unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())

"""How long a guest stands still in `cprctl qemu upgrade`, against QEMU's own cpr-transfer.

    .venv/bin/python benchmarks/qemu_upgrade.py [--pairs N] [--machine TYPE] [--memory SIZE]

Both by QEMU's clocks: STOP of the old to RESUME of the new. The yardstick: the new QEMU waits
already, old and new speak with each other directly, with the return path. Three runs of so many
pairs; the ratio is the median of the three.

Exit status: 0 when the ratio is within its bound, 1 when not.
"""

from __future__ import annotations

import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks.stage import private_cprd, qemu_options, verdict
from cprd.qemu.monitor import Monitor, event_is, migration_is
from cprd.qemu.source import Settings
from tests.qemu.machine import Machine

RATIO = 1.3
RUNS = 3


def main() -> int:
    args = qemu_options(__doc__, pairs=15)
    ratios, details = [], []
    for _ in range(RUNS):
        ours, plain = _run(args.pairs, args.machine, args.memory)
        ratios.append(statistics.median(ours) / statistics.median(plain))
        details.append(
            f"x {ratios[-1]:.2f}: "
            + ", ".join(
                f"{what} {statistics.median(found):.2f} ms ({min(found):.2f} to {max(found):.2f})"
                for what, found in (("cprctl", ours), ("QEMU to QEMU", plain))
            )
        )
    ratio = statistics.median(ratios)
    what = "upgrade, the guest's pause, against plain"
    return 0 if verdict(what, ratio, RATIO, "", "; ".join(details)) else 1


def _run(pairs: int, machine: str, memory: str) -> tuple[list[float], list[float]]:
    """The pauses of a new VM's upgrades in ms: (ours, plain)."""
    ours: list[float] = []
    plain: list[float] = []
    with private_cprd() as (path, _), tempfile.TemporaryDirectory(prefix="cprd-vm.") as place:
        vm = Machine(Path(place), path, machine=machine, memory=memory)
        try:
            vm.start()
            vm.goes_on()
            for turn in range(pairs + 2):
                mine = _upgrade(vm)
                vm.goes_on(5)
                theirs = _plain(vm)
                vm.goes_on(5)
                if turn >= 2:
                    ours.append(mine)
                    plain.append(theirs)
        finally:
            vm.close()
    return ours, plain


def _upgrade(vm: Machine) -> float:
    done = vm.upgrade(vm.qmp, vm.command)
    assert done.returncode == 0, done.stderr
    found = re.search(r"([0-9.]+) ms", done.stdout)
    assert found, done.stdout
    return float(found[1])


def _plain(vm: Machine) -> float:
    """ms; afterwards the new QEMU is the VM's only one, at the same monitor path."""
    cpr, main, qmp = (str(vm.place / name) for name in ("cpr", "main", "qmp-next"))
    ours, theirs = socket.socketpair()
    words = [word.replace(f"unix:{vm.qmp},", f"unix:{qmp},") for word in vm.command]
    words += ["-chardev", f"socket,id=bench,fd={theirs.fileno()}", "-mon", "bench,mode=control"]
    for kind, path in (("main", main), ("cpr", cpr)):
        addr = {"transport": "socket", "type": "unix", "path": path}
        words += ["-incoming", json.dumps({"channel-type": kind, "addr": addr})]
    process = subprocess.Popen(
        words, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    vm.processes.append(process)
    theirs.close()
    ours.sendall(b'{"execute":"qmp_capabilities"}')
    while not os.path.exists(cpr):
        time.sleep(0.001)
    time.sleep(0.05)  # it waits already

    old = Monitor.connect(vm.qmp)
    Settings.prepare(old)
    old.forget_events()
    unix = {"transport": "socket", "type": "unix"}
    channels = [
        {"channel-type": kind, "addr": {**unix, "path": path}}
        for kind, path in (("main", main), ("cpr", cpr))
    ]
    old.execute("migrate", channels=channels)
    old.event(migration_is("completed"), 10.0)
    stopped = old.event(event_is("STOP"), 10.0)[2]
    old.execute("quit")
    old.close()
    resumed = _time_of(ours, "RESUME")
    ours.close()
    vm.until(lambda: len(vm.alive()) == 1, "the old QEMU's end")
    os.rename(qmp, vm.qmp)
    return (resumed - stopped) * 1e3


def _time_of(sock: socket.socket, name: str) -> float:
    """Of an event, by QEMU's clock."""
    sock.settimeout(10)
    file = sock.makefile("rb")
    for line in file:
        message: dict[str, Any] = json.loads(line)
        if message.get("event") == name:
            at = message["timestamp"]
            return float(at["seconds"] + at["microseconds"] / 1e6)
    raise SystemExit(f"no {name}")


if __name__ == "__main__":
    sys.exit(main())

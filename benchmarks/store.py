"""What it costs that a hold outlives cprd, on a real systemd.

    .venv/bin/python benchmarks/store.py [--pairs N]

    memory      save of 100 descriptors answered "kept in the store", against the same in a cprd
                whose manager has no store, wall clock
    fdstore     the same save against putting the 100 into the store themselves: one datagram each
                (within one neither order nor identity lasts), then a barrier, wall clock

The three by turns, ten of each in a turn (a single one after a pause measures how fast the machine
wakes up). Exit status: 0 when both figures are within their bounds, 1 when not.
Wants root; boots a systemd of its own, as tests/systemd does.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import cprd
from benchmarks.stage import verdict
from tests.systemd import boot
from tests.systemd.machine import TREE, Machine
from tests.systemd.ours import install

COUNT = 100
TURN = 10
MEMORY = "/run/cprd-memory/cprd.sock"

FDSTORE = f"""
import os, sys, time
from cprd.systemd import fdstore, notify
manager = notify.Manager.from_environment(os.environ)
notify.drive(manager.tell(notify.READY), 10)
fds = [os.eventfd(0) for _ in range({COUNT})]
with open("/run/boot/go") as go, open("/run/boot/took", "w") as took:
    for _ in go:
        start = time.perf_counter()
        for number, fd in enumerate(fds):
            notify.drive(fdstore.store(manager, f"n{{number}}", fd))
        notify.drive(manager.barrier())
        print(time.perf_counter() - start, file=took, flush=True)
        for number in range(len(fds)):
            notify.drive(fdstore.remove(manager, f"n{{number}}"))
        notify.drive(manager.barrier())
        print("removed", file=took, flush=True)
"""


def saves(daemon: cprd.Daemon, state: cprd.State, kept: str) -> float:
    """Seconds that a save takes; what it made is dropped again, uncounted."""
    took = []
    for _ in range(TURN):
        start = time.perf_counter()
        saved = daemon.save("bench", state)
        took.append(time.perf_counter() - start)
        assert saved.kept == kept, saved
        daemon.drop("bench")
    return statistics.median(took)


def measure(machine: Machine, count: int) -> list[tuple[float, float, float]]:
    """`count` rounds of (store, memory, FDSTORE), in seconds."""
    root = machine.root
    install(machine)
    machine.unit(
        "cprd-memory.service",
        (machine.units / "cprd.service")
        .read_text()
        .replace("FileDescriptorStoreMax=4096", "FileDescriptorStoreMax=0")
        .replace("Requires=cprd.socket\n", "")
        .replace("RuntimeDirectory=cprd\n", "RuntimeDirectory=cprd-memory\n")
        .replace("ExecStart=cprd\n", f"ExecStart=cprd --socket {MEMORY}\n"),
    )
    (root / "run/boot/fdstore.py").write_text(FDSTORE)
    os.mkfifo(root / "run/boot/go")
    os.mkfifo(root / "run/boot/took")
    machine.unit(
        "fdstore.service",
        "[Service]\nType=notify\nNotifyAccess=main\nFileDescriptorStoreMax=200\n"
        "ExecStart=test-python /run/boot/fdstore.py\n",
    )
    machine.systemctl("start", "cprd.socket", "cprd.service", "cprd-memory.service")
    machine.systemctl("start", "fdstore.service")
    state = cprd.State()
    for number in range(COUNT):
        state.save_fd("conn", number, os.eventfd(0))
    with contextlib.ExitStack() as stack:
        stored = stack.enter_context(cprd.connect(root / "run/cprd/cprd.sock"))
        memory = stack.enter_context(cprd.connect(str(root) + MEMORY))
        go = stack.enter_context(open(root / "run/boot/go", "w"))
        took = stack.enter_context(open(root / "run/boot/took"))

        def fdstore() -> float:
            seconds = []
            for _ in range(TURN):
                print("go", file=go, flush=True)
                seconds.append(float(took.readline()))
                assert took.readline() == "removed\n"
            return statistics.median(seconds)

        def one_round() -> tuple[float, float, float]:
            return saves(stored, state, "store"), saves(memory, state, "memory"), fdstore()

        one_round()  # to warm up
        return [one_round() for _ in range(count)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=40, metavar="N", help="rounds (40)")
    options = parser.parse_args()
    lacking = boot.missing(TREE)
    if lacking:
        print(f"store.py: a real systemd needs {'; '.join(lacking)}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="cprd-bench.") as scratch:
        with Machine(Path(scratch)) as machine:
            rounds = measure(machine, options.pairs)
            version = machine.version
    stored, memory, fdstore = (statistics.median(column) for column in zip(*rounds, strict=True))
    where = f"systemd {version}, {COUNT} descriptors, medians of {len(rounds)}"
    mine = f"store {stored * 1e6:.0f} us"
    good = [
        verdict("memory", stored / memory, 1.3, "x", f"{mine}, memory {memory * 1e6:.0f} us"),
        verdict("fdstore", stored / fdstore, 0.1, "x", f"{mine}, FDSTORE {fdstore * 1e6:.0f} us"),
    ]
    print(where)
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())

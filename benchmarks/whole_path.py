"""A whole restart of a server with 10,000 descriptors, against passing them in C.

    .venv/bin/python benchmarks/whole_path.py [--pairs N]

From a dict of ids to descriptors in the old process to the same dict in a successor that comes
afterwards: build a State, save, load, take all, confirm. By bulk verbs, by single verbs, and save
and load alone. The yardstick is direct_pass.c: two live processes, an array to an array, nobody
holding the descriptors in between. Beside that, what each step takes: wall clock, and CPU time of
the process that does the step.

"no logic" is the path of bulk verbs on a daemon that makes cprd's system calls and nothing else
(bare_daemon.py): what is left when cprd itself costs nothing. "bare Python" is what remains of the
path without cprd: the same messages from the old process to the successor, in the fewest calls,
with nobody holding, nothing checked, and no error told.

Exit status: 0 when every figure is within its bound, 1 when not.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from _socket import SocketType, socketpair
from array import array
from collections.abc import Sequence

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import cprd
from benchmarks.handover import MANY, floor_program
from benchmarks.stage import bare_daemon, private_cprd, verdict
from cprd.linux.nofile import raise_soft_limit
from cprd.linux.rights import SCM_MAX_FD

BARE = "bare Python"
NO_LOGIC = "no logic"
WARM_UP = 3
PATH = ("build", "save", "load", "take")  # steps of the whole path; confirm comes after
Steps = dict[str, tuple[float, float]]  # seconds: on the wall, and of CPU time


def bulk_build(fds: dict[int, int]) -> cprd.State:
    state = cprd.State()
    state.save_fds("client", fds)
    return state


def bulk_take(state: cprd.State) -> dict[int, int]:
    return state.take_fds("client")


def single_build(fds: dict[int, int]) -> cprd.State:
    state = cprd.State()
    save = state.save_fd
    for id, fd in fds.items():
        save("client", id, fd)
    return state


def single_take(state: cprd.State) -> dict[int, int]:
    take = state.take_fd
    return {id: take("client", id) for id in range(MANY)}


def bare_build(fds: dict[int, int]) -> tuple[bytes, bytes]:
    return struct.pack(f"{MANY}i", *fds), struct.pack(f"{MANY}i", *fds.values())


def bare_save(ids: bytes, numbers: bytes, channel: socket.socket) -> list[SocketType]:
    """Returns the sockets that are to be closed once the successor has all."""
    manifest, made, roots = os.memfd_create("manifest"), list[SocketType](), array("i")
    os.write(manifest, ids + b"client\0" * MANY)
    fds = array("i", [manifest]) + array("i", numbers)
    for start in range(0, len(fds), SCM_MAX_FD):
        made += (pair := socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, fds[start : start + SCM_MAX_FD])
        pair[0].sendmsg([bytes(32)], [rights])
        roots.append(pair[1].fileno())
    channel.sendmsg([bytes(32)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, roots)])
    os.close(manifest)
    return made


def bare_load(channel: socket.socket) -> tuple[bytes, array[int]]:
    roots, fds = array("i"), array("i")
    space = socket.CMSG_SPACE(SCM_MAX_FD * 4)
    roots.frombytes(channel.recvmsg(32, space, socket.MSG_CMSG_CLOEXEC)[1][0][2])
    for fd in roots:
        leaf = SocketType(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=fd)
        flags = socket.MSG_PEEK | socket.MSG_CMSG_CLOEXEC
        fds.frombytes(leaf.recvmsg(32, space, flags)[1][0][2])
        leaf.close()
    return os.pread(fds[0], MANY * 4, 0), fds


def bare_take(ids: bytes, fds: array[int]) -> dict[int, int]:
    return dict(zip(memoryview(ids).cast("i"), memoryview(fds)[1:]))  # noqa: B905


def bare_succeed(channel: socket.socket) -> None:
    raise_soft_limit()
    print("ready", flush=True)
    sys.stdin.readline()
    times = [*clocks()]
    came = bare_load(channel)
    times += clocks()
    found = bare_take(*came)
    times += clocks()
    if list(found) != list(range(MANY)):
        raise SystemExit("descriptors are missing")
    print(*times, flush=True)


def bare_restart(fds: dict[int, int]) -> Steps:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, successor_of("--bare", str(theirs.fileno()), keep=theirs) as successor:
        times = [*clocks()]
        columns = bare_build(fds)
        times += clocks()
        made = bare_save(*columns, ours)
        times += clocks()
        answer, _ = successor.communicate("go\n")
        for each in made:
            each.close()
    return all_steps(times, answer, ("load", "take"))


KINDS = {
    "bulk verbs": (bulk_build, bulk_take),
    "single verbs": (single_build, single_take),
    NO_LOGIC: (bulk_build, bulk_take),
}


def clocks() -> tuple[float, float]:
    return time.monotonic(), time.process_time()


def succeed(path: str, kind: str) -> None:
    """What the process does that comes afterwards: connected, it waits for the word, and writes
    its clocks when it began, had loaded, had taken all, had confirmed."""
    raise_soft_limit()
    _, take = KINDS[kind]
    with cprd.connect(path) as daemon:
        print("ready", flush=True)
        sys.stdin.readline()
        times = [*clocks()]
        with daemon.load("bench") as claim:
            times += clocks()
            found = take(claim.state)
            times += clocks()
            claim.confirm()
            times += clocks()
    if list(found) != list(range(MANY)) or len(set(found.values())) != MANY:
        raise SystemExit("descriptors are missing")
    print(*times, flush=True)


def restart(path: str, daemon: cprd.Daemon, fds: dict[int, int], kind: str) -> Steps:
    """Seconds of each step. The time between save and load is no part of them: a restart has it
    whatever hands the state over. The successor is a program of its own: a forked one would share
    memory with the old process, which makes both slower."""
    build, _ = KINDS[kind]
    with successor_of("--succeed", path, kind) as successor:
        times = [*clocks()]
        state = build(fds)
        times += clocks()
        daemon.save("bench", state)
        times += clocks()
        answer, _ = successor.communicate("go\n")
    return all_steps(times, answer, ("load", "take", "confirm"))


def successor_of(*arguments: str, keep: socket.socket | None = None) -> subprocess.Popen[str]:
    successor = subprocess.Popen(
        [sys.executable, __file__, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=[] if keep is None else [keep.fileno()],
    )
    assert successor.stdout is not None
    if successor.stdout.readline() != "ready\n":
        raise SystemExit("the successor did not start")
    return successor


def all_steps(times: list[float], answer: str, names: tuple[str, ...]) -> Steps:
    later = [float(each) for each in answer.split()]
    return {**steps(times, ("build", "save")), **steps(later, names)}


def steps(times: list[float], names: tuple[str, ...]) -> Steps:
    """What each step took, of two clocks in turn before the first step and after each."""
    return {
        name: (times[2 * at + 2] - times[2 * at], times[2 * at + 3] - times[2 * at + 1])
        for at, name in enumerate(names)
    }


def floor(program: str) -> float:
    done = subprocess.run([program, str(MANY)], check=True, capture_output=True, text=True)
    return int(done.stdout) / 1e9


def spread(values: Sequence[float]) -> str:
    """Median, and the middle half, in milliseconds."""
    low, middle, high = statistics.quantiles([value * 1e3 for value in values], n=4)
    return f"{middle:.2f} ms ({low:.2f} to {high:.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=21, metavar="N", help="at least 9")
    parser.add_argument("--succeed", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--bare", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare is not None:
        bare_succeed(socket.socket(fileno=options.bare))
        return 0
    if options.succeed:
        succeed(*options.succeed)
        return 0
    pairs = options.pairs
    if pairs < 9:
        parser.error("at least 9 pairs")
    _, hard = raise_soft_limit()
    if hard < MANY + 500:
        raise SystemExit(f"wants a hard limit of {MANY + 500} descriptors (ulimit -Hn): is {hard}")
    measured: dict[str, list[Steps]] = {kind: [] for kind in (*KINDS, BARE)}
    floors: list[float] = []
    with (
        tempfile.TemporaryDirectory() as place,
        private_cprd() as (path, _),
        bare_daemon() as (bare_path, _),
    ):
        program = floor_program(place)
        fds = {id: os.eventfd(0) for id in range(MANY)}
        with cprd.connect(path) as daemon, cprd.connect(bare_path) as bare:
            for number in range(WARM_UP + pairs):
                for kind in measured:
                    if kind == BARE:
                        each = bare_restart(fds)
                    elif kind == NO_LOGIC:
                        each = restart(bare_path, bare, fds, kind)
                    else:
                        each = restart(path, daemon, fds, kind)
                    measured[kind] += [each] if number >= WARM_UP else []
                floors += [floor(program)] if number >= WARM_UP else []
        for fd in fds.values():
            os.close(fd)
    yardstick = statistics.median(floors)
    print(f"C floor: {spread(floors)}")
    good = True
    bounds = {"bulk verbs": (4.0, 3.0), "single verbs": (10.0, math.inf)}
    for kind, each_step in measured.items():
        whole_bound, part_bound = bounds.get(kind, (math.inf, math.inf))
        for step in each_step[0]:
            wall, used = zip(*(each[step] for each in each_step), strict=True)
            print(f"{kind}, {step}: {spread(wall)}; CPU {spread(used)}")
        whole = [sum(each[step][0] for step in PATH) for each in each_step]
        value = statistics.median(whole) / yardstick
        good &= verdict(f"whole path, {kind} / C floor", value, whole_bound, "", spread(whole))
        both = [each["save"][0] + each["load"][0] for each in each_step]
        value = statistics.median(both) / yardstick
        what = f"save and load alone, {kind} / C floor"
        good &= verdict(what, value, part_bound, "", spread(both))
    mine, theirs = (
        [sum(each[step][1] for step in PATH) for each in measured[kind]]
        for kind in ("bulk verbs", BARE)
    )
    value = statistics.median(mine) / statistics.median(theirs)
    detail = f"{spread(mine)} against {spread(theirs)}"
    good &= verdict("CPU time of both processes / bare Python", value, math.inf, "", detail)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

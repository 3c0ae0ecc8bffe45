"""What a change of a live hold costs, against s6-fdholderd (C) in the same run.

    .venv/bin/python benchmarks/live.py [--rounds N] [FIGURE ...]

    few         a life (save_fd and delete_fd) with 10 kept, over s6's store and retrieve-and-delete
    many        the same with 9,000 kept; save_fd alone over store alone, median and mean; and of a
                descriptor that comes as a number, which Python's fstat makes dearer (no bar)
    section     a section of 100 bytes over save_fd
    takeover    of 9,000 keys: what was left is read, and a new root written; in flight at the peak
    death       1,000 connections: kill -9 of the owner to the first answer of a successor that
                waits, beyond the same after a polite end (close(), and the end of the process)
    fdstore     1,000 kept: save_fd over one descriptor into systemd's store, with a barrier

All by turns: 200 lives in a turn. What is kept is a TCP socket, here as there. Wants
ulimit -Hn >= 12000; without the Debian packages s6, libs6-dev, skalibs-dev and a C compiler the
figures that compare with s6 are left out, and said so.
fdstore wants root, and boots a systemd of its own, as tests/systemd does.
Exit status: 0 when every figure is within its bound, 1 when not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import selectors
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import cprd
from benchmarks.stage import private_cprd, verdict
from cprd.linux.rights import close_all, scm_fds
from cprd.live.owner import Owner
from cprd.live.queue import make_pair
from cprd.live.reader import read
from cprd.live.takeover import take_over

HERE = Path(__file__).parent
TURN = 200  # lives
FIGURES = ("few", "many", "section", "takeover", "death", "fdstore")
CONNECTIONS = 1000
Lives = list[tuple[float, float]]
"""Microseconds: of keeping, of letting go."""


class Yardstick:
    """A private s6-fdholderd, and its client, with so many kept."""

    def __init__(self, place: Path, kept: int) -> None:
        rules = place / "rules"
        (rules / "uid/default/env").mkdir(parents=True)
        (rules / "gid").mkdir()
        (rules / "uid/default/allow").touch()
        for name in ("STORE", "RETRIEVE"):
            (rules / f"uid/default/env/S6_FDHOLDER_{name}_REGEX").write_text(".*\n")
        command = [
            "s6-fdholder-daemon",
            "-1",
            "-c",
            "64",
            "-n",
            "12000",
            "-i",
            str(rules),
            f"{place}/s",
        ]
        self.daemon = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert self.daemon.stdout is not None
        self.daemon.stdout.readline()  # it is ready
        self.client = subprocess.Popen(
            [place / "s6life", place / "s", str(kept)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def lives(self, count: int) -> Lives:
        assert self.client.stdin is not None
        assert self.client.stdout is not None
        print(count, file=self.client.stdin, flush=True)
        found = []
        while line := self.client.stdout.readline().strip():
            stored, ended = line.split()
            found.append((float(stored), float(ended)))
        return found

    def end(self) -> None:
        self.client.stdin.close()  # type: ignore[union-attr]
        self.client.wait()
        self.daemon.terminate()
        self.daemon.wait()


@contextlib.contextmanager
def yardstick(kept: int) -> Iterator[Yardstick | None]:
    """None, with words, where it cannot be had."""
    with tempfile.TemporaryDirectory(prefix="cprd-bench.") as name:
        place = Path(name)
        build: list[str | Path] = [
            "cc",
            "-O2",
            "-o",
            place / "s6life",
            HERE / "s6life.c",
            "-ls6",
            "-lskarnet",
        ]
        missing = shutil.which("s6-fdholder-daemon") is None or shutil.which("cc") is None
        if missing or subprocess.run(build, stderr=subprocess.DEVNULL, check=False).returncode:
            print("not compared with s6-fdholderd: install s6, libs6-dev, skalibs-dev and gcc")
            yield None
            return
        stick = Yardstick(place, kept)
        try:
            yield stick
        finally:
            stick.end()


class Ours:
    """A live hold with so many kept, of one owner: this process."""

    def __init__(self, kept: int) -> None:
        tx, rx = make_pair()
        self.root = os.dup(rx.fileno())
        self.owner = Owner(tx, rx, 1)
        self.sock = socket.socket()
        self.ids = list(range(kept))
        self.next = kept
        for id in self.ids:
            self.owner.save_fd("client", id, self.sock)

    def lives(self, count: int, by_number: bool = False) -> Lives:
        found = []
        thing = self.sock.fileno() if by_number else self.sock
        save, delete, clock = self.owner.save_fd, self.owner.delete_fd, time.perf_counter
        for _ in range(count):
            at = random.randrange(len(self.ids))
            begin = clock()
            save("client", self.next, thing)
            saved = clock()
            delete("client", self.ids[at])
            ended = clock()
            self.ids[at] = self.next
            self.next += 1
            found.append(((saved - begin) * 1e6, (ended - saved) * 1e6))
        return found

    def sections(self, count: int) -> list[float]:
        value = b"x" * 100
        found = []
        for number in range(count):
            key = f"section{number % 2000}"
            begin = time.perf_counter()
            self.owner.save_section(key, value)
            found.append((time.perf_counter() - begin) * 1e6)
        return found

    def close(self) -> None:
        self.owner.close()
        self.sock.close()
        close_all([self.root])


def compare(kept: int, bound: float, rounds: int) -> list[bool]:
    """Lives with so many kept, by turns."""
    ours = Ours(kept)
    with yardstick(kept) as stick:
        mine: Lives = []
        theirs: Lives = []
        numbers: Lives = []
        ours.lives(10 * TURN)  # to warm up
        for _ in range(rounds):
            mine += ours.lives(TURN)
            numbers += ours.lives(TURN, by_number=True)
            theirs += stick.lives(TURN) if stick is not None else []
    ours.close()
    saves, deletes = zip(*mine, strict=True)
    words = (
        f"save_fd mean {statistics.mean(saves):.1f} median {statistics.median(saves):.1f} us,"
        f" delete_fd mean {statistics.mean(deletes):.1f} median {statistics.median(deletes):.1f} us"
    )
    if not theirs:
        print(f"{kept} kept: {words}")
        return []
    stores, retrieves = zip(*theirs, strict=True)
    words += (
        f"; store mean {statistics.mean(stores):.1f} median {statistics.median(stores):.1f} us,"
        f" retrieve-and-delete mean {statistics.mean(retrieves):.1f} us"
    )
    life = statistics.median(sum(pair) for pair in mine)
    their_life = statistics.median(sum(pair) for pair in theirs)
    mean = statistics.mean(saves) + statistics.mean(deletes)
    their_mean = statistics.mean(stores) + statistics.mean(retrieves)
    good = [verdict(f"a life, {kept} kept, means", mean / their_mean, bound, " x", words)]
    good.append(
        verdict(f"a life, {kept} kept, medians", life / their_life, bound, " x", f"{life:.1f} us")
    )
    if kept > 1000:
        median = statistics.median(saves) / statistics.median(stores)
        average = statistics.mean(saves) / statistics.mean(stores)
        number = statistics.median([save for save, _ in numbers]) / statistics.median(stores)
        words = f"over s6's store; of a number {number:.2f} x"
        good.append(verdict("save_fd, median", median, 0.8, " x", words))
        good.append(verdict("save_fd, mean", average, 1.3, " x", "over s6's store"))
    return good


def sections(rounds: int) -> bool:
    ours = Ours(1000)
    ours.sections(4000)
    kept: list[float] = []
    saved: list[float] = []
    for _ in range(rounds):
        kept += ours.sections(TURN)
        saved += [save for save, _ in ours.lives(TURN)]
    ours.close()
    ratio = statistics.mean(kept) / statistics.mean(saved)
    words = (
        f"section mean {statistics.mean(kept):.1f} median {statistics.median(kept):.1f} us;"
        f" save_fd mean {statistics.mean(saved):.1f} median {statistics.median(saved):.1f} us"
    )
    return verdict("a section of 100 bytes over save_fd", ratio, 1.0, " x", words)


def takeovers(rounds: int) -> list[bool]:
    took = []
    peak = 0.0
    for _ in range(rounds):
        ours = Ours(9000)
        ours.lives(1000)
        ours.owner.close()
        begin = time.perf_counter()
        found = read(ours.root)
        tx, rx = make_pair()
        new = os.dup(rx.fileno())
        owner = take_over(found, tx, rx)
        took.append((time.perf_counter() - begin) * 1e3)
        parked = scm_fds(ours.root) + scm_fds(new)
        for segment in owner._ledger.pool.segments.values():
            parked += scm_fds(segment.rx.fileno())
        peak = max(peak, parked / 9000)
        owner.close()
        found.state.close()
        close_all([new])
        ours.close()
    words = f"of {rounds}: read, and a new root written; best {min(took):.1f} ms"
    return [
        verdict("take-over of 9,000 keys", statistics.median(took), 100, " ms", words),
        verdict("in flight at its peak", peak, 1.15, " a key", "old root and new root together"),
    ]


def serve(path: str) -> None:
    """A server of echoes: says its port, or "claimed"; ends politely when told to."""
    with selectors.DefaultSelector() as selector:
        state = cprd.live("bench", path, wait=600)
        clients = state.take_sockets("client", socket.AF_INET, socket.SOCK_STREAM)
        state.confirm()
        if not state.found:
            with socket.create_server(("127.0.0.1", 0), backlog=CONNECTIONS) as listener:
                print(listener.getsockname()[1], flush=True)
                clients = {id: listener.accept()[0] for id in range(CONNECTIONS)}
            state.save_fds("client", clients)
            print("accepted", flush=True)
        for client in clients.values():
            selector.register(client, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if isinstance(key.fileobj, socket.socket):
                    key.fileobj.send(key.fileobj.recv(100))
                else:
                    state.close()
                    os._exit(0)


class Server:
    """One server, which serves or waits for its turn."""

    def __init__(self, path: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()


def deaths(rounds: int) -> list[bool]:
    """The first answer after a death, and after a polite end, by turns."""
    took: dict[str, list[float]] = {"kill": [], "end": []}
    with private_cprd() as (path, _), contextlib.ExitStack() as stack:
        server = Server(path)
        address = ("127.0.0.1", int(server.hear()))
        clients = [
            stack.enter_context(socket.create_connection(address)) for _ in range(CONNECTIONS)
        ]
        assert server.hear() == "accepted"
        for number in range(2 * rounds):
            following = Server(path)
            with cprd.connect(path) as daemon:
                before = daemon.status()["connections"]
                while daemon.status()["connections"] == before:
                    time.sleep(0.01)
            time.sleep(0.1)  # it waits by now
            how = ("kill", "end")[number % 2]
            client = random.choice(clients)
            begin = time.perf_counter()
            server.kill() if how == "kill" else server.end()
            client.send(b"x")
            answer = client.recv(1)
            took[how].append((time.perf_counter() - begin) * 1e3)
            assert answer == b"x"
            server.process.wait()
            server = following
        server.kill()
        server.process.wait()
    killed, ended = (statistics.median(took[how]) for how in ("kill", "end"))
    words = f"kill -9 {killed:.1f} ms, polite {ended:.1f} ms, medians of {rounds}"
    return [
        verdict("death to the first answer, over a polite end", killed - ended, 10, " ms", words)
    ]


FDSTORE = f"""
import os, time
from cprd.live.owner import Owner
from cprd.live.queue import make_pair
from cprd.systemd import fdstore, notify
manager = notify.Manager.from_environment(os.environ)
notify.drive(manager.tell(notify.READY), 10)
owner = Owner(*make_pair(), 1)
fds = [os.eventfd(0) for _ in range({CONNECTIONS} + {TURN})]  # the manager ignores what it has
number = 0
for fd in fds[{TURN}:]:
    notify.drive(fdstore.store(manager, "kept", fd))
    owner.save_fd("kept", fd, fd)
notify.drive(manager.barrier())
fds = fds[:{TURN}]
with open("/run/boot/go") as go, open("/run/boot/took", "w") as took:
    for _ in go:
        store, save = [], []
        for fd in fds:
            begin = time.perf_counter()
            notify.drive(fdstore.store(manager, "bench", fd))
            notify.drive(manager.barrier())
            store.append(time.perf_counter() - begin)
        for number, fd in enumerate(fds, number):
            begin = time.perf_counter()
            owner.save_fd("bench", number, fd)
            save.append(time.perf_counter() - begin)
        notify.drive(fdstore.remove(manager, "bench"))
        notify.drive(manager.barrier())
        number += 1
        print(*store, *save, file=took, flush=True)
"""


def fdstores(rounds: int) -> list[bool]:
    """save_fd and FDSTORE in one process, a service of a real systemd, by turns."""
    from tests.systemd import boot
    from tests.systemd.machine import TREE, Machine

    lacking = boot.missing(TREE)
    if lacking:
        print(f"not compared with systemd's store: a real systemd needs {'; '.join(lacking)}")
        return []
    store: list[float] = []
    save: list[float] = []
    with tempfile.TemporaryDirectory(prefix="cprd-bench.") as scratch:
        with Machine(Path(scratch)) as machine, contextlib.ExitStack() as stack:
            place = machine.root / "run/boot"
            (place / "fdstore.py").write_text(FDSTORE)
            for name in ("go", "took"):
                os.mkfifo(place / name)
            machine.unit(
                "fdstore.service",
                "[Service]\nType=notify\nNotifyAccess=main\n"
                f"FileDescriptorStoreMax={2 * CONNECTIONS}\nLimitNOFILE=12000\n"
                "ExecStart=test-python /run/boot/fdstore.py\n",
            )
            machine.systemctl("start", "fdstore.service")
            go = stack.enter_context(open(place / "go", "w"))
            took = stack.enter_context(open(place / "took"))
            for number in range(rounds + 1):
                print("go", file=go, flush=True)
                each = [float(one) * 1e6 for one in took.readline().split()]
                if number:  # the first is to warm up
                    store += each[:TURN]
                    save += each[TURN:]
            version = machine.version
    words = (
        f"save_fd mean {statistics.mean(save):.1f} median {statistics.median(save):.1f} us, FDSTORE"
        f" and barrier mean {statistics.mean(store):.0f} median {statistics.median(store):.0f} us"
        f" (systemd {version})"
    )
    means = statistics.mean(save) / statistics.mean(store)
    medians = statistics.median(save) / statistics.median(store)
    return [
        verdict("save_fd over systemd's FDSTORE, means", means, 0.1, " x", words),
        verdict("save_fd over systemd's FDSTORE, medians", medians, 0.1, " x", words),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figures", nargs="*", default=FIGURES, metavar="FIGURE")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 12_000:
        raise SystemExit("raise the hard limit of descriptors to 12000 (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    good: list[bool] = []
    if "few" in options.figures:
        good += compare(10, 1.5, options.rounds)
    if "many" in options.figures:
        good += compare(9000, 3.0, options.rounds)
    if "section" in options.figures:
        good.append(sections(options.rounds))
    if "takeover" in options.figures:
        good += takeovers(max(9, options.rounds // 3))
    if "death" in options.figures:
        good += deaths(options.rounds)
    if "fdstore" in options.figures:
        good += fdstores(options.rounds)
    return not all(good)


if __name__ == "__main__":
    sys.exit(main())

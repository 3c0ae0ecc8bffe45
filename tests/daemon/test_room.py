"""What one uid can have in flight: never so much that what others hold cannot be loaded.

cprd has a user of its own here and no capability, as in the unit: the kernel counts all that cprd
has in flight, and beyond RLIMIT_NOFILE refuses answers as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import cprd
from tests.support.blocking import reload
from tests.support.checkout import CHECKOUT
from tests.support.child import Child, Line, become
from tests.support.daemon import DaemonProcess
from tests.support.eventfds import of, opened
from tests.support.patience import in_time

OWN, GREEDY, OTHERS = 62_000, 62_001, (62_002, 62_003)
ALONE = ["setpriv", f"--reuid={OWN}", f"--regid={OWN}", "--clear-groups", "--inh-caps=-all"]
ALONE += ["--bounding-set=-all", "--no-new-privs"]
PATHS = f"{CHECKOUT}:{sysconfig.get_path('purelib')}"
HELD = 20  # by each of the others, and by root
FULL = pytest.mark.full

pytestmark = [
    pytest.mark.usefixtures("nothing_leaks"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for other uids: run as root"),
]


class Alone(DaemonProcess):
    """As a user of its own, without capabilities."""

    python = ""

    def start(self) -> None:
        if ALONE[0] not in self.command:
            self.command[self.command.index(sys.executable)] = self.python
            self.command[2:2] = ALONE  # after prlimit
            self.env["PYTHONPATH"] = PATHS
        super().start()


def interpreter() -> str:
    """A Python that a plain user can execute, with the packages that cprd needs."""
    words = ["sh", "-c", 'exec "$0" -c "import cprd.daemon.command, trio, msgpack"']
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        command = ["env", f"PYTHONPATH={PATHS}", *ALONE, *words, python]
        if not subprocess.run(command, capture_output=True, check=False, cwd="/").returncode:
            return python
    pytest.skip(f"a plain user cannot execute {sys.executable}: put Python where everybody can")


@pytest.fixture
def start_alone() -> Iterator[Callable[[int], DaemonProcess]]:
    """start_alone(limit): a cprd with such a limit of descriptors."""
    with ExitStack() as stack:
        Alone.python = interpreter()

        def start(limit: int) -> DaemonProcess:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cprd-test.")))
            os.chown(place, OWN, OWN)
            place.chmod(0o755)
            one = Alone(place, nofile=(limit, limit))
            stack.callback(one.stop)
            return one

        yield start


def holds(line: Line, path: str, uid: int, count: int) -> None:
    """Save, and when told load all."""
    become(uid)
    with cprd.connect(path) as daemon, opened(3) as fds:
        for number in range(count):
            daemon.save(f"{number}", of(fds))
        line.say("held")
        while line.hear() == "look":
            for number in range(count):
                claim = daemon.load(f"{number}")
                assert claim.state.fd_count == 3
                claim.reject()
                claim.close()
            daemon.save("more", of(fds), if_exists="replace")
            daemon.load("more").confirm()
            line.say("loaded")


def begins(line: Line, path: str, count: int, times: int) -> None:
    """Say how many of so many holds there were, and how many requests were refused."""
    become(GREEDY)
    refused = 0
    processes = [os.pidfd_open(pid) for pid in (os.getpid(), os.getppid())]
    claims = []
    with cprd.connect(path) as daemon:
        for number in range(count):
            try:
                daemon.save(f"{number}", cprd.State())
                claims.append(daemon.load(f"{number}", lease=3600))
            except cprd.LimitExceeded:
                refused += 1
        for turn in range(times):
            for claim in claims:
                try:
                    claim.begin(processes[turn % 2])
                except cprd.LimitExceeded:
                    refused += 1
        line.say(f"{len(claims)} {refused}")
        line.hear()
        left = [row for row in daemon.list() if row["phase"] in ("claimed", "in-doubt")]
        assert len(left) == len(claims)
        for claim in claims:
            claim.confirm()
        line.say(len(daemon.list()))
        line.hear()


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("limit", "count", "times"),
    [(2000, 34, 27), (2000, 500, 3), pytest.param(20_000, 343, 27, marks=FULL)],
)
def test_what_others_hold_can_be_loaded_whatever_a_uid_begins(
    start_alone: Callable[[int], DaemonProcess], limit: int, count: int, times: int
) -> None:
    daemon = start_alone(limit)
    with ExitStack() as stack:
        others = [stack.enter_context(Child(holds, daemon.path, uid, HELD)) for uid in (0, *OTHERS)]
        for other in others:
            assert other.hear() == "held"
        greedy = stack.enter_context(Child(begins, daemon.path, count, times))
        held, refused = map(int, greedy.hear().split())
        print(f"{held} holds, {held * times} begins, {refused} refused")
        assert (refused > 0) == (count > limit // 10)
        for _ in range(2):
            begin = time.monotonic()
            for other in others:
                other.say("look")
                assert other.hear() == "loaded"
            assert in_time(time.monotonic() - begin, 5)
            reload(daemon)
        greedy.say()
        assert greedy.hear() == "0"

"""`kill -HUP` of a real cprd, without systemd: the same PID runs the new code, and has everything.

That a stored hold also lives through kill -9 is tests/systemd/test_kill9.py's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cprd
from tests.support.blocking import reload
from tests.support.checkout import CHECKOUT
from tests.support.daemon import DaemonProcess, releasers
from tests.support.descriptors import open_fds
from tests.support.patience import PATIENCE, in_time, patience, rest, until
from tests.support.processes import await_quiet

CLIENT = """
import os, sys, cprd
daemon = cprd.connect(sys.argv[1])
def say(word):
    print(word, flush=True)
"""


class Client:
    """A program of its own that speaks to cprd; it goes on with each line that it is sent."""

    def __init__(self, path: str, program: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT + program, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        )

    def hears(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Callable[[str], Client]]:
    with contextlib.ExitStack() as stack:

        def start(program: str) -> Client:
            one = Client(daemon.path, program)
            stack.callback(one.end)
            return one

        yield start


def state(number: int, *fds: int) -> cprd.State:
    one = cprd.State()
    one["number"] = number
    for index, fd in enumerate(fds):
        one.save_fd("fd", index, fd)
    return one


def reexec(daemon: DaemonProcess) -> None:
    """The same process, executed anew, serves."""
    pid, seen = daemon.pid, len(daemon.log())
    os.kill(pid, signal.SIGHUP)
    daemon.await_log("re-executing", since=seen)
    daemon.await_log("ready pid=", since=seen)
    assert daemon.alive()
    assert daemon.pid == pid


def reason(daemon: DaemonProcess, name: str) -> str:
    with daemon.connect() as connection:
        return str(connection.show(name)["reason"])


@pytest.mark.usefixtures("nothing_leaks")
def test_everything_in_every_phase_comes_along(
    daemon: DaemonProcess, client: Callable[[str], Client]
) -> None:
    reading, writing = os.pipe()
    with daemon.connect() as connection:
        for number, name in enumerate(("held", "claimed", "rejected", "begun", "waited-for")):
            connection.save(name, state(number, writing))
        with connection.load("rejected") as claim:
            claim.reject("not today")
    os.close(writing)
    prepared = client(
        "p = daemon.prepare('prepared', cprd.State()); say('ok'); input(); "
        "p.commit(); say('committed'); input()"
    )
    gone = client("p = daemon.prepare('doubted', cprd.State()); say('ok'); input()")
    claimed = client(
        "c = daemon.load('claimed'); say(c.attempts); input(); c.confirm(); c.close(); "
        "say('confirmed'); input()"
    )
    begun = client("c = daemon.load('begun'); c.begin(); say('ok'); input(); say(c.confirm())")
    for one in (prepared, gone, begun):
        assert one.hears() == "ok"
    assert claimed.hears() == "1"
    gone.end()
    until(lambda: daemon.phases()["doubted"] == "in-doubt", lambda: str(daemon.phases()))

    expected = {
        "held": "held",
        "claimed": "claimed",
        "rejected": "held",
        "begun": "in-doubt",
        "waited-for": "held",
        "prepared": "prepared",
        "doubted": "in-doubt",
    }
    assert daemon.phases() == expected
    reasons = {name: reason(daemon, name).split(", whose")[0] for name in expected}
    reexec(daemon)
    assert daemon.phases() == expected
    assert {name: reason(daemon, name).split(", whose")[0] for name in expected} == reasons
    assert "not today" in reasons["rejected"]

    for one, said in ((prepared, "committed"), (claimed, "confirmed"), (begun, "None")):
        one.go()
        assert one.hears() == said
    with daemon.connect() as connection:
        with connection.load("held") as claim:
            assert claim.state["number"] == 0
            os.write(claim.state.find_fd("fd", 0), b"still open")
        assert os.read(reading, 99) == b"still open"
        assert set(daemon.phases()) == {"rejected", "waited-for", "prepared", "doubted"}
        for name in ("rejected", "waited-for"):
            connection.drop(name)
    assert os.read(reading, 99) == b""
    os.close(reading)


def test_a_waiting_load_gets_it_and_waits_no_longer_than_asked(
    daemon: DaemonProcess, client: Callable[[str], Client]
) -> None:
    waiting = client(
        "say('ok')\nwith daemon.load('late', wait=60) as claim: say(claim.state['number'])"
    )
    in_vain = client(
        "import time\nsay('ok'); start = time.monotonic()\n"
        "try: daemon.load('never', wait=3)\n"
        "except cprd.NotHeld: say(round(time.monotonic() - start, 1))"
    )
    assert waiting.hears() == in_vain.hears() == "ok"
    for _ in range(3):
        reexec(daemon)
    with daemon.connect() as connection:
        connection.save("late", state(7))
    assert waiting.hears() == "7"
    assert 3 <= float(in_vain.hears()) < 3 + patience(1.5)


@pytest.mark.parametrize("act", ["c.begin()", "pass"])
def test_a_claimant_that_dies_afterwards_ends_its_claim(
    daemon: DaemonProcess, client: Callable[[str], Client], act: str
) -> None:
    """The new code watches its process, though its connection is gone."""
    with daemon.connect() as connection:
        connection.save("web", state(1))
    claimant = client(f"c = daemon.load('web'); {act}; say('ok'); input()")
    assert claimant.hears() == "ok"
    reexec(daemon)
    seen = len(daemon.log())
    claimant.end()
    if act == "pass":
        daemon.await_log("held ", since=seen)
        with daemon.connect() as connection, connection.load("web") as claim:
            assert claim.attempts == 2
            assert "its process ended" in claim.last_reject
    else:
        until(lambda: "its process ended" in reason(daemon, "web"), lambda: reason(daemon, "web"))
        assert daemon.phases() == {"web": "in-doubt"}


def test_a_lease_goes_on_running(daemon: DaemonProcess, client: Callable[[str], Client]) -> None:
    with daemon.connect() as connection:
        connection.save("web", state(1))
    claimant = client(
        "import time\nbegan = time.monotonic(); c = daemon.load('web', lease=2)\n"
        "say(began); input(); c.renew()"
    )
    began = float(claimant.hears())
    reexec(daemon)
    with daemon.connect() as connection, connection.load("web", wait=PATIENCE) as claim:
        assert "lease" in claim.last_reject
    assert 2 <= time.monotonic() - began < patience(4)


def test_a_predecessor_that_lives_still_holds_it_back(
    daemon: DaemonProcess, client: Callable[[str], Client]
) -> None:
    saver = client("daemon.save('web', cprd.State(), after_exit=True); say('ok'); input()")
    assert saver.hears() == "ok"
    reexec(daemon)
    with daemon.connect() as connection:
        with pytest.raises(cprd.Busy, match=str(saver.process.pid)):
            connection.load("web")
        saver.end()
        connection.load("web", wait=5).confirm()


def test_a_saver_that_died_before_the_new_code_looked_is_in_doubt(
    daemon: DaemonProcess, client: Callable[[str], Client]
) -> None:
    saver = client("p = daemon.prepare('web', cprd.State()); say('ok'); input()")
    assert saver.hears() == "ok"
    os.kill(daemon.pid, signal.SIGSTOP)
    os.kill(daemon.pid, signal.SIGHUP)
    saver.end()
    seen = len(daemon.log())
    os.kill(daemon.pid, signal.SIGCONT)
    daemon.await_log("ready pid=", since=seen)
    until(lambda: daemon.phases() == {"web": "in-doubt"}, lambda: str(daemon.phases()))


def test_a_broken_configuration_leaves_the_old_one_running(
    start_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon = start_daemon(config="[limits]\nholds = 5\n")
    with daemon.connect() as connection:
        connection.save("web", state(1))
        file = Path(daemon.command[-1])
        file.write_text("[limits]\nhols = 5\n")
        os.kill(daemon.pid, signal.SIGHUP)
        assert "hols" in daemon.await_log("reload-refused")
        assert connection.status()["limits"]["holds"] == 5
        file.write_text("[limits]\nholds = 6\n")
        reexec(daemon)
        assert connection.status()["limits"]["holds"] == 6
        assert [row["name"] for row in connection.list()] == ["web"]


class Elsewhere(DaemonProcess):
    """A cprd that runs from a copy of the package, which a test may break."""

    def start(self) -> None:
        self.env["PYTHONPATH"] = str(Path(self.path).parent)
        super().start()


def test_a_broken_new_version_leaves_the_old_one_running(tmp_path: Path) -> None:
    import shutil

    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(CHECKOUT / "cprd", tmp_path / "cprd", ignore=ignore)
    daemon = Elsewhere(tmp_path)
    try:
        with daemon.connect() as connection:
            connection.save("web", state(1))
            (tmp_path / "cprd/daemon/storage/shelves.py").write_text("def\n")
            os.kill(daemon.pid, signal.SIGHUP)
            assert "SyntaxError" in daemon.await_log("reload-refused")
            assert [row["name"] for row in connection.list()] == ["web"]
            connection.save("more", state(2))
    finally:
        daemon.stop()


@pytest.mark.parametrize("gap", [0.0, 0.02, 0.1, 0.3])
def test_asked_again_while_it_is_at_it_keeps_everything(daemon: DaemonProcess, gap: float) -> None:
    with daemon.connect() as connection:
        connection.save("web", state(1))
        for _ in range(4):
            os.kill(daemon.pid, signal.SIGHUP)
            rest(gap)  # any moment of it will do
        for _ in range(20):
            assert [row["name"] for row in connection.list()] == ["web"]
            rest(0.05)  # that no more of them comes has no event
    assert daemon.alive()


@pytest.mark.parametrize("after", [0.0, 0.05, 0.2, 0.4])
def test_told_to_end_while_it_is_at_it_ends_cleanly(daemon: DaemonProcess, after: float) -> None:
    os.kill(daemon.pid, signal.SIGHUP)
    rest(after)  # any moment of it will do
    assert daemon.stop() == 0
    assert not os.path.exists(daemon.path)


def quiet_fds(daemon: DaemonProcess) -> int:
    """How many descriptors it has once it has let go of all that it is about to, and its releaser,
    which `fds` counts by its process, is there."""
    until(lambda: releasers(daemon.pid), lambda: "no releaser")
    await_quiet(daemon.pid)
    return daemon.fds()


def test_nothing_grows_over_twenty_of_them(daemon: DaemonProcess) -> None:
    with daemon.connect() as connection:
        for number in range(10):
            connection.save(f"n{number}", state(number))
        claim = connection.load("n0", lease=600)
        before = quiet_fds(daemon)
        counts = []
        for number in range(20):
            reexec(daemon)
            claim.renew()  # reconnects, and speaks for the claim again
            if number in (0, 19):
                counts.append(quiet_fds(daemon))
        assert counts[-1] <= counts[0]
        assert counts[0] <= before + 2
        assert connection.list()[0]["phase"] == "claimed"
        claim.confirm()
        claim.close()


def test_under_load_nothing_is_lost_nothing_comes_twice_and_no_client_sees_it(
    daemon: DaemonProcess,
) -> None:
    """Each worker hands one pipe from itself to itself, again and again; what was confirmed does
    not come back, and what was saved is there."""
    stop = threading.Event()
    errors: list[str] = []
    rounds = [0] * 6

    def work(index: int) -> None:
        name = f"worker{index}"
        try:
            with daemon.connect() as connection:
                while not stop.is_set():
                    one_round(connection, name, rounds[index])
                    rounds[index] += 1
        except Exception as error:
            errors.append(f"{name} in round {rounds[index]}: {error!r}")

    def one_round(connection: Any, name: str, number: int) -> None:
        reading, writing = os.pipe()
        try:
            saved = connection.save(name, state(number, writing))
            os.close(writing)
            writing = -1
            with connection.load(name, wait=5) as claim:
                assert claim.generation == saved.generation, (claim.generation, saved.generation)
                assert claim.state["number"] == number
                assert claim.attempts == 1
                if number % 3 == 0:
                    claim.reject("again")
            if number % 3 == 0:
                with connection.load(name, wait=5) as claim:
                    assert claim.state["number"] == number
                    assert claim.attempts == 2
            assert not connection_has(connection, name)
            readable = socket_wait(reading)
            assert readable, "1 s after confirm somebody still has the pipe"
        finally:
            os.close(reading)
            if writing >= 0:
                os.close(writing)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(rounds))]
    before = open_fds()
    for thread in threads:
        thread.start()
    for _ in range(6):
        reached = list(rounds)
        reexec(daemon)
        until(
            lambda reached=reached: (
                errors or all(a > b for a, b in zip(rounds, reached, strict=True))
            ),  # type: ignore[misc]
            lambda: f"{rounds} rounds",
        )
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert open_fds() == before
    assert daemon.phases() == {}


def connection_has(connection: cprd.Daemon, name: str) -> bool:
    return any(row["name"] == name for row in connection.list())


def socket_wait(fd: int) -> bool:
    """Whether `fd` gets readable within a second (its FIN does that)."""
    import select

    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(patience(1) * 1000))


def test_its_socket_is_never_away(daemon: DaemonProcess) -> None:
    """Who connects meanwhile waits in its queue."""
    stop = threading.Event()
    errors: list[OSError] = []

    def knock() -> None:
        while not stop.is_set():
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as one:
                try:
                    one.connect(daemon.path)
                except OSError as error:
                    errors.append(error)
                    return
            stop.wait(0.001)

    thread = threading.Thread(target=knock)
    thread.start()
    for _ in range(3):
        reexec(daemon)
    stop.set()
    thread.join()
    assert not errors


def queues(daemon: DaemonProcess) -> list[int]:
    """How many descriptors are queued in each socket of a cprd that has any, the most last."""
    found = []
    for path in Path(f"/proc/{daemon.pid}/fdinfo").iterdir():
        with contextlib.suppress(OSError):
            _, _, said = path.read_text().partition("scm_fds:")
            found.append(int(said.split()[0]) if said else 0)
    return sorted(filter(None, found))


def parked(daemon: DaemonProcess) -> int:
    """All that is queued in the sockets of a cprd: on the shelf, and in the bundles."""
    return sum(queues(daemon))


def test_a_hold_costs_one_socket_in_flight_and_one_descriptor(daemon: DaemonProcess) -> None:
    """The queue with what the client has parked, here an eventfd and the memfd of the manifest."""
    count = 200
    with daemon.connect() as client:
        client.save("warm", cprd.State())
        before, (*_, on_shelf) = daemon.fds(), queues(daemon)
        state = cprd.State()
        with contextlib.closing(os.fdopen(os.eventfd(0), "rb")) as event:
            state.save_fd("event", 0, event)
            for number in range(count):
                client.save(f"{number}", state)
        *bundles, shelf = queues(daemon)
        assert set(bundles[1:]) <= {1, 2}
        assert len(bundles) == count + 1
        assert count <= shelf - on_shelf <= 1.1 * count
        assert daemon.fds() <= before + 1.1 * count


def test_a_process_is_parked_once_however_many_records_name_it(daemon: DaemonProcess) -> None:
    """Each copy would be one more in flight for as long as the hold lives."""
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(subprocess.Popen(["sleep", "60"]))
        stack.callback(other.kill)
        process = os.pidfd_open(other.pid)
        stack.callback(os.close, process)
        client = stack.enter_context(daemon.connect())
        client.save("a", cprd.State())
        empty = parked(daemon)
        claim = stack.enter_context(client.load("a", lease=3600))
        claim.begin(process)
        assert parked(daemon) == empty + 2  # this process, and the one that acts
        for _ in range(2):
            for _ in range(12):
                claim.begin(process)
            assert parked(daemon) == empty + 2
            assert in_time(reload(daemon), 5)
            assert parked(daemon) == empty + 2

"""kill -9 of cprd at each step of each verb, on a real systemd, in the unit that we ship.

The client's library hides each of these deaths: it repeats its request to the next cprd. So each
request has to come true once, however often cprd died over it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cprd.protocol.lifecycle import HELD, IN_DOUBT
from tests.client.test_live_kills import clients_through_kills
from tests.support.live_sweeps import LIVE_VERBS, LiveStep, TakeOver, sweep_live
from tests.support.sweeps import GONE, VERBS, Step, Stream, sweep, sweep_rewriting, sweep_start

from .keeping import SMALL, UNIT, Keeping, Task, things
from .machine import Machine


@pytest.fixture
def keeping(systemd: Machine) -> Keeping:
    return Keeping(systemd)


@pytest.mark.parametrize("verb", VERBS)
def test_killed_at_each_step_it_is_done_once(keeping: Keeping, verb: type[Step]) -> None:
    assert sweep(keeping, verb) >= 2
    keeping.await_kept("store")


@pytest.mark.parametrize(
    "verb",
    [
        verb if verb is TakeOver else pytest.param(verb, marks=pytest.mark.full)
        for verb in LIVE_VERBS
    ],
)
def test_killed_at_each_step_of_a_live_hold_it_is_done_once(
    keeping: Keeping, verb: type[LiveStep]
) -> None:
    assert sweep_live(keeping, verb) >= 2
    keeping.await_kept("store")


@pytest.mark.full
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("settings", ["", SMALL])
def test_killed_at_each_step_and_again_after_the_answer(
    systemd: Machine, verb: type[Step], settings: str
) -> None:
    """Small shelves are written anew in between, and small journals moved."""
    assert sweep(Keeping(systemd, settings=settings), verb, again=True) >= 2


def test_killed_at_each_step_of_writing_a_shelf_anew(systemd: Machine) -> None:
    sweep_rewriting(Keeping(systemd, settings=SMALL))


def test_killed_at_each_step_of_its_start(keeping: Keeping) -> None:
    sweep_start(keeping)


def test_killed_while_its_clients_are_gone_as_well(keeping: Keeping) -> None:
    """Nobody repeats the request: it was done, or it was not."""
    program = Path(keeping.machine.root) / "run/boot/one.py"
    program.write_text(
        "import sys, os, cprd\n"
        "state = cprd.State(); state['n'] = 1; state.save_fd('e', 0, os.eventfd(3))\n"
        "daemon = cprd.connect()\n"
        "if sys.argv[1] == 'prepare': p = daemon.prepare('web', state); p.commit()\n"
        "else:\n"
        "    daemon.save('web', state)\n"
        "    daemon.load('web').confirm(); print('confirmed', flush=True)\n"
    )
    seen = set()
    for verb, points in (("prepare", (1, 3, 5, 7)), ("confirm", (6, 9, 12, 15))):
        for at in points:
            keeping.arm(f"#{at}")
            client = keeping.machine.popen("test-python", "/run/boot/one.py", verb)
            assert keeping.await_stop(lambda client=client: client.poll() is not None)  # type: ignore[misc]
            keeping.machine.signal(client, signal.SIGKILL)
            client.wait()
            keeping.kill()
            rows = keeping.rows()
            seen.add((verb, rows["web"]["phase"] if rows else GONE))
            if rows:
                assert rows["web"]["fds"] == 1
                with keeping.connect() as daemon:
                    if rows["web"]["phase"] == IN_DOUBT:
                        daemon.release("web")
                    with daemon.load("web", wait=5) as claim:
                        assert claim.state["n"] == 1
                        assert claim.state.fd_count == 1
            assert not keeping.phases()
    assert ("prepare", IN_DOUBT) in seen
    assert ("confirm", GONE) in seen
    assert ("confirm", HELD) in seen


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_2000_connections_live_through_kills_of_the_owner_and_of_cprd(keeping: Keeping) -> None:
    kills = 0

    def kill() -> None:
        nonlocal kills
        keeping.kill()
        kills += 1

    clients_through_kills(keeping.path, 2000, 20, kill)
    assert kills == 21
    keeping.await_kept("store")


@pytest.fixture
def stream(keeping: Keeping) -> Iterator[Callable[[int], Stream]]:
    with contextlib.ExitStack() as stack:

        def start(clients: int) -> Stream:
            one = Stream(keeping, clients)
            stack.callback(one.end)
            return one

        yield start


def disturb(keeping: Keeping, stream: Stream, how: list[str], rounds: int) -> None:
    for what in how:
        stream.advance(random.randrange(1, rounds))
        if what == "kill":
            keeping.kill()
        elif what == "daemon-reexec":
            keeping.systemctl("daemon-reexec")
        else:
            keeping.systemctl(what, UNIT)
    stream.advance(rounds)


def test_killed_restarted_and_reloaded_under_load_no_client_sees_it(
    keeping: Keeping, stream: Callable[[int], Stream]
) -> None:
    clients = stream(5)
    disturb(keeping, clients, ["kill", "kill", "restart", "reload", "daemon-reexec", "kill"], 60)
    assert clients.rounds > 60


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_hundred_restarts_under_twenty_clients(
    keeping: Keeping, stream: Callable[[int], Stream]
) -> None:
    how = random.choices(["kill", "restart", "reload", "daemon-reexec"], [7, 1, 1, 1], k=100)
    disturb(keeping, stream(20), how, 200)
    assert keeping.kept() == "store"
    listed = json.loads(keeping.machine.run("cprctl", "list", "--json"))
    assert len(listed) <= 20


def test_a_daemon_reload_and_a_sigterm_in_the_midst_of_a_load_are_not_noticed(
    keeping: Keeping,
) -> None:
    with things(1) as (thing,), keeping.connect() as daemon:
        daemon.save("web", thing.state, require="store")
        thing.saved()
        keeping.arm("daemon:claimed")
        task = Task(lambda: daemon.load("web"))
        assert keeping.await_stop()
        keeping.machine.systemctl("daemon-reload")
        os.kill(keeping.pid, signal.SIGTERM)
        os.kill(keeping.pid, signal.SIGCONT)
        keeping.await_start()
        claim = task.result()
        assert claim.attempts == 1
        assert thing.is_in(claim)
        keeping.machine.systemctl("daemon-reload")
        claim.confirm()
        claim.close()
        assert thing.let_go()
        assert not keeping.phases()

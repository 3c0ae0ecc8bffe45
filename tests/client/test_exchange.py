"""Deadlines, late answers and threads; and the steps of an exchange without any connection."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from array import array
from collections.abc import Generator
from contextlib import closing
from typing import Any

import pytest

import cprd
from cprd import Busy, InvalidInput, NotHeld, State, Timeout, Unavailable
from cprd.bundle.unpack import unpack
from cprd.client import ahead, blocking, exchange
from cprd.client.exchange import Answer, Call, Common, Line, Lost, Step
from cprd.protocol import messages
from tests.client.test_clients import Connect, asleep, connect, inside
from tests.support import wire
from tests.support.daemon import DaemonProcess
from tests.support.descriptors import open_fds
from tests.support.eventfds import of, opened, values
from tests.support.patience import PATIENCE, in_time, patience, until

__all__ = ["connect"]  # the fixture
pytestmark = pytest.mark.usefixtures("nothing_leaks")


async def with_a_queue(client: Any) -> None:
    """Have a queue at hand for the next save: a connection that saves again has."""
    for _ in range(2):
        await client.save("before", State())
        await client.drop("before")


# Deadlines


@pytest.mark.parametrize("what", ["save", "list", "load", "prepare", "wait to load"])
async def test_a_request_ends_at_a_deadline_of_its_own(
    connect: Connect, daemon: DaemonProcess, what: str
) -> None:
    async with connect() as client:
        await client.save("web", State())
        await with_a_queue(client)
        requests = {
            "save": lambda: client.save("new", State(), timeout=0.2),
            "list": lambda: client.list(timeout=0.2),
            "load": lambda: client.load("web", timeout=0.2),
            "prepare": lambda: client.prepare("new", State(), timeout=0.2),
            "wait to load": lambda: client.load("new", wait=0.1, timeout=0.1),
        }
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            start = time.monotonic()
            with pytest.raises(Timeout, match=r"0\.2 s"):
                await requests[what]()
            assert in_time(time.monotonic() - start, 2.0)
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        # What a request may have done is known after the next one, or undone by then.
        seen = {row["name"]: row["phase"] for row in await client.list()}
        assert seen == {"web": "held", **({"new": "held"} if what == "save" else {})}


async def test_a_connection_has_a_default_deadline(connect: Connect, daemon: DaemonProcess) -> None:
    for bad in (-1, "1", True, float("nan")):
        with pytest.raises(InvalidInput, match="timeout"):
            cprd.connect(daemon.path, timeout=bad)  # type: ignore[arg-type]
    async with connect() as client:
        inside(client)._line.common.timeout = 0.1
        with asleep(daemon):
            with pytest.raises(Timeout):
                await client.list()
        assert await client.list(timeout=PATIENCE) == []
        daemon.kill()
        start = time.monotonic()
        with pytest.raises(Unavailable):
            await client.list()
        assert in_time(time.monotonic() - start, 5.0)
        daemon.start()
        assert await client.list(timeout=PATIENCE) == []


async def test_a_prepare_past_the_deadline_is_aborted_by_the_next_request_and_ends_no_claim(
    connect: Connect, daemon: DaemonProcess
) -> None:
    with opened(2) as fds:
        async with connect() as client:
            await client.save("web", of(fds))
            await with_a_queue(client)
            claim = await client.load("web")
            with asleep(daemon):
                with pytest.raises(Timeout):
                    await client.prepare("new", of(fds), timeout=0.1)
            until(lambda: "new" in daemon.phases(), lambda: repr(daemon.phases()))
            assert daemon.phases() == {"web": "claimed", "new": "prepared"}
            prepared = await client.prepare("new", of(fds))  # the first is aborted before
            await prepared.commit()
            assert await claim.renew() == 30.0
            await claim.confirm()
            await claim.close()
            assert daemon.phases() == {"new": "held"}


async def test_a_prepare_past_the_deadline_is_in_doubt_after_its_connection(
    connect: Connect, daemon: DaemonProcess
) -> None:
    with opened(2) as fds:
        async with connect() as client:
            await with_a_queue(client)
            with asleep(daemon):
                with pytest.raises(Timeout):
                    await client.prepare("new", of(fds), timeout=0.1)
        until(lambda: daemon.phases() == {"new": "in-doubt"}, lambda: repr(daemon.phases()))
        async with connect() as client:
            with pytest.raises(Busy, match="between prepare and commit"):
                await client.load("new")
            await client.drop("new", force=True)


async def test_a_load_past_the_deadline_ends_no_other_claim(
    connect: Connect, daemon: DaemonProcess
) -> None:
    with opened(2) as fds:
        async with connect() as client:
            await client.save("web", of(fds))
            await client.save("other", of(fds))
            async with client.load("web") as claim:
                with asleep(daemon):
                    with pytest.raises(Timeout):
                        await client.load("other", timeout=0.1)
                    with pytest.raises(Timeout):
                        await client.list(timeout=0.1)
                async with client.load("other") as other:  # given back first
                    assert other.attempts == 2
                    assert values(other.state) == [1, 2]
                await claim.renew()
        assert daemon.phases() == {}


@pytest.mark.parametrize("end", ["confirm", "commit"])
async def test_a_confirm_past_the_deadline_is_learned_by_the_same_words(
    connect: Connect, daemon: DaemonProcess, end: str
) -> None:
    async with connect() as client:
        await client.save("web", State())
        claim = await client.load("web")
        prepared = await client.prepare("new", State())
        verb = claim.confirm if end == "confirm" else prepared.commit
        with asleep(daemon):
            with pytest.raises(Timeout):
                await verb(timeout=0.1)
        await client.list()  # done by now
        await verb()
        assert daemon.phases() == (
            {"new": "prepared"} if end == "confirm" else {"web": "claimed", "new": "held"}
        )
        await claim.close()


# Threads


def test_threads_share_one_daemon(daemon: DaemonProcess) -> None:
    """Saves, loads and waits of eight threads, interrupts of the main thread in their midst."""
    failed: list[BaseException] = []
    before = daemon.fds()
    ours = open_fds()

    def work(client: cprd.Daemon, number: int) -> None:
        try:
            name = f"n{number}"
            for turn in range(30):
                with opened(2) as fds:
                    client.save(name, of(fds))
                    if turn % 3 == 0:
                        assert client.wait(name, PATIENCE)
                    with client.load(name, wait=PATIENCE * (turn % 2)) as claim:
                        assert values(claim.state) == [1, 2]
                        client.list()
                        claim.renew()
                with pytest.raises(NotHeld):
                    client.load(name, wait=0.001)
        except BaseException as error:
            failed.append(error)

    class Interrupt(BaseException):
        pass

    def interrupt(_: int, frame: Any) -> None:
        if (
            frame.f_code is blocking.Connection._receive.__code__
        ):  # while a request waits for the answer
            raise Interrupt

    with daemon.connect() as client:
        threads = [threading.Thread(target=work, args=(client, n)) for n in range(8)]
        old = signal.signal(signal.SIGALRM, interrupt)
        try:
            for thread in threads:
                thread.start()
            interrupts = 0
            while any(thread.is_alive() for thread in threads):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.003, 0.003)
                    while any(thread.is_alive() for thread in threads):
                        client.save("main", State(), if_exists="replace")
                        with client.load("main") as claim:
                            claim.renew()
                        client.drop("main")
                except Interrupt:
                    interrupts += 1
                except cprd.CprdError:
                    pass  # what an interrupt left of the turn before
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old)
        for thread in threads:
            thread.join(patience(60))
            assert not thread.is_alive()
        assert failed == []
        assert interrupts > 0
        assert {row["name"] for row in client.list()} <= {"main"}
    until(lambda: open_fds() == ours, lambda: f"{open_fds()} descriptors, not {ours}")
    with daemon.connect() as last:
        for row in last.list():
            last.drop(row["name"])
    daemon.await_fds(before)


def test_who_waits_delays_no_other_thread(daemon: DaemonProcess) -> None:
    with daemon.connect() as client:
        got: list[str] = []

        def wait_for(name: str) -> None:
            with client.load(name, wait=PATIENCE):
                got.append(name)

        threads = [threading.Thread(target=wait_for, args=(name,)) for name in ("a", "b")]
        for thread in threads:
            thread.start()
        start = time.monotonic()
        for name in ("b", "a"):
            client.save(name, State())
        for thread in threads:
            thread.join(PATIENCE)
        assert sorted(got) == ["a", "b"]
        assert time.monotonic() - start < PATIENCE


def test_a_signal_handler_may_use_the_daemon_that_it_interrupts(daemon: DaemonProcess) -> None:
    """In the midst of a request, by a connection of its own."""
    saved: list[int] = []
    with daemon.connect() as client:

        def handle(*_: Any) -> None:
            saved.append(client.save("web", State()).generation)
            claims.append(client.load("web"))

        claims: list[cprd.Claim] = []
        before = signal.signal(signal.SIGALRM, handle)
        try:
            os.kill(daemon.pid, signal.SIGSTOP)
            waker = threading.Timer(0.5, os.kill, (daemon.pid, signal.SIGCONT))
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            waker.start()
            client.list()
            waker.join()
        finally:
            signal.signal(signal.SIGALRM, before)
        (row,) = client.list()
        assert (row["generation"], row["phase"]) == (saved[0], "claimed")
        claims[0].confirm()
        claims[0].close()


# Steps, without any I/O


class Bare(Line):
    """A line for steps that nobody performs."""

    def take_turn_now(self) -> bool:
        return True

    def end_turn(self) -> None:
        pass

    def close_socket(self, sock: Any) -> None:
        self.closed = True


class Sock:
    def fileno(self) -> int:
        return 99


def line() -> Bare:
    bare = Bare("/nowhere", Common(None))
    bare.sock = Sock()  # type: ignore[assignment]
    return bare


def verb(call: Call) -> Generator[Call, Answer, dict[str, Any]]:
    answer = yield call
    return answer.fields


def answer(number: int | None, **fields: Any) -> Answer:
    made = Answer(array("i"))
    made.number, made.fields = number, fields
    return made


def kinds(steps: Generator[Step, Any, Any], *results: Any) -> tuple[list[str], Any]:
    """The kinds of all steps, performed with these results (errors are thrown), and the value."""
    seen: list[str] = []
    try:
        step = next(steps)
        for result in results:
            seen.append(step.kind)
            step = steps.throw(result) if isinstance(result, BaseException) else steps.send(result)
        raise AssertionError(f"not over: {step.kind}")
    except StopIteration as end:
        return seen, end.value


def test_a_late_answer_is_passed_over() -> None:
    steps = exchange.run(line(), verb(Call({"verb": "wait"})))
    seen, value = kinds(steps, None, answer(0, generation=5), answer(1, generation=6))
    assert seen == ["turn", "ask", "receive"]
    assert value == {"generation": 6}


def test_a_lost_connection_is_opened_again_and_the_request_sent_again() -> None:
    steps = exchange.run(line(), verb(Call({"verb": "wait"})))
    said = {"version": messages.VERSION, "server": "", "uid": 0, "pid": 1}
    greeting = answer(2, **said, lease_by=[], kept="memory", limits={})
    seen, value = kinds(steps, None, Lost(), Sock(), greeting, answer(3, generation=6))
    assert seen == ["turn", "ask", "connect", "ask", "ask"]
    assert value == {"generation": 6}


@pytest.mark.parametrize("until_known", [False, True])
def test_an_interrupt_waits_only_for_an_outcome_that_must_be_known(until_known: bool) -> None:
    steps = exchange.run(line(), verb(Call({"verb": "confirm"}, until_known=until_known)))
    results: list[Any] = [None, KeyboardInterrupt()]
    if until_known:
        results += [None, answer(1), answer(2)]
    with pytest.raises(KeyboardInterrupt):
        kinds(steps, *results)


def test_an_interrupted_request_is_undone_as_its_call_says() -> None:
    call = Call({"verb": "wait"}, undo=lambda fields: Call({"verb": "reject", **fields}))
    steps = exchange.run(line(), verb(call))
    sent = []
    step = next(steps)
    for result in (None, KeyboardInterrupt(), None, answer(2, generation=7), None):
        step = steps.throw(result) if isinstance(result, BaseException) else steps.send(result)
        sent += [step] if step.kind == "ask" else []
    assert [b"reject" in step.what[0] for step in sent] == [False, False, True]
    assert [step.shielded for step in sent] == [False, True, True]
    with pytest.raises(KeyboardInterrupt):
        steps.send(answer(3))


def test_an_answer_repeats_the_id_of_its_request_and_a_client_without_ids_is_served(
    daemon: DaemonProcess,
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(daemon.path)
        for request, id in (
            (wire.HELLO, None),
            (wire.request("status", id=7), 7),
            (wire.request("show", id=(1 << 64) - 1, name="web"), (1 << 64) - 1),
            (wire.request("status"), None),
            (wire.request("status", id="7"), None),
        ):
            sock.send(request)
            answer = messages.decode(sock.recv(65536), messages.MAX_ANSWER)
            assert answer.get("id") == id
            assert ("field 'id' wants" in answer.get("why", "")) == (b"\xa17" in request)
        for id in (8, 9):  # two at once are answered in order
            sock.send(wire.request("status", id=id))
        for id in (8, 9):
            assert messages.parse_answer(sock.recv(65536))[0] == id


# What is sent ahead of the client


def test_a_load_that_is_sent_ahead_is_the_clients_first(daemon: DaemonProcess) -> None:
    with cprd.connect(daemon.path) as saver, closing(State()) as state:
        state.save_fd("null", 0, 0)
        state["a"] = 1
        saver.save("web", state)
    asked = ahead.ask(daemon.path, "web")
    assert asked is not None
    bundle = asked.bundle(PATIENCE)
    with closing(unpack(bundle)) as looked_at:
        assert looked_at["a"] == 1
    os.close(bundle)
    with asked.daemon() as client:
        with client.load("web") as claim:
            assert asked._sock.said == []  # word for word
            assert (claim.attempts, claim.state["a"]) == (1, 1)
            os.close(claim.state.take_fd("null", 0))
        assert client.list() == []


@pytest.mark.parametrize("restarts", [False, True])
def test_a_load_that_is_sent_ahead_fails_as_the_clients(
    daemon: DaemonProcess, restarts: bool
) -> None:
    asked = ahead.ask(daemon.path, "web")
    assert asked is not None
    if restarts:
        daemon.restart()
    assert asked.bundle(PATIENCE) == -1
    with asked.daemon() as client, pytest.raises(NotHeld):
        client.load("web")
    assert ahead.ask(daemon.path + "x", "web") is None
    assert ahead.ask(daemon.path, "w" * 300) is None
    assert (ahead.VERSION, ahead.LEASE) == (messages.VERSION, messages.LEASE)

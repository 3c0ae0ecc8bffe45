"""The verbs on asyncio, and cancellation at each step. The battery of all clients is
tests/client/test_clients.py."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

import cprd.asyncio
from cprd import AlreadyHeld, Busy, InvalidInput, NotHeld, State, Unavailable
from cprd.asyncio.connection import LoopConnection
from cprd.client.exchange import Step
from tests.support.daemon import DaemonProcess
from tests.support.descriptors import open_fds
from tests.support.eventfds import of, opened, values
from tests.support.loops import Run, cancelled_here, run_on
from tests.support.patience import PATIENCE, until

pytestmark = pytest.mark.usefixtures("nothing_leaks")


def test_every_verb(run: Run, daemon: DaemonProcess) -> None:
    async def work() -> None:
        async with cprd.asyncio.connect(daemon.path) as client:
            assert client.path == daemon.path
            assert client.greeting["kept"] == "memory"
            with pytest.raises(NotHeld):
                await client.wait("web", 0.01)
            state = of(fds)
            state["sessions"] = {"a": [1, 2]}
            saved = await client.save("web", state, ttl=600)
            with pytest.raises(AlreadyHeld):
                await client.save("web", State())
            assert [row["generation"] for row in await client.list()] == [saved.generation]
            assert len((await client.show("web"))["descriptors"]) == 300
            assert (await client.status())["phases"] == {"held": 1}
            assert await client.wait("web", 0.01) == saved.generation
            async with client.load("web", wait=1.0) as claim:
                assert values(claim.state) == list(range(1, 301))
                assert await claim.renew(9.0) == 9.0
                with pytest.raises(Busy, match="claimed"):
                    await client.load("web")
                await claim.begin()
                await claim.reject("no room")
            async with client.load("web") as claim:
                assert claim.last_reject == "no room"
                taken = claim.state.take_fd("fd", 7)
                next_saved = await claim.confirm(next=claim.state, after_exit=False)
            assert next_saved is not None
            assert os.eventfd_read(taken) == 8
            os.close(taken)
            prepared = await client.prepare("web", State(), if_exists="replace")
            await prepared.abort()
            prepared = await client.prepare("web", State(), if_exists="replace")
            assert (await prepared.commit()).generation == prepared.generation
            assert await client.release("web") == prepared.generation
            assert await client.drop("web") == prepared.generation
        with pytest.raises(Unavailable, match="closed"):
            await client.list()

    with opened(300) as fds:
        run(work())


def test_a_daemon_that_was_restarted_is_found_again(run: Run, daemon: DaemonProcess) -> None:
    async def work() -> None:
        async with cprd.asyncio.connect(daemon.path) as client:
            await client.save("web", State())
            daemon.kill()
            back = threading.Timer(0.2, daemon.start)
            back.start()
            assert await client.list() == []
            back.join()

    run(work())


def test_a_cancelled_block_rejects(run: Run, daemon: DaemonProcess) -> None:
    async def work() -> None:
        async with cprd.asyncio.connect(daemon.path) as client:
            await client.save("web", State())

            async def claim() -> None:
                async with client.load("web"):
                    await cancelled_here()

            with pytest.raises(asyncio.CancelledError):
                await asyncio.create_task(claim())
            (row,) = await client.list()
            assert (row["phase"], row["attempts"]) == ("held", 1)
            assert "CancelledError" in row["last_reject"]

    run(work())


def test_a_cancelled_wait_claims_nothing_and_the_client_goes_on(
    run: Run, daemon: DaemonProcess
) -> None:
    async def work() -> None:
        async with cprd.asyncio.connect(daemon.path) as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.load("web", wait=60.0), 0.05)
            await client.save("web", State())
            async with client.load("web") as claim:
                assert claim.attempts == 1

    run(work())


def test_requests_of_many_tasks_take_turns_in_order(run: Run, daemon: DaemonProcess) -> None:
    async def work() -> None:
        async with cprd.asyncio.connect(daemon.path) as client:
            done: list[int] = []

            async def save(number: int) -> None:
                await client.save(f"web{number}", State())
                done.append(number)
                async with client.load(f"web{number}") as claim:
                    assert claim.attempts == 1

            async with asyncio.TaskGroup() as tasks:
                for number in range(20):
                    tasks.create_task(save(number))
            assert done == list(range(20))
            assert await client.list() == []

    run(work())


def test_a_request_that_is_cancelled_in_the_line_holds_up_nobody(
    run: Run, daemon: DaemonProcess
) -> None:
    async def work() -> None:
        async with cprd.asyncio.connect(daemon.path) as client:
            os.kill(daemon.pid, signal.SIGSTOP)
            try:
                tasks = [asyncio.create_task(client.save(f"web{n}", State())) for n in range(4)]
                await asyncio.sleep(0)
                for number in (2, 0):  # waits for the turn; waits for the answer
                    tasks[number].cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await tasks[number]
            finally:
                os.kill(daemon.pid, signal.SIGCONT)
            async with asyncio.timeout(PATIENCE):
                await tasks[1]
                await tasks[3]
            names = {row["name"] for row in await client.list()}
            assert names - {"web0"} == {"web1", "web3"}

    run(work())


def test_a_timeout_while_a_confirm_is_on_its_way_is_one_timeout_after_the_outcome(
    run: Run, daemon: DaemonProcess
) -> None:
    """asyncio.timeout() counts cancellations: the cancellation that was held back is the same."""

    async def work() -> None:
        async with cprd.asyncio.connect(daemon.path) as client:
            await client.save("web", State())
            claim = await client.load("web")
            os.kill(daemon.pid, signal.SIGSTOP)
            asyncio.get_running_loop().call_later(0.2, os.kill, daemon.pid, signal.SIGCONT)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await claim.confirm()
            task = asyncio.current_task()
            assert task is not None
            assert task.cancelling() == 0
            assert await client.list() == []
            await claim.close()

    run(work())


def test_the_end_of_the_loop_gives_a_claim_back(run: Run, daemon: DaemonProcess) -> None:
    async def work() -> None:
        async def hold() -> None:
            async with cprd.asyncio.connect(daemon.path) as client, client.load("web"):
                claimed.set()
                await asyncio.get_running_loop().create_future()

        claimed = asyncio.Event()
        task = asyncio.create_task(hold())
        await claimed.wait()
        assert not task.done()

    with daemon.connect() as other:
        other.save("web", State())
    run(work())
    assert daemon.phases() == {"web": "held"}


def test_a_mute_daemon_is_a_timeout_in_time(run: Run, daemon: DaemonProcess) -> None:
    async def work() -> None:
        async with cprd.asyncio.connect(daemon.path) as client:
            os.kill(daemon.pid, signal.SIGSTOP)
            try:
                with pytest.raises(cprd.Timeout):
                    await client.list(timeout=0.1)
            finally:
                os.kill(daemon.pid, signal.SIGCONT)
            assert await client.list() == []

    run(work())


def test_arguments_are_refused(run: Run, daemon: DaemonProcess) -> None:
    async def work() -> None:
        bad: Any = "soon"
        with pytest.raises(InvalidInput, match="timeout"):
            await cprd.asyncio.connect(daemon.path, timeout=bad)

    run(work())


async def _hand_over(client: cprd.asyncio.Daemon, fds: list[int]) -> None:
    """What has most kinds of steps."""
    await client.save("web", of(fds))
    async with client.load("web") as claim:
        await claim.renew()
    await client.save("web", of(fds))
    async with client.load("web", wait=5.0) as claim:
        await claim.confirm(next=of(fds), after_exit=False)


@pytest.mark.parametrize("late", [False, True], ids=["before", "while"])
def test_a_cancellation_at_each_step_leaves_no_claim_and_no_descriptor(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Before the step is begun, and while the step waits."""
    at = count = 0
    do = LoopConnection.do

    async def counted(line: LoopConnection, step: Step) -> Any:
        nonlocal count
        task = asyncio.current_task()
        assert task is not None
        count += task.get_name() == "hand-over"
        if count == at and task.get_name() == "hand-over":
            if late:
                asyncio.get_running_loop().call_soon(task.cancel)
            else:
                task.cancel()
        return await do(line, step)

    async def work() -> bool:
        nonlocal count
        count = 0
        client = await cprd.asyncio.connect(daemon.path)
        try:
            task = asyncio.create_task(_hand_over(client, fds), name="hand-over")
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait_for(task, PATIENCE)
            assert {row["phase"] for row in await client.list()} <= {"held"}
            with contextlib.suppress(NotHeld):
                async with client.load("web") as claim:
                    assert values(claim.state) == [1, 2, 3]
            return task.cancelled()
        finally:
            await client.close()

    monkeypatch.setattr(LoopConnection, "do", counted)
    run = run_on("asyncio")
    cancelled = 0
    with opened(3) as fds:
        assert not run(work())
        steps, before, theirs = count, open_fds(), daemon.fds()
        assert steps > 10
        for at in range(1, steps + 1):
            cancelled += run(work())
            assert open_fds() == before, f"step {at}"
    assert cancelled >= steps // 2
    until(lambda: daemon.fds() <= theirs, lambda: f"{daemon.fds()} descriptors in cprd")


def test_what_blocks_for_long_blocks_no_other_task(
    run: Run, daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Letting go of a claim's descriptors is done in a thread."""
    closing, go_on = threading.Event(), threading.Event()
    close: Callable[[State], None] = State.close

    def slow(state: State) -> None:
        closing.set()
        assert go_on.wait(PATIENCE)
        close(state)

    async def work() -> None:
        async with cprd.asyncio.connect(daemon.path) as client:
            await client.save("web", State())
            claim = await client.load("web")
            monkeypatch.setattr(State, "close", slow)
            leaving = asyncio.create_task(claim.close())
            assert await asyncio.to_thread(closing.wait, PATIENCE)
            leaving.cancel()
            await asyncio.sleep(0)
            assert not leaving.done()
            go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            monkeypatch.undo()
            with pytest.raises(InvalidInput, match="closed"):
                claim.state.take_fd("fd", 0)

    run(work())

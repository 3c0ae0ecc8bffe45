"""The live hold as a program sees it: real processes, a real cprd, blocking and on trio."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import ssl
import struct
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import trio

import cprd
import cprd.trio
from cprd import Busy, Fenced, InvalidInput, MissingKey, State
from cprd.daemon.counting import MOMENT
from cprd.linux.rights import close_all
from tests.daemon.test_sweep import stops
from tests.support.child import Child, Line
from tests.support.daemon import DaemonProcess
from tests.support.eventfds import opened, values
from tests.support.patience import PATIENCE, in_time, until

pytestmark = pytest.mark.usefixtures("nothing_leaks")


class Awaited:
    """A blocking LiveState, with the verbs that ask cprd awaited, as on trio."""

    def __init__(self, open: Callable[[], cprd.LiveState]) -> None:
        self._open = open

    async def __aenter__(self) -> Any:
        self.inner = self._open()
        self.inner.__enter__()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        self.inner.__exit__(*exc)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        if name not in ("confirm", "end", "close"):
            return found

        async def call(*arguments: Any, **options: Any) -> Any:
            return found(*arguments, **options)

        return call

    def __getitem__(self, key: str) -> Any:
        return self.inner[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.inner[key] = value

    def __delitem__(self, key: str) -> None:
        del self.inner[key]

    def __iter__(self) -> Any:
        return iter(self.inner)


Live = Callable[..., Any]


@pytest.fixture(params=["blocking", "trio"])
def live(request: pytest.FixtureRequest, daemon: DaemonProcess) -> Live:
    """live(name, ...) of either client, to be entered."""
    if request.param == "trio":
        return lambda name, **options: cprd.trio.live(name, daemon.path, **options)
    return lambda name, **options: Awaited(lambda: cprd.live(name, daemon.path, **options))


def row(daemon: DaemonProcess, name: str = "chat") -> dict[str, Any] | None:
    with daemon.connect() as client:
        return next((dict(row) for row in client.list() if row["name"] == name), None)


def phase(daemon: DaemonProcess, name: str = "chat") -> str | None:
    found = row(daemon, name)
    return None if found is None else str(found["phase"])


def keep_and_wait(line: Line, path: str, fds: list[int]) -> None:
    """A predecessor: keeps `fds` and sections, and waits for its end."""
    state = cprd.live("chat", path)
    state.confirm()
    state.save_fds("fd", enumerate(fds))
    state["small"] = {"a": [1, 2]}
    state["raw"] = b"r" * 10
    state["large"] = {"b": "c" * 10_000}
    state.memory("journal", 4096)[:5] = b"bytes"
    line.say("kept")
    line.hear()


# What is there afterwards


async def test_a_killed_server_loses_nothing(live: Live, daemon: DaemonProcess) -> None:
    with opened(300) as fds, Child(keep_and_wait, daemon.path, fds) as server:
        assert server.hear() == "kept"
        server.kill()
        async with live("chat", wait=PATIENCE) as state:
            assert state.found
            assert not state.confirmed
            assert state.attempts == 1
            assert state.last_end in ("killed by SIGKILL", "ended")  # as far as the kernel tells
            assert state.fd_keys() == [("fd", number) for number in range(300)]
            assert list(state) == ["small", "raw", "large"]
            assert state["small"] == {"a": [1, 2]}
            assert bytes(state["raw"]) == b"r" * 10
            assert state["large"] == {"b": "c" * 10_000}
            taken = state.take_fd("fd", 7)
            assert os.eventfd_read(taken) == 8
            os.eventfd_write(taken, 8)
            before = state.generation
            await state.confirm(strict=False)
            assert state.generation > before
            assert bytes(state.memory("journal", 4096)[:5]) == b"bytes"
            state.delete_fd("fd", 8)
            del state["raw"]
            state["small"] = 1
            os.close(taken)
        async with live("chat") as state:
            assert values(state) == [number + 1 for number in range(300) if number != 8]
            assert sorted(state) == ["large", "small"]
            assert state["small"] == 1
            await state.confirm()
            await state.end()
        assert phase(daemon) is None


async def test_memory_that_is_deleted_is_kept_no_longer(live: Live, daemon: DaemonProcess) -> None:
    async with live("chat") as state:
        state["x"] = 1
        view = state.memory("journal", 16)
        view[0] = 1
        state.delete_memory("journal")
        state.delete_memory("none")
        assert view[0] == 1
    async with live("chat") as state:
        assert list(state) == ["x"]
        await state.confirm(strict=False)
        assert bytes(state.memory("journal", 32)) == bytes(32)
        await state.end()


async def test_what_cannot_be_read_is_served_to_nobody_again(
    live: Live, daemon: DaemonProcess
) -> None:
    with Child(keep_garbage, daemon.path) as owner:
        owner.hear()
        owner.kill()
        with pytest.raises(cprd.Damaged, match="'chat' is damaged and will not be served again"):
            async with live("chat", wait=PATIENCE):
                pass
    assert phase(daemon) == "damaged"
    with pytest.raises(cprd.Damaged):
        async with live("chat"):
            pass
    with daemon.connect() as client:
        client.drop("chat", force=True)


def keep_garbage(line: Line, path: str) -> None:
    state = cprd.live("chat", path)
    state["x"] = 1
    (segment,) = state._live.writer()._ledger.pool.segments.values()
    assert segment.tx is not None
    segment.tx.send(b"garbage")
    line.say("kept")
    line.hear()


async def test_a_cold_start_has_the_name_at_once(live: Live, daemon: DaemonProcess) -> None:
    async with live("chat") as state:
        assert not state.found
        assert state.confirmed
        assert phase(daemon) == "live"
        with daemon.connect() as client:
            with pytest.raises(Busy) as caught:
                client.load("chat")
            assert (caught.value.pid, caught.value.phase) == (os.getpid(), "live")
        with pytest.raises(Busy, match="in this process already"):
            cprd.live("chat", daemon.path)
        with Child(second_starter, daemon.path) as other:
            assert other.hear() == f"Busy {os.getpid()}"
            await state.confirm()  # does nothing
            state["x"] = 1
            other.say("wait")
            until(lambda: other_waits(daemon), lambda: "nobody waits")
            await state.close()
            assert other.hear() == "found 1"
            other.wait()
    assert phase(daemon) == "held"


def other_waits(daemon: DaemonProcess) -> bool:
    """Whether the daemon has read the request of somebody who waits."""
    with daemon.connect() as client:
        return client.status()["connections"] >= 3


def second_starter(line: Line, path: str) -> None:
    try:
        cprd.live("chat", path)
    except Busy as error:
        line.say(f"Busy {error.pid}")
    line.hear()
    with cprd.live("chat", path, wait=PATIENCE) as state:
        state.confirm()
        line.say(f"found {state['x']}")


async def test_an_empty_hold_is_gone_with_its_owner(live: Live, daemon: DaemonProcess) -> None:
    async with live("chat") as state:
        state["x"] = 1
        del state["x"]
    assert phase(daemon) is None
    with contextlib.suppress(ZeroDivisionError):
        async with live("chat"):
            1 / 0  # noqa: B018
    assert phase(daemon) is None


async def test_what_a_killed_owner_left_empty_is_a_cold_start(
    live: Live, daemon: DaemonProcess
) -> None:
    with Child(keep_nothing, daemon.path, True) as owner:
        owner.hear()
        owner.kill()
        async with live("chat") as state:  # before cprd has counted
            assert (state.found, state.confirmed, state.attempts) == (False, True, 0)
            state["x"] = 1
        async with live("chat") as state:
            assert state.found
            await state.confirm(strict=False)
            await state.end()


def keep_nothing(line: Line, path: str, any_more: bool) -> None:
    state = cprd.live("chat", path)
    if any_more:
        state["x"] = 1
        del state["x"]
    line.say("ready")
    line.hear()


def test_what_was_left_empty_is_gone_though_somebody_claimed_first(daemon: DaemonProcess) -> None:
    with Child(keep_nothing, daemon.path, False) as owner, daemon.connect() as client:
        owner.hear()
        owner.kill()
        claim = client.load("chat")
        time.sleep(2 * MOMENT)  # cprd has looked, and found somebody
        claim.reject("not today")
        until(lambda: phase(daemon) is None, lambda: f"{row(daemon)}")


async def test_a_close_just_after_cprd_was_restarted_loses_nothing(
    live: Live, daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cprd.client.live.Live._watch", lambda _: None)  # comes too late
    async with live("chat") as state:
        state["n"] = 1
        daemon.restart()
    assert phase(daemon) == "held"
    async with live("chat") as state:
        assert state["n"] == 1
        await state.confirm()
        state["n"] = 2
        daemon.restart()
        state["n"] = 3
    async with live("chat") as state:
        assert state["n"] == 3
        await state.confirm()
        daemon.restart()
        await state.end()
    assert phase(daemon) is None


def test_each_number_of_free_descriptors_too_few_is_a_limit(daemon: DaemonProcess) -> None:
    def own(line: Line) -> None:
        free: list[int] = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        with contextlib.suppress(OSError):
            while True:
                free.append(os.dup(0))
        for _ in range(20):
            os.close(free.pop())
            try:
                with cprd.live("chat", daemon.path) as state:
                    if state.found:  # saved below, by a try that was then one descriptor short
                        state.confirm()
                    state["n"] = 1
                    state.confirm()
                    state.end()
                with cprd.connect(daemon.path) as client:
                    client.save("chat", State())
                with warnings.catch_warnings(), cprd.live("chat", daemon.path) as state:
                    warnings.simplefilter("error")
                    state.confirm()
                    state.end()
                line.say("enough")
                return
            except cprd.LimitExceeded:
                pass
            except RuntimeWarning as error:
                assert "is confirmed" in str(error)  # noqa: PT017
            # The thread that watches cprd closes its own in a moment.
            until(lambda: threading.active_count() == 1, lambda: "a thread is left")
        line.say("never enough")

    with Child(own) as owner:
        assert owner.hear() == "enough"
    until(lambda: phase(daemon) is None, lambda: f"{row(daemon)}")


def test_inside_a_batch_all_is_as_its_end_will_leave_it(daemon: DaemonProcess) -> None:
    with cprd.live("chat", daemon.path) as state, opened(3) as fds:
        state.save_fd("fd", 0, fds[0])
        state.save_fd("fd", 1, fds[1])
        with state.batch():
            state.delete_fd("fd", 0)
            state.save_fd("fd", 2, fds[2])
            state.save_fd("fd", 1, fds[0], replace=True)
            assert not state.has_fd("fd", 0)
            assert state.has_fd("fd", 2)
            assert state.fd_keys() == [("fd", 1), ("fd", 2)]
        assert state.fd_keys() == [("fd", 1), ("fd", 2)]
        state.end()


def test_what_is_closed_inside_a_batch_is_refused_and_not_another_file_kept(
    daemon: DaemonProcess,
) -> None:
    with cprd.live("chat", daemon.path) as state, opened(1) as fds:
        state["n"] = 1
        for other in (-1, fds[0]):
            number = -1

            def keep(other: int = other) -> None:
                nonlocal number
                with state.batch():
                    number = os.open("/dev/null", os.O_RDONLY)
                    state.save_fd("fd", 0, number)
                    state["n"] = 2
                    os.close(number)
                    if other >= 0:
                        os.dup2(other, number)

            with pytest.raises(InvalidInput, match="was closed inside the batch"):
                keep()
            if other >= 0:
                os.close(number)
        assert state["n"] == 1
        assert not state.has_fd("fd", 0)
        state.end()


def test_a_pattern_of_another_uid_finds_what_is_left(daemon: DaemonProcess) -> None:
    if os.getuid():
        pytest.skip("only root speaks for other uids")
    for _ in range(2):
        with cprd.live("1000/worker.*", daemon.path) as state:
            assert state.name == "1000/worker.1"
            state.confirm()
            state["n"] = 1


async def test_before_confirm_nothing_changes_and_all_goes_back(
    live: Live, daemon: DaemonProcess
) -> None:
    with opened(20) as fds, Child(keep_and_wait, daemon.path, fds) as server:
        server.hear()
        server.kill()
        for number in range(3):
            with contextlib.suppress(ZeroDivisionError):
                async with live("chat", wait=PATIENCE) as state:
                    assert state.attempts == number + 1
                    os.close(state.take_fd("fd", 3))
                    changes: tuple[Callable[[], object], ...] = (
                        lambda: state.save_fd("new", 0, 0),
                        lambda: state.delete_fd("fd", 1),
                        lambda: state.__setitem__("x", 1),
                        lambda: state.__delitem__("small"),
                        lambda: state.memory("journal", 4096),
                        state.leave,
                    )
                    for change in changes:
                        with pytest.raises(InvalidInput, match="confirm"):
                            change()
                    with pytest.raises(InvalidInput, match="confirm"), state.batch():
                        raise AssertionError
                    if number:
                        1 / 0  # noqa: B018
            assert phase(daemon) == "held"
        async with live("chat") as state:
            assert "ZeroDivisionError" in state.last_reject
            assert values(state) == list(range(1, 21))
            await state.confirm()


async def test_what_was_saved_is_taken_live_and_what_was_live_is_loaded(
    live: Live, daemon: DaemonProcess
) -> None:
    with opened(300) as fds, daemon.connect() as client:
        saved = State()
        saved.save_fds("fd", enumerate(fds))
        saved["small"] = [1]
        saved["middle"] = b"m" * 10_000
        saved["large"] = {"l": "l" * 50_000}
        client.save("chat", saved)
        async with live("chat") as state:
            assert state.found
            os.close(state.take_fd("fd", 0))  # what the program does with it is its own affair
            await state.confirm()
            assert len(state.fd_keys()) == 300
            state["new"] = 2
            state.memory("journal", 8)[:] = b"01234567"
        with client.load("chat") as claim:
            assert values(claim.state) == list(range(1, 301))
            assert claim.state["small"] == [1]
            assert claim.state["new"] == 2
            assert bytes(claim.state["middle"]) == b"m" * 10_000
            assert claim.state["large"] == {"l": "l" * 50_000}
            assert bytes(claim.state["memory.journal"]) == b"01234567"
            claim.reject("not yet")
        async with live("chat") as state:
            await state.confirm()
            assert bytes(state.memory("journal", 8)) == b"01234567"
            await state.end()
        assert client.list() == []


def test_more_large_sections_than_a_live_hold_begins_with_are_taken_live(
    daemon: DaemonProcess,
) -> None:
    state = State()
    for number in range(600):
        state[f"s{number}"] = bytes([number % 256]) * 5000
    with opened(1) as fds:
        state.save_fd("fd", fds[0])
        with daemon.connect() as client:
            client.save("chat", state)
        with cprd.live("chat", daemon.path) as live:
            live.confirm()
            live["s7"] = b"7" * 5000  # no more than before
            del live["s8"]
            live["s9"] = 9
            live["new"] = b"n" * 5000
            with pytest.raises(cprd.LimitExceeded, match="the limit is"):
                live.update({f"more {number}": b"m" * 5000 for number in range(8)})
    with cprd.live("chat", daemon.path) as live:
        found = [key for key in live if not key.startswith("more")]
        assert sorted(found) == sorted({f"s{n}" for n in range(600)} - {"s8"} | {"new"})
        for number in range(10, 600):
            assert bytes(live[f"s{number}"]) == bytes([number % 256]) * 5000
        assert (bytes(live["s7"]), live["s9"]) == (b"7" * 5000, 9)
        live.confirm()
        live.end()


async def test_what_nobody_asked_for_is_said(live: Live, daemon: DaemonProcess) -> None:
    with opened(3) as fds, Child(keep_and_wait, daemon.path, fds) as server:
        server.hear()
        server.kill()
        left = r"\('fd', 1\), \('fd', 2\), section 'raw'"
        with pytest.raises(InvalidInput, match=left):  # noqa: PT012
            async with live("chat", wait=PATIENCE) as state:
                os.close(state.take_fd("fd", 0))
                assert state["small"]
                assert state["large"]
                await state.confirm(strict=True)
        async with live("chat") as state:
            assert state.untaken()[0] == ("fd", 0)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                await state.confirm()
            (warning,) = said
            assert "('fd', 0), ('fd', 1)" in str(warning.message)
            assert "stay kept" in str(warning.message)
            await state.end()


def test_a_claim_says_what_ended_with_it(daemon: DaemonProcess) -> None:
    with opened(3) as fds, daemon.connect() as client:
        state = State()
        state.save_fds("fd", enumerate(fds))
        state["x"] = 1
        client.save("web", state)
        with (  # noqa: PT012
            pytest.raises(InvalidInput, match=r"\('fd', 1\), section 'x' of 'web' were never"),
            client.load("web") as claim,
        ):
            os.close(claim.state.take_fd("fd", 0))
            assert claim.state.find_fd("fd", 2) >= 0
            claim.confirm(strict=True)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with client.load("web") as claim:
                close_all(claim.state.take_fds("fd").values())
                took = claim
        (warning,) = said
        assert "section 'x' of 'web' were never asked for" in str(warning.message)
        assert warning.filename == __file__
        with pytest.raises(InvalidInput, match="is closed"):
            took.state["x"]


# Verbs


async def test_keys_of_what_is_kept_and_of_what_was_taken(live: Live) -> None:
    with opened(4) as fds:
        async with live("chat") as state:
            state.save_fd("a", fds[0])
            state.save_fd("b", 5, fds[1])
            with pytest.raises(InvalidInput, match="is used already"):
                state.save_fd("b", 5, fds[2])
            state.save_fd("b", 5, fds[2], replace=True)
            assert state.fd_keys() == [("a", 0), ("b", 5)]
            assert state.fd_keys("b") == [("b", 5)]
            assert state.has_fd("a")
            assert not state.has_fd("a", 1)
            with pytest.raises(MissingKey, match="this process has the descriptor"):
                state.take_fd("a")
            with pytest.raises(MissingKey, match="no descriptor under"):
                state.take_fd("c", 1)
            assert state.take_fd("a", default=-1) == -1
            with pytest.raises(MissingKey, match="no section 'x'"):
                state["x"]
            with pytest.raises(InvalidInput, match=r"x\.a: msgpack cannot say a set"):
                state["x"] = {"a": {1}}
            state["x"] = {"a": 1}
            state["x"]["a"] = 2
            assert state["x"] == {"a": 1}  # a copy: what is kept
            state["big"] = b"x" * 5000
            assert os.pread(state.section_fd("big"), 3, 0) == b"xxx"
            assert os.pread(state.section_fd("x"), 9, 0) == b"\x81\xa1a\x01"
            memfd = os.dup(state.section_fd("big"))
            state.save_section_fd("again", memfd)
            os.close(memfd)
            assert bytes(state["again"]) == b"x" * 5000
        async with live("chat") as state:
            assert os.eventfd_read(state.find_fd("b", 5)) == 3
            found = [(name, id) for name, id, _ in state.fds("b")]
            assert found == [("b", 5)]
            assert sorted(state) == ["again", "big", "x"]
            await state.confirm()
            state.delete_fd("b", 5)  # the copy that nobody took is closed with the key
            assert state.find_fd("b", 5) == -1
            await state.end()


async def test_a_batch_is_there_as_a_whole_or_not_at_all(live: Live, daemon: DaemonProcess) -> None:
    with opened(6) as fds:
        async with live("chat") as state:
            state.save_fd("old", fds[0])
            state["x"] = 0
            with pytest.raises(ZeroDivisionError), state.batch():  # noqa: PT012
                state.save_fd("new", fds[1])
                state.delete_fd("old")
                state["x"] = b"y" * 5000
                assert len(state["x"]) == 5000  # this task sees what will be
                other = threading.Thread(target=state.save_fd, args=("other", fds[2]))
                other.start()
                other.join()
                1 / 0  # noqa: B018
            assert state.fd_keys() == [("old", 0), ("other", 0)]
            assert state["x"] == 0
            with state.batch() as inner:
                inner.save_fd("new", fds[1])
                state.delete_fd("old")
                state["x"] = b"y" * 5000
                state["gone"] = 1
                del state["gone"]
                with state.batch():
                    state["z"] = 1
                assert list(state) == ["x", "z"]
            assert state.fd_keys() == [("other", 0), ("new", 0)]
            assert (len(state["x"]), state["z"]) == (5000, 1)
            state.save_fds("many", {4: fds[4], 5: fds[5]})
            with pytest.raises(InvalidInput):
                state.save_fds("many", [(6, fds[1]), (5, fds[1])])
            assert state.fd_keys("many") == [("many", 4), ("many", 5)]
            await state.end()


def test_threads_share_it(daemon: DaemonProcess) -> None:
    with opened(1) as (fd,), cprd.live("chat", daemon.path) as state:

        def work(name: str) -> None:
            for number in range(200):
                state.save_fd(name, number, fd)
                state[f"{name}.{number % 7}"] = number
                if number % 2:
                    state.delete_fd(name, number)

        threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for name in "abcd":
            assert state.fd_keys(name) == [(name, number) for number in range(0, 200, 2)]
            assert state[f"{name}.3"] == 199
        state.end()


def test_a_forked_child_has_no_part_in_it(daemon: DaemonProcess) -> None:
    with opened(2) as fds, cprd.live("chat", daemon.path) as state:
        state.save_fd("a", fds[0])

        def child(line: Line) -> None:
            for use in (
                lambda: state.save_fd("b", fds[1]),
                lambda: state.delete_fd("a"),
                lambda: state.take_fd("a"),
                lambda: state.__setitem__("x", 1),
                lambda: state["x"],
                state.confirm,
                state.end,
            ):
                with pytest.raises(InvalidInput, match=r"fork|parent"):
                    use()
            state.close()
            with state:
                pass
            line.say("done")

        with Child(child) as forked:
            assert forked.hear() == "done"
            assert forked.wait() == 0
        state.save_fd("b", fds[1])
        assert state.fd_keys() == [("a", 0), ("b", 0)]
        state.end()


def test_tls_is_refused_with_advice(daemon: DaemonProcess) -> None:
    context = ssl.create_default_context()
    one, other = socket.socketpair()
    with one, other:
        tls = context.wrap_socket(one, server_hostname="x", do_handshake_on_connect=False)
        with tls, cprd.live("chat", daemon.path) as state:
            with pytest.raises(InvalidInput, match=r"SSLSocket.* cannot be handed over: the keys"):
                state.save_fd("client", 1, tls)
            with pytest.raises(InvalidInput, match="Save the listener"):
                State().save_fd("client", 1, tls)


def test_any_left_worker_or_the_next_number(daemon: DaemonProcess) -> None:
    with opened(1) as (fd,), contextlib.ExitStack() as stack, daemon.connect() as client:

        def open() -> cprd.LiveState:
            state = stack.enter_context(client.live("worker.*"))
            state.confirm()
            return state

        workers = [open() for _ in range(3)]
        assert [worker.name for worker in workers] == ["worker.1", "worker.2", "worker.3"]
        for worker in workers:
            worker.save_fd("x", fd)
        workers[1].close()
        again = open()
        assert (again.name, again.found) == ("worker.2", True)
        fourth = open()
        assert (fourth.name, fourth.found) == ("worker.4", False)
        for worker in (workers[0], workers[2], again, fourth):
            worker.end()
        assert client.list() == []


# The end of a connection


def pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    one.settimeout(PATIENCE)
    return one, other


async def test_the_peer_sees_the_end_at_once_and_not_before(live: Live) -> None:
    peer, mine = pair()
    with peer:
        async with live("chat") as state:
            with opened(500) as fds:
                state.save_fds("fd", enumerate(fds))
            state.save_fd("client", 7, mine)
            state.delete_fd("client", 7)
            began = time.monotonic()
            mine.close()
            assert peer.recv(1) == b""
            assert in_time(time.monotonic() - began, 0.1)
            await state.end()
    peer, mine = pair()
    with peer:
        async with live("chat") as state:
            state.save_fd("client", 7, mine)
            mine.close()
            peer.settimeout(0.05)
            with pytest.raises(TimeoutError):
                peer.recv(1)
        peer.settimeout(PATIENCE)
        async with live("chat") as state:
            with state.take_socket("client", 7) as taken:
                assert taken.gettimeout() is None
                await state.confirm()
                taken.sendall(b"back")
                assert peer.recv(4) == b"back"
            await state.end()
        assert peer.recv(1) == b""


def on_trio(line: Line, path: str, sock: socket.socket) -> None:
    """Serves on trio, and closes politely once it has left."""

    async def main() -> None:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        async with cprd.trio.live("chat", path) as state:
            state.save_fd("client", 7, sock)
            assert await stream.receive_some(2) == b"hi"
            state.leave()
            with pytest.raises(InvalidInput, match="leave"):
                state.delete_fd("client", 7)
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(b"goodbye")
            with contextlib.suppress(OSError, trio.BrokenResourceError):
                await stream.send_eof()
            await stream.aclose()

    trio.run(main)
    line.say("left")


def on_asyncio(line: Line, path: str, sock: socket.socket) -> None:
    """The same with streams of asyncio."""
    import asyncio

    async def main() -> None:
        sock.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=sock)
        with cprd.live("chat", path) as state:
            state.save_fd("client", 7, sock)
            assert await reader.readexactly(2) == b"hi"
            state.leave()
            writer.write(b"goodbye")
            with contextlib.suppress(OSError):
                writer.write_eof()
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    asyncio.run(main())
    line.say("left")


def by_threads(line: Line, path: str, sock: socket.socket) -> None:
    """The same with a plain socket and a copy of it."""
    copy = sock.dup()
    with cprd.live("chat", path) as state:
        state.save_fd("client", 7, sock)
        assert sock.recv(2) == b"hi"
        state.leave()
        for each in (sock, copy):
            with pytest.raises(BrokenPipeError):
                each.sendall(b"goodbye")
            each.shutdown(socket.SHUT_RDWR)
            each.close()
    line.say("left")


@pytest.mark.parametrize("serve", [on_trio, on_asyncio, by_threads])
def test_whoever_has_left_says_nothing_to_a_peer(
    daemon: DaemonProcess, serve: Callable[..., None]
) -> None:
    peer, mine = pair()
    with peer, Child(serve, daemon.path, mine) as server:
        mine.close()
        peer.sendall(b"hi")
        assert server.hear() == "left"
        assert server.wait() == 0
        with cprd.live("chat", daemon.path, wait=PATIENCE) as state:
            assert state.found
            with state.take_socket("client", 7) as taken:
                state.confirm()
                peer.sendall(b"on")
                assert taken.recv(2) == b"on"
                taken.sendall(b"and on")
                assert peer.recv(100) == b"and on"  # and nothing before it
            state.end()


async def test_letting_go_of_a_lingering_socket_blocks_no_loop(daemon: DaemonProcess) -> None:
    peer, mine = pair()
    with peer:
        async with cprd.trio.live("chat", daemon.path) as state:
            mine.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
            mine.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    mine.send(b"x" * 65536)
            state.save_fd("client", 7, mine)
            mine.close()  # before delete_fd, which is now the last close, and waits for the peer
            began = time.monotonic()
            state.delete_fd("client", 7)
            assert in_time(time.monotonic() - began, 1)
            state["other"] = 1
            assert state.fd_keys() == []
            while peer.recv(1 << 20):
                pass
            await state.end()


async def test_cancelled_while_waiting_it_has_nothing(daemon: DaemonProcess) -> None:
    with opened(1) as fds, Child(keep_and_wait, daemon.path, fds) as server:
        server.hear()
        with trio.move_on_after(0.1) as scope:
            await cprd.trio.live("chat", daemon.path, wait=PATIENCE)
        assert scope.cancelled_caught
        with pytest.raises(Busy, match="in use by pid"):
            await cprd.trio.live("chat", daemon.path, wait=0.05)
        server.kill()
        async with cprd.trio.live("chat", daemon.path, wait=PATIENCE) as state:
            assert state.attempts == 1
            await state.confirm()
            await state.end()


def test_what_does_not_fit_costs_no_attempt(daemon: DaemonProcess) -> None:
    with opened(300) as fds, Child(keep_and_wait, daemon.path, fds) as server:
        server.hear()
        server.kill()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
        try:
            for _ in range(3):
                with pytest.raises(cprd.LimitExceeded, match="RLIMIT_NOFILE"):
                    cprd.live("chat", daemon.path, wait=PATIENCE)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        with cprd.live("chat", daemon.path) as state:
            assert state.attempts == 1
            state.confirm()
            state.end()


# Taken away, put back


def test_dropped_by_force_its_owner_is_fenced_for_good(daemon: DaemonProcess) -> None:
    with opened(2) as fds, cprd.live("chat", daemon.path) as state:
        state.save_fd("a", fds[0])
        with daemon.connect() as client:
            with pytest.raises(Busy):
                client.drop("chat")
            client.drop("chat", force=True)
        for _ in range(2):
            with pytest.raises(Fenced):
                state.save_fd("b", fds[1])
            with pytest.raises(Fenced):
                state["x"] = 1
    assert phase(daemon) is None


def change_until_fenced(line: Line, path: str) -> None:
    state = cprd.live("chat", path)
    state["n"] = 0
    line.say("began")
    number = 0
    try:
        while True:
            number += 1
            state["n"] = number
            if number == 100:
                line.say("going on")
    except Fenced:
        line.say(f"fenced {number}")
    with pytest.raises(Fenced):
        state.save_fd("a", 0)


def test_stopped_while_dropped_it_acknowledges_nothing_afterwards(daemon: DaemonProcess) -> None:
    with Child(change_until_fenced, daemon.path) as owner:
        assert owner.hear() == "began"
        assert owner.hear() == "going on"
        os.kill(owner.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, owner.pid, os.WSTOPPED | os.WNOWAIT)
        with daemon.connect() as client:
            client.drop("chat", force=True)
        with cprd.live("chat", daemon.path) as state:  # the name is free, for another
            assert not state.found
            state["n"] = "mine"
            os.kill(owner.pid, signal.SIGCONT)
            assert owner.hear().startswith("fenced ")
            assert owner.wait() == 0
            assert state["n"] == "mine"
            state.end()


def test_a_cprd_that_is_stopped_or_upgraded_delays_no_change(new_daemon: DaemonProcess) -> None:
    with opened(50) as fds, Child(keep_on_command, new_daemon.path, fds) as owner:
        assert owner.hear() == "began"
        os.kill(new_daemon.pid, signal.SIGSTOP)
        owner.say("10")
        assert owner.hear() == "kept 10"
        os.kill(new_daemon.pid, signal.SIGCONT)
        seen = len(new_daemon.log())
        os.kill(new_daemon.pid, signal.SIGHUP)
        owner.say("20")
        assert owner.hear() == "kept 20"
        new_daemon.await_log("ready ", since=seen)
        owner.say("30")
        assert owner.hear() == "kept 30"
        owner.kill()
        with cprd.live("chat", new_daemon.path, wait=PATIENCE) as state:
            assert [os.eventfd_read(fd) for _, _, fd in state.fds()] == [*range(1, 31)]
            state.confirm()
            state.end()


def keep_on_command(line: Line, path: str, fds: list[int]) -> None:
    """Keeps the first N descriptors each time that N is told."""
    state = cprd.live("chat", path)
    line.say("began")
    while True:
        wanted = int(line.hear())
        for number in range(len(state.fd_keys()), wanted):
            state.save_fd("fd", number, fds[number])
        line.say(f"kept {wanted}")


async def test_a_cprd_in_memory_is_given_the_hold_back(
    new_daemon: DaemonProcess,
) -> None:
    for open in (
        lambda: cprd.trio.live("chat", new_daemon.path, wait=PATIENCE),
        lambda: Awaited(lambda: cprd.live("chat", new_daemon.path, wait=PATIENCE)),
    ):
        with opened(3) as fds:
            async with open() as state:
                assert state.kept == "memory"
                state.save_fd("a", fds[0])
                for number in range(3):
                    new_daemon.kill()
                    state[f"while nobody was there {number}"] = number
                    new_daemon.start()
                    with Child(second_starter, new_daemon.path) as other:
                        assert other.hear() == f"Busy {os.getpid()}"
                    with trio.fail_after(PATIENCE):
                        while not is_back(new_daemon):
                            await trio.sleep(0.01)
                state["more"] = 1
            assert phase(new_daemon) == "held"
            async with open() as state:
                assert state.fd_keys() == [("a", 0)]
                assert len(list(state)) == 4
                await state.confirm()
                await state.end()


def is_back(daemon: DaemonProcess) -> bool:
    found = row(daemon)
    return found is not None and "put it back" not in found["reason"]


def test_killed_after_its_cprd_was_it_loses_nothing(new_daemon: DaemonProcess) -> None:
    with opened(3) as fds, Child(keep_and_wait, new_daemon.path, fds) as server:
        server.hear()
        new_daemon.restart()
        until(lambda: is_back(new_daemon), lambda: "not put back")
        server.kill()
        with cprd.live("chat", new_daemon.path, wait=PATIENCE) as state:
            assert [os.eventfd_read(fd) for _, _, fd in state.fds()] == [1, 2, 3]
            assert state["small"] == {"a": [1, 2]}
            state.confirm()
            state.end()


@pytest.mark.parametrize("left", ["live", "saved"])
@pytest.mark.parametrize("how", ["confirm", "leave"])
async def test_what_was_claimed_outlives_a_cprd_in_memory(
    new_daemon: DaemonProcess, how: str, left: str
) -> None:
    for open in (
        lambda: cprd.trio.live("chat", new_daemon.path, wait=PATIENCE),
        lambda: Awaited(lambda: cprd.live("chat", new_daemon.path, wait=PATIENCE)),
    ):
        with opened(3) as fds:
            leave(new_daemon.path, fds, left)
            async with open() as state:
                assert state.found
                taken = state.take_fd("fd", 2)  # given back all the same
                os.close(taken)
                for _ in range(2):
                    new_daemon.restart()
                    with Child(second_starter, new_daemon.path) as other:
                        assert other.hear() == f"Busy {os.getpid()}"
                if how == "confirm":
                    await state.confirm()
                    state["mine"] = 1
            assert phase(new_daemon) == "held"
            async with open() as state:
                assert [os.eventfd_read(fd) for _, _, fd in state.fds()] == [1, 2, 3]
                assert state["small"] == {"a": [1, 2]}
                assert state["large"] == {"b": "c" * 10_000}
                assert ("mine" in state) == (how == "confirm")
                await state.confirm()
                await state.end()
            assert phase(new_daemon) is None
            assert not os.listdir(new_daemon.path + ".live")


def leave(path: str, fds: list[int], how: str) -> None:
    """What keep_and_wait keeps, by a process that has ended, or by save()."""
    if how == "live":
        with Child(keep_and_wait, path, fds) as server:
            server.hear()
            server.kill()
        return
    state = State()
    state.save_fds("fd", enumerate(fds))
    state["small"] = {"a": [1, 2]}
    state["large"] = {"b": "c" * 10_000}
    with cprd.connect(path) as daemon:
        daemon.save("chat", state)


def test_a_claimant_that_dies_after_its_cprd_frees_the_name(new_daemon: DaemonProcess) -> None:
    with opened(3) as fds, Child(claim_and_wait, new_daemon.path) as claimant:
        leave(new_daemon.path, fds, "live")
        claimant.say()
        assert claimant.hear() == "claimed"
        new_daemon.restart()
        claimant.kill()
    with cprd.live("chat", new_daemon.path, wait=PATIENCE) as state:
        assert not state.found


def claim_and_wait(line: Line, path: str) -> None:
    line.hear()
    state = cprd.live("chat", path, wait=PATIENCE)
    line.say("claimed")
    line.hear()
    try:
        state.confirm()
        line.say("confirmed")
    except Fenced:
        line.say("Fenced")
    line.hear()


def test_a_claim_that_was_over_does_not_come_back_with_another_cprd(
    new_daemon: DaemonProcess,
) -> None:
    with opened(3) as fds, Child(claim_and_wait, new_daemon.path) as claimant:
        leave(new_daemon.path, fds, "live")
        claimant.say()
        assert claimant.hear() == "claimed"
        with new_daemon.connect() as client:
            client.drop("chat", force=True)
        new_daemon.restart()
        with cprd.live("chat", new_daemon.path) as state:  # nobody has the name
            assert not state.found
            claimant.say()
            assert claimant.hear() == "Fenced"
            assert state.has_fd("none") is False


def test_an_interrupted_or_late_confirm_can_be_repeated(
    start_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon = start_daemon(env={"CPRD_PAUSE": "daemon:confirmed"})
    with opened(2) as fds, Child(keep_and_wait, daemon.path, fds) as server:
        server.hear()
        server.kill()
        with cprd.live("chat", daemon.path, wait=PATIENCE) as state:
            with pytest.raises(cprd.Timeout):
                state.confirm(timeout=0.2)
            assert not state.confirmed
            stops(daemon.pid)  # which may come after the timeout, too
            os.kill(daemon.pid, signal.SIGCONT)
            state.confirm()
            assert state.confirmed
            state["x"] = 1
        with cprd.live("chat", daemon.path) as state:
            assert state["x"] == 1
            state.confirm()
            state.end()

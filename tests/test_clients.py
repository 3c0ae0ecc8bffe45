"""Both clients, blocking and on trio, through the same battery.

`Blocking` gives the blocking client the manners of the other, so that each test is written once,
with await."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import ExitStack
from typing import Any

import pytest
import trio

import cprd
import cprd.trio
from cprd import (
    AlreadyHeld,
    Busy,
    Fenced,
    InvalidInput,
    NotHeld,
    State,
    Timeout,
    Unavailable,
    link,
    wire,
)

from .conftest import DaemonProcess, until
from .test_bundle import of, opened, values

pytestmark = pytest.mark.usefixtures("nothing_leaks")


class Blocking:
    """An object of the blocking client, whose methods can be awaited and entered with async."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            return _Doing(lambda: found(*arguments, **options))

        return call

    @property
    def aclose(self) -> Any:
        return self.close

    async def __aenter__(self) -> Blocking:
        self._inner.__enter__()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        self._inner.__exit__(*exc)


class _Doing:
    def __init__(self, do: Callable[[], Any]) -> None:
        self._do = do

    def _done(self) -> Any:
        made = self._do()
        known = (cprd.Daemon, cprd.Claim, cprd.Prepared)
        return Blocking(made) if isinstance(made, known) else made

    def __await__(self) -> Generator[None, None, Any]:
        yield from ()
        return self._done()

    async def __aenter__(self) -> Any:
        self._made = self._done()
        return await self._made.__aenter__()

    async def __aexit__(self, *exc: Any) -> None:
        await self._made.__aexit__(*exc)


Connect = Callable[..., Any]


@pytest.fixture(params=["blocking", "trio"])
def connect(request: pytest.FixtureRequest, daemon: DaemonProcess) -> Connect:
    """connect(path=None) of either client, to be awaited or entered."""
    if request.param == "trio":
        return lambda path=daemon.path: cprd.trio.connect(path)
    return lambda path=daemon.path: _Doing(lambda: cprd.connect(path))


def phases(daemon: DaemonProcess) -> dict[str, str]:
    with daemon.connect() as client:
        return {row["name"]: row["phase"] for row in client.list()}


# The surface


async def test_a_whole_hand_over(connect: Connect, daemon: DaemonProcess) -> None:
    with opened(300) as fds:
        async with connect() as client:
            state = of(fds)
            state["sessions"] = {"a": [1, 2]}
            saved = await client.save("web", state)
            assert saved.kept == "memory"
            assert saved.generation > 0
            (row,) = await client.list()
            wanted = {"name": "web", "generation": saved.generation, "phase": "held", "fds": 300}
            assert wanted.items() <= row.items()
            assert row["uid"] == os.getuid()
            async with client.load("web") as claim:
                assert (claim.generation, claim.attempts) == (saved.generation, 1)
                assert claim.last_reject == ""
                assert values(claim.state) == list(range(1, 301))
                assert claim.state["sessions"] == {"a": [1, 2]}
                taken = claim.state.take_fd("fd", 7)
                assert (await client.list())[0]["phase"] == "claimed"
            assert await client.list() == []
            assert os.eventfd_read(taken) == 8
            os.close(taken)


async def test_every_verb_answers(connect: Connect, daemon: DaemonProcess) -> None:
    async with connect() as client:
        assert client.greeting["version"] == 1
        assert client.greeting["lease_by"] == ["connection", "process", "time"]
        with pytest.raises(NotHeld):
            await client.load("web")
        with pytest.raises(NotHeld):
            await client.wait("web", 0.01)
        with pytest.raises(NotHeld):
            await client.drop("web")
        state = State()
        state.save_fd("null", 3, 0)
        state["n"] = 7
        state["raw"] = b"x" * 20_000
        await client.save("web", state, ttl=600)
        shown = await client.show("web")
        assert [(row["name"], row["id"]) for row in shown["descriptors"]] == [("null", 3)]
        kinds = {row["key"]: (row["kind"], row["bytes"]) for row in shown["sections"]}
        assert kinds == {"n": ("msgpack", 1), "raw": ("memfd", 20_000)}
        assert shown["bytes"] == 20_001
        assert 0 < shown["expires"] <= 600
        assert await client.wait("web", 0.01) == shown["generation"]
        with pytest.raises(AlreadyHeld, match="held already"):
            await client.save("web", State())
        status = await client.status()
        assert status["pid"] == daemon.pid
        assert status["phases"] == {"held": 1}
        assert await client.release("web") == shown["generation"]  # nothing is wrong with it
        assert await client.drop("web") == shown["generation"]
        assert await client.list() == []


async def test_prepare_is_not_served_before_commit(connect: Connect) -> None:
    async with connect() as client, connect() as other:
        await client.save("web", State())
        prepared = await client.prepare("web", State(), if_exists="replace")
        with pytest.raises(Busy, match="has not committed yet"):
            await other.load("web")
        await prepared.abort()
        with pytest.raises(Fenced):
            await prepared.commit()
        prepared = await client.prepare("web", State(), if_exists="replace")
        saved = await prepared.commit()
        assert saved.generation == prepared.generation
        async with other.load("web") as claim:
            assert claim.generation == saved.generation
        with pytest.raises(NotHeld):
            await other.load("web")


async def test_bad_arguments_are_refused_before_anything_happens(connect: Connect) -> None:
    async with connect() as client:
        for name in ("", "a/b/c", ".hidden", "x" * 256, "a\nb", "x/web", 7, None, b"web"):
            for verb in (client.load, client.drop, client.release, client.show):
                with pytest.raises(InvalidInput, match="name"):
                    await verb(name)
            with pytest.raises(InvalidInput, match="name"):
                await client.save(name, State())
        for bad in (-1, float("nan"), float("inf"), 1e12, True, "1"):
            with pytest.raises(InvalidInput, match="wait"):
                await client.load("web", wait=bad)
            with pytest.raises(InvalidInput, match="lease"):
                await client.load("web", lease=bad)
            with pytest.raises(InvalidInput, match="ttl"):
                await client.save("web", State(), ttl=bad)
        with pytest.raises(InvalidInput, match="if_exists"):
            await client.save("web", State(), if_exists="overwrite")
        with pytest.raises(InvalidInput, match="require"):
            await client.save("web", State(), require="disk")
        with pytest.raises(cprd.LimitExceeded, match="require"):
            await client.save("web", State(), require="store")
        with pytest.raises(InvalidInput, match="not a pidfd"):
            await client.save("web", State(), after_exit=0)
        assert await client.list() == []


async def test_the_generation_that_was_asked_for_or_none(connect: Connect) -> None:
    async with connect() as client:
        first = await client.save("web", State())
        second = await client.save("web", State(), if_exists="replace")
        with pytest.raises(Fenced, match=str(second.generation)):
            await client.load("web", generation=first.generation)
        async with client.load("web", generation=second.generation):
            pass


# How a block ends


class Mishap(Exception):
    pass


@pytest.mark.parametrize("error", [Mishap, SystemExit, KeyboardInterrupt, GeneratorExit])
async def test_an_exception_in_the_block_rejects(
    connect: Connect, daemon: DaemonProcess, error: type[BaseException]
) -> None:
    async with connect() as client:
        await client.save("web", State())
        with pytest.raises(error):
            async with client.load("web"):
                raise error("no good")
        async with client.load("web") as claim:
            assert claim.attempts == 2
            assert claim.last_reject == f"{error.__name__}: no good"
    assert phases(daemon) == {}


async def test_an_exception_of_a_megabyte_rejects_too(connect: Connect) -> None:
    async with connect() as client:
        await client.save("web", State())
        with pytest.raises(Mishap):
            async with client.load("web"):
                raise Mishap("\u20ac" * 1_000_000 + "\ud800")
        assert "rejected: Mishap" in (await client.list())[0]["reason"]


@pytest.mark.parametrize("error", [Mishap, SystemExit, KeyboardInterrupt])
async def test_after_begin_an_exception_leaves_it_in_doubt(
    connect: Connect, daemon: DaemonProcess, error: type[BaseException]
) -> None:
    async with connect() as client:
        await client.save("web", State())
        with pytest.raises(error):  # noqa: PT012
            async with client.load("web") as claim:
                await claim.begin()
                raise error
        assert phases(daemon) == {"web": "in-doubt"}
        with pytest.raises(Busy, match="in doubt"):
            await client.load("web")
    assert phases(daemon) == {"web": "in-doubt"}
    async with connect() as client:
        await client.release("web")
        async with client.load("web"):
            pass


async def test_after_begin_only_an_explicit_reject_gives_it_back(connect: Connect) -> None:
    async with connect() as client:
        await client.save("web", State())
        async with client.load("web") as claim:
            await claim.begin()
            await claim.reject("nothing ran")
        assert (await client.list())[0]["phase"] == "held"
        async with client.load("web") as claim:
            await claim.begin()
        assert await client.list() == []  # leaving the block confirms


async def test_a_begin_that_is_refused_has_not_begun(
    connect: Connect, daemon: DaemonProcess
) -> None:
    async with connect() as client:
        await client.save("web", State())
        with pytest.raises(InvalidInput, match="not a pidfd"):
            async with client.load("web") as claim:
                await claim.begin(process=0)
        assert phases(daemon) == {"web": "held"}


async def test_begin_names_who_acts(connect: Connect, daemon: DaemonProcess) -> None:
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    pidfd = os.pidfd_open(child)
    try:
        async with connect() as client:
            await client.save("web", State())
            claim = await client.load("web")
            await claim.begin(process=pidfd)
            (row,) = await client.list()
            assert row["acting"] == child
            assert f"pid {child} acts on it" in row["reason"]
            await claim.confirm()
            await claim.aclose()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(pidfd)


async def test_closing_an_unconfirmed_claim_gives_it_back(
    connect: Connect, daemon: DaemonProcess
) -> None:
    with opened(3) as fds:
        async with connect() as client:
            await client.save("web", of(fds))
            claim = await client.load("web")
            await claim.aclose()
            await claim.aclose()  # safe to repeat
            (row,) = await client.list()
            assert row["phase"] == "held"
            assert row["last_reject"] == "closed without confirm"
            for verb in (claim.confirm, claim.reject):
                with pytest.raises(Fenced):
                    await verb()


async def test_confirm_alone_closes_nothing(connect: Connect) -> None:
    with opened(3) as fds:
        async with connect() as client:
            state = of(fds)
            state["raw"] = b"x" * 50_000
            await client.save("web", state)
            claim = await client.load("web")
            view = claim.state["raw"]
            await claim.confirm()
            assert values(claim.state) == [1, 2, 3]
            assert view[0] == ord("x")
            with pytest.raises(Fenced):
                await claim.confirm()
            await claim.aclose()
            assert claim.state.fd_count == 0
            with pytest.raises(ValueError, match="released"):
                view[0]


async def test_confirm_with_a_next_state_leaves_no_moment_without_a_hold(
    connect: Connect, daemon: DaemonProcess
) -> None:
    with opened(3) as fds:
        async with connect() as client, connect() as other:
            await client.save("web", of(fds))
            claim = await client.load("web")
            saved = await claim.confirm(next=claim.state)
            await claim.aclose()
            assert saved.generation > claim.generation
            with pytest.raises(Busy, match=f"pid {os.getpid()}, has not ended"):
                await other.load("web")  # after_exit is True unless asked otherwise
            await client.drop("web")
            await client.save("web", of(fds))
            async with client.load("web") as claim:
                saved = await claim.confirm(next=of(fds), after_exit=False, ttl=60)
            async with other.load("web") as claim:
                assert claim.generation == saved.generation
                assert values(claim.state) == [1, 2, 3]


async def test_a_claim_outlives_the_block_of_its_connection(
    connect: Connect, daemon: DaemonProcess
) -> None:
    with opened(3) as fds:
        async with connect() as client:
            await client.save("web", of(fds))
            claim = await client.load("web")
        assert phases(daemon) == {"web": "claimed"}
        with pytest.raises(Busy):
            with daemon.connect() as other:
                other.load("web")
        await claim.renew(9.0)
        assert values(claim.state) == [1, 2, 3]
        await claim.confirm()
        await claim.aclose()
        assert phases(daemon) == {}


async def test_a_prepared_save_outlives_the_block_of_its_connection(
    connect: Connect, daemon: DaemonProcess
) -> None:
    async with connect() as client:
        prepared = await client.prepare("web", State())
    assert phases(daemon) == {"web": "prepared"}
    await prepared.commit()
    assert phases(daemon) == {"web": "held"}


async def test_a_closed_connection_says_so(connect: Connect) -> None:
    async with connect() as client:
        pass
    with pytest.raises(Unavailable, match="closed"):
        await client.list()


async def test_a_lease_that_is_over_fences(connect: Connect) -> None:
    async with connect() as client:
        await client.save("web", State())
        claim = await client.load("web", lease=0.05)
        assert await client.wait("web", 10.0) == claim.generation
        for verb in (claim.confirm, claim.renew, claim.begin):
            with pytest.raises(Fenced, match="lease"):
                await verb()
        await claim.aclose()
        assert "lease of 0.05 s is over" in (await client.list())[0]["last_reject"]


async def test_waiting_ends_with_the_answer_that_load_would_give(connect: Connect) -> None:
    async with connect() as client, connect() as other:
        with pytest.raises(NotHeld):
            await client.load("web", wait=0.05)
        await client.save("web", State())
        async with client.load("web"):
            with pytest.raises(Busy, match="claimed by"):
                await other.load("web", wait=0.05)
            with pytest.raises(Busy, match="claimed by"):
                await other.wait("web", 0.05)


async def test_who_waits_gets_it_when_it_comes(connect: Connect, daemon: DaemonProcess) -> None:
    with opened(400) as fds:
        saver = threading.Timer(0.1, lambda: _save(daemon, of(fds)))
        saver.start()
        async with connect() as client:
            async with client.load("web", wait=20.0) as claim:
                assert values(claim.state) == list(range(1, 401))
        saver.join()


def _save(daemon: DaemonProcess, state: State) -> None:
    with daemon.connect() as client:
        client.save("web", state)


# The daemon is gone, restarted, or mute


async def test_nobody_there_is_unavailable_at_once(
    connect: Connect, daemon: DaemonProcess, tmp_path: Any
) -> None:
    start = time.monotonic()
    for path in (str(tmp_path / "none.sock"), "/dev/null", "/" + "x" * 200):
        with pytest.raises(Unavailable, match="start it"):
            await connect(path)
    daemon.kill()
    with pytest.raises(Unavailable, match="start it"):
        await connect()
    assert time.monotonic() - start < 5.0
    daemon.start()


async def test_requests_go_on_with_a_restarted_daemon(
    connect: Connect, daemon: DaemonProcess
) -> None:
    async with connect() as client:
        await client.save("web", State())
        daemon.restart()
        assert await client.list() == []  # it kept them in memory
        daemon.restart()
        await client.save("web", State())
        daemon.restart()
        with pytest.raises(NotHeld):
            await client.load("web")


async def test_a_request_waits_for_a_daemon_that_is_being_restarted(
    connect: Connect, daemon: DaemonProcess
) -> None:
    async with connect() as client:
        daemon.kill()
        back = threading.Timer(0.3, daemon.start)
        back.start()
        assert await client.list() == []
        back.join()


async def test_a_daemon_that_stays_away_is_unavailable_after_a_while(
    connect: Connect, daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "RETRY_FOR", 0.3)
    async with connect() as client:
        claim_name = await client.save("web", State())
        daemon.kill()
        with pytest.raises(Unavailable):
            await client.list()
        assert claim_name.generation
    daemon.start()


async def test_a_claim_whose_daemon_forgot_it_is_fenced(
    connect: Connect, daemon: DaemonProcess
) -> None:
    with opened(2) as fds:
        async with connect() as client:
            await client.save("web", of(fds))
            claim = await client.load("web")
            daemon.restart()
            with pytest.raises(Fenced):
                await claim.confirm()
            await claim.aclose()


async def test_a_mute_daemon_is_a_timeout(
    connect: Connect, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "MUTE", 0.2)
    path = str(tmp_path / "mute.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(path)
        sock.listen(8)
        start = time.monotonic()
        with pytest.raises(Timeout, match="accepted the connection and has not answered"):
            await connect(path)
        assert time.monotonic() - start < 5.0


async def test_a_daemon_that_falls_silent_is_a_timeout_and_no_answer_is_taken_for_another(
    connect: Connect, daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connect() as client:
        await client.save("web", State())
        os.kill(daemon.pid, signal.SIGSTOP)
        monkeypatch.setattr(wire, "MUTE", 0.2)
        try:
            with pytest.raises(Timeout):
                await client.status()
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        monkeypatch.undo()
        assert [row["name"] for row in await client.list()] == ["web"]


def hang_up_on_all(sock: socket.socket) -> None:
    """Until the listener is shut down."""
    while True:
        try:
            sock.accept()[0].close()
        except OSError:
            return


async def test_a_listener_that_hangs_up_is_unavailable(connect: Connect, tmp_path: Any) -> None:
    path = str(tmp_path / "rude.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(path)
        sock.listen(8)
        rude = threading.Thread(target=hang_up_on_all, args=(sock,))
        rude.start()
        try:
            with pytest.raises(Unavailable, match="before it said hello"):
                await connect(path)
        finally:
            sock.shutdown(socket.SHUT_RDWR)
            rude.join()


async def test_a_full_backlog_is_waited_for(connect: Connect, tmp_path: Any) -> None:
    """A socket that is set not to block would be refused at once."""
    path = str(tmp_path / "busy.sock")
    with ExitStack() as stack:
        sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        sock.bind(path)
        sock.listen(0)
        with pytest.raises(BlockingIOError):  # noqa: PT012
            for _ in range(3):
                one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                stack.enter_context(one)
                one.setblocking(False)
                one.connect(path)
        rude = threading.Timer(0.1, hang_up_on_all, (sock,))
        rude.start()
        try:
            with pytest.raises(Unavailable, match="before it said hello"):
                await connect(path)
        finally:
            sock.shutdown(socket.SHUT_RDWR)
            rude.join()


# fork


async def test_leaving_blocks_in_a_forked_child_does_nothing(
    connect: Connect, daemon: DaemonProcess
) -> None:
    with opened(2) as fds:
        async with connect() as client:
            await client.save("web", of(fds))
            await client.save("other", State())
            prepared = await client.prepare("third", State())
            claim = await client.load("web")
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    await claim.__aexit__(None, None, None)
                    await claim.__aexit__(Mishap, Mishap(), None)
                    await claim.aclose()
                    await client.__aexit__(None, None, None)
                    try:
                        await client.list()
                    except InvalidInput as error:
                        status = 0 if "belongs to the parent" in str(error) else 2
                finally:
                    os._exit(status)
            assert os.waitpid(child, 0)[1] == 0
            assert phases(daemon) == {"web": "claimed", "other": "held", "third": "prepared"}
            assert values(claim.state) == [1, 2]
            await claim.confirm()
            await claim.aclose()
            await prepared.commit()
            assert {row["name"] for row in await client.list()} == {"other", "third"}


def test_garbage_collection_in_a_forked_child_does_nothing(daemon: DaemonProcess) -> None:
    with opened(2) as fds, daemon.connect() as client:
        client.save("web", of(fds))
        everything: list[Any] = [daemon.connect(), client.prepare("new", State())]
        everything.append(everything[0].load("web"))
        child = os.fork()
        if child == 0:
            everything.clear()
            gc.collect()
            os._exit(0)
        os.waitpid(child, 0)
        assert phases(daemon) == {"web": "claimed", "new": "prepared"}
        everything[2].confirm()
        everything[1].commit()
        everything[2].close()
        everything[0].close()
        everything.clear()
        assert phases(daemon) == {"new": "held"}


def test_a_child_that_keeps_the_connection_does_not_keep_the_claim(daemon: DaemonProcess) -> None:
    """The claim ends with its process, whatever its children hold open."""
    hear, say = os.pipe()
    with daemon.connect() as client:
        client.save("web", State())
        parent = os.fork()
        if parent == 0:
            try:
                claim = daemon.connect().load("web")
                child = os.fork()
                if child == 0:
                    signal.pause()
                os.write(say, f"{child} {claim.generation}".encode())
                os.kill(os.getpid(), signal.SIGKILL)
            finally:
                os._exit(1)
        child = int(os.read(hear, 100).split()[0])
        os.waitpid(parent, 0)
        try:
            assert client.wait("web", 10.0)
            assert f"pid {parent} did not confirm" in client.list()[0]["last_reject"]
        finally:
            os.kill(child, signal.SIGKILL)
            os.close(hear)
            os.close(say)


def test_what_is_forgotten_is_let_go_by_garbage_collection(daemon: DaemonProcess) -> None:
    with opened(2) as fds, daemon.connect() as client:
        client.save("web", of(fds))
        daemon.connect().load("web")
        gc.collect()
        assert client.wait("web", 10.0)
        prepared = daemon.connect().prepare("new", State())
        assert prepared.generation
        del prepared
        gc.collect()
        until(lambda: phases(daemon)["new"] == "in-doubt", lambda: repr(phases(daemon)))


# Of trio's client only


async def test_a_cancelled_block_rejects(daemon: DaemonProcess) -> None:
    async with cprd.trio.connect(daemon.path) as client:
        await client.save("web", State())
        with trio.move_on_after(0.1) as scope:
            async with client.load("web"):
                await trio.sleep_forever()
        assert scope.cancelled_caught
        (row,) = await client.list()
        assert (row["phase"], row["attempts"]) == ("held", 1)
        assert "Cancelled" in row["last_reject"]


async def test_a_cancelled_wait_claims_nothing_and_the_client_goes_on(
    daemon: DaemonProcess,
) -> None:
    async with cprd.trio.connect(daemon.path) as client:
        with trio.move_on_after(0.1):
            await client.load("web", wait=60.0)
        await client.save("web", State())
        async with client.load("web") as claim:
            assert claim.attempts == 1


async def test_requests_of_several_tasks_take_turns(daemon: DaemonProcess) -> None:
    async with cprd.trio.connect(daemon.path) as client:

        async def work(number: int) -> None:
            for turn in range(5):
                await client.save(f"web{number}.{turn}", State())
                async with client.load(f"web{number}.{turn}") as claim:
                    assert claim.attempts == 1

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(work, number)
        assert await client.list() == []


def test_connecting_is_awaited_or_entered() -> None:
    assert isinstance(cprd.trio.connect("/nowhere"), Awaitable)

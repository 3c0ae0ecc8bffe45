"""All clients, blocking, on trio and on asyncio, through the same battery.

`Blocking` and `OnAsyncio` give a client the manners of the client on trio, so that each test is
written once, with await."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import trio
import trio.testing

import cprd
import cprd.asyncio
import cprd.trio
from cprd import AlreadyHeld, Busy, Fenced, InvalidInput, NotHeld, State, Timeout, Unavailable
from cprd.bundle import unpack as bundles
from cprd.client import claim as claims
from cprd.client import exchange, verbs
from cprd.linux.rights import scm_fds
from cprd.protocol import messages
from tests.support.daemon import DaemonProcess
from tests.support.descriptors import open_fds
from tests.support.eventfds import of, opened, values
from tests.support.loops import runner
from tests.support.patience import PATIENCE, in_time, patience, until

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
            return self.doing(lambda: found(*arguments, **options))

        return call

    def doing(self, do: Callable[[], Any]) -> _Doing:
        return _Doing(do)

    def leaving(self, *exc: Any) -> _Doing:
        """The end of the block."""
        return self.doing(lambda: self._inner.__exit__(*exc))

    async def __aenter__(self) -> Blocking:
        self._inner.__enter__()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self.leaving(*exc)


class OnAsyncio(Blocking):
    """An object of the client on asyncio, whose loop runs while a method does."""

    def __init__(self, inner: Any, runner: asyncio.Runner) -> None:
        self._inner = inner
        self._runner = runner

    def doing(self, do: Callable[[], Any]) -> _Doing:
        return _DoingOnAsyncio(do, self._runner)

    def leaving(self, *exc: Any) -> _Doing:
        return self.doing(lambda: self._inner.__aexit__(*(exc or (None, None, None))))

    async def __aenter__(self) -> OnAsyncio:
        await self.doing(self._inner.__aenter__)
        return self


class _Doing:
    def __init__(self, do: Callable[[], Any]) -> None:
        self._do = do

    def _done(self) -> Any:
        made = self._do()
        known = (cprd.Daemon, cprd.Claim, cprd.Prepared)
        return Blocking(made) if isinstance(made, known) else made

    def interrupted(self, after: float) -> None:
        before = signal.signal(signal.SIGALRM, _interrupted)
        signal.setitimer(signal.ITIMER_REAL, after)
        try:
            with pytest.raises(Interrupt):
                self._done()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def __await__(self) -> Generator[None, None, Any]:
        yield from ()
        return self._done()

    async def __aenter__(self) -> Any:
        self._made = self._done()
        return await self._made.__aenter__()

    async def __aexit__(self, *exc: Any) -> None:
        await self._made.__aexit__(*exc)


class _DoingOnAsyncio(_Doing):
    def __init__(self, do: Callable[[], Any], runner: asyncio.Runner) -> None:
        self._do = do
        self._runner = runner

    def _done(self, cancel_after: float | None = None) -> Any:
        async def work() -> Any:
            task = asyncio.current_task()
            assert task is not None
            if cancel_after is not None:
                asyncio.get_running_loop().call_later(cancel_after, self._cancel, task)
            made = await maybe(self._do())
            await asyncio.sleep(0)  # where a cancellation that was held back arrives
            return made

        made = self._runner.run(work())
        known = (cprd.asyncio.Daemon, cprd.asyncio.Claim, cprd.asyncio.Prepared)
        return OnAsyncio(made, self._runner) if isinstance(made, known) else made

    def interrupted(self, after: float) -> None:
        with pytest.raises(asyncio.CancelledError):
            self._done(after)

    def _cancel(self, task: asyncio.Task[Any]) -> None:
        task.cancel()
        HAPPENED.set()


Connect = Callable[..., Any]


@pytest.fixture(
    params=[
        *("blocking", "trio"),
        pytest.param("asyncio", marks=pytest.mark.full),
        pytest.param("uvloop", marks=pytest.mark.full),
    ]
)
def connect(request: pytest.FixtureRequest, daemon: DaemonProcess) -> Iterator[Connect]:
    """connect(path=None) of either client, to be awaited or entered."""
    if request.param == "trio":
        yield lambda path=daemon.path: cprd.trio.connect(path)
    elif request.param == "blocking":
        yield lambda path=daemon.path: _Doing(lambda: cprd.connect(path))
    else:
        with runner(request.param) as running:
            running.get_loop()
            yield lambda path=daemon.path: _DoingOnAsyncio(
                lambda: cprd.asyncio.connect(path), running
            )


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
        assert client.greeting["version"] == messages.VERSION
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


async def test_what_is_no_argument_is_invalid_input(
    connect: Connect, daemon: DaemonProcess
) -> None:
    closed = os.dup(0)
    os.close(closed)
    bad: Any
    async with connect() as client:
        await client.save("web", State())
        for bad in (None, [], "0"):
            with pytest.raises(InvalidInput, match="wait wants seconds"):
                await client.load("web", wait=bad)
            with pytest.raises(InvalidInput, match="lease wants seconds"):
                await client.load("web", lease=bad)
            with pytest.raises(InvalidInput, match="timeout wants seconds"):
                await client.wait("web", bad)
        for bad in (-1, "7", 1 << 64, 1.5, True):
            with pytest.raises(InvalidInput, match="generation"):
                await client.load("web", generation=bad)
        for bad in (None, {}, "state"):
            with pytest.raises(InvalidInput, match=r"wants a cprd\.State"):
                await client.save("other", bad)
            with pytest.raises(InvalidInput, match=r"wants a cprd\.State"):
                await client.prepare("other", bad)
        for bad in (closed, -1, 1 << 40, "0", object()):
            with pytest.raises(InvalidInput, match="descriptor"):
                await client.save("other", State(), after_exit=bad)
        for bad in (1, None, "yes"):
            with pytest.raises(InvalidInput, match="force"):
                await client.drop("web", force=bad)
            with pytest.raises(InvalidInput, match="force"):
                await client.release("web", force=bad)
        claim = await client.load("web")
        with pytest.raises(InvalidInput, match="descriptor"):
            await claim.begin(process=closed)
        with pytest.raises(InvalidInput, match=r"wants a cprd\.State"):
            await claim.confirm(next={})
        with pytest.raises(InvalidInput, match="descriptor"):
            await claim.confirm(next=State(), after_exit=closed)
        with pytest.raises(InvalidInput, match="why"):
            await claim.reject(7)
        await claim.confirm()
        await claim.close()
        assert await client.list() == []


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
    assert daemon.phases() == {}


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
        assert daemon.phases() == {"web": "in-doubt"}
        with pytest.raises(Busy, match="in doubt"):
            await client.load("web")
    assert daemon.phases() == {"web": "in-doubt"}
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


@pytest.mark.parametrize("closed", [False, True])  # the connection, too
@pytest.mark.parametrize("end", ["reject", "confirm"])
async def test_what_was_left_in_doubt_is_ended_by_a_late_word(
    connect: Connect, daemon: DaemonProcess, end: str, closed: bool
) -> None:
    with opened(2) as fds:
        async with connect() as client:
            await client.save("web", of(fds))
            with pytest.raises(Mishap):  # noqa: PT012
                async with client.load("web") as claim:
                    await claim.begin()
                    raise Mishap
            if closed:
                await client.close()
            assert daemon.phases() == {"web": "in-doubt"}
            if end == "reject":
                await claim.reject("nothing ran")
                assert daemon.phases() == {"web": "held"}
            else:
                await claim.confirm()
                assert daemon.phases() == {}
            for verb in (claim.reject, claim.confirm):
                with pytest.raises(Fenced, match="already"):
                    await verb()


@pytest.mark.parametrize("how", ["save", "commit", "save after begin"])
@pytest.mark.parametrize("alias", ["web", f"{os.getuid()}/web"])
async def test_a_claimant_that_replaces_its_own_hold_has_confirmed(
    connect: Connect, daemon: DaemonProcess, how: str, alias: str
) -> None:
    with opened(2) as fds:
        async with connect() as client:
            await client.save("web", of(fds[:1]))
            async with client.load("web") as claim:
                if how == "save after begin":
                    await claim.begin()
                await client.save("another", State())
                if how == "commit":
                    prepared = await client.prepare(alias, of(fds), if_exists="replace")
                    await prepared.commit()
                else:
                    await client.save(alias, of(fds), if_exists="replace")
                with pytest.raises(Fenced, match="confirmed"):
                    await claim.confirm()
            assert daemon.phases() == {"web": "held", "another": "held"}
            async with client.load("web") as claim:
                assert values(claim.state) == [1, 2]
            with pytest.raises(Mishap):  # noqa: PT012
                async with client.load("another"):
                    await client.save("another", of(fds), if_exists="replace")
                    raise Mishap
            (row,) = await client.list()
            assert (row["phase"], row["attempts"], row["fds"]) == ("held", 0, 2)


async def test_giving_back_that_fails_ends_the_connection_of_the_claim(
    connect: Connect, daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> exchange.Call:
        raise cprd.LimitExceeded("for a test")

    async with connect() as client:
        await client.save("web", State())
        await client.save("other", State())
        monkeypatch.setattr(claims, "rejection", failing)
        with pytest.raises(Mishap):
            async with client.load("web"):
                raise Mishap
        until(lambda: daemon.phases()["web"] == "held", lambda: repr(daemon.phases()))
        async with client.load("other"):
            with pytest.raises(Mishap):
                async with client.load("web"):
                    raise Mishap
            # Another claim hangs on that connection, which ends after that claim.
            assert daemon.phases() == {"web": "claimed", "other": "claimed"}
        until(lambda: daemon.phases() == {"web": "held"}, lambda: repr(daemon.phases()))


async def test_an_interrupt_while_a_state_is_read_gives_it_back(
    connect: Connect, daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unpack(fd: int) -> State:
        raise KeyboardInterrupt

    with opened(2) as fds:
        async with connect() as client:
            await client.save("web", of(fds))
            with monkeypatch.context() as patch:
                patch.setattr(verbs, "unpack", unpack)
                with pytest.raises(KeyboardInterrupt):
                    await client.load("web")
            (row,) = await client.list()
            assert (row["phase"], row["attempts"]) == ("held", 1)
            assert row["last_reject"] == "KeyboardInterrupt: "


async def test_a_hold_that_was_dropped_while_it_is_read_is_not_called_damaged(
    connect: Connect, daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unpack(fd: int) -> State:
        with daemon.connect() as operator:
            operator.drop("web", force=True)
        until(lambda: not scm_fds(fd), lambda: "cprd has not emptied the bundle")
        return bundles.unpack(fd)

    with opened(2) as fds:
        async with connect() as client:
            await client.save("web", of(fds))
            with monkeypatch.context() as patch:
                patch.setattr(verbs, "unpack", unpack)
                with pytest.raises(Fenced, match="has ended"):
                    await client.load("web")


async def test_a_begin_that_is_refused_has_not_begun(
    connect: Connect, daemon: DaemonProcess
) -> None:
    async with connect() as client:
        await client.save("web", State())
        with pytest.raises(InvalidInput, match="not a pidfd"):
            async with client.load("web") as claim:
                await claim.begin(process=0)
        assert daemon.phases() == {"web": "held"}


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
            await claim.close()
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
            await claim.close()
            await claim.close()  # safe to repeat
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
            await claim.close()
            with pytest.raises(InvalidInput, match="this state is closed"):
                claim.state.take_fd("fd", 0)
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
            await claim.close()
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
        assert daemon.phases() == {"web": "claimed"}
        with pytest.raises(Busy):
            with daemon.connect() as other:
                other.load("web")
        await claim.renew(9.0)
        assert values(claim.state) == [1, 2, 3]
        await claim.confirm()
        await claim.close()
        assert daemon.phases() == {}


async def test_a_prepared_save_outlives_the_block_of_its_connection(
    connect: Connect, daemon: DaemonProcess
) -> None:
    async with connect() as client:
        prepared = await client.prepare("web", State())
    assert daemon.phases() == {"web": "prepared"}
    await prepared.commit()
    assert daemon.phases() == {"web": "held"}


async def test_a_closed_connection_says_so(connect: Connect) -> None:
    async with connect() as client:
        pass
    with pytest.raises(Unavailable, match="closed"):
        await client.list()


async def test_a_lease_that_is_over_fences(connect: Connect) -> None:
    async with connect() as client:
        await client.save("web", State())
        claim = await client.load("web", lease=0.1)
        assert await client.wait("web", 10.0) == claim.generation
        for verb in (claim.confirm, claim.renew, claim.begin):
            with pytest.raises(Fenced, match="lease"):
                await verb()
        await claim.close()
        assert "lease of 0.1 s is over" in (await client.list())[0]["last_reject"]


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


async def test_a_save_that_fails_in_its_midst_leaves_nothing_open_anywhere(
    connect: Connect, daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A descriptor closed meanwhile, an interrupt, a refusal: a tree of sockets that is half
    filled goes, and the connection serves on."""

    class Interrupt(BaseException):
        pass

    def interrupt(name: str) -> None:
        if name == at:
            raise Interrupt

    errors = {
        **{"closed": InvalidInput, "pack:sent": Interrupt, "pack:parked": Interrupt},
        "refused": AlreadyHeld,
    }
    at = ""
    async with connect() as client:
        with opened(2) as fds:
            prepared = await client.prepare("web", of(fds))
            base, ours = daemon.fds(), open_fds()
            for how, error in errors.items():
                near, far = socket.socketpair()
                with far, opened(1000) as many, monkeypatch.context() as patch:
                    state = of([*many, near.fileno()])
                    if how == "closed":
                        last = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 1
                        closed = fcntl.fcntl(0, fcntl.F_DUPFD, last)  # no loop takes it
                        state.save_fd("closed", 0, closed)
                        os.close(closed)
                    elif how.startswith("pack:"):
                        at = how
                        patch.setattr("cprd.bundle.pack.point", interrupt)
                    with near, pytest.raises(error):
                        await client.save("web", state)
                    far.settimeout(PATIENCE)
                    assert far.recv(1) == b"", how
                daemon.await_fds(base)
                assert open_fds() == ours, how
            await prepared.commit()
            async with client.load("web") as claim:
                assert values(claim.state) == [1, 2]


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
    assert in_time(time.monotonic() - start, 5.0)
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


async def test_a_daemon_restarted_while_a_save_parks_gets_all_of_it(
    connect: Connect, daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And whoever waits for it, on a connection that is lost, gets it."""

    def at(name: str) -> None:
        if name == "pack:manifest" and threading.current_thread() is saver:
            daemon.restart()

    with opened(1000) as fds, daemon.connect() as other:
        saver = threading.Timer(0.1, lambda: other.save("web", of(fds)))
        with monkeypatch.context() as patch:
            patch.setattr("cprd.bundle.pack.point", at)
            saver.start()
            async with connect() as client:
                async with client.load("web", wait=20.0) as claim:
                    assert values(claim.state) == list(range(1, 1001))
            saver.join()


async def test_a_daemon_that_stays_away_is_unavailable_after_a_while(
    connect: Connect, daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "RETRY_FOR", 0.3)
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
            await claim.close()


async def test_a_mute_daemon_is_a_timeout(
    connect: Connect, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "MUTE", 0.2)
    path = str(tmp_path / "mute.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(path)
        sock.listen(8)
        start = time.monotonic()
        with pytest.raises(Timeout, match="accepted the connection and has not answered"):
            await connect(path)
        assert in_time(time.monotonic() - start, 5.0)


async def test_a_daemon_that_falls_silent_is_a_timeout_and_no_answer_is_taken_for_another(
    connect: Connect, daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connect() as client:
        await client.save("web", State())
        os.kill(daemon.pid, signal.SIGSTOP)
        monkeypatch.setattr(messages, "MUTE", 0.2)
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


# One request is refused, or interrupted


async def test_a_request_that_is_refused_as_no_request_leaves_the_connection(
    connect: Connect, daemon: DaemonProcess
) -> None:
    async with connect() as client:
        await client.save("web", State())
        await client.save("other", State())
        async with client.load("web") as claim:
            before = inside(client).fileno()

            def hello() -> Generator[exchange.Call, Any, None]:
                yield exchange.hello()

            with pytest.raises(cprd.ProtocolError, match="hello was said already"):
                await client_run(client, hello())
            assert inside(client).fileno() == before
            assert {row["phase"] for row in await client.list()} == {"held", "claimed"}
            await claim.renew()


async def test_an_answer_that_cannot_be_read_ends_its_connection(
    connect: Connect, tmp_path: Any
) -> None:
    def serve(listener: socket.socket) -> None:
        with listener.accept()[0] as sock:
            sock.recv(1000)
            greeting = messages.ok(**GREETING)
            sock.send(messages.encode(greeting))
            sock.recv(1000)
            sock.send(b"\xc1 noise")
            assert sock.recv(1000) == b""

    path = str(tmp_path / "noisy.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen(8)
        server = threading.Thread(target=serve, args=(listener,))
        server.start()
        async with connect(path) as client:
            with pytest.raises(cprd.ProtocolError, match="not an answer"):
                await client.list()
            server.join(PATIENCE)
            assert not server.is_alive()
            assert inside(client).fileno() == -1


def inside(thing: Any) -> Any:
    """The object of the client itself."""
    return thing._inner if isinstance(thing, Blocking) else thing


async def client_run(client: Any, verb: Any) -> Any:
    if isinstance(client, Blocking):
        return await client.doing(lambda: inside(client)._line.run(verb))
    return await client._line.run(verb)


async def maybe(result: Any) -> Any:
    return await result if isinstance(result, Awaitable) else result


class Interrupt(BaseException):
    """What a signal raises, as KeyboardInterrupt; of ours, so that trio leaves it alone."""


HAPPENED = threading.Event()  # the interrupt


def _interrupted(*_: Any) -> None:
    HAPPENED.set()
    raise Interrupt


async def _cancel(scope: trio.CancelScope, after: float) -> None:
    await trio.sleep(after)  # (any moment in which it waits for the answer will do)
    scope.cancel()
    HAPPENED.set()


async def interrupted(start: Callable[[], Any], after: float = 0.1) -> None:
    """Have something interrupted while it goes on: cancelled, or in the blocking client by a
    signal."""
    doing = start()
    if not isinstance(doing, _Doing):
        with trio.CancelScope() as scope:
            trio.lowlevel.spawn_system_task(_cancel, scope, after)
            await doing
        assert scope.cancel_called
        return
    doing.interrupted(after)


@contextmanager
def asleep(daemon: DaemonProcess) -> Iterator[None]:
    """The daemon hears nothing until the interrupt has happened, and then all of it."""
    HAPPENED.clear()
    os.kill(daemon.pid, signal.SIGSTOP)
    waker = threading.Thread(target=wake, args=(daemon,))
    waker.start()
    try:
        yield
    finally:
        HAPPENED.set()
        waker.join()


def wake(daemon: DaemonProcess) -> None:
    HAPPENED.wait(PATIENCE)
    os.kill(daemon.pid, signal.SIGCONT)


GREETING: dict[str, Any] = {
    **{"version": messages.VERSION, "server": "cprd", "uid": os.getuid(), "pid": os.getpid()},
    **{"lease_by": ["connection"], "kept": "memory", "limits": {}},
}
REQUESTS: dict[str, Callable[[Any, Any], Any]] = {
    "list": lambda client, _: client.list(),
    "save": lambda client, _: client.save("new", State()),
    "prepare": lambda client, _: client.prepare("new", State()),
    "load": lambda client, _: client.load("other"),
    "load what is not there": lambda client, _: client.load("nothing"),
    "wait to load": lambda client, _: client.load("nothing", wait=60.0),
    "wait to load what is there": lambda client, _: client.load("other", wait=60.0),
    "wait": lambda client, _: client.wait("nothing", 60.0),
    "renew": lambda _, claim: claim.renew(),
    "begin": lambda _, claim: claim.begin(),
}


@pytest.mark.parametrize("closed", [False, True])  # the block of the connection
@pytest.mark.parametrize("what", REQUESTS)
async def test_an_interrupted_request_ends_no_claim(
    connect: Connect, daemon: DaemonProcess, what: str, closed: bool
) -> None:
    with opened(2) as fds:
        async with connect() as client:
            await client.save("web", of(fds))
            await client.save("third", State())
            await client.save("other", of(fds))
            prepared = await client.prepare("fourth", State())
            third = await client.load("third", wait=1.0)
            claim = await client.load("web")
            if closed:
                await client.close()
            with asleep(daemon):
                await interrupted(lambda: REQUESTS[what](client, claim))
            seen = daemon.phases()
            until(lambda: daemon.phases()["other"] == "held", lambda: repr(seen))
            assert seen["web"] == ("in-doubt" if what == "begin" else "claimed")
            assert seen["third"] == "claimed"
            assert seen["fourth"] == "prepared"
            assert ("new" in seen) == (what == "save")
            assert await claim.renew() == (0.0 if what == "begin" else 30.0)
            await claim.confirm()
            await prepared.commit()
            await third.reject()
            await claim.close()
            await third.close()
        seen = daemon.phases()
        seen.pop("new", None)
        assert seen == {"other": "held", "third": "held", "fourth": "held"}
        with daemon.connect() as other, other.load("other") as last:
            assert values(last.state) == [1, 2]


async def test_a_begin_interrupted_before_it_was_sent_does_not_keep_the_claim(
    connect: Connect, daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connect() as client:
        await client.save("web", State())
        claim = await client.load("web")

        def interrupted(*_: Any, **__: Any) -> Any:
            raise Interrupt

        with monkeypatch.context() as patch:
            patch.setattr(exchange, "request", interrupted)
            with pytest.raises(Interrupt):
                await claim.begin()
        await claim.close()
        until(lambda: daemon.phases()["web"] == "held", lambda: repr(daemon.phases()))


async def test_an_interrupted_load_is_given_back_where_nothing_else_is_open(
    connect: Connect, daemon: DaemonProcess
) -> None:
    async with connect() as client:
        await client.save("web", State())
        with asleep(daemon):
            await interrupted(lambda: client.load("web"))
        until(lambda: daemon.phases()["web"] == "held", lambda: repr(daemon.phases()))
        with asleep(daemon):
            await interrupted(lambda: client.prepare("new", State()))
        assert daemon.phases() == {"web": "held"}


async def test_a_load_interrupted_after_it_was_done_is_given_back(
    connect: Connect, start_daemon: Callable[..., DaemonProcess]
) -> None:
    daemon = start_daemon(env={"CPRD_PAUSE": "daemon:claimed#2"})
    async with connect(daemon.path) as client:
        await client.save("web", State())
        await client.save("other", State())
        async with client.load("web"):
            waker = wake_when_it_stands(daemon)
            await interrupted(lambda: client.load("other"), 0.3)
            waker.join()
            until(lambda: daemon.phases()["other"] == "held", lambda: repr(daemon.phases()))
            rows = {row["name"]: row for row in await client.list()}
            assert rows["other"]["last_reject"] == "interrupted"
            assert rows["other"]["attempts"] == 1
    assert daemon.phases() == {"other": "held"}


def wake_when_it_stands(daemon: DaemonProcess) -> threading.Thread:
    """Let a daemon that stops at its pause point go on, after the interrupt."""
    HAPPENED.clear()

    def work() -> None:
        os.waitid(os.P_PID, daemon.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        wake(daemon)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


async def test_interrupted_requests_leave_no_connections_behind(
    connect: Connect, daemon: DaemonProcess
) -> None:
    async with connect() as client:
        await client.save("web", State())
        async with client.load("web"):
            await client.list()
            before = open_fds()
            for _ in range(20):
                with asleep(daemon):
                    await interrupted(client.list, 0.01)
                await client.list()
            assert open_fds() <= before + 4  # one that is late now and then, not one each time


@pytest.mark.parametrize(
    ("end", "done"),  # when it is interrupted
    [
        *(("confirm", False), ("next", False), ("block", False), ("commit", False)),
        *(("confirm", True), ("next", True), ("block", True)),
    ],
)
async def test_an_interrupted_confirm_has_an_outcome_that_is_known(
    connect: Connect, start_daemon: Callable[..., DaemonProcess], end: str, done: bool
) -> None:
    daemon = start_daemon(env={"CPRD_PAUSE": "daemon:confirmed"} if done else {})
    async with connect(daemon.path) as client:
        await client.save("other", State())
        await client.save("web", State())
        other = await client.load("other")
        prepared = await client.prepare("new", State())
        claim = await client.load("web")

        starts: dict[str, Callable[[], Any]] = {
            "confirm": claim.confirm,
            "next": lambda: claim.confirm(next=State(), after_exit=False),
            "block": lambda: leave(claim),
            "commit": prepared.commit,
        }
        if done:
            waker = wake_when_it_stands(daemon)
            await interrupted(starts[end], 0.2)
            waker.join()
        else:
            with asleep(daemon):
                await interrupted(starts[end])
        seen = daemon.phases()
        assert seen.pop("other") == "claimed"
        if end == "commit":
            assert seen == {"web": "claimed", "new": "held"}
            await claim.close()
            assert daemon.phases()["web"] == "held"
        else:
            assert seen == {"new": "prepared", **({"web": "held"} if end == "next" else {})}
            with pytest.raises(Fenced, match="already"):
                await claim.reject()
            await claim.close()
            assert daemon.phases().get("web") == ("held" if end == "next" else None)
            await prepared.abort()
        await other.confirm()
        await other.close()


def leave(claim: Any) -> Any:
    """The end of its block, to be awaited."""
    if isinstance(claim, Blocking):
        return claim.leaving(None, None, None)
    return claim.__aexit__(None, None, None)


def test_a_second_interrupt_ends_the_attempt_to_learn_the_outcome(daemon: DaemonProcess) -> None:
    with daemon.connect() as client:
        client.save("web", State())
        claim = client.load("web")
        interrupts = []

        def count(*_: Any) -> None:
            interrupts.append(1)
            raise Interrupt

        before = signal.signal(signal.SIGALRM, count)
        try:
            with asleep(daemon):  # to the end of the block: nobody answers
                signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
                try:
                    with pytest.raises(Interrupt):
                        claim.confirm()
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                assert len(interrupts) == 2
        finally:
            signal.signal(signal.SIGALRM, before)
        claim.close()
        assert client.list() == []  # the daemon heard it all the same


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
                    await claim.close()
                    await client.__aexit__(None, None, None)
                    try:
                        await client.list()
                    except InvalidInput as error:
                        status = 0 if "belongs to the parent" in str(error) else 2
                finally:
                    os._exit(status)
            assert os.waitpid(child, 0)[1] == 0
            assert daemon.phases() == {"web": "claimed", "other": "held", "third": "prepared"}
            assert values(claim.state) == [1, 2]
            await claim.confirm()
            await claim.close()
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
        assert daemon.phases() == {"web": "claimed", "new": "prepared"}
        everything[2].confirm()
        everything[1].commit()
        everything[2].close()
        everything[0].close()
        everything.clear()
        assert daemon.phases() == {"new": "held"}


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
        claim = client.load("web")  # its Daemon does not keep it
        del claim
        gc.collect()
        assert client.list()[0]["phase"] == "held"
        prepared = daemon.connect().prepare("new", State())
        assert prepared.generation
        del prepared
        gc.collect()
        until(lambda: daemon.phases()["new"] == "in-doubt", lambda: repr(daemon.phases()))


def test_a_claim_forgotten_while_another_is_saved_is_given_back(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Giving back is a request on the same connection, in the midst of the save's."""

    def at(name: str) -> None:
        if name == "pack:manifest":
            gc.collect()

    with opened(300) as fds, daemon.connect() as client:
        client.save("other", of(fds[:2]))
        forgotten: list[Any] = [client.load("other")]
        forgotten.append(forgotten)
        del forgotten
        with monkeypatch.context() as patch:
            patch.setattr("cprd.bundle.pack.point", at)
            client.save("web", of(fds))
        assert daemon.phases() == {"other": "held", "web": "held"}


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


async def test_who_waits_delays_no_other_task(daemon: DaemonProcess) -> None:
    async with cprd.trio.connect(daemon.path) as client, trio.open_nursery() as nursery:
        await client.save("web", State())
        await client.save("third", State())
        got: list[str] = []
        all_there = trio.Event()

        def note(what: str) -> None:
            got.append(what)
            if len(got) == 4:
                all_there.set()

        async def wait_for(name: str) -> None:
            async with client.load(name, wait=20.0) as claim:
                note(name)
                assert claim.attempts == 1

        async def look_out_for(name: str) -> None:
            await client.wait(name, 20.0)
            note("seen " + name)

        for name in ("a", "b", "c"):
            nursery.start_soon(wait_for, name)
        nursery.start_soon(look_out_for, "d")
        await trio.testing.wait_all_tasks_blocked(0.05)
        with trio.fail_after(patience(2.0)):
            assert len(await client.list()) == 2
            with pytest.raises(Mishap):
                async with client.load("web"):
                    raise Mishap
            assert {row["phase"] for row in await client.list()} == {"held"}
            async with client.load("third", wait=20.0):
                pass
        await client.save("d", State())
        for name in ("c", "a", "b"):
            await client.save(name, State())
        with trio.fail_after(PATIENCE):
            await all_there.wait()
        assert sorted(got) == ["a", "b", "c", "seen d"]


async def test_a_claim_that_was_waited_for_lives_on_its_own_connection(
    daemon: DaemonProcess,
) -> None:
    async with cprd.trio.connect(daemon.path) as client:
        await client.save("web", State())
        claim = await client.load("web", wait=5.0)
        with trio.move_on_after(0.05):
            await client.load("web", wait=5.0)
        await client.save("other", State())
        for _ in range(3):
            assert await client.wait("other", 5.0)
        await claim.renew()
    assert daemon.phases() == {"web": "claimed", "other": "held"}
    await claim.close()
    assert daemon.phases() == {"web": "held", "other": "held"}


async def test_a_confirm_cancelled_before_it_was_sent_gives_back(daemon: DaemonProcess) -> None:
    async with cprd.trio.connect(daemon.path) as client:
        await client.save("web", State())
        with trio.CancelScope() as scope:
            async with client.load("web"):
                scope.cancel()
        assert scope.cancelled_caught
        assert (await client.list())[0]["last_reject"] == "closed without confirm"


async def test_closing_is_awaited_and_aclose_is_the_same(daemon: DaemonProcess) -> None:
    client = await cprd.trio.connect(daemon.path)
    await client.save("web", State())
    claim = await client.load("web")
    await claim.aclose()
    claim = await client.load("web")
    await claim.close()
    await claim.close()
    await client.aclose()
    await client.close()
    client = await cprd.trio.connect(daemon.path)
    await client.close()
    with pytest.raises(Unavailable, match="closed"):
        await client.list()


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

"""Limits of the system and quotas of the daemon: each is named, nothing is lost, cprd goes on."""

from __future__ import annotations

import itertools
import os
import resource
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial

import pytest
import trio

import cprd
import cprd.trio
from cprd import LimitExceeded, State, Unavailable
from tests.support.child import Child, Line, become
from tests.support.daemon import DaemonProcess
from tests.support.eventfds import full_table, of, opened, values
from tests.support.goods import state_of
from tests.support.patience import PATIENCE, until

pytestmark = pytest.mark.usefixtures("nothing_leaks")

NOBODY = 4711  # a uid that nobody has
HARD = resource.getrlimit(resource.RLIMIT_NOFILE)[1]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="wants root, to become another uid")


def in_child(
    work: Callable[[], object], *, nofile: tuple[int, int] | None = None, nobody: bool = False
) -> str:
    """What `work` says in a process of its own (or the error that it raises), and then its limits.

    `nobody`: as an unprivileged user, without capabilities."""
    hear, say = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if nobody:
                os.setgroups([])
                os.setresgid(NOBODY, NOBODY, NOBODY)
                os.setresuid(NOBODY, NOBODY, NOBODY)  # and with the last uid 0 all capabilities go
            if nofile is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, nofile)
            try:
                said = str(work())
            except cprd.CprdError as error:
                said = f"{type(error).__name__}: {error}"
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            os.write(say, f"{said}; limits {limits[0]}:{limits[1]}".encode())
        except BaseException:
            os.write(say, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(say)
    with os.fdopen(hear) as file:
        said = file.read()
    os.waitpid(child, 0)
    return said


# In flight


def save_many(path: str, count: int) -> str:
    with cprd.connect(path) as client:
        return f"saved {client.save('web', many(0, count), if_exists='replace')}"


@needs_root
def test_too_many_in_flight_for_a_plain_user_says_what_to_do(daemon: DaemonProcess) -> None:
    """ETOOMANYREFS: root never meets it."""
    low = (1024, 1024)
    said = in_child(lambda: save_many(daemon.path, 1500), nofile=low, nobody=True)
    assert said.startswith("LimitExceeded"), said
    for word in (f"uid {NOBODY}", "ETOOMANYREFS", "hard limit is 1024", "LimitNOFILE=", "drop"):
        assert word in said
    assert said.endswith("limits 1024:1024")
    with daemon.connect() as client:
        assert client.list() == []
    # Nothing of it is still in flight.
    assert in_child(lambda: save_many(daemon.path, 900), nofile=low, nobody=True)[:5] == "saved"


@needs_root
@pytest.mark.skipif(HARD < 20_000, reason="wants a hard limit of 20,000 descriptors")
@pytest.mark.parametrize("nobody", [False, True])
def test_a_low_soft_limit_is_raised_for_parking_only(daemon: DaemonProcess, nobody: bool) -> None:
    said = in_child(lambda: save_many(daemon.path, 5000), nofile=(1024, 20_000), nobody=nobody)
    assert said.startswith("saved"), said
    assert said.endswith("limits 1024:20000")
    name = f"{NOBODY}/web" if nobody else "web"
    with daemon.connect() as client, client.load(name) as claim:
        assert claim.state.fd_count == 5000


@pytest.mark.skipif(HARD < 20_000, reason="wants a hard limit of 20,000 descriptors")
def test_more_files_than_the_soft_limit_allows_are_saved_all_the_same(
    daemon: DaemonProcess,
) -> None:
    """5,000 files that were opened before the soft limit was lowered: packing wants some more."""

    def work() -> str:
        with opened(5000) as fds, cprd.connect(daemon.path) as client:
            resource.setrlimit(resource.RLIMIT_NOFILE, (1024, HARD))
            client.save("web", of(fds))
            return f"saved {len(fds)}"

    assert in_child(work) == f"saved 5000; limits 1024:{HARD}"
    with daemon.connect() as client, client.load("web") as claim:
        assert values(claim.state) == list(range(1, 5001))


@pytest.mark.skipif(HARD < 20_000, reason="wants a hard limit of 20,000 descriptors")
@pytest.mark.parametrize("client", ["blocking", "trio"])
def test_more_files_than_the_soft_limit_allows_do_not_keep_one_from_connecting(
    daemon: DaemonProcess, client: str
) -> None:
    """The service opened its files, and then lowered its soft limit, for select()'s sake."""

    async def on_trio(state: State) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, HARD))
        async with cprd.trio.connect(daemon.path) as there:
            await there.save("web", state)

    def work() -> str:
        with opened(5000) as fds:
            if client == "trio":
                trio.run(on_trio, of(fds))
                return "saved"
            resource.setrlimit(resource.RLIMIT_NOFILE, (1024, HARD))
            with cprd.connect(daemon.path) as there:
                there.save("web", of(fds))
            return "saved"

    assert in_child(work) == f"saved; limits 1024:{HARD}"
    with daemon.connect() as there, there.load("web") as claim:
        assert values(claim.state) == list(range(1, 5001))


# The table of descriptors is full: EMFILE


@pytest.mark.parametrize("room", range(5))
def test_a_full_soft_limit_is_raised_to_pack_and_put_back(daemon: DaemonProcess, room: int) -> None:
    with opened(5) as fds, daemon.connect() as client:
        client.save("web", State())
        state = of(fds)
        state["large"] = b"x" * 100_000
        with full_table(1, room):
            low = resource.getrlimit(resource.RLIMIT_NOFILE)
            client.save("web", state, if_exists="replace")
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == low
        with client.load("web") as claim:
            assert values(claim.state) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("room", range(6))
def test_a_saver_whose_hard_limit_leaves_no_room_is_told_and_what_was_held_stays(
    daemon: DaemonProcess, room: int
) -> None:
    def work() -> str:
        with cprd.connect(daemon.path) as client:
            table = full_table(1, room)
            table.__enter__()  # for good: a hard limit cannot be raised again by everybody
            low = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            resource.setrlimit(resource.RLIMIT_NOFILE, (low, low))
            try:
                client.save("web", many(0, 300), if_exists="replace")
                said = "saved"
            except LimitExceeded as error:
                said = f"LimitExceeded: {error}"
            left = 0
            with suppress(OSError):
                while True:
                    os.dup(0)
                    left += 1
            return f"{said}; {left} free"

    with opened(3) as fds, daemon.connect() as client:
        client.save("web", of(fds))
        said = in_child(work)
        assert f"; {room} free" in said
        assert said.startswith("LimitExceeded"), said
        assert "RLIMIT_NOFILE" in said
        with client.load("web") as claim:
            assert values(claim.state) == [1, 2, 3]


def test_connecting_without_a_descriptor_names_the_limit(daemon: DaemonProcess) -> None:
    with full_table(1, 0):
        daemon.connect().close()  # the hard limit leaves room

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        with suppress(OSError):
            while True:
                os.dup(0)
        daemon.connect()

    assert in_child(work).startswith("LimitExceeded: no descriptor left to connect")


SAVES = """
import os, sys
from cprd import LimitExceeded, State, connect
fds = []
try:
    while True:
        fds.append(os.dup(0))
except OSError:
    pass
try:
    with connect() as daemon:
        state = State()
        state.save_fds("a", enumerate(fds[:3]))
        daemon.save("web", state)
except LimitExceeded as error:
    print(error)
"""


def test_a_program_without_a_descriptor_left_saves_up_to_its_hard_limit(
    daemon: DaemonProcess,
) -> None:
    """Nor can it import anything."""
    for soft, hard, said in ((64, 128, ""), (64, 64, "no descriptor left to connect")):
        done = subprocess.run(
            [sys.executable, "-c", SAVES],
            check=False,
            env={**os.environ, "CPRD_SOCKET": daemon.path},
            capture_output=True,
            text=True,
            preexec_fn=partial(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard)),
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(said)
        assert bool(done.stdout) == bool(said)
    assert daemon.phases() == {"web": "held"}


@pytest.mark.parametrize("count", [5, 600])
def test_a_claimant_without_room_is_told_and_the_state_stays_whole(
    daemon: DaemonProcess, count: int
) -> None:
    with opened(count) as fds, daemon.connect() as client:
        client.save("web", of(fds))
        for room in (0, 1, 2, count // 2, count):
            with full_table(1, room):
                with pytest.raises(LimitExceeded, match=r"RLIMIT_NOFILE.*stays held"):
                    client.load("web")
            (row,) = client.list()
            assert row["phase"] == "held", row
        with client.load("web") as claim:
            assert claim.attempts == 1  # a claimant without room has not tried
            assert values(claim.state) == list(range(1, count + 1))


def test_show_without_room_is_told(daemon: DaemonProcess) -> None:
    threads = threading.active_count()
    with opened(300) as fds, daemon.connect() as client:
        client.save("web", of(fds))
        client.show("web")  # imports what it wants
        for room in (0, 1, 100):
            until(lambda: threading.active_count() == threads, lambda: "still closing")
            with full_table(1, room):
                with pytest.raises(LimitExceeded, match="RLIMIT_NOFILE"):
                    client.show("web")
        assert len(client.show("web")["descriptors"]) == 300
        assert client.list()[0]["attempts"] == 0


def lower(daemon: DaemonProcess, room: int) -> None:
    """Leave cprd so many free places in its table."""
    numbers = {int(name) for name in os.listdir(f"/proc/{daemon.pid}/fd")}
    limit = 0
    while room or limit in numbers:
        room -= limit not in numbers
        limit += 1
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (limit, HARD))


def raise_again(daemon: DaemonProcess) -> None:
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (HARD, HARD))


@pytest.mark.parametrize("verb", ["save", "prepare", "load", "confirm", "next", "show", "claims"])
def test_a_daemon_without_room_says_so_loses_nothing_and_goes_on(
    daemon: DaemonProcess, verb: str
) -> None:
    """With each number of free places, from none: every verb is done or refused, as a whole."""
    with opened(3) as fds, daemon.connect() as client, daemon.connect() as other:
        baseline = daemon.fds()
        client.save("web", of(fds))
        refusals: list[str] = []
        for room in range(12):
            daemon.await_fds(baseline + 1, queues=1)  # the slot; nothing is still being closed
            lower(daemon, room)
            try:
                if verb in ("save", "prepare"):
                    if verb == "save":
                        client.save("new", of(fds))
                    else:
                        client.prepare("new", of(fds)).commit()
                    raise_again(daemon)
                    client.drop("new")
                elif verb == "load":
                    with client.load("web") as claim:
                        claim.reject("again")
                elif verb == "confirm":
                    with client.load("web") as claim:
                        pass
                    raise_again(daemon)
                    client.save("web", of(fds))
                elif verb == "next":
                    with client.load("web") as claim:
                        claim.confirm(next=of(fds), after_exit=False)
                elif verb == "show":
                    assert len(client.show("web")["descriptors"]) == 3
                else:  # the look for damage, when a claim ends
                    claim = other.load("web")
                    claim.close()
            except LimitExceeded as error:
                refusals.append(str(error))
            raise_again(daemon)
            assert daemon.alive()
            rows = {row["name"]: row["phase"] for row in client.list()}
            assert rows == {"web": "held"}, (room, rows)
        assert refusals or verb == "show"  # which shows the descriptor that cprd has anyway
        assert all("LimitNOFILE= of cprd.service" in why for why in refusals), refusals
        with client.load("web") as claim:
            assert values(claim.state) == [1, 2, 3]
        daemon.await_fds(baseline, queues=1)


def test_a_waiter_that_finds_no_room_does_not_spoil_the_request_that_serves_it(
    daemon: DaemonProcess,
) -> None:
    """cprd claims for a waiting load inside somebody else's save."""
    with opened(3) as fds, daemon.connect() as client:
        for room in range(4, 12):
            told, tell = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    mine = daemon.connect()
                    os.write(tell, b"x")
                    try:
                        with mine.load("web", wait=20.0) as claim:
                            ok = claim.state.fd_count == 3
                        os._exit(0 if ok else 3)
                    except LimitExceeded:
                        os._exit(2)
                finally:
                    os._exit(1)
            os.read(told, 1)
            os.close(told)
            os.close(tell)
            until(lambda: client.status()["connections"] == 2, lambda: repr(client.status()))
            lower(daemon, room)
            try:
                client.save("web", of(fds))
                saved = True
            except LimitExceeded:
                saved = False
            raise_again(daemon)
            if not saved:
                client.save("web", of(fds))
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert status in (0, 2)
            assert daemon.alive()
            if status == 2:  # it was told, and the hold is whole
                client.load("web", wait=5.0).confirm()
            assert client.list() == []


def test_a_daemon_that_cannot_accept_turns_clients_away_and_serves_on(
    daemon: DaemonProcess,
) -> None:
    with daemon.connect() as client:
        baseline = daemon.fds()
        with opened(2) as fds:
            client.save("web", of(fds))
        for _ in range(3):
            daemon.await_fds(baseline + 1)  # the slot
            lower(daemon, 0)
            with pytest.raises((Unavailable, LimitExceeded)):
                daemon.connect()
            for _ in range(3):  # the spare one may be free now and then: served, or turned away
                with suppress(Unavailable, LimitExceeded):
                    daemon.connect().close()
            assert client.list()[0]["phase"] == "held"
            raise_again(daemon)
            with daemon.connect() as another:
                assert another.list()[0]["name"] == "web"
        assert client.status()["refused_accepts"] >= 3
        assert "accept-failed" in "\n".join(daemon.log())
        client.drop("web")


def test_a_flood_of_connections_while_there_is_no_room_ends_with_room(
    daemon: DaemonProcess,
) -> None:
    with daemon.connect() as client, ExitStack() as stack:
        lower(daemon, 2)
        for _ in range(30):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            sock.connect(daemon.path)
        daemon.await_log("accept-failed")
        assert client.list() == []
        raise_again(daemon)
        stack.close()
        with daemon.connect() as another:
            assert another.list() == []


# Quotas


def test_each_quota_is_named_with_how_to_raise_it(
    start_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon = start_daemon(config="[limits]\nholds = 3\nfds = 10\nconnections = 2\nlease = 5\n")
    with opened(6) as fds, daemon.connect() as client:
        client.save("a", of(fds))
        with pytest.raises(LimitExceeded, match=r"12 descriptors.*quota is 10.*limits\.fds"):
            client.save("b", of(fds))
        client.save("a", of(fds), if_exists="replace")  # the old one does not count
        client.save("b", of(fds[:2]))
        client.save("c", of(fds[:2]))
        with pytest.raises(LimitExceeded, match=r"3 holds.*quota is 3.*limits\.holds"):
            client.save("d", State())
        with pytest.raises(LimitExceeded, match=r"quota is 3"):
            client.prepare("d", State())
        client.save("c", of(fds[:1]), if_exists="replace")
        with client.load("a", lease=60.0) as claim:
            assert claim.lease == 5.0
            with pytest.raises(LimitExceeded, match=r"quota is 10"):
                claim.confirm(next=many(fds[0], 20))
            assert client.list()[0]["phase"] == "claimed"  # nothing changed
            claim.confirm(next=of(fds), after_exit=False)
        with daemon.connect():
            with pytest.raises(LimitExceeded, match=r"2 connections.*limits\.connections"):
                daemon.connect()
        until(lambda: client.status()["connections"] == 1, lambda: repr(client.status()))
        daemon.connect().close()
        assert client.status()["limits"]["holds"] == 3


def many(fd: int, count: int) -> State:
    state = State()
    for number in range(count):
        state.save_fd("same", number, fd)
    return state


@needs_root
def test_one_uids_quota_is_not_anothers(start_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = start_daemon(config="[limits]\nholds = 1\n")
    with daemon.connect() as client:
        client.save("a", State())
        client.save(f"{NOBODY}/a", State())
        for name in ("b", f"{NOBODY}/b"):
            with pytest.raises(LimitExceeded, match="quota is 1"):
                client.save(name, State())


def test_a_small_daemon_says_how_many_it_may_hold(
    start_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon = start_daemon(nofile=(400, 400))
    with daemon.connect() as client:
        most = client.status()["limits"]["all_holds"]
        assert 4 <= most < 60
        for number in range(most):
            client.save(f"web{number}", State())
        with pytest.raises(LimitExceeded, match="LimitNOFILE="):
            client.save("one more", State())
        client.save("web0", State(), if_exists="replace")
        # All that it holds fits, with every one of them claimed.
        claims = [client.load(f"web{number}") for number in range(most)]
        for claim in claims:
            claim.confirm()
            claim.close()
        client.save("one more", State())


def test_many_holds_of_one_uid_are_listed_in_pages(daemon: DaemonProcess) -> None:
    with daemon.connect() as client:
        for number in range(600):
            client.save(f"{'long name ' * 15}{number}", State())
        rows = client.list()
        assert len(rows) == 600
        assert len({row["generation"] for row in rows}) == 600
        with pytest.raises(cprd.NotHeld):
            client.load("long name")


# Room for everybody


def saves_many(line: Line, path: str, uid: int, count: int) -> None:
    """Save as another uid until refused; say how many were held, and why there were no more."""
    become(uid)
    with cprd.connect(path) as daemon:
        for number in range(count):
            try:
                daemon.save(f"{number}", state_of("", [], []))
            except cprd.LimitExceeded as error:
                line.say(f"{number} {error}")
                break
        else:
            line.say(f"{count} all")
        line.hear()
        for number in range(count):
            try:
                daemon.load(f"{number}").confirm()
            except cprd.NotHeld:
                line.say(number)
                break


@needs_root
def test_no_uid_has_more_than_half_and_all_that_is_held_can_be_loaded(
    start_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon = start_daemon(nofile=(600, 600))
    with daemon.connect() as root, ExitStack() as stack:
        most = root.status()["limits"]["all_holds"]
        held = []
        for uid in (2001, 2002, 2003):
            saver = stack.enter_context(Child(saves_many, daemon.path, uid, 600))
            held.append(saver)
        counts = [int(saver.hear().split()[0]) for saver in held]
        assert max(counts) <= most // 2
        assert sum(counts) < most
        root.save("mine", state_of("", [], []))
        for saver, count in zip(held, counts, strict=True):
            saver.say()
            if count:
                assert saver.hear() == str(count)
        root.load("mine").confirm()


@needs_root
def test_a_real_nobody_is_served(daemon: DaemonProcess) -> None:
    with Child(saves_many, daemon.path, 65534, 2) as nobody:
        assert nobody.hear() == "2 all"


def test_generations_tell_nobody_how_much_others_save(daemon: DaemonProcess) -> None:
    with daemon.connect() as connection:
        numbers = [connection.save(f"{n}", state_of("", [], [])).generation for n in range(20)]
    steps = [after - before for before, after in itertools.pairwise(numbers)]
    assert all(1 <= step <= 1 << 16 for step in steps)
    assert len(set(steps)) > 10

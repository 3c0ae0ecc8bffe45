"""What the descriptor store of a real systemd makes of cprd's shelves: full, small, absent, lost
and found again; many holds, and a large one."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable

import pytest

import cprd
from cprd.protocol.lifecycle import HELD, UNREADABLE
from tests.support.memory import Memory
from tests.support.patience import in_time, patience, rest, until
from tests.support.processes import await_quiet

from .keeping import UNIT, Keeping, Task, things
from .machine import Machine

SMALL = (
    "cprd.daemon.storage.shelf.WANTED_BUFFER = 8192\n"
    "cprd.daemon.storage.journal.MANY_BYTES = 2000\n"
    "cprd.daemon.storage.journal.TIMES = 1\n"
)


def entries(keeping: Keeping) -> int:
    """How many descriptors the manager has stored for cprd."""
    return int(keeping.machine.show(UNIT, "NFileDescriptorStore"))


def churn(keeping: Keeping, times: int = 40) -> str:
    """Save and drop so often that small shelves are written anew several times. Where the last one
    was kept."""
    with keeping.connect() as daemon:
        for _ in range(times):
            saved = daemon.save("churn", cprd.State())
            daemon.drop("churn")
        return saved.kept


def reject(keeping: Keeping, name: str, times: int) -> None:
    with keeping.connect() as daemon:
        for _ in range(times):
            claim = daemon.load(name)
            claim.reject("again")
            claim.close()


def all_is_said(keeping: Keeping) -> None:
    """Wait until cprd and the manager have nothing more to say to each other."""
    await_quiet(keeping.pid, keeping.machine.pid)


def whole(keeping: Keeping, name: str, number: int) -> bool:
    """Whether it is held and all there; it stays held."""
    with keeping.connect() as daemon:
        claim = daemon.load(name)
        try:
            assert claim.state["number"] == number
            return claim.state.fd_count == 1
        finally:
            claim.reject("and back")
            claim.close()


def test_the_store_stays_small_however_much_is_held_and_ended(systemd: Machine) -> None:
    keeping = Keeping(systemd, settings=SMALL)
    churn(keeping, 200)
    for _ in range(3):
        keeping.kill()
        churn(keeping, 50)
        keeping.await_kept("store")
    until(lambda: entries(keeping) == 4, lambda: f"{entries(keeping)} entries, not 4")


def test_a_stream_of_saves_does_not_outrun_the_store(systemd: Machine) -> None:
    """A shelf as large as a kernel's usual wmem_max lets it be is written anew every 280 saves; by
    then the manager has to have the next one."""
    keeping = Keeping(systemd, settings="cprd.daemon.storage.shelf.WANTED_BUFFER = 212992\n")
    with keeping.connect() as daemon:
        for number in range(1000):
            assert daemon.save("stream", cprd.State()).kept == "store", number
            daemon.drop("stream")
    assert keeping.machine.journal(UNIT).count("\nshelf number=") >= 3


@pytest.mark.parametrize("room", [0, 1, 2, 3, 4, 5])
def test_in_a_store_with_hardly_any_room_what_is_called_stored_is(
    systemd: Machine, room: int
) -> None:
    """Whatever the answers say is true afterwards; with room for a shelf, its successor and a
    probe there is nothing to complain of."""
    drop_in = f"FileDescriptorStoreMax={room}\n"
    keeping = Keeping(systemd, settings=SMALL, drop_in=drop_in)
    with things(1) as (thing,):
        with keeping.connect() as daemon:
            kept = daemon.save("first", thing.state).kept
            assert kept == ("memory" if room < 3 else "store")
            if kept == "memory":
                with pytest.raises(cprd.LimitExceeded, match="FileDescriptorStoreMax"):
                    daemon.save("never", cprd.State(), require="store")
        thing.saved()
        for _ in range(3):
            churn(keeping)
            reject(keeping, "first", 5)
            if kept == "store":
                keeping.kill()
                assert whole(keeping, "first", 1)
        assert keeping.phases() == {"first": HELD}
        if room == 5:
            keeping.await_kept("store")
        with keeping.connect() as daemon:
            daemon.drop("first")
        assert thing.let_go()


def test_room_taken_away_is_noticed_and_used_again_when_it_is_back(systemd: Machine) -> None:
    """With FileDescriptorStoreMax= lowered, `systemctl daemon-reload` drops what exceeds it."""
    keeping = Keeping(
        systemd,
        settings=SMALL
        + "cprd.daemon.storage.fdstore.RECHECK = cprd.daemon.storage.fdstore.RETRY = 0.2\n",
    )
    with things(1) as (thing,), keeping.connect() as daemon:
        assert daemon.save("first", thing.state, require="store").kept == "store"
        thing.saved()
        for room in (0, 1, 2):
            systemd.unit(f"{UNIT}.d/zz.conf", f"[Service]\nFileDescriptorStoreMax={room}\n")
            keeping.await_kept("memory")
            assert daemon.save("second", cprd.State()).kept == "memory"
            churn(keeping)
            reject(keeping, "first", 10)
            assert keeping.kept() == "memory"

            systemd.unit(f"{UNIT}.d/zz.conf", "[Service]\nFileDescriptorStoreMax=64\n")
            keeping.await_kept("store")
            keeping.kill()
            assert whole(keeping, "first", 1)
            daemon.drop("second")
        daemon.drop("first")
        assert thing.let_go()


@pytest.mark.parametrize("reloads", [0, 1])
def test_room_that_only_the_spare_had_is_taken_away_before_it_takes_over(
    systemd: Machine, reloads: int
) -> None:
    """A reload of units turns the manager's list around: then the spare is what is dropped, which
    cprd believes to be stored until it looks again."""
    keeping = Keeping(systemd, settings=SMALL)
    with things(1) as (thing,), keeping.connect() as daemon:
        daemon.save("first", thing.state, require="store")
        thing.saved()
        until(lambda: entries(keeping) == 4, lambda: "no spare is stored")
        all_is_said(keeping)
        for _ in range(reloads):
            systemd.systemctl("daemon-reload")
        systemd.unit(f"{UNIT}.d/zz.conf", "[Service]\nFileDescriptorStoreMax=2\n")
        churn(keeping, 12)  # enough for it to take over, and for no other one
        all_is_said(keeping)
        keeping.kill()
        assert whole(keeping, "first", 1)
        daemon.drop("first")
        assert thing.let_go()


def test_a_rewrite_while_the_manager_is_busy_removes_nothing_too_early(systemd: Machine) -> None:
    """While it is asked whether one shelf is stored, two others take over, the second one not
    stored."""
    keeping = Keeping(systemd, settings=SMALL + "cprd.daemon.storage.fdstore.RECHECK = 1.0\n")
    with things(1) as (thing,), keeping.connect() as daemon:
        daemon.save("first", thing.state, require="store")
        thing.saved()
        for where in ("store:removed", "store:removed#2", ""):
            # Nothing is left to be removed that would stop it too early.
            until(lambda: entries(keeping) == 4, lambda: f"{entries(keeping)} entries, not 4")
            keeping.arm(where)
            os.kill(systemd.pid, signal.SIGSTOP)
            try:
                rest(1.2)  # it asks after RECHECK, and is not answered: there is nothing to see
                assert churn(keeping, 60) == "memory"
            finally:
                os.kill(systemd.pid, signal.SIGCONT)
            if where:
                until(keeping.stands, lambda: "nothing is removed")
            keeping.kill()
            assert whole(keeping, "first", 1)
            keeping.await_kept("store")
        daemon.drop("first")
        assert thing.let_go()


def test_required_to_be_stored_it_is_refused_where_its_own_slot_is_not(systemd: Machine) -> None:
    """The shelf is full, and the one that would take over is not stored yet."""
    keeping = Keeping(systemd, settings=SMALL)
    with keeping.connect() as daemon:
        daemon.save("first", cprd.State(), require="store")
        until(lambda: entries(keeping) == 4, lambda: "no spare is stored")
        os.kill(systemd.pid, signal.SIGSTOP)
        try:
            said: set[str] = set()
            for number in range(200):
                try:
                    said.add(daemon.save(f"n{number}", cprd.State(), require="store").kept)
                    daemon.drop(f"n{number}")
                except cprd.LimitExceeded:
                    said.add("refused")
            assert said == {"store", "refused"}
            assert [row["name"] for row in daemon.list()] == ["first"]
        finally:
            os.kill(systemd.pid, signal.SIGCONT)


def test_a_shelf_that_was_stored_once_is_not_taken_out_by_the_next_cprd(systemd: Machine) -> None:
    """The store became smaller, the shelf was written anew and is not stored; SIGHUP."""
    fast = "cprd.daemon.storage.fdstore.RECHECK = cprd.daemon.storage.fdstore.RETRY = 0.3\n"
    keeping = Keeping(systemd, settings=SMALL + fast)
    with things(1) as (thing,), keeping.connect() as daemon:
        daemon.save("first", thing.state, require="store")
        thing.saved()
        until(lambda: entries(keeping) == 4, lambda: "no spare is stored")
        systemd.systemctl("daemon-reload")
        systemd.unit(f"{UNIT}.d/zz.conf", "[Service]\nFileDescriptorStoreMax=2\n")
        keeping.await_kept("memory")
        churn(keeping)
        rest(0.5)  # it looks again, after RECHECK: of that it says nothing
        with contextlib.suppress(cprd.CprdError):
            os.kill(keeping.pid, signal.SIGHUP)
        systemd.await_journal("re-executing", UNIT)
        rest(1.0)  # so does the next one
        keeping.kill()
        assert whole(keeping, "first", 1)
        daemon.drop("first")
        assert thing.let_go()


def test_filled_by_strangers_it_loses_nothing_that_was_stored(systemd: Machine) -> None:
    """Whoever may notify for the unit (NotifyAccess=all) can fill its store. Shelves that are full
    then are not written anew where that would be less safe."""
    drop_in = "FileDescriptorStoreMax=12\nNotifyAccess=all\n"
    keeping = Keeping(systemd, settings=SMALL, drop_in=drop_in)
    program = (
        "import os; from cprd.systemd import fdstore, notify as s\n"
        "m = s.Manager.from_environment(os.environ)\n"
        "for n in range(12): s.drive(fdstore.store(m, 'x', os.memfd_create('x')), 5)\n"
        "s.drive(m.barrier(), 5)\n"
    )
    (systemd.root / "run/boot/fill.py").write_text(program)
    systemd.unit(
        f"{UNIT}.d/fill.conf", "[Service]\nExecReload=\nExecReload=test-python /run/boot/fill.py\n"
    )
    with things(1) as (thing,), keeping.connect() as daemon:
        assert daemon.save("first", thing.state, require="store").kept == "store"
        thing.saved()
        keeping.await_kept("store")
        keeping.systemctl("reload", UNIT)
        assert entries(keeping) == 12
        said = set()
        for _ in range(10):
            said.add(churn(keeping, 15))
            reject(keeping, "first", 4)
        assert "memory" in said
        keeping.kill()
        assert whole(keeping, "first", 1)
        for _ in range(10):
            churn(keeping, 15)
            reject(keeping, "first", 4)
        keeping.systemctl("restart", UNIT)
        assert whole(keeping, "first", 1)
        daemon.drop("first")
        assert thing.let_go()


def test_a_downgrade_by_a_crash_and_an_upgrade_after_it_lose_nothing(systemd: Machine) -> None:
    """The newer one's shelf lies beside the older one's in the store, and neither grows there."""
    newer = (
        SMALL + "cprd.daemon.storage.shelf.VERSION = 3\ncprd.daemon.storage.record.VERSION = 9\n"
    )
    keeping = Keeping(systemd, settings=newer)
    with things(1, 2, 3) as (new, shared, old), keeping.connect() as daemon:
        daemon.save("new", new.state, require="store")
        keeping.settings(newer.replace("cprd.daemon.storage.record.VERSION = 9", ""))
        keeping.kill()
        daemon.save("shared", shared.state)
        for thing in (new, shared):
            thing.saved()
        for _ in range(2):
            keeping.settings(SMALL)
            keeping.kill()
            assert keeping.phases() == {"new": UNREADABLE, "shared": HELD}
            assert daemon.status()["blind"] is None
            keeping.await_kept("store")
            daemon.save("old", old.state, require="store")
            churn(keeping)
            reject(keeping, "shared", 5)
            keeping.await_kept("store")
            keeping.kill()
            assert whole(keeping, "shared", 2)
            assert whole(keeping, "old", 3)
            daemon.drop("old")
            keeping.settings(newer)
            keeping.kill()
            assert keeping.phases() == {"new": HELD, "shared": UNREADABLE}
            assert whole(keeping, "new", 1)
            keeping.await_kept("store")
        until(lambda: entries(keeping) <= 6, lambda: f"{entries(keeping)} entries")
        keeping.settings(SMALL)
        keeping.kill()
        daemon.drop("shared")
        daemon.drop("new", force=True)
        keeping.kill()
        assert keeping.phases() == {}
        for thing in (new, shared):
            assert thing.let_go()


def test_a_start_limit_loses_all_before_254_and_nothing_since(systemd: Machine) -> None:
    """The unit has no start limit, for that reason. With one, a crash loop of the new version ends
    in "failed", and 252 forgets the store with it."""
    keeping = Keeping(systemd)
    with things(1) as (thing,):
        with keeping.connect() as daemon:
            daemon.save("first", thing.state, require="store")
        thing.saved()
        broken = systemd.unit(
            f"{UNIT}.d/zz.conf",
            "[Unit]\nStartLimitIntervalSec=60\nStartLimitBurst=3\n[Service]\nExecStart=\n"
            "ExecStart=false\n",
        )
        os.kill(keeping.pid, signal.SIGKILL)
        until(lambda: systemd.show(UNIT, "ActiveState") == "failed", lambda: "no start limit")
        assert thing.let_go() == (systemd.version < 254)
        broken.unlink()
        systemd.systemctl("daemon-reload")
        systemd.systemctl("reset-failed", "cprd.socket", UNIT)
        keeping.systemctl("start", "cprd.socket", UNIT)
        assert keeping.phases() == ({} if systemd.version < 254 else {"first": HELD})


def test_with_too_few_descriptors_to_start_it_loses_nothing(systemd: Machine) -> None:
    """A limit lowered by mistake: it says so, again and again, until it is raised."""
    keeping = Keeping(systemd)
    with things(1) as (thing,):
        with keeping.connect() as daemon:
            for number in range(60):
                daemon.save(f"n{number}", thing.state, require="store")
        thing.saved()
        limit = systemd.unit(f"{UNIT}.d/zz.conf", "[Service]\nLimitNOFILE=60\n")
        os.kill(keeping.pid, signal.SIGKILL)
        systemd.await_journal("raise LimitNOFILE= of cprd.service", UNIT)
        systemd.await_journal("restart counter is at 5", UNIT)
        limit.unlink()
        systemd.systemctl("daemon-reload")
        assert len(keeping.phases()) == 60
        assert whole(keeping, "n0", 1)
        assert whole(keeping, "n59", 1)


def test_ended_ones_free_their_memory_though_cprd_is_killed_over_it(systemd: Machine) -> None:
    """Memory that no process has open, only a queue that systemd keeps."""
    keeping = Keeping(systemd)
    for where in ("journal:end", "bundle:drain"):
        memory = Memory(1 << 20)
        with keeping.connect() as daemon:
            state = cprd.State()
            state.save_section_fd("ram", memory.fd)
            daemon.save("large", state, require="store")
            state.close()
            memory.saved()
            keeping.arm(where)
            task = Task(lambda daemon=daemon: daemon.drop("large"))  # type: ignore[misc]
            assert keeping.await_stop(task.done)
            assert not memory.free(0.0)
            keeping.kill()
            task.result()
            assert memory.free(patience(1.0)), f"killed at {where}: not freed within 1 s"
        memory.close()
        assert not keeping.phases()


def seconds_to_ready(keeping: Keeping, how: Callable[[], None]) -> float:
    """From exec of cprd to its READY=1, as the manager saw them."""
    how()
    keeping.phases()
    until(lambda: keeping.machine.show(UNIT, "ActiveState") == "active", lambda: "not active")
    show = keeping.machine.show
    started = int(show(UNIT, "ExecMainStartTimestampMonotonic"))
    ready = int(show(UNIT, "ActiveEnterTimestampMonotonic"))
    return (ready - started) / 1e6


def test_two_thousand_holds_come_back_within_a_second(systemd: Machine) -> None:
    keeping = Keeping(systemd)
    count = 2000
    with things(7) as (thing,):
        with keeping.connect() as daemon:
            for number in range(count):
                saved = daemon.save(f"n{number}", thing.state)
                assert saved.kept == "store", number
        thing.saved()
        took = [seconds_to_ready(keeping, keeping.kill) for _ in range(3)]
        took.append(seconds_to_ready(keeping, lambda: keeping.systemctl("restart", UNIT)))
        print(f"exec to READY with {count} holds: {', '.join(f'{t:.2f}' for t in took)} s")
        rows = keeping.rows()
        assert len(rows) == count
        assert {row["phase"] for row in rows.values()} == {HELD}
        assert in_time(min(took), 1.0)
        assert whole(keeping, "n0", 7)
        assert whole(keeping, f"n{count - 1}", 7)
        assert not thing.let_go(0.0)
        with keeping.connect() as daemon:
            for number in range(count):
                daemon.drop(f"n{number}")
        assert thing.let_go()


@pytest.mark.skipif(os.geteuid() != 0, reason="so many in flight want root")
def test_one_hold_of_fifteen_thousand_descriptors_comes_back_whole(systemd: Machine) -> None:
    keeping = Keeping(systemd)
    count = 15_000
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < count + 1000:
        pytest.skip("RLIMIT_NOFILE is too low here")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    reading, writing = os.pipe()
    try:
        with contextlib.ExitStack() as stack:
            state = cprd.State()
            made = [os.dup(writing) for _ in range(count)]
            os.close(writing)
            for number, fd in enumerate(made):
                state.save_fd("conn", number, fd)
            daemon = stack.enter_context(keeping.connect())
            assert daemon.save("large", state).kept == "store"
            for fd in made:
                os.close(fd)
            keeping.kill()
            keeping.systemctl("restart", UNIT)
            with daemon.load("large") as claim:
                keys = [(name, number) for name, number, _ in claim.state.fds()]
                assert keys == [("conn", number) for number in range(count)]
                os.write(claim.state.find_fd("conn", count - 1), b"x")
                assert os.read(reading, 9) == b"x"
                keeping.kill()
            assert not keeping.phases()
            end = time.monotonic()
            assert os.read(reading, 9) == b""
            assert in_time(time.monotonic() - end, 1)
    finally:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

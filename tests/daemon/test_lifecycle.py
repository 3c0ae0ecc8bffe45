"""The life cycle with real processes: savers and claimants that die, dawdle, fork, or come late."""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import cprd
from cprd.linux.rights import receive
from cprd.protocol import messages
from tests.support import wire
from tests.support.checkout import open_to_all
from tests.support.child import Child, Line, become
from tests.support.daemon import DaemonProcess
from tests.support.goods import goods, state_of
from tests.support.patience import PATIENCE, patience, rest, until

pytestmark = pytest.mark.usefixtures("nothing_leaks")
root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes other uids: wants root")

PROMPT = patience(1.0)  # s in which what waits must have woken up; it takes 1 ms


def empty() -> cprd.State:
    return state_of("empty", [], [])


def the_row(daemon: cprd.Daemon) -> cprd.Row:
    [row] = daemon.list()
    return row


def phase_becomes(daemon: cprd.Daemon, phase: str) -> cprd.Row:
    until(lambda: the_row(daemon)["phase"] == phase, lambda: f"{daemon.list()}")
    return the_row(daemon)


def claims(line: Line, path: str, lease: float = 600.0, then: str = "") -> None:
    """Claims "web", and does as it is told."""
    daemon = cprd.connect(path)
    claim = daemon.load("web", lease=lease, wait=5)
    line.say("claimed")
    while True:
        told = then or line.hear()
        if told == "exit":
            os._exit(0)
        elif told == "fork":
            if not os.fork():
                line.say(os.getpid())
                signal.pause()
        elif told == "receive":
            _, fds, _ = receive(socket.socket(fileno=os.dup(claim._claim.bundle)), 4096)
            line.say(len(fds))
        elif told == "begin":
            claim.begin()
            line.say("begun")
        elif told == "confirm":
            try:
                claim.confirm()
                line.say("confirmed")
            except cprd.Fenced as error:
                line.say(f"Fenced: {error}")


def prepares(line: Line, path: str) -> None:
    with cprd.connect(path) as daemon:
        prepared = daemon.prepare("web", empty(), if_exists="replace")
        line.say(prepared.generation)
        line.hear()
        prepared.commit()


def saves(line: Line, path: str, after_exit: bool = False) -> None:
    with cprd.connect(path) as daemon:
        line.say(daemon.save("web", empty(), after_exit=after_exit).generation)
        line.hear()


def loads(line: Line, path: str, name: str = "web") -> None:
    with cprd.connect(path) as daemon:
        line.say("here")
        with daemon.load(name, wait=20) as claim:
            line.say(claim.generation)
            line.hear()


# A claimant that ends without a word


def test_a_claimant_that_exits_silently_gives_it_back_at_once(daemon: DaemonProcess) -> None:
    with daemon.connect() as connection, goods("x") as cargo:
        connection.save("web", cargo.state())
        with Child(claims, daemon.path) as claimant:
            assert claimant.hear() == "claimed"
            with pytest.raises(cprd.Busy, match=f"claimed by pid {claimant.pid}"):
                connection.load("web")
            claimant.say("exit")
            begin = time.monotonic()
            with connection.load("web", wait=10) as claim:
                assert time.monotonic() - begin < PROMPT
                assert claim.attempts == 2
                assert f"pid {claimant.pid} did not confirm" in claim.last_reject
                cargo.check(claim.state)


def test_a_child_of_the_claimant_that_keeps_the_connection_does_not_keep_the_claim(
    daemon: DaemonProcess,
) -> None:
    with daemon.connect() as connection:
        connection.save("web", empty())
        with Child(claims, daemon.path) as claimant:
            claimant.hear()
            claimant.say("fork")
            grandchild = int(claimant.hear())
            try:
                claimant.kill()
                with connection.load("web", wait=10) as claim:
                    assert "its process ended" in claim.last_reject
                    os.kill(grandchild, 0)  # it lives, and has the connection still
            finally:
                os.kill(grandchild, signal.SIGKILL)


def test_a_claimant_that_sleeps_past_its_lease_comes_late(daemon: DaemonProcess) -> None:
    with daemon.connect() as connection:
        connection.save("web", empty())
        with Child(claims, daemon.path, 0.2) as sleeper:
            sleeper.hear()
            with connection.load("web", wait=10) as claim:
                assert "its lease of 0.2 s is over" in claim.last_reject
                sleeper.say("confirm")
                assert sleeper.hear().startswith("Fenced: ")
            sleeper.say("confirm")
            assert sleeper.hear().startswith("Fenced: ")


def test_a_claimant_that_received_instead_of_peeking_is_named(daemon: DaemonProcess) -> None:
    with daemon.connect() as connection, goods("x") as cargo:
        connection.save("web", cargo.state())
        with Child(claims, daemon.path) as claimant:
            claimant.hear()
            claimant.say("receive")
            assert int(claimant.hear()) == 4 + 2  # with the manifest and one section
            claimant.kill()
            with pytest.raises(cprd.Damaged, match=f"pid {claimant.pid} had claimed it"):
                connection.load("web", wait=10)
        row = the_row(connection)
        assert (row["phase"], row["fds"]) == ("damaged", 4)
        with pytest.raises(cprd.Damaged):
            connection.load("web")
        with pytest.raises(cprd.Busy, match="by force"):
            connection.drop("web")
        connection.drop("web", force=True)
        with pytest.raises(cprd.NotHeld):
            connection.load("web")


def test_a_part_deep_in_the_tree_that_was_received_is_found_by_who_reads(
    daemon: DaemonProcess,
) -> None:
    with daemon.connect() as connection, goods("x", 600) as cargo:
        connection.save("web", cargo.state())
        claim = connection.load("web")
        with socket.socket(fileno=os.dup(claim._claim.bundle)) as top:
            _, leaves, _ = receive(top, 4096, socket.MSG_PEEK)
        with socket.socket(fileno=leaves[1]) as leaf:
            _, taken, _ = receive(leaf, 4096)
        for fd in (leaves[0], *leaves[2:], *taken):
            os.close(fd)
        claim.reject("took some")
        claim.close()
        with pytest.raises(cprd.Damaged, match=f"pid {os.getpid()} had claimed it last"):
            connection.load("web")
        assert the_row(connection)["phase"] == "damaged"


def test_a_death_after_begin_leaves_doubt(daemon: DaemonProcess) -> None:
    with daemon.connect() as connection, goods("x") as cargo:
        connection.save("web", cargo.state(), ttl=patience(0.3))  # after the claim
        with Child(claims, daemon.path) as claimant:
            claimant.hear()
            claimant.say("begin")
            assert claimant.hear() == "begun"
            claimant.kill()
        until(lambda: "and then" in str(the_row(connection)["reason"]), lambda: "quiet")
        with pytest.raises(cprd.Busy, match="began to act on it"):
            connection.load("web", wait=0.1)
        with pytest.raises(cprd.Busy, match="--force"):
            connection.release("web", force=False)
        connection.release("web", force=True)
        until(lambda: connection.list() == [], lambda: "the ttl does not go on")


# Before it is there to be served


def test_a_load_while_the_predecessor_prepares_is_busy_and_wakes_at_commit(
    daemon: DaemonProcess,
) -> None:
    with daemon.connect() as connection:
        with Child(prepares, daemon.path) as saver, Child(loads, daemon.path) as successor:
            generation = saver.hear()
            with pytest.raises(cprd.Busy, match=f"prepared by pid {saver.pid}"):
                connection.load("web")
            successor.hear()
            saver.say("commit")
            begin = time.monotonic()
            assert successor.hear() == generation
            assert time.monotonic() - begin < PROMPT
            successor.say()
            assert (saver.wait(), successor.wait()) == (0, 0)


@pytest.mark.parametrize("how", ["exit", "zombie"])
def test_after_exit_serves_it_when_the_saver_has_ended(daemon: DaemonProcess, how: str) -> None:
    with daemon.connect() as connection:
        with Child(saves, daemon.path, True) as saver, Child(loads, daemon.path) as successor:
            generation = saver.hear()
            with pytest.raises(cprd.Busy, match=f"pid {saver.pid}, has not ended"):
                connection.load("web")
            successor.hear()
            if how == "exit":
                saver.say("go")
                assert saver.wait() == 0
            else:
                saver.becomes_a_zombie()
            begin = time.monotonic()
            assert successor.hear() == generation
            assert time.monotonic() - begin < PROMPT
            successor.say()
            assert successor.wait() == 0


def test_after_exit_of_another_process_by_its_pidfd(daemon: DaemonProcess) -> None:
    with daemon.connect() as connection, Child(lambda line: line.hear()) as other:
        pidfd = os.pidfd_open(other.pid)
        connection.save("web", empty(), after_exit=pidfd)
        with pytest.raises(cprd.Busy, match=f"pid {other.pid}, has not ended"):
            connection.load("web")
        other.becomes_a_zombie()
        connection.load("web").close()  # no wait: cprd looks before it answers
        other.wait()
        connection.save("web", empty(), if_exists="replace", after_exit=pidfd)
        connection.load("web").close()  # it had ended already when it was saved
        os.close(pidfd)


def test_after_exit_wants_a_pidfd(daemon: DaemonProcess) -> None:
    with daemon.connect() as connection, open(os.devnull) as null:
        with pytest.raises(cprd.CprdError, match="not a pidfd"):
            connection.save("web", empty(), after_exit=null)
        assert connection.list() == []


def test_a_wait_for_what_is_not_there_ends_with_the_save(daemon: DaemonProcess) -> None:
    def waits(line: Line) -> None:
        with cprd.connect(daemon.path) as connection:
            line.say("here")
            line.say(connection.wait("web", 20))

    with daemon.connect() as connection, Child(waits) as waiter:
        waiter.hear()
        connection.list()
        generation = connection.save("web", empty()).generation
        assert waiter.hear() == str(generation)
        assert waiter.wait() == 0
        assert the_row(connection)["phase"] == "held"  # to wait is not to claim


def test_a_wait_that_runs_out_says_what_a_load_would_say(daemon: DaemonProcess) -> None:
    with daemon.connect() as connection:
        begin = time.monotonic()
        with pytest.raises(cprd.NotHeld):
            connection.load("web", wait=0.1)
        with pytest.raises(cprd.NotHeld):
            connection.wait("web", 0.1)
        prepared = connection.prepare("web", empty())
        with pytest.raises(cprd.Busy, match="prepared"):
            connection.load("web", wait=0.1)
        with pytest.raises(cprd.Busy, match="prepared"):
            connection.wait("web", 0.1)
        assert 0.4 <= time.monotonic() - begin < 0.4 + PROMPT
        prepared.abort()


def raw(path: str) -> socket.socket:
    """A connection that has said hello."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(PATIENCE)
    sock.connect(path)
    sock.send(wire.HELLO)
    wire.read_answer(sock.recv(65536))
    return sock


def test_who_waits_first_is_served_first(daemon: DaemonProcess) -> None:
    with daemon.connect() as connection:
        waiters = []
        for _ in range(4):
            waiter = raw(daemon.path)
            waiter.send(wire.load("web", 20.0))
            connection.list()  # twice: a request that was sent before is read before
            connection.list()
            waiters.append(waiter)
        waiters.pop(1).close()  # who has gone is passed over
        connection.save("web", empty())
        for waiter in waiters:
            data, fds, _ = receive(waiter, 65536)
            assert len(fds) == 1
            os.close(fds[0])
            assert "ok" in messages.decode(data, 65536)
            for other in waiters:
                if other is not waiter and other.fileno() >= 0:
                    assert not select.select([other], [], [], 0)[0]
            waiter.close()  # which gives it back, to the next one


def test_a_request_while_one_waits_ends_the_wait_with_a_reason(daemon: DaemonProcess) -> None:
    with raw(daemon.path) as hasty:
        hasty.send(wire.load("web", 20.0))
        hasty.send(wire.request("status"))
        with pytest.raises(cprd.ProtocolError, match="before the answer"):
            wire.read_answer(hasty.recv(65536))
        assert "pid" in wire.read_answer(hasty.recv(65536))


# ttl


def test_a_ttl_ends_a_hold_and_stands_still_while_it_is_claimed(daemon: DaemonProcess) -> None:
    ttl = patience(0.3)  # the claim has to come before the end
    with daemon.connect() as connection:
        connection.save("web", empty(), ttl=ttl)
        claim = connection.load("web")
        rest(ttl + 0.1)  # what must not happen meanwhile has no event
        assert the_row(connection)["phase"] == "claimed"
        claim.reject("later")
        claim.close()
        assert the_row(connection)["phase"] == "held"
        daemon.await_log("ttl over")
        with pytest.raises(cprd.NotHeld):
            connection.load("web")


# Who acts


def test_a_save_by_the_process_that_acts_replaces_the_doubt(daemon: DaemonProcess) -> None:
    def begins(line: Line, pid: int) -> None:
        claim = cprd.connect(daemon.path).load("web", wait=5)
        claim.begin(process=os.pidfd_open(pid))
        line.say("begun")
        line.hear()

    def acts(line: Line) -> None:
        line.hear()
        saves(line, daemon.path)

    with daemon.connect() as connection, Child(acts) as actor, Child(begins, actor.pid) as launcher:
        connection.save("web", empty())
        launcher.hear()
        with pytest.raises(cprd.AlreadyHeld):
            connection.save("web", empty())
        launcher.kill()
        until(lambda: "and then" in str(the_row(connection)["reason"]), lambda: "quiet")
        row = the_row(connection)
        assert (row["phase"], row["acting"]) == ("in-doubt", actor.pid)
        actor.say("save")
        generation = actor.hear()
        row = the_row(connection)
        assert (row["phase"], str(row["generation"])) == ("held", generation)
        actor.say("exit")
        assert actor.wait() == 0


def test_a_save_that_names_the_acting_process_as_its_predecessor_replaces_the_doubt(
    daemon: DaemonProcess,
) -> None:
    with daemon.connect() as connection, Child(lambda line: line.hear()) as actor:
        pidfd = os.pidfd_open(actor.pid)
        connection.save("web", empty())
        claim = connection.load("web")
        claim.begin(process=pidfd)
        claim.close()
        connection.save("web", empty(), after_exit=pidfd)
        with pytest.raises(cprd.Busy, match=f"pid {actor.pid}, has not ended"):
            connection.load("web")
        os.close(pidfd)


def test_a_save_by_another_process_than_the_one_that_acted_and_died_replaces_nothing(
    daemon: DaemonProcess,
) -> None:
    with daemon.connect() as connection, Child(lambda line: line.hear()) as actor:
        pidfd = os.pidfd_open(actor.pid)
        connection.save("web", empty())
        claim = connection.load("web")
        claim.begin(process=pidfd)
        claim.close()
        actor.kill()
        until(lambda: the_row(connection)["acting"] is None, lambda: f"{connection.list()}")
        with pytest.raises(cprd.AlreadyHeld):
            connection.save("web", empty(), after_exit=pidfd)
        os.close(pidfd)


# A claimant that goes on after it lost its connection


def test_the_late_end_of_a_claims_former_connection_does_not_end_it(daemon: DaemonProcess) -> None:
    with daemon.connect() as connection, raw(daemon.path) as first, raw(daemon.path) as second:
        connection.save("web", empty())
        request = wire.load("web")
        answers = []
        for sock in (first, second):  # said again, with its nonce: the first answer was lost
            sock.send(request)
            data, fds, _ = receive(sock, 65536)
            os.close(fds[0])
            answers.append(wire.read_answer(data))
        assert answers[0] == answers[1]
        first.close()
        connection.list()
        connection.list()
        assert the_row(connection)["phase"] == "claimed"
        second.close()
        phase_becomes(connection, "held")


def test_leaving_the_block_in_a_forked_child_does_nothing(daemon: DaemonProcess) -> None:
    with daemon.connect() as connection, goods("x") as cargo:
        connection.save("web", cargo.state())
        with connection.load("web") as claim:

            def leaves(line: Line) -> None:
                claim.__exit__(None, None, None)
                claim.close()
                connection.close()
                with pytest.raises(cprd.InvalidInput, match="parent"):
                    connection.list()

            with Child(leaves) as child:
                assert child.wait() == 0
            assert the_row(connection)["phase"] == "claimed"
            cargo.check(claim.state)


# Names of other uids

STRANGER = 12345


def as_stranger(line: Line, path: str) -> None:
    become(STRANGER)
    with cprd.connect(path) as daemon:
        daemon.save("web", empty())
        assert [row["uid"] for row in daemon.list()] == [STRANGER]
        daemon.load(f"{STRANGER}/web").close()
        for verb in (
            lambda: daemon.load("0/web"),
            lambda: daemon.save("0/web", empty(), if_exists="replace"),
            lambda: daemon.prepare("0/other", empty()),
            lambda: daemon.drop("0/web", force=True),
            lambda: daemon.release("0/web"),
            lambda: daemon.show("0/web"),
            lambda: daemon.wait("0/web", 0.1),
        ):
            with pytest.raises(cprd.Denied, match=f"uid {STRANGER} may not"):
                verb()
        line.say("done")
        line.hear()
        with pytest.raises(cprd.NotHeld):
            daemon.load("web")


@root
def test_a_uid_has_names_of_its_own_and_root_reaches_them(daemon: DaemonProcess) -> None:
    with daemon.connect() as connection:
        connection.save("web", empty())
        with Child(as_stranger, daemon.path) as stranger:
            assert stranger.hear() == "done"
            assert [(row["uid"], row["name"]) for row in connection.list()] == [
                (0, "web"),
                (STRANGER, "web"),
            ]
            with connection.load(f"{STRANGER}/web") as claim:
                assert claim.state["tag"] == "empty"
            stranger.say("gone")
            assert stranger.wait() == 0
        assert [row["uid"] for row in connection.list()] == [0]


class Enclosed(DaemonProcess):
    """A daemon in namespaces of its own."""

    unshare: tuple[str, ...] = ()

    def start(self) -> None:
        if self.command[0] != "unshare":
            self.command[:0] = ["unshare", *self.unshare]
        super().start()

    def stop(self) -> int:
        """unshare itself, where it stays, passes no signal on."""
        for child in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGTERM)
        return super().stop()


@root
def test_a_uid_that_is_not_mapped_is_refused(tmp_path: Path) -> None:
    class InUserNamespace(Enclosed):
        unshare = ("--user", "--map-root-user")

    def comes(line: Line) -> None:
        become(STRANGER)
        with pytest.raises(cprd.Denied, match="uid of another user namespace"):
            cprd.connect(daemon.path)

    open_to_all(tmp_path)
    daemon = InUserNamespace(tmp_path)
    try:
        with Child(comes) as stranger:
            assert stranger.wait() == 0
        daemon.connect().close()  # who is mapped comes in
    finally:
        daemon.stop()


@root
def test_a_peer_of_another_pid_namespace_is_told_what_its_lease_hangs_on(tmp_path: Path) -> None:
    class InPidNamespace(Enclosed):
        unshare = ("--pid", "--fork", "--kill-child", "--mount-proc")

    daemon = InPidNamespace(tmp_path)
    try:
        with daemon.connect() as connection:
            assert connection.greeting["pid"] == 0
            lease_by = connection.greeting["lease_by"]
            assert lease_by in (["connection", "process", "time"], ["connection", "time"])
            connection.save("web", empty())
            if "process" not in lease_by:
                with pytest.raises(cprd.LimitExceeded, match="another pid namespace"):
                    connection.save("late", empty(), after_exit=True)
                return
            with Child(claims, daemon.path) as claimant:  # Linux 6.5: seen by its pidfd
                claimant.hear()
                with pytest.raises(cprd.Busy, match="another pid namespace"):
                    connection.load("web")
                claimant.say("fork")
                grandchild = int(claimant.hear())
                try:
                    claimant.kill()
                    connection.load("web", wait=10).close()
                finally:
                    os.kill(grandchild, signal.SIGKILL)
    finally:
        daemon.stop()


# By hand, in each phase, over the wire

Stage = Callable[[cprd.Daemon, str], object]


def stage(phase: str, connection: cprd.Daemon, path: str) -> list[Child]:
    """Bring "web" to a phase; the processes that keep it there."""
    if phase == "prepared":
        connection._kept = connection.prepare("web", empty())  # type: ignore[attr-defined]
        return []
    if phase == "vanished":
        with Child(prepares, path) as saver:
            saver.hear()
        phase_becomes(connection, "in-doubt")
        return []
    connection.save("web", empty())
    if phase == "held":
        return []
    child = Child(claims, path)
    child.hear()
    if phase == "begun":
        child.say("begin")
        child.hear()
    if phase == "damaged":
        child.say("receive")
        child.hear()
        with child:
            child.kill()
        phase_becomes(connection, "damaged")
        return []
    return [child]


@pytest.mark.parametrize(
    ("phase", "drop", "drop_force", "release_force"),
    [
        ("held", True, True, True),
        ("prepared", False, False, False),
        ("claimed", False, True, False),
        ("begun", False, True, True),
        ("vanished", False, True, True),
        ("damaged", False, True, False),
    ],
)
def test_drop_and_release_with_and_without_force(
    daemon: DaemonProcess, phase: str, drop: bool, drop_force: bool, release_force: bool
) -> None:
    for verb, force, works in (
        ("release", False, phase == "held"),
        ("release", True, release_force),
        ("drop", False, drop),
        ("drop", True, drop_force),
    ):
        with daemon.connect() as connection:
            children = stage(phase, connection, daemon.path)
            before = the_row(connection)["generation"]
            try:
                if works:
                    assert getattr(connection, verb)("web", force=force) == before
                    if verb == "drop":
                        assert connection.list() == []
                    else:
                        assert the_row(connection)["phase"] == "held"
                        connection.load("web").close()
                else:
                    with pytest.raises(cprd.Busy):
                        getattr(connection, verb)("web", force=force)
            finally:
                for child in children:
                    if works and phase in ("claimed", "begun"):
                        child.say("confirm")
                        assert child.hear().startswith("Fenced")
                    with child:
                        pass
                # (The exception has a cycle: left to the collector, the connection may stay.)
                vars(connection).pop("_kept", None)
        with daemon.connect() as connection:
            until(
                lambda c=connection: not c.list() or c.list()[0]["phase"] != "prepared",  # type: ignore[misc]
                lambda: "prepared",
            )
            if connection.list():
                connection.drop("web", force=True)

"""`cprd --keep` as a command: its socket, its end, PID 1 of a container."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cprd
from cprd.errors import LimitExceeded
from tests.support.child import Child, Line
from tests.support.descriptors import open_fds
from tests.support.goods import goods
from tests.support.keeping import things
from tests.support.patience import PATIENCE, in_time, until

from .conftest import Keep
from .keeping import KeptByParent, children, environment

pytestmark = pytest.mark.usefixtures("nothing_leaks")


def attempt(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """One that is not to come up."""
    return subprocess.run(
        [sys.executable, "-m", "cprd.daemon.command", "--keep", *arguments],
        capture_output=True,
        text=True,
        env=environment(**more),
        timeout=PATIENCE,
        check=False,
    )


def test_what_is_held_survives_kill_9_with_its_connections(keeping: KeptByParent) -> None:
    with goods("kept", eventfds=300, connections=3) as cargo, keeping.connect() as daemon:
        parent = open_fds(keeping.parent.pid)
        assert daemon.save("web", cargo.state(), require="store").kept == "store"
        for _ in range(3):
            keeping.kill()
        with daemon.load("web") as claim:
            cargo.check(claim.state)
        assert not keeping.phases()
        until(
            lambda: open_fds(keeping.parent.pid) <= parent + 2,
            lambda: f"{open_fds(keeping.parent.pid)} descriptors in the parent, not {parent}",
        )


def test_sigterm_to_cprd_itself_is_followed_by_a_start_at_the_same_socket(keep: Keep) -> None:
    keeping = keep()
    with things(1) as (thing,), keeping.connect() as daemon:
        daemon.save("web", thing.state)
        inode = os.lstat(keeping.path).st_ino
        keeping.kill(signal.SIGTERM)
        assert os.lstat(keeping.path).st_ino == inode
        with daemon.load("web") as claim:
            assert thing.is_in(claim)


def test_sighup_renews_both_and_interrupts_nobody(keeping: KeptByParent) -> None:
    with things(1) as (thing,), keeping.connect() as daemon:
        daemon.save("web", thing.state, require="store")
        claim = daemon.load("web")
        keeping.parent.send_signal(signal.SIGHUP)
        until(lambda: keeping.said().count("ready pid=") == 2, keeping.said)
        until(lambda: "keep-re-executing" in keeping.said(), keeping.said)
        assert children(keeping.parent.pid) == [keeping.pid]
        keeping.kill()
        assert thing.is_in(claim)
        claim.confirm()
        claim.close()
        assert not keeping.phases()


def test_a_stop_is_over_within_two_seconds_and_says_what_was_lost(keeping: KeptByParent) -> None:
    with things(1) as (thing,):
        with keeping.connect() as daemon:
            daemon.save("web", thing.state)
        thing.saved()
        before = time.monotonic()
        assert keeping.stop() == 0
        assert in_time(time.monotonic() - before, 2)
        assert thing.let_go()
    last = keeping.said().splitlines()[-1]
    assert last.split()[1] == "keep-ended"
    assert "1 holds" in last
    assert set(os.listdir(keeping.place)) == {"cprd-test.py", "log"}


def test_the_killed_parent_is_missed(keep: Keep) -> None:
    """cprd goes on, and does not say "store" any more."""
    keeping = keep(settings="cprd.daemon.storage.fdstore.RECHECK = 0.1\n")
    with keeping.connect() as daemon:
        daemon.save("web", cprd.State(), require="store")
        keeping.parent.kill()
        keeping.parent.wait()
        try:
            keeping.await_kept("memory")
            with pytest.raises(LimitExceeded):
                daemon.save("more", cprd.State(), require="store")
            assert set(keeping.phases()) == {"web"}
        finally:
            os.kill(keeping.pid, signal.SIGKILL)


GIVEN = """
import os, socket, sys
names = sys.argv.pop(1)
environ = {**os.environ, "LISTEN_PID": str(os.getpid()), "LISTEN_FDNAMES": names}
environ["LISTEN_FDS"] = str(len(names.split(":")))
os.dup2(int(sys.argv.pop(1)), 3)
for _ in names.split(":")[1:]:
    os.set_inheritable(socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)[0].detach(), True)
os.execve(sys.executable, [sys.executable, "-m", "cprd.daemon.command", "--keep"], environ)
"""


def test_a_socket_that_a_manager_gives_is_served_and_left_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "given.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        command = [sys.executable, "-c", GIVEN, "x.socket", str(listener.fileno())]
        parent = subprocess.Popen(
            command, pass_fds=[listener.fileno()], env=environment(), stderr=subprocess.DEVNULL
        )
        try:
            with cprd.connect(path) as daemon:
                assert daemon.save("web", cprd.State(), require="store").kept == "store"
                assert daemon.status()["pid"] in children(parent.pid)
        finally:
            parent.terminate()
            assert parent.wait(PATIENCE) == 0
        assert os.listdir(tmp_path) == ["given.sock"]
        command[3] = "x.socket:shelf.1.out"
        said = subprocess.run(
            command,
            pass_fds=[listener.fileno()],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert said.returncode == 1
        assert "leave out --keep" in said.stderr


def test_the_same_rules_hold_for_its_socket(keeping: KeptByParent, tmp_path: Path) -> None:
    said = attempt("--socket", keeping.path)
    assert (said.returncode, said.stderr) == (1, f"cprd: another cprd serves {keeping.path}\n")
    (tmp_path / "file").touch()
    said = attempt("--socket", str(tmp_path / "file"))
    assert said.returncode == 1
    assert "not a socket" in said.stderr
    said = attempt("--socket", str(tmp_path / ("x" * (107 - len(str(tmp_path)) - 1))))
    assert said.returncode == 1
    assert ".keep" in said.stderr
    assert "file" in os.listdir(tmp_path)
    (tmp_path / "bad.toml").write_text("[nonsense]\n")
    said = attempt("--socket", str(tmp_path / "s"), "--config", str(tmp_path / "bad.toml"))
    assert said.returncode == 1
    assert "bad.toml" in said.stderr
    assert attempt("--kee").returncode == 2
    assert keeping.kept() == "store"


def test_a_socket_left_by_one_that_was_killed_is_taken_over(keep: Keep) -> None:
    keeping = keep()
    keeping.close()
    assert os.path.exists(keeping.path)
    again = KeptByParent(keeping.place)
    try:
        assert again.kept() == "store"
        assert again.stop() == 0
    finally:
        again.close()


# PID 1

CONTAINER = (
    *("unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"),
)


def unshare_works() -> bool:
    return subprocess.run([*CONTAINER, "true"], capture_output=True, check=False).returncode == 0


@pytest.fixture
def contained(tmp_path: Path) -> str:
    if not unshare_works():
        pytest.skip("user namespaces are needed: sysctl user.max_user_namespaces, or be root")
    return str(tmp_path / "cprd.sock")


@pytest.mark.parametrize("killed_before", [False, True])
def test_as_pid_1_it_leaves_no_zombie_and_ends_in_time(contained: str, killed_before: bool) -> None:
    process = subprocess.Popen(
        [*CONTAINER, sys.executable, "-m", "cprd.daemon.command", "--keep", "--socket", contained],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        while "ready pid=" not in (line := process.stderr.readline()):
            assert line, "it did not start"
        (init,) = children(process.pid)
        assert re.search(r"^NSpid:.*\s1$", Path(f"/proc/{init}/status").read_text(), re.M)
        (daemon,) = children(init)
        # An orphan of a process that is none of its own becomes PID 1's.
        orphan = "import os; os.fork() or (os.fork() or os._exit(0)) and os._exit(0)"
        inside = ["nsenter", f"--target={init}", "--user", "--pid", "--preserve-credentials"]
        subprocess.run([*inside, sys.executable, "-c", orphan], check=True, timeout=PATIENCE)
        until(lambda: children(init) == [daemon], lambda: f"children: {children(init)}")
        with cprd.connect(contained) as client:
            client.save("web", cprd.State(), require="store")
            if killed_before:
                os.kill(daemon, signal.SIGKILL)
                assert [row["name"] for row in client.list()] == ["web"]
                until(lambda: daemon not in children(init), lambda: f"a zombie: {daemon}")
        for number in (signal.SIGUSR1, signal.SIGHUP):
            os.kill(init, number)
        said = ""
        while (
            "keep-re-executing" not in said
            or "ready pid=" not in said.rpartition("re-executing")[2]
        ):
            said += (line := process.stderr.readline())
            assert line, said
        before = time.monotonic()
        os.kill(init, signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        assert in_time(time.monotonic() - before, 2)
        last = process.stderr.read().splitlines()[-1]
        assert "keep-ended status=0" in last
        assert "1 holds" in last
        assert not os.path.exists(contained)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_as_pid_1_its_status_is_the_one_of_a_start_that_failed(contained: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.bind(contained)
        other.listen()
        command = [
            *CONTAINER,
            sys.executable,
            "-m",
            "cprd.daemon.command",
            "--keep",
            "--socket",
            contained,
        ]
        said = subprocess.run(command, env=environment(), capture_output=True, check=False)
        assert said.returncode == 1


@pytest.mark.parametrize("contact", ["request", "another connection"])
@pytest.mark.parametrize("how", ["close", "an error in the block"])
def test_a_claim_that_ends_while_cprd_is_away_ends_at_the_next_contact(
    keeping: KeptByParent, contact: str, how: str
) -> None:
    """The process lives, and the lease lasts: nothing else says so to the next cprd."""
    with things(1) as (thing,), keeping.connect() as daemon:
        daemon.save("web", thing.state)
        claim = daemon.load("web", lease=3600)
        os.kill(keeping.parent.pid, signal.SIGSTOP)  # starts no other cprd meanwhile
        try:
            os.kill(keeping.pid, signal.SIGKILL)
            if how == "close":
                claim.close()
            else:
                with pytest.raises(ZeroDivisionError), claim:
                    raise ZeroDivisionError
        finally:
            os.kill(keeping.parent.pid, signal.SIGCONT)
        keeping.await_start()
        with Child(tells_the_phase, keeping.path) as other:
            assert other.hear() == "claimed"
        if contact == "request":
            daemon.status()
        else:
            keeping.connect().close()
        with Child(tells_the_phase, keeping.path) as other:
            assert other.hear() == "held"
        with daemon.load("web") as claim:
            assert thing.is_in(claim)


def tells_the_phase(line: Line, path: str) -> None:
    with cprd.connect(path) as daemon:
        line.say(daemon.list()[0]["phase"])
    line.hear()

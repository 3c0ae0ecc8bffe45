"""Live holds with a real cprd: owners are processes of their own, and are killed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

import cprd
from cprd.errors import Fenced
from cprd.linux.rights import send
from cprd.protocol.lifecycle import MOST_DEATHS
from tests.support.checkout import CHECKOUT
from tests.support.child import Child, Line
from tests.support.daemon import DaemonProcess
from tests.support.live import Live
from tests.support.patience import PATIENCE, in_time, until

pytestmark = pytest.mark.usefixtures("nothing_leaks")

NAME = "chat"


class Pipe:
    """A pipe whose writing end is kept: the reading end tells whether anybody has it still."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()
        os.set_blocking(self.reading, False)
        self.inode = os.fstat(self.writing).st_ino

    def forget(self) -> None:
        """We want no copy any more."""
        os.close(self.writing)
        self.writing = -1

    @property
    def is_let_go(self) -> bool:
        try:
            return os.read(self.reading, 1) == b""
        except BlockingIOError:
            return False

    def await_let_go(self) -> None:
        begin = time.monotonic()
        until(lambda: self.is_let_go, lambda: "it is held still")
        assert in_time(time.monotonic() - begin, 1.0)

    def is_in(self, state: cprd.State) -> bool:
        return os.fstat(state.find_fd("pipe", 0)).st_ino == self.inode

    def close(self) -> None:
        for fd in (self.reading, self.writing):
            if fd >= 0:
                os.close(fd)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.close()


def own(line: Line, path: str, fd: int = -1, name: str = NAME) -> None:
    """Take the hold over, or begin it; keep `fd`; then change a section each time the test says so,
    and answer with the error, if any."""
    live = Live(path, name)
    if live.answer["found"]:
        live.confirm()
    if fd >= 0:
        live.kept.save_fd("pipe", 0, fd, replace=True)
        os.close(fd)
    line.say("found" if live.answer["found"] else "begun")
    number = 0
    while True:
        word = line.hear()
        try:
            if word == "end":
                live.end(keep=False)
            elif word == "close":
                live.end(keep=True)
            elif word == "put back":
                until(lambda: live.has_lost_cprd, lambda: "cprd is there still")
                live.put_back()
            else:
                number += 1
                live.kept.save_section("count", number)
            line.say("ok")
        except cprd.CprdError as error:
            line.say(f"{type(error).__name__}: {error}")


def ask(child: Child, word: str = "change") -> str:
    child.say(word)
    return child.hear()


def row(daemon: DaemonProcess, name: str = NAME) -> cprd.Row | None:
    with daemon.connect() as connection:
        rows = [row for row in connection.list() if row["name"] == name]
    assert len(rows) < 2
    return rows[0] if rows else None


def phase(daemon: DaemonProcess, name: str = NAME) -> str:
    found = row(daemon, name)
    return found["phase"] if found is not None else "-"


def await_phase(daemon: DaemonProcess, wanted: str, name: str = NAME) -> None:
    until(lambda: phase(daemon, name) == wanted, lambda: phase(daemon, name))


# From owner to owner


def test_what_a_killed_owner_kept_is_there_for_the_next(daemon: DaemonProcess, pipe: Pipe) -> None:
    base = daemon.fds()
    with Child(own, daemon.path, pipe.writing) as owner:
        assert owner.hear() == "begun"
        assert ask(owner) == "ok"
        with daemon.connect() as connection:
            with pytest.raises(cprd.Busy, match=f"in use by pid {owner.pid}, ") as caught:
                connection.load(NAME)
            assert (caught.value.pid, caught.value.phase) == (owner.pid, "live")
        there = row(daemon)
        assert there is not None
        assert (there["phase"], there["in_use_by"], there["live"]) == ("live", owner.pid, True)
        owner.kill()
    await_phase(daemon, "held")
    with Live(daemon.path, NAME) as live:
        assert (live.answer["found"], live.answer["live"]) == (True, True)
        assert live.answer["generation"] == there["generation"]
        assert live.answer["last_end"] in ("ended", "killed by SIGKILL")
        state = live.read().state
        assert state["count"] == 1
        assert pipe.is_in(state)
        live.confirm()
        assert live.answer["generation"] > there["generation"]
        there = row(daemon)
        assert there is not None
        assert (there["phase"], there["in_use_by"]) == ("live", os.getpid())
        live.kept.save_section("count", 2)
        pipe.forget()
        live.end(keep=False)
    assert phase(daemon) == "-"
    pipe.await_let_go()
    daemon.await_fds(base, queues=1)


def test_how_the_last_owner_ended_is_said(daemon: DaemonProcess, pipe: Pipe) -> None:
    from cprd.linux.processes import how_ended

    for end, said in ((signal.SIGKILL, "killed by SIGKILL"), (None, "exited 1")):
        with Child(own, daemon.path, pipe.writing) as owner:
            owner.hear()
            pidfd = os.pidfd_open(owner.pid)
            if end is None:
                owner.line.sock.shutdown(socket.SHUT_WR)  # EOFError in the child
            else:
                os.kill(owner.pid, end)
            owner.wait()
            known = how_ended(pidfd)
            os.close(pidfd)
        await_phase(daemon, "held")
        with Live(daemon.path, NAME) as live:
            assert live.answer["last_end"] == (known or "ended")
            assert known in ("", said)  # Linux 6.15 tells
            live.confirm()
            live.end(keep=False)


def test_an_owner_that_closes_and_goes_on_leaves_the_hold(
    daemon: DaemonProcess, pipe: Pipe
) -> None:
    with Child(own, daemon.path, pipe.writing) as owner:
        owner.hear()
        assert ask(owner, "close") == "ok"
        assert phase(daemon) == "held"
        with Live(daemon.path, NAME) as live:
            assert pipe.is_in(live.read().state)
            assert live.answer["last_end"] == "closed by its owner"


def test_who_waits_gets_the_hold_when_the_owner_ends_or_begins_when_it_is_gone(
    daemon: DaemonProcess, pipe: Pipe
) -> None:
    def wait(line: Line) -> None:
        with Live(daemon.path, NAME, wait=PATIENCE) as live:
            line.say(live.answer["found"])
            line.hear()

    for end, found in (("kill", "True"), ("end", "False")):
        with Child(own, daemon.path, pipe.writing) as owner:
            owner.hear()
            with Child(wait) as successor:
                time.sleep(0.05)  # it may ask before or after the end: the answer is the same
                if end == "kill":
                    owner.kill()
                else:
                    assert ask(owner, end) == "ok"
                assert successor.hear() == found
        await_phase(daemon, "held")
        with daemon.connect() as connection:
            connection.drop(NAME)


def test_a_second_starter_is_busy_and_a_repeated_request_gets_the_first_answer(
    daemon: DaemonProcess,
) -> None:
    nonce = os.urandom(16)
    with Live(daemon.path, NAME, nonce=nonce) as live:
        with pytest.raises(cprd.Busy, match="keeps it live"):
            Live(daemon.path, NAME)
        with Live(daemon.path, NAME, nonce=nonce) as again:  # the answer was lost
            assert again.answer == live.answer
        live.end(keep=False)
        with pytest.raises(Fenced, match="has ended since"):
            Live(daemon.path, NAME, nonce=nonce)


def test_a_saved_state_is_taken_live_and_what_was_live_is_loaded(
    daemon: DaemonProcess, pipe: Pipe
) -> None:
    base = daemon.fds()
    with daemon.connect() as connection:
        state = cprd.State()
        state.save_fd("pipe", 0, pipe.writing)
        connection.save(NAME, state)
        with Live(daemon.path, NAME) as live:
            assert (live.answer["found"], live.answer["live"]) == (True, False)
            owner = live.new_owner()
            with owner.batch() as batch:
                batch.save_fd("pipe", 0, pipe.writing)
            live.answer |= live.confirm_root()
            assert phase(daemon) == "live"
            live.end(keep=True)
        assert phase(daemon) == "held"
        with Live(daemon.path, NAME) as live:  # loaded, and confirmed without a next state
            assert pipe.is_in(live.read().state)
            live.ask("confirm", **live.ticket, nonce=os.urandom(16))
            pipe.forget()
        pipe.await_let_go()
    daemon.await_fds(base, queues=1)


def test_a_successor_that_dies_or_rejects_costs_nothing(daemon: DaemonProcess, pipe: Pipe) -> None:
    def die(line: Line) -> None:
        live = Live(daemon.path, NAME)
        live.read()
        line.say(live.answer["attempts"])
        line.hear()

    with Child(own, daemon.path, pipe.writing) as owner:
        owner.hear()
        ask(owner)
        owner.kill()
    for attempt in range(1, MOST_DEATHS + 3):
        await_phase(daemon, "held")
        with Child(die) as successor:
            assert successor.hear() == str(attempt)
            successor.kill()
    await_phase(daemon, "held")
    with Live(daemon.path, NAME) as live:
        assert pipe.is_in(live.read().state)
        reject = {"why": "no room", "damaged": False, "attempt": False, "nonce": os.urandom(16)}
        live.ask("reject", **live.ticket, **reject)
    there = row(daemon)
    assert there is not None
    assert (there["phase"], there["attempts"]) == ("held", MOST_DEATHS + 2)


def test_a_crash_loop_is_quarantined_at_the_20th_death(daemon: DaemonProcess, pipe: Pipe) -> None:
    for death in range(MOST_DEATHS + 1):  # the first one has begun, and taken nothing over
        await_phase(daemon, "held" if death else "-")
        with Child(own, daemon.path, pipe.writing) as owner:
            assert owner.hear() == ("found" if death else "begun")
            owner.kill()
    await_phase(daemon, "quarantined")
    there = row(daemon)
    assert there is not None
    assert f"{MOST_DEATHS} owners in a row ended within 10 s" in there["reason"]
    assert f"pid {owner.pid}: " in there["reason"]
    with pytest.raises(cprd.Busy, match="release NAME --force") as caught:
        Live(daemon.path, NAME)
    assert caught.value.phase == "quarantined"
    daemon.await_log("quarantined ")
    with daemon.connect() as connection:
        with pytest.raises(cprd.Busy, match="only by force"):
            connection.drop(NAME)
        connection.release(NAME, force=True)
    with Live(daemon.path, NAME) as live:
        assert pipe.is_in(live.read().state)  # nothing is lost
        live.confirm()
        live.end(keep=False)


# Letting go, and taking by force


def test_a_hold_that_ended_lets_go_though_a_child_of_the_owner_lives(
    daemon: DaemonProcess, pipe: Pipe
) -> None:
    base = daemon.fds()
    with Child(own, daemon.path, pipe.writing) as owner, strays(owner):
        owner.kill()
        await_phase(daemon, "held")
        pipe.forget()
        with daemon.connect() as connection:
            connection.drop(NAME)
        pipe.await_let_go()
    daemon.await_fds(base, queues=1)


def strays(owner: Child) -> contextlib.ExitStack:
    """A program that was given all descriptors of the owner's library."""
    owner.hear()
    stack = contextlib.ExitStack()
    place = f"/proc/{owner.pid}/fd"
    pidfd = os.pidfd_open(owner.pid)
    copies = [
        _copy(pidfd, int(name))
        for name in os.listdir(place)
        if int(name) > 2 and os.readlink(f"{place}/{name}").startswith("socket:")
    ]
    os.close(pidfd)
    child = subprocess.Popen(["sleep", "1000"], pass_fds=copies)
    for fd in copies:
        os.close(fd)
    stack.callback(child.wait)
    stack.callback(child.kill)
    return stack


def _copy(pidfd: int, number: int) -> int:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.syscall(438, pidfd, number, 0))  # pidfd_getfd
    assert fd >= 0, os.strerror(ctypes.get_errno())
    return fd


def test_an_owner_whose_hold_was_dropped_by_force_is_fenced(
    daemon: DaemonProcess, pipe: Pipe
) -> None:
    with Child(own, daemon.path, pipe.writing) as owner, strays(owner):
        assert ask(owner) == "ok"
        os.kill(owner.pid, signal.SIGSTOP)
        owner.say("change")
        pipe.forget()
        with daemon.connect() as connection:
            with pytest.raises(cprd.Busy, match="dropped only by force"):
                connection.drop(NAME)
            connection.drop(NAME, force=True)
            pipe.await_let_go()  # though the owner and a child have all ends
            connection.save(NAME, cprd.State())  # the name is free
        os.kill(owner.pid, signal.SIGCONT)
        assert owner.hear().startswith("Fenced: ")
        assert ask(owner).startswith("Fenced: ")
        assert ask(owner, "end").startswith("Fenced: ")
    daemon.await_log("fenced ")


def test_changes_while_the_hold_is_dropped_by_force_are_acknowledged_before_or_refused(
    daemon: DaemonProcess,
) -> None:
    """The owner changes all the time: what was acknowledged began before the end of the drop."""

    def change(line: Line) -> None:
        live = Live(daemon.path, NAME)
        line.say("begun")
        last = 0.0
        number = 0
        with contextlib.suppress(Fenced):
            while True:
                number += 1
                began = time.monotonic()
                live.kept.save_section(f"key{number % 50}", number)
                last = began
        line.say(repr(last))
        live.close()

    for _ in range(5):
        with Child(change) as owner:
            owner.hear()
            with daemon.connect() as connection:
                connection.drop(NAME, force=True)
                dropped = time.monotonic()
            assert float(owner.hear()) <= dropped
            assert owner.wait() == 0


def test_a_program_that_executes_itself_finds_what_it_kept(
    daemon: DaemonProcess, pipe: Pipe
) -> None:
    program = (
        "import os, sys\n"
        "from tests.support.live import Live\n"
        "live = Live(sys.argv[1], 'chat')\n"
        "if not live.answer['found']:\n"
        "    try:\n"
        "        Live(sys.argv[1], 'chat')\n"
        "    except Exception as error:\n"
        "        assert f'in use by pid {os.getpid()}' in str(error), error\n"
        "    else:\n"
        "        raise AssertionError('taken from itself')\n"
        "    live.kept.save_fd('pipe', 0, int(sys.argv[2]))\n"
        "    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])\n"
        "state = live.read().state\n"
        "os.write(state.find_fd('pipe', 0), b'!')\n"
        "print(live.answer['last_end'])\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", program, daemon.path, str(pipe.writing)],
        cwd=CHECKOUT,
        pass_fds=[pipe.writing],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (said.stdout, said.stderr) == ("its process executed another program\n", "")
    assert os.read(pipe.reading, 9) == b"!"


# Deaths of cprd


def test_cprd_that_stands_still_or_executes_itself_delays_no_change(
    new_daemon: DaemonProcess, pipe: Pipe
) -> None:
    with Child(own, new_daemon.path, pipe.writing) as owner:
        owner.hear()
        os.kill(new_daemon.pid, signal.SIGSTOP)
        assert [ask(owner) for _ in range(100)] == ["ok"] * 100
        os.kill(new_daemon.pid, signal.SIGCONT)
        for _ in range(2):
            seen = len(new_daemon.log())
            os.kill(new_daemon.pid, signal.SIGHUP)
            for _ in range(50):
                assert ask(owner) == "ok"
            new_daemon.await_log("ready ", since=seen)
            there = row(new_daemon)
            assert there is not None
            assert (there["phase"], there["in_use_by"]) == ("live", owner.pid)
        owner.kill()
        await_phase(new_daemon, "held")
        with Live(new_daemon.path, NAME) as live:
            state = live.read().state
            assert state["count"] == 200
            assert pipe.is_in(state)


def test_an_owner_puts_back_what_a_killed_cprd_had_in_memory(
    new_daemon: DaemonProcess, pipe: Pipe
) -> None:
    with Child(own, new_daemon.path, pipe.writing) as owner:
        owner.hear()
        before = row(new_daemon)
        for _ in range(3):
            new_daemon.restart()
            there = row(new_daemon)
            assert there is not None
            assert before is not None
            assert (there["phase"], there["in_use_by"]) == ("live", owner.pid)
            assert there["generation"] == before["generation"]
            for attempt in (lambda: Live(new_daemon.path, NAME), lambda: force(new_daemon)):
                with pytest.raises(cprd.Busy, match="has not put it back") as caught:
                    attempt()
                assert caught.value.pid == owner.pid
            assert ask(owner) == "ok"  # goes on meanwhile
            assert ask(owner, "put back") == "ok"
            with pytest.raises(cprd.Busy, match="keeps it live"):
                Live(new_daemon.path, NAME)
        owner.kill()
        await_phase(new_daemon, "held")
        with Live(new_daemon.path, NAME) as live:
            state = live.read().state
            assert state["count"] == 3
            assert pipe.is_in(state)
            live.confirm()
            live.end(keep=False)
    assert not os.listdir(new_daemon.path + ".live")


def force(daemon: DaemonProcess) -> None:
    with daemon.connect() as connection:
        connection.drop(NAME, force=True)


def test_what_is_not_put_back_is_free_once_its_owner_has_ended(new_daemon: DaemonProcess) -> None:
    with Child(own, new_daemon.path) as owner:
        owner.hear()
        new_daemon.restart()
        assert phase(new_daemon) == "live"
        owner.kill()
    await_phase(new_daemon, "-")
    new_daemon.await_log('ended how="owner gone, and not put back"')
    with Child(own, new_daemon.path) as owner:
        assert owner.hear() == "begun"
        new_daemon.kill()
        owner.kill()  # both
    new_daemon.start()
    assert phase(new_daemon) == "-"
    assert not os.listdir(new_daemon.path + ".live")


def test_only_its_owner_can_put_a_hold_back(new_daemon: DaemonProcess) -> None:
    with Child(own, new_daemon.path) as owner, Live(new_daemon.path, "other") as live:
        owner.hear()
        ticket = dict(live.ticket)
        new_daemon.restart()
        live.reconnect()
        live.answer["token"] = os.urandom(16)
        with pytest.raises(Fenced):
            live.put_back()
        live.answer["token"] = ticket["token"]
        live.put_back()
        live.end(keep=False)
        with pytest.raises(Fenced):
            live.put_back()
        assert phase(new_daemon) == "live"


def test_notes_that_cannot_be_written_are_said(start_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = start_daemon()
    os.mkdir(daemon.path + ".live", 0o700)
    os.chmod(daemon.path + ".live", 0o777)
    with Live(daemon.path, NAME) as live:
        daemon.await_log("not-noted ")
        live.end(keep=False)


# Looking at it


def test_what_was_live_is_counted_for_quotas_and_is_never_dropped_for_them(
    start_daemon: Callable[..., DaemonProcess], pipe: Pipe
) -> None:
    daemon = start_daemon(config="[limits]\nfds = 3\n")
    with Live(daemon.path, NAME) as live:
        for id in range(40):
            live.kept.save_fd("pipe", id, pipe.writing)
        with daemon.connect() as connection:
            connection.save("other", three := cprd.State())  # the live one does not count
            assert three.fd_count == 0
        live.end(keep=True)
    counted = 40  # and what was written twice
    until(
        lambda: connection_lists(daemon)[NAME]["fds"] >= counted,
        lambda: f"{connection_lists(daemon)}",
    )
    with daemon.connect() as connection:
        state = cprd.State()
        state.save_fd("pipe", 0, pipe.writing)
        with pytest.raises(cprd.LimitExceeded, match="the quota is 3"):
            connection.save("third", state)
    with Live(daemon.path, NAME) as live:
        assert live.read().state.fd_count == 40
        live.confirm()  # no quota for that
        live.end(keep=False)
    assert phase(daemon) == "-"


def connection_lists(daemon: DaemonProcess) -> dict[str, cprd.Row]:
    with daemon.connect() as connection:
        return {row["name"]: row for row in connection.list()}


def test_an_empty_live_hold_is_gone_with_its_owner(daemon: DaemonProcess) -> None:
    with Child(own, daemon.path) as owner:
        owner.hear()
        owner.kill()
    await_phase(daemon, "-")
    daemon.await_log('ended how="found empty"')


def test_show_counts_while_the_owner_lives_and_tells_all_afterwards(
    daemon: DaemonProcess, pipe: Pipe
) -> None:
    def cprctl(*words: str) -> str:
        command = [sys.executable, "-m", "cprd.cli", "--socket", daemon.path, *words]
        said = subprocess.run(
            command, cwd=CHECKOUT, capture_output=True, text=True, timeout=PATIENCE, check=True
        )
        return said.stdout

    with Child(own, daemon.path, pipe.writing) as owner:
        owner.hear()
        ask(owner)
        with daemon.connect() as connection:
            shown = connection.show(NAME)
        assert shown["segments"] >= 2  # of the pipe, and of the section
        assert (shown["phase"], shown["descriptors"], shown["sections"]) == ("live", [], [])
        assert re.search(rf"^{NAME} .* live .* in use by pid {owner.pid}, ", cprctl("list"), re.M)
        said = cprctl("show", NAME)
        assert f"reason: in use by pid {owner.pid}, which keeps it live" in said
        assert f"{shown['segments']} segments" in said
        for _ in range(100):
            assert ask(owner) == "ok"  # the looks were in nobody's way
        owner.kill()
    await_phase(daemon, "held")
    for _ in range(3):
        with daemon.connect() as connection:
            shown = connection.show(NAME)
        assert [(one["name"], one["id"]) for one in shown["descriptors"]] == [("pipe", 0)]
        assert [(one["key"], one["value"]) for one in shown["sections"]] == [("count", 101)]
    assert re.search(r"^pipe .* pipe", cprctl("show", NAME), re.M)
    with Live(daemon.path, NAME) as live:
        assert connection_shows(daemon)["segments"] == shown["segments"]
        assert pipe.is_in(live.read().state)
        live.confirm()
        live.end(keep=False)


def connection_shows(daemon: DaemonProcess) -> cprd.Shown:
    with daemon.connect() as connection:
        return connection.show(NAME)


# Hostile owners


def noise(*fds: int) -> int:
    """The receiving end of a queue with what is no record."""
    tx, rx = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    inner_tx, inner_rx = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for _ in range(20):
        send(inner_tx, b"x" * 1000, fds)
    for some in (fds, [inner_rx.fileno()]):
        send(tx, b"noise", some)
    for sock in (tx, inner_tx, inner_rx):
        sock.close()
    return rx.detach()


def test_whatever_is_parked_as_a_root_disturbs_nobody(daemon: DaemonProcess, pipe: Pipe) -> None:
    """Roots that are none are let go of all the same, and connections that lie there go on."""
    ours, theirs = socket.socketpair()  # a stream: no queue of a live hold
    base = daemon.fds()
    for kind in ("pipe", "stream", "noise"):
        for end in ("drop", "keep"):
            root = noise(pipe.writing, theirs.fileno())  # drained with the hold
            known = {"pipe": pipe.writing, "stream": theirs.fileno()}
            live = Live(daemon.path, NAME, root=known.get(kind, root))
            os.close(root)
            with daemon.connect() as connection:
                if end == "keep":
                    live.end(keep=True)
                    with Live(daemon.path, NAME) as successor:
                        assert successor.answer["found"]
                        with pytest.raises(cprd.Damaged):
                            successor.read()
                shown = connection.show(NAME)
                assert not shown["descriptors"]
                connection.drop(NAME, force=True)
            live.close()
    theirs.send(b"goes on")
    assert ours.recv(99) == b"goes on"
    ours.close()
    theirs.close()
    pipe.forget()
    pipe.await_let_go()
    daemon.await_fds(base, queues=1)

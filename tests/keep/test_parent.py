"""The parent of --keep, with a child that speaks sd_notify as cprd does."""

from __future__ import annotations

import ast
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cprd.keep import entries
from tests.support.checkout import CHECKOUT
from tests.support.descriptors import open_fds
from tests.support.patience import PATIENCE, rest, until

from .keeping import children
from .parent import Toy, await_state

pytestmark = pytest.mark.usefixtures("nothing_leaks")

ROOM = CHECKOUT / "cprd/keep"
Make = Callable[..., Toy]


@pytest.fixture
def make(nothing_leaks: None, tmp_path: Path) -> Iterator[Make]:
    made: list[Toy] = []

    def start(**options: object) -> Toy:
        made.append(Toy(tmp_path, **options))  # type: ignore[arg-type]
        return made[-1]

    yield start
    for toy in made:
        toy.close()


@pytest.fixture
def toy(make: Make) -> Toy:
    started = make()
    started.start()
    return started


# The store


def test_what_was_stored_comes_back_after_kill_9_newest_first(toy: Toy) -> None:
    before = open_fds(toy.pid)
    toy.do("made = [('a', os.eventfd(1)), ('b', os.eventfd(2)), ('c d', os.eventfd(3))]")
    assert toy.ask("say(drive(fdstore.keep(manager, made)))") == "True"
    os.kill(toy.child, signal.SIGKILL)
    assert toy.hears() == "started cprd.socket c d b a"
    assert toy.ask("say(*(os.eventfd_read(fd) for _, fd in kept))") == "3 2 1"
    assert toy.ask("say(os.get_inheritable(kept[0][1]), os.environ['FDSTORE'])")[:5] == "False"
    assert open_fds(toy.pid) == before + 3
    toy.ask("remove('c d', 'a'); drive(manager.barrier()); say()")
    assert open_fds(toy.pid) == before + 1


def test_all_entries_of_a_name_are_removed_and_no_other(toy: Toy) -> None:
    toy.do("[drive(fdstore.store(manager, n, os.eventfd(0))) for n in ('x', 'y', 'x', 'x2')]")
    toy.ask("remove('x'); drive(manager.barrier()); say()")
    assert toy.kill() == ["cprd.socket", "x2", "y"]


def test_the_same_open_file_is_kept_once_under_its_first_name(toy: Toy) -> None:
    toy.do("s, t = socket.socketpair(); e = os.eventfd(0)")
    toy.do(
        "[drive(fdstore.store(manager, f'{n}{i}', f)) for i in (1, 2)"
        " for n, f in (('s', s.fileno()), ('e', os.dup(e)), ('t', os.dup(t.fileno())))]"
    )
    toy.ask("drive(manager.barrier()); say()")
    assert toy.kill() == ["cprd.socket", "t1", "e1", "s1"]


def test_before_linux_6_10_sockets_are_told_apart_by_inode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "F_DUPFD_QUERY", 1099)  # unknown to the kernel, as 1027 was
    one, other = socket.socketpair()
    event = os.eventfd(0)
    with one, other, one.dup() as again:
        assert entries.same(one.fileno(), again.fileno())
        assert not entries.same(one.fileno(), other.fileno())
        assert not entries.same(event, event)  # all of them share an inode
    os.close(event)


def test_a_full_store_is_noticed_by_the_witness_and_loses_nothing_of_before(make: Make) -> None:
    toy = make(prefix=("prlimit", "--nofile=310:310"))  # room for 5
    toy.start()
    toy.do("one = [(f'n{i}', os.eventfd(i)) for i in range(4)]")
    assert toy.ask("say(drive(fdstore.keep(manager, one)))") == "True"  # and one for the witness
    assert (
        toy.ask(
            "say(drive(fdstore.keep(manager, [('more', os.eventfd(0)), ('m2', os.eventfd(0))])))"
        )
        == "False"
    )
    assert "not-stored" in toy.said()
    toy.ask("remove('more'); drive(manager.barrier()); say()")
    assert toy.kill() == ["cprd.socket", "n3", "n2", "n1", "n0"]


def test_names_that_would_not_fit_the_environment_are_refused(toy: Toy) -> None:
    toy.do("made = [(f'{i:0250}', os.eventfd(0)) for i in range(600)]")
    assert toy.ask("say(drive(fdstore.keep(manager, made)))") == "False"
    names = toy.kill()
    assert 500 < len(names) < 600


def test_a_polled_entry_goes_when_it_hangs_up_and_others_stay(toy: Toy) -> None:
    before = open_fds(toy.pid)
    toy.do("a, b = socket.socketpair(); c, d = socket.socketpair()")
    toy.do("drive(manager.tell(b'FDSTORE=1\\nFDNAME=polled', [a.fileno()]))")
    toy.ask("drive(fdstore.store(manager, 'not', c.fileno())); drive(manager.barrier()); say()")
    assert open_fds(toy.pid) == before + 2
    toy.do("a.close(); b.close(); c.close(); d.close()")
    until(lambda: open_fds(toy.pid) == before + 1, lambda: f"{open_fds(toy.pid)} descriptors")
    assert toy.kill() == ["cprd.socket", "not"]


def test_only_the_child_itself_is_listened_to(toy: Toy) -> None:
    before = open_fds(toy.pid)
    forged = "drive(fdstore.store(manager, 'forged', os.eventfd(0))), drive(manager.barrier(), 20)"
    toy.ask(f"(pid := os.fork()) or ({forged}, os._exit(0)); os.waitpid(pid, 0); say()")
    assert open_fds(toy.pid) == before
    assert toy.kill() == ["cprd.socket"]


def test_what_was_sent_before_a_death_counts_for_the_next_start(toy: Toy) -> None:
    """The parent stands still meanwhile, so that all of it is still queued."""
    os.kill(toy.pid, signal.SIGSTOP)
    await_state(toy.pid, "T")
    toy.do("n = 0")
    toy.do(
        "exec('while manager.send_now(fdstore.store_message(f\"q{n}\"), [os.eventfd(0)]): n += 1')"
    )
    count = int(toy.ask("say(n)"))
    assert count >= 5
    child = toy.child
    os.kill(child, signal.SIGKILL)
    await_state(child, "Z")
    os.kill(toy.pid, signal.SIGCONT)
    assert toy.restarted() == ["cprd.socket", *(f"q{i}" for i in reversed(range(count)))]


def test_nothing_gathers_in_the_parent(toy: Toy) -> None:
    before = open_fds(toy.pid)
    for _ in range(3):
        toy.do("made = [(f'n{i}', os.eventfd(0)) for i in range(100)]")
        assert toy.ask("say(drive(fdstore.keep(manager, made)))") == "True"
        toy.ask("drive(manager.barrier()); say()")
        assert open_fds(toy.pid) == before + 100
        assert len(toy.kill()) == 101
        toy.ask("remove(*(name for name, _ in kept)); drive(manager.barrier()); say()")
        assert open_fds(toy.pid) == before


# Deaths


def test_a_child_that_stands_still_is_replaced(make: Make) -> None:
    toy = make(watchdog=0.3)
    toy.start()
    assert toy.ask("say(watchdog_interval(os.environ))") == "0.3"
    toy.ask("drive(fdstore.store(manager, 'x', os.eventfd(0))); drive(manager.barrier()); say()")
    os.kill(toy.child, signal.SIGSTOP)  # which SIGABRT does not end
    assert toy.restarted() == ["cprd.socket", "x"]
    assert "how='signal 9'" in toy.said()


@pytest.mark.full
def test_a_killed_child_that_a_file_system_does_not_let_go_is_given_up(
    make: Make, tmp_path: Path
) -> None:
    """FUSE: the file's close hangs, and with it the end of any process that has the file open."""
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        pytest.skip("a file system that hangs needs root and /dev/fuse")
    mounted = tmp_path / "mute"
    mounted.mkdir()
    program = CHECKOUT / "tests/support/mute_file_system.py"
    mute = subprocess.Popen(
        ["unshare", "--mount", "--propagation=slave", sys.executable, str(program), str(mounted)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert mute.stdout is not None
    try:
        assert mute.stdout.readline() == "mounted\n"
        toy = make(watchdog=0.3)
        toy.start()
        toy.ask(
            "drive(fdstore.store(manager, 'x', os.eventfd(0))); drive(manager.barrier()); say()"
        )
        toy.ask(f"hangs = os.open('/proc/{mute.pid}/root{mounted}/file', os.O_RDWR); say()")
        assert mute.stdout.readline() == "open\n"
        stuck = toy.child
        os.kill(stuck, signal.SIGKILL)
        assert toy.restarted() == ["cprd.socket", "x"]
        assert stuck in children(toy.pid), "it has ended: nothing was shown"
        assert "stage=killed" in toy.said()
    finally:
        mute.kill()
        mute.wait()
        mute.stdout.close()
    until(lambda: stuck not in children(toy.pid), lambda: "a zombie")
    assert toy.kill() == ["cprd.socket", "x"]


def test_each_failed_start_is_waited_for_longer(toy: Toy) -> None:
    for _ in range(3):
        os.kill(toy.child, signal.SIGKILL)
        assert toy.hears().startswith("started")  # and killed before it is ready
    assert [line.split("pause=")[1] for line in toy.said().splitlines() if "pause=" in line] == [
        *("0.05", "0.1", "0.2")
    ]
    assert toy.ask("drive(manager.tell(READY)); drive(manager.barrier()); say('r')") == "r"
    assert toy.kill() == ["cprd.socket"]
    assert toy.said().splitlines()[-1].endswith("pause=0.05")


def test_a_first_start_that_fails_ends_the_parent_with_the_same_status(make: Make) -> None:
    toy = make(child="import sys; sys.exit(7)")
    assert toy.process.wait(PATIENCE) == 7
    assert "never ready" in toy.said().splitlines()[-1]


def test_once_it_has_served_any_end_of_the_child_is_followed_by_a_start(toy: Toy) -> None:
    toy.do("os._exit(0)")
    assert toy.restarted() == ["cprd.socket"]
    toy.do("os._exit(1)")
    assert toy.restarted() == ["cprd.socket"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_ends_both_and_the_last_line_says_what_ended(toy: Toy, number: int) -> None:
    toy.do("signal.signal(signal.SIGINT, lambda *_: sys.exit(5))")
    toy.ask("drive(fdstore.store(manager, 'x', os.eventfd(0))); drive(manager.barrier()); say()")
    child = toy.child
    assert toy.end(number) == (0 if number == signal.SIGTERM else 5)
    assert not Path(f"/proc/{child}").exists()
    last = toy.said().splitlines()[-1]
    assert last.split()[1] == "keep-ended"
    assert "2 holds, kept: store" in last
    assert "descriptors=1" in last
    assert not os.path.exists(toy.record.path)
    assert not os.path.exists(toy.record.notify_path)


def test_a_stopped_child_is_stopped_with_the_parent(toy: Toy) -> None:
    os.kill(toy.child, signal.SIGSTOP)
    assert toy.end() == 0


@pytest.mark.full
def test_a_child_that_does_not_end_is_killed_and_the_status_says_so(toy: Toy) -> None:
    toy.ask("signal.signal(signal.SIGTERM, signal.SIG_IGN); say()")
    assert toy.end() == 128 + signal.SIGKILL


def test_signals_that_mean_nothing_here_do_no_harm(toy: Toy) -> None:
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGQUIT, signal.SIGPIPE):
        os.kill(toy.pid, number)
    assert toy.ask("say(signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL)") == "True"
    assert toy.kill() == ["cprd.socket"]


def test_nobody_reads_stderr_and_it_goes_on(make: Make) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 4096)
    os.set_blocking(writing, True)
    toy = make(stderr=writing)
    toy.start()
    assert toy.kill() == ["cprd.socket"]
    assert toy.end() == 0
    os.close(writing)
    os.close(reading)


# The parent itself


@pytest.mark.parametrize("more", [0, 1100])  # descriptors beyond what select() can name
def test_it_replaces_itself_and_keeps_everything(toy: Toy, more: int) -> None:
    toy.do(f"made = [('x', os.eventfd(7)), *((f'm{{i}}', os.eventfd(0)) for i in range({more}))]")
    assert toy.ask("say(drive(fdstore.keep(manager, made)))") == "True"
    toy.ask("drive(manager.barrier()); say()")
    child, before = toy.child, open_fds(toy.pid)
    for count in (1, 2):
        os.kill(toy.pid, signal.SIGHUP)
        until(lambda count=count: toy.said().count("keep-re-executing") == count, toy.said)  # type: ignore[misc]
        assert toy.ask("drive(manager.barrier()); say('there')") == "there"
        assert (toy.child, open_fds(toy.pid)) == (child, before)
    names = toy.kill()
    assert (names[-1], len(names)) == ("x", 2 + more)
    assert toy.ask("say(os.eventfd_read(kept[-1][1]))") == "7"
    assert toy.end() == 0


def test_a_newer_parent_that_does_not_work_is_refused(make: Make, tmp_path: Path) -> None:
    copy = tmp_path / "cprd/keep"
    shutil.copytree(ROOM, copy)
    toy = make(keep=copy)
    toy.start()
    toy.ask("drive(fdstore.keep(manager, [('x', os.eventfd(7))])); drive(manager.barrier()); say()")
    record = (copy / "record.py").read_text()
    for broken in ("no Python", record.replace("VERSION = 1", "VERSION = 22")):
        (copy / "record.py").write_text(broken)
        seen = toy.said().count("keep-reload-refused")
        os.kill(toy.pid, signal.SIGHUP)
        until(lambda seen=seen: toy.said().count("keep-reload-refused") > seen, toy.said)  # type: ignore[misc]
    assert toy.kill() == ["cprd.socket", "x"]
    (copy / "record.py").write_text(record)
    os.kill(toy.pid, signal.SIGHUP)
    toy.await_log("keep-re-executing")
    assert toy.kill() == ["cprd.socket", "x"]


def test_a_manager_above_is_told(make: Make, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as above:
        above.bind(str(tmp_path / "above"))
        above.settimeout(PATIENCE)
        heard: list[str] = []

        def await_message(text: str) -> None:
            while not any(text in message for message in heard):
                heard.append(above.recv(4096).decode())

        toy = make(env={"NOTIFY_SOCKET": str(tmp_path / "above"), "WATCHDOG_USEC": "200000"})
        assert toy.hears() == "started cprd.socket"
        assert not [message for message in heard if "READY" in message]
        toy.do("drive(manager.tell(READY + b'\\n' + status('2 holds')))")
        await_message("READY=1\nSTATUS=2 holds")
        assert toy.ask("say(drive(fdstore.keep(manager, [('x', os.eventfd(7))])))") == "True"
        await_message("WATCHDOG=1")
        os.kill(toy.child, signal.SIGKILL)
        await_message("STATUS=cprd ended (signal 9)")
        assert toy.restarted() == ["cprd.socket", "x"]
        toy.process.send_signal(signal.SIGTERM)
        await_message("STOPPING=1")
        assert toy.process.wait(PATIENCE) == 0
        assert not [message for message in heard if "FDSTORE" in message or "BARRIER" in message]


def test_it_does_nothing_while_nothing_happens(toy: Toy) -> None:
    def spent() -> int:
        stat = Path(f"/proc/{toy.pid}/stat").read_text().rpartition(")")[2].split()
        return int(stat[11]) + int(stat[12])

    def switches() -> int:
        status = Path(f"/proc/{toy.pid}/status").read_text()
        return int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])

    toy.ask("drive(fdstore.keep(manager, [('x', os.eventfd(7))])); drive(manager.barrier()); say()")
    before = spent(), switches()
    rest(0.5)  # nothing to wait for: it must not wake up
    assert spent() - before[0] <= 1
    assert switches() - before[1] <= 2


def test_it_is_small_and_of_the_standard_library_alone(toy: Toy) -> None:
    code = f"""
import runpy, sys
sys.argv = ["keep", "check", "99"]
try:
    runpy.run_path({str(ROOM / "__main__.py")!r}, run_name="__main__")
except OSError:
    pass
print(*sys.modules)
"""
    said = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    foreign = {
        name for name in said.stdout.split() if name.split(".")[0] not in sys.stdlib_module_names
    }
    assert "cprd.keep.parent" in foreign
    assert {name for name in foreign if not name.startswith("cprd.keep")} <= {"cprd", "__main__"}
    runs = set(ROOM.glob("*.py")) - {ROOM / "become.py"}  # which ends where the parent begins
    assert sum(map(lines_of_code, runs)) < 400
    memory = Path(f"/proc/{toy.pid}/status").read_text().split("VmRSS:")[1].split()[0]
    print(f"memory of the parent: {int(memory) / 1024:.1f} MB")
    assert int(memory) < 20_000


def lines_of_code(path: Path) -> int:
    """Without blank lines, comments and docstrings."""
    text = path.read_text()
    left = {
        number
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.strip().startswith("#")
    }
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            left -= set(range(node.lineno, (node.end_lineno or 0) + 1))
    return len(left)

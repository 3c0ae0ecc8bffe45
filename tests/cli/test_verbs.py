"""cprctl as people and scripts use it: real processes, a real cprd."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgpack
import pytest

import cprd
from cprd.linux.child import in_a_child
from tests.support.checkout import CHECKOUT
from tests.support.cprctl import CPRCTL, cprctl, environment, free_port
from tests.support.daemon import DaemonProcess
from tests.support.patience import PATIENCE, in_time, until

pytestmark = pytest.mark.usefixtures("nothing_leaks")

# What a command finds, as JSON: the variables, each descriptor, limits, ignored signals.
TELL = r"""
import json, os, resource, sys
fds = {}
for i in range(int(os.environ.get("LISTEN_FDS", "0"))):
    link = os.readlink(f"/proc/self/fd/{3 + i}")
    if "eventfd" in link:
        value = os.eventfd_read(3 + i)
    elif "memfd" in link:
        value = os.read(3 + i, 1 << 20).decode("latin-1")
    else:
        value = link
    fds[3 + i] = value
status = dict(line.split(":\t", 1) for line in open("/proc/self/status") if ":\t" in line)
print(json.dumps({
    "env": {k: v for k, v in os.environ.items() if k.startswith("LISTEN_")},
    "pid": os.getpid(),
    "fds": list(fds.values()),
    "open": sorted(int(n) for n in os.listdir("/proc/self/fd")),
    "nofile": resource.getrlimit(resource.RLIMIT_NOFILE),
    "children": open(f"/proc/self/task/{os.getpid()}/children").read().split(),
}))
"""
COMMAND = [sys.executable, "-S", "-c", TELL]


def told(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def refused(done: subprocess.CompletedProcess[str], status: int, why: str) -> None:
    """It failed with `status`, and one line on stderr that says why."""
    assert done.returncode == status, done.stdout + done.stderr
    assert re.search(why, done.stderr), done.stderr
    assert done.stderr.startswith("cprctl: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@contextmanager
def eventfds(count: int) -> Iterator[list[int]]:
    """Eventfds that know their number: 1, 2, ..."""
    fds = [os.eventfd(i + 1, os.EFD_CLOEXEC) for i in range(count)]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def hold(daemon: DaemonProcess, name: str, count: int = 3, **sections: Any) -> int:
    """Hold `count` eventfds as ("e", i) and sections; the generation."""
    state = cprd.State()
    with eventfds(count) as fds, daemon.connect() as connection:
        for i, fd in enumerate(fds):
            state.save_fd("e", i, fd)
        for key, value in sections.items():
            state[key] = value
        return connection.save(name, state).generation


def row(daemon: DaemonProcess, name: str) -> cprd.Row:
    with daemon.connect() as connection:
        return next(hold for hold in connection.list() if hold["name"] == name)


# -- save, list, show ----------------------------------------------------------------------------


def test_what_a_shell_saves_a_command_finds(daemon: DaemonProcess, tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_text("hello")
    large.write_text("x" * 300_000)
    with eventfds(3) as (a, b, c):
        done = cprctl(
            daemon,
            *("save", "web", "--fd", f"a={a}", "--fd", f"b:7={b}", "--fd", f"tcp:x:-1={c}"),
            *("--section", f"small={small}", "--section", f"large={large}"),
            fds=(a, b, c),
        )
        assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"web is held: generation \d+, kept in memory\n", done.stdout)
    answer = told(cprctl(daemon, "load", "web", "--", *COMMAND))
    assert answer["fds"] == [1, 2, 3, "hello", "x" * 300_000]
    assert answer["env"] == {
        "LISTEN_FDS": "5",
        "LISTEN_PID": str(answer["pid"]),
        "LISTEN_FDNAMES": "a:b.7:tcp%3Ax.-1:section.small:section.large",
    }
    assert answer["children"] == []
    refused(cprctl(daemon, "load", "web", "--", "true"), 3, "web")


def test_list_for_people_and_for_programs(daemon: DaemonProcess) -> None:
    generation = hold(daemon, "web")
    hold(daemon, "chat", 1)
    rows = {hold["name"]: hold for hold in json.loads(cprctl(daemon, "list", "--json").stdout)}
    assert {"name", "generation", "phase", "uid", "fds"} <= set(rows["web"])
    assert rows["web"]["generation"] == generation
    assert (rows["web"]["phase"], rows["web"]["uid"], rows["web"]["fds"]) == (
        "held",
        os.getuid(),
        3,
    )
    head, *lines = cprctl(daemon, "list").stdout.splitlines()
    assert head.split()[:5] == ["name", "generation", "phase", "uid", "fds"]
    assert sorted(line.split()[0] for line in lines) == ["chat", "web"]


def test_show_says_what_is_held_and_disturbs_nothing(daemon: DaemonProcess) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, daemon.connect() as connection:
        state = cprd.State()
        state.save_fd("listener", 0, listener)
        state["sessions"] = {"ann": 1}
        state["raw"] = b"abc"
        connection.save("web", state)
        port = listener.getsockname()[1]
    for _ in range(3):
        shown = json.loads(cprctl(daemon, "show", "web", "--json").stdout)
        assert shown["descriptors"] == [
            {"name": "listener", "id": 0, "what": f"tcp 127.0.0.1:{port} listening"}
        ]
        assert [s["key"] for s in shown["sections"]] == ["sessions", "raw"]
    text = cprctl(daemon, "show", "web").stdout
    assert f"tcp 127.0.0.1:{port} listening" in text
    assert "sessions" in text
    assert row(daemon, "web")["attempts"] == 0
    refused(cprctl(daemon, "show", "nothing"), 3, "nothing")


def test_a_value_that_json_has_no_form_for_is_shown_all_the_same(daemon: DaemonProcess) -> None:
    value = {b"\xffkey": [b"a\xff", msgpack.Timestamp(5, 0)], 7: float("inf"), None: True}
    with daemon.connect() as connection:
        state = cprd.State()
        state["odd"] = value
        connection.save("web", state)
    done = cprctl(daemon, "show", "web", "--json")
    assert done.returncode == 0, done.stderr
    (section,) = json.loads(done.stdout)["sections"]
    stamp = str(msgpack.Timestamp(5, 0))
    assert section["value"] == {"\\xffkey": ["a\\xff", stamp], "7": "inf", "null": True}


def test_a_table_on_a_terminal_shows_foreign_names_without_obeying_them(
    daemon: DaemonProcess,
) -> None:
    with daemon.connect() as connection, eventfds(1) as (fd,):
        state = cprd.State()
        state.save_fd("\x1b[2J[bold]x", 0, fd)
        connection.save("web", state)
    leader, follower = os.openpty()
    try:
        done = subprocess.run(
            [*CPRCTL, "show", "web"],
            stdout=follower,
            stderr=subprocess.PIPE,
            timeout=PATIENCE,
            env=environment(daemon, TERM="xterm", COLUMNS="100"),
            check=False,
        )
        assert done.returncode == 0, done.stderr
    finally:
        os.close(follower)
    text = b""
    with os.fdopen(leader, "rb", 0) as terminal, suppress(OSError):  # EIO: all has been read
        while data := terminal.read(1 << 16):
            text += data
    assert b"\\x1b[2J[bold]x" in text
    assert b"\x1b[2J" not in text


def test_save_refuses_what_is_taken_and_replaces_when_told(daemon: DaemonProcess) -> None:
    with eventfds(1) as (fd,):
        save = ("save", "web", "--fd", f"e={fd}")
        assert cprctl(daemon, *save, fds=(fd,)).returncode == 0
        refused(cprctl(daemon, *save, fds=(fd,)), 1, "web")
        first = row(daemon, "web")["generation"]
        assert cprctl(daemon, *save, "--replace", fds=(fd,)).returncode == 0
        assert row(daemon, "web")["generation"] > first


def test_a_ttl_shows_and_ends_it(daemon: DaemonProcess) -> None:
    with eventfds(1) as (fd,):
        cprctl(daemon, "save", "web", "--fd", f"e={fd}", "--ttl", "1.5", fds=(fd,))
    assert 0 < (row(daemon, "web")["expires"] or 0) <= 1.5
    daemon.await_log('ended how="ttl over"')
    assert json.loads(cprctl(daemon, "list", "--json").stdout) == []


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["save", "web"], "nothing to save"),
        (["save", "web", "--fd", "conn"], "KEY"),
        (["save", "web", "--fd", "conn=x"], "KEY"),
        (["save", "web", "--fd", "conn=999"], "999"),
        (["save", "web", "--fd", "a=0", "--fd", "a=1"], r"--fd a=1: a is given twice.* a:1=1$"),
        (["save", "web", "--fd", "a:7=0", "--fd", "a:7=1"], r"a:7 is given twice.* a:8=1$"),
        (["save", "web", "--section", "a"], "KEY=FILE"),
        (["save", "web", "--fd", "a=0", "--after-exit=x"], "process"),
        (["save", "web", "--fd", "a=0", "--after-exit=0"], "process"),
        (["save", "we/b/c", "--fd", "a=0"], "name"),
        (["load", ".web", "--", "true"], "name"),
        (["load", "web"], "after --"),
        (["run", "web", "--listen", "nowhere", "--", "true"], "PORT"),
        (["run", "web", "--listen", "::1:80", "--", "true"], "brackets"),
    ],
)
def test_bad_arguments_are_named(daemon: DaemonProcess, arguments: list[str], why: str) -> None:
    refused(cprctl(daemon, *arguments), 2, why)


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["list", "--nonsense"], ["release", "web"], ["load"]]
)
def test_usage_is_2(daemon: DaemonProcess, arguments: list[str]) -> None:
    done = cprctl(daemon, *arguments)
    assert done.returncode == 2
    assert "usage:" in done.stderr


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("load web true -v", "put the command after --: cprctl load web -- true -v"),
        ("--user load web web", "put the command after --: cprctl --user load web -- web"),
        (
            "run web --listen 80 true",
            "put the command after --: cprctl run web --listen 80 -- true",
        ),
        (
            "qemu start web qemu -m 1G",
            "put the command after --: cprctl qemu start web -- qemu -m 1G",
        ),
        ("load web true -- true", "unrecognized arguments: true"),
        ("status --jsn", "usage: cprctl status .*unrecognized arguments: --jsn"),
        ("demo extra", "usage: cprctl demo .*unrecognized arguments: extra"),
        ("qemu check --qmp a b", "usage: cprctl qemu check .*unrecognized arguments: b"),
        ("save web --fd a=0 --ttl 0", "--ttl: 0 is not a number of seconds, 0.1 to 315360000"),
        ("load web --wait nan -- true", "--wait: nan is not a number of seconds, 0 to 86400"),
    ],
)
def test_a_usage_error_is_about_the_verb_and_says_what_to_write(
    daemon: DaemonProcess, line: str, says: str
) -> None:
    done = cprctl(daemon, *line.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: cprctl ")
    assert re.search(says, done.stderr, re.DOTALL), done.stderr


def test_the_version_and_the_help_of_save(daemon: DaemonProcess) -> None:
    assert cprctl(daemon, "--version").stdout == f"cprctl {cprd.__version__}\n"
    assert cprctl(daemon, "save", "--help").stdout.count("--after-exit[=PID]") == 2


def test_nobody_at_the_socket_is_1_and_the_option_beats_the_variable(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    nowhere = str(tmp_path / "nowhere.sock")
    refused(cprctl(daemon, "--socket", nowhere, "list"), 1, re.escape(nowhere))
    assert cprctl(daemon, "--socket", daemon.path, "list", CPRD_SOCKET=nowhere).returncode == 0


# -- wait, drop, release, status -----------------------------------------------------------------


def test_wait_returns_with_the_save_and_gives_up_in_time(daemon: DaemonProcess) -> None:
    refused(cprctl(daemon, "wait", "web", "--timeout", "0.2"), 3, "web")
    waiting = subprocess.Popen([*CPRCTL, "wait", "web"], env=environment(daemon))
    hold(daemon, "web")
    assert waiting.wait(PATIENCE) == 0
    with daemon.connect() as connection, connection.load("web") as claim:
        refused(cprctl(daemon, "wait", "web", "--timeout", "0.2"), 4, "web")
        claim.reject("enough")


def test_drop_needs_force_while_claimed(daemon: DaemonProcess) -> None:
    hold(daemon, "web")
    with daemon.connect() as connection:
        claim = connection.load("web")
        refused(cprctl(daemon, "drop", "web"), 4, "claim")
        assert cprctl(daemon, "drop", "web", "--force").returncode == 0
        with pytest.raises(cprd.Fenced):
            claim.confirm()
        claim.close()
    refused(cprctl(daemon, "drop", "web"), 3, "web")


def test_release_gives_back_what_is_in_doubt(daemon: DaemonProcess) -> None:
    hold(daemon, "web")
    with daemon.connect() as connection:
        claim = connection.load("web")
        claim.begin()
        claim.close()
    refused(cprctl(daemon, "load", "web", "--", "true"), 4, "doubt")
    assert cprctl(daemon, "release", "web", "--force").returncode == 0
    assert told(cprctl(daemon, "load", "web", "--", *COMMAND))["fds"] == [1, 2, 3]


def test_status_in_both_forms(daemon: DaemonProcess) -> None:
    hold(daemon, "web")
    status = json.loads(cprctl(daemon, "status", "--json").stdout)
    assert status["pid"] == daemon.pid
    text = cprctl(daemon, "status").stdout
    assert re.search(rf"^pid +{daemon.pid}$", text, re.MULTILINE)
    assert re.search(r"^uptime +[0-9.]+ (s|min)$", text, re.MULTILINE)


# -- load ----------------------------------------------------------------------------------------


def test_load_waits_as_long_as_told(daemon: DaemonProcess) -> None:
    begun = time.monotonic()
    refused(cprctl(daemon, "load", "web", "--wait", "0.5", "--", "true"), 3, "web")
    assert time.monotonic() - begun > 0.5
    loading = subprocess.Popen(
        [*CPRCTL, "load", "web", "--wait", "20", "--", *COMMAND],
        env=environment(daemon),
        stdout=subprocess.PIPE,
        text=True,
    )
    hold(daemon, "web", 1)
    assert json.loads(loading.communicate(timeout=PATIENCE)[0])["fds"] == [1]


def test_of_several_that_wait_each_gets_its_turn(daemon: DaemonProcess) -> None:
    waiting = [
        subprocess.Popen(
            [*CPRCTL, "load", "web", "--wait", "60", "--", *COMMAND],
            env=environment(daemon),
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    with daemon.connect() as connection:
        until(lambda: connection.status()["connections"] == 4, lambda: "not all of them connected")
    while waiting:
        hold(daemon, "web", 1)
        until(lambda: any(one.poll() is not None for one in waiting), lambda: "nobody")
        [done] = [one for one in waiting if one.poll() is not None]
        assert json.loads(done.communicate()[0])["fds"] == [1]
        waiting.remove(done)


def test_who_was_too_late_waits_on_until_its_time_is_over(daemon: DaemonProcess) -> None:
    begun = time.monotonic()
    waiting = [
        subprocess.Popen(
            [*CPRCTL, "load", "web", "--wait", "2.5", "--", "true"],
            env=environment(daemon),
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    hold(daemon, "web", 1)
    said = [one.communicate(timeout=PATIENCE)[1] for one in waiting]
    assert time.monotonic() - begun > 2.5
    assert sorted(one.returncode for one in waiting) == [0, 3, 3]
    assert sum("nothing is held" in text for text in said) == 2, said


def test_a_hold_that_somebody_has_claimed_is_4(daemon: DaemonProcess) -> None:
    hold(daemon, "web")
    with daemon.connect() as connection, connection.load("web"):
        refused(cprctl(daemon, "load", "web", "--", "true"), 4, str(os.getpid()))


@pytest.mark.parametrize("command", ["no-such-program", "/etc/passwd", "/nowhere/at/all"])
def test_a_command_that_cannot_run_costs_no_attempt(daemon: DaemonProcess, command: str) -> None:
    generation = hold(daemon, "web")
    refused(cprctl(daemon, "load", "web", "--", command), 1, re.escape(command))
    after = row(daemon, "web")
    assert (after["generation"], after["attempts"], after["phase"]) == (generation, 0, "held")


def test_when_exec_fails_after_all_everything_is_held_again(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/nowhere/interpreter\n")
    broken.chmod(0o755)
    generation = hold(daemon, "web", 40, table={"a": [1, 2]}, raw=b"\0\1\2")
    refused(cprctl(daemon, "load", "web", "--", str(broken)), 1, "did not start.*held again")
    with daemon.connect() as connection, connection.load("web") as claim:
        assert claim.generation > generation
        assert [os.eventfd_read(fd) for _, _, fd in claim.state.fds("e")] == list(range(1, 41))
        assert claim.state["table"] == {"a": [1, 2]}
        assert bytes(claim.state["raw"]) == b"\0\1\2"


CLOSED = [">&-", "2>&-", "<&- >&- 2>&-"]


@pytest.mark.parametrize("verb", ["load", "run"])
@pytest.mark.parametrize("closed", CLOSED)
def test_a_closed_standard_stream_costs_nothing(
    daemon: DaemonProcess, tmp_path: Path, verb: str, closed: str
) -> None:
    hold(daemon, "web", 20, raw=b"abc")
    told_to = tmp_path / "told"
    tell = f"import sys; sys.stdout = open({str(told_to)!r}, 'w')\n{TELL}"
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *CPRCTL, verb, "web", "--", *COMMAND[:-1], tell],
        env=environment(daemon),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert json.loads(told_to.read_text())["fds"] == [*range(1, 21), "abc"]


def test_other_verbs_with_closed_streams_and_what_is_not_open_is_not_saved(
    daemon: DaemonProcess,
) -> None:
    def run(*words: str) -> int:
        line = [*CPRCTL, *words]
        script = 'exec "$@" <&- >&- 2>&-'
        return subprocess.call(["sh", "-c", script, "sh", *line], env=environment(daemon))

    hold(daemon, "web")
    assert [run("list"), run("show", "web"), run("show", "no"), run("status")] == [0, 0, 3, 0]
    assert run("save", "null", "--fd", "a=1") == 2
    refused(cprctl(daemon, "show", "null"), 3, "null")


# What goes wrong after the confirm, in ways that nobody has thought of.
BROKEN = """
import os, sys
from cprd.cli import main

def execve(*words):
    raise RuntimeError("no such luck")

os.execve = execve
sys.exit(main())
"""


@pytest.mark.parametrize("verb", ["load", "run"])
def test_any_failure_after_the_confirm_gives_everything_back(
    daemon: DaemonProcess, verb: str
) -> None:
    generation = hold(daemon, "web", 10, table={"a": 1})
    done = subprocess.run(
        [sys.executable, "-c", BROKEN, verb, "web", "--", "true"],
        env=environment(daemon),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    refused(done, 1, "did not start.*no such luck.*held again")
    assert row(daemon, "web")["generation"] > generation
    assert told(cprctl(daemon, "load", "web", "--", *COMMAND))["fds"][:10] == list(range(1, 11))


@pytest.mark.parametrize("verb", ["load", "run"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_ended_by_a_signal_right_after_the_confirm_it_gives_everything_back(
    daemon: DaemonProcess, verb: str, number: signal.Signals
) -> None:
    generation = hold(daemon, "web", 10)
    process = subprocess.Popen(
        [*CPRCTL, verb, "web", "--", "true"],
        env=environment(daemon, CPRD_PAUSE="confirm:answered"),
        stderr=subprocess.PIPE,
        text=True,
    )
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == -number
    assert re.search(rf"did not start \({number.name}\); web is held again", said), said
    assert row(daemon, "web")["generation"] > generation
    assert told(cprctl(daemon, "load", "web", "--", *COMMAND))["fds"] == list(range(1, 11))


def test_an_ignored_sigchld_is_no_hindrance(daemon: DaemonProcess) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*CPRCTL, *words],
            env=environment(daemon),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
            preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN),
        )

    hold(daemon, "web", 2)
    assert json.loads(run("show", "web", "--json").stdout)["fds"] == 2
    assert told(run("load", "web", "--", *COMMAND))["fds"] == [1, 2]
    hold(daemon, "web", 2)
    done = run("run", "web", "--", "grep", "SigIgn", "/proc/self/status")
    assert done.returncode == 0, done.stderr
    mask = int(done.stdout.split()[1], 16)
    assert mask & 1 << (signal.SIGCHLD - 1), "for CMD it is as whoever started us chose"


def test_names_beyond_one_variable_are_refused_before_the_claim(daemon: DaemonProcess) -> None:
    state = cprd.State()
    with eventfds(1) as (fd,), daemon.connect() as connection:
        for i in range(600):
            state.save_fd(f"{i:0250}", 0, fd)
        connection.save("web", state)
    refused(cprctl(daemon, "load", "web", "--", "true"), 1, "LISTEN_FDNAMES.*131072")
    assert row(daemon, "web")["attempts"] == 0


def test_many_descriptors_under_a_low_soft_limit(daemon: DaemonProcess) -> None:
    hold(daemon, "few", 10)
    hold(daemon, "many", 900)
    few = told(cprctl(daemon, "load", "few", "--", *COMMAND, nofile="256:4096"))
    assert few["nofile"] == [256, 4096]
    done = cprctl(daemon, "load", "many", "--", *COMMAND, nofile="256:4096")
    many = told(done)
    assert many["fds"] == list(range(1, 901))
    assert many["nofile"] == [3 + 900 + 256, 4096]
    assert "RLIMIT_NOFILE" in done.stderr


def test_a_hard_limit_too_low_is_refused_before_the_claim(daemon: DaemonProcess) -> None:
    hold(daemon, "many", 500)
    refused(
        cprctl(daemon, "load", "many", "--", "true", nofile="128:256"), 1, "hard.*256|256.*hard"
    )
    assert row(daemon, "many")["phase"] == "held"


def test_a_command_gets_sigpipe_back_and_nothing_else_of_ours(daemon: DaemonProcess) -> None:
    hold(daemon, "web", 2)
    done = cprctl(daemon, "load", "web", "--", "grep", "SigIgn", "/proc/self/status")
    assert int(done.stdout.split()[1], 16) & (1 << (signal.SIGPIPE - 1)) == 0
    hold(daemon, "web", 2)
    listing = cprctl(daemon, "load", "web", "--", "ls", "/proc/self/fd").stdout.split()
    assert sorted(map(int, listing)) == [0, 1, 2, 3, 4, 5]  # 5 is ls's own


def test_descriptors_are_placed_whatever_their_numbers_were(tmp_path: Path) -> None:
    code = """
import os, random
from cprd.cli.become import Crew
from cprd.linux import listen_fds
random.seed({seed})
numbers = random.sample(range(3, 60), 30)
made = [os.eventfd(i + 1) for i in range(30)]
high = [os.dup2(fd, 1000 + i) for i, fd in enumerate(made)]
for fd in made: os.close(fd)
crew = Crew()
for i, number in enumerate(numbers):
    crew.add("e", i, os.dup2(high[i], number)); os.close(high[i])
before = len(os.listdir("/proc/self/fd"))
listen_fds.place(crew.fds)
assert [os.eventfd_read(3 + i) for i in range(30)] == list(range(1, 31))
assert crew.fds == list(range(3, 33))
assert all(os.get_inheritable(fd) for fd in crew.fds)
assert len(os.listdir("/proc/self/fd")) == before
"""
    for seed in range(8):
        subprocess.run(
            [sys.executable, "-c", code.replace("{seed}", str(seed))],
            check=True,
            timeout=PATIENCE,
            env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        )


def test_load_imports_nothing_that_it_does_not_need(daemon: DaemonProcess) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "cprd.cli", "load", "web", "--", "true"],
        capture_output=True,
        text=True,
        env=environment(daemon),
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 3
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "cprd.client" in loaded
    heavy = {"trio", "rich", "asyncio", "subprocess", "dataclasses", "inspect", "json", "logging"}
    assert not heavy & loaded
    assert not {"cprd.cli.table", "cprd.daemon", "tempfile"} & loaded


def test_a_guest_does_not_wait_for_imports_that_take_long() -> None:
    """All that `qemu start` imports before it executes the QEMU, and then while the QEMU begins."""
    code = """
import sys
sys.argv[0] = "cprctl"
before = set(sys.modules)
import cprd.cli.qemu, cprd.linux.paths, cprd.qemu.start, cprd.client.ahead, cprd.qemu.early
print(*set(sys.modules) - before)
import cprd.cpr, cprd.qemu.inventory, cprd.qemu.restore, cprd.qemu.target
print(*set(sys.modules) - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE
    )
    sooner, later = (set(line.split()) for line in done.stdout.splitlines())
    assert "cprd.client.blocking" in later
    heavy = {"argparse", "enum", "importlib", "json", "re", "signal", "socket", "threading"}
    heavy |= {"contextlib", "cprd.client.exchange", "cprd.cpr", "functools", "resource", "typing"}
    assert not sooner & heavy
    assert not later & {"argparse", "signal", "socket", "threading", "typing"}


# -- run -----------------------------------------------------------------------------------------

# A service: says "up INODE PID" of its first listener, then answers each connection with its pid.
SERVE = """
import os, socket
listener = socket.socket(fileno=3)
print("up", os.environ["LISTEN_FDNAMES"], os.fstat(3).st_ino, os.getpid(), flush=True)
while True:
    sock, _ = listener.accept()
    sock.sendall(b"%d" % os.getpid())
    sock.close()
"""


class Service:
    """cprctl run web --listen ... -- a service, as one process."""

    def __init__(self, daemon: DaemonProcess, *listen: str) -> None:
        options = [word for address in listen for word in ("--listen", address)]
        self.process = subprocess.Popen(
            [*CPRCTL, "run", "web", *options, "--", sys.executable, "-S", "-c", SERVE],
            env=environment(daemon),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        if not words:
            raise AssertionError(self.process.communicate()[1])
        _, self.names, self.inode, pid = words
        assert int(pid) == self.process.pid

    def kill(self) -> str:
        self.process.kill()
        return self.process.communicate()[1]


def asks(port: int) -> int:
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as sock:
        sock.settimeout(PATIENCE)
        return int(sock.recv(100))


def test_a_service_that_crashes_again_and_again_keeps_its_listener(daemon: DaemonProcess) -> None:
    port = free_port()
    address = f"127.0.0.1:{port}"
    first = Service(daemon, address)
    assert first.names == "listener"
    assert asks(port) == first.process.pid
    held = row(daemon, "web")
    assert (held["phase"], held["fds"]) == ("held", 1)
    for _ in range(3):
        first.kill()
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as early:
            # Nobody runs, and yet it connects: it waits in the held listener.
            second = Service(daemon, address)
            early.settimeout(PATIENCE)
            assert int(early.recv(100)) == second.process.pid
        assert second.inode == first.inode
        assert row(daemon, "web")["phase"] == "held"
        first = second
    first.kill()
    assert row(daemon, "web")["fds"] == 1


def test_a_second_run_while_the_first_lives_is_busy(daemon: DaemonProcess) -> None:
    port = free_port()
    service = Service(daemon, f"127.0.0.1:{port}")
    try:
        again = cprctl(daemon, "run", "web", "--listen", f"127.0.0.1:{port}", "--", "true")
        refused(again, 4, str(service.process.pid))
        assert asks(port) == service.process.pid
    finally:
        service.kill()


def test_what_the_service_saved_itself_comes_back_with_its_listener(daemon: DaemonProcess) -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = listener.getsockname()[1]
        near, far = socket.socketpair()
        stack.enter_context(near)
        stack.enter_context(far)
        with daemon.connect() as connection:
            state = cprd.State()
            state.save_fd("listener", 0, listener)
            state.save_fd("conn", 5, far)
            state["sessions"] = b"abc"
            connection.save("web", state)
        answer = told(cprctl(daemon, "run", "web", "--", *COMMAND))
        assert answer["env"]["LISTEN_FDNAMES"] == "listener:conn.5:section.sessions"
        # The listener alone is held for the next start.
        assert row(daemon, "web")["fds"] == 1
        answer = told(cprctl(daemon, "run", "web", "--listen", f"127.0.0.1:{port}", "--", *COMMAND))
        assert answer["env"]["LISTEN_FDNAMES"] == "listener"


def test_another_address_next_time_opens_one_and_closes_one(daemon: DaemonProcess) -> None:
    first, second, third = free_port(), free_port(), free_port()
    service = Service(daemon, f"127.0.0.1:{first}", f"127.0.0.1:{second}")
    assert service.names == "listener:listener.1"
    service.kill()
    service = Service(daemon, f"127.0.0.1:{second}", f"127.0.0.1:{third}")
    try:
        assert asks(second) == service.process.pid
        with pytest.raises(ConnectionRefusedError):
            asks(first)
        socket.create_connection(("127.0.0.1", third), timeout=PATIENCE).close()
    finally:
        said = service.kill()
    assert "not asked for" in said


def test_all_kinds_of_addresses(daemon: DaemonProcess, tmp_path: Path) -> None:
    path = tmp_path / "web.sock"
    options = ("127.0.0.1:0", "[::1]:0", "0", "udp:127.0.0.1:0", f"unix:{path}", f"dgram:{path}.d")
    listen = [word for address in options for word in ("--listen", address)]
    first = told(cprctl(daemon, "run", "web", *listen, "--", *COMMAND))
    assert first["env"]["LISTEN_FDNAMES"].split(":") == [
        "listener",
        *(f"listener.{i}" for i in range(1, 6)),
    ]
    assert len(set(first["fds"])) == 6
    second = told(cprctl(daemon, "run", "web", *listen, "--", *COMMAND))
    assert second["fds"] == first["fds"]  # the same sockets: /proc shows their inodes
    third = told(cprctl(daemon, "run", "web", "--", *COMMAND))
    assert third["fds"] == first["fds"]


def test_a_cold_start_that_comes_to_nothing_leaves_nothing(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/nowhere/interpreter\n")
    broken.chmod(0o755)
    done = cprctl(daemon, "run", "web", "--listen", "127.0.0.1:0", "--", str(broken))
    refused(done, 1, "did not start")
    assert json.loads(cprctl(daemon, "list", "--json").stdout) == []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = cprctl(daemon, "run", "web", "--listen", f"127.0.0.1:{port}", "--", "true")
        refused(done, 1, f"127.0.0.1:{port}.*in use")
    assert json.loads(cprctl(daemon, "list", "--json").stdout) == []


def test_a_warm_start_that_cannot_exec_gives_everything_back(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/nowhere/interpreter\n")
    broken.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as listener, daemon.connect() as connection:
        state = cprd.State()
        state.save_fd("listener", 0, listener)
        with eventfds(1) as (fd,):
            state.save_fd("e", 0, fd)
            connection.save("web", state)
    refused(cprctl(daemon, "run", "web", "--", str(broken)), 1, "held again")
    answer = told(cprctl(daemon, "run", "web", "--", *COMMAND))
    assert answer["fds"][1] == 1


# -- after-exit and the look from a child --------------------------------------------------------


def test_saved_after_exit_is_busy_until_that_process_is_gone(daemon: DaemonProcess) -> None:
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        with eventfds(1) as (fd,):
            done = cprctl(
                daemon,
                *("save", "web", "--fd", f"e={fd}", f"--after-exit={sleeper.pid}"),
                fds=(fd,),
            )
            assert done.returncode == 0, done.stderr
            # Without a PID it is whoever started cprctl: we, who live.
            done = cprctl(daemon, "save", "--after-exit", "mine", "--fd", f"e={fd}", fds=(fd,))
            assert done.returncode == 0, done.stderr
        refused(cprctl(daemon, "load", "web", "--", "true"), 4, str(sleeper.pid))
        refused(cprctl(daemon, "load", "mine", "--", "true"), 4, str(os.getpid()))
    finally:
        sleeper.kill()
        sleeper.wait()
    assert told(cprctl(daemon, "load", "web", "--wait", "10", "--", *COMMAND))["fds"] == [1]


def test_saved_after_the_exit_of_one_that_has_ended_it_is_served(daemon: DaemonProcess) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    with eventfds(1) as (fd,):
        option = f"--after-exit={ended.pid}"
        done = cprctl(daemon, "save", "web", "--fd", f"e={fd}", option, fds=(fd,))
    assert done.returncode == 0
    assert f"no process {ended.pid}" in done.stderr
    assert told(cprctl(daemon, "load", "web", "--", *COMMAND))["fds"] == [1]


def test_a_look_that_hangs_is_given_up_and_ended(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    beats, beat = os.pipe()

    def look() -> dict[str, Any]:
        os.set_inheritable(beat, True)
        with fifo.open():  # nobody ever writes
            return {}

    with pytest.raises(cprd.Timeout, match="given up"):
        in_a_child(look, patience=0.3)
    os.close(beat)
    assert os.read(beats, 1) == b""  # the last process with the other end is gone
    os.close(beats)


def test_a_look_that_hangs_only_at_its_end_holds_nobody_up() -> None:
    def look() -> dict[str, Any]:
        return {"seen": True}

    before = children()
    begun = time.monotonic()
    assert in_a_child(look) == {"seen": True}
    assert in_time(time.monotonic() - begun, 5)
    assert children() <= before  # none is left to us, not even as a zombie


def children() -> set[str]:
    """The PIDs of this process's children, dead ones that wait to be reaped too."""
    lists = Path("/proc/self/task").glob("*/children")
    return {pid for each in lists for pid in each.read_text().split()}


def test_a_look_that_fails_fails_here_in_the_same_words() -> None:
    def look() -> dict[str, Any]:
        raise cprd.Busy("claimed by pid 7")

    with pytest.raises(cprd.Busy, match=r"^claimed by pid 7$"):
        in_a_child(look)


def test_the_reader_of_a_pipe_that_leaves_early_is_no_error_message(daemon: DaemonProcess) -> None:
    for i in range(50):
        hold(daemon, f"web{i}", 1)
    done = subprocess.run(
        ["sh", "-c", f"{' '.join(CPRCTL)} list | head -n 1"],
        env=environment(daemon),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""

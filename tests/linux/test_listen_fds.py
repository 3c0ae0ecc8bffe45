"""Descriptors at a program's start, through a real exec: what is passed on is taken, and nonsense
in the environment is named."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cprd.errors import LimitExceeded
from cprd.linux import listen_fds

PROGRAM = """
import json, os, sys
from cprd.linux import listen_fds
try:
    got = listen_fds.take(os.environ)
except Exception as error:
    print(json.dumps([type(error).__name__, str(error)]))
    sys.exit()
left = [name for name in os.environ if name.startswith("LISTEN_")]
told = [[name, fd, os.get_inheritable(fd), os.fstat(fd).st_ino] for name, fd in got]
print(json.dumps({"got": told, "left": left}))
"""


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def own_pidfd() -> str:
    """The inode of this process's pidfd."""
    pidfd = os.pidfd_open(os.getpid())
    try:
        return str(os.fstat(pidfd).st_ino)
    finally:
        os.close(pidfd)


Change = dict[str, str | Callable[[], str]]


def start(passed: list[tuple[str, int]], change: Change | None = None) -> object:
    """Fork, pass on, exec PROGRAM; the output. `change` is made to the environment in between, in
    the process that execs."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(writer, 1)
            environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
            listen_fds.pass_on(passed, environ)
            for name, value in (change or {}).items():
                environ[name] = value if isinstance(value, str) else value()
            os.execve(sys.executable, [sys.executable, "-c", PROGRAM], environ)
        finally:
            os._exit(1)
    os.close(writer)
    with open(reader, "rb") as pipe:
        words = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0
    return json.loads(words)


@pytest.fixture
def files(tmp_path: Path) -> list[int]:
    fds = []
    for name in "abc":
        (tmp_path / name).touch()
        fds.append(os.open(tmp_path / name, os.O_RDONLY | os.O_CLOEXEC))
    return fds


def test_what_is_passed_on_arrives_in_order_named_and_not_inheritable(files: list[int]) -> None:
    before = open_fds()
    # The targets 3, 4, 5 are where the sources may lie: the order has to survive that as well.
    passed = [("c", files[2]), ("a", files[0]), ("", files[1]), ("a", files[0])]
    told = start(passed)
    expected = [
        [name, number, False, os.fstat(fd).st_ino] for number, (name, fd) in enumerate(passed, 3)
    ]
    assert told == {"got": expected, "left": []}
    assert open_fds() == before


def test_what_was_meant_for_another_process_is_left_alone(files: list[int]) -> None:
    for change in ({"LISTEN_PID": "1"}, {"LISTEN_PID": str(10**19)}):
        told = start([("a", files[0])], dict(change))
        assert told == {"got": [], "left": []}


def test_a_process_with_the_same_number_and_another_pidfd_is_another_one(files: list[int]) -> None:
    release = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    if release < (6, 9):
        pytest.skip("needs Linux 6.9: pidfds with inodes of their own")
    told = start([("a", files[0])], {"LISTEN_PIDFDID": own_pidfd})
    assert isinstance(told, dict)
    assert [entry[0] for entry in told["got"]] == ["a"]
    told = start(
        [("a", files[0])], {"LISTEN_PIDFDID": own_pidfd()}
    )  # of the test, not of the child
    assert told == {"got": [], "left": []}


def test_names_that_do_not_match_cost_no_descriptor(files: list[int]) -> None:
    told = start([("a", files[0]), ("b", files[1])], {"LISTEN_FDNAMES": "only"})
    assert isinstance(told, dict)
    assert [entry[0] for entry in told["got"]] == ["unknown", "unknown"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"LISTEN_FDS": "900"}, "not open"),
        ({"LISTEN_FDS": "-1"}, "LISTEN_FDS"),
        ({"LISTEN_FDS": "many"}, "LISTEN_FDS"),
        ({"LISTEN_FDS": str(2**31 - 4)}, "not open"),
        ({"LISTEN_FDS": str(2**31)}, "no process can have that many"),
        ({"LISTEN_FDS": str(10**19)}, "no process can have that many"),
        ({"LISTEN_FDS": "9" * 5000}, "LISTEN_FDS"),
        ({"LISTEN_PIDFDID": "x"}, "LISTEN_PIDFDID"),
        ({"LISTEN_PID": "me"}, "LISTEN_PID"),
    ],
)
def test_nonsense_in_the_environment_is_named(files: list[int], change: Change, word: str) -> None:
    told = start([("a", files[0])], change)
    assert isinstance(told, list)
    assert told[0] == "ProtocolError"
    assert word in told[1]


def test_nothing_passed_is_nothing() -> None:
    assert listen_fds.take({}) == []
    assert listen_fds.take({"LISTEN_FDS": "3"}) == []


def test_no_descriptors_leave_nothing_in_the_environment() -> None:
    environ = {"LISTEN_FDS": "3", "LISTEN_PID": "1", "LISTEN_FDNAMES": "x", "LISTEN_PIDFDID": "7"}
    listen_fds.pass_on([], environ)
    assert environ == {}


def test_names_too_long_for_one_variable_are_refused_before_anything_is_moved(
    files: list[int],
) -> None:
    environ: dict[str, str] = {}
    with pytest.raises(LimitExceeded, match="LISTEN_FDNAMES"):
        listen_fds.pass_on([("x" * 255, files[0])] * 512, environ)
    assert environ == {}


def test_names_left_counts_the_variable_and_its_end() -> None:
    assert listen_fds.names_left([]) == 131072 - 15
    assert listen_fds.names_left(["a", "", "ccc"]) == 131072 - 15 - 2 - 1 - 4

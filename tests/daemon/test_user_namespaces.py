"""The uid 65534: a user like any other, except where it stands for uids that have no mapping."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cprd
from cprd.linux.processes import overflow_uid
from tests.support.child import Child, Line, become
from tests.support.daemon import DaemonProcess

pytestmark = [
    pytest.mark.usefixtures("nothing_leaks"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for other uids: run as root"),
]

IN_A_NAMESPACE = """
import ctypes, os, sys
here, there = os.pipe()
mapper = os.fork()
if not mapper:
    os.close(there)
    os.read(here, 1)
    for kind in ("uid", "gid"):
        with open(f"/proc/{os.getppid()}/{kind}_map", "w") as file:
            file.write("0 0 1000")
    os._exit(0)
if ctypes.CDLL(None).unshare(0x10000000) != 0:
    sys.exit("no user namespace")
os.close(there)
assert os.waitpid(mapper, 0)[1] == 0
os.execv(sys.argv[1], sys.argv[1:])
"""


class Inside(DaemonProcess):
    """In a user namespace with a mapping of the uids below 1000."""

    def start(self) -> None:
        if self.command[1] != "-c":
            self.command[:0] = [sys.executable, "-c", IN_A_NAMESPACE]
        super().start()


@pytest.fixture
def inside() -> Iterator[DaemonProcess]:
    with tempfile.TemporaryDirectory(prefix="cprd-test.") as place:
        Path(place).chmod(0o755)
        one = Inside(Path(place))
        yield one
        one.stop()


def saves(line: Line, path: str, uid: int) -> None:
    become(uid)
    try:
        with cprd.connect(path) as daemon:
            daemon.save("web", cprd.State())
            with daemon.load("web"):
                line.say("served")
    except cprd.CprdError as error:
        line.say(f"{type(error).__name__}: {error}")
    line.hear()


@pytest.fixture
def served() -> Callable[[str, int], str]:
    def attempt(path: str, uid: int) -> str:
        with Child(saves, path, uid) as child:
            return child.hear()

    return attempt


def test_nobody_is_a_user_where_every_uid_is_mapped(
    daemon: DaemonProcess, served: Callable[[str, int], str]
) -> None:
    if Path("/proc/self/uid_map").read_text().split() != ["0", "0", "4294967295"]:
        pytest.skip("these tests run in a user namespace: run them outside")
    assert served(daemon.path, overflow_uid()) == "served"


@pytest.mark.parametrize("uid", [23456, overflow_uid()])
def test_who_has_no_mapping_is_refused_with_what_to_do(
    inside: DaemonProcess, served: Callable[[str, int], str], uid: int
) -> None:
    assert served(inside.path, 999) == "served"
    refused = served(inside.path, uid)
    assert refused.startswith(f"Denied: uid {overflow_uid()} stands for a uid of another")
    assert "connect from a process whose uid is mapped there" in refused

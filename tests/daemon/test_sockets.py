"""Sockets that come in: every one that cprd can serve is served, the others are named."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cprd
from tests.support.checkout import CHECKOUT
from tests.support.daemon import DaemonProcess

LAUNCHER = """
import os, socket, sys
from cprd.linux import listen_fds

made = []
for name, kind, path in {sockets!r}:
    if isinstance(path, str):
        sock = socket.socket(socket.AF_UNIX, kind)
        sock.bind(path)
    else:
        sock = socket.create_server(tuple(path))
    if kind != socket.SOCK_DGRAM:
        sock.listen()
    made.append((name, sock.detach()))
environ = dict(os.environ)
listen_fds.pass_on(made, environ)
environ.update({change!r})
os.execve(sys.executable, [sys.executable, "-m", "cprd.daemon.command", *sys.argv[1:]], environ)
"""
Sockets = list[tuple[str, int, object]]


class Launched(DaemonProcess):
    """A cprd that is given sockets, as a manager does."""

    def __init__(self, place: Path, sockets: Sockets) -> None:
        self.launcher = LAUNCHER.format(sockets=sockets, change={})
        super().__init__(place)

    def start(self) -> None:
        self.command[1:] = ["-c", self.launcher]
        super().start()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[[Sockets], Launched]]:
    started: list[Launched] = []

    def start(sockets: Sockets) -> Launched:
        started.append(Launched(tmp_path, sockets))
        return started[0]

    yield start
    for one in started:
        assert one.stop() == 0


def serves(path: Path, name: str) -> list[str]:
    """Save under `name` through the socket at `path`; all names that are held."""
    with cprd.connect(path) as connection:
        connection.save(name, cprd.State())
        return sorted(row["name"] for row in connection.list())


def test_every_socket_is_served_also_after_a_re_execution(
    launch: Callable[[Sockets], Launched], tmp_path: Path
) -> None:
    paths = [tmp_path / name for name in "abc"]
    seqpacket = int(socket.SOCK_SEQPACKET)
    daemon = launch([(path.name, seqpacket, str(path)) for path in paths])
    assert serves(paths[0], "first") == ["first"]
    assert serves(paths[2], "second") == ["first", "second"]
    os.kill(daemon.pid, signal.SIGHUP)
    daemon.await_log("re-executing")
    assert serves(paths[1], "third") == ["first", "second", "third"]
    assert serves(paths[2], "fourth") == ["first", "fourth", "second", "third"]


def test_what_cannot_be_served_is_named_and_the_rest_is_served(
    launch: Callable[[Sockets], Launched], tmp_path: Path
) -> None:
    good = tmp_path / "good"
    daemon = launch(
        [
            ("stream", int(socket.SOCK_STREAM), str(tmp_path / "stream")),
            ("good", int(socket.SOCK_SEQPACKET), str(good)),
            ("tcp", int(socket.SOCK_STREAM), ("127.0.0.1", 0)),
            ("datagrams", int(socket.SOCK_DGRAM), str(tmp_path / "datagrams")),
        ]
    )
    assert serves(good, "web") == ["web"]
    named = [line for line in daemon.log() if line.startswith("not-served")]
    assert [line.split()[1] for line in named] == ["name=stream", "name=tcp"]
    assert all("ListenSequentialPacket=" in line for line in named)
    assert str(tmp_path / "stream") in named[0]
    assert "127.0.0.1" in named[1]
    daemon.await_log("unknown-descriptor name=datagrams")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "cprd: the socket stream of the service manager cannot be served"),
        ({"LISTEN_FDS": str(10**19)}, "LISTEN_FDS=10000000000000000000"),
        ({"LISTEN_FDS": str(2**31)}, "LISTEN_FDS=2147483648"),
        ({"LISTEN_FDS": "7"}, "descriptor 4 is not open"),
        ({"LISTEN_PIDFDID": "1.5"}, "LISTEN_PIDFDID"),
    ],
)
def test_nothing_that_can_be_served_is_one_line_and_status_1(
    tmp_path: Path, change: dict[str, str], words: str
) -> None:
    sockets = [("stream", int(socket.SOCK_STREAM), str(tmp_path / "stream"))]
    refused = subprocess.run(
        [sys.executable, "-c", LAUNCHER.format(sockets=sockets, change=change)],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert refused.returncode == 1
    said = refused.stderr.splitlines()
    assert words in said[-1]
    assert "Traceback" not in refused.stderr

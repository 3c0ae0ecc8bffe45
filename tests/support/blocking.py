"""Files whose close blocks, until the test has them answer; and what a cprd has to release them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.checkout import CHECKOUT
from tests.support.child import Child, Line
from tests.support.daemon import DaemonProcess
from tests.support.patience import until

MUTE = CHECKOUT / "tests/support/mute_file_system.py"


def connections(count: int) -> tuple[list[socket.socket], list[socket.socket]]:
    """TCP connections: our ends, and their peers."""
    ours, theirs = [], []
    with socket.create_server(("127.0.0.1", 0), backlog=16) as listener:
        for _ in range(count):
            ours.append(socket.create_connection(listener.getsockname()))
            theirs.append(listener.accept()[0])
    return ours, theirs


def await_ends(peers: list[socket.socket], seconds: float) -> None:
    """Each peer sees the end of its connection within so long."""
    end = time.monotonic() + seconds
    poll = select.poll()
    for peer in peers:
        poll.register(peer, select.POLLIN)
    waiting = {peer.fileno() for peer in peers}
    while waiting:
        found = poll.poll(max(0.0, end - time.monotonic()) * 1000)
        assert found, f"{len(waiting)} of {len(peers)} connections are held after {seconds:.1f} s"
        for fd, _ in found:
            poll.unregister(fd)
            waiting.discard(fd)


class Lingering:
    """253 sockets each time, whose last close waits a minute for peers that do not read."""

    last_reference_blocks = True

    def __init__(self, place: Path) -> None:
        self._peers: list[socket.socket] = []

    def files(self) -> list[int]:
        """Owned by the caller."""
        ours, theirs = connections(253)
        self._peers += theirs
        for sock in ours:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\x3c\0\0\0")
        for peer in theirs:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for sock in ours:
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock.send(b"x" * 65536)
        return [sock.detach() for sock in ours]

    def mute(self) -> None:
        """They block as they are."""

    def answer(self) -> None:
        for peer in self._peers:
            peer.close()

    close = answer


class Fuse:
    """A file of a FUSE file system that answers until `mute`: from then on each close() blocks, in
    the kernel, beyond SIGKILL; also one that drops no last reference."""

    how = "later"
    last_reference_blocks = False  # where it lies in a queue: nobody waits for the RELEASE

    def __init__(self, place: Path) -> None:
        self.place = place / "mute"
        self.place.mkdir()
        pipe = subprocess.PIPE
        command = [sys.executable, str(MUTE), str(self.place), self.how]
        self.server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        assert self.server.stdout is not None
        if not self.server.stdout.readline():
            self.server.communicate()
            pytest.skip("this root may not mount a FUSE file system")

    @property
    def file(self) -> Path:
        return self.place / "file"

    def files(self) -> list[int]:
        """Owned by the caller."""
        return [os.open(self.file, os.O_RDONLY)]

    def mute(self) -> None:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write("mute\n")
        self.server.stdin.flush()
        assert self.server.stdout.readline() == "mute\n"

    def answer(self) -> None:
        """Nothing blocks any more, and nobody has the file."""
        self.server.kill()
        self.server.communicate()
        until(self._unmounted, lambda: f"{self.file} is open somewhere")

    def _unmounted(self) -> bool:
        """Fails (EBUSY) while anybody has a file of it."""
        return bool(ctypes.CDLL(None).umount2(os.fsencode(self.place), 0) == 0)

    def close(self) -> None:
        if self.server.returncode is None:
            self.server.kill()
            self.server.communicate()
            ctypes.CDLL(None).umount2(os.fsencode(self.place), 2)


class Writeback(Fuse):
    """A file that was written to through another descriptor: whoever drops the last reference, also
    without close(), writes back."""

    how = "writeback"
    last_reference_blocks = True

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self._writer: Child | None = None

    def mute(self) -> None:
        self._writer = Child(_writes, str(self.file))
        self._writer.hear()
        super().mute()

    def _end_writer(self) -> None:
        if self._writer is not None:
            with self._writer:
                pass
            self._writer = None

    def answer(self) -> None:
        self.server.kill()
        self._end_writer()
        super().answer()

    def close(self) -> None:
        self.server.kill()
        self._end_writer()
        super().close()


def _writes(line: Line, path: str) -> None:
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, b"x" * 4096, 0)
    line.say("written")
    line.hear()  # open until it is killed


def releasers(pid: int) -> list[int]:
    """The processes below a cprd: those that fork, and those that were forked."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            found += [int(child), *releasers(int(child))]
    return found


def reload(daemon: DaemonProcess) -> float:
    """SIGHUP; the seconds until a client is served by the new version."""
    seen = len(daemon.log())
    begin = time.monotonic()
    os.kill(daemon.pid, signal.SIGHUP)
    daemon.await_log("ready pid=", since=seen)
    with daemon.connect() as connection:
        connection.status()
    return time.monotonic() - begin

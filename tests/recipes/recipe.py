"""Programs of docs/recipes.md, run as a reader runs them."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import cprd
from tests.support.checkout import CHECKOUT
from tests.support.cprctl import free_port
from tests.support.daemon import DaemonProcess
from tests.support.patience import PATIENCE, until

PAGE = CHECKOUT / "docs/recipes.md"


def programs() -> dict[str, str]:
    """The programs of the page, by the name in the first line."""
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text(), re.S)
    return dict(blocks)


def left_in(daemon: DaemonProcess, name: str) -> tuple[list[tuple[str, int]], list[str]]:
    """The keys of descriptors and sections of a live hold whose owner has ended; ends the hold."""
    with cprd.live(name, daemon.path, wait=PATIENCE) as state:
        keys = state.fd_keys(), list(state)
        for name_, id in keys[0]:
            os.close(state.take_fd(name_, id))
        dict(state)
        state.confirm(strict=True)
        state.end()
    return keys


class Recipe:
    """A program of the page as a process, started anew after each end."""

    def __init__(
        self, name: str, daemon: DaemonProcess, place: Path, *arguments: str, port: int = 0
    ) -> None:
        self.port = port or free_port()
        self.script = place / name
        self.script.write_text(programs()[name])
        self._command = [sys.executable, str(self.script), str(self.port), *arguments]
        self._env = {**daemon.env, "CPRD_SOCKET": daemon.path}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, stdin: int | None = None, stdout: int | None = None) -> None:
        """`stdin`, `stdout`: as of Popen."""
        self.process = subprocess.Popen(self._command, env=self._env, stdin=stdin, stdout=stdout)

    def kill(self, number: int = signal.SIGKILL) -> None:
        assert self.process is not None
        assert self.process.poll() is None, "ended by itself"
        self.process.send_signal(number)
        assert self.process.wait(PATIENCE) in (-number, 0)

    def again(self, number: int = signal.SIGKILL) -> None:
        """Kill, and start the successor."""
        self.kill(number)
        self.start()

    def tasks(self) -> int:
        """How many threads the process has. (One of them, at least, watches cprd.)"""
        assert self.process is not None
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def connect(self) -> socket.socket:
        """A connection, once somebody listens."""
        reached: list[socket.socket] = []

        def reach() -> bool:
            try:
                reached.append(socket.create_connection(("127.0.0.1", self.port), PATIENCE))
            except ConnectionRefusedError:
                assert self.process is None or self.process.poll() is None, "ended by itself"
            return bool(reached)

        until(reach, lambda: f"nobody listens on {self.port}")
        return reached[0]

    def __enter__(self) -> Recipe:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE)


class Lines:
    """A connection that reads lines."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._file = sock.makefile("rb")

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def line(self) -> bytes:
        """The next line; fails at the end of the connection, or past the deadline."""
        line = self._file.readline()
        assert line.endswith(b"\n"), f"the connection ended: {line!r}"
        return line

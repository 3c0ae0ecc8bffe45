"""A real cprd for tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cprd
from tests.support.checkout import CHECKOUT
from tests.support.descriptors import open_fds
from tests.support.patience import PATIENCE, until


class DaemonProcess:
    """`python -m cprd.daemon.command --socket PATH` as a process of its own."""

    def __init__(
        self,
        place: Path,
        *arguments: str,
        config: str = "",
        nofile: tuple[int, int] | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        """`config`: TOML. `nofile`: soft and hard RLIMIT_NOFILE. `env` is added to ours."""
        self.path = str(place / "cprd.sock")
        self.command = [
            sys.executable,
            "-m",
            "cprd.daemon.command",
            "--socket",
            self.path,
            *arguments,
        ]
        if config:
            (place / "cprd.toml").write_text(config)
            self.command += ["--config", str(place / "cprd.toml")]
        if nofile is not None:
            self.command[:0] = ["prlimit", f"--nofile={nofile[0]}:{nofile[1]}"]
        drop = ("CPRD_", "LISTEN_", "NOTIFY_SOCKET", "JOURNAL_STREAM", "FDSTORE")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(drop)}
        self.env = {**kept, "PYTHONPATH": str(CHECKOUT), **(env or {})}
        self._lines: list[str] = []
        self._news = threading.Condition()
        self._reading = threading.Lock()
        self.process: subprocess.Popen[str] | None = None
        self.start()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        """Start it (again), and wait until it serves."""
        seen = len(self._lines)
        self.process = subprocess.Popen(
            self.command, stderr=subprocess.PIPE, text=True, env=self.env, cwd="/"
        )
        self._reader = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        self._reader.start()
        self.await_log("ready ", since=seen)

    def stop(self) -> int:
        """SIGTERM, and wait for its end. Returns its exit status."""
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Killed without a word, and started anew at the same socket."""
        self.kill()
        self.start()

    def _end(self, number: int) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
            self.process.send_signal(signal.SIGCONT)  # it may stand at a pause point
        status = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return status

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def connect(self) -> cprd.Daemon:
        return cprd.connect(self.path)

    # Its descriptors

    def fds(self) -> int:
        return open_fds(self.pid)

    def await_fds(self, count: int) -> None:
        """Wait until it has so many descriptors: it lets go of things in threads."""
        until(lambda: self.fds() == count, lambda: f"{self.fds()} descriptors in cprd")

    # Its log

    def log(self) -> list[str]:
        """The lines so far."""
        return list(self._lines)

    def await_log(self, text: str, *, since: int = 0) -> str:
        """The first line from number `since` on that contains `text`, waited for."""
        with self._news:
            end = time.monotonic() + PATIENCE
            while True:
                for line in self._lines[since:]:
                    if text in line:
                        return line
                left = end - time.monotonic()
                over = left <= 0 or not self._reader.is_alive()
                assert not over, f"{text!r} is not in cprd's log: {self._lines}"
                self._news.wait(min(left, 0.2))

    def leave_log_unread(self, leave: bool) -> None:
        """Read no more of its log; or (False) go on with it."""
        if leave:
            self._reading.acquire()
        else:
            self._reading.release()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            with self._reading, self._news:
                self._lines.append(line.rstrip("\n"))
                self._news.notify_all()

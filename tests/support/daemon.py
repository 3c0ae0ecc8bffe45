"""A real cprd for tests."""

from __future__ import annotations

import array
import fcntl
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time
from pathlib import Path

import cprd
from tests.support.checkout import CHECKOUT
from tests.support.descriptors import open_fds
from tests.support.patience import PATIENCE, until

STAMP = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ")  # the time, in UTC


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
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        """Start it (again), and wait until it serves."""
        seen = len(self._lines)
        self.process = subprocess.Popen(self.command, stderr=subprocess.PIPE, env=self.env, cwd="/")
        self._reader = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        self._reader.start()
        self.await_log("ready pid=", since=seen)
        end = time.monotonic() + 1.0  # without room there is none
        while not releasers(self.pid) and time.monotonic() < end:  # or `fds` would count one more
            time.sleep(0.002)

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

    def phases(self) -> dict[str, str]:
        """The phase of each hold, by name."""
        with self.connect() as daemon:
            return {row["name"]: row["phase"] for row in daemon.list()}

    # Its descriptors

    def fds(self) -> int:
        """How many descriptors cprd has, apart from those by which releasers are told: an idle
        releaser stays for some seconds."""
        return open_fds(self.pid) - len(releasers(self.pid))

    def await_fds(self, count: int, queues: int = 0) -> None:
        """Wait until it has no more than so many descriptors: it lets go of things in threads, and
        a releaser that is idle ends. `queues`: so many connections that go on have saved twice, and
        may have the queue for another save."""
        until(
            lambda: self.fds() <= count + queues,
            lambda: f"{self.fds()} descriptors in cprd",
        )

    # Its log

    def log(self) -> list[str]:
        """The lines so far, without their times."""
        return list(self._lines)

    def await_log(self, text: str, *, since: int = 0) -> str:
        """The first line from number `since` on that contains `text` (no part of a word: "already"
        is not "ready"), waited for."""
        wanted = re.compile(r"(?<!\w)" + re.escape(text))
        with self._news:
            end = time.monotonic() + PATIENCE
            while True:
                for line in self._lines[since:]:
                    if wanted.search(line):
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

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        fd = process.stderr.fileno()
        news = select.poll()
        news.register(fd, select.POLLIN)
        begun = b""
        while True:
            news.poll()
            with self._reading, self._news:  # read and noted in one: see forget_log
                data = os.read(fd, 1 << 16)
                *lines, begun = (begun + data).split(b"\n")
                self._lines += [STAMP.sub("", line.decode(errors="replace")) for line in lines]
                self._news.notify_all()
            if not data:
                return

    # Used again

    def remember(self) -> None:
        """What it is like before anybody used it, for `as_started`."""
        self._first_pid = self.pid
        self._first_command, self._first_env = list(self.command), dict(self.env)
        self._first_fds = self.fds()

    def as_started(self) -> bool:
        """Whether it is as it was: the same process, nothing held, nobody connected, nothing left
        to let go of, no word of it unread. What it has held is dropped."""
        same = self.alive() and self.pid == self._first_pid
        if not same or any("re-executing" in line for line in self._lines):
            return False
        if (self.command, self.env) != (self._first_command, self._first_env):
            return False
        try:
            with self.connect() as daemon:
                for row in daemon.list():
                    own = row["uid"] == os.getuid()
                    daemon.drop(row["name"] if own else f"{row['uid']}/{row['name']}", force=True)
                until(lambda: not daemon.status()["closing"], lambda: "a close that blocks", 0.5)
            until(lambda: self.fds() == self._first_fds, lambda: "more descriptors", 0.5)
        except (AssertionError, cprd.CprdError):
            return False
        return self._forget_log()

    def _forget_log(self) -> bool:
        """Whether all of its log so far could be read, and forgotten."""
        assert self.process is not None
        assert self.process.stderr is not None
        unread = array.array("i", [0])
        with self._news:
            fcntl.ioctl(self.process.stderr.fileno(), termios.FIONREAD, unread)
            if not unread[0]:
                self._lines.clear()
        return not unread[0]


def releasers(pid: int) -> list[int]:
    """The releasing processes of a cprd: what the forker, a child of cprd, has forked."""
    return [one for forker in _children(pid) for one in _children(forker)]


def _children(pid: int) -> list[int]:
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in found if _lives(child)]
    except OSError:
        return []


def _lives(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def answers(path: str) -> bool:
    """Whether a cprd answers there."""
    try:
        cprd.connect(path).close()
    except cprd.Unavailable:
        return False
    return True


class Shared:
    """One cprd for many tests, one after the other. Each finds it as it was after its start; where
    a test leaves it otherwise, the next one gets a new one."""

    def __init__(self) -> None:
        self._daemon: DaemonProcess | None = None
        self._place: tempfile.TemporaryDirectory[str] | None = None

    def take(self) -> DaemonProcess:
        if self._daemon is None:
            self._place = tempfile.TemporaryDirectory(prefix="cprd-test.")
            place = Path(self._place.name)
            place.chmod(0o755)  # other uids come, too
            self._daemon = DaemonProcess(place)
            self._daemon.remember()
        return self._daemon

    def give_back(self) -> None:
        if self._daemon is not None and not self._daemon.as_started():
            self.end()

    def end(self) -> None:
        if self._daemon is not None and self._place is not None:
            self._daemon.stop()
            self._place.cleanup()
            self._daemon = self._place = None

    def fds(self) -> int:
        """How many descriptors of this process it costs: its log's."""
        return self._daemon is not None

"""The parent of --keep with a child that does what a test tells, line by line."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from cprd.keep import messages
from cprd.keep.record import Record
from tests.support.checkout import CHECKOUT
from tests.support.patience import PATIENCE, until
from tests.support.processes import state

from .keeping import children, environment

# Both the one that was killed and the next one read the same pipe, so no byte too much.
CHILD = """
import os, signal, socket, sys, time
from cprd.linux import listen_fds
from cprd.systemd import fdstore
from cprd.systemd.notify import *

def line():
    said = b""
    while not said.endswith(b"\\n"):
        said += os.read(0, 1) or os._exit(0)
    return said.decode()

def say(*words):
    print(*words, flush=True)

def remove(*names):
    for name in names:
        drive(fdstore.remove(manager, name))

signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
signal.signal(signal.SIGHUP, lambda *_: None)
named = listen_fds.take(os.environ)
kept = named[1:]
manager = Manager.from_environment(os.environ)
say("started", *(name for name, _ in named))
while True:
    exec(line())
"""
READY = (
    "drive(manager.tell(READY + b'\\n' + status('2 holds, kept: store')));"
    " drive(manager.barrier()); say('ready')"
)


class Toy:
    """Owns the parent; close() ends it. `keep` is the directory of the parent's program."""

    def __init__(
        self,
        place: Path,
        *,
        watchdog: float = 30.0,
        child: str = CHILD,
        keep: Path = CHECKOUT / "cprd/keep",
        prefix: tuple[str, ...] = (),
        env: dict[str, str] | None = None,
        stderr: int | None = None,
    ) -> None:
        (place / "child.py").write_text(child)
        record = Record()
        record.path, record.notify_path = str(place / "listener"), str(place / "keep")
        record.watchdog = watchdog
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
            messages.listen(record.notify_path) as notify,
        ):
            listener.bind(record.path)
            listener.listen()
            found = os.lstat(record.path)
            record.inode = (found.st_dev, found.st_ino)
            record.notify, record.sockets = notify.fileno(), [("cprd.socket", listener.fileno())]
            memfd = record.write()
            self.log = place / "log"
            with open(self.log, "wb") as log:
                self.process = subprocess.Popen(
                    [
                        *(*prefix, sys.executable, "-I", "-S", str(keep / "__main__.py")),
                        *(str(memfd), sys.executable, str(place / "child.py")),
                    ],
                    pass_fds=(notify.fileno(), listener.fileno(), memfd),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log if stderr is None else stderr,
                    env={**environment(), **(env or {})},
                )
            os.close(memfd)
        self.record = record

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def child(self) -> int:
        """The newest one's PID; 0 for none."""
        return (children(self.pid) or [0])[-1]

    def hears(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().rstrip("\n")

    def do(self, code: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(code.encode() + b"\n")
        self.process.stdin.flush()

    def ask(self, code: str) -> str:
        self.do(code)
        return self.hears()

    def start(self) -> None:
        """Until the child is ready."""
        assert self.hears().startswith("started")
        assert self.ask(READY) == "ready"

    def kill(self) -> list[str]:
        """kill -9 of the child. The names that the next one, which is ready, was given."""
        os.kill(self.child, signal.SIGKILL)
        return self.restarted()

    def restarted(self) -> list[str]:
        started, *names = self.hears().split()
        assert started == "started", self.said()
        assert self.ask(READY) == "ready"
        return names

    def said(self) -> str:
        return self.log.read_text()

    def await_log(self, text: str) -> None:
        until(lambda: text in self.said(), self.said)

    def end(self, number: int = signal.SIGTERM) -> int:
        """The exit status of the parent, after a signal."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        if self.process.poll() is None:
            child = self.child
            self.process.kill()
            if child:
                os.kill(child, signal.SIGKILL)
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


def await_state(pid: int, wanted: str) -> None:
    until(lambda: state(pid) == wanted, lambda: f"{state(pid)}, not {wanted}")

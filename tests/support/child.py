"""A process for a test: a child of fork() that runs a function, and is talked to in lines."""

from __future__ import annotations

import importlib
import os
import pkgutil
import signal
import socket
import sys
from collections.abc import Callable

import cprd.bundle
import cprd.client
import cprd.linux
import cprd.protocol
from tests.support.patience import PATIENCE


class Line:
    """One end of the conversation."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(PATIENCE)
        self.sock = sock

    def say(self, text: object = "") -> None:
        self.sock.send(str(text).encode() + b"\n")

    def hear(self) -> str:
        """The next line; EOFError when the other side has ended."""
        data = self.sock.recv(65536)
        if not data:
            raise EOFError
        return data.decode().rstrip("\n")


def become(uid: int) -> None:
    """Give up root for `uid`, in a child. What a client of cprd imports is imported first: another
    uid may not be able to read the checkout."""
    for room in (cprd.client, cprd.bundle, cprd.protocol, cprd.linux):
        for module in pkgutil.iter_modules(room.__path__, f"{room.__name__}."):
            importlib.import_module(module.name)
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)


class Child:
    """Runs `call(line, *args)` in a child of fork(), and ends with the block at the latest."""

    def __init__(self, call: Callable[..., object], *args: object) -> None:
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.status: int | None = None
        self.pid = os.fork()
        if not self.pid:
            status = 1
            try:
                mine.close()
                call(Line(theirs), *args)
                status = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(status)
        theirs.close()
        self.line = Line(mine)
        self.say, self.hear = self.line.say, self.line.hear

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
        self.line.sock.close()

    def wait(self) -> int:
        """Its exit status; minus the signal that ended it."""
        if self.status is None:
            _, status = os.waitpid(self.pid, 0)
            self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL

    def becomes_a_zombie(self) -> None:
        """Kill it, and leave it unreaped."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

"""The process that forks releasers, as the daemon sees that process."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from array import array
from collections.abc import Iterable

from cprd.daemon import log

PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "releaser.py")
FORMER = "CPRD_RELEASERS"  # across exec: the processes that are still to be collected
AGAIN = 0.5  # s from one start to the next
_SEQPACKET = socket.SOCK_SEQPACKET


class Forker:
    """Makes releasers. Nothing here waits for another process."""

    def __init__(self) -> None:
        self.sock: socket.socket | None = None  # readable once the process has ended
        self.pid = 0
        self._not_before = 0.0
        former = os.environ.pop(FORMER, "").split(",")
        self._ended = {int(pid) for pid in former if pid.isdigit()}

    def made(self) -> socket.socket | None:
        """The daemon's end of a new releaser's socket, owned by the caller; None where no process
        can be had now."""
        while True:
            if self.sock is None and not self._start():
                return None
            assert self.sock is not None
            try:
                ours, theirs = socket.socketpair(socket.AF_UNIX, _SEQPACKET)
            except OSError as error:
                log.event("no-releaser", level=log.ERROR, why=error.strerror)
                return None
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [theirs.fileno()]))]
            try:
                self.sock.sendmsg([b"r"], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except (BrokenPipeError, ConnectionResetError):
                ours.close()
                self._lose()  # and try another, which is started now or not at all
            except OSError as error:  # too much in flight, or on the way
                ours.close()
                log.event("no-releaser", level=log.WARNING, why=error.strerror)
                return None
            else:
                ours.setblocking(False)
                return ours
            finally:
                theirs.close()

    def _start(self) -> bool:
        if time.monotonic() < self._not_before:
            return False
        self._not_before = time.monotonic() + AGAIN
        started = _spawn("fork")
        if started is None:
            return False
        self.pid, self.sock = started
        return True

    def _lose(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None
        self._ended.add(self.pid)

    def reap(self) -> None:
        """Notice the end of the process, and collect ended ones, those of before an exec too."""
        if self.sock is not None:
            try:
                self.sock.recv(1, socket.MSG_DONTWAIT)
                self._lose()
            except BlockingIOError:
                pass
            except OSError:
                self._lose()
        for pid in list(self._ended):
            try:
                if os.waitpid(pid, os.WNOHANG)[0] == pid:
                    self._ended.discard(pid)
            except ChildProcessError:
                self._ended.discard(pid)

    @property
    def unreaped(self) -> bool:
        return bool(self._ended)

    def pass_on(self) -> None:
        """Tell the next version, across exec, which children to collect."""
        os.environ[FORMER] = ",".join(str(pid) for pid in {*self._ended, self.pid} - {0})


def inherited(fds: Iterable[int]) -> socket.socket | None:
    """Start a process that keeps `fds` until the returned socket, the caller's, is closed. For the
    end of the daemon, and what could not be sent. None where no process can be had."""
    for fd in fds:
        os.set_inheritable(fd, True)
    started = _spawn("hold")
    return None if started is None else started[1]


def _spawn(what: str) -> tuple[int, socket.socket] | None:
    """Start the program: its pid, and the daemon's end of the socket."""
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, _SEQPACKET)
    except OSError as error:
        log.event("no-releaser", level=log.ERROR, why=error.strerror)
        return None
    null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (1, 2)]
    kept = {"LD_LIBRARY_PATH"}  # some interpreters do not start without
    try:
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", PROGRAM, what],
            {name: value for name, value in os.environ.items() if name in kept},
            file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), 0), *null],
            setsid=True,
            setsigmask=(),
            setsigdef=(signal.SIGPIPE,),
        )
    except OSError as error:
        ours.close()
        log.event("no-releaser", level=log.ERROR, why=error.strerror)
        return None
    finally:
        theirs.close()
    return pid, ours

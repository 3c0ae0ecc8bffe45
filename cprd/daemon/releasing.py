"""Letting go of foreign files, in a process of each uid: never in the daemon.

The last close of a foreign file can block for as long as the file's owner likes (SO_LINGER, FUSE,
network file systems), also in exec() and exit(), and a blocked thread blocks both for the whole
process. So the daemon drops no last reference. A socket with foreign files in the queue (an ended
slot, an unsaved bundle) goes by SCM_RIGHTS to the releaser of the uid (releaser.py), and the daemon
closes its own copy. A uid with blocking files holds up nobody but itself.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
from array import array
from collections import deque
from collections.abc import Iterable

import trio

from cprd.daemon import log

PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "releaser.py")
FORMER = "CPRD_RELEASERS"  # across exec: the process that forked the releasers so far
MOST = 8  # descriptors in one message (releaser.py)
AT_ONCE = 16  # messages to one releaser without an acknowledgement
LINGER = 5.0  # s until an idle releaser is told to end
AGAIN = 1.0  # s until a failed start is tried again
_SEQPACKET = socket.SOCK_SEQPACKET

Fds = tuple[int, ...]


class Forker:
    """The process that forks releasers. `made` never waits for that process."""

    def __init__(self) -> None:
        self._sock: socket.socket | None = None
        self.pid = 0
        self._ended = {int(os.environ.pop(FORMER, "0") or 0)} - {0}

    def made(self) -> socket.socket | None:
        """The daemon's end of a new releaser's socket; None where no process can be had."""
        for _ in range(2):
            if self._sock is None and not self._start():
                return None
            assert self._sock is not None
            try:
                ours, theirs = socket.socketpair(socket.AF_UNIX, _SEQPACKET)
            except OSError as error:
                log.event("no-releaser", level=log.ERROR, why=error.strerror)
                return None
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [theirs.fileno()]))]
            try:
                self._sock.sendmsg([b"r"], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except OSError as error:
                ours.close()
                log.event("no-releaser", level=log.WARNING, why=error.strerror)
                self._lose()
                continue
            finally:
                theirs.close()
            ours.setblocking(False)
            return ours
        return None

    def _start(self) -> bool:
        ours, theirs = socket.socketpair(socket.AF_UNIX, _SEQPACKET)
        number = 3 if theirs.fileno() != 3 else 4
        null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
        try:
            self.pid = os.posix_spawn(
                sys.executable,
                [sys.executable, "-I", "-S", PROGRAM, str(number)],
                {},
                file_actions=[*null, (os.POSIX_SPAWN_DUP2, theirs.fileno(), number)],
                setsid=True,
                setsigmask=(),
                setsigdef=(signal.SIGPIPE,),
            )
        except OSError as error:
            ours.close()
            log.event("no-releaser", level=log.ERROR, why=error.strerror)
            return False
        finally:
            theirs.close()
        self._sock = ours
        return True

    def _lose(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        self._ended.add(self.pid)

    def reap(self) -> None:
        """Collect ended processes, those of before an exec too."""
        for pid in list(self._ended):
            try:
                if os.waitpid(pid, os.WNOHANG)[0] == pid:
                    self._ended.discard(pid)
            except ChildProcessError:
                self._ended.discard(pid)

    @property
    def unreaped(self) -> bool:
        return bool(self._ended)


class Releaser:
    """The daemon's side of one uid's releaser."""

    __slots__ = ("idle_since", "queue", "sent", "sock")

    def __init__(self) -> None:
        self.sock: socket.socket | None = None
        self.sent = 0  # messages without an acknowledgement
        self.queue: deque[Fds] = deque()  # owned; not sent yet
        self.idle_since = 0.0

    def send(self) -> bool:
        """Send as much as may be under way, and close the sent descriptors here. False: the
        releaser has gone."""
        while self.queue and self.sent < AT_ONCE and self.sock is not None:
            fds = self.queue[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))]
            try:
                self.sock.sendmsg([b"c"], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except (BrokenPipeError, ConnectionResetError):
                return False
            except OSError:  # no room, or too many in flight: tried again after the next answer
                return True
            self.queue.popleft()
            self.sent += 1
            for fd in fds:
                os.close(fd)
        return True

    def heard(self) -> bool:
        """Count acknowledgements. False: the releaser has gone."""
        assert self.sock is not None
        while True:
            try:
                if not self.sock.recv(1):
                    return False
            except BlockingIOError:
                return True
            except OSError:
                return False
            self.sent -= 1


class Releasing:
    """All releasers, by uid. `tend` is to run as a task; `close` works without."""

    def __init__(self, forker: Forker | None = None) -> None:
        self._forker = forker or Forker()
        self._releasers: dict[int, Releaser] = {}
        self._by_socket: dict[int, int] = {}  # uid by descriptor
        self._epoll = select.epoll()
        self._spare = self._forker.made()  # warm: has started by the time of the first need

    def close(self, uid: int, fds: Iterable[int]) -> None:
        """Release descriptors, owned from now on, and everything queued in them, in order. Never
        blocks."""
        releaser = self._releasers.setdefault(uid, Releaser())
        owned = tuple(fds)
        releaser.queue.extend(owned[at : at + MOST] for at in range(0, len(owned), MOST))
        self._advance(uid, releaser)

    def _advance(self, uid: int, releaser: Releaser) -> None:
        if not releaser.queue:
            return
        if releaser.sock is None:
            self._connect(uid, releaser)
        if not releaser.send():
            self._lose(releaser)
            self._connect(uid, releaser)
            releaser.send()

    def _connect(self, uid: int, releaser: Releaser) -> None:
        sock, self._spare = self._spare, None
        releaser.sock = sock or self._forker.made()
        releaser.sent = 0
        if releaser.sock is not None:
            self._by_socket[releaser.sock.fileno()] = uid
            self._epoll.register(releaser.sock, select.EPOLLIN)

    def _lose(self, releaser: Releaser) -> None:
        """Forget a releaser that has ended: what was sent was released by that end."""
        if releaser.sock is not None:
            self._by_socket.pop(releaser.sock.fileno(), None)
            self._epoll.unregister(releaser.sock)
            releaser.sock.close()
            releaser.sock = None
        releaser.sent = 0

    def pending(self, uid: int) -> int:
        """How many releases of a uid are under way, or wait."""
        releaser = self._releasers.get(uid)
        return 0 if releaser is None else releaser.sent + len(releaser.queue)

    def blocked(self) -> dict[int, int]:
        """Releases under way or waiting, by uid."""
        return {uid: count for uid in self._releasers if (count := self.pending(uid))}

    async def tend(self) -> None:
        """For ever: hear acknowledgements, send more, let idle releasers end, keep one warm."""
        while True:
            pause = AGAIN if self._restless else LINGER
            with trio.move_on_after(pause):
                await trio.lowlevel.wait_readable(self._epoll.fileno())
            self.collect()
            await trio.lowlevel.checkpoint()

    @property
    def _restless(self) -> bool:
        """Whether something waits for anything but an acknowledgement."""
        stuck = any(one.queue and not one.sent for one in self._releasers.values())
        return stuck or self._spare is None or self._forker.unreaped

    def collect(self) -> None:
        """Hear acknowledgements so far, and follow up."""
        for fd, _ in self._epoll.poll(0):
            releaser = self._releasers[self._by_socket[fd]]
            if not releaser.heard():
                self._lose(releaser)
        now = time.monotonic()
        for uid, releaser in list(self._releasers.items()):
            self._advance(uid, releaser)
            if releaser.queue or releaser.sent:
                releaser.idle_since = now
            elif now - releaser.idle_since > LINGER:
                self._lose(releaser)
                del self._releasers[uid]
        if self._spare is None:
            self._spare = self._forker.made()
        self._forker.reap()

    def stop(self) -> list[tuple[int, int]]:
        """Send whatever can be sent. Returns the rest, (uid, fd), owned by the caller, before an
        exec or the end: both close descriptors, and a last close could block."""
        left = []
        for uid, releaser in self._releasers.items():
            while releaser.queue and releaser.sock is not None:
                releaser.sent = 0  # nobody counts any more: as much as the socket takes
                before = len(releaser.queue)
                if not releaser.send() or len(releaser.queue) == before:
                    break
            left += [(uid, fd) for fds in releaser.queue for fd in fds]
            releaser.queue.clear()
        return left

    def pass_on(self) -> None:
        """Tell the next version, across exec, which child to collect."""
        os.environ[FORMER] = str(self._forker.pid)

"""Letting go of foreign files, in a process of each uid: never in the daemon.

The last close of a foreign file can block for as long as the file's owner likes (SO_LINGER, FUSE,
network file systems), also in exec() and exit(), and a blocked thread blocks both for the whole
process. So the daemon drops no last reference. Descriptors go by SCM_RIGHTS to the releaser of the
uid (releaser.py): to be closed, and then the daemon closes its own copies at once; or, for a
bundle, to be drained, and then the daemon keeps a copy until the releaser says that the bundle is
empty. The end of a releaser closes what had arrived there, and a bundle goes to the next releaser:
nothing is lost, whoever is killed. A uid with blocking files holds up nobody but itself.
"""

from __future__ import annotations

import io
import math
import os
import select
import socket
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import trio

from cprd.daemon import log
from cprd.daemon.forker import AGAIN, Forker, inherited
from cprd.daemon.reexec import Passed
from cprd.daemon.releaser import (
    AFTER,
    CLOSE,
    CLOSED,
    COUNT,
    COUNTED,
    DRAIN,
    FENCE,
    FENCED,
    LET_GO,
    MOST,
    ROOT,
    WHOLE,
)
from cprd.errors import LimitExceeded

AT_ONCE = 16  # messages to one releaser without an acknowledgement
MAX_PENDING = 200  # messages of a uid, sent or not, where nothing moves
MOST_PENDING = 4000  # where something moves: many holds can end at once
STILL = 3.0  # s without an acknowledgement: something blocks, on a busy machine too
LINGER = 5.0  # s until an idle releaser is told to end
GATHERED = 0.02  # s: what comes meanwhile is heard together, and further bundles go together

Fds = tuple[int, ...]


LIVE = (WHOLE, ROOT)
KEPT = (DRAIN, *LIVE, FENCE, COUNT)  # until acknowledged: another releaser is asked where one ends


class Work(NamedTuple):
    """One message. `fds` are owned: until sent, and for kinds in KEPT until acknowledged."""

    kind: bytes
    fds: Fds
    done: Callable[[bytes], None] | None = None  # called with the acknowledgement


class Answer:
    """What a releaser says at last, also where nobody waits any more. `over` is called then."""

    def __init__(self, over: Callable[[], object] = lambda: None) -> None:
        self._over = over
        self._said = b""
        self._came = trio.Event()

    def comes(self, said: bytes) -> None:
        self._said = said
        self._came.set()
        self._over()

    async def said(self) -> bytes:
        await self._came.wait()
        return self._said


class Releaser:
    """The daemon's side of one uid's releaser."""

    __slots__ = ("moved", "owed", "queue", "sent", "sock")

    def __init__(self) -> None:
        self.sock: socket.socket | None = None
        self.sent: deque[Work] = deque()  # without an acknowledgement
        self.queue: deque[Work] = deque()  # not sent yet
        self.owed = False  # the word that the copies here are closed
        self.moved = time.monotonic()  # when last something was acknowledged, or begun

    def send(self, at_once: int = AT_ONCE) -> bool:
        """Send as much as may be under way. False: the releaser has gone."""
        self._say_closed()
        while self.queue and len(self.sent) < at_once and self.sock is not None:
            if not self._say_closed():
                return True
            kind, fds, _ = self.queue[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))]
            try:
                self.sock.sendmsg([kind], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except (BrokenPipeError, ConnectionResetError):
                return False
            except OSError:  # no room, or too many in flight: tried again after the next answer
                return True
            work = self.queue.popleft()
            if kind in KEPT:
                self.sent.append(work)
                continue
            self.sent.append(Work(kind, ()))
            for fd in fds:
                os.close(fd)  # the releaser has another, and waits: not the last one
            self.owed = kind == CLOSE
            self._say_closed()
        return True

    def _say_closed(self) -> bool:
        """Tell the releaser that the copies here are closed. False: no room for the word yet."""
        if self.owed and self.sock is not None:
            try:
                self.sock.send(CLOSED, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return False
            except OSError:
                pass  # the releaser has gone
        self.owed = False
        return True

    def heard(self) -> tuple[list[tuple[Work, bytes]], bool]:
        """The work acknowledged since, with the words, and whether the releaser is still there."""
        assert self.sock is not None
        done: list[tuple[Work, bytes]] = []
        try:
            while said := self.sock.recv(64):
                if self.sent:
                    done.append((self.sent.popleft(), said))
                self.moved = time.monotonic()
        except BlockingIOError:
            return done, True
        except OSError:
            pass
        return done, False

    def lost(self) -> None:
        """The releaser has ended. The end has closed what was sent, and has drained nothing."""
        if self.sock is not None:
            self.sock.close()
            self.sock = None
        self.queue.extendleft(work for work in reversed(self.sent) if work.kind in KEPT)
        self.sent.clear()
        self.owed = False


class Releasing:
    """All releasers, by uid. `tend` is to run as a task; the rest works without."""

    def __init__(self, forker: Forker | None = None) -> None:
        self._forker = forker or Forker()
        self._releasers: dict[int, Releaser] = {}
        self._by_socket: dict[int, int] = {}  # uid by descriptor
        # Inodes of bundles and slots that are drained, or wait for that.
        self.draining: set[int] = set()
        self._after: dict[int, list[int]] = {}  # by uid; owned
        self._fences: dict[int, Answer] = {}  # open requests, by inode of the bundle
        self._epoll = select.epoll()
        # Wakes `tend`; closed with this object.
        self._stuck = io.FileIO(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK), "r+")
        self._epoll.register(self._stuck, select.EPOLLIN)
        self._watched: socket.socket | None = None
        self._tended = False
        self._gathering = False  # bundles wait for more
        self._sent = -math.inf  # when last bundles were sent
        self._spare = self._forker.made()  # warm: has started by the time of the first need
        self._watch_forker()

    def adopt(self, passed: Passed) -> None:
        """Go on with the work of before an exec."""
        for uid, sent, fd in passed.releasers:
            releaser = self._releasers.setdefault(uid, Releaser())
            # The order does not matter: a bundle may be kept for longer than necessary.
            slots = [Work(DRAIN, (fd,)) for owner, fd in passed.sent if owner == uid]
            self.draining.update(os.fstat(work.fds[0]).st_ino for work in slots)
            releaser.sent = deque([Work(CLOSE, ())] * (sent - len(slots)) + slots)
            self._use(uid, releaser, socket.socket(fileno=fd))
        for uid, fd in passed.closing:
            self.close(uid, [fd])
        for uid, fd in passed.draining:
            self.drain(uid, fd)

    def close(self, uid: int, fds: Iterable[int]) -> None:
        """Close descriptors, owned from now on. Never blocks."""
        owned = tuple(fds)
        for at in range(0, len(owned), MOST):
            self._add(uid, Work(CLOSE, owned[at : at + MOST]))

    def drain(
        self,
        uid: int,
        fd: int,
        how: bytes = DRAIN,
        done: Callable[[bytes], None] | None = None,
    ) -> None:
        """Drop everything queued in a bundle or slot, of a live hold as `how` says, then close;
        `fd` is owned from now on. Calls `done` then, but not after an exec. Never blocks."""
        inode = os.fstat(fd).st_ino
        if inode in self.draining:  # found again on a shelf after an exec: not the last copy
            os.close(fd)
            return
        self.draining.add(inode)
        self._add(uid, Work(how, (fd,), done if how in LIVE else None))

    async def fence(self, uid: int, bundle: int) -> None:
        """Let the owner of a live hold change nothing any more; `bundle` is owned from now on.
        Returns once no change counts. Waits for as long as files of the uid block."""
        inode = os.fstat(bundle).st_ino
        fence = self._fences.get(inode)
        if fence is None:
            fence = self._fences[inode] = Answer(partial(self._fences.pop, inode, None))
            self._add(uid, Work(FENCE, (bundle,), fence.comes))
        else:  # not another one: nobody is to fill this process with requests that wait
            os.close(bundle)
        if await fence.said() != FENCED:
            raise LimitExceeded("a releaser of an earlier version cannot fence: try again")

    async def count(self, uid: int, bundle: int) -> tuple[int, int] | None:
        """How many descriptors the root of the live hold in a bundle has, and how many lie in the
        segments; None where that cannot be seen. `bundle` is owned from now on. Waits as `fence`
        does."""
        answer = Answer()
        self._add(uid, Work(COUNT, (bundle,), answer.comes))
        said = await answer.said()
        if len(said) != COUNTED.size:
            return None
        in_root, below = COUNTED.unpack(said)
        return in_root, below

    def close_after(self, uid: int, fds: Iterable[int]) -> None:
        """Close descriptors, owned from now on, after the end of the daemon. `stop` must follow."""
        kept = self._after.setdefault(uid, [])
        kept += fds
        if len(kept) >= MOST:
            self._send_after(uid)

    def _send_after(self, uid: int) -> None:
        fds = self._after.pop(uid)
        releaser = self._releasers.setdefault(uid, Releaser())
        releaser.queue.extend(
            Work(AFTER, tuple(fds[at : at + MOST])) for at in range(0, len(fds), MOST)
        )
        self._advance(uid, releaser, at_once=1 << 30)

    def _add(self, uid: int, work: Work) -> None:
        releaser = self._releasers.setdefault(uid, Releaser())
        if not (releaser.queue or releaser.sent):
            releaser.moved = time.monotonic()
        releaser.queue.append(work)
        if work.kind in (DRAIN, *LIVE):
            now = time.monotonic()
            if now - self._sent < GATHERED and self._tended and len(releaser.queue) < AT_ONCE:
                self._gather()
                return
            self._sent = now  # the first one goes at once: a peer waits for the end
        if len(releaser.sent) >= AT_ONCE:
            self._hear()
        self._advance(uid, releaser)
        if not releaser.sent:
            self._wake()

    def _wake(self) -> None:
        """Let `tend` look at all releasers soon."""
        os.eventfd_write(self._stuck.fileno(), 1)

    def _gather(self) -> None:
        """Let `tend` send soon: a releaser that wakes up for each bundle takes as much CPU time as
        a request."""
        if not self._gathering:
            self._gathering = True
            self._wake()

    def _advance(self, uid: int, releaser: Releaser, at_once: int = AT_ONCE) -> None:
        if not releaser.queue:
            return
        if releaser.sock is None:
            self._connect(uid, releaser)
        if not releaser.send(at_once):
            self._lose(releaser)
            self._connect(uid, releaser)
            releaser.send(at_once)

    def _connect(self, uid: int, releaser: Releaser) -> None:
        sock, self._spare = self._spare, None
        sock = sock or self._forker.made()
        if sock is not None:
            self._use(uid, releaser, sock)

    def _use(self, uid: int, releaser: Releaser, sock: socket.socket) -> None:
        sock.setblocking(False)
        releaser.sock = sock
        self._by_socket[sock.fileno()] = uid
        self._epoll.register(sock, select.EPOLLIN)

    def _lose(self, releaser: Releaser) -> None:
        if releaser.sock is not None:
            self._by_socket.pop(releaser.sock.fileno(), None)
            self._epoll.unregister(releaser.sock)
        releaser.lost()

    def pending(self, uid: int) -> int:
        """How many releases of a uid are under way, or wait."""
        releaser = self._releasers.get(uid)
        return 0 if releaser is None else len(releaser.sent) + len(releaser.queue)

    def refuses(self, uid: int) -> bool:
        """Whether so much of a uid waits, and blocks, that the uid must bring nothing more."""
        pending = self.pending(uid)
        if pending <= MAX_PENDING:
            return False
        releaser = self._releasers[uid]
        if pending <= MOST_PENDING and time.monotonic() - releaser.moved > STILL:
            self._hear()  # what was acknowledged while this process was not running
        return pending > MOST_PENDING or time.monotonic() - releaser.moved > STILL

    def blocked(self) -> dict[int, int]:
        """Releases under way or waiting, by uid."""
        return {uid: count for uid in self._releasers if (count := self.pending(uid))}

    async def tend(self) -> None:
        """For ever: hear acknowledgements, send more, let idle releasers end, keep one warm."""
        self._tended = True
        while True:
            with trio.move_on_after(self._pause):
                await trio.lowlevel.wait_readable(self._epoll.fileno())
            if not self._restless:
                await trio.sleep(GATHERED)
            self.collect()
            await trio.lowlevel.checkpoint()

    @property
    def _pause(self) -> float:
        """Seconds until something is due without being heard of."""
        if self._restless:
            return AGAIN
        return LINGER if self._releasers else math.inf

    @property
    def _restless(self) -> bool:
        """Whether something waits for anything but an acknowledgement."""
        stuck = any(one.queue and not one.sent for one in self._releasers.values())
        return (stuck and not self._gathering) or self._spare is None or self._forker.unreaped

    def collect(self) -> None:
        """Hear acknowledgements so far, and follow up."""
        self._stuck.read(8)  # or None
        self._hear()
        now = time.monotonic()
        if self._gathering:
            self._gathering, self._sent = False, now
        for uid, releaser in list(self._releasers.items()):
            self._advance(uid, releaser)
            if not (releaser.queue or releaser.sent) and now - releaser.moved > LINGER:
                self._lose(releaser)
                del self._releasers[uid]
        self._forker.reap()
        if self._spare is None:
            self._spare = self._forker.made()
        self._watch_forker()

    def _watch_forker(self) -> None:
        sock = self._forker.sock
        if sock is not None and sock is not self._watched:
            self._epoll.register(sock, select.EPOLLIN)
            self._watched = sock

    def _hear(self) -> None:
        for fd, _ in self._epoll.poll(0):
            if fd not in self._by_socket:
                continue  # `_stuck` is for `tend` alone; or the forker has ended
            releaser = self._releasers[self._by_socket[fd]]
            done, alive = releaser.heard()
            for work, said in done:
                if work.kind in LIVE and said != LET_GO:  # a releaser of an earlier version
                    releaser.queue.appendleft(work)
                    alive = False
                    continue
                for drained in work.fds:
                    self.draining.discard(os.fstat(drained).st_ino)
                    os.close(drained)
                if work.done is not None:
                    work.done(said)
            if not alive:
                self._lose(releaser)
                self._wake()  # another one is to be asked

    def pass_on(self) -> Passed:
        """Send whatever can be sent, and give away the rest, before an exec: exec closes
        descriptors, and a last close could block. Nothing here is to be used afterwards."""
        self._hear()
        passed = Passed([], [], [], [])
        for uid, releaser in self._releasers.items():
            # Bundles wait for their turn: exec closes none of them for good.
            slots = [work for work in releaser.queue if work.kind == DRAIN]
            # Nobody waits any more for an answer; the copy of a bundle is not the last one.
            releaser.sent = deque(
                Work(CLOSE, ()) if work.done is not None else work for work in releaser.sent
            )
            releaser.queue = deque(work for work in releaser.queue if work.kind == CLOSE)
            self._advance(uid, releaser, at_once=1 << 30)
            if releaser.owed:  # no room for the word: the end of the socket says so as well
                self._lose(releaser)
            for work in (*slots, *releaser.queue):
                kept = passed.draining if work.kind == DRAIN else passed.closing
                kept.extend((uid, fd) for fd in work.fds)
            if releaser.sock is not None and releaser.sent:
                passed.releasers.append((uid, len(releaser.sent), releaser.sock.fileno()))
                passed.sent.extend((uid, fd) for work in releaser.sent for fd in work.fds)
        self._forker.pass_on()
        return passed

    def stop(self) -> socket.socket | None:
        """Send everything, before the end of the daemon. The caller keeps the returned socket until
        everything else is closed."""
        self._hear()
        for uid in list(self._after):
            self._send_after(uid)
        left: list[int] = []
        for uid, releaser in self._releasers.items():
            self._advance(uid, releaser, at_once=1 << 30)
            left += [fd for work in releaser.queue for fd in work.fds]
        if not left:
            return None
        keeper = inherited(left)
        if keeper is None:
            why = "no process can be had to close foreign files: the end may have to wait for them"
            log.event("not-released", level=log.ERROR, files=len(left), why=why)
        return keeper

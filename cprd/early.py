"""Reading a bundle while its saver still fills it.

A saver of many descriptors announces its bundle before it parks them; the successor that waits for
that name peeks them as they come, so that both are at work at the same time. Nothing follows from
it: what is read early counts only once cprd has answered the load with the same bundle, whole, and
is closed at once when its saver lets go of the bundle without that answer.
"""

from __future__ import annotations

import _thread
import os
import select
import time
from array import array

from cprd.bundle import layout
from cprd.errors import CprdError
from cprd.linux.pause import point
from cprd.linux.rights import close_all

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from cprd.bundle.layout import Header
    from cprd.state import State

SOON = 0.0005  # s that the next leaf is looked for before sleeping: it is being filled right now,
# and whoever is woken up by that may have to wait for the CPU of the one who fills it


class Early:
    """What is read of one bundle at a time. Owns all descriptors that it has, until finish()."""

    __slots__ = ("_answers", "_leaves", "_parts", "_state", "_waits", "bundle", "events", "header")

    def __init__(self) -> None:
        self.bundle = -1
        self.header: Header | None = None
        self.events: select.epoll | None = None  # readable when wait() has something to say
        self._answers = -1
        self._leaves: array[int] = array("i")
        self._parts: list[array[int]] = []  # what is in each leaf, as far as it was read
        self._state: State | None = None  # made of them, once all were read
        self._waits: list[int] = []  # leaves not read yet, by number; the next one last

    def begin(self, fd: int, answers: int) -> bool:
        """Follow the bundle `fd`, which this owns now; what it followed before is closed. `answers`
        (borrowed): the connection on which the load will be answered. Whether there is something to
        wait for, with wait()."""
        try:
            self.close()
        finally:
            self.bundle, self._answers = fd, answers
        try:
            self.header, self._leaves = layout.peek_tree(fd)
            self._parts = [array("i") for _ in self._leaves]
            self._waits = [0, *range(len(self._leaves) - 1, 0, -1)]  # the first one is filled last
            point("load:early")
            self._read_on()
            self.events = select.epoll(3)
            self.events.register(answers, select.EPOLLIN)
            self.events.register(fd, 0)  # its saver let go of it: EPOLLHUP
            if self._waits:
                self._await_next()
        except (CprdError, OSError):
            self.close()
            return False
        return True

    def wait(self, seconds: float) -> bool:
        """Read on when something came, within so many seconds. False when there is nothing more to
        wait for: the answer has come, or the time is over, or nothing will come of this bundle."""
        assert self.events is not None
        found = {fd for fd, _ in self.events.poll(seconds)}
        if self.bundle in found:
            # Its saver closes it when it has its own answer, which comes after the load's. That one
            # may have come since it was looked for.
            if self._answers not in {fd for fd, _ in self.events.poll(0)}:
                self.close()
            return False
        if not found or self._answers in found:
            return False
        try:
            self._read_on()
            if self._waits:
                if self._leaves[self._waits[-1]] in found:  # readable, and nothing in it: its
                    self.close()  # filling end was closed, and would say so for ever
                    return False
                self._await_next()
        except (CprdError, OSError):
            self.close()
            return False
        return True

    def _await_next(self) -> None:
        assert self.events is not None
        leaf = self._leaves[self._waits[-1]]
        self.events.register(leaf, select.EPOLLIN | select.EPOLLONESHOT)

    def _read_on(self) -> None:
        """Read the leaves that are filled, or will be soon. Raises Damaged, LimitExceeded,
        OSError."""
        end = 0.0
        while self._waits:
            number = self._waits[-1]
            leaf = self._leaves[number]
            if not layout.queued(leaf):
                now = time.monotonic()
                end = end or now + SOON
                if now >= end:
                    return
                os.sched_yield()
                continue
            self._read(number)
            end = 0.0
        if self._state is None:
            self._make_state()
            point("load:early-read")

    def _read(self, number: int) -> None:
        layout.peek_leaf(self._leaves[number], number, self._parts[number])
        self._waits.pop()

    def _make_state(self) -> State:
        assert self.header is not None
        parts, self._parts = self._parts, []
        carried = array("i")
        for part in parts:
            carried.extend(part)
        try:
            layout.check_total(self.header, len(carried))
            self._state = layout.state_of(self.header, carried)
        except BaseException:
            close_all(carried)
            raise
        leaves, self._leaves = self._leaves, array("i")
        close_all(leaves)  # room for the answer
        return self._state

    def finish(self, fd: int, header: Header) -> State | None:
        """Where `fd` (borrowed) is the bundle that was read early: the state, which the caller owns
        now, all of it. Raises Damaged, LimitExceeded."""
        if self.header is None or header.data != self.header.data or not _same(fd, self.bundle):
            return None
        while self._waits:
            self._read(self._waits[-1])
        state = self._state or self._make_state()
        self._state = None
        return state

    def close(self) -> None:
        """Let go of everything. May be used again."""
        fds = list(self._leaves)
        foreign = any(self._parts)
        for part in self._parts:
            fds.extend(part)
        self._leaves, self._parts, self._waits = array("i"), [], []
        fd, self.bundle = self.bundle, -1
        events, self.events = self.events, None
        self.header = None
        state, self._state = self._state, None
        if fd >= 0:
            fds.append(fd)
        if events is not None:
            events.close()
        if state is None and not foreign:
            close_all(fds)
            return
        try:  # these may be the last copies, and block when they are closed
            _thread.start_new_thread(_let_go, (state, fds))
        except RuntimeError:
            _let_go(state, fds)


def _let_go(state: State | None, fds: list[int]) -> None:
    if state is not None:
        state.close()
    close_all(fds)


def _same(one: int, other: int) -> bool:
    return os.path.samestat(os.fstat(one), os.fstat(other))

"""Asking cprd to keep a state while its guest stands still: for a second, not longer.

cprd may be dead, or mute. The guest must not wait for that: it is let go on first, and what became
of the request is found out afterwards.
"""

from __future__ import annotations

import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cprd.client.verbs import Abandoned
from cprd.errors import Busy, CprdError, Fenced, NotHeld, Unavailable
from cprd.qemu.failure import Failed
from cprd.qemu.settle import look

if TYPE_CHECKING:
    from cprd import Daemon, Prepared
    from cprd.qemu.process import Process

STANDING = 1.0  # s that a guest may stand still for want of an answer
PATIENCE = 2.0  # s for cprd to see that the connection of an unanswered request has ended


class Away(Failed):
    """Taken back because cprd was away for a moment; it answers again, and has nothing of it. To be
    tried again."""


class Preparing:
    """One request to prepare (`request`, to be made once) the state of `process` under `name`."""

    def __init__(
        self, daemon: Daemon, name: str, process: Process, request: Callable[[], Prepared]
    ) -> None:
        self._daemon = daemon
        self._name = name
        self._process = process
        self._request = request
        self.prepared: Prepared | None = None
        self.unanswered = False  # nobody knows what became of it

    def answer(self) -> Prepared:
        """Raises Unavailable when there is none within a second; what cprd raised."""
        try:
            with _at_most(STANDING):
                self.prepared = self._request()
        except _Over:
            self.unanswered = True
            raise Unavailable(f"cprd did not answer within {STANDING:g} s") from None
        except Unavailable:
            self.unanswered = True
            raise
        return self.prepared

    def check(self) -> None:
        """Whether the cprd that has answered is still there. Does not wait. Raises Unavailable."""
        fd = self._daemon.fileno()
        line = select.poll()
        if fd >= 0:
            line.register(fd, select.POLLIN)
        if fd < 0 or line.poll(0):
            self.unanswered = True
            raise Unavailable("cprd ended meanwhile, and with it perhaps what it had prepared")

    def again(self) -> Prepared:
        """For when cprd has answered that it has nothing of it any more. Raises what cprd does."""
        self.prepared = self._request()
        return self.prepared

    def late(self) -> Prepared | None:
        """What was prepared, or is now: for when no guest waits any more. None when it cannot be
        had."""
        if self.prepared is None and self.unanswered:
            try:
                self.prepared = self._request()
            except CprdError:
                return None
        return self.prepared

    def undo(self) -> str:
        """The guest goes on in its QEMU: see to it that cprd has nothing of it. "", or in words why
        it may have."""
        try:
            if self.prepared is not None:
                self.prepared.abort()
            elif self.unanswered:
                self._drop()
        except (Fenced, NotHeld):
            pass
        except CprdError as error:
            return (
                f"; cprd was not told ({error}), and may hold what it was sent, prepared or in"
                " doubt: nobody is served that, and the next save or start asks this QEMU and ends"
                " it"
            )
        return ""

    def _drop(self) -> None:
        """End it without its ticket, which was in the answer."""
        until = time.monotonic() + PATIENCE
        while True:
            row, origin = look(self._daemon, self._name)
            if row is None or origin is None or origin.old != self._process.record():
                return
            try:
                self._daemon.drop(self._name, force=True)
                return
            except Busy:  # prepared still
                if time.monotonic() > until:
                    raise
            time.sleep(0.05)


class _Over(Abandoned):
    """The time is."""


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Break off a blocking call. In the main thread; it costs next to nothing when all goes well,
    where a thread or a loop of its own would cost the guest as long as the request itself."""
    armed = True

    def over(*_: object) -> None:
        if armed:
            raise _Over

    before = signal.signal(signal.SIGALRM, over)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)

"""Loads and waits, waiting for a name: first come, first served.

The first waiter is served with the step that makes the hold free, each further waiter in a later
round of the event loop: one of each uid a round.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

import trio

from cprd.daemon.connection import Connection
from cprd.daemon.turns import Pace
from cprd.errors import Busy, CprdError, Damaged, LimitExceeded, NotHeld, ProtocolError
from cprd.protocol.names import Key

T = TypeVar("T")


class Waiter(Generic[T]):
    """A waiting request. `take` returns the result, or raises NotHeld or Busy to wait on.

    `tell` answers at once, where the client reads, and returns whether the answer was sent."""

    __slots__ = ("done", "error", "result", "scope", "take", "tell", "told")

    def __init__(self, take: Callable[[], T], tell: Callable[[T], bool] | None = None) -> None:
        self.take = take
        self.tell = tell
        self.done = self.told = False
        self.scope = trio.CancelScope()  # of the wait; cancelled when done
        self.result: T | None = None
        self.error: CprdError | None = None

    def try_once(self) -> None:
        """Take, and tell. Leaves `done` False when the wait goes on."""
        try:
            self.result = self.take()
        except (NotHeld, Busy) as error:
            if not isinstance(error, Damaged):
                return
            self.error = error  # no wait makes the bundle whole again
        except CprdError as error:
            self.error = error
        except OSError as error:  # concerns this waiter alone, not the step that led here
            self.error = no_descriptor(error)
        else:
            with contextlib.suppress(CprdError, OSError):  # the waiter's task meets it again
                self.told = self.tell is not None and self.tell(self.result)
        self.done = True
        self.scope.cancel()


class Waiters:
    def __init__(self) -> None:
        self._queues: dict[Key, deque[Waiter[object]]] = {}
        self._further: dict[Key, None] = {}  # names whose next waiter may be served, in order
        self._wanted = trio.Event()

    @property
    def waiting(self) -> bool:
        """Whether anybody waits."""
        return bool(self._queues)

    async def wait(
        self, connection: Connection, key: Key, waiter: Waiter[T], seconds: float
    ) -> T | None:
        """The waiter's result, or None when the time is over.

        Raises the error of `take`; BrokenPipeError when the client has gone; ProtocolError when the
        client sends a request meanwhile."""
        queue = self._queues.setdefault(key, deque())
        queue.append(waiter)  # type: ignore[arg-type]
        gone = ""
        try:
            await connection.apart()
            waiter.scope.deadline = trio.current_time() + seconds
            with waiter.scope:
                self.serve(key)
                if not waiter.done:
                    gone = await connection.hung_up()
        finally:
            if waiter in queue:
                queue.remove(waiter)  # type: ignore[arg-type]
            if not queue and self._queues.get(key) is queue:
                del self._queues[key]
        if gone == "gone" and not waiter.done:
            raise BrokenPipeError("the client has gone")
        if gone == "early":
            raise ProtocolError("a request came before the answer to the one before")
        if waiter.error is not None:
            raise waiter.error
        return waiter.result

    def serve(self, key: Key) -> None:
        """Serve the first waiter of a name now, and the others soon, in the order of arrival."""
        queue = self._queues.get(key)
        if not queue:
            return
        waiter = queue.popleft()  # taking can serve this queue again, without this waiter
        waiter.try_once()
        if not waiter.done:
            queue.appendleft(waiter)
        elif queue:
            self._further[key] = None
            self._wanted.set()

    async def serve_further(self) -> None:
        """Serve the waiters behind the first. Until cancelled."""
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            pace = Pace()
            while self._further:
                first_of: dict[int, Key] = {}  # by owner of the name
                for key in self._further:
                    first_of.setdefault(key[0], key)
                for key in first_of.values():
                    self._further.pop(key, None)
                    self.serve(key)
                    await pace.pause()
                await trio.lowlevel.checkpoint()


def no_descriptor(error: OSError) -> LimitExceeded:
    return LimitExceeded(
        f"cprd has no descriptor left ({error.strerror}): raise LimitNOFILE= of cprd.service, or"
        " drop holds"
    )

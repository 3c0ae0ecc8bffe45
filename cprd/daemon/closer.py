"""Letting go of foreign files, away from the event loop.

The last close of somebody else's file can block for as long as its owner likes (SO_LINGER, FUSE),
and so can anything that drops a queue with such a file in it. Each uid has one worker thread of its
own while there is something to close, so that one uid's blocking files hold up nobody else's.
"""

from __future__ import annotations

import _thread
import threading
from collections import deque
from collections.abc import Callable, Iterable

from cprd.linux.rights import close_all

LINGER = 1.0  # s that an idle worker waits for more before it ends


class _Close:
    """Descriptors to close; owned until it is called."""

    __slots__ = ("fds",)

    def __init__(self, fds: list[int]) -> None:
        self.fds = fds

    def __call__(self) -> None:
        close_all(self.fds)


class Closer:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._work: dict[int, deque[Callable[[], object]]] = {}
        self._more: dict[int, threading.Condition] = {}
        self._busy: set[int] = set()  # whose worker is at the first of its queue
        self._stopped = False

    def close(self, uid: int, fds: Iterable[int]) -> None:
        """Close descriptors, which this owns now, in `uid`'s worker."""
        self.run(uid, _Close(list(fds)))

    def stop(self) -> list[tuple[int, int]]:
        """Begin nothing more. Returns what is left to close, (uid, fd), now the caller's: before an
        exec, which would close it itself, and wait where that blocks."""
        with self._lock:
            self._stopped = True
            left = []
            for uid, queue in self._work.items():
                for release in list(queue)[int(uid in self._busy) :]:
                    if isinstance(release, _Close):
                        left += [(uid, fd) for fd in release.fds]
            return left

    def run(self, uid: int, release: Callable[[], object]) -> None:
        """Call `release` soon, in `uid`'s worker. Never blocks; errors of `release` are dropped."""
        with self._lock:
            queue = self._work.get(uid)
            if queue is not None:
                queue.append(release)
                self._more[uid].notify()
                return
            self._work[uid] = deque([release])
            self._more[uid] = threading.Condition(self._lock)
        try:
            _thread.start_new_thread(self._worker, (uid,))
        except RuntimeError:  # no thread to be had: better late than never
            with self._lock:
                queue = self._work.pop(uid)
                del self._more[uid]
            for late in queue:
                _quietly(late)

    def pending(self, uid: int) -> int:
        """How many releases of this uid wait or are blocked."""
        with self._lock:
            return len(self._work.get(uid, ()))

    def blocked(self) -> dict[int, int]:
        with self._lock:
            return {uid: len(queue) for uid, queue in self._work.items() if queue}

    def drained(self, seconds: float) -> bool:
        """Wait until nothing is left to release, at most so long (for the end of the daemon)."""
        import time

        end = time.monotonic() + seconds
        while self.blocked():
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
        return True

    def _worker(self, uid: int) -> None:
        queue = self._work[uid]
        more = self._more[uid]
        while True:
            with self._lock:
                while not queue or self._stopped:
                    if not more.wait(LINGER) and not queue:
                        del self._work[uid], self._more[uid]
                        return
                release = queue[0]
                self._busy.add(uid)
            _quietly(release)
            del release
            with self._lock:
                queue.popleft()
                self._busy.discard(uid)


def _quietly(release: Callable[[], object]) -> None:
    try:
        release()
    except Exception:
        pass  # what was to be closed is closed, or was not ours

"""Letting go of foreign files, away from the event loop.

The last close of a foreign file can block for as long as the owner likes (SO_LINGER, FUSE), and so
can dropping a queue with such a file. Each uid has one worker thread while something is to be
closed: blocking files of one uid hold up no other uid.
"""

from __future__ import annotations

import _thread
import threading
from collections import deque
from collections.abc import Callable, Iterable

from cprd.linux.rights import close_all

LINGER = 1.0  # s that an idle worker waits for more before it ends


class _Close:
    """Descriptors to close; owned until the call."""

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
        """Close descriptors, owned from now on, in the worker of `uid`."""
        self.run(uid, _Close(list(fds)))

    def stop(self) -> list[tuple[int, int]]:
        """Begin nothing more, before an exec, which blocks where a close does.

        Returns the descriptors left, (uid, fd), which the caller owns now."""
        with self._lock:
            self._stopped = True
            left = []
            for uid, queue in self._work.items():
                for release in list(queue)[int(uid in self._busy) :]:
                    if isinstance(release, _Close):
                        left += [(uid, fd) for fd in release.fds]
            return left

    def run(self, uid: int, release: Callable[[], object]) -> None:
        """Call `release` soon, in the worker of `uid`. Never blocks; drops errors of `release`."""
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
        except RuntimeError:  # no thread to be had: closed here, late
            with self._lock:
                queue = self._work.pop(uid)
                del self._more[uid]
            for late in queue:
                _quietly(late)

    def pending(self, uid: int) -> int:
        """The number of releases of this uid that wait or block."""
        with self._lock:
            return len(self._work.get(uid, ()))

    def blocked(self) -> dict[int, int]:
        with self._lock:
            return {uid: len(queue) for uid, queue in self._work.items() if queue}

    def drained(self, seconds: float) -> bool:
        """Block until nothing is left to release, at most so long. Returns whether nothing is."""
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
        pass  # closed all the same, or never ours

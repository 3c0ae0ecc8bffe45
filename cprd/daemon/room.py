"""Room in flight: what cprd may park, and whose share that is.

The kernel counts the descriptors that a uid has in flight, and beyond RLIMIT_NOFILE of cprd takes
no further descriptor from cprd: not even an answer to a load. So new records are refused while
enough is left for answers, and for writing the shelf anew.
"""

from __future__ import annotations

from collections import Counter

from cprd.daemon.storage.shelves import Keeper
from cprd.errors import LimitExceeded

ON_A_SHELF = 1 + 4  # descriptors at most: the bundle, pidfds
A_RECORD = 2 * ON_A_SHELF  # now, and while the shelf is rewritten
FOR_ROOT = 0.05  # of the room


class Room:
    """Counts from above between two looks at the holds: a look takes time for each hold."""

    def __init__(self, keeper: Keeper, limit: int, answers: int) -> None:
        """`answers` are the loads that may be on their way to clients at once."""
        self.limit = limit
        self._keeper = keeper
        self._answers = answers
        self._on_next_shelf = 0
        self._total = limit  # so that the first request looks
        self._of: Counter[int] = Counter()

    def check(self, uid: int) -> None:
        """Raises LimitExceeded where a new record of `uid` has no room. Otherwise counts it."""
        if self._why_not(uid):
            self._look()
            if self._short(uid) and self._keeper.shelf.in_flight > 2 * self._on_next_shelf:
                self._keeper.compact()  # without ended holds
                self._look()
            if why := self._why_not(uid):
                raise LimitExceeded(f"{why}: raise LimitNOFILE= of cprd.service, or drop holds")
        self._total += A_RECORD
        self._of[uid] += A_RECORD
        self._on_next_shelf += ON_A_SHELF

    def _look(self) -> None:
        self._total, self._of = self._keeper.in_flight()
        self._on_next_shelf = self._keeper.on_next_shelf

    def _left(self, uid: int) -> int:
        """What nothing but answers, the next shelf and root may use is not left."""
        left = self.limit - min(self._answers, self.limit // 4) - self._on_next_shelf - self._total
        return left if uid == 0 else left - int(FOR_ROOT * self.limit)

    def _short(self, uid: int) -> bool:
        return self._left(uid) < A_RECORD

    def _why_not(self, uid: int) -> str:
        if self._short(uid):
            return (
                f"cprd has {self._total} descriptors in flight, too many beside a limit of"
                f" {self.limit} with which all that is held can be loaded"
            )
        if uid and self._of[uid] + A_RECORD > self.limit // 2:
            return (
                f"uid {uid} has {self._of[uid]} descriptors in flight in cprd, and half of"
                f" {self.limit} is all that a uid may have"
            )
        return ""

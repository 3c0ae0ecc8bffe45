"""A demonstration as numbers. No I/O, no clock: times are seconds since the beginning."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import pairwise
from math import inf
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence


class Restart(NamedTuple):
    """A restart: SIGTERM sent (`killed`: SIGKILL), the old server gone, the new server serving.
    `crashed`: another successor was killed in between, right after the claim. `with_cprd`: seconds
    for the take-over, descriptors and all; the rest is the start of Python and trio."""

    asked: float
    gone: float
    ready: float
    crashed: bool
    with_cprd: float = 0.0
    killed: bool = False


class Report(NamedTuple):
    """All numbers of the picture and the verdict."""

    connections: int
    seconds: float
    answers: Sequence[float]  # when each answer came, ascending
    restarts: Sequence[Restart]
    lost: int  # requests without an answer
    wrong: int  # answers with a wrong count or sum, or to nothing
    dropped: int  # connections reset, closed or refused
    visits: int  # short connections made meanwhile, on top
    slowest: float  # the longest that one client waited for one answer

    @property
    def flawless(self) -> bool:
        """Whether nobody noticed anything but a pause."""
        return bool(self.answers) and not (self.lost or self.wrong or self.dropped)

    def blackouts(self) -> list[float]:
        """For each restart the longest time in which no client got any answer: from the last answer
        before the signal to the first answer after the new server served. Without an answer between
        two restarts, both have the same silence."""
        return [
            longest_silence(self.answers, restart.asked, restart.ready, self.seconds)
            for restart in self.restarts
        ]


def longest_silence(answers: Sequence[float], begin: float, end: float, over: float = inf) -> float:
    """The longest gap between neighbouring answers: the last answer until `begin`, all answers in
    between, the first answer from `end` on. Without a last or a first, 0 and `over` count."""
    first, last = bisect_right(answers, begin), bisect_left(answers, end)
    before = answers[first - 1] if first else min(0.0, begin)
    after = answers[last] if last < len(answers) else max(over, end)
    return max(b - a for a, b in pairwise([before, *answers[first:last], after]))


def rates(answers: Sequence[float], seconds: float, buckets: int) -> list[float]:
    """Answers per second in each of `buckets` equal parts of 0..seconds."""
    width = seconds / buckets
    counts = [0] * buckets
    for time in answers:
        if 0 <= time < seconds:
            counts[min(buckets - 1, int(time / width))] += 1
    return [count / width for count in counts]


def ceiling(values: Sequence[float]) -> float:
    """The end of the axis: twice the usual rate, at most the highest rate. (The burst of answers
    after a restart would flatten everything else.)"""
    usual = sorted(value for value in values if value > 0) or [1.0]
    return round_up(min(usual[-1], 2 * usual[len(usual) // 2]))


def round_up(value: float) -> float:
    """The next round number, for the end of an axis."""
    step = 1.0
    while True:
        for factor in (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0):
            if value <= step * factor:
                return step * factor
        step *= 10

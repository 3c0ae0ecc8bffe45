"""What happened in a demonstration, as numbers. No I/O, no clock: times are seconds since its
beginning."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

BEFORE = 0.25  # seconds around a restart in which its blackout is looked for
AFTER = 1.0


class Restart(NamedTuple):
    """One restart: SIGTERM sent, the old server gone, the new one serving. `crashed`: one more
    successor was killed between, right after its claim. `with_cprd`: seconds of it for save and
    load, descriptors and all; the rest is the server's end and the start of Python and trio."""

    asked: float
    gone: float
    ready: float
    crashed: bool
    with_cprd: float = 0.0


class Report(NamedTuple):
    """Everything the picture and the verdict are made of."""

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
        """For each restart the longest time in which no client got any answer."""
        spans = []
        for i, restart in enumerate(self.restarts):
            end = restart.ready + AFTER
            if i + 1 < len(self.restarts):
                end = min(end, self.restarts[i + 1].asked)
            spans.append(longest_silence(self.answers, restart.asked - BEFORE, end))
        return spans


def longest_silence(answers: Sequence[float], begin: float, end: float) -> float:
    """The longest gap between neighbouring answers of begin..end, both ends counting as answers
    where nothing came before or after them."""
    inside = answers[bisect_left(answers, begin) : bisect_right(answers, end)]
    points = [begin, *inside, end] if len(inside) < 2 else inside
    return max(b - a for a, b in pairwise(points))


def rates(answers: Sequence[float], seconds: float, buckets: int) -> list[float]:
    """Answers per second in each of `buckets` equal parts of 0..seconds."""
    width = seconds / buckets
    counts = [0] * buckets
    for time in answers:
        if 0 <= time < seconds:
            counts[min(buckets - 1, int(time / width))] += 1
    return [count / width for count in counts]


def ceiling(values: Sequence[float]) -> float:
    """The end of the axis: twice the usual rate, or the highest one if that is lower. What a
    restart held up is answered in a burst afterwards, and would flatten everything else."""
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

"""How keys are spread over queues. The numbers are measured (benchmarks/live.py); tests use small
ones, so that a few changes reach every step."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    keys: int = 16
    """Of one segment with descriptors."""
    records: int = 9
    """Of such a segment, before these become one: half of the keys come one by one after that."""
    spread: int = 16
    """Segments with descriptors, before any of them gets a second key."""
    root_records: int = 100
    """Of the root, before these become as few as possible; 278 fit."""
    part: int = 253
    """Segments that one record of the root names, at most 253."""


SHAPE = Shape()

"""Spans of time on the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

DAY = 24 * 3600  # cprd.protocol.messages.MAX_WAIT, MAX_LEASE
YEARS = 10 * 365 * DAY  # cprd.protocol.messages.MAX_TTL
SHORTEST = 0.1  # cprd.protocol.messages.MIN_LEASE


def seconds(most: int, least: float = 0) -> Callable[[str], float]:
    """For argparse: a number of seconds, `least` to `most`."""

    def parse(text: str) -> float:
        import argparse

        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not least <= value <= most:  # nan is not, either
            wants = f"{least:g} to {most}"
            raise argparse.ArgumentTypeError(f"{text} is not a number of seconds, {wants}")
        return value

    return parse

"""Changed copies of recorded bytes, the same ones in each run."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

TELLING = (0, 1, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xC0, 0xC4, 0xC7, 0xD4, 0xDC, 0xDD, 0xDF, 0xFF)
"""Numbers at a limit, and heads of msgpack."""


def mutated(seeds: Sequence[bytes], rng: random.Random) -> Iterator[bytes]:
    """For ever."""
    while True:
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(data) + 1)
            how = rng.randrange(6)
            if how == 0 and at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            elif how == 1 and at < len(data):
                data[at] = rng.choice(TELLING)
            elif how == 2:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
            elif how == 3:
                del data[at : at + rng.randrange(1, 9)]
            elif how == 4:
                data[at:at] = data[at : at + rng.randrange(1, 33)] * rng.randrange(1, 4)
            else:
                other = rng.choice(seeds)
                data[at:] = other[rng.randrange(len(other)) :]
        yield bytes(data[:70_000])

"""Every small change of a vector: each byte flipped, each end cut off, each field dropped, each
type changed. In the same order in each run; `some` takes an even share of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import msgpack

FLIPS = (0x01, 0x80, 0xFF)
OTHERS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, (1 << 64) - 1, 0.5, float("nan"), float("inf")),
    *("", "x", "x" * 5000, b"", b"x" * 16, [], [1] * 20, {}, {"a": {"b": 1}}),
    msgpack.ExtType(5, b"x"),
)

T = TypeVar("T")


def of_bytes(data: bytes) -> Iterator[tuple[str, bytes]]:
    """What was done, and the bytes."""
    for at in range(len(data)):
        for flip in FLIPS:
            yield f"byte {at} ^ {flip:02x}", data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :]
        yield f"cut at {at}", data[:at]
    yield "one byte more", data + b"\0"


def of_message(message: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Changes of a map, and of maps and arrays of maps in it, and of the bytes."""
    for what, changed in _of_map(message):
        yield what, msgpack.packb(changed, use_bin_type=True)
    yield from of_bytes(msgpack.packb(message, use_bin_type=True))


def _of_map(message: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for key, value in message.items():
        yield f"without {key}", {k: v for k, v in message.items() if k != key}
        for other in OTHERS:
            yield f"{key} is {other!r:.20}", {**message, key: other}
        if isinstance(value, dict):
            for what, changed in _of_map(value):
                yield f"{key}: {what}", {**message, key: changed}
        if isinstance(value, list) and value and isinstance(value[0], dict):
            for what, changed in _of_map(value[0]):
                yield f"{key}[0]: {what}", {**message, key: [changed, *value[1:]]}


def some(every: Iterable[T], share: int) -> Sequence[T]:
    """Of `share` neighbours the first; the place shifts, so that all kinds are among them."""
    return [each for number, each in enumerate(every) if (number + number // share) % share == 0]

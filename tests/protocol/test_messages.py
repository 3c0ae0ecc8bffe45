"""What a message may be made of: decoding costs about what the message weighs."""

from __future__ import annotations

import time

import msgpack
import pytest

from cprd.errors import ProtocolError
from cprd.protocol import messages
from tests.support.patience import patience

SIZE = messages.MAX_REQUEST
BOMBS = {
    "arrays that promise": b"\xdc\x3e\x80" * 1000 + b"\xc0" * (SIZE - 3000),
    "maps that promise": b"\xde\x1f\x40\xa1a" * 1000,
    "a long array": b"\xdc\x3f\xf0" + b"\xc0" * 0x3FF0,
    "deep arrays": b"\x91" * SIZE,
    "deep arrays as verb": b"\x81\xa4verb" + b"\x91" * 1000 + b"\xc0",
    "an extension": msgpack.packb({"verb": msgpack.ExtType(5, b"x")}),
    "an empty extension": b"\x81\xa4verb\xc7\x00\x05",
    "a timestamp": msgpack.packb({"verb": msgpack.Timestamp(1, 1)}),
    "a long string": msgpack.packb({"verb": "x" * 5000}),
    "long bytes": msgpack.packb({"verb": b"x" * 5000}),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_at_once(bomb: bytes) -> None:
    assert len(bomb) <= SIZE
    took = []
    for _ in range(5):
        begin = time.perf_counter()
        with pytest.raises(ProtocolError):
            messages.read_request(bomb)
        took.append(time.perf_counter() - begin)
    assert min(took) < patience(0.002)


@pytest.mark.parametrize("field", ["lease", "ttl"])
@pytest.mark.parametrize("value", [0, 0.09, -1, True, float("nan")])
def test_what_would_end_at_once_is_refused(field: str, value: float) -> None:
    check = messages.REQUESTS["load" if field == "lease" else "save"][field]
    with pytest.raises(ValueError, match=r"from 0\.1"):
        check(value)
    assert check(0.1) == 0.1

"""What a message may be made of: decoding costs about what the message weighs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgpack
import pytest

from cprd.errors import Busy, ProtocolError
from cprd.protocol import messages
from cprd.protocol.replies import digest
from tests.support.patience import in_time
from tests.support.wire import read_answer

SIZE = messages.MAX_REQUEST
BOMBS = {
    "arrays that promise": b"\xdc\x3e\x80" * 1000 + b"\xc0" * (SIZE - 3000),
    "arrays that promise all that a first message may have": (
        (b"\xdc" + messages.HELLO_ITEMS.to_bytes(2, "big")) * 1000
    ),
    "arrays that promise what an answer may have": b"\xdc\x10\x00" * 1000,
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


@pytest.mark.parametrize("read", [messages.read_first, messages.read_request])
@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_at_once(bomb: bytes, read: Callable[[bytes], messages.Message]) -> None:
    assert len(bomb) <= SIZE
    took = []
    for _ in range(5):
        begin = time.perf_counter()
        with pytest.raises(ProtocolError):
            read(bomb)
        took.append(time.perf_counter() - begin)
    assert in_time(min(took), 0.002)


@pytest.mark.parametrize("head", ["8{}", "de000{}", "df0000000{}"])
def test_a_key_twice_is_noise(head: str) -> None:
    pairs = [msgpack.packb(key) + msgpack.packb(value) for key, value in (("verb", "status"),) * 2]
    said = bytes.fromhex(head.format(1)) + pairs[0]
    assert messages.read_request(said)["verb"] == messages.read_first(said)["verb"] == "status"
    for read in (messages.read_request, messages.read_first):
        with pytest.raises(ProtocolError, match="a key twice") as refusal:
            read(bytes.fromhex(head.format(2)) + b"".join(pairs))
        assert not isinstance(refusal.value, messages.BadRequest)


@pytest.mark.parametrize("version", messages.SPOKEN)
def test_a_hello_may_say_more_than_another_request(version: int) -> None:
    more = {f"x{n}": None for n in range(2 * messages.HELLO_ITEMS - 3)}
    hello = {"verb": "hello", "version": version, "more": [0] * messages.HELLO_ITEMS, **more}
    assert messages.read_first(msgpack.packb(hello))["version"] == version
    with pytest.raises(ProtocolError, match="max_array_len"):
        messages.read_request(msgpack.packb({"verb": "status", "more": hello["more"]}))


@pytest.mark.parametrize("field", ["lease", "ttl"])
@pytest.mark.parametrize("value", [0, 0.09, -1, True, float("nan")])
def test_what_would_end_at_once_is_refused(field: str, value: float) -> None:
    check = messages.REQUESTS["load" if field == "lease" else "save"][field]
    with pytest.raises(ValueError, match=r"from 0\.1"):
        check(value)
    assert check(0.1) == 0.1


def test_what_is_left_out_or_nil_has_the_default() -> None:
    said = {"verb": "load", "name": "web", "nonce": b"n" * 16}
    full = {**said, "wait": 0, "lease": 30, "generation": None, "id": None}
    bare = messages.read_request(messages.encode(said))
    assert bare == messages.read_request(messages.encode(full))
    assert (bare["wait"], bare["lease"], bare["generation"], bare["id"]) == (0.0, 30.0, None, None)


def test_a_field_that_is_not_known_is_ignored_and_an_unknown_verb_is_named() -> None:
    said = {"verb": "show", "name": "web"}
    later: dict[Any, Any] = {**said, "colour": {"of": ["a", 1]}, b"raw": None}
    assert messages.read_request(messages.encode(later)) == {**said, "id": None}
    answer = {"ok": {"generation": 3, "colour": "red"}, "colour": 1}
    assert read_answer(messages.encode(answer))["generation"] == 3
    with pytest.raises(messages.BadRequest, match="unknown verb 'paint'; this cprd speaks version"):
        messages.read_request(messages.encode({"verb": "paint"}))


@pytest.mark.parametrize("verb", messages.REQUESTS)
def test_each_field_that_must_be_there_is_missed_by_name(verb: str) -> None:
    for name, field in messages.REQUESTS[verb].items():
        message = {"verb": verb, name: None}
        if field.required:
            with pytest.raises(messages.BadRequest, match=r"the field '.*' is missing"):
                messages.read_request(messages.encode(message))
        elif field.default is not None:
            assert field(field.default) == field.default


def test_defaults_said_or_left_out_are_the_same_request() -> None:
    said = {"verb": "drop", "name": "web", "nonce": b"n" * 16}
    of = [
        digest(messages.read_request(messages.encode({**said, **more})))
        for more in ({}, {"force": False}, {"force": None, "id": 7, "colour": 1}, {"force": True})
    ]
    assert of[0] == of[1] != of[3]


def test_none_is_not_said() -> None:
    assert messages.ok(more=None, holds=[]) == {"ok": {"holds": []}}
    assert messages.refusal(Busy("why")) == {"error": "Busy", "why": "why"}

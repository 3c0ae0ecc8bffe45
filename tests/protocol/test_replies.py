"""First answers: bounded in number and in time, and each for its own request only."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from cprd.errors import ProtocolError
from cprd.protocol.replies import KEPT_FOR, MOST, MOST_ARRIVED, Replies, Reply, digest, restored

UID = 1000
NOW = 1000.0


def nonce(number: int) -> bytes:
    return number.to_bytes(16, "big")


def reply(number: int, at: float = NOW, **more: Any) -> Reply:
    return Reply(UID, nonce(number), {}, at, **{"digest": b"d", **more})


def test_replies_are_bounded_in_number_and_time() -> None:
    replies = Replies()
    for number in range(2 * MOST):
        replies.remember(reply(number))
    assert [one.nonce for one in replies] == [nonce(n) for n in range(MOST, 2 * MOST)]
    replies.remember(Reply(2000, b"other", {}, NOW + 1, b"d"))
    late = NOW + KEPT_FOR + 0.5
    replies.forget_old(late)
    assert [one.uid for one in replies] == [2000]
    assert replies.recall(UID, nonce(MOST), b"d", "drop", "web") is None
    replies.forget_old(late + 1)
    assert not list(replies)


def test_a_reply_that_may_not_have_arrived_outlives_any_traffic() -> None:
    replies = Replies()
    replies.remember(reply(0))
    for number in range(1, 3 * MOST):
        replies.remember(reply(number))
        replies.arrived(UID, nonce(number))
    assert len(list(replies)) == 1 + MOST_ARRIVED
    assert replies.pending(NOW) == [reply(0)]
    assert replies.recall(UID, nonce(0), b"d", "drop", "web") == reply(0)


def test_a_reply_that_arrived_is_given_again_all_the_same() -> None:
    replies = Replies()
    replies.remember(reply(1))
    replies.arrived(UID, nonce(1))
    assert replies.recall(UID, nonce(1), b"d", "drop", "web") == reply(1)
    with pytest.raises(ProtocolError, match="getrandom"):
        replies.recall(UID, nonce(1), b"another", "drop", "web")


def test_the_digest_tells_every_field_but_what_is_left_of_a_wait() -> None:
    load = {"verb": "load", "name": "a", "wait": 9.0, "lease": 1.0, "nonce": b"n"}
    assert digest(load) == digest({**load, "wait": 2.0})
    others = [{**load, "name": "b"}, {**load, "verb": "drop"}, {**load, "lease": 2.0}]
    digests = {digest(load), digest(load, 7), digest(load, 8), *map(digest, others)}
    assert len(digests) == 6


def test_a_reply_without_a_digest_answers_for_what_is_known_of_its_request() -> None:
    """As an older cprd stored it: of the name where the slot told, else of that kind of verb."""
    replies = Replies()
    saved = restored({"uid": UID, "nonce": b"s", "answer": {"generation": 7}, "at": NOW}, "web")
    ended = restored({"uid": UID, "nonce": b"e", "answer": {}, "at": NOW})
    for one in (saved, ended):
        replies.remember(one)
    assert replies.recall(UID, b"s", b"any", "save", "web") == saved
    assert replies.recall(UID, b"e", b"any", "confirm", "any") == ended
    for verb, name in (("save", "other"), ("confirm", "web")):
        with pytest.raises(ProtocolError):
            replies.recall(UID, b"s", b"any", verb, name)
    with pytest.raises(ProtocolError):
        replies.recall(UID, b"e", b"any", "save", "web")


@pytest.mark.parametrize("digest", [b"", b"d" * 16])
def test_what_is_stored_is_read_back(digest: bytes) -> None:
    one = reply(1, digest=digest, generation=3)
    assert restored(msgpack.unpackb(one.packed)) == one

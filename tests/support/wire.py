"""Requests as bytes, for tests that speak the protocol by hand."""

from __future__ import annotations

from typing import Any

from cprd.protocol import messages


def request(verb: str, **fields: Any) -> bytes:
    return messages.encode({"verb": verb, **fields})


HELLO = request("hello", version=messages.VERSION, limits={"answer": messages.MAX_ANSWER})


def load(name: str, wait: float = 0.0) -> bytes:
    nonce = messages.nonce()
    return request("load", name=name, wait=wait, lease=600.0, generation=None, nonce=nonce)

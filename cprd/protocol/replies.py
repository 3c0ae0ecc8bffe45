"""First answers: a request that is repeated after a lost answer gets the answer of the first time.

A nonce stands for the request that came with the nonce: the digest tells whether a later request
is the same. Slots and shelves store replies, so that a restart forgets none that may be asked for.
No I/O, no clock.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cprd.errors import ProtocolError
from cprd.protocol.messages import ANSWERS, REQUESTS, encode

KEPT_FOR = 300.0  # s
MOST = 4096  # of one uid, that may not have arrived
MOST_ARRIVED = 256  # of one uid
IN_A_RECORD = 4  # stored with a hold: the replies to the last requests that changed the hold

# A repetition waits for what is left only, and asks for a queue as that connection needs.
_UNTOLD = ("wait", "timeout", "queue")
_NEVER = object()  # the default of a field that has none
_TOLD = {
    verb: tuple(
        (key, fields[key].default if key in fields and not fields[key].required else _NEVER)
        for key in sorted({*fields, "verb"}.difference(_UNTOLD))
    )
    for verb, fields in REQUESTS.items()
}


def digest(request: Mapping[str, Any], *identity: int) -> bytes:
    """16 bytes that tell one request from another: verb, fields that are no defaults, and
    `identity`, which cprd sees for itself (the pid of a claimant).

    The same whether a default was said or left out, and in a later version that has more fields."""
    get = request.get
    said = [
        (key, value) for key, default in _TOLD[request["verb"]] if (value := get(key)) != default
    ]
    return hashlib.blake2b(encode({"of": said, "seen": identity}), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Reply:
    """The first answer to a request."""

    uid: int
    nonce: bytes
    answer: dict[str, Any]
    at: float
    digest: bytes = b""  # b"": stored in a record of version 1
    generation: int = 0  # of the hold that the request ended; 0: none, or not known
    name: str = field(default="", compare=False)  # with an empty digest: of the hold, if known

    def about(self, generation: int) -> Reply:
        """The same reply, as one about an ended hold."""
        return Reply(self.uid, self.nonce, self.answer, self.at, self.digest, generation, self.name)

    def stored(self) -> dict[str, Any]:
        """A map for msgpack."""
        of = {"uid": self.uid, "nonce": self.nonce, "answer": self.answer, "at": self.at}
        if self.digest:
            of["digest"] = self.digest
        return {**of, "generation": self.generation} if self.generation else of

    def answers(self, digest: bytes, verb: str, name: str) -> bool:
        """Whether a request with this nonce is the request of the first time.

        Without a stored digest the name decides, as far as known, and whether the answer of such a
        verb has a generation."""
        if self.digest:
            return self.digest == digest
        numbered = "generation" in ANSWERS.get(verb, ())
        return self.name in ("", name) and numbered == ("generation" in self.answer)


def restored(stored: Mapping[str, Any], name: str = "") -> Reply:
    """The reply of a stored map. Raises KeyError, TypeError for something else."""
    uid, nonce, answer, at = (stored[key] for key in ("uid", "nonce", "answer", "at"))
    generation, digest = stored.get("generation", 0), stored.get("digest", b"")
    return Reply(uid, nonce, answer, float(at), digest, generation, name)


_ByUid = dict[int, OrderedDict[bytes, Reply]]


class Replies:
    """All that may be asked for again, by uid and nonce, older first."""

    def __init__(self) -> None:
        self._pending: _ByUid = {}  # may not have arrived
        self._arrived: _ByUid = {}

    def recall(self, uid: int, nonce: bytes, digest: bytes, verb: str, name: str) -> Reply | None:
        """The reply to this very request; None when the nonce is new. Raises ProtocolError when
        the nonce came with another request."""
        reply = None
        for kind in (self._pending, self._arrived):
            if reply is None and uid in kind:
                reply = kind[uid].get(nonce)
        if reply is not None and not reply.answers(digest, verb, name):
            raise ProtocolError(
                f"{verb}: this nonce came with another request before; a nonce is {len(nonce)} new"
                " random bytes (getrandom) for each request. Nothing was changed"
            )
        return reply

    def remember(self, reply: Reply) -> None:
        arrived = self._arrived.get(reply.uid)
        if arrived is not None:
            arrived.pop(reply.nonce, None)
        self._keep(self._pending, MOST, reply)

    def arrived(self, uid: int, nonce: bytes) -> None:
        """The client has read the answer, and will hardly repeat the request."""
        pending = self._pending.get(uid)
        reply = None if pending is None else pending.pop(nonce, None)
        if reply is not None:
            self._keep(self._arrived, MOST_ARRIVED, reply)

    def _keep(self, kind: _ByUid, most: int, reply: Reply) -> None:
        of = kind.get(reply.uid)
        if of is None:
            of = kind[reply.uid] = OrderedDict()
        of[reply.nonce] = reply
        if len(of) > most:
            of.popitem(last=False)

    def forget_old(self, now: float) -> None:
        for kind in (self._pending, self._arrived):
            for uid in tuple(kind):
                self._prune(kind, uid, now)

    def pending(self, now: float) -> list[Reply]:
        """Replies that may not have arrived, older first."""
        self.forget_old(now)
        every = [reply for of in self._pending.values() for reply in of.values()]
        every.sort(key=lambda reply: reply.at)
        return every

    def __iter__(self) -> Iterator[Reply]:
        for kind in (self._pending, self._arrived):
            for of in kind.values():
                yield from of.values()

    def _prune(self, kind: _ByUid, uid: int, now: float) -> None:
        replies = kind[uid]
        while replies:
            oldest = next(iter(replies))
            if now - replies[oldest].at <= KEPT_FOR:
                return
            del replies[oldest]
        del kind[uid]


def newest(replies: Iterable[Reply]) -> int:
    """The highest generation that a reply names."""
    return max((reply.generation for reply in replies), default=0)

"""First answers: a request that is repeated after a lost answer gets the answer of the first time.

A nonce stands for the request that came with the nonce: the digest tells whether a later request
is the same. The journal stores replies, so that a restart forgets none that may be asked for.
No I/O, no clock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, TypeVar

import msgpack

from cprd.errors import ProtocolError
from cprd.protocol.messages import ANSWERS, REQUESTS, encode

_packer = msgpack.Packer(use_bin_type=True)
T = TypeVar("T")

KEPT_FOR = 300.0  # s
MOST = 4096  # of one uid, that may not have arrived
MOST_ARRIVED = 256  # of one uid

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


class Reply:
    """The first answer to a request. Packed once: each record of the hold repeats the reply."""

    __slots__ = ("answer", "at", "digest", "generation", "name", "nonce", "packed", "uid")

    def __init__(
        self,
        uid: int,
        nonce: bytes,
        answer: dict[str, Any],
        at: float,
        digest: bytes = b"",
        generation: int = 0,
        name: str = "",
    ) -> None:
        """`digest`: empty in a record of version 1. `generation`: of the hold that the request
        ended; 0: none, or not known. `name`: of the hold, if known, beside an empty digest."""
        self.uid = uid
        self.nonce = nonce
        self.answer = answer
        self.at = at
        self.digest = digest
        self.generation = generation
        self.name = name
        of = {"uid": uid, "nonce": nonce, "answer": answer, "at": at}
        if digest:
            of["digest"] = digest
        if generation:
            of["generation"] = generation
        self.packed: bytes = _packer.pack(of)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reply) and self.packed == other.packed

    __hash__ = None  # type: ignore[assignment]

    def about(self, generation: int) -> Reply:
        """The same reply, as one about an ended hold."""
        return Reply(self.uid, self.nonce, self.answer, self.at, self.digest, generation, self.name)

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


def _unpacked(packed: bytes) -> Reply:
    return restored(msgpack.unpackb(packed, raw=False))


def array(replies: Sequence[Reply]) -> bytes:
    """A msgpack array of replies, as stored."""
    header: bytes = _packer.pack_array_header(len(replies))
    return header + b"".join([reply.packed for reply in replies])


class Replies:
    """All that may be asked for again, by uid and nonce, older first."""

    def __init__(self) -> None:
        self._pending: dict[int, dict[bytes, Reply]] = {}  # may not have arrived
        self._arrived: dict[int, dict[bytes, bytes]] = {}  # packed: hardly asked for again

    def recall(self, uid: int, nonce: bytes, digest: bytes, verb: str, name: str) -> Reply | None:
        """The reply to this very request; None when the nonce is new. Raises ProtocolError when
        the nonce came with another request."""
        pending, arrived = self._pending.get(uid), self._arrived.get(uid)
        reply = None if pending is None else pending.get(nonce)
        if reply is None and arrived is not None and nonce in arrived:
            reply = _unpacked(arrived[nonce])
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
        _keep(self._pending.setdefault(reply.uid, {}), MOST, reply.nonce, reply)

    def arrived(self, uid: int, nonce: bytes) -> None:
        """The client has read the answer, and will hardly repeat the request."""
        pending = self._pending.get(uid, {})
        reply = pending.get(nonce)
        if reply is not None and reply.digest:  # without: packed, the name would be lost
            del pending[nonce]
            _keep(self._arrived.setdefault(uid, {}), MOST_ARRIVED, nonce, reply.packed)

    def forget_old(self, now: float) -> None:
        _forget(self._pending, lambda reply: now - reply.at > KEPT_FOR)
        _forget(self._arrived, lambda packed: now - _unpacked(packed).at > KEPT_FOR)

    def pending(self, now: float) -> list[Reply]:
        """Replies that may not have arrived, older first."""
        self.forget_old(now)
        every = [reply for of in self._pending.values() for reply in of.values()]
        every.sort(key=lambda reply: reply.at)
        return every

    def __iter__(self) -> Iterator[Reply]:
        for pending in self._pending.values():
            yield from pending.values()
        for arrived in self._arrived.values():
            yield from map(_unpacked, arrived.values())


def _forget(kinds: dict[int, dict[bytes, T]], is_old: Callable[[T], bool]) -> None:
    """Forget the old ones, which came first."""
    for uid, kept in tuple(kinds.items()):
        for nonce, _ in tuple(takewhile(lambda item: is_old(item[1]), kept.items())):
            del kept[nonce]
        if not kept:
            del kinds[uid]


def _keep(kept: dict[bytes, Any], most: int, nonce: bytes, reply: object) -> None:
    """Keep what came last, and `most` at most."""
    kept[nonce] = reply
    if len(kept) > most:
        del kept[next(iter(kept))]


def newest(replies: Iterable[Reply]) -> int:
    """The highest generation that a reply names."""
    return max((reply.generation for reply in replies), default=0)

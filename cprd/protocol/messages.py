"""The messages between cprd and its clients: one msgpack map in one SEQPACKET message. No I/O.

The first message of each side states its version and limits. Every request names a `verb`; those
that change something carry a `nonce`, so that the same request, repeated after a lost answer, gets
its first answer. An answer is {"ok": {...}} or {"error": CODE, "why": TEXT}.
docs/protocol.md shows all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping

import msgpack

from cprd.errors import CODES, Busy, CprdError, InvalidInput, ProtocolError

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from typing import Any, TypeAlias

    Message: TypeAlias = dict[str, Any]

VERSION = 1
MAX_REQUEST = 16 * 1024
MAX_ANSWER = 64 * 1024
PAGE = 32 * 1024  # a list comes in pages of about so many bytes
NONCE = 16
MAX_WAIT = 24 * 3600.0
MAX_LEASE = 24 * 3600.0
MAX_TTL = 10 * 365 * 24 * 3600.0
MAX_REASON = 1024

FIRST_BYTE = 5.0  # s from accept to hello
IDLE = 300.0  # s without a request, for a connection with no claim, prepared save or wait
MUTE = 20.0  # s that a client waits for an answer before it calls the daemon mute


class BadRequest(ProtocolError):
    """A message that can be read, and asks for what makes no sense: the next one may be good."""


# What a field may be: the function returns the value as it is used, or raises ValueError with what
# is wanted. bool is an int in Python, and never meant as one here.


def _text(limit: int) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if not isinstance(value, str) or len(value.encode("utf-8", "replace")) > limit:
            raise ValueError(f"a string of at most {limit} bytes")
        return value

    return check


def _one_of(*choices: Any) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not any(value is c or (type(value) is type(c) and value == c) for c in choices):
            raise ValueError("one of " + ", ".join(map(repr, choices)))
        return value

    return check


def _count(limit: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if type(value) is not int or not 0 <= value <= limit:
            raise ValueError(f"an integer from 0 to {limit}")
        return value

    return check


def _seconds(limit: float) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        if type(value) not in (int, float) or not math.isfinite(value) or not 0 <= value <= limit:
            raise ValueError(f"seconds from 0 to {limit:g}")
        return float(value)

    return check


def _bytes(size: int) -> Callable[[Any], bytes]:
    def check(value: Any) -> bytes:
        if not isinstance(value, bytes) or len(value) != size:
            raise ValueError(f"{size} bytes")
        return value

    return check


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _map(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError("a map with strings as keys")
    return value


def _or_none(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else check(value)


_U64 = _count((1 << 64) - 1)
_NAME = _text(300)  # UID/NAME; split_name looks closer
_CLAIM = {"name": _NAME, "generation": _U64, "token": _bytes(NONCE)}
_BUNDLE: dict[str, Callable[[Any], Any]] = {
    "fds": _count(1 << 32),
    "bytes": _U64,
    "parked": _count(253),  # descriptors in the root of the bundle
    "depth": _count(2),  # of the root; 0: nothing below it
    "ttl": _or_none(_seconds(MAX_TTL)),
    # none; the peer itself; the process whose pidfd is the message's last descriptor
    "after_exit": _one_of("no", "peer", "pidfd"),
}
_SAVE = {
    "name": _NAME,
    **_BUNDLE,
    "if_exists": _one_of("error", "replace"),
    "require": _one_of(None, "store"),
}
_NONCE = {"nonce": _bytes(NONCE)}

REQUESTS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "hello": {"version": _count(1 << 16), "limits": _map},
    "save": {**_SAVE, **_NONCE},
    "prepare": {**_SAVE, **_NONCE},
    "commit": {**_CLAIM, **_NONCE},
    "abort": {**_CLAIM, **_NONCE},
    "load": {
        "name": _NAME,
        "wait": _seconds(MAX_WAIT),
        "lease": _seconds(MAX_LEASE),
        "generation": _or_none(_U64),
        **_NONCE,
    },
    "renew": {**_CLAIM, "lease": _or_none(_seconds(MAX_LEASE))},
    "begin": {**_CLAIM, **_NONCE, "process": _flag},
    "confirm": {**_CLAIM, **_NONCE},
    "confirm_next": {**_CLAIM, **_BUNDLE, **_NONCE},
    "reject": {**_CLAIM, **_NONCE, "why": _text(MAX_REASON), "damaged": _flag},
    "release": {"name": _NAME, "force": _flag, **_NONCE},
    "drop": {"name": _NAME, "force": _flag, **_NONCE},
    "wait": {"name": _NAME, "timeout": _seconds(MAX_WAIT)},
    "list": {"after": _or_none(_U64)},
    "show": {"name": _NAME},
    "status": {},
}
"""Each verb's fields; all of them must be there, and nothing else."""


def encode(message: Mapping[str, Any]) -> bytes:
    data: bytes = msgpack.packb(message, use_bin_type=True)
    return data


def decode(data: bytes, limit: int) -> Message:
    """One message. Raises ProtocolError with the reason. Sizes inside are bounded by the message's,
    nesting by msgpack's own stack of 1,024."""
    if len(data) > limit:
        raise ProtocolError(f"a message longer than {limit} bytes")
    try:
        message = msgpack.unpackb(data, raw=False, strict_map_key=True)
    except Exception as error:  # msgpack raises several unrelated classes, RecursionError too
        why = str(error) or type(error).__name__
        raise ProtocolError(f"not a msgpack message: {why}"[:300]) from None
    if not isinstance(message, dict):
        raise ProtocolError("a message is a map")
    return message


def read_request(data: bytes) -> Message:
    """A request with exactly the fields of its verb, each of its type, plus "verb".

    Raises ProtocolError that names the verb or the field."""
    message = decode(data, MAX_REQUEST)
    verb = message.get("verb")
    fields = REQUESTS.get(verb) if isinstance(verb, str) else None
    if fields is None:
        raise BadRequest(f"unknown verb {verb!r:.100}; this cprd speaks version {VERSION}")
    read: Message = {"verb": verb}
    for field, check in fields.items():
        if field not in message:
            raise BadRequest(f"{verb}: the field {field!r} is missing")
        try:
            read[field] = check(message[field])
        except ValueError as error:
            raise BadRequest(f"{verb}: the field {field!r} wants {error}") from None
    if len(message) != len(read):
        extra = sorted(set(message) - set(read), key=repr)  # keys may be bytes, too
        raise BadRequest(f"{verb}: unknown field {extra[0]!r:.100}")
    return read


class Garbled(ProtocolError):
    """An answer that cannot be read: what follows it on that connection cannot be, either."""


def read_answer(data: bytes) -> Message:
    """The "ok" map of an answer; an error is raised as it was raised in the daemon. Raises Garbled
    for what is no answer."""
    try:
        message = decode(data, MAX_ANSWER)
        if "ok" in message:
            return _map(message["ok"])
    except (ProtocolError, ValueError) as error:
        raise Garbled(f"not an answer: {error}") from None
    said = CODES.get(str(message.get("error")), CprdError)(str(message.get("why")))
    if isinstance(said, Busy):
        pid, phase, until = (message.get(field) for field in ("pid", "phase", "until"))
        said.pid = pid if isinstance(pid, int) else None
        said.phase = phase if isinstance(phase, str) else None
        said.until = float(until) if isinstance(until, int | float) else None
    raise said


def ok(**fields: Any) -> bytes:
    return encode({"ok": fields})


def refusal(error: CprdError) -> bytes:
    for cls in type(error).__mro__:
        if cls.__name__ in CODES:
            fields: Message = {"error": cls.__name__, "why": str(error)[:4000]}
            if isinstance(error, Busy):
                fields |= {"pid": error.pid, "phase": error.phase, "until": error.until}
            return encode(fields)
    raise AssertionError


def nonce() -> bytes:
    return os.urandom(NONCE)


def split_name(text: str, uid: int) -> tuple[int, str]:
    """The owner and the bare name of NAME or UID/NAME, asked for by a peer of `uid`.

    Whether the peer may is policy, not syntax. Raises InvalidInput that says what is wrong."""
    owner, slash, name = text.rpartition("/")
    if slash:
        if not owner.isascii() or not owner.isdigit() or int(owner) >= (1 << 32) - 1:
            raise InvalidInput(f"name {text!r:.300}: wants NAME, or UID/NAME as root; no other '/'")
        uid = int(owner)
    check_name(name)
    return uid, name


def check_name(name: str) -> str:
    """1..255 bytes of printable UTF-8, no '/', no leading '.'. Raises InvalidInput."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        size = 0
    if not 0 < size < 256 or not name.isprintable() or name[0] == "." or "/" in name:
        raise InvalidInput(
            f"name {name!r:.300}: wants 1 to 255 bytes of printable UTF-8 without '/', not"
            " beginning with '.'"
        )
    return name

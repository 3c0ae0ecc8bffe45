"""The wire between cprd and clients: verbs, fields, answers, limits and defaults, as data. No I/O.

A message is one msgpack map in one SEQPACKET message. A request names a `verb`; a request that
changes something carries a `nonce` (replies.py). An answer is {"ok": {...}} or {"error": CODE,
"why": TEXT}. docs/protocol.md shows all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import msgpack

from cprd.errors import CODES, Busy, CprdError, ProtocolError
from cprd.protocol.names import check_name as check_name  # noqa: PLC0414  # for clients
from cprd.protocol.names import split_name as split_name  # noqa: PLC0414

TYPE_CHECKING = False  # like typing.TYPE_CHECKING: an import of typing takes 4 ms
if TYPE_CHECKING:
    from typing import Any, TypeAlias

    Message: TypeAlias = dict[str, Any]


RELEASE = "0.2.0"  # of this software
VERSION = 2  # of the wire
SPOKEN = (2,)  # versions that cprd speaks; from version 3 on the last two
RELEASES = {1: "0.1", 2: "0.2"}  # version of the wire -> releases that speak the version

# Sizes, bytes
MAX_REQUEST = 16 * 1024
MAX_ANSWER = 64 * 1024
PAGE = 16 * 1024  # of rows in one answer to list, about
NONCE = 16
MAX_REASON = 1024

# What msgpack may make of a message. (An array or a map that promises much is made at once, empty.)
MAX_ITEMS = 16  # of an array in a request; of a map twice as many
HELLO_ITEMS = 64  # as MAX_ITEMS, in a hello of whatever version
MAX_TEXT = 4096  # bytes of a string, or of bytes, in a request
MAX_ANSWER_ITEMS = 4096  # in answers: rows, uids

# Times, s
LEASE = 30.0  # unless the client asks for another
MIN_LEASE = 0.1  # and the smallest ttl: what ends at once is work for nothing
MAX_LEASE = 24 * 3600.0
MAX_WAIT = 24 * 3600.0
MAX_TTL = 10 * 365 * 24 * 3600.0
FIRST_BYTE = 5.0  # from accept to hello
IDLE = 300.0  # without a request, for a connection without a claim, a prepared save or a wait
SLOW = 10.0  # an answer may stay unread before the connection is cut off
MUTE = 20.0  # a client waits for an answer before calling the daemon mute

# Defaults of cprd.toml
HOLDS = 2000  # of one uid
FDS = 1_000_000  # in the holds of one uid
CONNECTIONS = 500  # of one uid
ALL_CONNECTIONS = 1000
LONGEST_LEASE = 3600.0  # s


class BadRequest(ProtocolError):
    """A readable message that makes no sense; the connection goes on."""


class OtherVersion(ProtocolError):
    """A hello in another version of the wire. The answer has the version that is spoken here."""


class Field:
    """One field of a request. A call returns the value to use, or raises ValueError with the wanted
    form. `default`: of a request without the field, or with nil in it; unless `required`.

    A bool is an int in Python, and never meant as a number here."""

    __slots__ = ("default", "fits", "make", "required", "wants")

    def __init__(
        self, wants: str, fits: Callable[[Any], bool], make: Callable[[Any], Any] | None = None
    ) -> None:
        self.wants = wants
        self.default: Any = None
        self.required = True
        self.fits = fits
        self.make = make

    def __call__(self, value: Any) -> Any:
        if not self.fits(value):
            raise ValueError(self.wants)
        return value if self.make is None else self.make(value)

    def optional(self, default: Any) -> Field:
        """The same field, which may be left out."""
        field = Field(self.wants, self.fits, self.make)
        field.default, field.required = default, False
        return field


def _text(limit: int) -> Field:
    return Field(
        f"a string of at most {limit} bytes",
        lambda value: (
            isinstance(value, str)
            and (len(value) if value.isascii() else len(value.encode("utf-8", "replace"))) <= limit
        ),
    )


def _one_of(*choices: str) -> Field:
    return Field(
        "one of " + ", ".join(map(repr, choices)),
        lambda value: isinstance(value, str) and value in choices,
    )


def _count(limit: int) -> Field:
    return Field(
        f"an integer from 0 to {limit}", lambda value: type(value) is int and 0 <= value <= limit
    )


def _seconds(limit: float, least: float = 0.0) -> Field:
    return Field(
        f"seconds from {least:g} to {limit:g}",
        lambda value: type(value) in (int, float) and least <= value <= limit,  # NaN is not
        float,
    )


def _bytes(size: int) -> Field:
    return Field(f"{size} bytes", lambda value: isinstance(value, bytes) and len(value) == size)


_FLAG = Field("true or false", lambda value: isinstance(value, bool)).optional(False)
_U64 = _count((1 << 64) - 1)
_NAME = _text(300)  # UID/NAME; names.split_name looks closer
_PID = _count((1 << 31) - 1)
_CLAIM = {"name": _NAME, "generation": _U64, "token": _bytes(NONCE)}
_PROCESS = {"pid": _PID.optional(0), "inode": _U64.optional(0)}  # of a pidfd; 0: not known
_BUNDLE: dict[str, Field] = {
    "fds": _count(1 << 32),
    "bytes": _U64.optional(0),
    "parked": _count(253).optional(0),  # descriptors in the root of the bundle; 0: not said
    "depth": _count(2).optional(0),  # of the root; 0: nothing below it
    "ttl": _seconds(MAX_TTL, MIN_LEASE).optional(None),  # None: no end
    "after_exit": _one_of("no", "peer", "process").optional("no"),
    **_PROCESS,  # of after_exit "process"
    "queue": _FLAG,  # whether the answer is to bring the queue for the next save
}
_SAVE = {
    "name": _NAME,
    **_BUNDLE,
    "if_exists": _one_of("error", "replace").optional("error"),
    "require": _one_of("memory", "store").optional("memory"),
}
_NONCE = {"nonce": _bytes(NONCE)}

_ID = _U64.optional(None)

REQUESTS: dict[str, dict[str, Field]] = {
    "hello": {"version": _count(1 << 16)},
    "queue": {},
    "save": {**_SAVE, **_NONCE},
    "prepare": {**_SAVE, **_NONCE},
    "commit": {**_CLAIM, **_NONCE},
    "abort": {**_CLAIM, **_NONCE},
    "load": {
        "name": _NAME,
        "wait": _seconds(MAX_WAIT).optional(0.0),
        "lease": _seconds(MAX_LEASE, MIN_LEASE).optional(LEASE),
        "generation": _U64.optional(None),  # None: any
        **_NONCE,
    },
    "renew": {**_CLAIM, "lease": _seconds(MAX_LEASE, MIN_LEASE).optional(None)},  # as before
    "begin": {**_CLAIM, **_NONCE, **_PROCESS},  # pid 0: no process is named
    "confirm": {**_CLAIM, **_NONCE},
    "confirm_next": {**_CLAIM, **_BUNDLE, "live": _FLAG, **_NONCE},
    "reject": {
        **{**_CLAIM, **_NONCE, "why": _text(MAX_REASON).optional(""), "damaged": _FLAG},
        "attempt": _FLAG.optional(True),  # False: the claim does not count as an attempt
    },
    "live": {
        "name": _NAME,
        "wait": _seconds(MAX_WAIT).optional(0.0),
        "lease": _seconds(MAX_LEASE, MIN_LEASE).optional(LEASE),
        "ttl": _BUNDLE["ttl"],  # from the end of the owner on
        **_NONCE,
    },
    "put_back": {**_CLAIM, **_NONCE},
    "end": {**_CLAIM, "keep": _FLAG, **_NONCE},
    "release": {"name": _NAME, "force": _FLAG, **_NONCE},
    "drop": {"name": _NAME, "force": _FLAG, **_NONCE},
    "ended": {"name": _NAME, "generation": _U64, "pid": _PID},
    "wait": {"name": _NAME, "timeout": _seconds(MAX_WAIT).optional(MAX_WAIT)},
    "list": {"after": _U64.optional(0)},
    "show": {"name": _NAME},
    "status": {},
}
"""Verb -> fields. A request may have an `id` besides; fields that are not known are ignored, as
they are in answers."""


_STRINGS = {str}


def _is_map(value: Any) -> bool:
    return isinstance(value, dict) and set(map(type, value)) <= _STRINGS


def _is_list_of_maps(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_map, value))


_STRING = _text(MAX_ANSWER)
_NUMBER = Field("a number", lambda value: type(value) in (int, float), float)
_MAP = Field("a map with strings as keys", _is_map)
_KEPT = {"kept": _STRING}
_CHANGED = {"generation": _U64, **_KEPT}
_TOKEN = {"token": _bytes(NONCE)}
_LOADED: dict[str, Field] = {
    **{**_CHANGED, **_TOKEN, "attempts": _U64, "last_reject": _STRING.optional("")},
    **{"lease": _NUMBER, "saver": _PID, "saver_uid": _U64, "last_claimant": _PID.optional(0)},
    **{"live": _FLAG, "last_end": _STRING.optional("")},
}
ANSWERS: dict[str, dict[str, Field]] = {
    "hello": {
        **{"version": _count(1 << 16), "server": _STRING, "uid": _U64, "pid": _PID},
        **{"lease_by": Field("an array", lambda value: isinstance(value, list)), **_KEPT},
        "limits": _MAP,
    },
    "queue": {},
    "save": _CHANGED,
    "prepare": {**_CHANGED, **_TOKEN},
    "commit": _CHANGED,
    "abort": _KEPT,
    "load": _LOADED,
    "renew": {"lease": _NUMBER},
    "begin": _KEPT,
    "confirm": _KEPT,
    "confirm_next": {**_CHANGED, "token": _bytes(NONCE).optional(b"")},  # of a live hold
    "reject": _KEPT,
    "live": {
        **{"found": Field("true or false", lambda value: isinstance(value, bool)), **_LOADED},
        **{"attempts": _U64.optional(0), "lease": _NUMBER.optional(0.0)},
        **{"saver": _PID.optional(0), "saver_uid": _U64.optional(0)},  # of what was found
    },
    "put_back": {**_CHANGED, **_TOKEN},
    "end": _KEPT,
    "release": _CHANGED,
    "drop": _CHANGED,
    "ended": {},
    "wait": {"generation": _U64},
    "list": {"holds": Field("an array of maps", _is_list_of_maps), "more": _U64.optional(None)},
    "show": {"hold": _MAP},
    "status": {
        **{"server": _STRING, "pid": _PID, "uptime": _NUMBER, **_KEPT},
        **{"blind": _STRING.optional(None), "phases": _MAP, "uids": _MAP, "connections": _U64},
        **{"refused_accepts": _U64, "closing": _MAP, "limits": _MAP},
    },
}
"""Verb -> fields of the "ok" map. Fields with a default are left out where there is none."""

ROW: dict[str, Field] = {
    **{"name": _STRING, "generation": _U64, "phase": _STRING, "uid": _U64, "fds": _U64},
    **{"bytes": _U64, "age": _NUMBER, "expires": _NUMBER.optional(None), "attempts": _U64},
    **{"reason": _STRING.optional(""), "last_reject": _STRING.optional("")},
    **{"claimant": _PID.optional(None), "acting": _PID.optional(None)},
    **{"in_use_by": _PID.optional(None), "live": _FLAG, "last_end": _STRING.optional("")},
}
"""Fields of a hold, in the answers to list and show."""


# packb() makes a packer each time. A packer that is not in C can lose the GIL in the middle, and is
# not to serve several threads.
_in_c = msgpack.Packer.__module__ != "msgpack.fallback"
_pack = msgpack.Packer(use_bin_type=True).pack if _in_c else msgpack.packb


def encode(message: Mapping[str, Any]) -> bytes:
    data: bytes = _pack(message)
    return data


def _no_extension(code: int, data: bytes) -> None:
    raise ValueError(f"an extension type, {code}")


def decode(
    data: bytes, limit: int, *, items: int = MAX_ANSWER_ITEMS, text: int = MAX_ANSWER
) -> Message:
    """One message of at most `limit` bytes, with at most `items` in an array, twice as many in a
    map, and `text` bytes in a string. Raises ProtocolError with the reason: for a key twice, too.

    msgpack's stack bounds the nesting (1,024; without compiled code Python's own stack does)."""
    if len(data) > limit:
        raise ProtocolError(f"a message longer than {limit} bytes")
    try:
        message = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_array_len=items,
            max_map_len=2 * items,
            max_str_len=text,
            max_bin_len=text,
            max_ext_len=0,
            ext_hook=_no_extension,
        )
    except Exception as error:  # msgpack raises several unrelated classes, RecursionError too
        why = str(error) or type(error).__name__
        raise ProtocolError(f"not a msgpack message: {why}"[:300]) from None
    if not isinstance(message, dict):
        raise ProtocolError("a message is a map")
    head = data[0]  # with the number of pairs, or before the number: a hook for pairs costs more
    pairs = head & 15 if head < 0xDE else int.from_bytes(data[1 : 3 if head == 0xDE else 5], "big")
    if pairs != len(message):
        raise ProtocolError("a message with a key twice")
    return message


def read_first(data: bytes) -> Message:
    """A hello of a version that is spoken here, or another request. Raises OtherVersion,
    ProtocolError.

    Frozen for all versions: hello has `verb` and `version`, and a refusal `error`, `why` and
    `version`."""
    message = decode(data, MAX_REQUEST, items=HELLO_ITEMS, text=MAX_TEXT)
    if message.get("verb") != "hello":
        return read_request(data)
    version = message.get("version")
    if type(version) is not int or version in SPOKEN:
        return _request(message)
    other = RELEASES.get(version)
    release = f"cprd {other}" if other else f"the cprd of version {version}"
    older = "client" if version < VERSION else "daemon"
    raise OtherVersion(
        f"this is cprd {RELEASE}, which speaks version {VERSION} of the protocol; the client speaks"
        f" version {version} and needs {release}: upgrade the {older}"
        + (f" to cprd {RELEASES[VERSION]}, or connect to {release}" if older == "client" else "")
    )


def read_request(data: bytes) -> Message:
    """A request: "verb", "id" (None: none was given) and all fields of the verb, each of the right
    type. What was left out, or is nil, has the default.

    Raises ProtocolError that names the verb or the field."""
    return _request(decode(data, MAX_REQUEST, items=MAX_ITEMS, text=MAX_TEXT))


def _request(message: Message) -> Message:
    verb = message.get("verb")
    if not isinstance(verb, str):  # whose text may be deep
        raise BadRequest("the field 'verb' wants the name of a verb")
    fields = _WITH_ID.get(verb)
    if fields is None:
        raise BadRequest(f"unknown verb {verb!r:.100}; this cprd speaks version {VERSION}")
    try:
        read = _read(message, fields)
    except ValueError as error:
        raise BadRequest(f"{verb}: {error}") from None
    read["verb"] = verb
    return read


def _read(message: Message, fields: Mapping[str, Field]) -> Message:
    """All `fields`, and no others. Raises ValueError that names a field."""
    read: Message = {}
    get = message.get
    for name, field in fields.items():
        value = get(name)
        if value is None:
            if field.required:
                raise ValueError(f"the field {name!r} is missing")
            read[name] = field.default
        elif field.fits(value):
            make = field.make
            read[name] = value if make is None else make(value)
        else:
            raise ValueError(f"the field {name!r} wants {field.wants}")
    return read


_WITH_ID = {verb: {**fields, "id": _ID} for verb, fields in REQUESTS.items()}


class Garbled(ProtocolError):
    """An unreadable answer: nothing that follows on the connection can be trusted."""


def parse_answer(data: bytes) -> tuple[int | None, Message | CprdError]:
    """The id of an answer (None: an answer to no request, but to the connection), and the "ok" map
    or the error. Raises Garbled for anything but an answer."""
    try:
        message = decode(data, MAX_ANSWER)
        id = message.get("id")
        if id is not None:
            _U64(id)
        if "ok" in message:
            return id, _MAP(message["ok"])
        if not isinstance(message.get("error"), str):
            raise ValueError("neither 'ok' nor 'error'")
    except (ProtocolError, ValueError) as error:
        raise Garbled(f"not an answer: {error}") from None
    return id, _error(message)


def read_fields(verb: str, fields: Message) -> Message:
    """All fields of an answer to `verb`, with defaults. Raises Garbled."""
    try:
        read = _read(fields, ANSWERS[verb])
        if verb == "list":
            read["holds"] = [_read(row, ROW) for row in read["holds"]]
        elif verb == "show":
            read["hold"] = _read(read["hold"], ROW)
    except ValueError as error:
        raise Garbled(f"not an answer to {verb}: {error}") from None
    return read


def _error(message: Message) -> CprdError:
    """The error of an answer. A separate function: a local name in the raising frame is a reference
    cycle, and keeps the caller's connection open."""
    why = message.get("why")
    if not isinstance(why, str) or not why:
        why = f"{message['error']}, and cprd gave no reason"
    error = CODES.get(message["error"], CprdError)(why)
    if isinstance(error, Busy):
        pid, phase, until = (message.get(field) for field in ("pid", "phase", "until"))
        error.pid = pid if isinstance(pid, int) else None
        error.phase = phase if isinstance(phase, str) else None
        error.until = float(until) if isinstance(until, int | float) else None
    return error


def ok(**fields: Any) -> Message:
    return {"ok": without_none(fields)}


def without_none(fields: Mapping[str, Any]) -> Message:
    """What is none is not said."""
    return {key: value for key, value in fields.items() if value is not None}


def refusal(error: CprdError) -> Message:
    for cls in type(error).__mro__:
        if cls.__name__ in CODES:
            fields: Message = {"error": cls.__name__, "why": str(error)[:4000]}
            if isinstance(error, OtherVersion):
                fields["version"] = VERSION
            if isinstance(error, Busy):
                fields |= {"pid": error.pid, "phase": error.phase, "until": error.until}
            return without_none(fields)
    raise AssertionError


def pid_text(pid: int) -> str:
    return f"pid {pid}" if pid > 0 else "a process of another pid namespace"


def handled_by(saver: int, uid: int, last_claimant: int) -> str:
    """Who had a hold that is not whole."""
    said = f"saved by {pid_text(saver)} of uid {uid}"
    return f"{said}; {pid_text(last_claimant)} had claimed it last" if last_claimant else said


def nonce() -> bytes:
    return os.urandom(NONCE)

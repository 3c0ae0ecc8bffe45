"""The shapes of public results, for type checkers. `cprd.Row` and the others are imported when
asked for: typing takes 4 ms."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

IfExists = Literal["error", "replace"]
Kept = Literal["memory", "store"]
Phase = Literal[
    "prepared", "held", "claimed", "in-doubt", "damaged", "quarantined", "unreadable", "live"
]


class Row(TypedDict):
    """A hold, as list() shows the hold."""

    name: str
    generation: int
    phase: Phase
    uid: int
    fds: int  # descriptors under keys, as the saver said
    bytes: int  # of all sections
    age: float  # s since the save
    expires: float | None  # s until the hold is dropped; None: never
    attempts: int  # loads so far
    reason: str  # why the hold is not served now; "" when a load would get the hold
    last_reject: str
    claimant: int | None  # pid
    acting: int | None  # pid, as begin() named the process
    in_use_by: int | None  # pid of the owner while live, or of a saver that still runs (after_exit)
    live: bool  # left by a live hold, or live still
    last_end: str  # how the last owner ended; "" unless `live`


class Descriptor(TypedDict):
    name: str
    id: int
    what: str  # "tcp 10.0.0.1:80 -> ...", "memfd 2.0 GiB sealed", ...


class _Section(TypedDict):
    key: str
    kind: Literal["msgpack", "bytes", "memfd", "memory"]
    bytes: int


class Section(_Section, total=False):
    value: Any  # of a msgpack section up to 4 KiB


class Shown(Row):
    """A hold, as show() shows the hold."""

    descriptors: list[Descriptor]  # of a live hold: once the owner has ended
    sections: list[Section]
    segments: NotRequired[int]  # of a live hold: queues, each with some of the keys


class Usage(TypedDict):
    holds: int
    fds: int


class Status(TypedDict):
    """The daemon. Root sees everything; others see the part of the own uid."""

    server: str  # "cprd 0.2.0"
    pid: int
    uptime: float  # s
    kept: Kept
    blind: str | None  # why names may be held out of sight
    phases: dict[str, int]  # holds by phase
    uids: dict[str, Usage]
    connections: int
    refused_accepts: int
    closing: dict[str, int]  # by uid: files whose close blocks
    limits: dict[str, Any]


class Greeting(TypedDict):
    """What the daemon says first of all."""

    version: int
    server: str
    uid: int  # of this process, as the daemon sees it
    pid: int
    lease_by: list[Literal["connection", "process", "time"]]
    kept: Kept
    limits: dict[str, Any]

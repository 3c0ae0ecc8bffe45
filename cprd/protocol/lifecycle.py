"""The life cycle of a hold as data: phases, transitions, the record. No I/O, no clock.

Times are seconds of CLOCK_BOOTTIME. A pid is 0 where the kernel does not show the process (another
pid namespace).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import msgpack

from cprd.errors import Busy
from cprd.protocol.messages import pid_text

if TYPE_CHECKING:
    from cprd.protocol.names import Key
    from cprd.protocol.rows import Phase, Row

PREPARED = "prepared"
HELD = "held"
CLAIMED = "claimed"
IN_DOUBT = "in-doubt"
LIVE = "live"
DAMAGED = "damaged"
QUARANTINED = "quarantined"
UNREADABLE = "unreadable"
NOTHING = "-"

SAVED_BY_ACTING = "saved by the acting process"
OWNER_GONE, GONE_TOO_OFTEN = "owner gone", "owner gone too often"
NOT_PUT_BACK = "owner gone, and not put back"
NEXT_AWAY = "confirm next, cprd ended"

SOON = 10.0  # s after a take-over: an owner that ends sooner may have died of the state
MOST_DEATHS = 20  # of owners, in a row, each soon after its take-over

TRANSITIONS: dict[tuple[str, str], str] = {
    (NOTHING, "prepare"): PREPARED,
    (NOTHING, "save"): HELD,
    (NOTHING, "live"): LIVE,
    (PREPARED, "commit"): HELD,
    (PREPARED, "abort"): NOTHING,
    (PREPARED, "saver gone"): IN_DOUBT,
    (HELD, "load"): CLAIMED,
    (HELD, "replace"): NOTHING,
    (HELD, "drop"): NOTHING,
    (HELD, "ttl over"): NOTHING,
    (HELD, "release"): HELD,
    (HELD, "found damaged"): DAMAGED,
    (HELD, "counted"): HELD,
    (HELD, "found empty"): NOTHING,
    (CLAIMED, "renew"): CLAIMED,
    (CLAIMED, "confirm"): NOTHING,
    (CLAIMED, "confirm next"): NOTHING,
    (CLAIMED, "reject"): HELD,
    (CLAIMED, "claimant gone"): HELD,
    (CLAIMED, "lease over"): HELD,
    (CLAIMED, "begin"): IN_DOUBT,
    (CLAIMED, "drop by force"): NOTHING,
    (CLAIMED, "found damaged"): DAMAGED,
    (IN_DOUBT, "renew"): IN_DOUBT,
    (IN_DOUBT, "begin"): IN_DOUBT,
    (IN_DOUBT, "claimant gone"): IN_DOUBT,
    (IN_DOUBT, "confirm"): NOTHING,
    (IN_DOUBT, "confirm next"): NOTHING,
    (IN_DOUBT, "reject"): HELD,
    (IN_DOUBT, SAVED_BY_ACTING): NOTHING,
    (IN_DOUBT, "release by force"): HELD,
    (IN_DOUBT, "drop by force"): NOTHING,
    (IN_DOUBT, "found damaged"): DAMAGED,
    (IN_DOUBT, "newer committed"): NOTHING,
    (LIVE, "put back"): LIVE,
    (LIVE, NEXT_AWAY): NOTHING,
    (LIVE, "close"): HELD,
    (LIVE, OWNER_GONE): HELD,
    (LIVE, GONE_TOO_OFTEN): QUARANTINED,
    (LIVE, NOT_PUT_BACK): NOTHING,
    (LIVE, "end"): NOTHING,
    (LIVE, "drop by force"): NOTHING,
    (QUARANTINED, "counted"): QUARANTINED,
    (QUARANTINED, "release by force"): HELD,
    (QUARANTINED, "drop by force"): NOTHING,
    (DAMAGED, "drop by force"): NOTHING,
    (DAMAGED, "newer committed"): NOTHING,
    (UNREADABLE, "drop by force"): NOTHING,
    (UNREADABLE, "newer committed"): NOTHING,
}
"""(phase, event) -> phase; an event without an entry is refused.

"replace", "confirm next" and "saved by the acting process" end the old hold in the step that puts
the new one. "newer committed": a save was prepared over the hold, and is committed or released.
"owner gone, and not put back" and "confirm next, cprd ended": cprd kept in memory only, and has
ended since. "counted" and "found empty": of a live hold, once the owner has ended."""

_IN_THE_WAY = {
    PREPARED: ("saver",),
    HELD: ("after_exit",),
    CLAIMED: ("claimant",),
    IN_DOUBT: ("acting", "claimant"),
    LIVE: ("saver",),
    DAMAGED: ("saver",),
}
"""Phase -> fields of the processes that a load waits for, or must blame; the first pid above 0
counts."""


_USES = ("which keeps it live", "which has not put it back since cprd ended")


class Hold(NamedTuple):
    """One record. A transition makes another record. (A dataclass with so many fields takes ten
    times as long to make.)"""

    uid: int
    name: str
    generation: int
    phase: str
    fds: int = 0  # descriptors under keys, as the saver said
    size: int = 0  # bytes of the sections, as the saver said
    created: float = 0.0
    expires: float | None = None  # when the ttl ends; None while stopped, or without an end
    ttl_left: float | None = None  # what is left of the ttl while stopped
    attempts: int = 0  # loads so far
    last_reject: str = ""
    reason: str = ""  # of in-doubt, damaged, quarantined, unreadable
    saver: int = 0  # pid; while live, of the owner
    after_exit: int = -1  # pid of the process that must end before a load; -1: none
    claimant: int = 0  # pid
    last_claimant: int = 0
    token: bytes = b""  # of the claim, or of the prepared save
    lease: float = 0.0
    deadline: float = 0.0  # when the lease ends (claimed)
    acting: int = 0  # pid of the process that begin named
    parked: int = 0  # descriptors in the root of the bundle, as the saver said; 0: not known
    begun: bool = False  # in doubt by begin, not by a saver that vanished
    saver_uid: int = -1  # where root saved under a name of another uid; -1: as `uid`
    live: bool = False  # the bundle is the root of a live hold
    away: bool = False  # live, and the owner (or claimant) alone has it: cprd has ended since
    took: int = 0  # live: the generation that was taken over; 0: none
    deaths: int = 0  # live: owners that ended soon after the take-over, in a row
    last_end: str = ""  # live: how the last owner ended

    @property
    def key(self) -> Key:
        return (self.uid, self.name)

    @property
    def saved_by(self) -> int:
        """The uid of the saver."""
        return self.uid if self.saver_uid < 0 else self.saver_uid

    @property
    def committed(self) -> bool:
        """Whether a save was completed: not prepared, and not left behind by a saver."""
        if self.phase in (LIVE, QUARANTINED):
            return True
        return self.allows("load") or (bool(self.token) and self.allows("confirm"))

    @property
    def ends_at(self) -> float | None:
        """When time ends the phase; None: never."""
        if self.allows("lease over"):
            return self.deadline
        return self.expires if self.allows("ttl over") else None

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles of the processes to watch."""
        roles: tuple[str, ...] = ("after_exit",) if self.after_exit >= 0 else ()
        if self.allows("saver gone"):
            roles += ("saver",)
        if self.live:  # ended, the process may still be asked how
            roles += ("owner",)
        if self.claimant or self.allows("lease over"):  # pid 0 is watched by pidfd all the same
            roles += ("claimant",)
        return (*roles, "acting") if self.acting else roles

    def allows(self, event: str) -> bool:
        return (self.phase, event) in TRANSITIONS

    def after(self, event: str) -> str:
        """The phase after an event. Raises KeyError where the table has no entry."""
        return TRANSITIONS[self.phase, event]

    @property
    def user(self) -> int | None:
        """pid of the process that uses the state still; None: no such process."""
        if self.phase == LIVE:
            return self.saver
        return self.after_exit if self.phase == HELD and self.after_exit >= 0 else None

    def row(self, now: float) -> Row:
        """A row of `list`."""
        left = self.ttl_left if self.expires is None else max(0.0, self.expires - now)
        reason = why_not(self, now)
        if self.phase == HELD and self.after_exit >= 0:
            reason = f"in use by {pid_text(self.after_exit)}: the predecessor has not ended yet"
        if not reason and self.last_reject:
            reason = f"rejected: {self.last_reject}"
        return {
            "name": self.name,
            "generation": self.generation,
            "phase": cast("Phase", self.phase),
            "uid": self.uid,
            "fds": self.fds,
            "bytes": self.size,
            "age": max(0.0, now - self.created),
            "expires": left,
            "attempts": self.attempts,
            "reason": reason,
            "last_reject": self.last_reject,
            "claimant": self.claimant or None,
            "acting": self.acting or None,
            "in_use_by": self.user,
            "live": self.live,
            "last_end": self.last_end,
        }


_AT = {name: at for at, name in enumerate(Hold._fields)}


def changed(hold: Hold, **changes: Any) -> Hold:
    """Another record with `changes`: `_replace` in a third of the time."""
    values = list(hold)
    for name, value in changes.items():
        values[_AT[name]] = value
    return Hold._make(values)


_USUAL = tuple({**Hold._field_defaults, "phase": HELD}.get(name) for name in Hold._fields)
_pack = msgpack.Packer(use_bin_type=True).pack  # packb() makes a packer each time


def packed(hold: Hold) -> bytes:
    """A record for memory alone: the fields that say something, by position."""
    said = {at: value for at, value in enumerate(hold) if value != _USUAL[at]}
    data: bytes = _pack(said)
    return data


def unpacked(data: bytes) -> Hold:
    """The record of what a record was packed as."""
    values = list(_USUAL)
    for at, value in msgpack.unpackb(data, raw=False, strict_map_key=False).items():
        values[at] = value
    return Hold._make(values)


def ending_event(old: Hold, saver: int, predecessor: int) -> str:
    """The event by which a save of pid `saver`, to be served after pid `predecessor`, ends `old`.

    The table says whether `old` allows the event."""
    if old.acting > 0 and old.acting in (saver, predecessor):
        return SAVED_BY_ACTING
    return "confirm next" if 0 < old.claimant == saver else "replace"


def why_not(hold: Hold, now: float) -> str:
    """Why a load is refused now; "" when a load is served."""
    if hold.phase == PREPARED:
        return f"prepared by {pid_text(hold.saver)}, which has not committed yet"
    if hold.phase == CLAIMED:
        left = max(0.0, hold.deadline - now)
        return f"claimed by {pid_text(hold.claimant)}, whose lease has {left:.1f} s left"
    if hold.phase == HELD:
        if hold.after_exit >= 0:
            return f"its predecessor, {pid_text(hold.after_exit)}, has not ended yet"
        return ""
    if hold.phase == IN_DOUBT:
        return (
            f"in doubt: {hold.reason}; make sure that it does not run elsewhere, then release it"
            " (cprctl release NAME --force) or drop it (cprctl drop NAME --force)"
        )
    if hold.phase == LIVE:
        return f"in use by {pid_text(hold.saver)}, {_USES[hold.away]}"
    if hold.phase == QUARANTINED:
        return (
            f"quarantined: {hold.reason}; find out why, then release it (cprctl release NAME"
            " --force) or drop it (cprctl drop NAME --force)"
        )
    if hold.phase == DAMAGED:
        return f"damaged: {hold.reason}; it can only be dropped (cprctl drop NAME --force)"
    return f"unreadable: {hold.reason}; run the newer cprd again, or drop it (--force)"


Refusal = TypeVar("Refusal", bound=Busy)


def busy(hold: Hold, text: str, kind: type[Refusal]) -> Refusal:
    """A `kind` of Busy that names the process in the way, the phase and the end of the lease."""
    pids = (getattr(hold, field) for field in _IN_THE_WAY.get(hold.phase, ()))
    return kind(
        text,
        pid=next((pid for pid in pids if pid > 0), None),
        phase=hold.phase,
        until=hold.deadline if hold.allows("lease over") else None,
    )

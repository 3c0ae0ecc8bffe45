"""What a client says, verb by verb, without I/O: one code for the blocking client and for trio's.

A verb is a generator. It yields a `Call` (a request and the descriptors that go with it) and is
sent the `Answer`; an error of the daemon is thrown into it. Its return value is the verb's result.
"""

from __future__ import annotations

from array import array
from collections.abc import Generator, Sequence

from cprd import wire
from cprd.bundle import Packed, pack, unpack
from cprd.errors import Busy, Damaged, InvalidInput, LimitExceeded, ProtocolError
from cprd.pause import point
from cprd.state import State

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from typing import Any, TypeAlias, TypeVar

    T = TypeVar("T")
    Verb: TypeAlias = "Generator[Call, Answer, T]"


class Call:
    """One request. `fds` are borrowed until the answer is there; `wait` is how long the daemon may
    take for it beyond the usual."""

    __slots__ = ("_message", "data", "fds", "wait")

    def __init__(self, message: dict[str, Any], fds: Sequence[int] = (), wait: float = 0.0) -> None:
        self.data = wire.encode(message)
        self.fds = fds
        self.wait = wait
        self._message = message
        if len(self.data) > wire.MAX_REQUEST:
            raise InvalidInput(f"{message['verb']}: its arguments exceed {wire.MAX_REQUEST} bytes")

    def after(self, seconds: float) -> Call:
        """The same request, to be said again after so long: it waits no longer than was asked."""
        if not self.wait:
            return self
        left = max(0.0, self.wait - seconds)
        field = "timeout" if self._message["verb"] == "wait" else "wait"
        return Call({**self._message, field: left}, self.fds, left)


class Answer:
    """What came back. Whoever gets it owns `fds`. `cut`: not all of them could be installed."""

    __slots__ = ("cut", "fds", "fields")

    def __init__(self, fields: dict[str, Any], fds: array[int], *, cut: bool = False) -> None:
        self.fields = fields
        self.fds = fds
        self.cut = cut

    def bundle(self) -> int:
        """The one descriptor that came with it, now the caller's. Raises LimitExceeded when there
        was none left to receive it with, ProtocolError."""
        if self.cut:
            raise LimitExceeded(
                "no descriptor left to receive the bundle with (MSG_CTRUNC): raise RLIMIT_NOFILE"
                " (ulimit -n, LimitNOFILE=); what is held stays held"
            )
        if len(self.fds) != 1:
            raise ProtocolError(f"an answer with {len(self.fds)} descriptors instead of one")
        return self.fds.pop()


class Saved:
    """What became of a save: `generation`, and where it is kept: "memory" or "store"."""

    __slots__ = ("generation", "kept")

    def __init__(self, fields: dict[str, Any]) -> None:
        self.generation: int = fields["generation"]
        self.kept: str = fields["kept"]

    def __repr__(self) -> str:
        return f"<cprd.Saved: generation {self.generation}, kept: {self.kept}>"


class Ticket:
    """What speaks for a claim or a prepared save: not unlike a key in a cloakroom."""

    __slots__ = ("generation", "name", "token")

    def __init__(self, name: str, fields: dict[str, Any]) -> None:
        self.name = name
        self.generation: int = fields["generation"]
        self.token: bytes = fields["token"]

    def fields(self) -> dict[str, Any]:
        return {"name": self.name, "generation": self.generation, "token": self.token}


def hello() -> Verb[dict[str, Any]]:
    answer = yield Call(
        {"verb": "hello", "version": wire.VERSION, "limits": {"answer": wire.MAX_ANSWER}}
    )
    if answer.fields.get("version") != wire.VERSION:
        raise ProtocolError(
            f"the daemon speaks version {answer.fields.get('version')} of the protocol, this client"
            f" version {wire.VERSION}: upgrade the older one"
        )
    return answer.fields


def save(
    verb: str,
    forbidden: Sequence[int],
    name: str,
    state: State,
    if_exists: str,
    ttl: float | None,
    after_exit: Any,
    require: str | None,
) -> Verb[dict[str, Any]]:
    """save or prepare: the answer's fields."""
    check_name(name)
    if if_exists not in ("error", "replace"):
        raise InvalidInput(f'if_exists wants "error" or "replace", not {if_exists!r}')
    if require not in (None, "memory", "store"):
        raise InvalidInput(f'require wants None or "store", not {require!r}')
    packed = pack(state, forbidden)
    try:
        fields, fds = _bundle(packed, ttl, after_exit)
        point("save:packed")
        answer = yield Call(
            {
                "verb": verb,
                "name": name,
                **fields,
                "if_exists": if_exists,
                "require": "store" if require == "store" else None,
                "nonce": wire.nonce(),
            },
            fds,
        )
        point("save:answered")
        return answer.fields
    finally:
        packed.close()  # after the answer: the daemon's copy is never the last one


def _bundle(packed: Packed, ttl: float | None, after_exit: Any) -> tuple[dict[str, Any], list[int]]:
    """The fields and descriptors by which a bundle is offered."""
    fds = [packed.fd]
    how = "no"
    if after_exit is True:
        how = "peer"
    elif after_exit is not False and after_exit is not None:
        how = "pidfd"
        fds.append(after_exit if isinstance(after_exit, int) else after_exit.fileno())
    check_seconds("ttl", ttl, wire.MAX_TTL)
    fields = {
        **{"fds": packed.fds, "bytes": packed.size, "parked": packed.parked},
        **{"depth": packed.depth, "ttl": ttl, "after_exit": how},
    }
    return fields, fds


def commit(ticket: Ticket) -> Verb[Saved]:
    point("commit:before")
    answer = yield Call({"verb": "commit", **ticket.fields(), "nonce": wire.nonce()})
    point("commit:answered")
    return Saved(answer.fields)


def abort(ticket: Ticket) -> Verb[None]:
    yield Call({"verb": "abort", **ticket.fields(), "nonce": wire.nonce()})


class Loaded:
    """A claim as it was answered: its ticket, the bundle (owned) and what is told of it."""

    __slots__ = ("attempts", "bundle", "last_reject", "lease", "state", "ticket")

    def __init__(self, ticket: Ticket, fields: dict[str, Any], bundle: int, state: State) -> None:
        self.ticket = ticket
        self.attempts: int = fields["attempts"]
        self.last_reject: str = fields["last_reject"]
        self.lease: float = fields["lease"]
        self.bundle = bundle
        self.state = state


def load(name: str, wait: float, lease: float, generation: int | None) -> Verb[Loaded]:
    """Claim, and read all of it; what cannot be read is given back with the reason."""
    check_name(name)
    check_seconds("wait", wait, wire.MAX_WAIT)
    check_seconds("lease", lease, wire.MAX_LEASE)
    point("load:before")
    answer = yield Call(
        {
            "verb": "load",
            "name": name,
            "wait": wait,
            "lease": lease,
            "generation": generation,
            "nonce": wire.nonce(),
        },
        wait=wait,
    )
    fields = answer.fields
    ticket = Ticket(name, fields)
    try:
        bundle = answer.bundle()
    except LimitExceeded as error:  # claimed all the same: give it back now, not with the lease
        yield from _give_back(ticket, str(error), damaged=False)
        raise
    point("load:claimed")
    try:
        try:
            state = unpack(bundle)
        except Damaged as error:
            why = str(error)
            if fields["last_claimant"]:
                why += f"; pid {fields['last_claimant']} had claimed it last"
            yield from _give_back(ticket, why, damaged=True)
            raise Damaged(f"{name!r} is damaged and will not be served again: {why}") from None
        except (LimitExceeded, Busy) as error:  # whole, but not for us: another may read it
            yield from _give_back(ticket, str(error), damaged=False)
            raise
        point("load:unpacked")
        if state.fd_count != fields["fds"]:
            found = state.fd_count
            state.close()
            why = f"its saver said {fields['fds']} descriptors; there are {found}"
            yield from _give_back(ticket, why, damaged=True)
            raise Damaged(f"{name!r} is damaged and will not be served again: {why}")
    except BaseException:
        import os

        os.close(bundle)
        raise
    return Loaded(ticket, fields, bundle, state)


def _give_back(ticket: Ticket, why: str, *, damaged: bool) -> Verb[None]:
    yield Call(
        {
            "verb": "reject",
            **ticket.fields(),
            "why": cut(why),
            "damaged": damaged,
            "nonce": wire.nonce(),
        }
    )


def renew(ticket: Ticket, lease: float | None) -> Verb[float]:
    check_seconds("lease", lease, wire.MAX_LEASE)
    answer = yield Call({"verb": "renew", **ticket.fields(), "lease": lease})
    return float(answer.fields["lease"])


def begin(ticket: Ticket, process: Any) -> Verb[None]:
    fds: list[int] = []
    if process is not None:
        fds.append(process if isinstance(process, int) else process.fileno())
    point("begin:before")
    yield Call(
        {"verb": "begin", **ticket.fields(), "process": bool(fds), "nonce": wire.nonce()}, fds
    )
    point("begin:answered")


def confirm(ticket: Ticket) -> Verb[str]:
    """Returns where the confirmation is kept."""
    point("confirm:before")
    answer = yield Call({"verb": "confirm", **ticket.fields(), "nonce": wire.nonce()})
    point("confirm:answered")
    return str(answer.fields["kept"])


def confirm_next(
    forbidden: Sequence[int], ticket: Ticket, state: State, after_exit: Any, ttl: float | None
) -> Verb[Saved]:
    packed = pack(state, forbidden)
    try:
        fields, fds = _bundle(packed, ttl, after_exit)
        point("confirm:before")
        answer = yield Call(
            {"verb": "confirm_next", **ticket.fields(), **fields, "nonce": wire.nonce()}, fds
        )
        point("confirm:answered")
        return Saved(answer.fields)
    finally:
        packed.close()


def reject(ticket: Ticket, why: str) -> Verb[None]:
    point("reject:before")
    yield from _give_back(ticket, why, damaged=False)
    point("reject:answered")


def drop(name: str, force: bool) -> Verb[int]:
    check_name(name)
    answer = yield Call({"verb": "drop", "name": name, "force": force, "nonce": wire.nonce()})
    return int(answer.fields["generation"])


def release(name: str, force: bool) -> Verb[int]:
    check_name(name)
    answer = yield Call({"verb": "release", "name": name, "force": force, "nonce": wire.nonce()})
    return int(answer.fields["generation"])


def wait(name: str, timeout: float) -> Verb[int]:
    check_name(name)
    check_seconds("timeout", timeout, wire.MAX_WAIT)
    answer = yield Call({"verb": "wait", "name": name, "timeout": timeout}, wait=timeout)
    return int(answer.fields["generation"])


def rows() -> Verb[list[dict[str, Any]]]:
    """list: all pages."""
    found: list[dict[str, Any]] = []
    after: int | None = None
    while True:
        answer = yield Call({"verb": "list", "after": after})
        found += answer.fields["holds"]
        after = answer.fields["more"]
        if after is None:
            found.sort(key=lambda row: (row["uid"], row["name"], row["generation"]))
            return found


def show(name: str) -> Verb[tuple[dict[str, Any], int]]:
    """The row of a hold, and its bundle, which the caller owns (-1: there is none to look into)."""
    check_name(name)
    answer = yield Call({"verb": "show", "name": name})
    return answer.fields["hold"], answer.bundle() if answer.fds or answer.cut else -1


def status() -> Verb[dict[str, Any]]:
    answer = yield Call({"verb": "status"})
    return answer.fields


def check_name(name: str) -> None:
    """NAME or UID/NAME. Raises InvalidInput."""
    if not isinstance(name, str):
        raise InvalidInput(f"name {name!r}: wants a str")
    wire.split_name(name, 0)


def check_seconds(what: str, seconds: float | None, limit: float) -> None:
    """Raises InvalidInput unless it is a number of seconds that the daemon takes (or None)."""
    if seconds is None:
        return
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise InvalidInput(f"{what} wants seconds, not {seconds!r}")
    if not 0 <= seconds <= limit:
        raise InvalidInput(f"{what} wants 0 to {limit:g} seconds, not {seconds!r}")


def cut(why: str) -> str:
    """A reason as long as it may be on the wire."""
    return why.encode("utf-8", "replace")[: wire.MAX_REASON].decode("utf-8", "ignore")

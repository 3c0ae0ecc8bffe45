"""What a client says, verb by verb, without I/O: one code for the blocking client and for trio's.

A verb is a generator. It yields a `Call` (a request and the descriptors that go with it) and is
sent the `Answer`; an error of the daemon is thrown into it. Its return value is the verb's result.

What interrupts a call that may have been sent (KeyboardInterrupt, trio.Cancelled, ...) is thrown
into the verb, too. It may then yield the same `Call` once more, to learn what became of it, and
others to undo it, before the interrupt goes on.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Generator, Sequence

from cprd.bundle.pack import Packed, pack
from cprd.bundle.unpack import unpack
from cprd.errors import CprdError, Damaged, InvalidInput, LimitExceeded, ProtocolError
from cprd.linux.pause import point
from cprd.linux.rights import close_all
from cprd.protocol import messages
from cprd.state import State, open_descriptor

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from typing import Any, TypeAlias, TypeVar

    from cprd.state import HasFileno

    T = TypeVar("T")
    Verb: TypeAlias = "Generator[Call, Answer, T]"


class Abandoned(BaseException):
    """An interrupt whose raiser cannot wait, and sees himself to what becomes of the request."""


class Call:
    """One request. `fds` are borrowed until the answer is there; `wait` is how long the daemon may
    take for it beyond the usual.

    `sure`: what becomes of it must be learned, so it is not cancelled. `tied`: the end of its
    connection undoes it. `brief`: it is worth a moment, and no more. `sent`: perhaps it was;
    interrupted before that, it never happened."""

    __slots__ = ("_message", "brief", "data", "fds", "sent", "sure", "tied", "wait")

    def __init__(
        self,
        message: dict[str, Any],
        fds: Sequence[int] = (),
        wait: float = 0.0,
        *,
        sure: bool = False,
        tied: bool = False,
        brief: bool = False,
    ) -> None:
        self.data = messages.encode(message)
        self.fds = fds
        self.wait = wait
        self.sure = sure
        self.tied = tied
        self.brief = brief
        self.sent = False
        self._message = message
        if len(self.data) > messages.MAX_REQUEST:
            raise InvalidInput(
                f"{message['verb']}: its arguments exceed {messages.MAX_REQUEST} bytes"
            )

    def after(self, seconds: float) -> Call:
        """The same request, to be said again after so long: it waits no longer than was asked."""
        if not self.wait:
            return self
        left = max(0.0, self.wait - seconds)
        field = "timeout" if self._message["verb"] == "wait" else "wait"
        return Call({**self._message, field: left}, self.fds, left)


class Answer:
    """What came back. It owns `fds`. `cut`: not all of them could be installed."""

    __slots__ = ("cut", "fds", "fields")

    def __init__(self, fields: dict[str, Any], fds: array[int]) -> None:
        self.fields = fields
        self.fds = fds
        self.cut = False

    def close(self) -> None:
        """Close what nobody took out of `fds`."""
        fds, self.fds = self.fds, array("i")
        close_all(fds)

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
    """What speaks for a claim or a prepared save: not unlike a key in a cloakroom. `over`: nothing
    is left to be said with it."""

    __slots__ = ("generation", "name", "over", "token")

    def __init__(self, name: str, fields: dict[str, Any]) -> None:
        self.name = name
        self.generation: int = fields["generation"]
        self.token: bytes = fields["token"]
        self.over = False

    def fields(self) -> dict[str, Any]:
        return {"name": self.name, "generation": self.generation, "token": self.token}


class Common:
    """What all connections of one Daemon have in common."""

    __slots__ = ("_claims", "sockets", "uid")

    def __init__(self) -> None:
        self.sockets: set[HasFileno] = set()
        self.uid = 0  # ours, as the daemon sees it
        # Tickets only: a claim that its program forgot ends, and takes its ticket away.
        self._claims: dict[tuple[int, str], Ticket] = {}

    def forbidden(self) -> tuple[int, ...]:
        """What must not lie in a bundle of ours."""
        return tuple(sock.fileno() for sock in self.sockets)

    def claimed(self, ticket: Ticket) -> None:
        self._claims[messages.split_name(ticket.name, self.uid)] = ticket

    def forget(self, ticket: Ticket) -> None:
        key = messages.split_name(ticket.name, self.uid)
        if self._claims.get(key) is ticket:
            del self._claims[key]

    def replaced(self, name: str, generation: int) -> None:
        """A save of ours is held: where it took the place of what we had claimed, it has confirmed
        that claim."""
        ticket = self._claims.get(messages.split_name(name, self.uid))
        if ticket is not None and ticket.generation < generation:
            ticket.over = True


def hello(*, brief: bool = False) -> Verb[dict[str, Any]]:
    answer = yield Call(
        {"verb": "hello", "version": messages.VERSION, "limits": {"answer": messages.MAX_ANSWER}},
        brief=brief,
    )
    if answer.fields.get("version") != messages.VERSION:
        raise ProtocolError(
            f"the daemon speaks version {answer.fields.get('version')} of the protocol, this client"
            f" version {messages.VERSION}: upgrade the older one"
        )
    return answer.fields


def save(
    verb: str,
    common: Common,
    name: str,
    state: State,
    if_exists: str,
    ttl: float | None,
    after_exit: Any,
    require: str | None,
) -> Verb[dict[str, Any]]:
    """save or prepare: the answer's fields. An interrupted prepare is taken back: with nobody who
    could commit it, it would be in doubt."""
    check_name(name)
    _check_state(state)
    if if_exists not in ("error", "replace"):
        raise InvalidInput(f'if_exists wants "error" or "replace", not {if_exists!r}')
    if require not in (None, "memory", "store"):
        raise InvalidInput(f'require wants None or "store", not {require!r}')
    packed = pack(state, common.forbidden())
    try:
        fields, fds = _bundle(packed, ttl, after_exit)
        point("save:packed")
        call = Call(
            {
                "verb": verb,
                "name": name,
                **fields,
                "if_exists": if_exists,
                "require": "store" if require == "store" else None,
                "nonce": messages.nonce(),
            },
            fds,
        )
        try:
            answer = yield call
        except (CprdError, GeneratorExit):
            raise
        except BaseException:
            if verb == "prepare":
                yield from _undo(call, name, _abort)
            raise
        if verb == "save":
            common.replaced(name, answer.fields["generation"])
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
        fds.append(open_descriptor("after_exit", after_exit))
    if ttl is not None:
        check_seconds("ttl", ttl, messages.MAX_TTL)
    fields = {
        **{"fds": packed.fds, "bytes": packed.size, "parked": packed.parked},
        **{"depth": packed.depth, "ttl": ttl, "after_exit": how},
    }
    return fields, fds


def _outcome(call: Call, ticket: Ticket) -> Verb[tuple[Answer, BaseException | None]]:
    """Say what ends a claim or a prepared save. What interrupts it is given back with the answer:
    by then it is known whether it was done. A second interrupt ends the attempt."""
    interrupt: BaseException | None = None
    try:
        answer = yield call
    except (CprdError, GeneratorExit):
        raise
    except BaseException as caught:
        interrupt = caught
        try:
            answer = yield call
        except CprdError as error:
            raise caught from error
    ticket.over = True
    return answer, interrupt


def commit(ticket: Ticket, common: Common) -> Verb[Saved]:
    point("commit:before")
    call = Call({"verb": "commit", **ticket.fields(), "nonce": messages.nonce()}, sure=True)
    answer, interrupt = yield from _outcome(call, ticket)
    common.replaced(ticket.name, ticket.generation)
    point("commit:answered")
    if interrupt is not None:
        raise interrupt
    return Saved(answer.fields)


def abort(ticket: Ticket) -> Verb[None]:
    _, interrupt = yield from _outcome(_abort(ticket), ticket)
    if interrupt is not None:
        raise interrupt


def _abort(ticket: Ticket) -> Call:
    return Call({"verb": "abort", **ticket.fields(), "nonce": messages.nonce()}, sure=True)


def _undo(call: Call, name: str, end: Callable[[Ticket], Call]) -> Verb[None]:
    """After an interrupt: learn whether `call` was done, and end what it began."""
    call.brief = True
    try:
        answer = yield call
        last = end(Ticket(name, answer.fields))
        last.brief = True
        yield last
    except CprdError:
        pass  # the end of the connection or of the lease has to do


class Loaded:
    """A claim as it was answered: its ticket, the bundle (owned) and what is told of it. Whoever
    takes it on sets `taken`."""

    __slots__ = ("attempts", "bundle", "last_reject", "lease", "state", "taken", "ticket")

    def __init__(self, ticket: Ticket, fields: dict[str, Any], bundle: int, state: State) -> None:
        self.ticket = ticket
        self.attempts: int = fields["attempts"]
        self.last_reject: str = fields["last_reject"]
        self.lease: float = fields["lease"]
        self.bundle = bundle
        self.state = state
        self.taken = False


def load(
    name: str,
    wait: float,
    lease: float,
    generation: int | None,
    make: Callable[[Loaded], T],
) -> Verb[T]:
    """Claim, read all of it, and `make` the claim; what cannot be read, or is interrupted, is given
    back with the reason."""
    check_name(name)
    check_seconds("wait", wait, messages.MAX_WAIT)
    check_seconds("lease", lease, messages.MAX_LEASE)
    if generation is not None and (type(generation) is not int or not 0 <= generation < 1 << 64):
        raise InvalidInput(f"generation wants what a save returned, not {generation!r:.100}")
    point("load:before")
    call = Call(
        {
            "verb": "load",
            "name": name,
            "wait": wait,
            "lease": lease,
            "generation": generation,
            "nonce": messages.nonce(),
        },
        wait=wait,
        tied=True,
    )
    bundle = -1
    state: State | None = None
    loaded: Loaded | None = None
    try:
        answer = yield call
        fields = answer.fields
        ticket = Ticket(name, fields)
    except (CprdError, GeneratorExit):
        raise
    except BaseException:
        yield from _undo(call, name, lambda ticket: _reject(ticket, "interrupted"))
        raise
    try:
        bundle = answer.bundle()
        point("load:claimed")
        state = unpack(bundle)
        point("load:unpacked")
        if state.fd_count != fields["fds"]:
            found = state.fd_count
            raise Damaged(f"its saver said {fields['fds']} descriptors; there are {found}")
        loaded = Loaded(ticket, fields, bundle, state)
        return make(loaded)
    except GeneratorExit:
        _let_go(bundle, state)
        raise
    except CprdError as error:  # claimed all the same: given back now, not with the lease
        _let_go(bundle, state)
        why = str(error)
        damaged = isinstance(error, Damaged)
        if damaged and state is None and fields["last_claimant"]:
            why += f"; pid {fields['last_claimant']} had claimed it last"
        yield _reject(ticket, why, damaged=damaged)
        if damaged:
            raise Damaged(f"{name!r} is damaged and will not be served again: {why}") from None
        raise  # whole, but not for us: another may read it
    except BaseException as error:
        if loaded is not None and loaded.taken:
            raise
        _let_go(bundle, state)
        try:
            yield from give_back(ticket, f"{type(error).__name__}: {error}")
        except CprdError:
            pass  # the end of the connection or of the lease has to do
        raise


def _let_go(bundle: int, state: State | None) -> None:
    import os

    if state is not None:
        state.close()
    if bundle >= 0:
        os.close(bundle)


def _reject(ticket: Ticket, why: str, *, damaged: bool = False) -> Call:
    return Call(
        {
            "verb": "reject",
            **ticket.fields(),
            "why": cut(why),
            "damaged": damaged,
            "nonce": messages.nonce(),
        }
    )


def give_back(ticket: Ticket, why: str) -> Verb[None]:
    """Reject because the program left: its end says it as well, so this is worth a moment only."""
    call = _reject(ticket, why)
    call.brief = True
    yield call


def renew(ticket: Ticket, lease: float | None) -> Verb[float]:
    if lease is not None:
        check_seconds("lease", lease, messages.MAX_LEASE)
    answer = yield Call({"verb": "renew", **ticket.fields(), "lease": lease})
    return float(answer.fields["lease"])


def begin(ticket: Ticket, process: Any) -> Verb[None]:
    fds: list[int] = []
    if process is not None:
        fds.append(open_descriptor("process", process))
    point("begin:before")
    yield Call(
        {"verb": "begin", **ticket.fields(), "process": bool(fds), "nonce": messages.nonce()}, fds
    )
    point("begin:answered")


def confirm(ticket: Ticket) -> Verb[str]:
    """Returns where the confirmation is kept."""
    point("confirm:before")
    call = Call({"verb": "confirm", **ticket.fields(), "nonce": messages.nonce()}, sure=True)
    answer, interrupt = yield from _outcome(call, ticket)
    point("confirm:answered")
    if interrupt is not None:
        raise interrupt
    return str(answer.fields["kept"])


def confirm_next(
    common: Common, ticket: Ticket, state: State, after_exit: Any, ttl: float | None
) -> Verb[Saved]:
    _check_state(state)
    packed = pack(state, common.forbidden())
    try:
        fields, fds = _bundle(packed, ttl, after_exit)
        point("confirm:before")
        call = Call(
            {"verb": "confirm_next", **ticket.fields(), **fields, "nonce": messages.nonce()},
            fds,
            sure=True,
        )
        answer, interrupt = yield from _outcome(call, ticket)
        point("confirm:answered")
        if interrupt is not None:
            raise interrupt
        return Saved(answer.fields)
    finally:
        packed.close()


def reject(ticket: Ticket, why: str) -> Verb[None]:
    if not isinstance(why, str):
        raise InvalidInput(f"why wants a str, not {why!r:.100}")
    point("reject:before")
    call = _reject(ticket, why)
    call.sure = True
    _, interrupt = yield from _outcome(call, ticket)
    point("reject:answered")
    if interrupt is not None:
        raise interrupt


def drop(name: str, force: bool) -> Verb[int]:
    check_name(name)
    _check_force(force)
    answer = yield Call({"verb": "drop", "name": name, "force": force, "nonce": messages.nonce()})
    return int(answer.fields["generation"])


def release(name: str, force: bool) -> Verb[int]:
    check_name(name)
    _check_force(force)
    answer = yield Call(
        {"verb": "release", "name": name, "force": force, "nonce": messages.nonce()}
    )
    return int(answer.fields["generation"])


def wait(name: str, timeout: float) -> Verb[int]:
    check_name(name)
    check_seconds("timeout", timeout, messages.MAX_WAIT)
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
    messages.split_name(name, 0)


def _check_state(state: State) -> None:
    if not isinstance(state, State):
        raise InvalidInput(f"wants a cprd.State, not {state!r:.100}")


def _check_force(force: bool) -> None:
    if not isinstance(force, bool):
        raise InvalidInput(f"force wants True or False, not {force!r:.100}")


def check_seconds(what: str, seconds: float, limit: float) -> None:
    """Raises InvalidInput unless it is a number of seconds that the daemon takes."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise InvalidInput(f"{what} wants seconds, not {seconds!r}")
    if not 0 <= seconds <= limit:
        raise InvalidInput(f"{what} wants 0 to {limit:g} seconds, not {seconds!r}")


def cut(why: str) -> str:
    """A reason as long as it may be on the wire."""
    return why.encode("utf-8", "replace")[: messages.MAX_REASON].decode("utf-8", "ignore")

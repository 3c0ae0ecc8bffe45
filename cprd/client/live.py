"""A live hold, once for every client: what speaks to cprd (see exchange.py).

`begin` is the verb live(), and makes a `Live`: what a predecessor left, or nothing. Once `owner`
is there, changes are kept (livestate.py has the verbs); until then the hold is claimed, and goes
back whole.
"""

from __future__ import annotations

import _socket as socket  # as in rights
import os
import threading
from time import monotonic
from weakref import ref

from cprd.bundle.unpack import unpack
from cprd.client.claim import (
    Ticket,
    check_seconds,
    check_timeout,
    named,
    rejection,
    warn,
)
from cprd.client.exchange import (
    BRIEF,
    FOREVER,
    Call,
    Line,
    Step,
    Work,
    check_not_here,
    live_here,
    place_of,
    request,
)
from cprd.client.owed import owe
from cprd.client.verbs import check_name, give_back, rows
from cprd.errors import (
    Busy,
    CprdError,
    Denied,
    Fenced,
    InvalidInput,
    LimitExceeded,
    NotHeld,
    Unavailable,
)
from cprd.linux.pause import point
from cprd.live import carrier
from cprd.live.owner import Owner, Place
from cprd.live.puts import fd_key, section_key
from cprd.live.queue import make_pair
from cprd.live.reader import Found, read
from cprd.live.records import PACKED, PACKED_MEMFD, RAW, RAW_MEMFD, Key
from cprd.live.takeover import take_over
from cprd.protocol import messages
from cprd.state import InlineSection, MemfdSection, State
from cprd.state.descriptors import duplicate
from cprd.state.sections import close_section

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType
    from typing import Any, TypeVar

    from cprd.client.exchange import Steps, Verb
    from cprd.live.steps import Defer
    from cprd.protocol.rows import Kept

    T = TypeVar("T")

AGAIN = 0.2  # s between two tries to put a hold back
PATTERN = ".*"


class Unsure:
    """A change whose end in this process's own copy may be due after an interrupt: of a section
    (None: deleted), owned, or of a descriptor (name, id) that a predecessor left and nobody took.
    `before`: the place of the key before the change."""

    __slots__ = ("before", "fd", "name", "section")

    def __init__(
        self, name: str, id: int | None, section: InlineSection | MemfdSection | None
    ) -> None:
        self.name = name
        self.fd = None if id is None else (name, id)
        self.section = section
        self.before: Place | None = None

    @property
    def key(self) -> Key:
        return section_key(self.name) if self.fd is None else fd_key(*self.fd)

    def is_made(self, after: Place | None) -> bool:
        """Whether the change was made, where `after` is the place of the key now."""
        section = self.section
        if after is None:
            return section is None
        if isinstance(section, InlineSection):
            return after[:2] == (PACKED if section.packed else RAW, section.data)
        if section is None and self.fd is None:
            return False
        is_elsewhere = self.before is None or after[2] is not self.before[2]
        return is_elsewhere and (section is None or after[0] in (PACKED_MEMFD, RAW_MEMFD))


class Root:
    """Both ends of the root, until an owner takes both; a copy of the receiving end, to park."""

    def __init__(self) -> None:
        self.tx, self.rx = make_pair()
        self._copy = _copy(self.rx)

    def park(self, inlet: socket.SocketType) -> None:
        try:
            carrier.park(inlet, self._copy.fileno())
        except ConnectionResetError as error:
            raise BrokenPipeError(error.errno, error.strerror) from None
        except BrokenPipeError:
            raise
        except OSError as error:
            raise LimitExceeded(f"cannot park the root of a live hold: {error.strerror}") from None

    def take(self) -> tuple[socket.SocketType, socket.SocketType]:
        """Both ends, the caller's from now on: those of a new root where they were taken before."""
        if self.rx.fileno() < 0:
            self._copy.close()
            self.tx, self.rx = make_pair()
            self._copy = _copy(self.rx)
        return self.tx, self.rx

    def close(self) -> None:
        """Close the copy, and the ends: for an owner, too."""
        for end in (self.tx, self.rx, self._copy):
            end.close()


def _copy(end: socket.SocketType) -> socket.SocketType:
    fd = duplicate(end.fileno(), "the root of a live hold")
    return socket.SocketType(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fd)


class Live:
    """A live hold of this process. Owns `owner`, `state` (descriptors that came and were not
    taken), `sections`, the bundle that was claimed, and the root."""

    def __init__(self, line: Line, ticket: Ticket, fields: dict[str, Any], root: Root) -> None:
        self.line = line
        self.ticket = ticket
        self.root = root
        self.found: bool = fields["found"]
        self.attempts: int = fields.get("attempts", 0)
        self.last_reject: str = fields.get("last_reject", "")
        self.last_end: str = fields.get("last_end", "")
        self.kept: Kept = fields["kept"]
        self.owner: Owner | None = None
        self.state = State()
        self.sections: dict[str, InlineSection | MemfdSection] = {}
        self.came: tuple[bytes, Any, Any] = self.state.columns()
        self.asked: set[str] = set()  # sections
        self.unsure: Sequence[Unsure] = ()
        self.changing: FrameType | None = None  # that makes the changes of `unsure`
        self.defer: Defer | None = None
        self.over: CprdError | None = None
        self.open = False
        self.watching = False
        self.pid = os.getpid()
        self._bundle = -1
        self._found: Found | None = None  # None: a saved bundle, or nothing
        self._made: Owner | None = None  # not confirmed yet
        self._confirming: Call | None = None
        self._stop: Callable[[], None] | None = None
        self._left = False

    # Opened

    def start(self) -> None:
        """Nothing was held: this process owns the hold from now on."""
        self.owner = Owner(*self.root.take(), _nonce(), defer=self.defer)
        self._found = None

    def read(self, bundle: int, is_live: bool) -> None:
        """Read what is held; `bundle` is owned from now on. Raises Damaged, LimitExceeded."""
        self._bundle = bundle
        if is_live:
            root = carrier.root_of(bundle)
            try:
                self._found = read(root)
            finally:
                os.close(root)
            self.state = self._found.state
        else:
            self.state = unpack(bundle)
        self.came = self.state.columns()
        self.sections = self.state.take_sections()

    @property
    def is_void(self) -> bool:
        """Whether a predecessor was live, and left nothing."""
        found = self._found
        return found is not None and not (self.sections or found.memories or found.state.fd_count)

    def taken(self) -> None:
        """The program has the hold: from now on `close` is due. Raises LimitExceeded."""
        if self.owner is not None:
            self._watch()
        self.line.hold(self.ticket)
        self.open = True
        live_here[place_of(self.line, self.ticket.name)] = ref(self)

    # Asked

    def writer(self) -> Owner:
        """Whoever keeps a change. Raises InvalidInput before confirm(), after the end, and in a
        forked child; Fenced."""
        if self.owner is not None:
            return self.owner
        self.check()
        raise InvalidInput(
            f"{self.ticket.name!r} still belongs to the predecessor: confirm() comes before the"
            " first change"
        )

    def check(self) -> None:
        """Raise unless the state may be asked."""
        if self.over is not None:
            raise type(self.over)(*self.over.args)
        if os.getpid() != self.pid:
            raise InvalidInput(
                "a live hold belongs to the process that opened it, not to a forked child: open the"
                " hold after the last fork (of a daemonizing program, too)"
            )

    def give_up(self, key: str, section: InlineSection | MemfdSection | None) -> None:
        """Close a section that is not, and will not be, that of `key`."""
        due = any(one.section is section for one in self.unsure)
        if not due and self.sections.get(key) is not section:
            close_section(section)

    def untaken(self) -> list[tuple[str, int] | str]:
        """What came and was never asked for."""
        came = [key for key in self.sections if key not in self.asked]
        return [*self.state.untaken(), *came]

    # Verbs

    def confirm(self, strict: bool, timeout: float | None) -> Verb[None]:
        check_timeout(timeout)
        self.check()
        if self.owner is not None:
            return
        untaken = self.untaken() if self.found else []
        if untaken and strict:
            raise InvalidInput(f"{named(untaken)} of {self.ticket.name!r} were never asked for")
        if self._made is None:
            self._made = yield Work(self._make)
        point("confirm:before")
        call = self._confirming or self.ticket.call("confirm_next", **carrier.PARKED, live=True)
        call.park, call.alone, call.timeout = self.root.park, True, timeout
        self._confirming = call
        try:
            answer = yield call
        except Fenced as error:
            self.over = error
            self._made.close()
            raise
        self._confirmed(answer.fields)
        yield Work(self._settle)
        point("confirm:answered")
        if untaken:
            warn(
                f"{named(untaken)} of the live hold {self.ticket.name!r} were never asked for"
                " before confirm(), and stay kept: delete what this program does not know"
            )

    def end(self, timeout: float | None) -> Verb[None]:
        check_timeout(timeout)
        owner = self.writer()
        self._unwatch()
        yield Work(owner.clear)
        yield self.ticket.last("end", timeout, keep=False)
        self.ticket.over = True
        yield from self.close()

    def leave(self, error: BaseException | None) -> Verb[None]:
        """The end of the block."""
        why = "left without confirm" if error is None else f"{type(error).__name__}: {error}"
        yield from self.close(why)

    def close(self, why: str = "closed without confirm") -> Verb[None]:
        """Stop owning; the next process finds all. An unconfirmed hold goes back."""
        if not self.open:
            return
        self.open = False
        told = False
        try:
            told = yield from self._tell(why)
        finally:
            try:
                yield Work(self._let_go)
            finally:
                self.line.part(self.ticket, stuck=not told)

    def _tell(self, why: str) -> Verb[bool]:
        """Returns whether cprd knows of the end."""
        self._unwatch()
        owner, self.owner = self.owner, None
        keep = self._left
        if owner is not None:
            try:
                keep = owner.kept > 0
            except CprdError:
                keep = True  # an interrupt left nobody knows what
            finally:
                owner.close()
        if self.ticket.over or isinstance(self.over, Fenced):
            return True
        if owner is None and not self._left:
            call = rejection(self.ticket, why)
        else:
            call = self.ticket.parting("end", keep=keep)
        self.ticket.over = True
        try:
            try:
                yield call
            except Fenced:  # over already, or cprd has ended since, and the hold is here alone
                if self.kept == "memory" and (keep or owner is None):
                    yield from self._leave_to_next()
        except Fenced:
            pass
        except CprdError:
            owe(self.line.path, call.message)  # the end of the process says it as well, later
            return False
        return True

    def _leave_to_next(self) -> Verb[None]:
        """Put the hold back, and own no more: cprd was started anew, and nobody was faster. What
        was claimed goes back by a root of this process."""
        if self._bundle >= 0 and self._made is None:
            self._made = yield Work(self._make)
        call = self.ticket.parting("put_back")
        call.park, call.alone = self.root.park, True
        answer = yield call
        self.ticket.renumber(answer.fields)
        answer.close()
        yield self.ticket.parting("end", keep=True)

    def silence(self) -> None:
        """End this process's use of the kept sockets without a word. The hold stays as it is."""
        owner = self.writer()
        from cprd.linux.inert import silence

        self.over = InvalidInput(
            f"leave() was called: {self.ticket.name!r} belongs to the next process from now on"
        )
        self.owner = None  # no other thread keeps a socket more
        try:
            silence(owner.sockets())
        except (CprdError, OSError) as error:
            self.over, self.owner = None, owner
            if isinstance(error, OSError):
                raise LimitExceeded(f"leave(): no descriptor left ({error.strerror})") from None
            raise
        self._left = True
        owner.close()

    # Within

    def _make(self) -> Owner:
        """The owner of what was found, unknown to cprd so far."""
        ends = self.root.take()
        if self._found is not None:
            return take_over(self._found, *ends, hold=_nonce(), defer=self.defer)
        owner = Owner(*ends, _nonce(), defer=self.defer)
        state: State | None = None
        try:
            state = unpack(self._bundle)  # all of it: the program may have taken and closed some
            with owner.batch() as batch:
                for name, id, fd in state.fds():
                    batch.save_fd(name, id, fd)
                for key, section in state.sections():
                    if isinstance(section, MemfdSection):
                        batch.save_section_fd(key, section.fd, packed=section.packed)
                    else:
                        batch.save_section(key, section)
            return owner
        except BaseException:
            owner.close()
            raise
        finally:
            if state is not None:
                state.close()

    def _confirmed(self, fields: dict[str, Any]) -> None:
        self.ticket.renumber(fields)
        self.kept = fields["kept"]
        self.owner, self._made, self._confirming = self._made, None, None
        try:
            self._watch()
        except LimitExceeded as error:
            warn(
                f"{self.ticket.name!r} is confirmed, and would end with cprd, which keeps the hold"
                f" in memory: {error}"
            )

    def _settle(self) -> None:
        self._unpark()
        if self.owner is not None:
            try:
                self.owner.settle()
            except LimitExceeded:
                pass  # the next change does it

    def _unpark(self) -> None:
        found, self._found = self._found, None
        bundle, self._bundle = self._bundle, -1
        if found is not None:
            found.close()
        if bundle >= 0:
            os.close(bundle)

    def _let_go(self) -> None:
        if self.over is None:
            self.over = InvalidInput(
                f"this live hold is closed: take what you need inside the block, and open"
                f" {self.ticket.name!r} anew"
            )
        try:
            if self._made is not None:
                self._made.close()
            self.state.close()
            for section in (
                *self.sections.values(),
                *[one.section for one in self.unsure],
            ):
                close_section(section)
            self.sections.clear()
            self.unsure = ()
        finally:
            self._unpark()
            self.root.close()

    # cprd keeps in memory, and ends

    def _watch(self) -> None:
        if self.kept == "memory":
            self.watching = True
            line = self.line.apart()
            line.users.add(self)
            steps = self._watched(line)
            try:
                self._stop = line.start(steps)
            except LimitExceeded:
                self.watching = False
                line.users.clear()
                raise

    def _unwatch(self) -> None:
        self.watching = False
        stop, self._stop = self._stop, None
        if stop is not None:
            stop()

    def _watched(self, line: Line) -> Steps[None]:
        """Put the hold back into each cprd that comes after the present one. The first time at
        once, which changes nothing unless cprd has ended since."""
        try:
            while self.watching:
                if (yield from self._put_back(line)):
                    yield Step("watch", FOREVER, False)
                else:
                    yield Step("sleep", monotonic() + AGAIN, False)
        finally:
            line.users.clear()
            line.settle()

    def _put_back(self, line: Line) -> Steps[bool]:
        """Returns whether cprd has the hold, or somebody else."""
        call = self.ticket.call("put_back", timeout=BRIEF)
        call.park, call.alone = self.root.park, True
        point("put_back:before")
        try:
            answer = yield from request(line, call)
        except (Fenced, Denied, NotHeld) as error:
            self.watching = False
            if self.owner is not None:
                self.owner.fence(Fenced(f"{self.ticket.name!r} could not be put back: {error}"))
            return True
        except CprdError:
            return False
        self.ticket.renumber(answer.fields)
        answer.close()
        point("put_back:answered")
        return True


def begin(
    line: Line,
    make: Callable[[Live], T],
    name: str,
    wait: float,
    lease: float,
    timeout: float | None,
    defer: Defer | None,
) -> Verb[T]:
    """Claim what is left under `name`, or begin with nothing; NAME.* takes any that is left, or
    the next number."""
    check_name(name)
    check_seconds("wait", wait, messages.MAX_WAIT)
    check_seconds("lease", lease, messages.MAX_LEASE, messages.MIN_LEASE)
    check_timeout(timeout)

    def take(name: str, wait: float) -> Verb[T]:
        made = None
        while made is None:
            made = yield from _claim_or_begin(line, make, name, wait, lease, timeout, defer)
        return made

    if not name.endswith(PATTERN):
        made = yield from take(name, wait)
        return made
    number = 0
    base = name.removesuffix("*")
    there = yield from rows(timeout)
    uid, plain = messages.split_name(base, line.common.uid)
    of = base.removesuffix(plain)  # UID/, or nothing
    phases = {of + row["name"]: row["phase"] for row in there if row["uid"] == uid}
    left = [each for each in phases if _number(each, base) and phases[each] == "held"]
    left.sort(key=lambda each: _number(each, base))
    while True:
        if left:
            found = left.pop(0)
        else:
            number += 1
            found = f"{base}{number}"
            if found in phases:
                continue
        try:
            made = yield from take(found, 0.0)
            return made
        except Busy:
            continue  # another was faster


def _number(name: str, base: str) -> int:
    """The number of a name that begins with `base`; 0: none."""
    rest = name.removeprefix(base)
    return int(rest) if name != rest and rest.isascii() and rest.isdigit() else 0


def _claim_or_begin(
    line: Line,
    make: Callable[[Live], T],
    name: str,
    wait: float,
    lease: float,
    timeout: float | None,
    defer: Defer | None,
) -> Verb[T | None]:
    """Returns None where an owner had left a hold with nothing in it, which has ended now."""
    check_not_here(line, name)
    root = Root()
    live: Live | None = None
    fields: dict[str, Any] = {}
    try:
        point("live:before")
        call = Call(
            {"verb": "live", "name": name, "lease": lease, "nonce": messages.nonce()},
            park=root.park,
            wait=wait,
            timeout=timeout,
            ends_with_connection=True,
            alone=True,
        )
        answer = yield call
        fields = answer.fields
        live = Live(line, Ticket(name, fields), fields, root)
        live.defer = defer
        point("live:answered")
        if live.found:
            live.read(answer.bundle(), fields["live"])
            point("live:read")
            if live.is_void:
                try:
                    yield live.ticket.call("confirm", timeout=timeout)
                except Fenced:
                    pass  # cprd has ended since
                yield Work(live._let_go)
                return None
        else:
            live.start()
        return make(live)
    except BaseException as error:
        if live is None:
            root.close()
            raise
        if live.open:
            raise  # the program's by now
        yield from _undo(live, fields, error)
        raise


def _undo(live: Live, fields: dict[str, Any], error: BaseException) -> Verb[None]:
    """What could not be read goes back; what has begun ends."""
    owner, live.owner = live.owner, None
    if owner is not None:
        owner.close()
    yield Work(live._let_go)
    if live.found:
        yield from give_back(live.line, live.ticket, fields, error)
    elif not isinstance(error, GeneratorExit):
        call = live.ticket.parting("end", keep=False)
        try:
            yield call
        except Unavailable:
            owe(live.line.path, call.message)
        except CprdError:
            pass  # the end of the process has to do


def elsewhere(do: Callable[[], object]) -> None:
    """Call in a thread of its own: what lets go of a file may block, in an event loop, too."""
    threading.Thread(target=do, daemon=True).start()


def _nonce() -> int:
    return int.from_bytes(os.urandom(8), "little") or 1

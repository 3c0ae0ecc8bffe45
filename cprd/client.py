"""The blocking client. It imports nothing heavy: it runs while a service is down."""

from __future__ import annotations

import os
import socket
import time

from cprd import link, verbs, wire
from cprd.errors import (
    CprdError,
    Fenced,
    InvalidInput,
    LimitExceeded,
    ProtocolError,
    Timeout,
    Unavailable,
)
from cprd.rights import close_all
from cprd.state import State
from cprd.verbs import Saved, Ticket

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any, TypeVar

    from cprd.state import HasFileno

    T = TypeVar("T")

__all__ = ["Claim", "Daemon", "Prepared", "Saved", "connect"]


def connect(path: str | os.PathLike[str] | None = None) -> Daemon:
    """Connect to cprd at `path` (default: $CPRD_SOCKET, else /run/cprd/cprd.sock) and say hello.

    Raises Unavailable at once when nobody answers, Denied, LimitExceeded, ProtocolError."""
    return Daemon(link.where(path))


class _Connection:
    """The socket, shared by a Daemon and the claims made through it; closed with the last user."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.pid = os.getpid()
        self.users = 1
        self.greeting: dict[str, Any] = {}
        self._sock: socket.socket | None = None
        for tries in range(link.HELLOS):
            if tries:
                time.sleep(link.RETRY_EVERY)
            try:
                self._open()
                return
            except link.Lost:
                continue
        raise Unavailable(f"cprd at {path} closed the connection before it said hello")

    def _open(self) -> None:
        self._sock = link.open_socket(self.path)
        try:
            self.greeting = self._steps(verbs.hello(), 0.0)
        except BaseException:
            self._break()
            raise

    def _break(self) -> None:
        sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()

    def fileno(self) -> int:
        return self._sock.fileno() if self._sock is not None else -1

    def forbidden(self) -> tuple[int, ...]:
        return () if self._sock is None else (self._sock.fileno(),)

    def run(self, verb: verbs.Verb[T], *, patience: float = link.RETRY_FOR) -> T:
        """Run a verb to its end; requests are said again where their connection is lost."""
        if self.pid != os.getpid():
            raise InvalidInput("this connection belongs to the parent process: connect() anew")
        if not self.users:
            raise Unavailable("the connection has been closed: connect() anew")
        try:
            return self._steps(verb, patience)
        except link.Lost:
            raise Unavailable("the connection is lost") from None

    def _steps(self, verb: verbs.Verb[T], patience: float) -> T:
        try:
            call = next(verb)
            while True:
                try:
                    answer = self._exchange_again(call, patience)
                except CprdError as error:
                    call = verb.throw(error)
                else:
                    try:
                        call = verb.send(answer)
                    finally:
                        close_all(answer.fds)  # what nobody took
        except StopIteration as end:
            value: T = end.value
            return value
        finally:
            verb.close()

    def _exchange_again(self, call: verbs.Call, patience: float) -> verbs.Answer:
        if not patience:
            return self._exchange(call)
        give_up = 0.0
        began = time.monotonic()
        while True:
            tried = time.monotonic()
            try:
                if self._sock is None:
                    self._open()
                return self._exchange(call.after(tried - began))
            except (link.Lost, Unavailable) as error:
                # The daemon restarts, or its idle deadline passed. Every request that changes
                # something has a nonce, so saying it twice does it once.
                now = time.monotonic()
                if now - tried > link.SERVED:  # it was there in between
                    give_up = 0.0
                give_up = give_up or now + patience
                if now >= give_up:
                    why = error if isinstance(error, Unavailable) else "the connection is lost"
                    raise Unavailable(f"no answer: {why}") from None
                time.sleep(link.RETRY_EVERY if self._sock is None else 0.0)
                self._break()

    def _exchange(self, call: verbs.Call) -> verbs.Answer:
        if self._sock is None:
            raise link.Lost
        try:
            self._sock.settimeout(wire.MUTE)
            link.send_call(self._sock, call, 0)
            self._sock.settimeout(wire.MUTE + call.wait)
            return link.read(self._sock, 0)
        except TimeoutError:
            self._break()
            raise Timeout(
                f"cprd at {self.path} accepted the connection and has not answered within"
                f" {wire.MUTE + call.wait:g} s"
            ) from None
        except link.Lost:
            self._break()
            raise
        except ProtocolError:
            self._break()
            raise
        except CprdError:
            raise
        except BaseException:  # the answer may still come: this connection is out of step
            self._break()
            raise

    def leave(self) -> None:
        self.users -= 1
        if not self.users and self.pid == os.getpid():
            self._break()


class Daemon:
    """A connection to cprd. Not for use by several threads at once.

    In a child of fork() it is of no use, and harmless: leaving its block there does nothing."""

    def __init__(self, path: str) -> None:
        self._connection = _Connection(path)
        self._closed = False

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_closed"):
            self.close()

    def close(self) -> None:
        """Close the connection, unless claims or prepared saves still need it; then with them."""
        if not self._closed and self._connection.pid == os.getpid():
            self._closed = True
            self._connection.leave()

    def fileno(self) -> int:
        """The connection's socket, -1 when there is none; still owned here."""
        return self._connection.fileno()

    @property
    def greeting(self) -> dict[str, Any]:
        """What the daemon said of itself: version, server, limits, kept, lease_by, uid, pid."""
        return dict(self._connection.greeting)

    def save(
        self,
        name: str,
        state: State,
        *,
        if_exists: str = "error",
        ttl: float | None = None,
        after_exit: bool | int | HasFileno = False,
        require: str | None = None,
    ) -> Saved:
        """Leave `state` under `name`; its descriptors stay the caller's.

        `if_exists`: "error" or "replace". `ttl`: seconds until it is dropped unless loaded.
        `after_exit`: not served before this process (True), or that of a pidfd, has ended.
        `require="store"`: fail where it would only be kept in memory.
        Raises AlreadyHeld, Busy, Denied, LimitExceeded, Damaged, InvalidInput, Unavailable."""
        run = self._connection.run
        return Saved(run(self._save("save", name, state, if_exists, ttl, after_exit, require)))

    def prepare(
        self,
        name: str,
        state: State,
        *,
        if_exists: str = "error",
        ttl: float | None = None,
        after_exit: bool | int | HasFileno = False,
        require: str | None = None,
    ) -> Prepared:
        """The first half of save: kept, and not served before commit()."""
        verb = self._save("prepare", name, state, if_exists, ttl, after_exit, require)
        fields = self._connection.run(verb)
        return Prepared(self._connection, Ticket(name, fields), fields["kept"])

    def _save(
        self,
        verb: str,
        name: str,
        state: State,
        if_exists: str,
        ttl: float | None,
        after_exit: bool | int | HasFileno,
        require: str | None,
    ) -> verbs.Verb[dict[str, Any]]:
        forbidden = self._connection.forbidden()
        return verbs.save(verb, forbidden, name, state, if_exists, ttl, after_exit, require)

    def load(
        self, name: str, *, wait: float = 0.0, lease: float = 30.0, generation: int | None = None
    ) -> Claim:
        """Claim what is held under `name`, whole. `wait`: seconds to wait for it at most; `lease`:
        seconds until an unconfirmed claim goes back; `generation`: only this one (else Fenced).

        Raises NotHeld, Busy (with the reason), Damaged, LimitExceeded (it does not fit here; it
        stays held), Denied, Unavailable."""
        loaded = self._connection.run(verbs.load(name, wait, lease, generation))
        return Claim(self._connection, loaded)

    def list(self) -> list[dict[str, Any]]:
        """A row a hold: name, generation, phase, uid, fds, bytes, age and expires (s), attempts,
        reason. One's own; for root, everybody's."""
        return self._connection.run(verbs.rows())

    def show(self, name: str) -> dict[str, Any]:
        """The row of one hold with "descriptors" (name, id, what each is) and "sections" (key,
        kind, bytes; the value of a small one). Nothing is claimed, consumed or disturbed."""
        from cprd.peek import describe_bundle

        row, bundle = self._connection.run(verbs.show(name))
        return describe_bundle(row, bundle)

    def status(self) -> dict[str, Any]:
        """The daemon's own state: server, pid, uptime, kept, phases, uids, connections, limits."""
        return self._connection.run(verbs.status())

    def wait(self, name: str, timeout: float = wire.MAX_WAIT) -> int:
        """Wait until `name` could be loaded, at most `timeout` seconds. Returns its generation.

        Raises what a load would raise when the time is over: NotHeld, Busy."""
        return self._connection.run(verbs.wait(name, timeout))

    def drop(self, name: str, *, force: bool = False) -> int:
        """End a hold without a successor. Returns its generation. Raises NotHeld, Busy."""
        return self._connection.run(verbs.drop(name, force))

    def release(self, name: str, *, force: bool = True) -> int:
        """Serve again what is in doubt: for whoever knows that nothing acts on it. Returns its
        generation. Raises NotHeld, Busy."""
        return self._connection.run(verbs.release(name, force))


class Prepared:
    """A save that is kept and not served yet. Ends by commit() or abort(); what ends without
    either (with its connection or its process) is in doubt."""

    def __init__(self, connection: _Connection, ticket: Ticket, kept: str) -> None:
        self._connection = connection
        self._ticket = ticket
        self._open = True
        self.kept = kept
        connection.users += 1

    @property
    def generation(self) -> int:
        return self._ticket.generation

    def commit(self) -> Saved:
        """From now on it is held. Raises Fenced."""
        saved = self._connection.run(verbs.commit(self._ticket))
        self._end()
        return saved

    def abort(self) -> None:
        """It never was. Raises Fenced."""
        self._connection.run(verbs.abort(self._ticket))
        self._end()

    def _end(self) -> None:
        if self._open:
            self._open = False
            self._connection.leave()

    def __del__(self) -> None:
        if getattr(self, "_open", False) and self._connection.pid == os.getpid():
            self._end()


class Claim:
    """An exclusive lease on a hold, and its state.

    As a block: leaving it confirms, an exception (SystemExit and KeyboardInterrupt too) rejects,
    except after begin(): then it stays in doubt. Build inside, act after it. Descriptors not taken
    and sections end with the block, or with close(); confirm() alone closes nothing."""

    def __init__(self, connection: _Connection, loaded: verbs.Loaded) -> None:
        self._connection = connection
        self._ticket = loaded.ticket
        self._bundle = loaded.bundle
        self._open = True  # confirm and reject still make sense
        self._begun = False
        self._closed = False
        self.state = loaded.state
        self.attempts = loaded.attempts  # how often it was loaded, this time included
        self.last_reject = loaded.last_reject  # why the one before gave it back; ""
        self.lease = loaded.lease
        connection.users += 1

    @property
    def generation(self) -> int:
        return self._ticket.generation

    def renew(self, lease: float | None = None) -> float:
        """Begin the lease anew, by `lease` seconds (default: as long as before). Returns how long
        it is. Raises Fenced when it was over already."""
        return self._connection.run(verbs.renew(self._ticket, lease))

    def begin(self, process: int | HasFileno | None = None) -> None:
        """Say that from here on acting cannot be undone: what is left behind by a death is in
        doubt. `process`: the pidfd (borrowed) of who acts. Raises Fenced."""
        before, self._begun = self._begun, True
        try:
            self._connection.run(verbs.begin(self._ticket, process))
        except (InvalidInput, LimitExceeded, Fenced):  # refused: nothing has begun by this
            self._begun = before
            raise

    def confirm(
        self,
        next: State | None = None,
        after_exit: bool | int | HasFileno = True,
        ttl: float | None = None,
    ) -> Saved | None:
        """The point of no return: the hold ends, and this process acts on it.

        With `next`, that state is held instead, in the same step; it is served once this process
        (after_exit=True), or that of a pidfd, has ended. Raises Fenced: then do not act."""
        self._need_open()
        saved: Saved | None = None
        if next is None:
            self._connection.run(verbs.confirm(self._ticket))
        else:
            forbidden = self._connection.forbidden()
            verb = verbs.confirm_next(forbidden, self._ticket, next, after_exit, ttl)
            saved = self._connection.run(verb)
        self._open = False
        return saved

    def reject(self, why: str = "") -> None:
        """Give it back, whole, for another to try. Raises Fenced."""
        self._need_open()
        self._connection.run(verbs.reject(self._ticket, why))
        self._open = False

    def _need_open(self) -> None:
        if not self._open or self._closed:
            raise Fenced("this claim has been confirmed, rejected or closed already")

    def close(self) -> None:
        """Close what was not taken, and the claim: unconfirmed, the hold goes back (after begin()
        it stays in doubt). Safe to repeat; does nothing in a child of fork()."""
        if self._closed or self._connection.pid != os.getpid():
            return
        self._closed = True
        self.state.close()
        if self._open and not self._begun:
            try:
                why = "closed without confirm"
                self._connection.run(verbs.reject(self._ticket, why), patience=link.GIVE_BACK)
            except CprdError:
                pass  # its end says it as well
        self._open = False
        os.close(self._bundle)
        self._connection.leave()

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._connection.pid != os.getpid():
            return
        try:
            if not self._open or self._closed:
                return
            if error is None:
                self.confirm()
            elif not self._begun:
                self._open = False
                try:
                    why = verbs.cut(f"{type(error).__name__}: {error}")
                    self._connection.run(verbs.reject(self._ticket, why), patience=link.GIVE_BACK)
                except CprdError:
                    pass  # the exception that is on its way says more, and the end says it too
        finally:
            self.close()

    def __del__(self) -> None:
        if getattr(self, "_closed", True):
            return
        if self._connection.pid == os.getpid():
            self.close()

"""The blocking client. It imports nothing heavy: it runs while a service is down."""

from __future__ import annotations

import os
import time

from cprd.client import link, verbs
from cprd.client.verbs import Saved, Ticket
from cprd.errors import CprdError, Fenced, InvalidInput, LimitExceeded, Timeout, Unavailable
from cprd.protocol import messages
from cprd.state import State

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any, TypeVar

    from cprd.state import HasFileno

    T = TypeVar("T")

__all__ = ["Claim", "Daemon", "Prepared", "Saved", "connect"]


def connect(path: str | os.PathLike[str] | None = None) -> Daemon:
    """Connect to cprd at `path` (default: $CPRD_SOCKET, else /run/cprd/cprd.sock) and say hello.

    Raises Unavailable at once when nobody answers, Denied, LimitExceeded, ProtocolError."""
    connection = _Connection(link.where(path))
    connection.open()
    return Daemon(connection)


class _Connection(link.Line):
    """The socket, and how to wait at it."""

    def open(self) -> None:
        for tries in range(link.HELLOS):
            if tries:
                time.sleep(link.RETRY_EVERY)
            try:
                self._open()
                return
            except link.Lost:
                continue
        raise Unavailable(f"cprd at {self.path} closed the connection before it said hello")

    def _open(self, *, brief: bool = False) -> None:
        try:
            self._use(link.open_socket(self.path))
            self._greeted(self._steps(verbs.hello(brief=brief), self._exchange))
        except BaseException:
            self._break()
            raise

    def for_waiting(self, wait: float) -> _Connection:
        """The one to wait with, which the caller leaves: what is interrupted while it waits ends
        its connection, and may end nothing else."""
        self.check()
        if wait and self.tickets:
            return self.apart()
        self.users += 1
        return self

    def run(self, verb: verbs.Verb[T]) -> T:
        """Run a verb to its end; requests are said again where their connection is lost."""
        self.check()
        try:
            return self._steps(verb, self._exchange_again)
        except link.Lost:
            raise Unavailable("the connection is lost") from None
        finally:
            if self._owed is not None:
                self._put_aside()

    def _steps(self, verb: verbs.Verb[T], exchange: Callable[[verbs.Call], verbs.Answer]) -> T:
        try:
            call = next(verb)
            while True:
                try:
                    answer = exchange(call)
                except CprdError as error:
                    call = verb.throw(error)
                except link.Lost:
                    raise
                except BaseException as interrupt:
                    if self._may_end(call) or isinstance(interrupt, verbs.Abandoned):
                        raise
                    call = verb.throw(interrupt)
                else:
                    try:
                        call = verb.send(answer)
                    finally:
                        answer.close()  # what nobody took
        except StopIteration as end:
            value: T = end.value
            return value
        finally:
            verb.close()

    def _exchange_again(self, call: verbs.Call) -> verbs.Answer:
        give_up = 0.0
        began = time.monotonic()
        while True:
            tried = time.monotonic()
            try:
                if self._sock is None and not self._in_step_again():
                    self._open(brief=call.brief)
                return self._exchange(call.after(tried - began))
            except (link.Lost, Unavailable) as error:
                # The daemon restarts, or its idle deadline passed. Every request that changes
                # something has a nonce, so saying it twice does it once.
                now = time.monotonic()
                if now - tried > link.SERVED:  # it was there in between
                    give_up = 0.0
                give_up = give_up or now + link.patience(call)
                if now >= give_up:
                    why = error if isinstance(error, Unavailable) else "the connection is lost"
                    raise Unavailable(f"no answer: {why}") from None
                time.sleep(link.RETRY_EVERY if self._sock is None else 0.0)
                self._break()

    def _exchange(self, call: verbs.Call) -> verbs.Answer:
        """Send a call and read its answer; one that was interrupted is not sent again as long as
        its answer may still come."""
        again = self._owed is call
        if self._owed is not None and not again:
            self._put_aside()
        if self._sock is None or self._sock.fileno() < 0:  # collected as garbage before us
            self._break()
            raise link.Lost
        seconds = link.LATE if again else link.mute(call) + call.wait
        try:
            if not again:
                self._sock.settimeout(link.mute(call))
                self._owed = call
                link.send_call(self._sock, call, 0)
            self._sock.settimeout(seconds)
            answer = link.read(self._sock, 0)
        except TimeoutError:
            if again:  # it was lost with the interrupt: by its nonce it can be had anew
                self._put_aside()
                raise link.Lost from None
            raise Timeout(
                f"cprd at {self.path} accepted the connection and has not answered within"
                f" {seconds:g} s"
            ) from None
        except (link.Lost, messages.Garbled):
            self._break()
            raise
        except CprdError:
            self._owed = None
            raise
        self._owed = None
        return answer


class Daemon:
    """A connection to cprd. Not for use by several threads at once.

    In a child of fork() it is of no use, and harmless: leaving its block there does nothing."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
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
        verb = self._save("save", name, state, if_exists, ttl, after_exit, require)
        return Saved(self._connection.run(verb))

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
        common = self._connection.common
        return verbs.save(verb, common, name, state, if_exists, ttl, after_exit, require)

    def load(
        self, name: str, *, wait: float = 0.0, lease: float = 30.0, generation: int | None = None
    ) -> Claim:
        """Claim what is held under `name`, whole. `wait`: seconds to wait for it at most; `lease`:
        seconds until an unconfirmed claim goes back; `generation`: only this one (else Fenced).

        Raises NotHeld, Busy (with the reason), Damaged, LimitExceeded (it does not fit here; it
        stays held), Denied, Unavailable."""
        connection = self._connection.for_waiting(wait)
        try:

            def make(loaded: verbs.Loaded) -> Claim:
                return Claim(connection, loaded)

            return connection.run(verbs.load(name, wait, lease, generation, make))
        finally:
            connection.leave()

    def list(self) -> list[dict[str, Any]]:
        """A row a hold: name, generation, phase, uid, fds, bytes, age and expires (s), attempts,
        reason. One's own; for root, everybody's."""
        return self._connection.run(verbs.rows())

    def show(self, name: str) -> dict[str, Any]:
        """The row of one hold with "descriptors" (name, id, what each is) and "sections" (key,
        kind, bytes; the value of a small one). Nothing is claimed, consumed or disturbed."""
        from cprd.bundle.inspect import describe_bundle

        row, bundle = self._connection.run(verbs.show(name))
        return describe_bundle(row, bundle)

    def status(self) -> dict[str, Any]:
        """The daemon's own state: server, pid, uptime, kept, phases, uids, connections, limits."""
        return self._connection.run(verbs.status())

    def wait(self, name: str, timeout: float = messages.MAX_WAIT) -> int:
        """Wait until `name` could be loaded, at most `timeout` seconds. Returns its generation.

        Raises what a load would raise when the time is over: NotHeld, Busy."""
        connection = self._connection.for_waiting(timeout)
        try:
            return connection.run(verbs.wait(name, timeout))
        finally:
            connection.leave()

    def drop(self, name: str, *, force: bool = False) -> int:
        """End a hold without a successor. Returns its generation. Raises NotHeld, Busy."""
        return self._connection.run(verbs.drop(name, force))

    def release(self, name: str, *, force: bool = True) -> int:
        """Serve again what is in doubt: for whoever knows that nothing acts on it. Returns its
        generation. Raises NotHeld, Busy."""
        return self._connection.run(verbs.release(name, force))


class Prepared:
    """A save that is kept and not served yet. Ends by commit() or abort(); what ends without
    either (with its connection or its process) is in doubt.

    An interrupt (KeyboardInterrupt, ...) of either goes on once it is known what became of it; a
    second one does so at once."""

    def __init__(self, connection: _Connection, ticket: Ticket, kept: str) -> None:
        self._connection = connection
        self._ticket = ticket
        self.kept = kept
        connection.users += 1
        connection.tickets += 1
        self._open = True

    @property
    def generation(self) -> int:
        return self._ticket.generation

    def commit(self) -> Saved:
        """From now on it is held. Raises Fenced."""
        return self._say(verbs.commit(self._ticket, self._connection.common))

    def abort(self) -> None:
        """It never was. Raises Fenced."""
        self._say(verbs.abort(self._ticket))

    def _say(self, verb: verbs.Verb[T]) -> T:
        try:
            return self._connection.run(verb)
        finally:
            if self._ticket.over:
                self._end()

    def _end(self) -> None:
        if self._open:
            self._open = False
            self._connection.part()

    def __del__(self) -> None:
        if getattr(self, "_open", False) and self._connection.pid == os.getpid():
            self._end()


class Claim:
    """An exclusive lease on a hold, and its state.

    As a block: leaving it confirms, an exception (SystemExit and KeyboardInterrupt too) rejects,
    except after begin(): then it stays in doubt, until confirm() or reject() is said after all.
    Build inside, act after it. Descriptors not taken and sections end with the block, or with
    close(); confirm() alone closes none of them.

    An interrupt (KeyboardInterrupt, ...) of confirm(), or of the end of a block, goes on once it is
    known what became of it: interrupted or not, a state is acted on by one. A second interrupt ends
    that attempt."""

    def __init__(self, connection: _Connection, loaded: verbs.Loaded) -> None:
        self._connection = connection
        self._ticket = loaded.ticket
        self._bundle = loaded.bundle
        self._begun = False
        self._stuck = False  # the daemon may have to learn of its end by the connection's
        self.state = loaded.state
        self.attempts = loaded.attempts  # how often it was loaded, this time included
        self.last_reject = loaded.last_reject  # why the one before gave it back; ""
        self.lease = loaded.lease
        connection.common.claimed(self._ticket)
        # No call from here on: what is interrupted before has nothing to leave, after it all.
        connection.users += 1
        connection.tickets += 1
        loaded.taken = True
        self._closed = False

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
        except BaseException:
            self._stuck = True  # whether it has begun, only the daemon knows
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
        saved: Saved | None = None
        if next is None:
            self._say(verbs.confirm(self._ticket))
        else:
            common = self._connection.common
            saved = self._say(verbs.confirm_next(common, self._ticket, next, after_exit, ttl))
        self._unpark()
        return saved

    def _unpark(self) -> None:
        """Let go of the bundle: as long as it is here, what was taken and closed since is open."""
        bundle, self._bundle = self._bundle, -1
        if bundle >= 0:
            os.close(bundle)

    def reject(self, why: str = "") -> None:
        """Give it back, whole, for another to try. After begin() it says that nothing ran, and can
        be said after the block, too. Raises Fenced."""
        self._say(verbs.reject(self._ticket, why))

    def _say(self, verb: verbs.Verb[T]) -> T:
        """What ends the claim; in doubt, also when it was closed."""
        if self._ticket.over or (self._closed and not self._begun):
            raise Fenced("this claim has been confirmed, rejected or closed already")
        connection = self._connection.speaker()
        try:
            return connection.run(verb)
        finally:
            connection.leave()

    def close(self) -> None:
        """Close what was not taken, and the claim: unconfirmed, the hold goes back (after begin()
        it stays in doubt). Safe to repeat; does nothing in a child of fork()."""
        if self._closed or self._connection.pid != os.getpid():
            return
        self._closed = True
        try:
            self.state.close()
            if not self._begun:
                self._give_back("closed without confirm")
        finally:
            self._unpark()
            self._connection.common.forget(self._ticket)
            self._connection.part(stuck=self._stuck)

    def _give_back(self, why: str) -> None:
        if self._ticket.over:
            return
        self._ticket.over = self._stuck = True
        try:
            self._connection.run(verbs.give_back(self._ticket, why))
        except Fenced:
            pass  # it was over already
        except CprdError:
            return  # the end of its connection says it as well
        self._stuck = False

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
            if self._ticket.over or self._closed:
                return
            if error is None:
                self.confirm()
            elif not self._begun:
                self._give_back(f"{type(error).__name__}: {error}")
        finally:
            self.close()

    def __del__(self) -> None:
        if getattr(self, "_closed", True):
            return
        if self._connection.pid == os.getpid():
            self.close()

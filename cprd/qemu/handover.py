"""One hand-over between a source QEMU and cprd: the steps that save and upgrade share.

Cprd may be dead or mute. A guest that stands still waits a second for cprd, not longer: the guest
is let go on first, and the fate of the request is found out afterwards. Only `commit` waits longer,
for by then the guest is cprd's.
"""

from __future__ import annotations

import select
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from cprd.errors import Busy, CprdError, Fenced, NotHeld, Timeout, Unavailable
from cprd.linux.pause import point
from cprd.qemu import signals
from cprd.qemu.doubt import look, row_of
from cprd.qemu.errors import DaemonAway, Failed, InDoubt, MonitorLost, MonitorRefused, one_line
from cprd.qemu.files import taken_by_others
from cprd.qemu.signals import Deadline
from cprd.qemu.source import describe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cprd import Daemon, Prepared, Saved, State
    from cprd.protocol.rows import IfExists
    from cprd.qemu.monitor import Monitor
    from cprd.qemu.source import Source

    T = TypeVar("T")

TURNS = 3  # how often a hand-over is tried, when cprd was away for a moment
STANDING = 1.0  # s that a guest may stand still for want of an answer
COMMIT = 15.0  # s that cprd may be away while the guest stands still, before we give up on it
_PATIENCE = 2.0  # s for cprd to see that the connection of an unanswered request has ended


def repeated(hand_over: Callable[[], T]) -> T:
    """Make a hand-over, and again when cprd was away for a moment."""
    for _ in range(TURNS - 1):
        try:
            return hand_over()
        except DaemonAway:
            continue
    return hand_over()


@contextmanager
def untouched() -> Iterator[None]:
    """A block before anything was asked of the QEMU: a signal may end any wait in there."""
    try:
        with signals.allowed():
            yield
    except signals.Interrupted as error:
        raise signals.Interrupted(f"{error}; the guest is in its QEMU as it was") from None


class Handover:
    """One hand-over of a source's guest under a name. Borrows all of its parts."""

    def __init__(self, daemon: Daemon, name: str, source: Source) -> None:
        self.daemon = daemon
        self.name = name
        self.source = source
        self.prepared: Prepared | None = None
        self._request: Callable[[float | None], Prepared] | None = None  # given the timeout
        self._unanswered = False  # nobody knows what became of the request

    @property
    def monitor(self) -> Monitor:
        return self.source.monitor

    # Prepare: cprd keeps the state, and serves nothing of it

    def prepare(self, state: State, if_exists: IfExists = "error") -> None:
        """Prepare the state in cprd, to be served once the source has ended. The descriptors of
        `state` stay the caller's. Raises Unavailable without an answer within a second; what cprd
        raised."""
        pidfd = self.source.process.pidfd
        self._request = lambda timeout: self.daemon.prepare(
            self.name, state, if_exists=if_exists, after_exit=pidfd, timeout=timeout
        )
        try:
            self.prepared = self._request(STANDING)
        except (Unavailable, Timeout) as error:
            self._unanswered = True
            if isinstance(error, Unavailable):
                raise
            raise Unavailable(f"cprd did not answer within {STANDING:g} s") from None

    def check_daemon(self) -> None:
        """Look whether the cprd that has answered is still there. Does not wait. Raises
        Unavailable."""
        fd = self.daemon.fileno()
        poll = select.poll()
        if fd >= 0:
            poll.register(fd, select.POLLIN)
        if fd < 0 or poll.poll(0):
            self._unanswered = True
            raise Unavailable("cprd ended meanwhile, and with it perhaps what it had prepared")

    def _prepare_late(self) -> bool:
        """For a guest that waits no more: whether the state is prepared, or is now."""
        if self.prepared is None and self._unanswered and self._request is not None:
            try:
                self.prepared = self._request(None)
            except CprdError:
                return False
        return self.prepared is not None

    # The point of no return

    def complete(self) -> None:
        """Send SHUT(0) and wait for QEMU's word that the migration has completed. The end of a QEMU
        that did not let its guest run counts as well: nobody else can run the guest then. Raises
        Failed (to be taken back), InDoubt."""
        try:
            self.source.complete()
        except OSError as error:
            if self._has_ended_at_rest():
                return
            raise Failed(f"QEMU hung up on its main channel ({error})") from None
        point("qemu-save:shut")
        try:
            outcome = self.source.completed()
        except MonitorLost as error:
            if self._has_ended_at_rest():
                return
            if self.source.process.ended():
                raise Failed("QEMU let its guest run on in the last moment") from None
            raise InDoubt(
                f"{self.name}: its QEMU was told that the state is whole, and does not say what"
                f" came of it ({error}). The hold is in doubt: run `cprctl qemu save` or `start`"
                " again, they ask that QEMU"
            ) from None
        if outcome != "completed":
            raise Failed(f"QEMU's migration {outcome} in the last moment")

    def _has_ended_at_rest(self) -> bool:
        return self.source.process.wait(1.0) and self.monitor.ended_at_rest()

    def commit(self) -> Saved:
        """Make the prepared state a hold. The guest stands still meanwhile. Raises InDoubt, Failed.

        The old QEMU may go on only after cprd has answered that the state is gone."""
        assert self.prepared is not None
        deadline = Deadline(COMMIT)
        while True:
            try:
                return self.prepared.commit()
            except (Unavailable, Timeout) as error:
                if deadline.has_passed():
                    raise InDoubt(
                        f"{self.name}: cprd went away before it could commit ({error}). The guest"
                        " is stopped, whole, in its QEMU; once cprd runs again, repeat `cprctl qemu"
                        " save` or `cprctl qemu start`: they ask that QEMU"
                    ) from None
                signals.sleep(0.1)
            except CprdError as error:
                if not self.is_gone():
                    raise InDoubt(f"{self.name}: cprd did not commit: {error}") from None
                raise Failed(
                    f"cprd did not commit ({error}), and has nothing of it any more;"
                    f" {self.resume_source()}"
                ) from None

    def commit_or_prepare_again(self) -> None:
        """Commit; a cprd that kept the state in memory and was restarted gets the state once more.
        For two QEMUs that have ended. Raises InDoubt, Failed."""
        assert self.prepared is not None
        assert self._request is not None
        try:
            self.commit()
        except Failed:
            if self.prepared.kept != "memory":
                raise
            self.prepared = self._request(None)
            self.commit()

    # The way back

    def take_back(self, error: Exception) -> Failed:
        """Before the migration has completed: let the guest go on, then see to cprd. Returns the
        failure to raise."""
        where = self.take_back_source()
        left = self.undo()
        return self.failure(f"{one_line(error)}; {where}{left}", left)

    def failure(self, text: str, left: str) -> Failed:
        """The failure to raise after `undo` returned `left`."""
        return (DaemonAway if self._unanswered and not left else Failed)(text)

    def take_back_source(self) -> str:
        """Leave the source as it was found; returns the place of its guest, for people.

        A QEMU that gives its stream up resumes by itself, also when another process has taken the
        lock of an image meanwhile, and aborts then (10.0). Such a QEMU completes instead, and its
        guest goes on by `cont`, which QEMU refuses as long as the lock is taken."""
        try:
            if taken_by_others(self.source.process.pid) and self.source.finish_main():
                return self._stand()
            return self.source.take_back()
        except CprdError as lost:
            process = self.source.process
            if process.wait(1.0):
                return f"its QEMU (pid {process.pid}) has ended, and the guest with it"
            return f"its QEMU does not answer any more ({lost}), and was not told to give it up"

    def _stand(self) -> str:
        """Complete the migration of a guest that is to stay; `cont` then, once cprd has answered
        that nothing of the guest can be served."""
        try:
            self.source.complete()
        except OSError:
            return describe(self.monitor.status())
        if self.source.completed() == "completed":
            gone = self.is_gone() if self.prepared is not None else not self.undo()
            if gone:
                return self.resume_source()
            return (
                "another process has taken the lock of its image, and cprd does not answer: the"
                " guest is stopped, whole, in its QEMU; once cprd runs, repeat `cprctl qemu save`"
                " or `cprctl qemu start`: they ask that QEMU"
            )
        return describe(self.monitor.status())

    def undo(self) -> str:
        """The guest goes on in its QEMU: see to it that cprd has nothing of it. Returns the end of
        a message when cprd may have something, or an empty string."""
        try:
            if self.prepared is not None:
                self.prepared.abort()
            elif self._unanswered:
                self._drop()
        except (Fenced, NotHeld):
            pass
        except CprdError as error:
            return (
                f"; cprd was not told ({error}), and may hold what it was sent, prepared or in"
                " doubt: nobody is served that, and the next save or start asks this QEMU and ends"
                " it"
            )
        return ""

    def _drop(self) -> None:
        """End what was prepared without the ticket, which was in the answer."""
        deadline = Deadline(_PATIENCE)
        while True:
            row, origin = look(self.daemon, self.name)
            if row is None or origin is None or origin.old != self.source.process.record():
                return
            try:
                self.daemon.drop(self.name, force=True)
                return
            except Busy:  # prepared still
                if deadline.has_passed():
                    raise
            signals.sleep(0.05)

    def rescue(self) -> bool:
        """Something failed. If the source has ended since, and its guest stood to the end, the
        state that cprd was given is the guest: whether cprd has the state."""
        if self._request is None or not self.source.process.ended():
            return False
        return self.monitor.ended_at_rest() and self._prepare_late()

    def resume_source(self) -> str:
        """`cont` to a source that has completed, after cprd has answered that the state is gone;
        returns the place of the guest, for people."""
        try:
            self._await_completion()
            self.monitor.execute("cont")
        except MonitorRefused as refused:
            self.source.restore()
            return (
                "the guest is stopped, whole, in its QEMU, which cannot run it either"
                f" ({refused}): end what is in the way, then `cont` there"
            )
        except MonitorLost as lost:
            return f"its QEMU does not answer any more ({lost})"
        self.source.restore()
        try:
            return describe(self.monitor.status())
        except CprdError as lost:
            return f"its QEMU does not answer any more ({lost})"

    def _await_completion(self) -> None:
        """The stream ends a moment before its QEMU has completed, and allows `cont`."""
        deadline = Deadline(_PATIENCE)
        while self.monitor.status() == "finish-migrate" and not deadline.has_passed():
            signals.sleep(0.005)

    def is_gone(self) -> bool:
        """Whether cprd itself answers that what was prepared is no more; ends it if possible."""
        assert self.prepared is not None
        try:
            self.prepared.abort()
            return True
        except (Unavailable, Timeout):
            return False
        except CprdError:
            pass
        try:
            row = row_of(self.daemon, self.name)
        except CprdError:
            return False
        return row is None or bool(row["generation"] != self.prepared.generation)

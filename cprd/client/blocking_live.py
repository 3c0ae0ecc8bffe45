"""LiveState of the blocking client."""

from __future__ import annotations

from cprd.client import live as lives
from cprd.client.livestate import LiveVerbs

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from typing import Self

    from cprd.client.blocking import Connection


class LiveState(LiveVerbs):
    """A live hold of this process: descriptors, sections and memory that are kept at each change,
    whatever ends the process. As a block: leaving closes. An exception before confirm() gives what
    a predecessor left back, whole.

    With cprd in memory mode a thread watches the connection, and puts the hold back into the cprd
    that comes after. Closed by garbage collection, too."""

    _line: Connection

    def confirm(self, *, strict: bool = False, timeout: float | None = None) -> None:
        """The point of no return: what the predecessor left is this process's, in one step, and
        changes count. Keys that were never asked for are a RuntimeWarning, or with `strict`
        InvalidInput before anything happened. Again, or after a cold start: does nothing.

        Raises Fenced: then do not act. After Unavailable and Timeout the outcome is not known, and
        confirm() again repeats the same request. LimitExceeded: nothing has changed."""
        self._line.run(self._live.confirm(strict, timeout))

    def end(self, *, timeout: float | None = None) -> None:
        """Keep nothing any more, and close. Blocks while the last close of a file does. Raises
        Unavailable, Timeout: then nothing is kept, and end() can be repeated."""
        self._line.run(self._live.end(timeout))

    def close(self) -> None:
        """Stop owning: the next process finds all, at once. Unconfirmed, what was left goes back; a
        hold that keeps nothing ends. The program's own descriptors stay open. Safe to repeat; does
        nothing in a child of fork(). Blocks for 2 s at most while cprd does not answer."""
        if self._live.open and self._line.mine():
            self._line.run(self._live.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._live.open and self._line.mine():
            self._line.run(self._live.leave(error))

    def __del__(self) -> None:
        if hasattr(self, "last_end"):
            self.close()


def begin(
    line: Connection, name: str, wait: float, lease: float, timeout: float | None
) -> LiveState:
    """The verb live() on a line of its own."""
    return line.run(lives.begin(line, LiveState, name, wait, lease, timeout, None))

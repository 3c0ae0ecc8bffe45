"""Slots: where cprd kept holds until shelves had version 2, one socket a hold. Read, never written.

The first record in the queue of a slot carries the bundle; each later record is the whole record
anew, so that the last counts, with the replies to the last requests about the hold. A pidfd was
parked once: a later record names the roles whose pidfds lie in earlier records. A slot is a socket
connected to itself, or a pair. A last record says the end, for the cprd of before as well.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Sequence

from cprd.daemon.storage.record import (
    MAX_RECORD,
    Unreadable,
    decode,
    encode_last,
    last_replies,
    prefix,
)
from cprd.daemon.storage.shelf import records
from cprd.errors import LimitExceeded
from cprd.linux.pause import point
from cprd.linux.rights import close_all, receive, scm_fds, send
from cprd.protocol.lifecycle import Hold
from cprd.protocol.replies import Reply

_LAST = 2  # the version of a last record that asks for the slot alone to be drained


class _Cut(Exception):
    """A first record without its bundle: the slot was being drained."""


class Slot:
    """Owns the socket, or both ends of the pair."""

    def __init__(self, fds: tuple[int, ...]) -> None:
        """(socket,) or (outlet, inlet), owned from now on."""
        self._ends = [socket.socket(fileno=fd) for fd in fds]
        for end in self._ends:
            end.setblocking(False)
        self.uid = 0  # of the owner, once read
        self.inode = os.fstat(fds[0]).st_ino
        self.replies: list[Reply] = []  # in the last record
        self.raw = b""  # the last record
        self._foreign: Sequence[int] = ()  # read from an ended slot; owned

    @property
    def _outlet(self) -> socket.socket:
        return self._ends[0]

    def read(self) -> tuple[Hold | None, dict[str, int]]:
        """The last record, None when the hold has ended, and pidfds by role, owned by the caller.

        Of an ended slot the bundle is kept: a releaser of an earlier daemon may be draining the
        slot, and the copy here be the last. Raises Unreadable, ValueError; LimitExceeded when this
        process has no descriptor left to read with."""
        hold: Hold | None = None
        unreadable: Unreadable | ValueError | None = None
        pidfds: dict[str, int] = {}
        ended = False
        try:
            for number, (data, fds) in enumerate(records(self._outlet, MAX_RECORD)):
                self.raw = data
                known = prefix(data)
                self.uid = known.uid if known is not None else self.uid
                try:
                    if known is not None and known.is_last:
                        ended = True
                        self.replies = last_replies(data)
                    elif number == 0 and not fds:
                        ended = True  # the first record is gone: the slot was being drained
                    else:
                        hold = self._read_record(data, fds, pidfds, first=number == 0)
                except _Cut:
                    ended = True
                except (Unreadable, ValueError) as error:
                    unreadable = unreadable or error
                finally:
                    if number == 0:
                        self._foreign = (*self._foreign, *fds)
                    close_all(fds if number else ())
            if unreadable is not None and not ended:
                raise unreadable
        except BaseException:
            close_all(pidfds.values())
            self._close_foreign()
            raise
        finally:
            unreadable = None  # with its traceback a cycle
        if ended:
            close_all(pidfds.values())
            return None, {}
        self._close_foreign()
        return hold, pidfds

    def _read_record(
        self, data: bytes, fds: list[int], pidfds: dict[str, int], *, first: bool
    ) -> Hold:
        """One record; the pidfds are taken out of `fds` into `pidfds`, which has those of earlier
        records. Raises _Cut, Unreadable, ValueError."""
        hold, roles, replies, before = decode(data)
        if first:
            if len(fds) != 1 + len(roles):
                raise _Cut
            self._foreign = (*self._foreign, fds.pop(0))
        if len(roles) != len(fds) or not pidfds.keys() >= set(before):
            raise ValueError("not the descriptors that the record describes")
        self.replies = replies
        over = [role for role in pidfds if role not in before]
        close_all([pidfds.pop(role) for role in over])
        pidfds.update(zip(roles, fds, strict=True))
        fds.clear()
        return hold

    def bundle(self) -> int:
        """A copy of the bundle's descriptor, which the caller owns. Raises LimitExceeded."""
        _, fds, _ = receive(self._outlet, MAX_RECORD, socket.MSG_PEEK)
        close_all(fds[1:])
        if not fds:
            raise LimitExceeded(
                "cprd has no descriptor left to serve with: raise LimitNOFILE= of cprd.service"
            )
        return fds[0]

    def mark_dead(self) -> None:
        """Say for good that the slot has ended, to the cprd of before. Raises LimitExceeded."""
        inlet = self._ends[-1]
        known = prefix(self.raw)
        data = encode_last(self.uid, 0 if known is None else known.generation, (), _LAST)
        for attempt in (1, 2):
            try:
                send(inlet, data)
                break
            except OSError as error:
                if not isinstance(error, BlockingIOError) or attempt == 2:
                    why = f"cprd cannot write its record: {error.strerror}"
                    raise LimitExceeded(why) from None
                size = inlet.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
                inlet.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)  # doubles it
        point("slot:dead")

    def give_away(self) -> tuple[int, list[int]]:
        """The outlet, and descriptors read from an ended slot, owned by the caller from now on.
        Draining the outlet lets go of all that the hold had, and blocks as long as a foreign file
        does."""
        point("slot:drain")
        outlet, *inlet = self._ends
        for end in inlet:
            end.close()
        foreign, self._foreign = self._foreign, ()
        return outlet.detach(), list(foreign)

    def has_foreign(self, draining: Collection[int]) -> bool:
        """Whether descriptors of a client can be left in an ended slot that was read, and in no
        bundle with an inode in `draining`."""
        try:
            return any(scm_fds(fd) and os.fstat(fd).st_ino not in draining for fd in self._foreign)
        except OSError:
            return True

    def _close_foreign(self) -> None:
        close_all(self._foreign)
        self._foreign = ()

    def close(self) -> None:
        """Close this process's copies; a shelf keeps its own."""
        self._close_foreign()
        for end in self._ends:
            end.close()

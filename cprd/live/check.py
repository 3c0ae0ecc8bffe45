"""Say everything that is wrong with a live hold whose owner has ended, for people who write
clients. See cprd/bundle/check.py."""

from __future__ import annotations

import _socket as socket  # as in queue
import os
from array import array
from typing import Any

from cprd.bundle.check import Faults
from cprd.errors import Busy, Damaged
from cprd.linux.memfd import missing_seals
from cprd.linux.nofile import cut_short
from cprd.linux.rights import SO_PEEK_OFF, close_all, peek, queued
from cprd.live.carrier import root_of
from cprd.live.reader import MOST_TURNS, as_queue, read
from cprd.live.records import (
    ATTACH,
    CARRIES,
    DELETE,
    MOST,
    PACKED_MEMFD,
    RAW_MEMFD,
    ROOT,
    Record,
    decode,
)


def check_live(bundle: int) -> dict[str, Any]:
    """Look at all records of a live hold; `bundle` is borrowed. As `check_bundle` returns; and
    "segments". Nobody can append from now on: only where no owner lives. Raises LimitExceeded."""
    found: dict[str, Any] = {"wrong": [], "descriptors": 0, "sections": 0, "segments": 0}
    faults = Faults()
    try:
        root = root_of(bundle)
    except Damaged as error:
        return {**found, "wrong": [str(error)]}
    walk = _Walk(faults)
    try:
        walk.root(root)
        found["segments"] = walk.segments
        try:
            held = read(root)
        except Busy as error:
            if not faults.wrong:
                faults.add(str(error))
        else:
            found["descriptors"] = held.state.fd_count
            found["sections"] = len(list(held.state.sections()))
            held.state.close()
            held.close()
    finally:
        os.close(root)
    return {**found, "wrong": faults.all()}


class _Walk:
    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self.hold: int | None = None
        self.segments = 0

    def root(self, fd: int) -> None:
        """Look at the root (borrowed) and at each segment."""
        seen: set[int] = set()
        for record, fds, what in self._queue(fd, "the root"):
            try:
                if record.kind not in (ATTACH, ROOT):
                    self.faults.add(f"{what}: kind {record.kind} is for segments")
                    continue
                if any(entry[0] < DELETE for entry in record.entries):
                    self.faults.add(f"{what}: the root has deletions only")
                for id, segment in zip(record.ids, fds, strict=False):
                    if id not in seen:
                        seen.add(id)
                        self._segment(segment, f"segment {id}")
            finally:
                close_all(fds)
        self.segments = len(seen)

    def _segment(self, fd: int, where: str) -> None:
        for record, fds, what in self._queue(fd, where):
            try:
                if record.kind in (ATTACH, ROOT):
                    self.faults.add(f"{what}: kind {record.kind} is for the root")
                    continue
                carrying = [entry for entry in record.entries if entry[0] in CARRIES]
                for entry, one in zip(carrying, fds, strict=False):
                    memfd = entry[0] in (RAW_MEMFD, PACKED_MEMFD)
                    if memfd and missing_seals(one) != []:
                        self.faults.add(f"{what}: section {entry[2][1]!r} is no sealed memfd")
            finally:
                close_all(fds)

    def _queue(self, fd: int, where: str) -> list[tuple[Record, array[int], str]]:
        """All records of a queue that can be read, with descriptors that the caller owns."""
        found: list[tuple[Record, array[int], str]] = []
        try:
            sock = as_queue(fd)
        except Damaged as error:
            self.faults.add(f"{where}: {error}")
            return found
        try:
            sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
            waiting, total, number = queued(sock), 0, 0
            before: Record | None = None
            while total < waiting and number < MOST_TURNS:
                data, fds, flags = peek(sock, MOST + 1)
                what = f"{where}, record {number}"
                number += 1
                total += len(data)
                if flags & socket.MSG_CTRUNC:
                    close_all(fds)
                    raise cut_short(what)
                record = self._record(data, len(fds), what, before)
                if record is None:
                    close_all(fds)
                    if not data:
                        break
                    continue
                before = record
                found.append((record, fds, what))
        except OSError as error:
            self.faults.add(f"{where}: cannot be read: {error.strerror}")
        except BaseException:
            for _, fds, _ in found:
                close_all(fds)
            raise
        finally:
            sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, -1)
            sock.detach()
        return found

    def _record(self, data: bytes, count: int, what: str, before: Record | None) -> Record | None:
        try:
            record = decode(data)
        except Busy as error:  # damaged, or of another version
            self.faults.add(f"{what}: {error}")
            return None
        if record.descriptors != count:
            self.faults.add(f"{what}: says {record.descriptors} descriptors and has {count}")
        if self.hold is None:
            self.hold = record.hold
        if record.hold != self.hold:
            self.faults.add(f"{what}: of hold {record.hold:x}, among those of {self.hold:x}")
        if before is not None and record.ordinal != before.ordinal + 1:
            self.faults.add(f"{what}: ordinal {record.ordinal} follows {before.ordinal}")
        if before is not None and record.seq <= before.seq:
            self.faults.add(f"{what}: seq {record.seq} follows {before.seq}")
        return record

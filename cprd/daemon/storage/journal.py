"""The records of all holds, one after another, in a memfd.

cprd only appends. A record is true once one pwrite() has returned; a kill within leaves a torn
record at the end, of what was never answered. Each shelf leads to the journal, whichever shelf
counts, so that a change is written once.

A journal with many outdated records is moved: what still counts is appended anew, from a page
border on, then the kernel frees all pages before (a hole). A kill at any moment leaves all that
counts once, or twice.

The frame of a record is frozen for all versions: u32 length, u32 CRC-32, the record, zeros up to a
multiple of 8 bytes. Zeros between records are a hole. Nothing is searched for: a client chooses
bytes within records.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from zlib import crc32

from cprd.daemon.storage.record import MAX_RECORD
from cprd.daemon.storage.shelf import Pidfd
from cprd.errors import LimitExceeded
from cprd.linux.pause import point
from cprd.linux.rights import close_all

_FRAME = struct.Struct("<II")
_PADDING = tuple(bytes(-size % 8) for size in range(8))
# A journal is moved when larger than that, and than so many times what counted at the last time.
MANY_BYTES, TIMES = 1 << 20, 3
_HOLE = b"\0" * 8
NOBODY: Mapping[str, tuple[int, int]] = MappingProxyType({})  # one for all without pidfds


class Journal:
    """Owns the memfd."""

    __slots__ = ("_kept", "_start", "end", "fd", "inode", "strange")

    def __init__(self, fd: int) -> None:
        """`fd`: a memfd, empty or of an earlier daemon; owned from now on."""
        self.fd = fd
        self.inode = os.fstat(fd).st_ino
        self.end = 0
        self.strange = ""  # why records cannot be read: nothing is moved then
        self._start = self._kept = 0

    @classmethod
    def create(cls) -> Journal:
        """An empty journal. Raises LimitExceeded."""
        try:
            return cls(os.memfd_create("cprd-journal", os.MFD_CLOEXEC))
        except OSError as error:
            raise LimitExceeded(
                f"cprd has no descriptor left for its journal ({error.strerror}): raise"
                " LimitNOFILE= of cprd.service"
            ) from None

    def append(self, record: bytes) -> int:
        """Append a record. Returns the place. Raises LimitExceeded; then nothing has changed."""
        at, size = self.end, len(record)
        if size > MAX_RECORD:
            raise LimitExceeded(f"cprd reads no record of {size} bytes: {MAX_RECORD} at most")
        data = _FRAME.pack(size, crc32(record)) + record + _PADDING[size % 8]
        try:
            written = os.pwrite(self.fd, data, at)
            if written != len(data):
                os.ftruncate(self.fd, at)
        except OSError as error:
            raise LimitExceeded(f"cprd cannot write its record: {error.strerror}") from None
        if written != len(data):
            raise LimitExceeded(
                "cprd cannot write its record: no memory is left; raise MemoryMax= of cprd.service,"
                " or drop holds"
            )
        self.end = at + len(data)
        return at

    def read(self, at: int) -> bytes:
        """The record at a place. Raises LimitExceeded."""
        data = os.pread(self.fd, _FRAME.size + MAX_RECORD, at)
        size, whole = _record(data, 0)
        if not whole:
            raise LimitExceeded("cprd's journal was damaged by another process")
        return data[_FRAME.size : _FRAME.size + size]

    def records(self) -> Iterator[tuple[int, bytes, bool]]:
        """All records of an earlier daemon: the place, the bytes, and whether the record is whole.
        A torn record at the end, of what was never answered, is cut off. Other damage loses what is
        damaged, or all from there on: `strange` says so, and nothing is to be appended here."""
        try:
            first = os.lseek(self.fd, 0, os.SEEK_DATA)
        except OSError:  # nothing but a hole
            first = os.fstat(self.fd).st_size
        data = _read_all(self.fd, first)
        at = 0
        while at < len(data):
            size, whole = _record(data, at)
            behind = at + _FRAME.size + size + -size % 8
            content = data[at + _FRAME.size : at + _FRAME.size + size]
            if whole:
                yield first + at, content, True
            elif data.startswith(_HOLE, at):
                behind = at + len(_HOLE)
            elif len(data) - at < _FRAME.size or len(content) < size:  # torn
                break
            else:
                self.strange = self.strange or f"the journal is damaged at {first + at}"
                skips = size and (behind == len(data) or _record(data, behind)[1])
                yield first + at, content if skips else b"", False
                if not skips:
                    self.end, self._start = first + len(data), first
                    return
            at = behind
        self.end, self._start = first + at, first
        os.ftruncate(self.fd, self.end)

    @property
    def is_worn(self) -> bool:
        """Whether much is outdated."""
        size = self.end - self._start
        return size > max(MANY_BYTES, TIMES * self._kept) and not self.strange

    def begin_move(self) -> int:
        """The place from which on all that counts is to be appended anew."""
        self.end += -self.end % mmap.PAGESIZE
        os.ftruncate(self.fd, self.end)  # so that the pages before can be mapped, for `end_move`
        return self.end

    def end_move(self, start: int) -> None:
        """Free all that lies before `start`."""
        point("journal:moved")
        pages = self._start // mmap.PAGESIZE * mmap.PAGESIZE
        self._kept, self._start = self.end - start, start
        if start > pages:
            try:
                with mmap.mmap(self.fd, start - pages, offset=pages) as memory:
                    memory.madvise(mmap.MADV_REMOVE)
            except OSError as error:
                raise LimitExceeded(f"cprd cannot free old records: {error.strerror}") from None
        point("journal:freed")

    def close(self) -> None:
        os.close(self.fd)


class Place:
    """Where one hold lies: the bundle, and the last record in a journal."""

    __slots__ = ("at", "bundle", "journal", "parked", "strange", "uid")

    def __init__(self, uid: int, bundle: int, journal: Journal, at: int) -> None:
        """`bundle` is owned from now on. `at`: the last record; below 0: none can be read."""
        self.uid = uid
        self.bundle = bundle
        self.journal = journal
        self.at = at
        self.parked = NOBODY  # pidfds by role, borrowed, and their numbers
        self.strange: Sequence[Pidfd] = ()  # of a hold that cannot be read; owned

    @property
    def pidfds(self) -> int:
        return len(self.parked) + len(self.strange)

    def append(self, record: bytes, now: Journal) -> int:
        """Append a record of the hold. `now`: for what follows a damaged journal, because nobody
        would find a record behind the damage. Returns the place. Raises LimitExceeded."""
        if self.journal.strange:
            self.journal = now
        return self.journal.append(record)

    def close(self) -> None:
        """Close this process's copies; a shelf keeps its own."""
        os.close(self.bundle)
        close_all(one.fd for one in self.strange)


def _record(data: bytes, at: int) -> tuple[int, bool]:
    """The bytes of the record at a place of `data`, and whether the record is whole."""
    if at + _FRAME.size > len(data):
        return 0, False
    size, checksum = _FRAME.unpack_from(data, at)
    if not 0 < size <= MAX_RECORD:
        return 0, False
    record = data[at + _FRAME.size : at + _FRAME.size + size]
    return size, len(record) == size and crc32(record) == checksum


def _read_all(fd: int, at: int) -> bytes:
    parts = []
    while part := os.pread(fd, 1 << 20, at):
        parts.append(part)
        at += len(part)
    return b"".join(parts)

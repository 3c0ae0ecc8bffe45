"""A file for each live hold: the next cprd learns who owns a name whose root ended with this cprd.

Where cprd keeps holds in memory only, the end of cprd leaves the root to the owner alone, and what
was claimed to take it over to the claimant. Until that process puts the hold back, or ends, nobody
else may begin under the name. A note has what tells the process from everybody else, and nothing of
what is kept.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

import msgpack

from cprd.daemon import log
from cprd.linux import processes
from cprd.linux.pause import point
from cprd.protocol import living
from cprd.protocol.lifecycle import Hold

_PLACE = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
_MOST = 4096  # bytes of a note
_FIELDS = ("uid", "name", "generation", "created", "ttl_left", "saver", "took", "deaths")


@dataclass(frozen=True, slots=True)
class Note:
    """A live hold, without its root, and the inode of a pidfd of the owner (0: not known)."""

    hold: Hold
    inode: int

    def owner(self) -> int:
        """A pidfd of the owner, the caller's; -1 when the owner has ended."""
        if self.hold.saver <= 0:
            return -1  # of another pid namespace: nobody can tell
        fd = processes.open_identity(self.hold.saver, self.inode)
        if fd >= 0 and processes.has_ended(fd):
            os.close(fd)
            return -1
        return fd


class Notes:
    """The notes in a directory, which is made with the first note. Raises nothing: a note that
    cannot be written is a warning in the log."""

    def __init__(self, place: str) -> None:
        """`place`: the directory; an empty string: nowhere."""
        self._place = place
        self.noted: dict[int, bytes] = {}  # shortened tokens

    def write(self, hold: Hold, pidfd: int) -> None:
        """Note a live hold; `pidfd` is of the owner (pid `saver`), borrowed."""
        token = living.shortened(hold.token)
        if self.noted.get(hold.generation) == token or not self._place:
            return
        _, inode = processes.identity(pidfd)
        note = {field: getattr(hold, field) for field in _FIELDS}
        note |= {"token": token, "inode": inode}
        try:
            with _Place(self._place, make=True) as place:
                new = f".{hold.generation}"
                file = os.open(new, _NEW, 0o600, dir_fd=place)
                try:
                    os.write(file, msgpack.packb(note))
                finally:
                    os.close(file)
                os.rename(new, str(hold.generation), src_dir_fd=place, dst_dir_fd=place)
        except OSError as error:
            why = f"{self._place}: {error.strerror}"
            log.event("not-noted", level=log.WARNING, uid=hold.uid, name=hold.name, why=why)
        else:
            self.noted[hold.generation] = token
            point("note:written")

    def match(self, hold: Hold) -> bool:
        """Whether the note of a hold, if any, is of the present owner; forget the note if not."""
        noted = self.noted.get(hold.generation)
        is_noted = noted is not None and living.is_noted(hold, noted)
        if not is_noted:
            self.remove(hold.generation)
        return is_noted

    def remove(self, generation: int) -> None:
        """Forget a hold that is not live any more."""
        if self.noted.pop(generation, None) is None:
            return
        try:
            with _Place(self._place) as place:
                os.unlink(str(generation), dir_fd=place)
                point("note:removed")
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                log.event("note-left", level=log.WARNING, why=f"{self._place}: {error.strerror}")

    def read(self) -> Iterator[Note]:
        """The notes of an earlier cprd."""
        if not self._place:
            return
        try:
            with _Place(self._place) as place:
                for name in os.listdir(place):
                    if not name.isdigit():
                        continue
                    note = _read(place, name)
                    self.noted[int(name)] = b"" if note is None else note.hold.token
                    if note is not None:
                        yield note
                    else:
                        log.event("note-unreadable", level=log.ERROR, file=f"{self._place}/{name}")
        except FileNotFoundError:
            pass
        except OSError as error:
            log.event("not-noted", level=log.ERROR, why=f"{self._place}: {error.strerror}")


class _Place:
    """The directory, for a moment. Raises OSError for a directory that others may change."""

    def __init__(self, path: str, *, make: bool = False) -> None:
        if make:
            try:
                os.mkdir(path, 0o700)
            except FileExistsError:
                pass
        self._fd = os.open(path, _PLACE)
        found = os.fstat(self._fd)
        if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            os.close(self._fd)
            raise PermissionError(0, "not a directory of cprd's own")

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)


def _read(place: int, name: str) -> Note | None:
    try:
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place)
        try:
            content = msgpack.unpackb(os.read(file, _MOST), raw=False)
        finally:
            os.close(file)
        fields = {field: content[field] for field in _FIELDS}
        hold = living.away(Hold(**fields, phase="", token=content["token"]))
        return Note(hold, content["inode"])
    except Exception:
        return None

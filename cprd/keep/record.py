"""All that a parent knows, in a memfd: for the first parent, and for a newer one after exec."""

from __future__ import annotations

import marshal
import os

from cprd.keep.entries import Entry

VERSION = 1


class Record:
    """The owner of a record owns the descriptors."""

    def __init__(self) -> None:
        self.path = ""  # of the listening socket's file, if the parent is to remove the file
        self.inode = (0, 0)  # of that file: device, number
        self.notify = -1
        self.notify_path = ""
        self.watchdog = 30.0  # s
        self.child = 0
        self.stage = "waiting"
        self.served = False  # cprd has been ready once
        self.said = "never ready"  # cprd's STATUS=
        self.sockets: list[tuple[str, int]] = []  # passed to each child, before the entries
        self.entries: list[Entry] = []

    def fds(self) -> list[int]:
        return [self.notify, *(fd for _, fd in self.sockets), *(fd for _, fd, _ in self.entries)]

    def pass_on(self, across_exec: bool) -> None:
        for fd in self.fds():
            os.set_inheritable(fd, across_exec)

    def write(self) -> int:
        """An inheritable memfd, owned by the caller."""
        memfd = os.memfd_create("cprd-keep", 0)
        os.write(memfd, marshal.dumps((VERSION, vars(self)), 4))
        return memfd

    @classmethod
    def read(cls, memfd: int) -> Record:
        """Raises ValueError for another version, OSError for a descriptor that is not open."""
        record = cls()
        version, fields = marshal.loads(os.pread(memfd, os.fstat(memfd).st_size, 0))
        if version != VERSION or set(fields) != set(vars(record)):
            raise ValueError(f"a record of version {version}; this parent reads {VERSION}")
        vars(record).update(fields)
        for fd in record.fds():
            os.fstat(fd)
        return record

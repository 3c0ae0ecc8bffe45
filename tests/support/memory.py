"""A memfd that tells when its memory is free.

The kernel says so by inotify, when it ends a file that has no name: once nobody has it open, mapped
or parked in a socket. (How much shared memory a machine uses is everybody's, and proves little.)
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select

from cprd.linux.memfd import SEALS

IN_DELETE_SELF = 0x400  # linux/inotify.h
libc = ctypes.CDLL(None, use_errno=True)


class Memory:
    """`fd` is sealed, as what is to be a section has to be. Use `saved` and `close`."""

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("memory", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.posix_fallocate(self.fd, 0, size)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS)
        self._inotify: int = libc.inotify_init1(os.O_CLOEXEC)
        path = f"/proc/self/fd/{self.fd}".encode()
        if libc.inotify_add_watch(self._inotify, path, IN_DELETE_SELF) < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"inotify_add_watch: {os.strerror(number)}")

    def saved(self) -> None:
        """We ourselves want it no more."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def free(self, seconds: float) -> bool:
        """Whether it is free within so long."""
        poll = select.poll()
        poll.register(self._inotify, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def close(self) -> None:
        self.saved()
        os.close(self._inotify)

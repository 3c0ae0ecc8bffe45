"""Hear of a `daemon-reload`, at which a manager may drop what a store has: a signal comes.

A manager that reads the units anew makes the directories of generators anew first, beside its
notification socket. dnotify (F_NOTIFY, fcntl(2)) tells of that by a signal: Python has no inotify
without ctypes, and ctypes wants memory that is writable and executable, which our unit forbids. A
manager without any generator, or a kernel without dnotify, is not heard of: look now and then, too.
"""

from __future__ import annotations

import fcntl
import os
import signal

SIGNAL = signal.SIGURG  # ignored by default: none that comes late does harm


def directory(address: str) -> str:
    """The directory of a manager at $NOTIFY_SOCKET `address`; an empty string for an abstract
    address."""
    return os.path.dirname(address) if address.startswith("/") else ""


def watch(path: str) -> int:
    """Have `SIGNAL` come at each change of the names in directory `path`, as long as the returned
    descriptor, the caller's, is open. -1 where that cannot be had. Needs a handler first."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, SIGNAL)
        fcntl.fcntl(fd, fcntl.F_NOTIFY, fcntl.DN_CREATE | fcntl.DN_DELETE | fcntl.DN_MULTISHOT)
    except OSError:
        os.close(fd)
        return -1
    return fd

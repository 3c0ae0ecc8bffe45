"""Where a QEMU's stderr and stdout go, for the QEMU that takes its place.

`cprctl qemu upgrade` ends while the new QEMU lives, so that one must not keep our own output open:
who reads us through a pipe would wait for its end. It goes on with what the old QEMU has. Where the
old one's stderr is the pipe of a guard (guard.py), it is the guard's own output, so that guards do
not queue up with each upgrade; $CPRD_GUARD in a QEMU's environment names it.
"""

from __future__ import annotations

import os
import stat

from cprd.qemu.process import Process, start_time

GUARD = "CPRD_GUARD"
_PIDFD_GETFD = 438  # the same on every architecture


def mark(pid: int) -> str:
    """The value of $CPRD_GUARD for a guard of that pid."""
    return f"{pid}:{start_time(pid)}"


def onward(old: Process, which: int) -> int:
    """A descriptor (the caller's) of where the old QEMU's `which` (1 or 2) goes. Where that cannot
    be had (another uid, ptrace_scope), our own, unless that is a pipe: then /dev/null."""
    fd = -1
    guard = _guard_of(old) if which == 2 else None
    if guard is not None:
        fd = _get(guard.pidfd, 1)
        guard.close()
    if fd < 0:
        fd = _get(old.pidfd, which)
    if fd >= 0:
        return fd
    try:
        if not stat.S_ISFIFO(os.fstat(which).st_mode):
            return os.dup(which)
    except OSError:
        pass
    return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


def _guard_of(old: Process) -> Process | None:
    try:
        with open(f"/proc/{old.pid}/environ", "rb") as file:
            for entry in file.read().split(b"\0"):
                name, _, value = entry.partition(b"=")
                if name.decode(errors="replace") == GUARD:
                    pid, _, start = value.partition(b":")
                    return Process.find({"pid": int(pid), "start": int(start)})
    except (OSError, ValueError):
        pass
    return None


def _get(pidfd: int, fd: int) -> int:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.syscall(_PIDFD_GETFD, pidfd, fd, 0))

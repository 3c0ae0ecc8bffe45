"""Who is at the other end of a connection, and processes that are waited for.

Credentials are those of the process that called connect(). Its pidfd comes from SO_PEERPIDFD (Linux
6.5); before, from SO_PEERCRED and pidfd_open, which is trusted because the connection is still up
when it has been opened.
"""

from __future__ import annotations

import _socket as socket  # as in rights
import errno
import fcntl
import math
import mmap
import os
import select
import struct
import time

from cprd.linux import proc

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
else:
    import _signal as signal  # without the enums of signal, as _socket

SO_PEERPIDFD = 77
_UCRED = struct.Struct("iII")
_GET_INFO = 0xC040FF0B  # PIDFD_GET_INFO, with the 64 bytes of Linux 6.15
_INFO = struct.Struct("=Q52Bi")  # mask, others, exit status
_INFO_EXIT = 1 << 3
_WIPEONFORK = 18  # of madvise(2), Linux 4.14
_READY = 1000  # looked at in a row


class _Asked:
    """Where the kernel wipes no memory: asks for the pid each time."""

    def __getitem__(self, _: int) -> int:
        return os.getpid()

    def __setitem__(self, _: int, pid: int) -> None:
        pass


def _here() -> memoryview | _Asked:
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        page.madvise(_WIPEONFORK)
    except OSError:
        return _Asked()
    return memoryview(page).cast("i")


here = _here()
"""here[0]: the pid that this process wrote there, 0 before that. A forked child finds 0, also where
no code of Python runs at the fork: less than a system call."""


def credentials(sock: socket.socket) -> tuple[int, int]:
    """(uid, pid) of the peer; pid 0 when it lives in another pid namespace."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(raw)
    return uid, max(pid, 0)


def group(sock: socket.socket) -> int:
    """The gid of the peer."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return int(_UCRED.unpack(raw)[2])


def pidfd_of(sock: socket.socket, pid: int) -> int:
    """A pidfd of the peer, which the caller owns; -1 where its process cannot be watched. Raises
    OSError where there is no descriptor left: a claim would not be watched, and nobody told."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
    if pid <= 0:
        return -1
    try:
        fd = os.pidfd_open(pid)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        return -1
    poll = select.poll()
    poll.register(sock, 0)
    if poll.poll(0):  # hung up: the pid may belong to another process by now
        os.close(fd)
        return -1
    return fd


def pid_of(pidfd: int) -> int:
    """The pid of what a client calls a pidfd: -1 when it has ended, 0 when it cannot be seen.

    Raises ValueError for another kind of descriptor, without touching the file itself."""
    target = os.readlink(f"/proc/self/fd/{pidfd}")
    if not target.startswith(("anon_inode:[pidfd]", "pidfd:")):
        raise ValueError("not a pidfd")
    with open(f"/proc/self/fdinfo/{pidfd}", "rb", buffering=0) as file:
        for line in file.read().splitlines():
            if line.startswith(b"Pid:"):
                return int(line[4:])
    return 0


def identity(pidfd: int) -> tuple[int, int]:
    """(pid, inode) of a pidfd: together the name of a process. The pid is as in `pid_of`; the
    inode 0 before Linux 6.9, whose pidfds all have one inode. Raises ValueError."""
    pid, of_process = pid_of(pidfd), os.fstat(pidfd)
    other = os.eventfd(0)
    try:
        # Without pidfs both are of the file system of anonymous inodes.
        numbered = os.fstat(other).st_dev != of_process.st_dev
    finally:
        os.close(other)
    return pid, of_process.st_ino if numbered else 0


def open_identity(pid: int, inode: int) -> int:
    """A pidfd of the process, which the caller owns; -1 when it has ended and was reaped. Raises
    OSError where there is no descriptor left."""
    try:
        fd = os.pidfd_open(pid)
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.EINVAL):  # EINVAL: the pid is a thread's by now
            return -1
        raise
    if inode and os.fstat(fd).st_ino != inode:
        os.close(fd)
        return -1
    return fd


def has_ended(pidfd: int) -> bool:
    """Whether the process has ended (a zombie has)."""
    return is_ready(pidfd, select.POLLIN)


def kill(pidfd: int) -> None:
    """SIGKILL. Raises ProcessLookupError, PermissionError."""
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def how_ended(pidfd: int) -> str:
    """How a process ended: "exited 1", "killed by SIGKILL"; an empty string where the kernel does
    not tell (before Linux 6.15, or while the process is not reaped)."""
    info = bytearray(_INFO.pack(_INFO_EXIT, *bytes(52), 0))
    try:
        fcntl.ioctl(pidfd, _GET_INFO, info)
    except OSError:
        return ""
    known, *_, status = _INFO.unpack(info)
    if not known & _INFO_EXIT:
        return ""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        from signal import Signals

        try:
            return f"killed by {Signals(number).name}"
        except ValueError:
            return f"killed by signal {number}"
    return f"exited {os.WEXITSTATUS(status)}"


def same(pidfd: int, other: int) -> bool:
    """Whether two pidfds are of one process."""
    try:
        (pid, inode), (other_pid, other_inode) = identity(pidfd), identity(other)
        return inode == other_inode if inode else 0 < pid == other_pid
    except (OSError, ValueError):
        return False


def is_ready(fd: int, events: int = 0) -> bool:
    """Whether one of `events` is there, or the other end of a socket has hung up."""
    poll = select.poll()
    poll.register(fd, events)
    return bool(poll.poll(0))


def effective_uid(pid: int) -> int:
    """The effective uid of a process; -1 when nobody can say. (The owner of /proc/PID is root for a
    process that has changed its uid.)"""
    said = (line for line in proc.lines(pid, "status") if line.startswith("Uid:"))
    return next((int(line.split()[2]) for line in said), -1)


def in_our_user_namespace(pid: int) -> bool | None:
    """Whether the uids of a process mean what they mean here; None: nobody can tell, /proc of the
    process is hidden, or the process lives in another pid namespace (pid 0)."""
    try:
        with open(f"/proc/{pid}/uid_map") as theirs, open("/proc/self/uid_map") as ours:
            return pid > 0 and theirs.read() == ours.read()
    except OSError:
        return None


def every_uid_is_mapped() -> bool:
    """Whether this user namespace has a number for every uid, as the first one of a machine has:
    then no uid stands for another."""
    rows = proc.lines("self", "uid_map")
    return sum(int(line.split()[2]) for line in rows) >= (1 << 32) - 1


def overflow_uid() -> int:
    """The uid that stands for all uids which have no mapping in this user namespace."""
    return int(proc.read("sys", "kernel/overflowuid") or 65534)


class Watch:
    """Waits for the end of many processes, and of other ends of sockets: one epoll descriptor,
    watched by one task."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self._calls: dict[int, tuple[int, Callable[[], None]]] = {}

    def add(self, fd: int, ended: Callable[[], None], events: int = select.EPOLLIN) -> None:
        """A pidfd; or with `events` 0 a socket, whose peer hangs up. Borrowed until `remove`."""
        self._calls[fd] = events, ended
        self.epoll.register(fd, events)

    def remove(self, fd: int) -> None:
        if self._calls.pop(fd, None) is not None:
            self.epoll.unregister(fd)

    def collect(self, seconds: float = math.inf) -> bool:
        """Report those that have ended by now, each once. After `seconds` the rest is left for the
        next time; the epoll descriptor stays readable. Returns whether nothing was left."""
        until = time.monotonic() + seconds
        ready = self.epoll.poll(0, _READY)
        for fd, _ in ready:
            if time.monotonic() > until:
                return False
            events, ended = self._calls.get(fd, (0, None))
            # What one end led to may have closed another's descriptor, and its number be used anew.
            if ended is not None and is_ready(fd, events):
                self.remove(fd)
                ended()
        return len(ready) < _READY

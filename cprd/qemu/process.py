"""A QEMU as a process, by the kernel's word: its identity and end, its command line, its listening
sockets, its deleted files, its output.

A pid alone may mean another process later. So a Process holds a pidfd, and a record has the start
time (field 22 of /proc/PID/stat) beside the pid. Another user's process may hide the rest; a
function then returns nothing, and the caller does without.
"""

from __future__ import annotations

import _socket as socket  # as in rights
import os
import stat

from cprd.linux import identity, proc
from cprd.linux.processes import credentials, effective_uid, has_ended, kill, pidfd_of
from cprd.qemu import signals

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from typing import Any

GUARD = "CPRD_GUARD"
"""In the environment of a QEMU: PID:START of the guard (spawn.py) that reads its stderr."""

_ACCEPTS = 0x10000  # __SO_ACCEPTCON in the Flags of /proc/net/unix
_LISTEN = "0A"  # TCP_LISTEN in the st of /proc/net/tcp
_PIDFD_GETFD = 438  # the same on every architecture


class Process:
    """One process. Owns `pidfd`."""

    def __init__(self, pid: int, pidfd: int, uid: int) -> None:
        """`uid`: by the credentials of its socket; -1 for a process of our own making."""
        self.pid = pid
        self.pidfd = pidfd
        self.uid = uid
        self.started = start_time(pid)

    @classmethod
    def behind(cls, sock: socket.socket) -> Process | None:
        """The process that listens at the other end; None in another pid namespace.

        Credentials are of the process that called listen(); QEMU does so itself even on a socket
        that it inherited."""
        uid, pid = credentials(sock)
        pidfd = pidfd_of(sock, pid) if pid > 0 else -1
        return cls(pid, pidfd, uid) if pidfd >= 0 else None

    @classmethod
    def open(cls, pid: int, uid: int = -1) -> Process | None:
        """The process of that pid; None when there is none."""
        try:
            return cls(pid, os.pidfd_open(pid), uid)
        except OSError:
            return None

    @classmethod
    def find(cls, record: dict[str, Any] | None, uid: int = 0) -> Process | None:
        """The process of a record, unless that process has ended. `uid`: the author of the record;
        only root's word counts for a process of another uid."""
        pid = record.get("pid") if isinstance(record, dict) else None
        if record is None or not isinstance(pid, int) or not 0 < pid < 1 << 31:
            return None
        found = cls.open(pid, uid)
        if found is None:
            return None
        other = uid != 0 and effective_uid(found.pid) != uid
        if other or found.ended() or found.started != record.get("start"):
            found.close()
            return None
        return found

    @classmethod
    def lives(cls, record: Any) -> bool:
        """Whether the process of a record has not ended."""
        found = cls.find(record)
        if found is not None:
            found.close()
        return found is not None

    def record(self) -> dict[str, int]:
        """What `find` needs."""
        return {"pid": self.pid, "start": self.started}

    def ended(self) -> bool:
        return has_ended(self.pidfd)

    def kill(self) -> None:
        """SIGKILL; to a process that we found, with the rights of the uid that we act as."""
        try:
            if self.uid == -1:
                kill(self.pidfd)
                return
            with identity.wholly():
                kill(self.pidfd)
        except ProcessLookupError:
            pass

    def wait(self, timeout: float) -> bool:
        """Whether the process ended within `timeout` seconds."""
        return signals.readable(self.pidfd, timeout)

    def close(self) -> None:
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def start_time(pid: int) -> int:
    """The start of a process, in clock ticks since boot; 0 when nobody can say."""
    words = proc.read(pid, "stat").rpartition(b")")[2].split()
    return int(words[19]) if len(words) > 19 else 0


def command_line(pid: int) -> list[str]:
    """The words of a running process; [] when unreadable."""
    words = proc.read(pid, "cmdline").split(b"\0")[:-1]
    return [word.decode("utf-8", "surrogateescape") for word in words]


# Sockets and files


def unix_paths(pid: int) -> list[str]:
    """The paths of the UNIX sockets at which a process listens, as bound: relative to its working
    directory or not, and in its own root."""
    inodes = sockets_of(pid)
    found = []
    for line in proc.lines(pid, "net/unix")[1:]:
        # Num RefCount Protocol Flags Type St Inode Path; there is none when it is not bound, and @
        # stands for the NUL of an abstract one, which has no file.
        words = line.split(None, 7)
        if len(words) < 8 or words[7].startswith("@") or words[6] not in inodes:
            continue
        if int(words[3], 16) & _ACCEPTS:
            found.append(words[7])
    return found


def tcp_ports(pid: int) -> list[tuple[str, int]]:
    """(address, port) of the TCP sockets at which a process listens."""
    inodes = sockets_of(pid)
    found = []
    for table in ("tcp", "tcp6"):
        for line in proc.lines(pid, f"net/{table}")[1:]:
            # sl local_address rem_address st tx:rx tr:when retrnsmt uid timeout inode ...
            words = line.split()
            if len(words) > 9 and words[3] == _LISTEN and words[9] in inodes:
                address, _, port = words[1].partition(":")
                found.append((_address(address), int(port, 16)))
    return found


def deleted_files(pid: int) -> list[str]:
    """The paths of removed files that a process has open."""
    mark = " (deleted)"
    return [link.removesuffix(mark) for _, link in proc.files(pid) if link.endswith(mark)]


def sockets_of(pid: int) -> set[str]:
    """The inodes of the sockets of a process."""
    return {link[8:-1] for _, link in proc.files(pid) if link.startswith("socket:[")}


def _address(text: str) -> str:
    """Words of four bytes, each in the machine's own order."""
    raw = bytes.fromhex(text)
    words = (raw[at : at + 4] for at in range(0, len(raw), 4))
    if socket.ntohl(1) != 1:
        words = (word[::-1] for word in words)
    family = socket.AF_INET if len(raw) == 4 else socket.AF_INET6
    return socket.inet_ntop(family, b"".join(words))


# Output


def guard_mark(pid: int) -> str:
    """The value of $CPRD_GUARD for a guard of that pid."""
    return f"{pid}:{start_time(pid)}"


def output_of(process: Process, which: int) -> int:
    """A descriptor (the caller's) of the stdout (1) or stderr (2) of a process, for its successor.

    `cprctl qemu upgrade` ends while the new QEMU lives: a caller that reads cprctl through a pipe
    must not wait for the QEMU's end. Where the stderr is the pipe of a guard, the answer is the
    guard's own output, so that guards do not queue up with each upgrade. Where the kernel refuses
    (another uid, ptrace_scope), the answer is our own output, or /dev/null instead of a pipe."""
    fd = -1
    with identity.wholly():
        guard = guard_of(process) if which == 2 else None
        if guard is not None:
            fd = _getfd(guard.pidfd, 1)
            guard.close()
        if fd < 0:
            fd = _getfd(process.pidfd, which)
    if fd >= 0:
        return fd
    try:
        if not stat.S_ISFIFO(os.fstat(which).st_mode):
            return os.dup(which)
    except OSError:
        pass
    return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


def guard_of(process: Process) -> Process | None:
    """The guard (the caller's) that the environment of a process names, if the kernel agrees: a
    process of the same uid that reads the pipe at the stderr of the first."""
    found = _named_guard(process)
    if found is None:
        return None
    try:
        pipe = os.readlink(f"/proc/{process.pid}/fd/2")
        agrees = pipe.startswith("pipe:") and os.readlink(f"/proc/{found.pid}/fd/0") == pipe
        if (
            agrees
            and os.stat(f"/proc/{found.pid}").st_uid == os.stat(f"/proc/{process.pid}").st_uid
        ):
            return found
    except OSError:
        pass
    found.close()
    return None


def _named_guard(process: Process) -> Process | None:
    for entry in proc.read(process.pid, "environ").split(b"\0"):
        name, _, value = entry.partition(b"=")
        if name.decode(errors="replace") == GUARD:
            pid, _, start = value.partition(b":")
            try:
                return Process.find({"pid": int(pid), "start": int(start)})
            except ValueError:
                return None
    return None


def _getfd(pidfd: int, fd: int) -> int:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.syscall(_PIDFD_GETFD, pidfd, fd, 0))

"""Facts about sockets, from the kernel alone.

A descriptor given to a function here stays the caller's. Nothing here blocks.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

from cprd.errors import CprdError
from cprd.linux import proc, unix_diag

if TYPE_CHECKING:
    from collections.abc import Iterable

SO_NETNS_COOKIE = 71  # asm-generic/socket.h, Linux 5.14
SO_MEMINFO = 55
_SIOCUNIXFILE = 0x89E0  # linux/un.h
_KINDS: dict[int, str] = {
    socket.SOCK_STREAM: "stream",
    socket.SOCK_DGRAM: "dgram",
    socket.SOCK_SEQPACKET: "seqpacket",
}


class Facts(NamedTuple):
    """The facts of a socket."""

    family: int
    kind: int
    host: str  # "" for UNIX
    port: int  # 0 for UNIX
    scope: int  # interface index of a link-local IPv6 address
    path: str  # UNIX: the path as given to bind(), "\0..." an abstract name; "" when not bound
    v6only: bool
    device: str  # SO_BINDTODEVICE
    listening: bool
    connected: bool
    reuseport: bool
    namespace: int | None  # cookie of the network namespace; None before Linux 5.14
    inode: int

    @property
    def is_file(self) -> bool:
        """Whether the socket is bound to a path in the file system."""
        return bool(self.path) and not self.path.startswith("\0")

    def __str__(self) -> str:
        if self.family == socket.AF_UNIX:
            kind = _KINDS.get(self.kind, "unix")
            path = "@" + self.path[1:] if self.path.startswith("\0") else self.path
            return f"unix {kind} {path or '(not bound)'}"
        kind = "udp" if self.kind == socket.SOCK_DGRAM else "tcp"
        host = f"[{self.host}]" if self.family == socket.AF_INET6 else self.host
        only = " (IPv6 only)" if self.v6only and self.host == "::" else ""
        return f"{kind} {host}:{self.port}{only}"


def facts(fd: int) -> Facts | None:
    """The facts of the socket `fd`; None for another file, or another family."""
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return None
        sock = socket.socket(fileno=fd)
    except OSError:
        return None
    try:
        if sock.family not in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
            return None
        return _facts(sock)
    except OSError:
        return None
    finally:
        sock.detach()


def _facts(sock: socket.socket) -> Facts:
    name = sock.getsockname()
    host, port, scope, path = "", 0, 0, ""
    if sock.family == socket.AF_UNIX:
        path = os.fsdecode(name)
    else:
        host, port = name[0].partition("%")[0], name[1]
        scope = name[3] if sock.family == socket.AF_INET6 else 0
    six = sock.family == socket.AF_INET6
    device = sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16)
    return Facts(
        family=sock.family,
        kind=sock.type,
        host=host,
        port=port,
        scope=scope,
        path=path,
        v6only=six and sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) != 0,
        device=os.fsdecode(device.rstrip(b"\0")),
        listening=sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) != 0,
        connected=_connected(sock),
        reuseport=sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) != 0,
        namespace=_cookie(sock),
        inode=os.fstat(sock.fileno()).st_ino,
    )


def _connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _cookie(sock: socket.socket) -> int | None:
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)
    except OSError:
        return None
    return int.from_bytes(raw, sys.byteorder)


def namespace() -> int | None:
    """The cookie of this process's network namespace; None before Linux 5.14."""
    with socket.socket(socket.AF_UNIX) as sock:
        return _cookie(sock)


def has_ipv6() -> bool:
    """Whether a socket can be bound to the IPv6 wildcard here."""
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::", 0))
    except OSError:
        return False
    return True


# -- UNIX sockets and their files ----------------------------------------------------------------


def leads_to(path: str, fd: int, known: Facts) -> bool:
    """Whether a client that connects to `path` arrives at the UNIX socket `fd` (facts: `known`).

    Compared are inodes: of the file at `path`, and of the file that the socket was bound to.
    Where the kernel hides the latter (a socket of another network namespace, and no
    CAP_NET_ADMIN), the paths are compared, and somebody has to listen at `path`."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return False
    if not stat.S_ISSOCK(found.st_mode) or not known.is_file:
        return False
    same_text = os.path.realpath(path) == os.path.realpath(known.path)
    try:
        file = _bound_file(fd)
    except OSError:
        pass
    else:
        try:
            bound = os.fstat(file)
        finally:
            os.close(file)
        return (bound.st_dev, bound.st_ino) == (found.st_dev, found.st_ino)
    raw = unix_diag.ask(known.inode, unix_diag.SHOW_FILE).get(unix_diag.FILE)
    if raw is None:
        return same_text and os.path.isabs(known.path) and somebody_at(path, known.kind)
    inode, device = struct.unpack("=II", raw)
    if inode != found.st_ino & 0xFFFFFFFF:
        return False
    # The kernel's number of a device differs from stat()'s on btrfs and overlayfs.
    return same_text or os.makedev(device >> 20, device & 0xFFFFF) == found.st_dev


def _bound_file(fd: int) -> int:
    """Raises OSError: the kernel tells only who has CAP_NET_ADMIN."""
    return fcntl.ioctl(fd, _SIOCUNIXFILE, 0)


def file_of(fd: int, path: str) -> int:
    """An O_PATH descriptor, owned by the caller, of the file that the UNIX socket `fd` is bound to,
    whatever lies at `path` by now: another user may have the directory, and have put there a link,
    or a file that is not theirs. Raises OSError."""
    try:
        return _bound_file(fd)
    except OSError:
        pass
    file = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    found = os.fstat(file)
    raw = unix_diag.ask(os.fstat(fd).st_ino, unix_diag.SHOW_FILE).get(unix_diag.FILE)
    known = raw is None or struct.unpack("=II", raw)[0] == found.st_ino & 0xFFFFFFFF
    if known and stat.S_ISSOCK(found.st_mode):
        return file
    os.close(file)
    raise OSError(errno.ESTALE, "another file lies at the path of the socket")


def somebody_at(path: str, kind: int) -> bool:
    """Whether a UNIX socket listens at `path`, also with a full queue. False only where the kernel
    refuses the connection, or nothing is there. Waits for nobody."""
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)
        error = probe.connect_ex(path)
    return error not in (errno.ECONNREFUSED, errno.ENOENT, errno.ENOTDIR)


# -- what waits in a socket ----------------------------------------------------------------------


def queued(fd: int, known: Facts) -> str:
    """What nobody has taken from the socket `fd` yet: "3 connections", "1 connection", "512 bytes
    of datagrams"; "" for nothing."""
    if known.kind == socket.SOCK_DGRAM:
        count = _datagram_bytes(fd)
        return f"{count} bytes of datagrams" if count else ""
    count = connections(fd, known)
    return f"{count} connection{'s' * (count != 1)}" if count else ""


def connections(fd: int, known: Facts) -> int:
    """How many connections wait in the listener `fd` to be accepted; 0 where nobody can tell."""
    if not known.listening:
        return 0
    if known.family == socket.AF_UNIX:
        raw = unix_diag.ask(known.inode, unix_diag.SHOW_QUEUE).get(unix_diag.QUEUE, bytes(4))
        return int(struct.unpack_from("=I", raw)[0])
    sock = socket.socket(fileno=fd)
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        return int(struct.unpack_from("=I", info, 24)[0])  # tcpi_unacked: of a listener, its queue
    except (OSError, struct.error):
        return 0
    finally:
        sock.detach()


def _datagram_bytes(fd: int) -> int:
    sock = socket.socket(fileno=fd)
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36)
        return int(struct.unpack_from("=I", raw)[0])  # SK_MEMINFO_RMEM_ALLOC
    except (OSError, struct.error):
        return 0
    finally:
        sock.detach()


# -- processes -----------------------------------------------------------------------------------


def others_with(inodes: Iterable[int], *, most: float = 0.3) -> dict[int, str]:
    """Other processes with a socket of `inodes` open: pid -> name. The search begins with the
    newest process, takes at most `most` seconds of CPU time, so that other load cuts nothing off,
    and sees what /proc allows."""
    links = {f"socket:[{inode}]" for inode in inodes}
    end = time.thread_time() + most
    found = {}
    mine = proc.read("self", "cmdline")  # our own children look at what is held, and close it
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()] if links else []
    for pid in sorted(pids, reverse=True):
        if time.thread_time() > end:
            break
        has_one = pid != os.getpid() and any(link in links for _, link in proc.files(pid))
        if has_one and proc.read(pid, "cmdline") != mine:
            found[pid] = proc.read(pid, "comm").decode("utf-8", "replace").strip()
    return found


def copy_from(pidfd: int, number: int) -> int:
    """A duplicate of descriptor `number` of another process, close-on-exec, owned by the caller.

    Wants Linux 5.6 and the right to trace that process. Raises CprdError for a kernel without
    pidfd_getfd, OSError (EBADF, EPERM, ESRCH) otherwise."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(438, pidfd, number, 0)  # pidfd_getfd, the same number on every machine
    if fd < 0:
        code = ctypes.get_errno()
        if code == errno.ENOSYS:
            raise CprdError("this kernel has no pidfd_getfd (Linux 5.6, or a seccomp filter)")
        raise OSError(code, os.strerror(code))
    return int(fd)

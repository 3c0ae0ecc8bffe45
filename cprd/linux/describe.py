"""What a descriptor is, in a few words, without disturbing it.

A held descriptor belongs to somebody else, and may have been chosen to hurt whoever looks at it:
a stat of a file on a dead FUSE mount never returns, a read eats what the successor was to get. So
only these are asked, in this order:

- readlink of /proc/self/fd/N: the kernel's own name for it, no file system is consulted;
- F_GETFL: how it was opened; F_GET_SEALS: only memory files (memfd, tmpfs, hugetlbfs) have an
  answer, and only for them is fstat safe, for they have no server behind them;
- sockets: getsockname, getpeername, getsockopt of what reading does not reset (never SO_ERROR);
- /proc/self/fdinfo/N of the few kinds listed in `_TOLD_BY_FDINFO`, and of tun. Not of epoll (its
  lock is held while a foreign file is polled), nor inotify (it encodes foreign inodes' handles).

Names of device files are what the path says, which a mount namespace can forge: good enough for a
human eye, not for a decision. Pipes are not asked for their size (a sleeping reader may hold the
lock), and a socket whose owner sleeps in a page fault can still keep getsockname waiting:
`cprctl show` therefore looks from a child process.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys

from cprd.linux.stdio import printable

_ACCESS = {os.O_RDONLY: "read-only", os.O_WRONLY: "write-only", os.O_RDWR: "read-write"}
_SEALS = (
    (fcntl.F_SEAL_SHRINK, "shrink"),
    (fcntl.F_SEAL_GROW, "grow"),
    (fcntl.F_SEAL_WRITE, "write"),
    (0x10, "future-write"),  # F_SEAL_FUTURE_WRITE, linux/fcntl.h
    (0x20, "exec"),  # F_SEAL_EXEC
    (fcntl.F_SEAL_SEAL, "seal"),
)
_TCP_STATES = (
    "",
    "established",
    "syn-sent",
    "syn-received",
    "fin-wait-1",
    "fin-wait-2",
    "time-wait",
    "closed",
    "close-wait",
    "last-ack",
    "listening",
    "closing",
)  # net/tcp_states.h
_PROTOCOLS = {
    socket.IPPROTO_TCP: "tcp",
    socket.IPPROTO_UDP: "udp",
    socket.IPPROTO_ICMP: "icmp",
    socket.IPPROTO_ICMPV6: "icmpv6",
    132: "sctp",
    136: "udplite",
    262: "mptcp",
}
_TYPES = {
    socket.SOCK_STREAM: "stream",
    socket.SOCK_DGRAM: "dgram",
    socket.SOCK_SEQPACKET: "seqpacket",
    socket.SOCK_RAW: "raw",
    socket.SOCK_RDM: "rdm",
}
_ANON = {"eventpoll": "epoll", "io_uring": "io_uring", "fscontext": "file system context"}
_TOLD_BY_FDINFO = ("eventfd", "timerfd", "signalfd", "pidfd")
_CLOCKS = {0: "realtime", 1: "monotonic", 7: "boottime", 8: "realtime-alarm", 9: "boottime-alarm"}
_DEVICES = {
    "/dev/kvm": "kvm (/dev/kvm)",
    "/dev/vfio/vfio": "vfio container",
    "/dev/iommu": "iommufd",
    "/dev/fuse": "fuse connection",
}


def describe(fd: int) -> str:
    """One line about `fd`, which stays the caller's and is left as it was.

    Raises OSError(EBADF) when it is not open.
    """
    try:
        link = os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        fcntl.fcntl(fd, fcntl.F_GETFD)  # says EBADF; otherwise /proc is not mounted
        return "open (what it is cannot be seen: /proc is not mounted)"
    if link.startswith("socket:"):
        return _socket(fd)
    if link.startswith("anon_inode:"):
        return _anonymous(fd, link.removeprefix("anon_inode:").strip("[]"))
    if link.startswith("pipe:"):
        return f"pipe, {_end(fd)}"
    if link.startswith("/"):
        return _file(fd, link)
    return printable(link)  # net:[...], mnt:[...], dmabuf and whatever is to come


def size(count: int) -> str:
    """Bytes for people: 512 B, 4.0 KiB, 2.0 GiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def _end(fd: int) -> str:
    access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    return {os.O_RDONLY: "read end", os.O_WRONLY: "write end"}.get(access, "both ends")


def _fdinfo(fd: int) -> dict[str, str]:
    with open(f"/proc/self/fdinfo/{fd}", encoding="utf-8", errors="replace") as file:
        pairs = (line.split(":", 1) for line in file if ":" in line)
        return {key.strip(): value.strip() for key, value in pairs}


def _number(text: str, base: int = 10) -> int:
    try:
        return int(text, base)
    except ValueError:
        return 0


# -- files ---------------------------------------------------------------------------------------


def _file(fd: int, link: str) -> str:
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    path = printable(link)
    if flags & os.O_PATH:
        return f"path {path}"
    seals = _seals(fd)
    if seals is not None:
        return _memory(fd, link, seals)
    if link.startswith("/dev/"):
        return _device(fd, link)
    if flags & os.O_DIRECTORY:
        return f"directory {path}"
    return f"file {path}, {_ACCESS.get(flags & os.O_ACCMODE, 'no access')}"


def _seals(fd: int) -> int | None:
    """The seals of a memory file; None for every other file, which has none."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        if error.errno == errno.EBADF:
            raise
        return None


def _memory(fd: int, link: str, seals: int) -> str:
    length = size(os.fstat(fd).st_size)
    deleted = link.endswith(" (deleted)")
    if link.startswith("/memfd:") and deleted:
        name = printable(link.removeprefix("/memfd:").removesuffix(" (deleted)"))
        names = [name for bit, name in _SEALS if seals & bit]
        state = f"sealed ({' '.join(names)})" if names else "no seals"
        if seals == fcntl.F_SEAL_SEAL:
            state = "no seals, and none can be added"
        return f"memfd {name + ' ' if name else ''}{length}, {state}"
    if link.startswith("/SYSV") and deleted:
        return f"shared memory {length} (System V)"
    access = _ACCESS.get(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE, "no access")
    return f"file {printable(link)} {length} in memory, {access}"


def _device(fd: int, path: str) -> str:
    known = _DEVICES.get(path)
    if known is not None:
        return known
    if path == "/dev/net/tun":
        return _tun(fd)
    if path.startswith("/dev/vfio/devices/"):
        return f"vfio device {printable(path.removeprefix('/dev/vfio/devices/'))}"
    if path.startswith("/dev/vfio/"):
        return f"vfio group {printable(path.removeprefix('/dev/vfio/'))}"
    if path.startswith(("/dev/tap", "/dev/vhost-")):
        return f"{printable(path.removeprefix('/dev/'))} ({printable(path)})"
    kind = "terminal" if path.startswith(("/dev/pts/", "/dev/tty")) else "device"
    return f"{kind} {printable(path)}"


def _tun(fd: int) -> str:
    """fdinfo says which interface it drives; only then is the ioctl surely tun's."""
    name = _fdinfo(fd).get("iff", "")
    if not name:
        return "tun/tap (/dev/net/tun), no interface yet"
    request = bytearray(40)  # struct ifreq: 16 bytes of name, then the flags, linux/if.h
    try:
        fcntl.ioctl(fd, 0x800454D2, request)  # TUNGETIFF, linux/if_tun.h
    except OSError:
        return f"tun/tap {printable(name)}"
    flags = int.from_bytes(request[16:18], sys.byteorder)
    queues = ", one of several queues" if flags & 0x100 else ""
    return f"{'tap' if flags & 2 else 'tun'} {printable(name)}{queues}"


# -- anonymous inodes ----------------------------------------------------------------------------


def _anonymous(fd: int, kind: str) -> str:
    known = _ANON.get(kind)
    if known is not None:
        return known
    if kind.startswith("kvm-vcpu-stats"):
        return printable(f"kvm vcpu statistics {kind.partition(':')[2]}".strip())
    if kind.startswith("kvm-vcpu"):
        return printable(f"kvm vcpu {kind.partition(':')[2]}".strip())
    if kind.startswith("kvm-"):
        return printable(f"kvm {kind.removeprefix('kvm-')}")
    if kind.startswith("vfio"):
        return printable(f"vfio {kind.removeprefix('vfio').lstrip('-')}".strip())
    if kind not in _TOLD_BY_FDINFO:
        return printable(kind)
    info = _fdinfo(fd)
    if kind == "eventfd":
        semaphore = ", semaphore" if info.get("eventfd-semaphore", "0") == "1" else ""
        return f"eventfd, count {_number(info.get('eventfd-count', '0'), 16)}{semaphore}"
    if kind == "pidfd":
        pid = _number(info.get("Pid", "0"))
        where = {-1: "a process that is gone", 0: "a process of another pid namespace"}
        return f"pidfd of {where.get(pid, f'process {pid}')}"
    if kind == "timerfd":
        clock = _number(info.get("clockid", "-1"))
        return f"timerfd, {_CLOCKS.get(clock, f'clock {clock}')}"
    mask = _number(info.get("sigmask", "0"), 16)
    signals = " ".join(str(n + 1) for n in range(64) if mask >> n & 1)
    return f"signalfd, signals {signals or 'none'}"


# -- sockets -------------------------------------------------------------------------------------


def _socket(fd: int) -> str:
    if socket.getdefaulttimeout() is not None:
        # A socket object made now would set O_NONBLOCK on what is not ours.
        return "socket (no more is asked while socket.setdefaulttimeout() is in use)"
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        return "socket"
    try:
        return _describe_socket(sock)
    finally:
        sock.detach()


def _describe_socket(sock: socket.socket) -> str:
    family, kind = sock.family, _TYPES.get(sock.type, f"type {int(sock.type)}")
    if family == socket.AF_UNIX:
        return _unix(sock, kind)
    if family in (socket.AF_INET, socket.AF_INET6):
        return _inet(sock, kind)
    name = socket.AddressFamily(family).name if family in iter(socket.AddressFamily) else ""
    label = name.removeprefix("AF_").lower() or f"family {int(family)}"
    local, peer = _ask(sock.getsockname), _ask(sock.getpeername)
    words = [f"{label} {kind}"]
    if label == "netlink" and isinstance(local, tuple):
        return f"netlink, protocol {sock.proto}, port {local[0]}"
    if label == "packet" and isinstance(local, tuple):
        return f"packet {kind}, interface {printable(str(local[0])) or 'any'}"
    if label == "vsock" and isinstance(local, tuple):
        words.append(_vsock(local))
        if isinstance(peer, tuple):
            words += ["->", _vsock(peer)]
    if _listening(sock):
        words.append("listening")
    return " ".join(words)


def _vsock(address: tuple[object, ...]) -> str:
    cid, port = address[0], address[1]
    return f"{'any' if cid == 0xFFFFFFFF else cid}:{'any' if port == 0xFFFFFFFF else port}"


def _ask(question: object) -> object:
    """The answer of getsockname or getpeername, None when there is none (not connected)."""
    try:
        return question() if callable(question) else None
    except OSError:
        return None


def _listening(sock: socket.socket) -> bool:
    try:
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) != 0
    except OSError:
        return False


def _inet(sock: socket.socket, kind: str) -> str:
    label = _PROTOCOLS.get(sock.proto, f"{kind} protocol {sock.proto}")
    words = [f"raw {label}" if sock.type == socket.SOCK_RAW else label]
    for question, arrow in ((sock.getsockname, ""), (sock.getpeername, "->")):
        address = _ask(question)
        if isinstance(address, tuple) and not (arrow and address[1] == 0):
            words += [arrow, _host_port(address)] if arrow else [_host_port(address)]
    state = ""
    if sock.proto == socket.IPPROTO_TCP:
        try:
            number = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
            state = _TCP_STATES[number] if number < len(_TCP_STATES) else f"state {number}"
        except OSError:
            pass
    if not state and _listening(sock):
        state = "listening"
    return " ".join([*words, state] if state else words)


def _host_port(address: tuple[object, ...]) -> str:
    host, port = str(address[0]), address[1]
    if len(address) == 4:
        scope = f"%{address[3]}" if address[3] else ""
        return f"[{host}{scope}]:{port}"
    return f"{host}:{port}"


def _unix(sock: socket.socket, kind: str) -> str:
    words = [f"unix {kind}"]
    local = _path(_ask(sock.getsockname))
    peer = _ask(sock.getpeername)
    if local:
        words.append(local)
    if _path(peer):
        words += ["->", _path(peer)]
    if _listening(sock):
        words.append("listening")
    elif peer is not None:
        words.append("hung up" if _hung_up(sock) else "connected")
    return " ".join(words)


def _path(address: object) -> str:
    if isinstance(address, bytes):
        text = os.fsdecode(address)
        return printable("@" + text[1:] if text.startswith("\0") else text)
    return printable(address) if isinstance(address, str) else ""


def _hung_up(sock: socket.socket) -> bool:
    """Asks with a poll that does not wait; no third party answers for this family."""
    import select

    poll = select.poll()
    poll.register(sock, 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0))

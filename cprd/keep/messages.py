"""The receiving end of sd_notify(3), and the sending end towards a manager above."""

import os
import socket
import struct

CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: from the kernel
SPACE = socket.CMSG_SPACE(CREDENTIALS.size) + socket.CMSG_SPACE(253 * 4)  # SCM_MAX_FD
CLOEXEC = 0x40000000  # MSG_CMSG_CLOEXEC


class Message:
    """One datagram. Owns `fds` until `close`. `cut`: some did not arrive."""

    def __init__(self, data: bytes, ancillary: list[tuple[int, int, bytes]], flags: int) -> None:
        self.pid = 0
        self.fds: list[int] = []
        self.cut = bool(flags & socket.MSG_CTRUNC)
        for _, kind, raw in ancillary:
            if kind == socket.SCM_RIGHTS:
                self.fds += memoryview(raw[: len(raw) // 4 * 4]).cast("i")
            elif kind == socket.SCM_CREDENTIALS:
                self.pid = CREDENTIALS.unpack(raw)[0]
        text = data.decode(errors="replace")
        words = [line.partition("=") for line in reversed(text.split("\n"))]  # the first one counts
        self.fields = {key: value for key, _, value in words}

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.pop())


def listen(path: str) -> socket.socket:
    """A socket for messages at `path`, owned by the caller; a file at `path` is replaced. Raises
    OSError."""
    own = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    own.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    if os.path.lexists(path):
        os.unlink(path)
    before = os.umask(0o177)
    try:
        own.bind(path)
    finally:
        os.umask(before)
    return own


def receive(own: socket.socket) -> Message | None:
    """The next message; None when there is none now. Never blocks."""
    try:
        data, ancillary, flags, _ = own.recvmsg(8192, SPACE, socket.MSG_DONTWAIT | CLOEXEC)
    except BlockingIOError:
        return None
    return Message(data, ancillary, flags)


def send_up(*lines: str) -> None:
    """Tell the manager above, if there is a manager that listens. Never blocks."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if lines and address[:1] in ("/", "@"):
        name = "\0" + address[1:] if address[0] == "@" else address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as up:
            try:
                up.sendto("\n".join(lines).encode(errors="replace"), name)
            except OSError:
                pass

"""The program behind `releasing`: python -I -S cprd/daemon/releaser.py fork|hold.

Standard input is a socket. `fork` forks a releaser for each socket received there. A releaser lets
go of whatever arrives at its socket, and acknowledges each message with a byte. A close may block
for ever, in the kernel, beyond any signal: nobody waits for a releaser. `hold` keeps inherited
descriptors until the daemon has gone, and ends. Standard library only, and little of the library: a
releaser costs some hundred KiB of its own.
"""

import _socket
import os
import signal
import sys
from array import array

CLOSE = b"c"  # close the descriptors of a message, once the daemon has closed its copies
CLOSED = b"o"  # the daemon has: whoever closes last may block
DRAIN = b"d"  # drop everything queued in the sockets of a message, then close
AFTER = b"a"  # close the descriptors of a message after the end of the daemon
MOST = 200  # descriptors in a message
_SPACE = _socket.CMSG_SPACE(MOST * 4)


def received(sock: _socket.socket) -> tuple[bytes, list[int]]:
    """The next message and the descriptors, owned by the caller; no byte at the end."""
    data, ancillary, flags, _ = sock.recvmsg(1, _SPACE, _socket.MSG_CMSG_CLOEXEC)
    fds = array("i")
    for level, kind, raw in ancillary:
        if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS):
            fds.frombytes(raw[: len(raw) - len(raw) % 4])
    if flags & _socket.MSG_CTRUNC:
        return b"", []  # no descriptor left: an end instead of a false acknowledgement
    return data, list(fds)


def empty(fd: int) -> None:
    """Drop everything queued in a socket. Blocks as long as a dropped file does."""
    sock = _socket.socket(fileno=os.dup(fd))
    try:
        while sock.recv(1, _socket.MSG_DONTWAIT):
            pass
    except OSError:
        pass
    sock.close()


def release(sock: _socket.socket) -> None:
    """Let go of everything that arrives, until the daemon has closed its end."""
    while True:
        kind, fds = received(sock)
        if not kind:
            return  # the end of this process closes the rest
        if kind == CLOSE:
            received(sock)  # CLOSED, or the end of the daemon
        for fd in fds:
            if kind == DRAIN:
                empty(fd)
            if kind != AFTER:
                os.close(fd)
        try:
            sock.send(b".", _socket.MSG_NOSIGNAL)
        except OSError:
            pass  # the daemon has gone, and left more to release


def fork(wanted: _socket.socket) -> None:
    """Fork a releaser for each socket that arrives, until the daemon has closed its end."""
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # left open by whoever started the daemon
    while True:
        kind, fds = received(wanted)
        if not kind:
            return
        for fd in fds:
            if os.fork() == 0:
                wanted.close()
                release(_socket.socket(fileno=fd))
                os._exit(0)
            os.close(fd)


def main(what: str) -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(ignored, signal.SIG_IGN)  # SIGCHLD: ended releasers leave no zombie
    sock = _socket.socket(fileno=0)
    if what == "fork":
        fork(sock)
    else:
        sock.recv(1)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    finally:
        os._exit(0)

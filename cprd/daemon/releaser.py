"""The program behind `releasing`: python -I -S cprd/daemon/releaser.py FD.

The program forks a releaser for each socket received at FD. A releaser closes whatever arrives at
its socket, and acknowledges with a byte. A close may block for ever, in the kernel, beyond any
signal: nobody waits for a releaser. Standard library only, and little of the library: a releaser
costs some hundred KiB of its own.
"""

import _socket
import os
import signal
import sys
from array import array

_SPACE = _socket.CMSG_SPACE(8 * 4)


def received(sock: _socket.socket) -> list[int] | None:
    """The descriptors of the next message, owned by the caller; None at the end."""
    data, ancillary, _, _ = sock.recvmsg(1, _SPACE, _socket.MSG_CMSG_CLOEXEC)
    fds = array("i")
    for level, kind, raw in ancillary:
        if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS):
            fds.frombytes(raw[: len(raw) - len(raw) % 4])
    return list(fds) if data else None


def empty(fd: int) -> None:
    """Drop everything queued in a socket. Blocks as long as a dropped file does."""
    try:
        sock = _socket.socket(fileno=os.dup(fd))
    except OSError:
        return  # not a socket
    try:
        while sock.recv(1, _socket.MSG_DONTWAIT):
            pass
    except OSError:
        pass
    sock.close()


def release(sock: _socket.socket) -> None:
    """Let go of everything that arrives, until the daemon has closed its end."""
    while (fds := received(sock)) is not None:
        for fd in fds:
            empty(fd)
            os.close(fd)
        try:
            sock.send(b".", _socket.MSG_NOSIGNAL)
        except OSError:
            pass  # the daemon has gone, and left more to release


def main(number: int) -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(ignored, signal.SIG_IGN)  # SIGCHLD: ended releasers leave no zombie
    wanted = _socket.socket(fileno=number)
    while (fds := received(wanted)) is not None:
        for fd in fds:
            if os.fork() == 0:
                wanted.close()
                release(_socket.socket(fileno=fd))
                os._exit(0)
            os.close(fd)


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]))
    finally:
        os._exit(0)

"""Take open sockets away from a program, number for number, without a word to the peers.

A library that closes a connection may say so to the peer first: shutdown(), a Close frame, TLS's
close_notify. Whoever shares the connection with another process must not. So each number gets
another file: a socket at whose other end nobody is, which reads as an end of file and refuses
writes (EPIPE).
"""

from __future__ import annotations

import os
import select
import socket
import stat

_EPOLL = "anon_inode:[eventpoll]"


def silence(inodes: set[int]) -> list[int]:
    """Put an inert socket in the place of each open socket with one of these inodes, after taking
    it out of the epoll sets of this process. Returns the numbers, which stay their owners'.

    A thread that sleeps in a system call on such a socket goes on with the old file. Does not
    block. Raises OSError (EMFILE) before anything was changed."""
    found = [fd for fd in _numbers() if _inode(fd) in inodes]
    if not found:
        return []
    inert, other = socket.socketpair()
    try:
        other.close()
        inert.setblocking(False)
        _forget(set(found))
        for fd in found:
            os.dup2(inert.fileno(), fd, inheritable=False)
    finally:
        inert.close()
    return found


def _numbers() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/fd")]


def _inode(fd: int) -> int:
    """Of a socket; -1 for anything else."""
    try:
        found = os.fstat(fd)
    except OSError:
        return -1
    return found.st_ino if stat.S_ISSOCK(found.st_mode) else -1


def _forget(fds: set[int]) -> None:
    """A set goes on reporting a file that is still open elsewhere, by a number that means another
    file by then."""
    for number in _numbers():
        try:
            if os.readlink(f"/proc/self/fd/{number}") != _EPOLL:
                continue
            with open(f"/proc/self/fdinfo/{number}") as info:
                watched = [int(line.split()[1]) for line in info if line.startswith("tfd:")]
            with select.epoll.fromfd(os.dup(number)) as epoll:
                for fd in fds.intersection(watched):
                    epoll.unregister(fd)
        except OSError:
            continue  # closed by another thread meanwhile

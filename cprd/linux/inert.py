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

from cprd.linux import proc

_EPOLL = "anon_inode:[eventpoll]"


def silence(inodes: set[int]) -> list[int]:
    """Put an inert socket in the place of each open socket with one of these inodes, after taking
    it out of the epoll sets of this process. Returns the numbers, which stay their owners'.

    A thread that sleeps in a system call on such a socket goes on with the old file. Does not
    block. Raises OSError (EMFILE) before anything was changed."""
    links = {f"socket:[{inode}]" for inode in inodes}
    found = [fd for fd, link in proc.files("self") if link in links]
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


def _forget(fds: set[int]) -> None:
    """A set goes on reporting a file that is still open elsewhere, by a number that means another
    file by then."""
    for number, link in proc.files("self"):
        if link != _EPOLL:
            continue
        info = proc.lines("self", f"fdinfo/{number}")
        watched = [int(line.split()[1]) for line in info if line.startswith("tfd:")]
        try:
            with select.epoll.fromfd(os.dup(number)) as epoll:
                for fd in fds.intersection(watched):
                    epoll.unregister(fd)
        except OSError:
            continue  # closed by another thread meanwhile

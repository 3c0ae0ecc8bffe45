"""Sockets are taken away from a program, and nobody else hears a word."""

from __future__ import annotations

import os
import select
import socket

import pytest

from cprd.linux.inert import silence
from tests.support.patience import PATIENCE

pytestmark = pytest.mark.usefixtures("nothing_leaks")


def test_every_number_of_a_socket_means_an_inert_one() -> None:
    peer, mine = socket.socketpair()
    other, _other = socket.socketpair()
    kept = socket.socket(fileno=os.dup(mine.fileno()))  # the successor's, in another process
    copy = mine.dup()
    inode = os.fstat(mine.fileno()).st_ino
    with peer, mine, other, _other, copy, select.epoll() as epoll:
        epoll.register(mine, select.EPOLLIN)
        epoll.register(other, select.EPOLLIN)
        peer.sendall(b"unread")
        assert epoll.poll(PATIENCE)
        hidden = os.pidfd_open(os.getpid())  # no socket: not looked at
        found = silence({inode})
        os.close(hidden)
        assert sorted(found) == sorted([mine.fileno(), copy.fileno(), kept.fileno()])
        assert epoll.poll(0) == []  # not for ever, by a number that means something else
        for each in (mine, copy):
            assert each.recv(1) == b""
            with pytest.raises(BrokenPipeError):
                each.send(b"goodbye")
            each.shutdown(socket.SHUT_RDWR)
            assert not os.get_inheritable(each.fileno())
        _other.send(b"x")
        assert epoll.poll(PATIENCE) == [(other.fileno(), select.EPOLLIN)]
        kept.close()


def test_nothing_is_opened_where_nothing_is_found() -> None:
    assert silence({0}) == []

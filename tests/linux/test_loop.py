"""A socket that is connected to itself is a queue, and nobody else's."""

from __future__ import annotations

import _socket
import os
import socket
from array import array
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cprd.linux.loop import loop
from cprd.linux.rights import scm_fds

RIGHTS = (socket.SOL_SOCKET, socket.SCM_RIGHTS)
pytestmark = pytest.mark.usefixtures("nothing_leaks")


@pytest.fixture
def other() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        yield sock


def test_what_is_sent_is_received_in_order_and_more_than_a_datagram_queue_holds() -> None:
    count = 5 * int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())
    with closing(loop()) as queue:
        queue.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        sent = [b"%d" % number for number in range(min(count, 200))]
        for data in sent:
            queue.send(data)
        assert [queue.recv(9) for _ in sent] == sent
        with pytest.raises(BlockingIOError):
            queue.recv(1)


def test_nobody_else_can_send_or_connect(other: socket.socket) -> None:
    with closing(loop()) as queue:
        for attempt in (lambda name: other.sendto(b"x", name), other.connect):
            with pytest.raises(PermissionError):
                attempt(queue.getsockname())
        with pytest.raises(BlockingIOError):
            queue.recv(1)


@pytest.mark.parametrize("kernel", ["of now", "before 6.16"])
def test_what_is_sent_before_it_is_connected_does_not_arrive(
    other: socket.socket, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    """By somebody who knew the name at once."""
    tried: list[bool] = []

    class Late(_socket.socket):
        def connect(self, name: Any) -> None:
            other.sendto(b"x", name)
            other.sendto(b"", name)
            try:
                other.sendmsg([b"y"], [(*RIGHTS, array("i", [0]))], 0, name)
            except PermissionError:
                tried.append(False)
            else:
                tried.append(True)
            super().connect(name)

    if kernel != "of now":
        monkeypatch.setattr("cprd.linux.rights._OLD_KERNEL", True)
    with socket.socket(fileno=loop(Late).detach()) as queue:
        assert len(tried) == 1
        assert scm_fds(queue.fileno()) == 0
        with pytest.raises(BlockingIOError):
            queue.recv(1)
        socket.send_fds(queue, [b"z"], [0])
        data, fds, _, _ = socket.recv_fds(queue, 1, 1)
        assert (data, len(fds)) == (b"z", 1)
        os.close(fds[0])

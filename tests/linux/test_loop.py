"""A socket that is connected to itself is a queue, and nobody else's."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cprd.linux.loop import loop

pytestmark = pytest.mark.usefixtures("nothing_leaks")


@pytest.fixture
def other() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        yield sock


def test_what_is_sent_is_received_in_order_and_more_than_a_datagram_queue_holds() -> None:
    count = 5 * int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())
    with loop() as queue:
        queue.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        sent = [b"%d" % number for number in range(min(count, 200))]
        for data in sent:
            queue.send(data)
        assert [queue.recv(9) for _ in sent] == sent
        with pytest.raises(BlockingIOError):
            queue.recv(1)


def test_nobody_else_can_send_or_connect(other: socket.socket) -> None:
    with loop() as queue:
        for attempt in (lambda name: other.sendto(b"x", name), other.connect):
            with pytest.raises(PermissionError):
                attempt(queue.getsockname())
        with pytest.raises(BlockingIOError):
            queue.recv(1)


def test_what_is_sent_before_it_is_connected_does_not_arrive(
    other: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By somebody who knew the name at once."""
    connect = socket.socket.connect
    tried = threading.Event()

    def late(self: socket.socket, name: bytes) -> None:
        other.sendto(b"x", name)
        tried.set()
        connect(self, name)

    monkeypatch.setattr(socket.socket, "connect", late)
    with loop() as queue:
        assert tried.is_set()
        with pytest.raises(BlockingIOError):
            queue.recv(1)

"""What tests hand over: descriptors that can be told apart, and say whether they still work."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

import cprd
from tests.support.patience import PATIENCE


class Goods:
    """Eventfds, each with a value of its own, and TCP connections with the peer's end kept here.

    The owner of all its descriptors until close()."""

    def __init__(self, tag: str, eventfds: int = 3, connections: int = 1, base: int = 1) -> None:
        self.tag = tag
        self.base = base
        self.eventfds = [os.eventfd(base + n, os.EFD_NONBLOCK) for n in range(eventfds)]
        self.pairs = [tcp_pair() for _ in range(connections)]

    def state(self) -> cprd.State:
        """All of it, borrowed."""
        return state_of(self.tag, self.eventfds, [ours.fileno() for ours, _ in self.pairs])

    def arguments(self) -> list[str]:
        """For a program: the same, by numbers that it inherits (`fds`)."""
        return [
            self.tag,
            ",".join(map(str, self.eventfds)),
            ",".join(str(ours.fileno()) for ours, _ in self.pairs),
        ]

    def fds(self) -> list[int]:
        return [*self.eventfds, *(ours.fileno() for ours, _ in self.pairs)]

    def check(self, state: cprd.State) -> None:
        """That `state` has every descriptor of these, and that each works."""
        assert state["tag"] == self.tag
        assert bytes(state["blob"]) == blob(self.tag)
        assert state.fd_count == len(self.eventfds) + len(self.pairs)
        for number in range(len(self.eventfds)):
            fd = state.find_fd("eventfd", number)
            assert os.eventfd_read(fd) == self.base + number
            os.eventfd_write(fd, self.base + number)
        for number, (_, theirs) in enumerate(self.pairs):
            byte = bytes([number + 1])
            theirs.sendall(byte)
            with socket.socket(fileno=os.dup(state.find_fd("connection", number))) as ours:
                ours.settimeout(PATIENCE)
                assert ours.recv(1) == byte
                ours.sendall(b"!")
            assert theirs.recv(1) == b"!"

    def close(self) -> None:
        for fd in self.eventfds:
            os.close(fd)
        for pair in self.pairs:
            for end in pair:
                end.close()
        self.eventfds, self.pairs = [], []


@contextlib.contextmanager
def goods(tag: str, eventfds: int = 3, connections: int = 1, base: int = 1) -> Iterator[Goods]:
    made = Goods(tag, eventfds, connections, base)
    try:
        yield made
    finally:
        made.close()


def state_of(tag: str, eventfds: list[int], connections: list[int]) -> cprd.State:
    state = cprd.State()
    for number, fd in enumerate(eventfds):
        state.save_fd("eventfd", number, fd)
    for number, fd in enumerate(connections):
        state.save_fd("connection", number, fd)
    state["tag"] = tag
    state["blob"] = blob(tag)
    return state


def blob(tag: str) -> bytes:
    """Large enough to get a memfd of its own."""
    return tag.encode() * 32768


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends; the caller owns them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    for end in (one, other):
        end.settimeout(PATIENCE)
    return one, other

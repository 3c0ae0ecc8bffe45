"""Many eventfds that can be told apart by their values, and a table of descriptors that is full."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

from cprd import State
from cprd.linux.rights import close_all


@contextmanager
def opened(count: int) -> Iterator[list[int]]:
    """`count` eventfds, the n-th with the value n + 1."""
    fds = [os.eventfd(number + 1, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for number in range(count)]
    try:
        yield fds
    finally:
        close_all(fds)


def of(fds: list[int], name: str = "fd") -> State:
    state = State()
    for number, fd in enumerate(fds):
        state.save_fd(name, number, fd)
    return state


def values(state: State) -> list[int]:
    """What the eventfds of a loaded state count, each put back."""
    found = []
    for _, _, fd in state.fds():
        found.append(os.eventfd_read(fd))
        os.eventfd_write(fd, found[-1])
    return found


@contextmanager
def full_table(at_least: int, room: int) -> Iterator[None]:
    """A table of descriptors with `room` free places and one more for whoever counts them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fillers = [os.dup(0) for _ in range(at_least)]
    first = os.dup(0)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first, hard))
    fillers.append(first)
    while True:
        try:
            fillers.append(os.dup(0))  # places below
        except OSError:
            break
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(fillers) + 1 + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        close_all(fillers)

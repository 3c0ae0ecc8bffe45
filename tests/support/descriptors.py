"""Counting descriptors."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator

import pytest

from tests.support.patience import until


def open_fds(pid: int | str = "self") -> int:
    """How many descriptors a process has (of this process, minus the descriptor that looks)."""
    return len(os.listdir(f"/proc/{pid}/fd")) - (pid == "self")


@contextlib.contextmanager
def nothing_leaks_inside(but: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """This process leaves the block with as many descriptors as it entered it with, `but` so many
    that do not count."""

    def counted() -> int:
        return open_fds() - but()

    before = counted()
    yield
    until(lambda: counted() == before, lambda: f"{counted()} descriptors, not {before}")


def inodes(fds: list[int]) -> list[int]:
    return [os.fstat(fd).st_ino for fd in fds]


@contextlib.contextmanager
def memfds(count: int) -> Iterator[list[int]]:
    """So many empty memfds, closed with the block."""
    fds = [os.memfd_create(f"memfd{number}") for number in range(count)]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def io_uring() -> int:
    """A descriptor that the kernel passes to no other process. The caller's."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.syscall(425, 4, ctypes.create_string_buffer(256)))
    if fd < 0:
        pytest.skip(f"no io_uring here: {os.strerror(ctypes.get_errno())}")
    return fd

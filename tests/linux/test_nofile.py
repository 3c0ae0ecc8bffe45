"""RLIMIT_NOFILE: raised for a while, or for good, and never lowered by chance."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Iterator

import pytest

from cprd import LimitExceeded
from cprd.linux import nofile
from tests.support.patience import PATIENCE


@pytest.fixture(autouse=True)
def low() -> Iterator[tuple[int, int]]:
    """A soft limit below the hard one."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = (before[1] // 2, before[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, low)
    yield low
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_soft_limit_is_raised_to_the_hard_one_or_to_what_is_wanted(
    low: tuple[int, int],
) -> None:
    soft, hard = low
    assert nofile.raise_soft_limit(soft + 5) == low
    assert nofile.limits() == (soft + 5, hard)
    assert nofile.raise_soft_limit(10) == (soft + 5, hard)  # never lower
    assert nofile.limits() == (soft + 5, hard)
    nofile.raise_soft_limit(hard + 10)
    assert nofile.limits() == (hard, hard)
    nofile.set_soft_limit(soft)
    assert nofile.raise_soft_limit() == low
    assert nofile.limits() == (hard, hard)


def test_a_block_puts_back_what_was_whatever_ends_it(low: tuple[int, int]) -> None:
    with pytest.raises(KeyError), nofile.hard_limit() as before:  # noqa: PT012
        assert before == low
        assert nofile.limits() == (low[1], low[1])
        with nofile.hard_limit():
            assert nofile.limits() == (low[1], low[1])
        assert nofile.limits() == (low[1], low[1])
        raise KeyError
    assert nofile.limits() == low


def test_one_thread_at_a_time_has_a_raised_limit(low: tuple[int, int]) -> None:
    seen = []

    def other() -> None:
        with nofile.hard_limit() as before:
            seen.append(before)

    with nofile.hard_limit():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()  # it waits
    thread.join(10)
    assert seen == [low]
    assert nofile.limits() == low


def test_what_the_kernel_refuses_is_said() -> None:
    _, hard = nofile.limits()
    with pytest.raises(LimitExceeded, match=rf"cannot become {hard + 1} \(hard {hard}\)"):
        nofile.set_soft_limit(hard + 1)


def test_a_child_forked_beside_a_thread_with_a_raised_limit_has_neither(
    low: tuple[int, int],
) -> None:
    entered, never = threading.Event(), threading.Event()

    def other() -> None:
        with nofile.hard_limit():
            entered.set()
            never.wait(0.2)

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(PATIENCE)
    child = os.fork()
    if not child:
        try:
            signal.alarm(5)
            with nofile.hard_limit():
                pass
            os._exit(nofile.limits() != low)
        finally:
            os._exit(2)
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
    assert nofile.limits() == low

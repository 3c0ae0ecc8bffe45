"""KeyboardInterrupt between any two steps of a change: what the process itself sees is what its
successor finds."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import cprd
from tests.live.owning import Things
from tests.live.test_interrupts import Interrupt
from tests.support.daemon import DaemonProcess

FILES = ("/cprd/live/", "/client/livestate.py")
BIG = b"b" * 4097
NAMES = [("c", number) for number in range(4)]


def batch(state: cprd.LiveState, things: Things) -> None:
    with state.batch():
        state["small"] = "of the batch"
        state["large"] = BIG[1:]
        state["new"] = BIG[2:]
        del state["gone"]
        state.save_fd("c", 1, things.fds[8], replace=True)
        state.delete_fd("c", 2)
        state.save_fd("c", 9, things.fds[9])


CHANGES: dict[str, Callable[[cprd.LiveState, Things], object]] = {
    "section": lambda state, _: state.__setitem__("small", "changed"),
    "the same section": lambda state, _: state.__setitem__("small", "first"),
    "large section": lambda state, _: state.__setitem__("large", BIG[1:]),
    "grown section": lambda state, _: state.__setitem__("small", BIG),
    "shrunk section": lambda state, _: state.__setitem__("large", "small by now"),
    "new section": lambda state, _: state.__setitem__("new", 1),
    "deleted section": lambda state, _: state.__delitem__("gone"),
    "deleted large section": lambda state, _: state.__delitem__("large"),
    "deleted": lambda state, _: state.delete_fd("c", 1),
    "replaced": lambda state, things: state.save_fd("c", 1, things.fds[8], replace=True),
    "saved": lambda state, things: state.save_fd("c", 9, things.fds[9]),
    "memory": lambda state, _: state.memory("m", 8),
    "batch": batch,
}


@pytest.fixture(scope="module")
def things() -> Iterator[Things]:
    made = Things(pipes=10, memfds=0)
    yield made
    made.close()


def own(state: cprd.LiveState) -> Any:
    """What a process sees of its own state; untaken descriptors by their inodes."""
    values = [(key, bytes(v) if isinstance(v, memoryview) else v) for key, v in state.items()]
    return (
        sorted(values),
        state.fd_keys(),
        {(n, i): os.fstat(fd).st_ino for n, i, fd in state.fds()},
    )


def interrupt(path: str, things: Things, name: str, at: int, opcodes: bool) -> bool:
    """One round; whether the interrupt came."""
    with cprd.live("chat", path) as state:
        assert not state.found
        state.save_fds("c", enumerate(things.fds[:4]))
        state.update({"small": "first", "large": BIG, "gone": b"soon"})
    interrupted = False
    with cprd.live("chat", path) as state:
        state.confirm()
        os.close(state.take_fd("c", 3))
        try:
            with Interrupt(at, opcodes, FILES):
                CHANGES[name](state, things)
        except KeyboardInterrupt:
            interrupted = True
        first = own(state)
        state["after"] = at
        with state.batch():
            state.save_fd("after", things.fds[7])
        with contextlib.suppress(KeyError):
            del state["after"]
        seen = own(state)
        assert (seen[0], seen[2]) == (first[0], first[2]), at
        assert seen[1] == [*first[1], ("after", 0)], at
    with cprd.live("chat", path) as state:
        found = own(state)
        assert found[:2] == seen[:2], (
            name,
            at,
            [[k for k, _ in x[0]] for x in (found, seen)],
            found[1],
            seen[1],
        )
        assert seen[2].items() <= found[2].items(), (name, at)
        taken = {("c", 3)} | ({("c", 1)} if found[2].get(("c", 1)) == things.inodes[8] else set())
        assert found[2].keys() - seen[2].keys() <= taken | {("c", 9), ("after", 0)}, (name, at)
        state.confirm()
        state.end()
    return interrupted


@pytest.mark.parametrize("name", CHANGES)
def test_interrupted_at_any_line_both_see_the_same(
    daemon: DaemonProcess, things: Things, name: str
) -> None:
    step, at = 97 if name == "batch" else 23, 1
    while interrupt(daemon.path, things, name, at, opcodes=False):
        at += step
    assert at > 40


@pytest.mark.full
@pytest.mark.parametrize("name", CHANGES)
def test_interrupted_at_any_opcode_both_see_the_same(
    daemon: DaemonProcess, things: Things, name: str
) -> None:
    at = 1
    while interrupt(daemon.path, things, name, at, opcodes=True):
        at += 5 if name == "batch" else 1
    assert at > 100

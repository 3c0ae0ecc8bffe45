"""Look at what is held, without a claim and without disturbing the bundle.

`check` looks from outside only, as cprd does. `describe_bundle` reads the bundle: the descriptors
of others get installed here for a moment. No question to a descriptor can block; a close can, so
another thread closes all.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import msgpack

from cprd.bundle.layout import HEADER
from cprd.bundle.unpack import unpack
from cprd.errors import Busy, Damaged
from cprd.linux.describe import describe
from cprd.linux.rights import queued, scm_fds
from cprd.state import InlineSection, MemfdSection, State

SMALL = 4096  # bytes of a section whose value is shown
LONGEST = 1024  # entries of a container in such a value
DEEPEST = 16  # containers in each other


def check(fd: int, parked: int = 0) -> int:
    """Look at the outside of a bundle. Returns the number of descriptors in the root, which should
    be `parked` (0: not known).

    cprd does no more for each save: O(1) whatever lies below the root. `fd` is borrowed: the
    receiving end of a queue that cprd has made. Raises Damaged for anything but a whole bundle,
    OSError (EMFILE) when there is no descriptor left to look with. Does not block.

    The header is not read. A read takes the socket's lock, and another owner of the socket can
    sleep with the lock in hand (in recv(), in a page of a file system). No call here takes the
    lock."""
    waiting, found = queued(fd), scm_fds(fd)
    if not waiting:
        raise Damaged("not a whole bundle: nothing is queued in it")
    if waiting != HEADER.size:
        raise Damaged(f"not a whole bundle: {waiting} bytes are queued in it, not {HEADER.size}")
    if parked and found != parked:
        raise Damaged(f"not a whole bundle: it should hold {parked} descriptors and holds {found}")
    if found < 1:
        raise Damaged("not a whole bundle: no descriptors are queued in it")
    return found


def describe_bundle(row: dict[str, Any], bundle: int) -> dict[str, Any]:
    """Return `row` with "descriptors" and "sections" of a bundle; closes `bundle` (-1: none).

    Raises LimitExceeded when the descriptors do not fit in the process."""
    row["descriptors"] = []
    row["sections"] = []
    if bundle < 0:
        return row
    try:
        state = unpack(bundle)
    except Busy as error:  # damaged, or of another version
        os.close(bundle)
        row["reason"] = row["reason"] or str(error)
        return row
    except BaseException:
        os.close(bundle)
        raise
    describe_state(row, state, partial(os.close, bundle))
    return row


def describe_state(row: dict[str, Any], state: State, then: Callable[[], object]) -> None:
    """Put what is in `state` into `row`. Another thread closes the state, and calls `then`."""

    def let_go() -> None:
        state.close()
        then()

    try:
        row["descriptors"] = [
            {"name": name, "id": id, "what": describe(fd)} for name, id, fd in state.fds()
        ]
        row["sections"] = [_described(key, section) for key, section in state.sections()]
    finally:
        threading.Thread(target=let_go, daemon=True).start()


def _described(key: str, section: InlineSection | MemfdSection) -> dict[str, Any]:
    """Key, kind, size and perhaps the value of a section."""
    if isinstance(section, MemfdSection):
        return {"key": key, "kind": "memfd", "bytes": section.size()}
    shown: dict[str, Any] = {
        "key": key,
        "kind": "msgpack" if section.packed else "bytes",
        "bytes": len(section.data),
    }
    if section.packed and len(section.data) <= SMALL:
        shown["value"] = _value(section.data)
    return shown


def _value(data: bytes | memoryview) -> object:
    """A small msgpack value; None where `data` is none, or would make too much of itself: a few
    bytes can announce containers of any length, in each other."""
    try:
        value = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=False,
            max_array_len=LONGEST,
            max_map_len=LONGEST,
            max_ext_len=LONGEST,
        )
    except Exception:
        return None  # not what its saver said it is
    return value if _is_flat(value, DEEPEST) else None


def _is_flat(value: object, levels: int) -> bool:
    """Whether a value has at most so many containers in each other."""
    if not isinstance(value, dict | list | tuple):
        return True
    inner = [*value, *value.values()] if isinstance(value, dict) else value
    return levels > 0 and all(_is_flat(each, levels - 1) for each in inner)

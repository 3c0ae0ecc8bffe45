"""Looking into what is held, without a claim and without disturbing it.

The descriptors of others get installed here for a moment. Nothing is asked of them that can block;
they are closed in a thread of its own, because that can.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import msgpack

from cprd.bundle.layout import unpack
from cprd.errors import Busy
from cprd.linux.describe import describe
from cprd.state import InlineSection, MemfdSection, State, _Decoded

SMALL = 4096  # bytes of a section whose value is shown


def describe_bundle(row: dict[str, Any], bundle: int) -> dict[str, Any]:
    """`row` with "descriptors" and "sections" of a bundle, which this closes (-1: none).

    Raises LimitExceeded when its descriptors do not fit in this process."""
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
    try:
        row["descriptors"] = [
            {"name": name, "id": id, "what": describe(fd)} for name, id, fd in state.fds()
        ]
        row["sections"] = [_section(state, key) for key in state]
    finally:
        threading.Thread(target=_let_go, args=(state, bundle), daemon=True).start()
    return row


def _let_go(state: State, bundle: int) -> None:
    state.close()
    os.close(bundle)


def _section(state: State, key: str) -> dict[str, Any]:
    section = state._sections[key]
    stored = section.stored if isinstance(section, _Decoded) else section
    if isinstance(stored, MemfdSection):
        size = stored.size()
        return {"key": key, "kind": "memfd", "bytes": size}
    assert isinstance(stored, InlineSection)
    shown: dict[str, Any] = {
        "key": key,
        "kind": "msgpack" if stored.packed else "bytes",
        "bytes": len(stored.data),
    }
    if stored.packed and len(stored.data) <= SMALL:
        try:
            shown["value"] = msgpack.unpackb(stored.data, raw=False, strict_map_key=False)
        except Exception:
            shown["value"] = None  # not what its saver said it is
    return shown

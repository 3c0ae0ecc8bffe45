"""Look at a live hold, without a claim: how much there is, and once the owner has ended, what.

A living owner's queues are read by nobody: a reader would get in the owner's way. Descriptors of
others get installed here for a moment. No question to a descriptor can block; a close can, so
another thread closes all.
"""

from __future__ import annotations

import os
from typing import Any

from cprd.bundle.inspect import describe_state
from cprd.errors import Busy
from cprd.linux.rights import scm_fds
from cprd.live.carrier import root_of
from cprd.live.reader import read


def describe_live(row: dict[str, Any], bundle: int) -> dict[str, Any]:
    """Return `row` with "segments", "descriptors" and "sections" of a live hold; closes `bundle`
    (-1: none). Only of a hold that is `held` or `quarantined` descriptors and sections are known.

    Raises LimitExceeded when the descriptors do not fit in the process."""
    row |= {"descriptors": [], "sections": [], "segments": 0}
    if bundle < 0:
        return row
    root = -1
    try:
        root = root_of(bundle)
        row["segments"] = max(0, scm_fds(root))  # while the owner rewrites the root, some twice
        if row["phase"] not in ("held", "quarantined"):  # somebody changes, or reads
            return row
        found = read(root)
    except Busy as error:  # damaged, or of another version
        row["reason"] = row["reason"] or str(error)
        return row
    finally:
        os.close(bundle)
        if root >= 0:
            os.close(root)
    memories = [
        {"key": name, "kind": "memory", "bytes": os.fstat(fd).st_size}
        for name, fd in found.memories.items()
    ]
    describe_state(row, found.state, found.close)
    row["sections"] += memories
    return row

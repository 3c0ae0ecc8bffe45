"""Claims that ended while cprd was away: cprd learns at the next contact of this process.

The end of a connection ends a claim as well. A cprd that was not there at that end knows the claim
from the record alone, and would keep the claim as long as the process lives and the lease lasts.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from typing import Any

    Message = dict[str, Any]

MOST = 1000  # of a socket: older claims end with their leases

_owed: dict[str, list[Message]] = {}  # by path of the socket; another thread may add and remove
os.register_at_fork(after_in_child=_owed.clear)  # a child has no claims


def owe(path: str, message: Message) -> None:
    """To be said again: a request with a nonce, so that saying it twice does it once."""
    every = _owed.setdefault(path, [])
    every.append(message)
    del every[:-MOST]


def owed(path: str) -> list[Message]:
    """What is to be said to the cprd at `path`, older first. Nothing, nearly always."""
    return list(_owed.get(path, ())) if _owed else []


def said(path: str, message: Message) -> None:
    """cprd has answered."""
    left = [other for other in _owed.get(path, ()) if other is not message]
    if left:
        _owed[path] = left
    else:
        _owed.pop(path, None)

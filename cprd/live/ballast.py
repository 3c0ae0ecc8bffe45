"""Descriptors that are in flight for nothing, to be let go of at the limit.

A message with descriptors is refused once its uid has more in flight than RLIMIT_NOFILE, whatever
the message itself carries. Rewriting a segment, which lets go of descriptors in the end, has to
send some first: letting go of the ballast makes room for such a message.
"""

from __future__ import annotations

import os

from cprd.errors import LimitExceeded
from cprd.linux.rights import close_all, send
from cprd.live.queue import Queue, make_pair

COUNT = 4


class Ballast:
    def __init__(self) -> None:
        self.queue = Queue(*make_pair())
        self._loaded = False
        self.load()

    def load(self) -> None:
        """Park the ballast where there is room; else later."""
        if self._loaded:
            return
        assert self.queue.tx is not None
        fd = -1
        try:
            fd = os.eventfd(0, os.EFD_CLOEXEC)
            send(self.queue.tx, b"B", [fd] * COUNT)
            self._loaded = True
        except (OSError, LimitExceeded):
            pass
        finally:
            close_all([fd] if fd >= 0 else [])

    def let_go(self) -> bool:
        """Make room for one message; whether there was anything to let go of."""
        if not self._loaded:
            return False
        self._loaded = False
        try:
            self.queue.rx.recv(1, 0x40)  # MSG_DONTWAIT
        except OSError:
            return False
        return True

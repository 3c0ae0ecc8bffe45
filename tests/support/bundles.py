"""Whole bundles, packed without a cprd."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

import cprd
from cprd.bundle.pack import Packed
from cprd.bundle.pack import pack as pack_apart


class Bundle:
    """A packed state in a queue of its own. Owns `fd`, the bundle, until close()."""

    def __init__(self, packed: Packed) -> None:
        self.packed = packed
        self.parked, self.depth = packed.parked, packed.depth
        self.fds, self.size = packed.fds, packed.size
        inlet, outlet = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with inlet, outlet:
            packed.park(inlet)
            self.fd = outlet.detach()

    def close(self) -> None:
        self.packed.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def pack(state: cprd.State, forbidden: Sequence[int] = ()) -> Bundle:
    packed = pack_apart(state, forbidden)
    try:
        return Bundle(packed)
    except BaseException:
        packed.close()
        raise

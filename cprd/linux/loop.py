"""A queue in one descriptor: a datagram socket that is connected to itself.

A socket can be connected to itself by name only, so the socket has an abstract name. A name can be
sent to: until the socket is connected (and takes messages of no other socket any more, nor
connections) a filter drops whatever comes.
"""

from __future__ import annotations

import os
import socket
import struct
from array import array

_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27  # asm-generic/socket.h
_DROP_ALL = struct.pack("HBBI", 0x06, 0, 0, 0)  # linux/filter.h: return 0 bytes


def loop() -> socket.socket:
    """A new queue: what is sent is received from the same socket. Owned by the caller, and not
    blocking. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        program = array("B", _DROP_ALL)
        address, _ = program.buffer_info()
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", 1, address))
        name = b"\0cprd." + os.urandom(16).hex().encode()
        sock.bind(name)
        sock.connect(name)
        sock.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
    except BaseException:
        sock.close()
        raise
    return sock

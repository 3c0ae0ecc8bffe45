"""Where a TCP connection stands, as the kernel counts: bytes that were read, and written.

A server that was killed may have read, or answered, more than it had noted. The kernel knows: the
connection goes on, with all counters.
"""

from __future__ import annotations

import socket
import struct

from cprd.linux.rights import queued, unread

_POSITIONS = struct.Struct("<120xQQ")  # of struct tcp_info: bytes_acked, bytes_received (Linux 4.1)


def read(sock: socket.socket) -> int:
    """Bytes that were received from a connection, whoever called recv."""
    while True:
        received = _counted(sock)[1]
        waiting = queued(sock)
        if _counted(sock)[1] == received:  # else more came between the two questions
            return received - waiting


def written(sock: socket.socket) -> int:
    """Bytes that were sent into a connection."""
    while True:
        acknowledged = _counted(sock)[0]
        unacknowledged = unread(sock)
        if _counted(sock)[0] == acknowledged:
            return acknowledged + unacknowledged


def _counted(sock: socket.socket) -> tuple[int, int]:
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _POSITIONS.size)
    acknowledged, received = _POSITIONS.unpack(info)
    return acknowledged, received

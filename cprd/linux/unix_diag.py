"""UNIX sockets of this network namespace, as the kernel's sock_diag tells: who is connected to
whom."""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

SHOW_NAME, SHOW_FILE, SHOW_PEER, SHOW_QUEUE = 0x1, 0x2, 0x4, 0x10  # UDIAG_SHOW_*
NAME, FILE, PEER, QUEUE = 0, 1, 2, 4  # UNIX_DIAG_NAME, _VFS, _PEER, _RQLEN

_NETLINK_SOCK_DIAG = 4
_REQUEST = struct.Struct("=IHHIIBBHIIIII")  # nlmsghdr, unix_diag_req
_HEADER, _MESSAGE = 16, 32  # bytes of nlmsghdr; of that and unix_diag_msg
_BY_FAMILY, _DONE = 20, 3
_REQUESTED, _ALL = 0x1, 0x300  # NLM_F_REQUEST, NLM_F_DUMP
_LISTEN = 10  # TCP_LISTEN


class UnixSocket(NamedTuple):
    """One socket. `kind`: SOCK_STREAM, ...; `peer`: the inode of the socket at the other end, 0 for
    none; `path`: as bound, "\\0..." an abstract name, "" when not bound; an accepted socket has the
    path of its listener; `file`: (device, inode) of that path in the file system."""

    inode: int
    kind: int
    listening: bool
    peer: int
    path: str
    file: tuple[int, int]


def every() -> list[UnixSocket] | None:
    """All of them; None where the kernel does not tell. Does not block for longer than a second."""
    answers = _exchange(0, SHOW_NAME | SHOW_FILE | SHOW_PEER, _ALL)
    return None if answers is None else [_read(answer) for answer in answers]


def ask(inode: int, show: int) -> dict[int, bytes]:
    """The attributes (NAME, ...) of one socket; empty without an answer."""
    answers = _exchange(inode, show, 0)
    return _attributes(answers[0]) if answers else {}


def _exchange(inode: int, show: int, flags: int) -> list[bytes] | None:
    """The kernel's messages, without nlmsghdr's padding; None for an error."""
    every = 0xFFFFFFFF  # all states; INET_DIAG_NOCOOKIE
    request = _REQUEST.pack(
        *(_REQUEST.size, _BY_FAMILY, _REQUESTED | flags, 1, 0),
        *(socket.AF_UNIX, 0, 0, every, inode & 0xFFFFFFFF, show, every, every),
    )
    found: list[bytes] = []
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
            netlink.settimeout(1.0)
            netlink.send(request)
            while True:
                for kind, message in _messages(netlink.recv(1 << 16)):
                    if kind == _DONE:
                        return found
                    if kind != _BY_FAMILY:  # NLMSG_ERROR: there is none
                        return None
                    found.append(message)
                    if not flags:
                        return found
    except OSError:
        return None


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _HEADER <= len(data):
        size, kind = struct.unpack_from("=IH", data, at)
        if size < _HEADER:
            return
        yield kind, data[at : at + size]
        at += (size + 3) & ~3


def _attributes(message: bytes) -> dict[int, bytes]:
    found = {}
    at = _MESSAGE
    while at + 4 <= len(message):
        length, name = struct.unpack_from("=HH", message, at)
        if length < 4:
            break
        found[name] = message[at + 4 : at + length]
        at += (length + 3) & ~3
    return found


def _read(message: bytes) -> UnixSocket:
    kind, state = message[_HEADER + 1], message[_HEADER + 2]
    (inode,) = struct.unpack_from("=I", message, _HEADER + 4)
    said = _attributes(message)
    (peer,) = struct.unpack("=I", said.get(PEER, bytes(4)))
    number, device = struct.unpack("=II", said.get(FILE, bytes(8)))
    path = said.get(NAME, b"")
    if not path.startswith(b"\0"):
        path = path.rstrip(b"\0")
    found = os.makedev(device >> 20, device & 0xFFFFF), number
    return UnixSocket(inode, kind, state == _LISTEN, peer, os.fsdecode(path), found)

"""Where a process listens, as the kernel knows it: no option of a QEMU has to be understood for
that.

What cannot be read (another user's process) yields nothing: a caller knows what to do without.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_ACCEPTS = 0x10000  # __SO_ACCEPTCON in the Flags of /proc/net/unix
_LISTEN = "0A"  # TCP_LISTEN in the st of /proc/net/tcp


def unix_paths(pid: int) -> list[str]:
    """The paths of the UNIX sockets at which it listens, as they were bound: one may be relative to
    its working directory, and all lie in its own root."""
    inodes = _sockets(pid)
    found = []
    for line in _lines(pid, "unix"):
        # Num RefCount Protocol Flags Type St Inode Path; there is none when it is not bound, and @
        # stands for the NUL of an abstract one, which has no file.
        words = line.split(None, 7)
        if len(words) < 8 or words[7].startswith("@") or words[6] not in inodes:
            continue
        if int(words[3], 16) & _ACCEPTS:
            found.append(words[7])
    return found


def tcp_ports(pid: int) -> list[tuple[str, int]]:
    """(address, port) of the TCP sockets at which it listens."""
    inodes = _sockets(pid)
    found = []
    for table in ("tcp", "tcp6"):
        for line in _lines(pid, table):
            # sl local_address rem_address st tx:rx tr:when retrnsmt uid timeout inode ...
            words = line.split()
            if len(words) > 9 and words[3] == _LISTEN and words[9] in inodes:
                address, _, port = words[1].partition(":")
                found.append((_address(address), int(port, 16)))
    return found


def deleted_files(pid: int) -> list[str]:
    """The paths of files that it has open and that have been removed."""
    mark = " (deleted)"
    return [link.removesuffix(mark) for link in _links(pid) if link.endswith(mark)]


def _sockets(pid: int) -> set[str]:
    """The inodes of its sockets."""
    return {link[8:-1] for link in _links(pid) if link.startswith("socket:[")}


def _links(pid: int) -> Iterator[str]:
    where = f"/proc/{pid}/fd"
    try:
        names = os.listdir(where)
    except OSError:
        return
    for name in names:
        try:
            yield os.readlink(f"{where}/{name}")
        except OSError:
            continue


def _lines(pid: int, table: str) -> list[str]:
    """Of its own network namespace."""
    try:
        with open(f"/proc/{pid}/net/{table}", encoding="utf-8", errors="surrogateescape") as file:
            return file.read().split("\n")[1:]
    except OSError:
        return []


def _address(text: str) -> str:
    """Words of four bytes, each in the machine's own order."""
    raw = bytes.fromhex(text)
    words = (raw[at : at + 4] for at in range(0, len(raw), 4))
    if socket.ntohl(1) != 1:
        words = (word[::-1] for word in words)
    family = socket.AF_INET if len(raw) == 4 else socket.AF_INET6
    return socket.inet_ntop(family, b"".join(words))

"""Keys and values of a program, checked, as the writer keeps them."""

from __future__ import annotations

import _socket as socket  # as in queue
import os
import stat
import struct

from cprd.errors import InvalidInput
from cprd.linux.memfd import check_seals, sealed_memfd
from cprd.live.records import (
    FD,
    MAPPED,
    MEMORY,
    PACKED,
    PACKED_MEMFD,
    RAW,
    RAW_MEMFD,
    SAVE,
    SECTION,
    Key,
)
from cprd.live.segment import Put
from cprd.state import InlineSection
from cprd.state.sections import check_section_key, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container
    from typing import Any


class Made:
    """A descriptor that was made for a change, closed when nobody has this object any more: by an
    interrupt, too."""

    fd = -1

    def close(self) -> None:
        """Safe to repeat."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    __del__ = close


INLINE = 4096  # bytes of a section's value; a larger one gets a memfd


FORMAT = 0o170000  # of st_mode
SOCKET = stat.S_IFSOCK
SHAREABLE = frozenset((stat.S_IFSOCK, stat.S_IFIFO, 0))


def fd_key(name: str, id: int) -> Key:
    """The key of a descriptor. Raises InvalidInput."""
    try:
        encoded = _names[name]
    except (KeyError, TypeError):
        encoded = _encoded(name)
    if type(id) is not int or not -0x80000000 <= id <= 0x7FFFFFFF:
        raise InvalidInput(f"id {id!r:.100} of {name!r}: wants a signed 32 bit integer")
    return (FD, encoded, id)


_names: dict[str, bytes] = {}  # the names that were used last, as bytes


def _encoded(name: str) -> bytes:
    try:
        encoded = name.encode("utf-8", "surrogateescape")
    except (AttributeError, UnicodeEncodeError):
        raise InvalidInput(f"key with the name {name!r:.300}: wants a str") from None
    if not 0 < len(encoded) < 256 or b"\0" in encoded:
        raise InvalidInput(f"name {name!r}: wants 1 to 255 bytes without NUL")
    if len(_names) >= 256:
        _names.clear()
    _names[name] = encoded
    return encoded


def section_key(key: str) -> Key:
    try:
        encoded = key.encode()
    except (AttributeError, UnicodeEncodeError):
        encoded = b""
    if not 0 < len(encoded) < 256 or b"\0" in encoded:
        check_section_key(key)  # raises
    return (SECTION, encoded, 0)


def memory_key(name: str) -> Key:
    try:
        check_section_key(name)
    except InvalidInput as error:
        raise InvalidInput(str(error).replace("section", "memory", 1)) from None
    return (MEMORY, name.encode(), 0)


def put_fd(key: Key, birth: int, fd: int, refused: Container[int], ask_linger: bool) -> Put:
    """Keep a descriptor, which is borrowed. `refused`: inodes of sockets that must not be kept.
    Raises InvalidInput."""
    try:
        found = os.fstat(fd)
    except (OSError, OverflowError):
        raise InvalidInput(
            f"fd {fd} of ({key[1].decode('utf-8', 'replace')!r}, {key[2]}) is not an open"
            " descriptor"
        ) from None
    kind = found.st_mode & FORMAT
    may_block = False
    if kind == SOCKET:
        if found.st_ino in refused:
            raise InvalidInput(
                f"fd {fd} of ({key[1].decode('utf-8', 'replace')!r}, {key[2]}) is a socket of the"
                " live hold itself, which may not come to hold itself"
            )
        may_block = ask_linger and lingers(fd)
    # A copy of any other kind (0: anonymous inodes) is never closed in this process: with a
    # regular file that would end the POSIX locks of the process.
    return (SAVE, key, birth, fd, b"", may_block, kind not in SHAREABLE)


def socket_inode(fd: int) -> list[int]:
    """The inode of a socket; nothing for any other file."""
    found = os.fstat(fd)
    return [found.st_ino] if stat.S_ISSOCK(found.st_mode) else []


def lingers(fd: int) -> bool:
    """Whether the last close of a socket may wait for the peer."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fd)
    try:
        on, seconds = struct.unpack("ii", sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))
        return bool(on and seconds)
    except (OSError, struct.error):
        return False
    finally:
        sock.detach()


def put_section(key: Key, birth: int, value: Any, made: Made) -> Put:
    """Keep a value; an InlineSection is one that was encoded before. `made` gets the memfd of a
    large one, and has to live until the change is done. Raises InvalidInput, LimitExceeded."""
    if type(value) is bytes and len(value) <= INLINE:
        return (RAW, key, birth, -1, value, False, False)
    section = value if isinstance(value, InlineSection) else encode(key[1].decode(), value)
    if len(section.data) <= INLINE:
        op = PACKED if section.packed else RAW
        return (op, key, birth, -1, bytes(section.data), False, False)
    made.fd = sealed_memfd(f"section.{key[1].decode()}", [section.data])
    op = PACKED_MEMFD if section.packed else RAW_MEMFD
    return (op, key, birth, made.fd, b"", False, True)


def put_section_fd(key: Key, birth: int, memfd: int, packed: bool) -> Put:
    """Keep a section that already is a sealed memfd, which is borrowed. Raises InvalidInput."""
    check_seals(key[1].decode(), memfd)
    return (PACKED_MEMFD if packed else RAW_MEMFD, key, birth, memfd, b"", False, True)


def put_memory(key: Key, birth: int, memfd: int) -> Put:
    return (MAPPED, key, birth, memfd, b"", False, True)

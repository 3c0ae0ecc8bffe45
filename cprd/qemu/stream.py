"""The main channel: where a migration stream ends, and the few messages of the return path. Pure.

Layout (QEMU's migration/savevm.c and migration/migration.c; integers are big-endian): "QEVM", u32
version 3, 07 and the machine's name, sections, 00 (end), then 06, u32 length and that many bytes of
JSON, the description. The sender keeps the channel open until the return path says SHUT, so the
length of the description tells the end, not an end of file.
"""

from __future__ import annotations

import struct

from cprd.errors import Damaged

MAGIC = b"QEVM"
SHUT = 1
_HEAD = struct.Struct(">HH")
DONE = _HEAD.pack(SHUT, 4) + bytes(4)
"""SHUT(0) on the return path: the state has arrived. The source completes, and cannot go back."""


def is_whole(data: bytes | bytearray | memoryview) -> bool:
    """Whether the stream ends exactly here, in a description of the announced length."""
    if data[-1:] != b"}":
        return False
    if isinstance(data, memoryview):
        data = bytes(data)
    # JSON has no NUL in it, and what goes before it has: in the length, or right before that.
    last = data.rfind(b"\0")
    return any(
        data[start - 6 : start - 4] == b"\0\6"
        and data[start : start + 1] == b"{"
        and int.from_bytes(data[start - 4 : start], "big") == len(data) - start
        for start in range(max(6, last + 1), last + 7)
    )


def machine(data: bytes | bytearray | memoryview) -> str:
    """The machine type of the stream. Raises Damaged when `data` is no stream."""
    head = bytes(data[:1024])
    if head[:4] != MAGIC:
        raise Damaged(f"the main stream begins with {head[:4].hex()}, not with {MAGIC.hex()}")
    if head[8:9] != b"\x07":
        return ""  # no configuration section: send-configuration=off
    size = int.from_bytes(head[9:13], "big")
    return head[13 : 13 + size].decode("utf-8", "replace")


_CAPABILITIES = b"\x05\x1aconfiguration/capabilities\0\0\0\1"


def capabilities(data: bytes | bytearray | memoryview) -> list[str]:
    """The migration capabilities that the destination must have set before the stream arrives."""
    head = bytes(data[:4096])
    at = head.find(_CAPABILITIES)
    if at < 0 or head[8:9] != b"\x07":
        return []
    at += len(_CAPABILITIES)
    count = int.from_bytes(head[at : at + 4], "big")
    at += 4
    names = []
    for _ in range(min(count, 64)):
        size = head[at] if at < len(head) else 0
        names.append(head[at + 1 : at + 1 + size].decode("ascii", "replace"))
        at += 1 + size
    return names


_GLOBAL = b"\x0bglobalstate"
_LETTERS = frozenset(b"abcdefghijklmnopqrstuvwxyz-")


def run_state(data: bytes | bytearray | memoryview) -> str:
    """The run state ("running", "paused", ...) in which QEMU stopped the guest for this stream, by
    QEMU's own word in the stream; "" without such a word."""
    # The last one: the devices come before it, and with them what a guest may have put there.
    if isinstance(data, memoryview):
        data = bytes(data)
    at = data.rfind(_GLOBAL)
    if at < 0:
        return ""
    # u32 instance, u32 version 1, u32 size of the word, the word with a NUL
    at += len(_GLOBAL)
    word, nul, _ = data[at + 12 : at + 44].partition(b"\0")
    good = nul and data[at + 4 : at + 8] == b"\0\0\0\1" and _LETTERS.issuperset(word)
    return word.decode() if good else ""


class Answers:
    """The messages on the return path, piece by piece."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> int | None:
        """The value of SHUT (0: loaded; else the load failed); None before SHUT has come."""
        self._data += data
        while len(self._data) >= _HEAD.size:
            kind, size = _HEAD.unpack_from(self._data)
            if len(self._data) < _HEAD.size + size:
                return None
            body = bytes(self._data[_HEAD.size : _HEAD.size + size])
            del self._data[: _HEAD.size + size]
            if kind == SHUT:
                return int.from_bytes(body, "big")
        return None

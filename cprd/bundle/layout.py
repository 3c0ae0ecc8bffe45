"""The bytes of a bundle: headers and manifests.

A bundle is the receiving end of an AF_UNIX SOCK_SEQPACKET pair whose sending end is closed and
whose queue holds one message: a header and up to 253 descriptors. More descriptors make a tree:
every node is such a socket, the root's descriptors are the sockets below. The first descriptor of
all is the manifest, a sealed memfd with the keys and the small sections; then come the sections
in memfds, then the descriptors in the order of saving.

pack.py makes bundles, unpack.py reads them, inspect.py looks from outside. docs/bundle.md has the
layout; the numbers behind the choice are in benchmarks/.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterable

import msgpack

from cprd.errors import Busy, Damaged, LimitExceeded
from cprd.linux.rights import SCM_MAX_FD

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from typing import TypeVar

    T = TypeVar("T")

VERSION = 1
MAGIC = b"CPRB"
LEAF, NODE = 1, 2
MAX_DEPTH = 3  # 253 ** 3 is 16 million: more than any table of descriptors
INLINE = 16 * 1024  # bytes of a section; above, the section gets a memfd of its own
MAX_MANIFEST = 256 << 20  # bytes
MAX_PARTS = 16  # of a manifest
MAX_SECTIONS = 1 << 16
MAX_NAME = 255  # bytes, of a descriptor or a section
HEADER = struct.Struct("<4sHBBIIQQ")
"""magic, version, kind (LEAF: carries descriptors of the state; NODE: sockets), depth (0 = leaf),
descriptors in the message, descriptors in all below (manifest and sections included), bytes of
all sections (root only), number among the siblings."""

LIVE_ROOT = HEADER.pack(MAGIC, 2, 3, 1, 1, 1, 0, 0)
"""The header of a bundle whose only descriptor is the root of a live hold (cprd/live). Version 2:
what reads saved states alone refuses such a bundle as whole, and of a later version."""

Section = tuple[str, bool, bool, bytes]
"""Of a manifest: key, whether one msgpack value, whether in a memfd of its own, else the bytes."""


class Header:
    """The header of one node. Errors of the layout raise Damaged; another version raises Busy: the
    bundle is whole, for a newer program."""

    __slots__ = ("depth", "here", "index", "kind", "size", "total")

    def __init__(self, data: bytes) -> None:
        if not data:
            raise Damaged("not a whole bundle: nothing is queued in a part of it")
        version = int.from_bytes(data[4:6], "little")
        if data[:4] == MAGIC and len(data) >= 6 and version != VERSION:
            raise Busy(
                f"a bundle of version {version}; this cprd reads version {VERSION}: upgrade the"
                " program that wants to read it"
            )
        if len(data) != HEADER.size or data[:4] != MAGIC:
            raise Damaged("not a bundle: what is queued does not begin with its header")
        _, _, self.kind, self.depth, self.here, self.total, self.size, self.index = HEADER.unpack(
            data
        )
        leaf = self.kind == LEAF and self.depth == 0 and self.total == self.here
        node = self.kind == NODE and 0 < self.depth < MAX_DEPTH and self.total >= self.here
        if not (leaf or node) or not 0 < self.here <= SCM_MAX_FD:
            raise Damaged("a bundle whose header contradicts itself")


def encode_manifest(
    names: bytes, ids: array[int], sections: Iterable[Section]
) -> list[bytes | memoryview]:
    """A manifest, in pieces. Raises LimitExceeded."""
    described = [(key, packed, int(memfd), data) for key, packed, memfd, data in sections]
    if len(described) > MAX_SECTIONS:
        raise LimitExceeded(f"{len(described)} sections; the limit is {MAX_SECTIONS}")
    if sys.byteorder == "big":
        ids = ids[:]
        ids.byteswap()
    # One map, written piece by piece: the columns are not copied on their way.
    packer = msgpack.Packer(use_bin_type=True, autoreset=False)
    packer.pack_map_header(3)
    packer.pack("sections")
    packer.pack(described)
    manifest: list[bytes | memoryview] = [packer.bytes()]
    manifest += _binary("ids", memoryview(ids).cast("B"))
    manifest += _binary("names", memoryview(names))
    length = sum(map(len, manifest))
    if length > MAX_MANIFEST:
        raise LimitExceeded(
            f"keys and small sections take {length} bytes; the limit is {MAX_MANIFEST}"
        )
    return manifest


def _binary(key: str, data: memoryview) -> tuple[bytes, memoryview]:
    """A key of a msgpack map with the head of a binary value, and the value."""
    return msgpack.packb(key) + struct.pack(">BI", 0xC6, len(data)), data  # 0xC6: bin 32


def decode_manifest(data: bytes | memoryview, most: int) -> tuple[bytes, array[int], list[Section]]:
    """(names joined by NUL, ids, sections) of a manifest whose bundle carries `most` descriptors.

    A hostile manifest takes no more memory than some times the bytes: containers and extension
    types are refused where none belongs, and so are names above 255 bytes. Raises Damaged.
    """
    if len(data) > MAX_MANIFEST:
        raise Damaged(f"a manifest of {len(data)} bytes; the limit is {MAX_MANIFEST}")
    try:
        return _decode_manifest(data, most)
    except (ValueError, TypeError, msgpack.UnpackException, msgpack.BufferFull) as error:
        raise Damaged(f"the manifest cannot be read: {error!r:.300}") from None


def _decode_manifest(
    data: bytes | memoryview, most: int
) -> tuple[bytes, array[int], list[Section]]:
    parser = msgpack.Unpacker(
        raw=False,
        strict_map_key=True,
        max_buffer_size=MAX_MANIFEST,
        max_str_len=MAX_NAME,
        max_bin_len=len(data),
        max_array_len=0,  # unpack() makes scalars only
        max_map_len=0,
        max_ext_len=0,
    )
    parser.feed(data)
    found: dict[str, bytes] = {}
    sections: list[Section] = []
    for _ in range(_at_most(parser.read_map_header(), MAX_PARTS, "parts")):
        part = parser.unpack()
        if part == "sections":
            sections += _decode_sections(parser)
        elif part in ("ids", "names"):
            found[part] = _is(bytes, parser.unpack(), part)
        else:
            parser.skip()  # of a later version, which says that this one may go without it
    names, packed = found.get("names"), found.get("ids")
    if names is None or packed is None or parser.tell() != len(data):
        raise ValueError("a part is missing, or something follows")
    if len(packed) > 4 * most or len(names) > (MAX_NAME + 1) * most:
        raise ValueError(f"more keys than the {most} descriptors")
    ids = array("i")
    ids.frombytes(packed)
    if sys.byteorder == "big":
        ids.byteswap()
    return names, ids, sections


def _decode_sections(parser: msgpack.Unpacker) -> list[Section]:
    sections: dict[str, Section] = {}
    for _ in range(_at_most(parser.read_array_header(), MAX_SECTIONS, "sections")):
        if parser.read_array_header() != 4:
            raise ValueError("a section has four parts")
        key = _is(str, parser.unpack(), "the key of a section")
        packed, memfd = (_is(int, parser.unpack(), f"section {key!r}") for _ in range(2))
        data = _is(bytes, parser.unpack(), f"section {key!r}")
        if key in sections:
            raise ValueError(f"section {key!r} twice")
        sections[key] = (key, bool(packed), bool(memfd), data)
    return list(sections.values())


def _at_most(count: int, most: int, what: str) -> int:
    if count > most:
        raise ValueError(f"{count} {what}; the limit is {most}")
    return count


def _is(kind: type[T], value: object, what: str) -> T:
    if not isinstance(value, kind):
        raise ValueError(f"{what}: {value!r:.300}")
    return value

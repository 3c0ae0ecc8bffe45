"""Manifests made to hurt whoever reads them: refused at little cost of memory and time."""

from __future__ import annotations

import os
import resource
import socket
import struct
import time
from array import array
from collections.abc import Callable
from pathlib import Path

import msgpack
import pytest

from cprd import Damaged, LimitExceeded, State
from cprd.bundle import layout
from cprd.bundle.inspect import describe_bundle
from cprd.bundle.layout import HEADER, LEAF, MAGIC, VERSION, decode_manifest, encode_manifest
from cprd.bundle.unpack import unpack
from cprd.linux.memfd import sealed_memfd
from tests.support.bundles import pack

pytestmark = pytest.mark.usefixtures("nothing_leaks")

MEGABYTES = 32


def part(key: str, value: bytes, others: bytes = b"") -> bytes:
    """A manifest with `value`, as msgpack, under `key`; the other parts are empty."""
    parts = {"sections": b"\x90", "ids": msgpack.packb(b""), "names": msgpack.packb(b"")}
    parts[key] = value
    return b"".join(
        [struct.pack("B", 0x80 + len(parts)), *(msgpack.packb(k) + v for k, v in parts.items())]
    )


def array32(count: int) -> bytes:
    return struct.pack(">BI", 0xDD, count)


def section(key: bytes = b"\xa1k", packed: bytes = b"\0", data: bytes = b"\xc4\0") -> bytes:
    return b"\x91\x94" + key + packed + b"\0" + data


MANY = MEGABYTES << 20
HOSTILE: dict[str, Callable[[], bytes]] = {
    "a list of empty maps for sections": lambda: part("sections", array32(MANY) + b"\x80" * MANY),
    "a section of empty maps": lambda: part("sections", b"\x91" + array32(MANY) + b"\x80" * MANY),
    "a key of empty maps": lambda: part("sections", section(array32(MANY) + b"\x80" * MANY)),
    "data of empty lists": lambda: part("sections", section(data=array32(MANY) + b"\x90" * MANY)),
    "names of empty maps": lambda: part("names", array32(MANY) + b"\x80" * MANY),
    "ids of maps in each other": lambda: part("ids", b"\x81\0" * (MANY // 2)),
    "an unknown part, deep": lambda: part("more", b"\x91" * MANY),
    "a key without an end": lambda: part(
        "sections", section(struct.pack(">BI", 0xDB, MANY) + b"k" * MANY)
    ),
    "names for nobody": lambda: part("names", struct.pack(">BI", 0xC6, MANY) + b"\0" * MANY),
    "one long name": lambda: part("names", struct.pack(">BI", 0xC6, MANY) + b"n" * MANY),
    "ids for nobody": lambda: part("ids", struct.pack(">BI", 0xC6, MANY) + b"\0" * MANY),
    "an extension": lambda: part("names", struct.pack(">BIb", 0xC9, MANY, 5) + b"\0" * MANY),
    "an extension for a flag": lambda: part("sections", section(packed=b"\xd4\x05\0")),
    "a text for a flag": lambda: part("sections", section(packed=b"\xa1x")),
    "many sections": lambda: part(
        "sections",
        array32(layout.MAX_SECTIONS + 1) + (b"\x94\xa1k\0\0\xc4\0") * (layout.MAX_SECTIONS + 1),
    ),
    "many parts": lambda: b"\xdf" + struct.pack(">I", MANY // 2) + b"\xa0\xc0" * (MANY // 2),
    "what follows": lambda: part("names", msgpack.packb(b"")) + b"\0",
    "a promise of what is not there": lambda: part("sections", array32(1 << 31)),
    "a part twice is the last": lambda: b"\x82\xa3ids\xc4\0\xa3ids\xc4\0",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_manifest_is_damaged_and_costs_little_more_than_its_bytes(what: str) -> None:
    """In a child, whose peak of memory is its own."""
    manifest = HOSTILE[what]()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            # Twice its bytes, for the parser and for what it makes, and what Python takes.
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            mine = pages * os.sysconf("SC_PAGESIZE")
            room = mine + 3 * len(manifest) + (32 << 20)
            resource.setrlimit(resource.RLIMIT_AS, (room, room))
            began = time.process_time()
            try:
                decode_manifest(manifest, 1)
            except Damaged:
                os.write(write, b"damaged")
            os.write(write, b" %d" % (time.process_time() - began < 2))
        except MemoryError:
            os.write(write, b"memory")
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read, "rb") as file:
        assert file.read() == b"damaged 1"


def test_a_manifest_that_is_no_larger_than_its_limits_is_read() -> None:
    sections = [(f"s{n}", bool(n % 2), False, b"%d" % n) for n in range(layout.MAX_SECTIONS)]
    ids = array("i", range(300))
    names = b"\0".join([b"n" * 255] * 300)
    data = b"".join(encode_manifest(names, ids, sections))
    assert decode_manifest(data, 300) == (names, ids, sections)
    with pytest.raises(LimitExceeded, match="65537 sections; the limit is 65536"):
        encode_manifest(names, ids, [*sections, ("more", False, False, b"")])


def test_a_part_that_a_later_version_adds_is_passed_over() -> None:
    data = part("flags", msgpack.packb([{"deep": [1, 2, 3]}] * 5))
    assert decode_manifest(data, 0) == (b"", array("i"), [])


def test_show_of_a_hostile_section_is_an_answer() -> None:
    state = State()
    state["deep"], state["good"] = 1, {"a": 1}
    packed = pack(state)
    found = unpack(packed.fd)
    packed.close()
    sections = dict(found.sections())
    deep = sections["deep"]
    assert not hasattr(deep, "fd")
    bombs = {"deep": b"\x91" * 4000, "bad": b"\x81\x80\x01", "ext": b"\xc7\x02\x05ab"}
    described = [(key, True, False, data) for key, data in bombs.items()]
    manifest = sealed_memfd("test", encode_manifest(b"", array("i"), described))
    inlet, outlet = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    socket.send_fds(inlet, [HEADER.pack(MAGIC, VERSION, LEAF, 0, 1, 1, 0, 0)], [manifest])
    os.close(manifest)
    inlet.close()
    row = describe_bundle({}, outlet.detach())
    values = {shown["key"]: shown.get("value") for shown in row["sections"]}
    assert values["deep"] is values["bad"] is None
    found.close()

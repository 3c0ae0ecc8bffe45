"""Auxiliary state in QEMU's vmstate form: described, versioned, with descriptors beside the bytes.

A description belongs to no registered object: the state is needed before such objects exist.
`description`, `kinds` and `fields` have the language and both directions of the encoding, and do no
I/O; `stream` has bytes with descriptors in between; `channel` moves streams. docs/vmstate.md has an
example.
"""

from __future__ import annotations

from cprd.vmstate.channel import Channel, Reader, SocketChannel, Tape, as_channel, drain, load, save
from cprd.vmstate.description import Field, VMStateDescription, decode, encode
from cprd.vmstate.fields import (
    array,
    boolean,
    buffer,
    counted_string,
    fd,
    float64,
    int8,
    int16,
    int32,
    int64,
    qlist,
    string,
    struct,
    struct_array,
    uint8,
    uint16,
    uint32,
    uint64,
    unused,
    vbuffer,
)
from cprd.vmstate.stream import DUMMY, Sink, Source, Stream, Truncated, VMStateError

__all__ = [
    "DUMMY",
    "Channel",
    "Field",
    "Reader",
    "Sink",
    "SocketChannel",
    "Source",
    "Stream",
    "Tape",
    "Truncated",
    "VMStateDescription",
    "VMStateError",
    "array",
    "as_channel",
    "boolean",
    "buffer",
    "counted_string",
    "decode",
    "drain",
    "encode",
    "fd",
    "float64",
    "int16",
    "int32",
    "int64",
    "int8",
    "load",
    "qlist",
    "save",
    "string",
    "struct",
    "struct_array",
    "uint16",
    "uint32",
    "uint64",
    "uint8",
    "unused",
    "vbuffer",
]

"""The fields of a description, named after QEMU's VMSTATE_ macros.

Each function makes a Field. `version_id` is the version of the description that brought it,
`exists(obj, version)` decides instead of it; see `Field`.
"""

from __future__ import annotations

from types import SimpleNamespace

from cprd.errors import InvalidInput
from cprd.vmstate.description import Field, VMStateDescription
from cprd.vmstate.kinds import (
    Array,
    Bool,
    Buffer,
    CountedString,
    Fd,
    Float,
    Int,
    QList,
    String,
    Struct,
    Unused,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Exists = Callable[[Any, int], bool]

MAX_BUFFER = 1 << 20
"""Bytes of one buffer or string whose length is in the stream, unless its field says otherwise."""
MAX_COUNT = 1 << 16
"""Elements of one array or list whose length is in the stream, unless its field says otherwise."""


def _int_field(code: str) -> Callable[..., Field]:
    kind = Int(code)

    def make(
        name: str, *, version_id: int = 0, exists: Exists | None = None, length_of: str = ""
    ) -> Field:
        """An integer. With `length_of` it is no attribute: it has the length of that field."""
        return Field(name, kind, version_id, exists, length_of=length_of)

    return make


uint8, int8 = _int_field("B"), _int_field("b")
uint16, int16 = _int_field("H"), _int_field("h")
uint32, int32 = _int_field("I"), _int_field("i")
uint64, int64 = _int_field("Q"), _int_field("q")


def float64(name: str, *, version_id: int = 0, exists: Exists | None = None) -> Field:
    return Field(name, Float(), version_id, exists)


def boolean(name: str, *, version_id: int = 0, exists: Exists | None = None) -> Field:
    return Field(name, Bool(), version_id, exists)


def buffer(name: str, size: int, *, version_id: int = 0, exists: Exists | None = None) -> Field:
    """Exactly `size` bytes."""
    return Field(name, Buffer(size, size), version_id, exists)


def vbuffer(
    name: str,
    length: str,
    *,
    version_id: int = 0,
    exists: Exists | None = None,
    limit: int = MAX_BUFFER,
) -> Field:
    """As many bytes as the earlier integer field `length` says, at most `limit`."""
    return Field(name, Buffer(-1, limit), version_id, exists, length=length)


def string(
    name: str,
    length: str = "",
    *,
    version_id: int = 0,
    exists: Exists | None = None,
    size: int = -1,
    limit: int = MAX_BUFFER,
) -> Field:
    """A str with a NUL at its end: its length (NUL included, at most `limit`) is in the field
    `length`, or it fills `size` bytes."""
    if (size >= 0) == bool(length):
        raise InvalidInput(f"{name}: a string has either a length field or a size")
    return Field(name, String(size, limit), version_id, exists, length=length)


def counted_string(name: str, *, version_id: int = 0, exists: Exists | None = None) -> Field:
    """A str of up to 255 bytes behind a u8 length, no NUL."""
    return Field(name, CountedString(), version_id, exists)


def fd(name: str, *, version_id: int = 0, exists: Exists | None = None) -> Field:
    """A descriptor: a number, or on saving anything with fileno(). One dummy byte in the stream."""
    return Field(name, Fd(), version_id, exists)


def unused(size: int, *, version_id: int = 0, exists: Exists | None = None) -> Field:
    """`size` bytes that once meant something."""
    return Field("unused", Unused(size), version_id, exists)


def struct(
    name: str,
    vmsd: VMStateDescription,
    factory: Callable[[], Any] | None = SimpleNamespace,
    *,
    version_id: int = 0,
    exists: Exists | None = None,
    struct_version: int | None = None,
) -> Field:
    """An object inside, of a fixed version (no version of it is in the stream). Loaded into a
    `factory()`, or with None into the object that the attribute holds."""
    return Field(name, Struct(vmsd, factory, struct_version), version_id, exists)


def array(
    name: str,
    element: Callable[..., Field],
    count: int = -1,
    *,
    version_id: int = 0,
    exists: Exists | None = None,
    length: str = "",
    limit: int = MAX_COUNT,
) -> Field:
    """`count` elements, or as many as the field `length` says. `element` is one of this module's
    functions without further arguments: `array("counters", uint64, 4)`."""
    if (count >= 0) == bool(length):
        raise InvalidInput(f"{name}: an array has either a length field or a count")
    return Field(name, Array(element(name).kind, count, limit), version_id, exists, length=length)


def struct_array(
    name: str,
    vmsd: VMStateDescription,
    factory: Callable[[], Any] | None = SimpleNamespace,
    count: int = -1,
    *,
    version_id: int = 0,
    exists: Exists | None = None,
    length: str = "",
    limit: int = MAX_COUNT,
    struct_version: int | None = None,
) -> Field:
    """As `array`, of objects."""
    if (count >= 0) == bool(length):
        raise InvalidInput(f"{name}: an array has either a length field or a count")
    element = Struct(vmsd, factory, struct_version)
    return Field(name, Array(element, count, limit), version_id, exists, length=length)


def qlist(
    name: str,
    vmsd: VMStateDescription,
    factory: Callable[[], Any] = SimpleNamespace,
    *,
    version_id: int = 0,
    exists: Exists | None = None,
    element_version: int | None = None,
    limit: int = MAX_COUNT,
) -> Field:
    """A list of any number of objects, each loaded into a `factory()`; at most `limit`.
    QEMU's VMSTATE_QLIST_V and VMSTATE_QTAILQ_V write the same bytes."""
    return Field(name, QList(Struct(vmsd, factory, element_version), limit), version_id, exists)

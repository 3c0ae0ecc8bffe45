"""Sections of a state: msgpack values and raw buffers, and where their bytes lie."""

from __future__ import annotations

import datetime
import mmap
import os
from array import array

import msgpack

from cprd.errors import Damaged, InvalidInput
from cprd.linux.memfd import mapping

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from typing import Any

_REFUSED = (TypeError, ValueError, OverflowError, RecursionError)


class MemfdSection:
    """A section that is a sealed memfd. `owned` says whether close() closes `fd`."""

    __slots__ = ("_map", "_view", "fd", "keep", "owned", "packed")

    def __init__(self, fd: int, *, packed: bool, owned: bool, keep: object = None) -> None:
        self.fd = fd
        self.packed = packed  # holds one msgpack value, not raw bytes
        self.owned = owned
        self.keep = keep
        self._map: mmap.mmap | None = None
        self._view: memoryview | None = None

    def size(self) -> int:
        """The length in bytes."""
        return os.fstat(self.fd).st_size

    def view(self) -> memoryview:
        """The content, mapped read-only until close()."""
        if self._view is None:
            self._map = mapping(self.fd)
            self._view = memoryview(self._map or b"")
        return self._view

    def is_view(self, value: object) -> bool:
        """Whether `value` is the very object that view() returns."""
        return value is not None and value is self._view

    def close(self) -> None:
        """Unmap, and close an owned descriptor. Safe to repeat."""
        view, self._view = self._view, None
        mapped, self._map = self._map, None
        try:
            if view is not None:
                view.release()
            if mapped is not None:
                mapped.close()
        except BufferError:
            pass  # a slice is still in use: the mapping goes with it
        if self.owned and self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


class InlineSection:
    """A section as the manifest has it: `data` is one msgpack value, or raw bytes."""

    __slots__ = ("data", "packed")

    def __init__(self, data: bytes | memoryview, *, packed: bool) -> None:
        self.data = data
        self.packed = packed


class Value:
    """A value that the program set, encoded when the state is packed; or the value of a loaded
    section, decoded once, with `stored` as before: the same object at every access."""

    __slots__ = ("stored", "value")

    def __init__(self, value: Any, stored: InlineSection | MemfdSection | None = None) -> None:
        self.value = value
        self.stored = stored


Section = Value | InlineSection | MemfdSection


def close_section(section: Section | None) -> None:
    """Let go of what a section holds open, now that the state has forgotten the section."""
    if isinstance(section, Value):
        section = section.stored
    if isinstance(section, MemfdSection):
        section.close()


def check_section_key(key: str) -> None:
    """Raise InvalidInput unless `key` is 1 to 255 bytes of UTF-8 without NUL."""
    try:
        good = 0 < len(key.encode()) < 256 and "\0" not in key
    except (AttributeError, UnicodeEncodeError):
        good = False
    if not good:
        raise InvalidInput(f"section {key!r}: wants a str of 1 to 255 bytes of UTF-8 without NUL")


def encode(key: str, value: Any) -> InlineSection:
    """The bytes of a section: raw for a buffer (of ctypes, numpy, ... too), else msgpack.

    A buffer is not copied. Raises InvalidInput, with the path to the part that msgpack cannot say.
    """
    if isinstance(value, bytes):
        return InlineSection(value, packed=False)
    if isinstance(value, bytearray | memoryview | mmap.mmap | array):
        return InlineSection(_raw(key, value), packed=False)
    try:
        return InlineSection(_pack(value), packed=True)
    except _REFUSED as error:
        try:
            with memoryview(value) as view:
                buffer = view.ndim > 0  # not a mere number: nobody means the bytes of one
        except (TypeError, ValueError, BufferError):
            buffer = False
        if not buffer:
            raise InvalidInput(f"section {key!r}: {_why(key, value, error)}") from None
    return InlineSection(_raw(key, value), packed=False)


def decode(key: str, data: bytes | memoryview) -> Any:
    """The value of a section: one msgpack value. Raises Damaged.

    Lists come for tuples, msgpack.Timestamp for a datetime."""
    try:
        try:
            return msgpack.unpackb(data, raw=False, strict_map_key=False)
        except TypeError:  # a tuple that was a key of a map comes as a list
            return msgpack.unpackb(
                data,
                raw=False,
                strict_map_key=False,
                object_pairs_hook=lambda pairs: {_hashable(key): value for key, value in pairs},
            )
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise Damaged(f"section {key!r} is not the msgpack value it should be: {error!r}") from None


def _pack(value: Any) -> memoryview:
    # In a list of its own, whose one byte goes: msgpack packs one level more than it unpacks.
    return memoryview(msgpack.packb([value], use_bin_type=True, datetime=True))[1:]


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _raw(key: str, value: Any) -> bytes | memoryview:
    """The bytes of a buffer, not copied where its items are of Python's own formats."""
    try:
        view = memoryview(value)
        if view.c_contiguous:
            if not view.nbytes:
                return b""  # has no shape to cast
            try:
                return view.cast("B")
            except TypeError:  # of a format that memoryview cannot cast: ctypes says "<i"
                return view.tobytes()
    except (ValueError, BufferError, NotImplementedError) as error:  # released, unmapped
        raise InvalidInput(f"section {key!r} is a buffer that cannot be read: {error}") from None
    raise InvalidInput(f"section {key!r} is a view with gaps: pass bytes(view), which has none")


def _why(path: str, value: Any, error: BaseException) -> str:
    """The path to the part of `value` that msgpack cannot say, and advice."""
    if isinstance(error, RecursionError) or "recursion limit" in str(error):
        return "lists and maps lie in each other deeper than msgpack can read"
    while True:
        for step, part in _parts(value):
            try:
                _pack(part)
            except _REFUSED as refused:
                path, value, error = path + step, part, refused
                break
        else:
            return f"{path}: msgpack cannot say {_named(value, error)}"


def _parts(value: Any) -> list[tuple[str, Any]]:
    """The parts of a value, each with the step of a path."""
    if isinstance(value, dict):
        keys = [(f" key {key!r:.100}", key) for key in value]
        values = [
            (f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{key!r:.100}]", part)
            for key, part in value.items()
        ]
        return keys + values
    if isinstance(value, list | tuple):
        return [(f"[{number}]", part) for number, part in enumerate(value)]
    return []


def _named(value: Any, error: BaseException) -> str:
    if isinstance(value, set | frozenset):
        return f"a {type(value).__name__}: set sorted() or list() of it"
    if isinstance(value, datetime.datetime):
        return "a datetime without a time zone: set an aware one, or isoformat() of it"
    if isinstance(value, int):
        return "an integer beyond 64 bits: set str() of it"
    if isinstance(value, str):
        return f"text that is no UTF-8 ({value!r:.100}): set bytes"
    return f"{type(value).__name__} {value!r:.100} ({error})"

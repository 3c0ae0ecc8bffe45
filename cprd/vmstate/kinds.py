"""What a value of each kind looks like in the stream: QEMU's big-endian forms, with limits."""

from __future__ import annotations

from operator import index
from struct import Struct as Layout

from cprd.errors import InvalidInput
from cprd.vmstate.description import Kind, VMStateDescription, get, put
from cprd.vmstate.stream import Sink, Source, VMStateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any


class Int(Kind):
    def __init__(self, code: str) -> None:
        self.layout = Layout(">" + code)
        bits = 8 * self.layout.size
        self.low, self.high = (0, 1 << bits) if code.isupper() else (-1 << bits - 1, 1 << bits - 1)

    def put(self, out: Sink, value: Any) -> None:
        try:
            number = index(value)
        except TypeError:
            raise VMStateError(f"{value!r} is not an integer") from None
        if not self.low <= number < self.high:
            raise VMStateError(f"{number} is not within {self.low} to {self.high - 1}")
        out.put(self.layout.pack(number))

    def get(self, src: Source, length: int, current: Any) -> int:
        (number,) = self.layout.unpack(src.read(self.layout.size))
        return int(number)


class Float(Kind):
    layout = Layout(">d")

    def put(self, out: Sink, value: Any) -> None:
        if not isinstance(value, (float, int)):
            raise VMStateError(f"{value!r} is not a number")
        out.put(self.layout.pack(value))

    def get(self, src: Source, length: int, current: Any) -> float:
        (number,) = self.layout.unpack(src.read(8))
        return float(number)


class Bool(Kind):
    def put(self, out: Sink, value: Any) -> None:
        if value is not True and value is not False:
            raise VMStateError(f"{value!r} is not a bool")
        out.put(b"\1" if value else b"\0")

    def get(self, src: Source, length: int, current: Any) -> bool:
        return _flag(src, "a bool")


class Buffer(Kind):
    """`size` bytes, or, with a length field, as many as that says, up to `limit`."""

    def __init__(self, size: int, limit: int) -> None:
        self.size = size
        self.limit = limit

    def length(self, value: Any) -> int:
        return len(self.raw(value))

    def raw(self, value: Any) -> bytes:
        """The bytes of a value as they will stand in the stream."""
        try:
            data = value if isinstance(value, bytes) else bytes(memoryview(value))
        except TypeError:
            raise VMStateError(f"a {type(value).__name__} is not bytes") from None
        if self.size >= 0 and len(data) != self.size:
            raise VMStateError(f"{len(data)} bytes where {self.size} belong")
        if self.size < 0 and len(data) > self.limit:
            raise VMStateError(f"{len(data)} bytes, and the limit is {self.limit}")
        return data

    def put(self, out: Sink, value: Any) -> None:
        out.put(self.raw(value))

    def get(self, src: Source, length: int, current: Any) -> Any:
        size = self.size if length < 0 else length
        if length > self.limit:
            raise VMStateError(
                f"{length} bytes announced, and the limit is {self.limit}", offset=src.offset
            )
        start = src.offset
        return self.cooked(src.read(size), start)

    def cooked(self, data: bytes, offset: int) -> Any:
        return data


class String(Buffer):
    """A C string: with a length field exactly up to its NUL, else padded to `size` with NULs.
    UTF-8; other bytes survive as surrogate escapes."""

    def raw(self, value: Any) -> bytes:
        data = _text(value)
        if b"\0" in data:
            raise VMStateError("a NUL inside the string")
        data += b"\0"
        if self.size < 0:
            return super().raw(data)
        if len(data) > self.size:
            raise VMStateError(f"{len(data)} bytes with the NUL, and {self.size} are its room")
        return data.ljust(self.size, b"\0")

    def cooked(self, data: bytes, offset: int) -> str:
        end = data.find(b"\0")
        if end < 0:
            raise VMStateError("the string has no NUL at its end", offset=offset)
        if self.size < 0 and end != len(data) - 1:
            raise VMStateError("a NUL inside the string", offset=offset + end)
        return data[:end].decode("utf-8", "surrogateescape")


class CountedString(Kind):
    """A u8 length and that many bytes, without a NUL."""

    def put(self, out: Sink, value: Any) -> None:
        data = _text(value)
        if len(data) > 255:
            raise VMStateError(f"{len(data)} bytes, and the limit is 255")
        out.put(bytes((len(data),)) + data)

    def get(self, src: Source, length: int, current: Any) -> str:
        return src.read(src.read(1)[0]).decode("utf-8", "surrogateescape")


class Fd(Kind):
    blank = -1
    carries_fds = True

    def put(self, out: Sink, value: Any) -> None:
        number = value if isinstance(value, int) else getattr(value, "fileno", lambda: -1)()
        if not isinstance(number, int) or number < 0:
            raise VMStateError(f"{value!r} is not an open descriptor")
        out.put_fd(number)

    def get(self, src: Source, length: int, current: Any) -> int:
        return src.get_fd()


class Unused(Kind):
    """Room that an older version used: zeros out, anything in."""

    anonymous = True

    def __init__(self, size: int) -> None:
        self.size = size

    def put(self, out: Sink, value: Any) -> None:
        out.put(bytes(self.size))

    def get(self, src: Source, length: int, current: Any) -> None:
        src.read(self.size)


class Struct(Kind):
    def __init__(
        self, vmsd: VMStateDescription, factory: Callable[[], Any] | None, version: int | None
    ) -> None:
        self.vmsd = vmsd
        self.factory = factory
        self.version = vmsd.version_id if version is None else version
        if not vmsd.minimum_version_id <= self.version <= vmsd.version_id:
            raise InvalidInput(f"{vmsd.name}: version {self.version} is not one of its versions")

    def put(self, out: Sink, value: Any) -> None:
        put(out, self.vmsd, value, self.version)

    def get(self, src: Source, length: int, current: Any) -> Any:
        if self.factory is None:
            if current is None:
                raise VMStateError("no object there to load into, and no factory for one")
            obj = current
        else:
            obj = self.factory()
        get(src, self.vmsd, obj, self.version)
        return obj


class Array(Kind):
    """`count` elements, or, with a length field, as many as that says, up to `limit`."""

    def __init__(self, element: Kind, count: int, limit: int) -> None:
        self.element = element
        self.count = count
        self.limit = limit
        self.carries_fds = element.carries_fds
        self.blank = ()

    def length(self, value: Any) -> int:
        return len(self.elements(value))

    def elements(self, value: Any) -> Sequence[Any]:
        if isinstance(value, (str, bytes)) or not hasattr(value, "__len__"):
            raise VMStateError(f"a {type(value).__name__} is not a sequence")
        if self.count >= 0 and len(value) != self.count:
            raise VMStateError(f"{len(value)} elements where {self.count} belong")
        if self.count < 0 and len(value) > self.limit:
            raise VMStateError(f"{len(value)} elements, and the limit is {self.limit}")
        return list(value)

    def put(self, out: Sink, value: Any) -> None:
        for at, item in enumerate(self.elements(value)):
            try:
                self.element.put(out, item)
            except VMStateError as exc:
                exc.inside(f"[{at}]")
                raise

    def get(self, src: Source, length: int, current: Any) -> list[Any]:
        if length > self.limit:
            raise VMStateError(
                f"{length} elements announced, and the limit is {self.limit}", offset=src.offset
            )
        count = self.count if length < 0 else length
        src.spend(count)
        values: list[Any] = []
        for at in range(count):
            there = current[at] if isinstance(current, list) and at < len(current) else None
            try:
                values.append(self.element.get(src, -1, there))
            except VMStateError as exc:
                exc.inside(f"[{at}]")
                raise
        return values


class QList(Kind):
    """A list of structs: 0x01 before each element, 0x00 after the last."""

    def __init__(self, element: Struct, limit: int) -> None:
        self.element = element
        self.limit = limit

    def put(self, out: Sink, value: Any) -> None:
        try:
            items = list(value)
        except TypeError:
            raise VMStateError(f"a {type(value).__name__} is not a list") from None
        if len(items) > self.limit:
            raise VMStateError(f"{len(items)} elements, and the limit is {self.limit}")
        for at, item in enumerate(items):
            out.put(b"\1")
            try:
                self.element.put(out, item)
            except VMStateError as exc:
                exc.inside(f"[{at}]")
                raise
        out.put(b"\0")

    def get(self, src: Source, length: int, current: Any) -> list[Any]:
        items: list[Any] = []
        while True:
            try:
                if not _flag(src, "the marker of a list"):
                    return items
                if len(items) >= self.limit:
                    raise VMStateError(f"one more than the limit of {self.limit} elements")
                src.spend(1)
                items.append(self.element.get(src, -1, None))
            except VMStateError as exc:
                exc.inside(f"[{len(items)}]")
                raise


def _flag(src: Source, what: str) -> bool:
    byte = src.read(1)[0]
    if byte > 1:
        raise VMStateError(f"byte 0x{byte:02x} is not {what}, 0 or 1", offset=src.offset - 1)
    return byte == 1


def _text(value: Any) -> bytes:
    if not isinstance(value, str):
        raise VMStateError(f"a {type(value).__name__} is not a str")
    try:
        return value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as exc:
        raise VMStateError(f"cannot be written as UTF-8: {exc.reason}") from None

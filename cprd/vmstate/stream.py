"""Bytes with descriptors in between, to write to and to read from. No I/O.

A descriptor takes one byte of the stream, the *dummy byte* (a space), and travels beside the byte.
On the way in the order of the descriptors counts, and no descriptor comes later than the dummy
byte. (QEMU's own loader keeps a queue, and takes a descriptor at each dummy byte.)
"""

from __future__ import annotations

from collections import deque

from cprd.errors import InvalidInput, ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

DUMMY = 0x20
"""The byte that stands in the stream for a descriptor."""

MAX_ITEMS = 1 << 22
"""Elements of arrays and lists in a load: even an element of no bytes costs memory."""


class VMStateError(ProtocolError):
    """A stream that does not fit the description, or a value that does not fit the field. `path`
    names the field ("CprState.fds[3].name"), `offset` is the position in the stream in bytes, -1
    while saving."""

    def __init__(self, what: str, *, path: str = "", offset: int = -1) -> None:
        super().__init__(what)
        self.what = what
        self.path = path
        self.offset = offset

    def inside(self, segment: str) -> None:
        """Put the name of what encloses the culprit in front of the path."""
        self.path = segment + self.path

    def __str__(self) -> str:
        where = f" (at byte {self.offset} of the stream)" if self.offset >= 0 else ""
        return f"{self.path}: {self.what}{where}" if self.path else f"{self.what}{where}"


class Truncated(VMStateError):
    """The stream ended inside a field: the sender died or failed. Use nothing of the stream."""


class Stream:
    """An encoded stream: `data`, and `marks`, an (offset of the dummy byte, descriptor) for each
    descriptor, in order. The descriptors are borrowed until the stream has been sent."""

    __slots__ = ("data", "marks")

    def __init__(self, data: bytes, marks: Sequence[tuple[int, int]] = ()) -> None:
        self.data = data
        self.marks = tuple(marks)

    def pieces(self) -> Iterator[tuple[bytes, int]]:
        """The messages in order: plain bytes with -1, or a dummy byte with the descriptor. QEMU
        sends so, too, and takes 16 descriptors at once at most."""
        at = 0
        for offset, number in self.marks:
            if offset > at:
                yield self.data[at:offset], -1
            yield self.data[offset : offset + 1], number
            at = offset + 1
        if at < len(self.data):
            yield self.data[at:], -1


class Sink:
    """Collects a Stream. Borrows the descriptors."""

    __slots__ = ("data", "marks")

    def __init__(self) -> None:
        self.data = bytearray()
        self.marks: list[tuple[int, int]] = []

    def put(self, data: bytes | bytearray | memoryview) -> None:
        self.data += data

    def put_fd(self, number: int) -> None:
        self.marks.append((len(self.data), number))
        self.data.append(DUMMY)

    def stream(self) -> Stream:
        return Stream(bytes(self.data), self.marks)


class Source:
    """Bytes and descriptors to read from.

    `offsets[k]` says where in the stream descriptor k arrived (default: all before the first byte).
    Closes no descriptor. `taken`: the descriptors handed out, `assigned`: the attributes with
    descriptors, so that the owner can take a failed load back."""

    __slots__ = ("_arrived", "_at", "_base", "_data", "_items", "assigned", "taken")

    def __init__(
        self,
        data: bytes | bytearray | memoryview = b"",
        fds: Sequence[int] = (),
        offsets: Sequence[int] | None = None,
        max_items: int = MAX_ITEMS,
    ) -> None:
        if offsets is not None and len(offsets) != len(fds):
            raise InvalidInput(f"{len(fds)} descriptors with {len(offsets)} offsets")
        self._data = bytearray(data)
        self._at = 0
        self._base = 0
        self._arrived = deque(
            zip(offsets if offsets is not None else [0] * len(fds), fds, strict=True)
        )
        self._items = max_items
        self.taken: list[int] = []
        self.assigned: list[tuple[Any, str, Any]] = []

    def _pull(self) -> bool:
        """Get more; False at the end of the stream. Here nothing more comes."""
        return False

    def _arrive(self, data: bytes, fds: Sequence[int]) -> None:
        """Append what came together. Nobody sees where in `data` the descriptors were attached: all
        count from the first byte on, as in QEMU."""
        if self._at > 1 << 16:
            self._base += self._at
            del self._data[: self._at]
            self._at = 0
        start = self._base + len(self._data)
        self._arrived.extend((start, number) for number in fds)
        self._data += data

    @property
    def offset(self) -> int:
        """Bytes read so far."""
        return self._base + self._at

    def peek(self, size: int) -> bytes:
        """The next `size` bytes, not read yet; fewer at the end of the stream."""
        while len(self._data) - self._at < size:
            if not self._pull():
                break
        return bytes(self._data[self._at : self._at + size])

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes. Raises Truncated when the stream ends before."""
        found = self.peek(size)
        if len(found) < size:
            missing = size - len(found)
            raise Truncated(
                f"the stream ends {missing} of {size} bytes early", offset=self.offset + len(found)
            )
        self._at += size
        return found

    def get_fd(self) -> int:
        """The next descriptor: reads the dummy byte. Raises VMStateError where none has arrived."""
        dummy = self.peek(1)
        if not dummy:
            raise Truncated("the stream ends before the byte of a descriptor", offset=self.offset)
        if dummy[0] != DUMMY:
            raise VMStateError(
                f"byte 0x{dummy[0]:02x} stands where a descriptor's 0x{DUMMY:02x} belongs",
                offset=self.offset,
            )
        if not self._arrived:
            raise VMStateError("no descriptor came with it", offset=self.offset)
        arrived, number = self._arrived[0]
        if arrived > self.offset:
            raise VMStateError(
                f"its descriptor came late, at byte {arrived} of the stream", offset=self.offset
            )
        self._arrived.popleft()
        self._at += 1
        self.taken.append(number)
        return number

    def spend(self, items: int) -> None:
        """Count elements against the limit of a whole load."""
        self._items -= items
        if self._items < 0:
            raise VMStateError("more list and array elements than one load may have")

    def finish(self) -> None:
        """The stream must end exactly here, with no descriptor left over."""
        if self.peek(1):
            raise VMStateError("bytes follow after the end of the state", offset=self.offset)
        if self._arrived:
            raise VMStateError(
                f"{len(self._arrived)} more descriptors than elements", offset=self.offset
            )

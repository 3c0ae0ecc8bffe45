"""A state: descriptors under keys (name, id), in order, and named sections.

What a predecessor leaves and a successor finds. It knows nothing of how it travels (bundle.py).
Source of the verbs: QEMU's migration/cpr.c (cpr_save_fd, cpr_find_fd, cpr_delete_fd).
"""

from __future__ import annotations

import fcntl
import mmap
import operator
import os
from array import array
from collections.abc import Iterable, Iterator, MutableMapping

import msgpack

from cprd.errors import Damaged, InvalidInput, LimitExceeded
from cprd.linux.rights import close_all

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from typing import Any, Protocol

    class HasFileno(Protocol):
        def fileno(self) -> int: ...
else:
    HasFileno = object


SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_I32 = 1 << 31


class MemfdSection:
    """A section that is a sealed memfd. `owned` says whether the state closes `fd`."""

    __slots__ = ("_map", "_view", "fd", "keep", "owned", "packed")

    def __init__(self, fd: int, *, packed: bool, owned: bool, keep: object = None) -> None:
        self.fd = fd
        self.packed = packed  # holds one msgpack value, not raw bytes
        self.owned = owned
        self.keep = keep
        self._map: mmap.mmap | None = None
        self._view: memoryview | None = None

    def size(self) -> int:
        return os.fstat(self.fd).st_size

    def view(self) -> memoryview:
        """The content, mapped read-only. MAP_PRIVATE: before Linux 6.7 a shared mapping of a
        write-sealed memfd is refused even when it is read-only."""
        if self._view is None:
            size = self.size()
            if size:
                self._map = mmap.mmap(self.fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
            self._view = memoryview(self._map or b"")
        return self._view

    def close(self) -> None:
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
    """A section as it lies in a manifest: `data` is one msgpack value or raw bytes."""

    __slots__ = ("data", "packed")

    def __init__(self, data: bytes | memoryview, *, packed: bool) -> None:
        self.data = data
        self.packed = packed


class _Value:
    """A section as the program set it; encoded when the state is packed."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class State(MutableMapping[str, "Any"]):
    """Descriptors and sections.

    A state that a program builds *borrows* its descriptors: they stay the program's, which keeps
    them open until `save` returns (objects with fileno() are kept alive). A state that came with a
    claim *owns* them: what `take_fd` does not take is closed with the claim."""

    __slots__ = ("_columns", "_fds", "_keep", "_numbers", "_owned", "_sections")

    def __init__(self) -> None:
        # The keys twice: as columns, which is how they travel (names joined by NUL; 10,000 of them
        # are joined in 0.1 ms and taken apart in 1 ms, so both happen outside save and load), and
        # by key, made when a loaded state is first asked.
        self._columns: tuple[bytearray | bytes, array[int], array[int]] | None = _no_columns()
        self._fds: dict[tuple[str, int], int] | None = {}
        self._numbers: set[int] | None = set()  # of the descriptors; None: not known now
        self._keep: dict[tuple[str, int], object] = {}
        self._owned = False
        self._sections: dict[str, _Value | InlineSection | MemfdSection] = {}

    # Descriptors

    def save_fd(self, name: str, id: int, fd: int | HasFileno) -> None:
        """Add a descriptor under (name, id). `name`: 1..255 bytes of UTF-8 without NUL; `id`: i32.

        `fd` is borrowed until save returns. Raises InvalidInput for a key used twice, a bad name
        or id, or what is not an open descriptor."""
        keep: object = None
        if not isinstance(fd, int):
            keep, fd = fd, _fileno(fd)
        try:
            id = operator.index(id)
            encoded = name.encode("utf-8", "surrogateescape")
            if not 0 < len(encoded) < 256 or b"\0" in encoded:
                raise InvalidInput(f"name {name!r}: wants 1 to 255 bytes without NUL")
            if not -_I32 <= id < _I32:
                raise InvalidInput(f"id {id!r} of {name!r}: wants a signed 32 bit integer")
        except (AttributeError, TypeError, UnicodeEncodeError):
            raise InvalidInput(f"key ({name!r}, {id!r}): wants a str and an int") from None
        fds = self._all()
        key = (name, id)
        if key in fds:
            raise InvalidInput(f"key ({name!r}, {id}) is used already: delete_fd() it first")
        try:
            fcntl.fcntl(fd, fcntl.F_GETFD)
        except (OSError, ValueError, OverflowError):
            raise InvalidInput(f"fd {fd} of ({name!r}, {id}) is not an open descriptor") from None
        if self._owned:  # a loaded state closes what is in it, so it wants a descriptor of its own
            fd = _duplicate(fd, f"({name!r}, {id})")
        elif keep is not None:
            self._keep[key] = keep
        # One step makes it true. Should the rest be interrupted, it is made anew from the keys.
        columns, numbers = self._columns, self._numbers
        self._columns = self._numbers = None
        fds[key] = fd
        if numbers is not None:
            numbers.add(fd)
        if columns is not None:
            names, ids, column = columns
            assert isinstance(names, bytearray)  # the keys were asked for
            if column:
                names += b"\0"
            names += encoded
            ids.append(id)
            column.append(fd)
        self._columns, self._numbers = columns, numbers

    def find_fd(self, name: str, id: int = 0) -> int:
        """The descriptor under (name, id), still owned as before; -1 when there is none."""
        return self._all().get((name, id), -1)

    def delete_fd(self, name: str, id: int = 0) -> None:
        """Forget (name, id); an owned descriptor is closed. Nothing happens when it is absent."""
        owned = self._owned
        fd = self.take_fd(name, id)
        if fd >= 0 and owned:
            os.close(fd)

    def take_fd(self, name: str, id: int = 0) -> int:
        """The descriptor under (name, id), which the caller owns from now on; -1 when absent."""
        fds, key = self._all(), (name, id)
        if key not in fds:
            return -1
        self._columns = self._numbers = None  # first: they may not speak of what is gone
        fd = fds.pop(key)
        self._keep.pop(key, None)
        return fd

    def fds(self, name: str | None = None) -> Iterator[tuple[str, int, int]]:
        """(name, id, fd) in the order in which they were saved: of one name, or all."""
        for (key, id), fd in list(self._all().items()):
            if name is None or key == name:
                yield key, id, fd

    @property
    def fd_count(self) -> int:
        """How many descriptors there are under keys (sections do not count)."""
        return len(self._columns[2]) if self._columns is not None else len(self._all())

    def _all(self) -> dict[tuple[str, int], int]:
        """The descriptors by key. A loaded state splits its names only when one is asked for."""
        if self._fds is None:
            assert self._columns is not None
            joined, ids, fds = self._columns
            names = joined.decode("utf-8", "surrogateescape").split("\0") if fds else []
            by_key = dict(zip(zip(names, ids, strict=True), fds, strict=True))
            if len(by_key) != len(fds):
                raise Damaged("two descriptors of the bundle have the same key")
            self._fds = by_key
            self._columns = (bytearray(joined), ids, fds)
        return self._fds

    def _as_columns(self) -> tuple[bytearray | bytes, array[int], array[int]]:
        """The keys as they travel: names joined by NUL, ids, fds. Not copies: not to be changed."""
        if self._columns is None:
            keys = self._all()
            joined = "\0".join([name for name, _ in keys]).encode("utf-8", "surrogateescape")
            ids, fds = array("i", [id for _, id in keys]), array("i", keys.values())
            self._columns = (bytearray(joined), ids, fds)
        return self._columns

    def _as_numbers(self) -> set[int]:
        """The numbers of all descriptors under keys. Not a copy: not to be changed."""
        if self._numbers is None:
            self._numbers = set(self._as_columns()[2])
        return self._numbers

    # Sections: a mapping like any other

    def __getitem__(self, key: str) -> Any:
        section = self._sections[key]
        if isinstance(section, _Value):
            return section.value
        data = section.view() if isinstance(section, MemfdSection) else memoryview(section.data)
        if not section.packed:
            return data
        value = _decode(key, data)
        self._sections[key] = _Decoded(value, section)
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        _check_section_key(key)
        old = self._sections.get(key)
        if isinstance(old, MemfdSection) and value is not None and value is old._view:
            return  # it was got from here, and would end with what it replaces
        self._sections[key] = _Value(value)
        _end_section(old)

    def __contains__(self, key: object) -> bool:
        return key in self._sections

    def __delitem__(self, key: str) -> None:
        _end_section(self._sections.pop(key))

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._sections))

    def __len__(self) -> int:
        return len(self._sections)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"<cprd.State: {self.fd_count} descriptors, sections {list(self._sections)}>"

    def save_section_fd(self, key: str, memfd: int | HasFileno) -> None:
        """Add a section that already is a sealed memfd; it is not copied, and borrowed until save
        returns. Raises InvalidInput unless it carries the seals SEAL, SHRINK, GROW and WRITE."""
        _check_section_key(key)
        keep: object = None
        if not isinstance(memfd, int):
            keep, memfd = memfd, _fileno(memfd)
        check_seals(key, memfd)
        if self._owned:
            memfd = _duplicate(memfd, f"section {key!r}")
        old = self._sections.get(key)
        self._sections[key] = MemfdSection(memfd, packed=False, owned=self._owned, keep=keep)
        _end_section(old)

    def section_fd(self, key: str) -> int:
        """A section as a sealed memfd, owned by the state; one that lies inline is copied into a
        new one first. Raises KeyError."""
        section = self._sections[key]
        if isinstance(section, _Decoded):
            section = section.stored
        if isinstance(section, MemfdSection):
            return section.fd
        data, packed = encode_section(key, section)
        made = MemfdSection(sealed_memfd(f"section.{key}", [data]), packed=packed, owned=True)
        self._sections[key] = made
        return made.fd

    # For what carries a state

    def _adopt(
        self,
        names: bytes,
        ids: array[int],
        fds: array[int],
        sections: dict[str, InlineSection | MemfdSection],
    ) -> None:
        """Become the owner of what a bundle held: `names` joined by NUL, one id and fd each."""
        self._owned = True
        self._columns = (names, ids, fds)
        self._fds = self._numbers = None
        self._sections.update(sections)

    def close(self) -> None:
        """Close what the state owns: untaken descriptors, mapped sections. Safe to repeat. What
        was only borrowed stays open."""
        fds: Iterable[int] = ()
        if self._owned:
            fds = self._columns[2] if self._columns is not None else self._all().values()
        sections = self._sections
        # Forgotten first: what is interrupted and repeated may not close a number twice.
        self._columns, self._fds, self._numbers = _no_columns(), {}, set()
        self._keep, self._sections = {}, {}
        close_all(fds)
        for section in sections.values():
            _end_section(section)


def _no_columns() -> tuple[bytearray, array[int], array[int]]:
    return bytearray(), array("i"), array("i")


class _Decoded(_Value):
    """A loaded section whose value was asked for: the same object at every access."""

    __slots__ = ("stored",)

    def __init__(self, value: Any, stored: InlineSection | MemfdSection) -> None:
        super().__init__(value)
        self.stored = stored


def _end_section(section: _Value | InlineSection | MemfdSection | None) -> None:
    """Let go of what a section holds open, now that the state has forgotten it."""
    if isinstance(section, _Decoded):
        section = section.stored
    if isinstance(section, MemfdSection):
        section.close()


def encode_section(key: str, section: _Value | InlineSection) -> tuple[bytes | memoryview, bool]:
    """The bytes of a section and whether they are one msgpack value (else raw).

    What msgpack cannot say is raw if it is a buffer (of ctypes, numpy, ...). Raises InvalidInput,
    with the section's name, for what is neither."""
    if isinstance(section, InlineSection):
        return section.data, section.packed
    value = section.value
    if isinstance(value, bytes):
        return value, False
    if isinstance(value, bytearray | memoryview | mmap.mmap | array):
        return _raw(key, value), False
    try:
        return msgpack.packb(value, use_bin_type=True), True
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        try:
            with memoryview(value) as view:
                buffer = view.ndim > 0  # not a mere number: nobody means the bytes of one
        except (TypeError, ValueError, BufferError):
            buffer = False
        if not buffer:
            raise InvalidInput(f"section {key!r} is not a msgpack value: {error}") from None
    return _raw(key, value), False


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


def _decode(key: str, data: memoryview) -> Any:
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
        raise Damaged(f"section {key!r} is not the msgpack value it should be: {error}") from None


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _fileno(thing: HasFileno) -> int:
    try:
        return operator.index(thing.fileno())
    except (AttributeError, TypeError, ValueError, OSError) as error:
        raise InvalidInput(f"{thing!r:.300} has no descriptor: {error}") from None


def open_descriptor(what: str, thing: int | HasFileno) -> int:
    """The number of an open descriptor, still its owner's. Raises InvalidInput."""
    fd = thing if isinstance(thing, int) else _fileno(thing)
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except (OSError, ValueError, OverflowError):
        raise InvalidInput(f"{what}: {fd} is not an open descriptor") from None
    return fd


def _duplicate(fd: int, what: str) -> int:
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
    except OSError as error:
        raise LimitExceeded(
            f"no descriptor left for a copy of {what} ({error.strerror}): raise RLIMIT_NOFILE"
            " (ulimit -n, LimitNOFILE=)"
        ) from None


def sealed_memfd(name: str, parts: list[bytes | memoryview]) -> int:
    """A new memfd with `parts` one after another, sealed against every change; the caller owns it.

    Raises LimitExceeded when there is no descriptor or memory for it."""
    fd = -1
    try:
        fd = os.memfd_create(name[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        left = [memoryview(part).cast("B") for part in parts if len(part)]
        while left:
            written = os.writev(fd, left)
            while left and written >= len(left[0]):
                written -= len(left.pop(0))
            if written:
                left[0] = left[0][written:]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise LimitExceeded(
            f"cannot make a memfd for {name!r}: {error.strerror}; raise RLIMIT_NOFILE (EMFILE) or"
            " the memory that this cgroup may use (ENOMEM, ENOSPC)"
        ) from None
    return fd


def check_seals(key: str, fd: int) -> None:
    """Raise InvalidInput unless `fd` is a memfd that nobody can change any more."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except (OSError, ValueError, OverflowError):
        raise InvalidInput(
            f"section {key!r}: fd {fd} is not a memfd; a descriptor of another kind goes by"
            " save_fd(name, id, fd)"
        ) from None
    if seals & SEALS != SEALS:
        missing = [
            name
            for name, seal in (
                ("F_SEAL_SEAL", fcntl.F_SEAL_SEAL),
                ("F_SEAL_SHRINK", fcntl.F_SEAL_SHRINK),
                ("F_SEAL_GROW", fcntl.F_SEAL_GROW),
                ("F_SEAL_WRITE", fcntl.F_SEAL_WRITE),
            )
            if not seals & seal
        ]
        raise InvalidInput(
            f"section {key!r}: the memfd lacks the seals {', '.join(missing)}; add them with"
            " fcntl(F_ADD_SEALS) after unmapping it everywhere, or pass memory that must stay"
            " writable by save_fd(name, id, fd)"
        )


def _check_section_key(key: str) -> None:
    try:
        good = 0 < len(key.encode()) < 256 and "\0" not in key
    except (AttributeError, UnicodeEncodeError):
        good = False
    if not good:
        raise InvalidInput(f"section {key!r}: wants a str of 1 to 255 bytes of UTF-8 without NUL")

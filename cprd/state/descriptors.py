"""Descriptors under keys (name, id), in the order of saving.

Source of the verbs: QEMU's migration/cpr.c (cpr_save_fd, cpr_find_fd, cpr_delete_fd).

Each name has one dict of ids to descriptors. So a bulk verb copies or hands out a whole dict, and a
single verb changes one entry. The dicts tell the order, too, as long as the keys of each name were
saved in a row; a second dict tells the order of states whose names are mixed.

An interrupt (KeyboardInterrupt) may come between any two steps. One step makes each change true;
the steps before and after that one leave nothing that a verb would misread.
"""

from __future__ import annotations

import fcntl
import operator
import os
import struct
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping
from errno import EBADF
from itertools import chain, repeat

from cprd.errors import Damaged, InvalidInput, MissingKey
from cprd.linux.nofile import none_left
from cprd.linux.rights import close_all

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    import socket
    from typing import Any, Protocol

    class HasFileno(Protocol):
        def fileno(self) -> int: ...
else:
    HasFileno = object

_I32 = 1 << 31
_HIGHEST = 3 if sys.byteorder == "little" else 0  # byte of a number of 32 bits, with the sign


UNSET: Any = object()
"""An argument that was not given."""


class Descriptors:
    """The descriptors of a state; `State` adds the sections.

    A state that a program builds *borrows*: the program keeps the descriptors open until save
    returns, and the state keeps objects with fileno() alive. A state of a claim *owns*: close()
    closes all that no take verb gave away. No method blocks."""

    __slots__ = ("_asked", "_folded", "_keep", "_last", "_names", "_order", "_owned")

    def __init__(self) -> None:
        self._names: dict[str, dict[int, int]] = {}
        # All keys in order, once a name got a key after another name did; None before.
        self._order: dict[tuple[str, int], None] | None = None
        # The dict in `_names` that is the last, or None where nobody has looked.
        self._last: dict[int, int] | None = None
        self._keep: dict[str, dict[int, object]] = {}
        # All keys as they travel, until the first question about a key: names joined by NUL, ids,
        # descriptors. A loaded state, whose `_names` is empty meanwhile, or what save_fds added to.
        self._folded: tuple[bytes, array[int], array[int]] | None = None
        self._owned = False
        self._asked: set[tuple[str, int] | str] = set()  # keys that the owner of a claim looked at

    # One descriptor

    def save_fd(self, name: str, id: int | HasFileno = UNSET, fd: int | HasFileno = UNSET) -> None:
        """Add `fd` under (name, id): save_fd(name, id, fd), or save_fd(name, fd) for id 0.

        name: 1 to 255 bytes of UTF-8 without NUL. id: signed, 32 bits. fd: a number, or an object
        with fileno(); borrowed until save returns, and an object is kept alive until then. A loaded
        state takes a copy instead.

        Raises InvalidInput for a key in use, a bad name or id, an object without descriptor;
        LimitExceeded when a copy does not fit. save() finds a number that is not open, and names
        the key."""
        if fd is UNSET:
            id, fd = 0, id
        number = fd if type(fd) is int else number_of(fd)
        if type(id) is not int:
            id = 0 if id is UNSET else _index(name, id)
        names = self._names if self._folded is None else self._unfold()
        try:
            group = names.get(name)
        except TypeError:
            group = None
        if group is None:
            _check_name(name)
        elif id in group:
            raise _used(name, id)
        if not (-0x80000000 <= id <= 0x7FFFFFFF and 0 <= number <= 0x7FFFFFFF):
            raise _refused(name, id, number)
        if self._owned:
            number = duplicate(number, f"({name!r}, {id})")
            self._asked.add((name, id))
        elif number is not fd:
            self._keep.setdefault(name, {})[id] = fd
        if self._order is not None or (group is not None and group is not self._last):
            self._append(name, {id: number})
        elif group is not None:
            group[id] = number
        else:
            self._last = None  # until it is the last
            names[name] = group = {id: number}
            self._last = group

    def find_fd(self, name: str, id: int = 0) -> int:
        """Return the descriptor under (name, id), owned as before; -1 when the key is absent."""
        names = self._names if self._folded is None else self._unfold()
        group = names.get(name)
        fd = -1 if group is None else group.get(id, -1)
        if self._owned and fd >= 0:
            self._asked.add((name, id))
        return fd

    def take_fd(self, name: str, id: int = 0, default: int = UNSET) -> int:
        """Return the descriptor under (name, id); the caller owns the descriptor from now on.

        An absent key: `default` if given, else MissingKey."""
        names = self._names if self._folded is None else self._unfold()
        try:
            group = names[name]
            fd = group.pop(id)
        except (KeyError, TypeError):
            if default is not UNSET:
                return default
            raise self._missing(name, id) from None
        if not group or self._order is not None or self._keep:
            self._forget(name, [id])
        return fd

    def take_socket(self, name: str, id: int = 0, *, blocking: bool = True) -> socket.socket:
        """Return the descriptor under (name, id) as a socket, which the caller owns.

        O_NONBLOCK belongs to the open file, and a former process may have changed the flag: the
        socket becomes blocking, or not, as `blocking` says. Raises MissingKey; InvalidInput for
        anything but a socket, which stays."""
        from cprd.state.sockets import as_socket

        fd = self.take_fd(name, id)
        try:
            return as_socket(name, id, fd, blocking)
        except InvalidInput:
            self._append(name, {id: fd})
            raise

    def delete_fd(self, name: str, id: int = 0) -> None:
        """Forget (name, id), and close an owned descriptor. An absent key is no error."""
        owned = self._owned
        fd = self.take_fd(name, id, default=-1)
        if fd >= 0 and owned:
            os.close(fd)

    # Many at once

    def save_fds(
        self, name: str, fds: Mapping[int, int | HasFileno] | Iterable[tuple[int, int | HasFileno]]
    ) -> None:
        """Add many descriptors under one name: a mapping of ids, or pairs (id, fd).

        As save_fd for each, in one step: an error adds nothing. 10,000 numbers take 0.4 ms, sockets
        1 ms."""
        new, ids = _checked(name, fds)
        # The columns that the checks make serve save(); never made anew for few more keys.
        before = None if self._owned or self.fd_count > len(new) else self.columns()
        names = self._names if self._folded is None else self._unfold()
        group = names.get(name) if isinstance(name, str) else None
        if group is None:
            _check_name(name)
        elif not group.keys().isdisjoint(new):
            raise _used(name, next(id for id in new if id in group))
        numbers, column = _numbers(name, new)
        if self._owned:
            numbers = _copies(name, numbers)
            self._asked.update((name, id) for id in numbers)
        elif numbers is not new:
            self._keep.setdefault(name, {}).update(new)
        if numbers:
            self._append(name, numbers)
            if before is not None:
                joined = _repeated(name, len(numbers))
                if before[0]:
                    joined = before[0] + b"\0" + joined
                    ids, column = before[1] + ids, before[2] + column
                self._folded = joined, ids, column

    def take_fds(self, name: str) -> dict[int, int]:
        """Return all descriptors of one name by id, in order; the caller owns each from now on.

        Empty when the name is absent."""
        if self._folded is not None:
            self._unfold()
        self._last = None
        group = self._names.pop(name, {})
        if group and (self._order is not None or self._keep):
            self._forget(name, group)
        return group

    def take_sockets(
        self,
        name: str,
        family: int | None = None,
        type: int | None = None,
        *,
        blocking: bool = True,
    ) -> dict[int, socket.socket]:
        """Return all descriptors of one name as sockets by id, in order; the caller owns each.

        With `family` and `type` (AF_INET, SOCK_STREAM) the first descriptor is checked, and the
        others are believed to be alike; else the kernel is asked about each. O_NONBLOCK belongs to
        the open file, and a former process may have changed the flag: each socket becomes blocking,
        or not, as `blocking` says. Empty when the name is absent.

        Raises InvalidInput for a descriptor that is no such socket; then nothing is taken."""
        from cprd.state.sockets import as_sockets

        names = self._names if self._folded is None else self._unfold()
        group = names.get(name)
        if not group:
            return {}
        made = as_sockets(name, group, family, type, blocking)
        self._forget(name, made)
        return made

    def fds(self, name: str | None = None) -> Iterator[tuple[str, int, int]]:
        """Iterate (name, id, fd) in the order of saving: of one name, or of all."""
        found = [(key, id, self._names[key][id]) for key, id in self._keys(name)]
        if self._owned:
            self._asked.update((key, id) for key, id, _ in found)
        return iter(found)

    @property
    def fd_count(self) -> int:
        """How many descriptors there are under keys; sections do not count."""
        if self._folded is not None:
            return len(self._folded[2])
        return sum(map(len, self._names.values()))

    # For what carries a state

    def columns(self) -> tuple[bytes, array[int], array[int]]:
        """The keys as they travel: names joined by NUL, ids, descriptors. Not to be changed."""
        if self._folded is not None:
            return self._folded
        if self._order is not None:
            keys = self._keys()
            fds = [self._names[name][id] for name, id in keys]
            names = "\0".join([name for name, _ in keys])
            return _bytes(names), _column([id for _, id in keys], len(keys)), _column(fds, len(fds))
        groups = self._names
        if len(groups) == self.fd_count:
            joined = _bytes("\0".join(groups))
        else:
            joined = b"\0".join([_repeated(name, len(ids)) for name, ids in groups.items()])
        ids = chain.from_iterable(groups.values())
        numbers = chain.from_iterable(map(dict.values, groups.values()))
        return joined, _column(ids, self.fd_count), _column(numbers, self.fd_count)

    def has_any(self, numbers: set[int]) -> bool:
        """Whether a descriptor under some key has one of these numbers."""
        if self._folded is not None and not self._names:
            return not numbers.isdisjoint(self._folded[2])
        return not all(map(numbers.isdisjoint, map(dict.values, self._names.values())))

    # Within

    def _keys(self, name: str | None = None) -> list[tuple[str, int]]:
        """The keys in order: of one name, or of all."""
        names = self._names if self._folded is None else self._unfold()
        if name is not None:
            return [*zip(repeat(name), names.get(name, ()))]
        if self._order is None:
            return [key for name, group in names.items() for key in zip(repeat(name), group)]
        return [(name, id) for name, id in self._order if id in names.get(name, ())]

    def _append(self, name: str, new: dict[int, int]) -> None:
        """Add keys of one name, which are not in use, behind all others."""
        names, group = self._names, self._names.get(name)
        if self._order is None and group is not None and next(reversed(names)) != name:
            self._order = dict.fromkeys(self._keys())
        self._last = None  # until this is done
        if self._order is not None:
            for id in new:  # an interrupt may have left a key that was not added after all
                self._order.pop((name, id), None)
            self._order.update(dict.fromkeys(zip(repeat(name), new)))
        if group is None:
            names[name] = group = new
        else:
            group.update(new)
        if self._order is None:
            self._last = group

    def _forget(self, name: str, ids: Iterable[int]) -> None:
        """Forget what else is known of keys that are gone."""
        if self._order is not None:
            for id in ids:
                self._order.pop((name, id), None)
        kept = self._keep.get(name)
        if kept is not None:
            for id in ids:
                kept.pop(id, None)
            if not kept:
                del self._keep[name]
        if not self._names.get(name, True):
            del self._names[name]
        if not self._names:
            self._order = None

    def _missing(self, name: str, id: int) -> MissingKey:
        group = self._names.get(name) if isinstance(name, str) else None
        if group:
            ids = [*group]
            some = f"{ids[:5]}"[1:-1] + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
            return MissingKey(f"no descriptor under ({name!r}, {id!r}): {name!r} has ids {some}")
        some = ", ".join(map(repr, [*self._names][:5])) or "none"
        return MissingKey(f"no descriptor under ({name!r}, {id!r}): the names are {some}")

    def _adopt(self, names: bytes, ids: array[int], fds: array[int]) -> None:
        """Become the owner of `fds`; `names` joined by NUL, and an id each."""
        self._owned = True
        self._folded = (names, ids, fds)

    def _unfold(self) -> dict[str, dict[int, int]]:
        """Have dicts alone; raises Damaged for two descriptors of a bundle under one key."""
        assert self._folded is not None
        if self._names:  # by save_fds, which keeps both
            self._folded = None
            return self._names
        joined, ids, fds = self._folded
        names, mixed = _by_name(joined, ids, fds)
        if sum(map(len, names.values())) != len(fds):
            raise Damaged("two descriptors of the bundle have the same key")
        if mixed:
            texts = joined.decode("utf-8", "surrogateescape").split("\0")
            self._order = dict.fromkeys(zip(texts, ids, strict=True))
        # Nobody looks at `_names` before `_folded` is gone.
        self._names = names
        self._folded = None
        return names


def _by_name(
    joined: bytes, ids: array[int], fds: array[int]
) -> tuple[dict[str, dict[int, int]], bool]:
    """Ids and descriptors by name; whether the keys of some name do not lie in a row."""
    count = len(fds)
    names: dict[str, dict[int, int]] = {}
    if not count:
        return names, False
    # A server's state has some keys, and then a name with many: nothing is taken apart for those.
    last, first, _ = tail(joined)
    head = joined[: len(joined) - (len(last) + 1) * (count - first)]
    texts = head.decode("utf-8", "surrogateescape").split("\0") if first else []
    before, mixed = "", False
    for name, id, fd in zip(texts, ids[:first], fds[:first], strict=True):
        group = names.get(name)
        if group is None:
            names[name] = {id: fd}
        else:
            mixed = mixed or name != before
            group[id] = fd
        before = name
    name = last.decode("utf-8", "surrogateescape")
    if first:
        ids, fds = ids[first:], fds[first:]
    many = dict(zip(ids, fds, strict=True))
    if name not in names:
        names[name] = many
    elif names[name].keys().isdisjoint(many):
        names[name].update(many)
        mixed = True
    return names, mixed


def tail(joined: bytes) -> tuple[bytes, int, int]:
    """The last name; how many names come before the first of those that end `joined` and are all
    like the last; how many these are (1 where the last name also stands before another)."""
    last = joined.rpartition(b"\0")[2]
    one, whole = last + b"\0", joined + b"\0"
    at = 0 if whole.startswith(one) else whole.find(b"\0" + one) + 1
    times, rest = divmod(len(whole) - at, len(one))
    if rest or whole[at:] != one * times:
        at, times = len(whole) - len(one), 1
    return last, whole.count(b"\0", 0, at), times


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _repeated(name: str, times: int) -> bytes:
    """A name `times` times, joined by NUL."""
    return ((_bytes(name) + b"\0") * times)[:-1]


def _column(numbers: Iterable[int], count: int) -> array[int]:
    return array("i", struct.pack(f"{count}i", *numbers))


def _checked(
    name: str, fds: Mapping[int, int | HasFileno] | Iterable[tuple[int, int | HasFileno]]
) -> tuple[dict[int, int | HasFileno], array[int]]:
    """The pairs as a dict of our own, and the ids. Raises InvalidInput."""
    try:
        if isinstance(fds, Mapping):
            new = dict(fds)
        else:
            pairs = [*fds]
            new = dict(pairs)
            if len(new) != len(pairs):
                twice = next(id for n, (id, _) in enumerate(pairs) if id in dict(pairs[:n]))
                raise _used(name, twice)
    except InvalidInput:
        raise
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{name!r}: wants ids with their descriptors: {error}") from None
    try:
        return new, _column(new, len(new))
    except struct.error:
        for id in new:
            if not -_I32 <= _index(name, id) < _I32:
                raise _refused(name, id, 0) from None
        raise


def _numbers(name: str, new: dict[int, int | HasFileno]) -> tuple[dict[int, int], array[int]]:
    """The numbers of the descriptors, by id, and alone: `new` itself where all are numbers."""
    column = _open_column(new)
    if column is not None:
        return new, column  # type: ignore[return-value]
    sockets = sys.modules.get("socket")
    if sockets is not None and {*map(type, new.values())} == {sockets.socket}:
        # None speaks TLS: those are of another class. A third of the time of number_of.
        numbers = dict(zip(new, map(sockets.socket.fileno, new.values()), strict=True))
    else:
        numbers = {id: fd if isinstance(fd, int) else number_of(fd) for id, fd in new.items()}
    column = _open_column(numbers)
    if column is None:
        raise next(
            _refused(name, id, number) for id, number in numbers.items() if not 0 <= number < _I32
        )
    return numbers, column


def _open_column(numbers: dict[int, Any]) -> array[int] | None:
    """The numbers alone; None unless all may be numbers of open descriptors."""
    try:
        column = _column(numbers.values(), len(numbers))
    except (TypeError, struct.error):
        return None
    return column if column.tobytes()[_HIGHEST::4].isascii() else None  # none is negative


def _copies(name: str, numbers: dict[int, int]) -> dict[int, int]:
    """A copy of each descriptor, which the caller owns. Raises as duplicate(), with none left."""
    copies: dict[int, int] = {}
    try:
        for id, fd in numbers.items():
            copies[id] = duplicate(fd, f"({name!r}, {id})")
    except BaseException:
        close_all(copies.values())
        raise
    return copies


def _check_name(name: str) -> None:
    try:
        if name.isascii() and "\0" not in name and 0 < len(name) < 256:
            return
        encoded = name.encode("utf-8", "surrogateescape")
    except (AttributeError, TypeError, UnicodeEncodeError):
        raise InvalidInput(f"key with the name {name!r:.300}: wants a str") from None
    if not 0 < len(encoded) < 256 or b"\0" in encoded:
        raise InvalidInput(f"name {name!r}: wants 1 to 255 bytes without NUL")


def _index(name: str, id: object) -> int:
    try:
        return int(operator.index(id))  # type: ignore[arg-type]
    except TypeError:
        raise InvalidInput(f"key ({name!r}, {id!r:.300}): wants a str and an int") from None


def _used(name: str, id: int) -> InvalidInput:
    return InvalidInput(f"key ({name!r}, {id}) is used already: delete_fd() it first")


def _refused(name: str, id: int, number: int) -> InvalidInput:
    if not -_I32 <= id < _I32:
        return InvalidInput(f"id {id!r} of {name!r}: wants a signed 32 bit integer")
    return InvalidInput(f"fd {number} of ({name!r}, {id}) is not an open descriptor")


def number_of(thing: object) -> int:
    """The number of a descriptor, from a number or an object with fileno(). Raises InvalidInput,
    for an ssl.SSLSocket and the socket of an asyncio TLS transport as well."""
    if isinstance(thing, int):
        return int(thing)
    if _speaks_tls(thing):
        raise InvalidInput(
            f"{thing!r:.100} speaks TLS and cannot be handed over: the keys are in the memory of"
            " this process. Save the listener, and let clients connect anew; or end TLS in a proxy"
            " that does not restart; or unwrap() it first, where the protocol can go on without TLS"
        )
    try:
        return int(operator.index(thing.fileno()))  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError, OSError) as error:
        raise InvalidInput(f"{thing!r:.300} has no descriptor: {error}") from None


def _speaks_tls(thing: Any) -> bool:
    ssl = sys.modules.get("ssl")
    if ssl is None:
        return False
    if isinstance(thing, ssl.SSLSocket):
        return True
    asyncio = sys.modules.get("asyncio")
    if asyncio is None or type(thing).__name__ != "TransportSocket":
        return False
    try:  # the socket knows nothing of TLS, and of all objects the loop alone knows the transport
        transport = asyncio.get_running_loop()._transports.get(thing.fileno())
    except (AttributeError, RuntimeError):
        return False
    tls = asyncio.sslproto.SSLProtocol
    return transport is not None and isinstance(transport.get_protocol(), tls)


def open_descriptor(what: str, thing: int | HasFileno) -> int:
    """The number of an open descriptor, still its owner's. Raises InvalidInput."""
    fd = number_of(thing)
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except (OSError, ValueError, OverflowError):
        raise InvalidInput(f"{what}: {fd} is not an open descriptor") from None
    return fd


def duplicate(fd: int, what: str) -> int:
    """Copy a descriptor; the caller owns the copy. Raises InvalidInput, LimitExceeded."""
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
    except OSError as error:
        if error.errno == EBADF:
            raise InvalidInput(f"fd {fd} of {what} is not an open descriptor") from None
        raise none_left(f"for a copy of {what}", error) from None

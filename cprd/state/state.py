"""A state, left by a predecessor and found by a successor.

bundle/ packs and unpacks states: nothing here knows how states travel.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator, MutableMapping
from itertools import chain

from cprd.errors import InvalidInput, MissingKey
from cprd.linux.memfd import check_seals, sealed_memfd
from cprd.linux.rights import close_all
from cprd.state.descriptors import Descriptors, duplicate, number_of
from cprd.state.sections import (
    InlineSection,
    MemfdSection,
    Section,
    Value,
    check_section_key,
    close_section,
    decode,
    encode,
)

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from cprd.state.descriptors import HasFileno


class State(Descriptors, MutableMapping[str, "Any"]):
    """Descriptors under keys (name, id), in order, and named sections: a mapping like any other.

    A section is a msgpack value, or bytes and other buffers. A loaded state gives bytes back as a
    read-only memoryview, valid until the claim is closed, and tuples as lists. Values are encoded
    when the state is saved, with all changes until then.

    After close(), or the end of the claim, every use raises InvalidInput."""

    __slots__ = ("_sections",)

    def __init__(self) -> None:
        super().__init__()
        self._sections: dict[str, Section] = {}

    def __getitem__(self, key: str) -> Any:
        section = self._section(key)
        self._asked.add(key)
        if isinstance(section, Value):
            return section.value
        data = section.view() if isinstance(section, MemfdSection) else memoryview(section.data)
        if not section.packed:
            return data
        value = decode(key, data)
        self._sections[key] = Value(value, section)
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        check_section_key(key)
        old = self._sections.get(key)
        if isinstance(old, MemfdSection) and old.is_view(value):
            return  # it was got from here, and would end with what it replaces
        encode(key, value)  # only to refuse now what cannot be saved later
        self._asked.add(key)
        self._sections[key] = Value(value)
        close_section(old)

    def __contains__(self, key: object) -> bool:
        return key in self._sections

    def __delitem__(self, key: str) -> None:
        self._section(key)
        close_section(self._sections.pop(key))

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
        """Add a section that already is a sealed memfd, not copied.

        The memfd is borrowed until save returns. Raises InvalidInput unless the memfd carries the
        seals SEAL, SHRINK, GROW and WRITE."""
        check_section_key(key)
        number = number_of(memfd)
        check_seals(key, number)
        if self._owned:
            number = duplicate(number, f"section {key!r}")
        keep = None if isinstance(memfd, int) else memfd
        old = self._sections.get(key)
        self._asked.add(key)
        self._sections[key] = MemfdSection(number, packed=False, owned=self._owned, keep=keep)
        close_section(old)

    def section_fd(self, key: str) -> int:
        """Return a section as a sealed memfd, owned by the state, at its beginning.

        The position belongs to the open file, so each call sets 0. Copies an inline section into a
        new memfd first. Raises MissingKey."""
        found = section = self._section(key)
        self._asked.add(key)
        if isinstance(section, Value):
            section = section.stored or encode(key, section.value)
        if isinstance(section, InlineSection):
            fd = sealed_memfd(f"section.{key}", [section.data])
            section = MemfdSection(fd, packed=section.packed, owned=True)
            if isinstance(found, Value) and section.packed:  # the value may still be changed
                self._sections[key] = Value(found.value, section)
            else:
                self._sections[key] = section
        os.lseek(section.fd, 0, os.SEEK_SET)
        return section.fd

    @property
    def closed(self) -> bool:
        """Whether close() was called, or the claim is over."""
        return False

    def untaken(self) -> list[tuple[str, int] | str]:
        """Keys of a loaded state that the program never asked for: (name, id) of descriptors in
        order, then sections. Empty for a state that the program built."""
        if not self._owned:
            return []
        every: chain[tuple[str, int] | str] = chain(self._keys(), self._sections)
        return [key for key in every if key not in self._asked]

    def close(self) -> None:
        """Close all that the state owns: untaken descriptors, mapped sections. Safe to repeat.

        A borrowed descriptor stays open."""
        fds: Iterable[int] = ()
        if self._owned:
            mine = map(dict.values, self._names.values())
            fds = self._folded[2] if self._folded is not None else [*chain.from_iterable(mine)]
        sections = [*self._sections.values()]
        # Closed first: what is interrupted and repeated may not close a number twice.
        self.__class__ = _Closed
        self._keep.clear()
        close_all(fds)
        for section in sections:
            close_section(section)

    # For what carries a state

    @classmethod
    def owning(
        cls,
        names: bytes,
        ids: array[int],
        fds: array[int],
        sections: dict[str, InlineSection | MemfdSection],
    ) -> State:
        """The state that a bundle held, which owns `fds`: `names` joined by NUL, an id and a
        descriptor each."""
        state = cls()
        state._sections.update(sections)
        state._adopt(names, ids, fds)
        return state

    def sections(self) -> Iterator[tuple[str, InlineSection | MemfdSection]]:
        """Iterate the sections as they travel, still the state's. Raises InvalidInput."""
        for key, section in self._sections.items():
            yield key, encode(key, section.value) if isinstance(section, Value) else section

    def forget_asked(self) -> None:
        """Nobody has asked for any key yet."""
        self._asked.clear()

    def take_sections(self) -> dict[str, InlineSection | MemfdSection]:
        """All sections as they came; the caller owns each from now on."""
        taken = dict(self.sections())
        self._sections.clear()
        return taken

    def _section(self, key: str) -> Section:
        try:
            return self._sections[key]
        except KeyError:
            some = ", ".join(map(repr, self._sections)) or "none"
            raise MissingKey(f"no section {key!r}: the sections are {some:.300}") from None


class _Closed(State):
    """A state after close()."""

    __slots__ = ()

    @property
    def closed(self) -> bool:
        return True

    def close(self) -> None:
        pass

    def __repr__(self) -> str:
        return "<cprd.State: closed>"


def _over(self: State, *_: object, **__: object) -> NoReturn:
    raise InvalidInput(
        "this state is closed (its claim is over, or close() was called): take what you need inside"
        " the block of the claim"
    )


for _verb in (
    *("save_fd", "find_fd", "take_fd", "delete_fd", "save_fds", "take_fds", "take_sockets", "fds"),
    *("take_socket", "take_sections", "forget_asked"),
    *(
        "columns",
        "has_any",
        "__getitem__",
        "__setitem__",
        "__contains__",
        "__delitem__",
        "__iter__",
    ),
    *("__len__", "save_section_fd", "section_fd", "untaken", "sections"),
):
    setattr(_Closed, _verb, _over)
_Closed.fd_count = property(_over)  # type: ignore[assignment, method-assign]

"""How the keys of a state are written in LISTEN_FDNAMES.

`NAME` for id 0 and `NAME.ID` for another; sections follow as `section.KEY`. Names are joined by
':', so ':' is written %3A, and so is '%' itself and every byte that is not printable ASCII. A dot
is written %2E where it would be misread: `a.1` with id 0 is `a%2E1`, for `a.1` is id 1 of `a`; a
descriptor called `section.x` is `section%2Ex`. So every name says one thing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cprd.errors import LimitExceeded
from cprd.linux.listen_fds import MAX_NAMES

if TYPE_CHECKING:
    from collections.abc import Iterable

VARIABLE = "LISTEN_FDNAMES"
_PLAIN = frozenset(range(0x20, 0x7F)) - frozenset(b":%")


def fd_name(name: str, id: int) -> str:
    """The key (name, id) as one name of LISTEN_FDNAMES."""
    text = _escape(name)
    if id:
        return f"{text}.{id}" if not text.startswith("section.") else f"{_hide_dot(text)}.{id}"
    last = text.rpartition(".")[2]
    if text.startswith("section.") or (last != text and _is_number(last)):
        return _hide_dot(text)
    return text


def section_name(key: str) -> str:
    """The section `key` as one name of LISTEN_FDNAMES."""
    return f"section.{_escape(key)}"


def parse(text: str) -> tuple[str, int] | str:
    """One name of LISTEN_FDNAMES back: (name, id) of a descriptor, or the key of a section."""
    if text.startswith("section."):
        return _unescape(text.removeprefix("section."))
    name, dot, last = text.rpartition(".")
    if dot and _is_number(last):
        return _unescape(name), int(last)
    return _unescape(text), 0


def listen_fdnames(keys: Iterable[tuple[str, int]], sections: Iterable[str]) -> str:
    """The value of LISTEN_FDNAMES. Raises LimitExceeded when one variable cannot hold it."""
    names = [fd_name(name, id) for name, id in keys] + [section_name(key) for key in sections]
    value = ":".join(names)
    needed = len(VARIABLE) + 1 + len(value) + 1
    if needed > MAX_NAMES:
        raise LimitExceeded(
            f"{VARIABLE} for {len(names)} names would take {needed} bytes, and Linux allows"
            f" {MAX_NAMES} in one variable: use shorter keys, or load with `import cprd` instead of"
            " cprctl"
        )
    return value


def _escape(name: str) -> str:
    data = name.encode("utf-8", "surrogateescape")
    return "".join(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in data)


def _unescape(text: str) -> str:
    first, *parts = text.split("%")
    data = first.encode() + b"".join(bytes([int(p[:2], 16)]) + p[2:].encode() for p in parts)
    return data.decode("utf-8", "surrogateescape")


def _is_number(text: str) -> bool:
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdigit()


def _hide_dot(text: str) -> str:
    """`text` with the dot that would be misread written as %2E: the first one of section.X, else
    the last."""
    if text.startswith("section."):
        return "section%2E" + _hide_last(text.removeprefix("section."))
    return _hide_last(text)


def _hide_last(text: str) -> str:
    head, dot, last = text.rpartition(".")
    return f"{head}%2E{last}" if dot and _is_number(last) else text

"""Rows for people: a table on a terminal, plain columns that cut nothing off into a pipe, and where
the package rich is missing."""

from __future__ import annotations

import sys
from math import isfinite
from typing import TYPE_CHECKING

from cprd.linux.stdio import printable, say

if TYPE_CHECKING:
    from collections.abc import Sequence


def show_rows(heads: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> None:
    """Print `rows` under `heads`; the columns numbered in `right` are set flush right."""
    cells = [[printable(cell) for cell in row] for row in rows]
    if not (sys.stdout.isatty() and _table(heads, cells, right)):
        say(*columns(heads, cells, right))


def columns(heads: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    """Lines with columns two blanks apart, as wide as their widest cell."""
    everything = [heads, *rows]
    widths = [max(len(row[i]) for row in everything) for i in range(len(heads))]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in everything
    ]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> bool:
    """Print a table; False, with nothing printed, where the package rich is missing."""
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError:
        return False

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)
    return True


def seconds(value: object) -> str:
    """A time span for people: 0.4 s, 12 s, 3 min, 5 h, 2 d; "-" for None."""
    if not isinstance(value, int | float):
        return "-"
    if value < 10:
        return f"{value:.1f} s"
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if value < limit:
            return f"{value / unit:.0f} {name}"
    return f"{value / 86400:.0f} d"


def print_json(value: object) -> None:
    """One JSON document; bytes (in sections) are written as text with \\xNN for what is none, and
    as text whatever else JSON has no form for."""
    import json

    say(*json.dumps(_plain(value), indent=2, ensure_ascii=True).split("\n"))


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {
            key if isinstance(key, str | int | float | None) else str(_plain(key)): _plain(each)
            for key, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).decode("utf-8", "backslashreplace")
    known = isinstance(value, str | int | None) or (isinstance(value, float) and isfinite(value))
    return value if known else str(value)

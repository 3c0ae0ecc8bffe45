"""cprctl status: the daemon itself, its limits and how much of them is used."""

from __future__ import annotations

import argparse

from cprd.cli.arguments import connect
from cprd.cli.table import print_json, seconds
from cprd.linux.stdio import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one object, for programs")


def run(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        status = daemon.status()
    if args.json:
        print_json(status)
        return 0
    lines = list(_lines("", status))
    width = max((len(key) for key, _ in lines), default=0)
    for key, value in lines:
        say(f"{key.ljust(width)}  {value}")
    return 0


def _lines(prefix: str, value: object) -> list[tuple[str, str]]:
    """A nested value as (dotted key, text), one a line."""
    if isinstance(value, dict):
        deeper = [_lines(f"{prefix}.{key}".lstrip("."), value[key]) for key in value]
        return [line for lines in deeper for line in lines]
    if isinstance(value, list | tuple):
        return [line for i, item in enumerate(value) for line in _lines(f"{prefix}.{i}", item)]
    if prefix == "uptime":
        return [(prefix, seconds(value))]
    return [(prefix, "-" if value is None else str(value))]

"""cprctl show: what one hold consists of, looked at without taking it."""

from __future__ import annotations

import argparse
from typing import Any

from cprd.cli.arguments import add_name
from cprd.cli.load import look_at
from cprd.cli.table import print_json, seconds, show_rows
from cprd.linux.describe import size
from cprd.linux.stdio import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_name(parser)
    parser.add_argument("--json", action="store_true", help="one object, for programs")


def run(args: argparse.Namespace) -> int:
    hold = look_at(args)()
    if args.json:
        print_json(hold)
    else:
        _print(hold)
    return 0


def _print(hold: dict[str, Any]) -> None:
    facts = [f"generation {hold.get('generation')}", str(hold.get("phase"))]
    facts += [f"uid {hold.get('uid')}", f"{hold.get('fds')} fds", f"age {seconds(hold.get('age'))}"]
    if hold.get("expires") is not None:
        facts.append(f"expires in {seconds(hold['expires'])}")
    if hold.get("segments"):
        facts.append(f"{hold['segments']} segments")
    if hold.get("last_end"):
        facts.append(f"the last owner: {hold['last_end']}")
    if hold.get("attempts"):
        facts.append(f"{hold['attempts']} attempts")
    say(f"{hold.get('name')}: {', '.join(facts)}")
    if hold.get("reason"):
        say(f"reason: {hold['reason']}")
    if hold.get("descriptors"):
        rows = [[d["name"], str(d["id"]), d["what"]] for d in hold["descriptors"]]
        say("")
        show_rows(("descriptor", "id", "what"), rows, right=(1,))
    if hold.get("sections"):
        rows = [
            [s["key"], str(s.get("kind", "")), size(int(s.get("bytes", 0))), _shortened(s)]
            for s in hold["sections"]
        ]
        say("")
        show_rows(("section", "kind", "size", "value"), rows, right=(2,))


def _shortened(section: dict[str, Any]) -> str:
    text = repr(section["value"]) if "value" in section else ""
    return text if len(text) <= 60 else text[:57] + "..."

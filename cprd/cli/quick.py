"""The arguments of `cprctl qemu start` without argparse, which takes longer to import than all else
that the process needs before a guest can go on. Anything unusual is argparse's."""

from __future__ import annotations

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class Arguments:
    """What argparse would give."""

    action = "start"
    run: Callable[[Any], int]
    command: list[str] | None
    stand_ins: frozenset[int]

    def __init__(self) -> None:
        self.socket: str | None = None
        self.owner: str | None = None
        self.user = False
        self.name = ""
        self.cold = self.force = self.other_images = self.force_machine = False
        self.set_time = ""
        self.timeout = 60.0


_FLAGS = {
    "--cold": "cold",
    "--force": "force",
    "--other-images": "other_images",
    "--force-machine": "force_machine",
}


def start_arguments(words: list[str]) -> Arguments | None:
    """The arguments in the words before `--`; None for other verbs, and for what only argparse
    explains."""
    args = Arguments()
    rest = list(words)
    while rest[:1] and rest[0] != "qemu":
        word = rest.pop(0)
        if word == "--user":
            args.user = True
        elif word == "--socket" and rest:
            args.socket = rest.pop(0)
        else:
            return None
    if rest[:2] != ["qemu", "start"]:
        return None
    for word in rest[2:]:
        if word in _FLAGS:
            setattr(args, _FLAGS[word], True)
        elif word.startswith("-") or args.name or not word:
            return None
        else:
            args.name = word
    return args if args.name and not (args.cold and args.force) else None

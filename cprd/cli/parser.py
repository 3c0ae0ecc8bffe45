"""The parser of cprctl's arguments: that of the verb in question, and the names of all others."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any, NoReturn

VERBS = {
    "list": "what is held",
    "show": "what one hold consists of",
    "save": "hold descriptors that the shell has open",
    "load": "take what is held, and become a command that goes on with it",
    "run": "start a service: with what is held, or cold",
    "wait": "wait until a hold can be loaded",
    "drop": "end a hold and let go of what it holds",
    "release": "serve again what is in doubt",
    "check-bundle": "all that is wrong with a bundle, for people who write clients",
    "status": "the daemon: limits, and how much of them is used",
    "demo": "restart a server under load again and again, and watch nobody notice",
    "qemu": "hand a running guest from one QEMU to the next",
}


class Unknown(Exception):
    """Words that a parser has no use for: (the parser, what it did understand, those words)."""

    def __init__(
        self, parser: argparse.ArgumentParser, found: argparse.Namespace, extra: list[str]
    ) -> None:
        super().__init__()
        self.parser = parser
        self.found = found
        self.extra = extra

    def refuse(self, words: list[str], *, has_command: bool) -> NoReturn:
        """Say so, under the usage of the verb that they were given to, and exit with 2."""
        first = self.extra[0]
        wants = self.parser.get_default("takes_command") and not has_command
        if wants and not first.startswith("-"):
            import shlex

            cut = words.index(first, words.index(self.found.name) + 1)
            line = f"{shlex.join(words[:cut])} -- {shlex.join(words[cut:])}"
            self.parser.error(f"put the command after --: cprctl {line}")
        self.parser.error(f"unrecognized arguments: {' '.join(self.extra)}")


class _Parser(argparse.ArgumentParser):
    """Knows itself what is too much. Argparse leaves that to the parser above all verbs, whose
    usage tells nobody anything."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, extra = super().parse_known_args(args, namespace)
        if extra:
            raise Unknown(self, found, extra)
        return found, extra


def parser_of(chosen: str) -> argparse.ArgumentParser:
    from cprd.protocol.messages import RELEASE

    parser: argparse.ArgumentParser = _Parser(
        prog="cprctl",
        description="Look at and use what cprd holds.",
        epilog="Exit status: 0 done, 1 it failed, 2 usage, 3 nothing held under that name, 4 busy.",
    )
    parser.add_argument(
        "--socket", metavar="PATH", help="the daemon's socket (default: $CPRD_SOCKET)"
    )
    parser.add_argument(
        "--user", action="store_true", help="default to $XDG_RUNTIME_DIR/cprd/cprd.sock"
    )
    parser.add_argument("--version", action="version", version=f"cprctl {RELEASE}")
    verbs = parser.add_subparsers(metavar="COMMAND", dest="verb", required=True)
    for name, summary in VERBS.items():
        if name != chosen:
            verbs.add_parser(name, help=summary, add_help=False)
            continue
        module = import_module(f"cprd.cli.{name.replace('-', '_')}")
        verb = verbs.add_parser(name, help=summary, description=module.__doc__)
        verb.set_defaults(run=module.run)
        module.add_arguments(verb)
    return parser

"""cprctl: one file a verb, and only the file of the verb that is asked for is imported.

A verb's file has `add_parser(verbs)`, which adds its arguments and sets `run`, a function from the
parsed arguments to an exit status: 0 done, 1 it failed (one line on stderr says why and what to
do), 2 usage, 3 nothing held under that name, 4 busy.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

from cprd.errors import Busy, CprdError, InvalidInput, NotHeld
from cprd.linux.stdio import note, stand_in

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]

VERBS = {
    "list": "what is held",
    "show": "what one hold consists of",
    "save": "hold descriptors that the shell has open",
    "load": "take what is held, and become a command that goes on with it",
    "run": "start a service: with what is held, or cold",
    "wait": "wait until a hold can be loaded",
    "drop": "end a hold and let go of what it holds",
    "release": "serve again what is in doubt",
    "status": "the daemon: limits, and how much of them is used",
    "demo": "restart a server under load again and again, and watch nobody notice",
    "qemu": "hand a running guest from one QEMU to the next",
}
_TAKES_COMMAND = {"load", "run", "qemu"}  # what follows "--" is theirs, whatever it looks like


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status. `load` and `run` do not return when all goes well."""
    stand_ins = stand_in()
    words = list(sys.argv[1:] if argv is None else argv)
    verb = _verb(words)
    command: list[str] | None = None
    if verb in _TAKES_COMMAND and "--" in words:
        cut = words.index("--")
        words, command = words[:cut], words[cut + 1 :]
    if verb == "save":  # --after-exit takes a value only after '=', argparse would take NAME
        words = ["--after-exit=" if word == "--after-exit" else word for word in words]
    try:
        args = _parser(verb).parse_args(words)
    except _Unknown as unknown:
        unknown.refuse(words, has_command=command is not None)
    args.command = command
    args.stand_ins = stand_ins
    try:
        if getattr(args, "owner", None) is not None and "name" in args:
            from cprd.cli.owner import full_name

            args.name = full_name(args.name, args.owner)
        status = int(args.run(args))
        sys.stdout.flush()
    except CprdError as error:
        return fail(str(error), exit_status(error))
    except BrokenPipeError:
        _forget_stdout()
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return fail(f"{where}{error.strerror or error}", 1)
    except KeyboardInterrupt:
        return 130
    return status


def exit_status(error: CprdError) -> int:
    """The exit status that tells scripts which kind of error it was."""
    if isinstance(error, NotHeld):
        return 3
    if isinstance(error, Busy):
        return 4
    return 2 if isinstance(error, InvalidInput) else 1


def fail(why: str, status: int) -> int:
    """Say why on one line of stderr; returns `status`."""
    note(f"cprctl: {' '.join(why.split())}")
    return status


def _verb(words: list[str]) -> str:
    """The verb among `words`, "" when there is none: the first one that is no option of cprctl."""
    rest = iter(words)
    for word in rest:
        if word == "--socket":
            next(rest, "")
        elif not word.startswith("-"):
            return word
    return ""


class _Unknown(Exception):
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
            raise _Unknown(self, found, extra)
        return found, extra


def _parser(chosen: str) -> argparse.ArgumentParser:
    from cprd import __version__

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
    parser.add_argument("--version", action="version", version=f"cprctl {__version__}")
    verbs = parser.add_subparsers(metavar="COMMAND", dest="verb", required=True)
    for name, summary in VERBS.items():
        if name == chosen:
            _module(name).add_parser(verbs)
        else:
            verbs.add_parser(name, help=summary, add_help=False)
    return parser


class _Verb:
    """The shape of a verb's module."""

    add_parser: Callable[[Verbs], None]


def _module(name: str) -> _Verb:
    return import_module(f"cprd.cli.{name}")  # type: ignore[return-value]


def _forget_stdout() -> None:
    """Whoever read our output is gone: let the interpreter's last flush go nowhere."""
    import os

    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)

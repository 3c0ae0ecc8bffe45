"""cprctl: one file a verb, and only the file of the verb that is asked for is imported.

A verb's file has a docstring (the description in --help), `add_arguments(parser)`, and `run`, a
function from the parsed arguments to an exit status: 0 done, 1 failed (one line on stderr says why
and what to do), 2 usage, 3 nothing held under that name, 4 busy.
"""

from __future__ import annotations

import gc
import os
import sys

from cprd.cli.quick import start_arguments
from cprd.errors import Busy, CprdError, InvalidInput, NotHeld
from cprd.linux.stdio import flush, note, stand_in

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

_TAKES_COMMAND = {"load", "run", "qemu"}  # what follows "--" is theirs, whatever it looks like


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status. `load` and `run` do not return when all goes well. Called
    without arguments, as the program, nothing returns: to take the interpreter apart takes longer
    than a save, and the unit that starts the next QEMU waits."""
    gc.disable()  # a tenth of the time of all imports; see _arguments
    status = _main(argv)
    if argv is None:
        flush()
        os._exit(status)
    return status


def _main(argv: Sequence[str] | None) -> int:
    stand_ins = stand_in()
    words = list(sys.argv[1:] if argv is None else argv)
    verb = _verb(words)
    command: list[str] | None = None
    if verb in _TAKES_COMMAND and "--" in words:
        cut = words.index("--")
        words, command = words[:cut], words[cut + 1 :]
    if verb == "save":  # --after-exit takes a value only after '=', argparse would take NAME
        words = ["--after-exit=" if word == "--after-exit" else word for word in words]
    args = _arguments(verb, words, command)
    args.command = command
    args.stand_ins = stand_ins
    try:
        if getattr(args, "owner", None) is not None and "name" in args:
            from cprd.cli.arguments import full_name

            args.name = full_name(args.name, args.owner)
        status = int(args.run(args))
        sys.stdout.flush()
    except CprdError as error:
        return _fail(str(error), _exit_status(error))
    except BrokenPipeError:
        _forget_stdout()
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", 1)
    except KeyboardInterrupt:
        return 130
    return status


def _arguments(verb: str, words: list[str], command: list[str] | None) -> Any:
    if command is not None and (quick := start_arguments(words)) is not None:
        from cprd.cli.qemu import run

        quick.run = run
        return quick
    from cprd.cli.parser import Unknown, parser_of

    gc.enable()
    try:
        return parser_of(verb).parse_args(words)
    except Unknown as unknown:
        unknown.refuse(words, has_command=command is not None)


def _verb(words: list[str]) -> str:
    """The verb among `words`, "" when there is none: the first one that is no option of cprctl."""
    rest = iter(words)
    for word in rest:
        if word == "--socket":
            next(rest, "")
        elif not word.startswith("-"):
            return word
    return ""


def _exit_status(error: CprdError) -> int:
    if isinstance(error, NotHeld):
        return 3
    if isinstance(error, Busy):
        return 4
    return 2 if isinstance(error, InvalidInput) else 1


def _fail(why: str, status: int) -> int:
    """Say why on one line of stderr; returns `status`."""
    note(f"cprctl: {' '.join(why.split())}")
    return status


def _forget_stdout() -> None:
    """Whoever read our output is gone: let the interpreter's last flush go nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)

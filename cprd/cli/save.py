"""cprctl save: hold descriptors of the shell or of a running process, and files as sections.

With --pid the descriptors are duplicates: the process keeps the originals and notices nothing. The
hold is not served while PID lives, unless --after-exit names another process."""

from __future__ import annotations

import argparse
import fcntl
import os
import sys

from cprd import State
from cprd.cli.adopting import Process
from cprd.cli.arguments import SHORTEST, YEARS, add_name, connect, seconds
from cprd.errors import InvalidInput
from cprd.linux.memfd import SEALS
from cprd.linux.stdio import note, say

INLINE = 64 * 1024  # bytes; a larger file goes into a memfd of its own, in pieces


class _Help(argparse.HelpFormatter):
    """--after-exit[=PID] as it has to be written: argparse would put a blank before the bracket."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return super()._format_action_invocation(action).replace(" [=", "[=")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "cprctl save NAME [--pid PID] --fd KEY[:ID]=N ...|--listeners [--section KEY=FILE]"
        " [--replace] [--ttl S] [--after-exit[=PID]] [--owner USER]"
    )
    parser.epilog = (
        "Examples: exec 7<>/dev/tcp/127.0.0.1/80; cprctl save web --fd conn=7."
        " cprctl save redis --pid 4711 --listeners. Exit status 1 also when NAME is held already:"
        " --replace it, or drop it."
    )
    parser.formatter_class = _Help
    add_name(parser)
    parser.add_argument(
        "--fd",
        action="append",
        default=[],
        metavar="KEY[:ID]=N",
        help="descriptor N of the shell, or of PID",
    )
    parser.add_argument("--pid", type=int, metavar="PID", help="the process that has them open")
    parser.add_argument(
        "--listeners", action="store_true", help="all listening sockets of PID, as `listener`"
    )
    parser.add_argument(
        "--section", action="append", default=[], metavar="KEY=FILE", help="a file's content"
    )
    parser.add_argument("--replace", action="store_true", help="even when the name is held")
    parser.add_argument(
        "--ttl", type=seconds(YEARS, SHORTEST), metavar="S", help="let go of it after S seconds"
    )
    parser.add_argument(
        "--after-exit",
        nargs="?",
        const="",
        metavar="=PID",
        help="not to be loaded while PID lives (without =PID: the process that started cprctl)",
    )


def run(args: argparse.Namespace) -> int:
    process = _adopted(args)
    try:
        return _save(args, process)
    finally:
        if process is not None:
            process.close()


def _adopted(args: argparse.Namespace) -> Process | None:
    if args.pid is None:
        if args.listeners:
            raise InvalidInput("--listeners: of which process? --pid PID")
        return None
    if args.pid <= 0:
        raise InvalidInput(f"--pid {args.pid}: wants a process id")
    return Process(args.pid)


def _save(args: argparse.Namespace, process: Process | None) -> int:
    state, files = _state(args, process)
    if args.after_exit is None and process is not None:
        pidfd = os.dup(process.pidfd)
    else:
        pidfd = _process(args.after_exit)
    try:
        with connect(args) as daemon:
            saved = daemon.save(
                args.name,
                state,
                if_exists="replace" if args.replace else "error",
                ttl=args.ttl,
                after_exit=False if pidfd < 0 else pidfd,
            )
    finally:
        for fd in files if pidfd < 0 else [*files, pidfd]:
            os.close(fd)
    say(f"{args.name} is held: generation {saved.generation}, kept in {saved.kept}")
    return 0


def _state(args: argparse.Namespace, process: Process | None) -> tuple[State, list[int]]:
    """The state to save, and the memfds made for it, which the caller closes."""
    if not args.fd and not args.section and not args.listeners:
        raise InvalidInput("nothing to save: give --fd KEY[:ID]=N or --section KEY=FILE")
    state = State()
    for name, id, fd in process.listeners() if process is not None and args.listeners else ():
        state.save_fd(name, id, fd)
    for text in args.fd:
        name, id, fd = fd_argument(text)
        if process is None and fd in args.stand_ins:
            raise InvalidInput(f"--fd {text}: descriptor {fd} is not open")
        if state.find_fd(name, id) >= 0:
            given = f"{name}:{id}" if id else name
            apart = f"{name}:{id + 1}={fd}"
            raise InvalidInput(f"--fd {text}: {given} is given twice; tell them apart as {apart}")
        state.save_fd(name, id, fd if process is None else process.take(fd))
    files: list[int] = []
    for text in args.section:
        key, equals, path = text.partition("=")
        if not equals or not key or not path:
            raise InvalidInput(f"--section {text}: wants KEY=FILE")
        if key in state:
            raise InvalidInput(f"--section {text}: {key} is given twice")
        _section(state, key, path, files)
    return state, files


def fd_argument(text: str) -> tuple[str, int, int]:
    """KEY[:ID]=N as (name, id, descriptor). Raises InvalidInput."""
    key, equals, number = text.rpartition("=")
    if not equals or not key or not (number.isascii() and number.isdigit()):
        raise InvalidInput(f"--fd {text}: wants KEY[:ID]=N, with N the number of a descriptor")
    name, colon, id = key.rpartition(":")
    digits = id.removeprefix("-")
    if colon and name and digits.isascii() and digits.isdigit():
        return name, int(id), int(number)
    return key, 0, int(number)


def _section(state: State, key: str, path: str, files: list[int]) -> None:
    with open(sys.stdin.fileno() if path == "-" else path, "rb", closefd=path != "-") as file:
        head = file.read(INLINE + 1)
        if len(head) <= INLINE:
            state[key] = head
            return
        memfd = os.memfd_create(f"section.{key}"[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        files.append(memfd)
        while head:
            rest = memoryview(head)
            while rest:
                rest = rest[os.write(memfd, rest) :]
            head = file.read(1 << 20)
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, SEALS)
    state.save_section_fd(key, memfd)


def _process(after_exit: str | None) -> int:
    """A pidfd of the process that must be gone first, owned by the caller; -1 for none."""
    if after_exit is None:
        return -1
    if not after_exit:
        try:
            return os.pidfd_open(os.getppid())
        except OSError:
            raise InvalidInput(
                "--after-exit: the process that started cprctl cannot be seen (another pid"
                " namespace?): say which one is meant, --after-exit=PID"
            ) from None
    if not (after_exit.isascii() and after_exit.isdigit()) or not 0 < int(after_exit) < 1 << 31:
        raise InvalidInput(f"--after-exit={after_exit}: wants a process id")
    try:
        return os.pidfd_open(int(after_exit))
    except ProcessLookupError:
        note(f"cprctl: there is no process {after_exit} (any more): its end is not waited for")
        return -1
    except OSError:  # a thread's
        raise InvalidInput(f"--after-exit={after_exit}: is not the id of a process") from None

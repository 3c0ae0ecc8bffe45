"""Descriptors that the daemon finds at the start, and passes on to a re-execution.

Every descriptor has a name in LISTEN_FDNAMES. systemd passes listening sockets and stored shelves.
A re-execution passes the same, shelves without a store, foreign files still to be closed, and
releasers at work.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import NamedTuple

from cprd.daemon import log
from cprd.errors import InvalidInput
from cprd.linux import listen_fds
from cprd.systemd.fdstore import PROBE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from cprd.daemon.listener import SocketFile
    from cprd.daemon.storage.shelf import Shelf

OWN_LISTENER = "cprd-own-listener"
LOCAL = "local."  # before the names of shelves that no store has
ONCE = "once."  # of those that a store had once, and may have still
RELEASER = "r."  # and a uid, and the number of messages without an acknowledgement
FILES = {"c.": "closing", "d.": "draining", "s.": "sent"}  # and a uid; the fields of Passed
MOST_PASSED = 5000  # names of more than that do not fit one variable
CHECK = 60.0  # s that --check of a new version may take


class Passed(NamedTuple):
    """What is still to be let go of (releasing.py). All descriptors are owned."""

    releasers: list[tuple[int, int, int]]  # uid, messages without an acknowledgement, socket
    closing: list[tuple[int, int]]  # uid, file that can block when it is closed
    draining: list[tuple[int, int]]  # uid, bundle or slot that is still to be drained, not sent yet
    sent: list[tuple[int, int]]  # the same, with the releaser


class Given:
    """Everything from the start: from systemd, or across exec. Owns all descriptors."""

    def __init__(self) -> None:
        self.listeners: list[tuple[str, socket.socket]] = []
        self.own: SocketFile | None = None  # of a listener that this daemon has made
        self.shelves: dict[int, dict[str, socket.socket]] = {}  # "out" and "in" by number
        self.durable: set[int] = set()  # numbers of shelves that the store has
        self.once: set[int] = set()  # numbers of shelves that the store had, as far as is known
        self.passed = Passed([], [], [], [])  # what is still to be let go of

    @property
    def has_own_listener(self) -> bool:
        return any(name == OWN_LISTENER for name, _ in self.listeners)

    def pairs(self) -> dict[int, tuple[socket.socket, socket.socket]]:
        """(outlet, inlet) of each shelf. Where an end is missing, a dead socket takes the place: a
        shelf without inlet can be read, and is written anew before the next record; a shelf without
        outlet is empty."""
        pairs = {}
        for number, ends in self.shelves.items():
            if len(ends) != 2:
                log.event("half-a-shelf", level=log.WARNING, number=number, has=next(iter(ends)))
                stray, gone = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                gone.close()
                ends.setdefault("out", stray)
                ends.setdefault("in", stray)
            pairs[number] = (ends["out"], ends["in"])
        return pairs


def sort(named: list[tuple[str, int]]) -> Given:
    """Sort descriptors by name; takes them over. Names in the log, and closes, a listening socket
    of another kind than cprd serves. Raises InvalidInput when every listening socket is of another
    kind."""
    given = Given()
    refused = ""
    for name, fd in named:
        if _add_passed(given.passed, name, fd):
            continue
        sock = _as_socket(fd)
        if sock is not None and _add_shelf(given, name, sock):
            continue
        if sock is not None and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            why = _why_not_served(sock)
            if not why:
                given.listeners.append((name, sock))
                continue
            refused = f"the socket {name} of the service manager cannot be served: {why}"
            log.event("not-served", level=log.ERROR, name=name, why=why)
        elif name != PROBE:  # left by a killed process; the store drops it later
            log.event("unknown-descriptor", level=log.WARNING, name=name)
        if sock is not None:
            sock.detach()
        os.close(fd)
    if refused and not given.listeners:
        raise InvalidInput(refused)
    return given


def _add_passed(passed: Passed, name: str, fd: int) -> bool:
    """Whether `name` is of releasing; then `passed` owns `fd`."""
    kind, numbers = name[:2], name[2:].split(".")
    if not all(number.isdigit() for number in numbers):
        return False
    uid = int(numbers[0])
    if kind in FILES and len(numbers) == 1:
        getattr(passed, FILES[kind]).append((uid, fd))
    elif kind == RELEASER and len(numbers) == 2:
        passed.releasers.append((uid, int(numbers[1]), fd))
    else:
        return False
    return True


def _add_shelf(given: Given, name: str, sock: socket.socket) -> bool:
    """Whether `name` is of an end of a shelf; then `given` owns `sock`."""
    parts = name.removeprefix(LOCAL).removeprefix(ONCE).split(".")
    if len(parts) != 3 or parts[0] != "shelf" or not parts[1].isdigit():
        return False
    number = int(parts[1])
    ends = given.shelves.setdefault(number, {})
    if parts[2] in ends:
        sock.close()
        return True
    ends[parts[2]] = sock
    if name.startswith(ONCE):
        given.once.add(number)
    elif not name.startswith(LOCAL):
        given.durable.add(number)
    return True


def _as_socket(fd: int) -> socket.socket | None:
    try:
        return socket.socket(fileno=fd)
    except OSError:
        return None


def _why_not_served(sock: socket.socket) -> str:
    """Why cprd cannot serve a listening socket; an empty string when cprd can."""
    if sock.type == socket.SOCK_SEQPACKET and sock.family == socket.AF_UNIX:
        return ""
    where = sock.getsockname() or "an unnamed address"
    return f"it listens at {where}, and cprd wants ListenSequentialPacket= with a path"


def new_version_works() -> bool:
    """Whether the version on disk starts up as far as --check goes. Blocks."""
    command = [sys.executable, *sys.orig_argv[1:], "--check"]
    try:
        check = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=CHECK, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.event("reload-refused", level=log.ERROR, why=str(error))
        return False
    if check.returncode:
        said = check.stderr.decode(errors="replace").strip().splitlines()
        why = said[-1] if said else f"exit status {check.returncode}"
        log.event("reload-refused", level=log.ERROR, why=f"cprd --check: {why}")
    return check.returncode == 0


def become_new(shelves: list[Shelf], given: Given) -> NoReturn:
    """Execute the program anew: the same PID; listeners, shelves and files still to be
    closed go along, everything else is closed."""
    named = [(name, sock.fileno()) for name, sock in given.listeners]
    for shelf in shelves:
        for name, end in zip(shelf.names, (shelf.outlet, shelf.tx), strict=True):
            mark = "" if shelf.durable else ONCE if shelf.was_durable else LOCAL
            named.append((mark + name, end.fileno()))
    passed = [(f"{RELEASER}{uid}.{sent}", fd) for uid, sent, fd in given.passed.releasers]
    for mark, field in FILES.items():
        passed += [(f"{mark}{uid}", fd) for uid, fd in getattr(given.passed, field)]
    named += passed[:MOST_PASSED]
    log.event("re-executing", pid=os.getpid())
    listen_fds.pass_on(named, os.environ)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

"""Descriptors that a program finds at the start, as in sd_listen_fds(3): taking, and passing on.

The first descriptor is 3. `LISTEN_FDS` has the count, `LISTEN_PID` and `LISTEN_PIDFDID` name the
process, and `LISTEN_FDNAMES` has a name for each descriptor.
"""

from __future__ import annotations

import fcntl
import os

from cprd.errors import InvalidInput, LimitExceeded, ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, MutableMapping, Sequence

FIRST = 3
VARIABLES = ("LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES")
# One string of a new program's environment, "LISTEN_FDNAMES=..." and its NUL included: 32 pages of
# 4 KiB (MAX_ARG_STRLEN). Beyond it execve fails with E2BIG, at every attempt.
MAX_NAMES = 32 * 4096
UNKNOWN = "unknown"  # sd_listen_fds_with_names(3) says so where no name was given
MAX_DIGITS = 20  # of a 64-bit number
MAX_COUNT = (1 << 31) - 1 - FIRST  # a descriptor is an int of C


def take(environ: MutableMapping[str, str]) -> list[tuple[str, int]]:
    """Take (name, descriptor) of each passed descriptor, in the order of passing. systemd
    passes sockets of socket units first, then the store, newest entry first.

    The caller owns the descriptors; each is close-on-exec from here on. Removes $LISTEN_* from
    `environ`, so no child takes the descriptors for its own. Empty when nothing was passed, or
    another process was meant. Never blocks. Raises ProtocolError when the variables make no sense,
    or when a descriptor is not open.
    """
    given = {name: environ.pop(name, None) for name in VARIABLES}
    count = given["LISTEN_FDS"]
    if count is None or given["LISTEN_PID"] is None:
        return []
    if number("LISTEN_PID", given["LISTEN_PID"]) != os.getpid():
        return []
    meant = given["LISTEN_PIDFDID"]
    if meant is not None and number("LISTEN_PIDFDID", meant) != (_own_pidfd_id() or int(meant)):
        return []  # the number of a process that has ended, used anew
    size = number("LISTEN_FDS", count)
    if size > MAX_COUNT:
        raise ProtocolError(f"LISTEN_FDS={count}: no process can have that many descriptors")
    for fd in range(FIRST, FIRST + size):  # ends at the first gap, however large the count is
        try:
            fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        except OSError as error:
            raise ProtocolError(
                f"LISTEN_FDS={count}, but descriptor {fd} is not open: the sender must pass that"
                " many, from 3 on"
            ) from error
    names = given["LISTEN_FDNAMES"]
    called = names.split(":") if names is not None else []
    if len(called) != size:  # descriptors are more precious than names
        called = [UNKNOWN] * size
    return list(zip(called, range(FIRST, FIRST + size), strict=True))


def pass_on(named: Sequence[tuple[str, int]], environ: MutableMapping[str, str]) -> None:
    """Prepare an exec in the same process: `take` in the next program returns `named`, in order.

    Takes over and moves the descriptors, so call `pass_on` right before exec: anything else at 3
    and up may be closed. Several entries may share a descriptor. Raises
    InvalidInput for a bad name, LimitExceeded for too many names; then nothing was moved.
    """
    names = join([name for name, _ in named])
    stay = {0, 1, 2}  # these, and a descriptor that is passed twice, are copied
    fds = []
    for _, fd in named:
        fds.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST) if fd in stay else fd)
        stay.add(fd)
    place(fds)
    announce(len(fds), names, environ)


def announce(count: int, names: str, environ: MutableMapping[str, str]) -> None:
    """Say in `environ`: the process passes `count` descriptors, called `names` (joined)."""
    for variable in VARIABLES:
        environ.pop(variable, None)
    if count:
        environ["LISTEN_PID"] = str(os.getpid())
        environ["LISTEN_FDS"] = str(count)
        environ["LISTEN_FDNAMES"] = names


def place(fds: list[int]) -> None:
    """Move descriptors, all different, to 3 and up, open across exec; `fds` follows. Closes
    anything else at these numbers. Needs a single free descriptor for any number of moves."""
    at = {fd: i for i, fd in enumerate(fds)}
    for i, fd in enumerate(fds):
        target = FIRST + i
        if fd == target:
            os.set_inheritable(fd, True)
            continue
        other = at.get(target)
        if other is not None:  # one of ours is there, and its turn comes later
            moved = fcntl.fcntl(target, fcntl.F_DUPFD_CLOEXEC, target + 1)
            fds[other] = moved
            at[moved] = other
        os.dup2(fd, target)
        os.close(fd)
        at.pop(fd, None)
        fds[i] = target
        at[target] = i


def join(names: Sequence[str]) -> str:
    """The value of LISTEN_FDNAMES. Raises InvalidInput for a name with a ':' or without printable
    ASCII, LimitExceeded when the names do not fit one variable."""
    for name in names:
        if not all(" " <= letter <= "~" and letter != ":" for letter in name):
            raise InvalidInput(f"name {name!r} of a descriptor: printable ASCII without ':' only")
    if names_left(names) < 0:
        raise LimitExceeded(
            f"the names of {len(names)} descriptors are {-names_left(names)} bytes more than "
            f"$LISTEN_FDNAMES can hold ({MAX_NAMES}): pass fewer, or shorter names"
        )
    return ":".join(names)


def names_left(names: Iterable[str]) -> int:
    """Bytes left in the variable for `names`, the names of sockets included. Where the
    number is negative, exec fails: a service with such a store can never be started again."""
    return MAX_NAMES - len("LISTEN_FDNAMES=") - sum(len(name) + 1 for name in names)


def number(variable: str, text: str) -> int:
    """A number of at most 64 bits from the environment. Raises ProtocolError."""
    if not (text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS):
        raise ProtocolError(
            f"${variable} is {text[:40]!r}: a number of at most 64 bits is expected"
        )
    return int(text)


def _own_pidfd_id() -> int:
    """The inode of the process's pidfd, different for each process since boot. 0 before Linux
    6.9, where all pidfds share an inode, and where a pidfd cannot be had."""
    fds = []
    try:
        fds.append(os.pidfd_open(os.getpid()))
        fds.append(os.eventfd(0))
        pidfd, anonymous = (os.fstat(fd) for fd in fds)
        return pidfd.st_ino if pidfd.st_dev != anonymous.st_dev else 0
    except OSError:
        return 0
    finally:
        for fd in fds:
            os.close(fd)

"""The service manager's side of the daemon: what systemd hands in, what it is told, what it keeps.

Three things, each usable without the others:

- `listen_fds` takes what came in: sockets of socket units, and what lay in the descriptor store.
- `ready`, `status`, `reloading`, ... are the messages of sd_notify(3), as bytes, without I/O.
- `Manager` is the socket to send them by. What may have to wait (the manager reads its socket when
  it gets round to it) is a generator that yields what it waits for, a `Wait`; it neither blocks
  nor knows a clock: `drive` runs one with poll and a deadline, `adrive` runs one under trio.

The descriptor store as measured on systemd 252 to 262: it never answers. A store that is full, or
not offered at all, drops what it gets; a barrier behind it fires all the same. And what is dropped
is closed some time after that barrier (254 and later leave it to a process of its own), so that a
descriptor which has not hung up by then proves nothing: of 1,000 canaries that asked a store of
size 0 in that way, 130 to 180 said "kept". `Manager.canary` asks for a positive sign instead: see
`Witness`. Every other entry is sent with FDPOLL=0 (with polling the manager forgets a socket whose
peer has gone) and by itself (within one datagram neither order nor identity survives).
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import time

from cprd.errors import InvalidInput, LimitExceeded, ProtocolError, Timeout, Unavailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping, MutableMapping, Sequence
    from typing import Literal, TypeVar

    T = TypeVar("T")
    Wait = tuple[Literal["readable", "writable"], int]
    Steps = Generator[Wait, None, T]

FIRST_FD = 3  # where the descriptors of LISTEN_FDS begin
MAX_NAME = 255  # characters of a FDNAME
MAX_FDS = 253  # descriptors in one message (SCM_MAX_FD)
# One string of a new program's environment, "LISTEN_FDNAMES=..." and its NUL included: 32 pages of
# 4 KiB (MAX_ARG_STRLEN). Beyond it the manager's execve fails with E2BIG, at every attempt.
MAX_NAMES = 32 * 4096
CANARY = "cprd-canary"
UNKNOWN = "unknown"  # sd_listen_fds_with_names(3) says so where no name was given
LISTEN = ("LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES")


# Coming in


def listen_fds(
    environ: MutableMapping[str, str], *, pid: int | None = None
) -> list[tuple[str, int]]:
    """(name, descriptor) of each descriptor that the manager passed, in its order: sockets of
    socket units first, then the store, newest entry first. The caller owns them; each is CLOEXEC
    from here on. Removes $LISTEN_* from `environ` (os.environ, as a rule), so that no child takes
    them for its own. Empty when nothing was passed, or it was passed to another process.

    Raises ProtocolError when the variables make no sense or name a descriptor that is not open.
    """
    given = {name: environ.pop(name, None) for name in LISTEN}
    count = given["LISTEN_FDS"]
    if count is None or given["LISTEN_PID"] is None:
        return []
    owner = _number("LISTEN_PID", given["LISTEN_PID"])
    if owner != (os.getpid() if pid is None else pid):
        return []
    fds = range(FIRST_FD, FIRST_FD + _number("LISTEN_FDS", count))
    names = given["LISTEN_FDNAMES"]
    called = names.split(":") if names is not None else []
    if len(called) != len(fds):  # what was passed is more precious than what it is called
        called = [UNKNOWN] * len(fds)
    for fd in fds:
        try:
            fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        except OSError as error:
            raise ProtocolError(
                f"LISTEN_FDS={count}, but descriptor {fd} is not open: whoever set it must pass "
                "that many, from 3 on"
            ) from error
    return list(zip(called, fds, strict=True))


def pass_on(named: Sequence[tuple[str, int]], environ: MutableMapping[str, str]) -> None:
    """Get ready for an exec in this very process (same PID): `listen_fds` of the next program gives
    `named`, in this order. Right before exec, for whatever was open at descriptors 3 and up and is
    not among `named` is overwritten. The passed ones are copies, inheritable; the originals stay
    open until exec if CLOEXEC. Several entries may share a descriptor.

    Raises InvalidInput for a bad name, LimitExceeded when the names do not fit one variable.
    """
    names = [check_name(name) for name, _ in named]
    if names_left(names) < 0:
        raise LimitExceeded(
            f"the names of {len(names)} descriptors are {-names_left(names)} bytes more than "
            f"$LISTEN_FDNAMES can hold ({MAX_NAMES}): pass fewer, or shorter names"
        )
    above = FIRST_FD + len(named)
    copies = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for _, fd in named]
    for target, copy in enumerate(copies, FIRST_FD):
        os.dup2(copy, target, inheritable=True)
        os.close(copy)
    environ["LISTEN_PID"] = str(os.getpid())
    environ["LISTEN_FDS"] = str(len(named))
    environ["LISTEN_FDNAMES"] = ":".join(names)


def store_limit(environ: Mapping[str, str]) -> int | None:
    """How many descriptors the manager is willing to store ($FDSTORE, systemd 254+). None: it does
    not say, which an older one with a store does not either; `Manager.keep` finds out."""
    value = environ.get("FDSTORE")
    return None if value is None else _number("FDSTORE", value)


def watchdog_interval(environ: Mapping[str, str]) -> float | None:
    """Seconds within which the manager wants `WATCHDOG` again (send it twice as often), or None.
    The variables stay, for a program that re-executes itself is watched on."""
    value = environ.get("WATCHDOG_USEC")
    owner = environ.get("WATCHDOG_PID")
    if value is None or (owner is not None and _number("WATCHDOG_PID", owner) != os.getpid()):
        return None
    return _number("WATCHDOG_USEC", value) / 1e6 or None


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ProtocolError(f"${name} is {text!r}: a number was expected")
    return int(text)


# Names of store entries


def check_name(name: str) -> str:
    """`name`, if the manager will keep it as it is. For any other it would say nothing and use
    "stored", so InvalidInput is raised before anything is sent."""
    if len(name) > MAX_NAME:
        raise InvalidInput(f"store name of {len(name)} characters: at most {MAX_NAME}")
    if not all(" " <= letter <= "~" and letter != ":" for letter in name):
        raise InvalidInput(f"store name {name!r}: printable ASCII without ':' only")
    return name


def names_left(names: Iterable[str]) -> int:
    """Bytes left in the one variable that hands all `names` back (sockets' names count as well);
    negative: a service with these in its store can never be started again."""
    return MAX_NAMES - len("LISTEN_FDNAMES=") - sum(len(name) + 1 for name in names)


# Messages


def status(text: str) -> bytes:
    """A line for `systemctl status`; what would end the line is shown as a space."""
    return b"STATUS=" + " ".join(text.splitlines()).encode("utf-8", "replace")


def ready(text: str | None = None) -> bytes:
    return b"READY=1" if text is None else b"READY=1\n" + status(text)


def reloading(monotonic_ns: int | None = None, text: str | None = None) -> bytes:
    """To be sent first thing when a reload is asked for; `ready` ends it. MONOTONIC_USEC, which
    Type=notify-reload (253+) insists on, is now, or the time given in nanoseconds."""
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) if monotonic_ns is None else monotonic_ns
    head = b"RELOADING=1\nMONOTONIC_USEC=%d" % (now // 1000)
    return head if text is None else head + b"\n" + status(text)


def stopping(text: str | None = None) -> bytes:
    return b"STOPPING=1" if text is None else b"STOPPING=1\n" + status(text)


def mainpid(pid: int) -> bytes:
    """Another process is the service from now on. It has to be in the service's cgroup, or the
    sender root."""
    return b"MAINPID=%d" % pid


WATCHDOG = b"WATCHDOG=1"
BARRIER = b"BARRIER=1"  # alone, with one descriptor: with anything else, all else is ignored


def store_message(name: str) -> bytes:
    """To go with exactly one descriptor. An open file that is in the store already, under whatever
    name, is ignored: remove it first to rename it."""
    return b"FDSTORE=1\nFDPOLL=0\nFDNAME=" + check_name(name).encode()


def remove_message(name: str) -> bytes:
    """Removes every entry of that name; none is fine too."""
    return b"FDSTOREREMOVE=1\nFDNAME=" + check_name(name).encode()


# The sign that the store took something


class Witness:
    """A descriptor that tells whether anybody, in any process, has polled it since it was made.

    What the manager stores with FDPOLL=1 it adds to its event loop at once, which polls it; what it
    drops it never looks at. An epoll descriptor shows the difference: polled, it takes what is
    not ready any more off the head of its list of ready descriptors. So make `first` ready, then
    `second`, then take `first` back and make it ready again at the end: it comes first when nobody
    has polled in between, and second when somebody has. (In Linux since 2009, ep_read_events_proc
    and its successors; `works` tries it in both directions before it is relied on.)

    Owns three descriptors; close() or `with` ends them.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._first = self._second = -1
        try:
            self._first = os.eventfd(0)
            self._second = os.eventfd(0)
            for fd in (self._first, self._second):
                self._epoll.register(fd, select.EPOLLIN)
                os.eventfd_write(fd, 1)
            os.eventfd_read(self._first)
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        return self._epoll.fileno()

    def polled(self) -> bool:
        """Whether it was. To be asked once, for asking polls."""
        os.eventfd_write(self._first, 1)
        return [fd for fd, _ in self._epoll.poll(0)] == [self._second, self._first]

    def close(self) -> None:
        self._epoll.close()
        for fd in (self._first, self._second):
            if fd >= 0:
                os.close(fd)
        self._first = self._second = -1

    def __enter__(self) -> Witness:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def works() -> bool:
        """Whether this kernel's epoll behaves as described."""
        with Witness() as alone, Witness() as watched:
            poll = select.poll()
            poll.register(watched, select.POLLHUP)
            poll.poll(0)
            return watched.polled() and not alone.polled()


# The manager


class Manager:
    """The manager's notification socket. Owns one descriptor; close() or `with` ends it.

    Only the main process of a unit should use the store: NotifyAccess=main is what we ship.
    """

    def __init__(self, address: str) -> None:
        """Connect to what $NOTIFY_SOCKET names: a path, or @name in the abstract namespace. Raises
        InvalidInput for any other, Unavailable when nobody listens there."""
        if address[:1] not in ("/", "@") or len(address) < 2:
            raise InvalidInput(f"$NOTIFY_SOCKET is {address!r}: only a path or @name is understood")
        self.address = address
        self._socket = self._connected()

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Manager | None:
        """The manager that $NOTIFY_SOCKET names, or None when there is none. The variable stays,
        for a program that re-executes itself."""
        address = environ.get("NOTIFY_SOCKET")
        return cls(address) if address else None

    def _connected(self) -> socket.socket:
        # Connected, because a datagram socket's poll tells about a full receiver only then.
        own = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        name = "\0" + self.address[1:] if self.address[0] == "@" else self.address
        try:
            own.connect(name)
        except OSError as error:
            own.close()
            raise Unavailable(
                f"the service manager does not listen at $NOTIFY_SOCKET={self.address}: {error}"
            ) from error
        return own

    def fileno(self) -> int:
        """To wait for writability when `send_now` returned False."""
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Manager:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send_now(self, message: bytes, fds: Sequence[int] = ()) -> bool:
        """Send one datagram; the descriptors are borrowed for the call. False when the manager is
        so far behind that it would have to wait: wait until `fileno()` is writable and try again.

        Raises LimitExceeded for more than 253 descriptors, or when too many of this uid are in
        flight; Unavailable when the manager is gone.
        """
        if len(fds) > MAX_FDS:
            raise LimitExceeded(f"{len(fds)} descriptors in one message: at most {MAX_FDS}")
        again = True
        while True:
            try:
                socket.send_fds(self._socket, [message], list(fds), socket.MSG_NOSIGNAL)
                return True
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno == errno.ETOOMANYREFS:
                    raise LimitExceeded(
                        "too many descriptors of this user are parked in sockets (ETOOMANYREFS): "
                        "raise LimitNOFILE= of the service"
                    ) from error
                if again and error.errno in (
                    errno.ECONNREFUSED,
                    errno.ECONNRESET,
                    errno.ENOTCONN,
                    errno.EPIPE,
                ):
                    again = False  # a manager that re-executed itself may have made a new socket
                    self._socket.close()
                    self._socket = self._connected()
                    continue
                if error.errno in (errno.EBADF, errno.EMSGSIZE):
                    raise
                raise Unavailable(f"cannot tell the service manager: {error}") from error

    # Steps: run them with `drive` or `adrive`.

    def tell(self, message: bytes, fds: Sequence[int] = ()) -> Steps[None]:
        """Send one datagram, waiting for room."""
        while not self.send_now(message, fds):
            yield "writable", self.fileno()

    def store(self, name: str, fd: int) -> Steps[None]:
        """Offer one descriptor to the store. Nobody ever says whether it was taken: see `keep`."""
        return self.tell(store_message(name), (fd,))

    def remove(self, name: str) -> Steps[None]:
        """Take every entry called `name` out of the store. The manager closes its copies."""
        return self.tell(remove_message(name))

    def barrier(self) -> Steps[None]:
        """Until the manager has processed all that was sent before (not: accepted it)."""
        mine, theirs = os.pipe()  # both CLOEXEC
        try:
            try:
                yield from self.tell(BARRIER, (theirs,))
            finally:
                os.close(theirs)
            poll = select.poll()
            poll.register(mine, 0)  # POLLHUP comes unasked, and it alone is the answer
            while not poll.poll(0):
                yield "readable", mine
        finally:
            os.close(mine)

    def canary(self) -> Steps[bool]:
        """Whether the store has room for what is sent now, and so had for all that was sent before
        (nothing may have been removed in between). Takes one entry for the time of the question.
        A canary that a killed process left comes back as CANARY: `remove(CANARY)` at start, before
        anything is stored."""
        if not Witness.works():
            return False
        with Witness() as witness:
            message = b"FDSTORE=1\nFDPOLL=1\nFDNAME=" + CANARY.encode()
            yield from self.tell(message, (witness.fileno(),))
            yield from self.barrier()
            kept = witness.polled()
        if kept:
            yield from self.remove(CANARY)
        return kept

    def keep(self, entries: Sequence[tuple[str, int]]) -> Steps[bool]:
        """Store `entries` (name, descriptor; borrowed) and return whether the manager has them
        all: True, then they survive this process. False: it has some of them or none, because
        the store is full, or not offered (FileDescriptorStoreMax=0, NotifyAccess= of another
        process); remove them by name.

        True is also said of a descriptor that was in the store before, be it under another name.
        """
        for name, _ in entries:
            check_name(name)
        for name, fd in entries:
            yield from self.store(name, fd)
        return (yield from self.canary())


# Running steps


def drive(steps: Steps[T], timeout: float | None = None) -> T:
    """Run `steps` to their end, blocking. Raises Timeout after that many seconds: it is unknown
    then what the manager has seen."""
    until = None if timeout is None else time.monotonic() + timeout
    try:
        while True:
            kind, fd = next(steps)
            poll = select.poll()
            poll.register(fd, select.POLLIN if kind == "readable" else select.POLLOUT)
            left = None if until is None else max(until - time.monotonic(), 0) * 1000
            if not poll.poll(left):
                raise Timeout(f"the service manager did not answer within {timeout} s")
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        steps.close()


async def adrive(steps: Steps[T]) -> T:
    """Run `steps` to their end under trio. Cancel it for a deadline: it leaves no descriptor."""
    import trio

    await trio.lowlevel.checkpoint_if_cancelled()
    try:
        while True:
            kind, fd = next(steps)
            if kind == "readable":
                await trio.lowlevel.wait_readable(fd)
            else:
                await trio.lowlevel.wait_writable(fd)
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        steps.close()

"""Messages of sd_notify(3) to the service manager, and the socket for messages.

- `status`, `reloading`, ... make messages, as bytes, without I/O.
- `Manager` is the socket. A step that may wait for the manager is a generator, and yields a
  `Wait`: the generator neither blocks nor knows a clock. `drive` runs steps with poll and a
  deadline; the daemon has another driver.

The variables of the environment stay: a program reads them again after a re-execution.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time

from cprd.errors import InvalidInput, LimitExceeded, Timeout, Unavailable
from cprd.linux.listen_fds import number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence
    from typing import Literal, TypeVar

    T = TypeVar("T")
    Wait = tuple[Literal["readable", "writable"], int]
    Steps = Generator[Wait, None, T]

MAX_FDS = 253  # descriptors in one message (SCM_MAX_FD)


# Messages


def status(text: str) -> bytes:
    """A line for `systemctl status`; a space replaces each end of a line."""
    return b"STATUS=" + " ".join(text.splitlines()).encode("utf-8", "replace")


def reloading() -> bytes:
    """A reload begins; READY ends the reload. MONOTONIC_USEC, for Type=notify-reload (253+)."""
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    return b"RELOADING=1\nMONOTONIC_USEC=%d" % (now // 1000)


def stopping(text: str) -> bytes:
    """The service ends."""
    return b"STOPPING=1\n" + status(text)


def mainpid(pid: int) -> bytes:
    """Another process is the service from now on. The process has to be in the service's cgroup, or
    the sender root."""
    return b"MAINPID=%d" % pid


READY = b"READY=1"  # the service serves: ends a start, or a reload
WATCHDOG = b"WATCHDOG=1"
BARRIER = b"BARRIER=1"  # alone, with one descriptor: with anything else, all else is ignored


def watchdog_interval(environ: Mapping[str, str]) -> float | None:
    """Seconds until the manager wants `WATCHDOG` again (send twice as often), or None.
    Raises ProtocolError for nonsense in the environment."""
    value = environ.get("WATCHDOG_USEC")
    owner = environ.get("WATCHDOG_PID")
    if value is None or (owner is not None and number("WATCHDOG_PID", owner) != os.getpid()):
        return None
    return number("WATCHDOG_USEC", value) / 1e6 or None


# The manager


class Manager:
    """The manager's notification socket. Owns at most one descriptor; close() or `with` closes.
    For a single task: two tasks take two managers, and all messages arrive in order.

    Only the main process of a unit should use the store: NotifyAccess=main is in our unit.
    """

    def __init__(self, address: str) -> None:
        """`address`: $NOTIFY_SOCKET, a path, or @name in the abstract namespace; InvalidInput for
        any other. Connects at the first message, and again after the manager was away."""
        if address[:1] not in ("/", "@") or len(address) < 2:
            raise InvalidInput(f"$NOTIFY_SOCKET is {address!r}: only a path or @name is understood")
        self.address = address
        self._socket: socket.socket | None = None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Manager | None:
        """The manager that $NOTIFY_SOCKET names, or None without a manager."""
        address = environ.get("NOTIFY_SOCKET")
        return cls(address) if address else None

    def _connected(self) -> socket.socket:
        # Connected, because a datagram socket's poll tells about a full receiver only then.
        if self._socket is not None:
            return self._socket
        name = "\0" + self.address[1:] if self.address[0] == "@" else self.address
        own = None
        try:
            own = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            own.connect(name)
        except OSError as error:
            if own is not None:
                own.close()
            raise Unavailable(
                f"the service manager does not listen at $NOTIFY_SOCKET={self.address}: {error}"
            ) from error
        self._socket = own
        return own

    def fileno(self) -> int:
        """To wait for writability when `send_now` returned False. -1 while not connected."""
        return -1 if self._socket is None else self._socket.fileno()

    def close(self) -> None:
        """End the connection; the next message makes another."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> Manager:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send_now(self, message: bytes, fds: Sequence[int] = ()) -> bool:
        """Send a datagram, without blocking; the descriptors are borrowed for the call. False
        when the manager is far behind: wait until `fileno()` is writable, and try again.

        Raises LimitExceeded for more than 253 descriptors, or when too many of the uid are in
        flight; Unavailable when the manager is gone.
        """
        if len(fds) > MAX_FDS:
            raise LimitExceeded(f"{len(fds)} descriptors in one message: at most {MAX_FDS}")
        fresh = self._socket is None
        while True:
            own = self._connected()
            try:
                socket.send_fds(own, [message], list(fds), socket.MSG_NOSIGNAL)
                return True
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno == errno.ETOOMANYREFS:
                    raise LimitExceeded(
                        "too many descriptors of this user are parked in sockets (ETOOMANYREFS): "
                        "raise LimitNOFILE= of the service"
                    ) from error
                if error.errno in (errno.EBADF, errno.EMSGSIZE):
                    raise  # of what was to be sent
                self.close()
                if fresh:
                    raise Unavailable(f"cannot tell the service manager: {error}") from error
                fresh = True  # a manager that re-executed itself may have made a new socket

    # Steps: run them with `drive`.

    def tell(self, message: bytes, fds: Sequence[int] = ()) -> Steps[None]:
        """Send a datagram, waiting for room."""
        while not self.send_now(message, fds):
            yield "writable", self.fileno()

    def barrier(self) -> Steps[None]:
        """Until the manager has processed (not: accepted) all earlier messages, or has gone."""
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


# Running steps


def drive(steps: Steps[T], timeout: float | None = None) -> T:
    """Run `steps` to the end, blocking. Raises Timeout after `timeout` seconds: then nobody knows
    how much the manager has seen."""
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

"""Waits with a deadline, and the signals that may break a wait off.

SIGINT, SIGTERM and SIGHUP must not strike anywhere: between two commands, a QEMU would keep
settings of ours, or its guest would stand. So the handler only notes a signal. Only a wait inside
`allowed()` ends early, with Interrupted; the failure then takes the usual way back. After
`hold_off` (before a QEMU hears that its state is whole) a signal changes nothing until the outcome
is known.
"""

from __future__ import annotations

import os
import select
import time

from cprd.errors import CprdError

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    import signal
else:
    import _signal as signal  # without the enums of signal, as _socket

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(CprdError):
    """A signal asked, in time, for the end of the command."""


class _Watch:
    """The signals of one command."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.came = 0  # the first signal; more of them say nothing new
        self.raised = False  # Interrupted was raised
        self.deferred = False  # after hold_off
        self.allowed = False  # inside allowed()
        self.wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def note(self, number: int, _: object) -> None:
        """The handler."""
        if os.getpid() != self.pid:  # a child of ours that has not executed anything yet
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if not self.came:
            self.came = number
            os.eventfd_write(self.wakeup, 1)

    def check(self) -> None:
        if self.came and not self.raised and not self.deferred:
            self.raised = True
            from signal import Signals

            raise Interrupted(f"interrupted by {Signals(self.came).name}")


_watch: _Watch | None = None


class watched:
    """A block in which the signals are noted. An ignored signal (nohup) stays ignored."""

    def __enter__(self) -> None:
        global _watch
        self._watch = _watch = _Watch()
        ignored = (signal.SIG_IGN, None)
        self._before = {
            number: signal.signal(number, _watch.note)
            for number in SIGNALS
            if signal.getsignal(number) not in ignored
        }

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._watch.allowed = False
        os.close(self._watch.wakeup)


def check() -> None:
    """Raises Interrupted, once, when a signal has come and signals are not held off."""
    if _watch is not None:
        _watch.check()


def hold_off() -> None:
    """From here on a signal changes nothing any more. Raises Interrupted when one has come."""
    if _watch is not None:
        _watch.check()
        _watch.deferred = True


class allowed:
    """A block in which a signal ends any wait. Raises Interrupted."""

    def __enter__(self) -> None:
        watch = self._watch = _watch
        if watch is None or watch.deferred or watch.raised:
            self._watch = None
            return
        watch.check()
        self._before, watch.allowed = watch.allowed, True

    def __exit__(self, kind: object, *exc: object) -> None:
        if self._watch is not None:
            self._watch.allowed = self._before
            if kind is None:
                self._watch.check()


def came() -> bool:
    """Whether somebody waits for our end, held off or not."""
    return _watch is not None and _watch.came != 0


def exit_status() -> int:
    """128 plus the signal that was acted on, as in a shell; 0 for none."""
    return 128 + _watch.came if _watch is not None and _watch.raised else 0


def ignore() -> None:
    """This process goes on, whatever comes."""
    for number in (*SIGNALS, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)


def block() -> None:
    """The signals are for another thread than this."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


# Waits


class Deadline:
    """A point in time, `seconds` from now."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """The seconds until then; 0 afterwards."""
        return max(0.0, self._end - time.monotonic())

    def has_passed(self) -> bool:
        return not self.left()


def readable(fd: int, timeout: float) -> bool:
    """Wait until `fd` is readable or hung up. False after `timeout` seconds."""
    return bool(_wait((fd,), select.POLLIN, timeout))


def writable(fd: int, timeout: float) -> bool:
    """Wait until `fd` takes more bytes. False after `timeout` seconds."""
    return bool(_wait((fd,), select.POLLOUT, timeout))


def any_readable(fds: tuple[int, ...], timeout: float) -> set[int]:
    """Wait until some of `fds` are readable or hung up; empty after `timeout` seconds."""
    return _wait(fds, select.POLLIN, timeout)


def sleep(seconds: float) -> None:
    """Wait for nothing."""
    if seconds < 0.001:  # poll counts in ms
        time.sleep(seconds)
        seconds = 0.0
    _wait((), 0, seconds)


def _wait(fds: tuple[int, ...], events: int, timeout: float) -> set[int]:
    poll = select.poll()
    for fd in fds:
        poll.register(fd, events)
    watch = _watch
    if watch is not None and (watch.deferred or watch.raised or not watch.allowed):
        watch = None
    if watch is not None:
        poll.register(watch.wakeup, select.POLLIN)
    found = {fd for fd, _ in poll.poll(timeout * 1000)}
    if watch is not None:
        watch.check()
    return found

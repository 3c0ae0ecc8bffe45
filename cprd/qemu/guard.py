"""What stands between a new QEMU and its helper's death: a small process that reads QEMU's stderr.

Until it is told that the guest is about to run, the end of the helper (however it comes) ends that
QEMU: a QEMU that waits for a state which nobody will send would otherwise stand there for ever.
From then on it only passes on what QEMU says on stderr, as `cat`, until QEMU ends: the pipe cannot
be taken out of a running QEMU again.

In an upgrade it is also who sees to the paths of sockets that the old QEMU takes along when it ends
(overlap.py), since it outlives the helper: it waits for that before it becomes `cat`.
"""

from __future__ import annotations

import os
import select
import signal
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cprd.qemu.overlap import SharedPaths

_KEPT = 4096  # bytes of what was said, for the reason of a reject
_DISARM = b"d"
_SAID = b"s"


class Guard:
    """The helper's end."""

    def __init__(self, control: socket.socket, pid: int) -> None:
        self._control = control
        self.pid = pid

    @classmethod
    def fork(
        cls,
        said: int,
        pidfd: int,
        onward: int = 2,
        *,
        old: int = -1,
        shared: SharedPaths | None = None,
    ) -> Guard:
        """Start it, as a child. `said`: the pipe to read, which becomes the guard's (closed here);
        `pidfd`: of the QEMU, borrowed; `onward`: where QEMU's words go once the guest runs; `old`:
        the pidfd of the QEMU that it takes the place of, borrowed, and the paths they share."""
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            try:
                _be_guard(theirs, said, pidfd, onward, old, shared)
            finally:
                os._exit(0)
        theirs.close()
        os.close(said)
        return cls(ours, pid)

    def disarm(self) -> None:
        """From now on QEMU may outlive us: say it before the guest runs, never after. No answer is
        waited for: the guard reads this before it can see our end."""
        with suppress(OSError):
            self._control.sendall(_DISARM)

    def said(self) -> str:
        """What QEMU said, once it has ended: the last of it, on one line."""
        data = b""
        try:
            self._control.sendall(_SAID)
            self._control.settimeout(3.0)
            while piece := self._control.recv(_KEPT):
                data += piece
        except OSError:
            pass
        return " ".join(data.decode("utf-8", "replace").split())

    def close(self) -> None:
        self._control.close()


def _be_guard(
    control: socket.socket,
    said: int,
    pidfd: int,
    onward: int,
    old: int,
    shared: SharedPaths | None,
) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)  # QEMU has something to say when it is ended, too
    kept_open = [0, 1, 2, control.fileno(), said, pidfd, onward]
    if shared is not None:
        kept_open += [old, *shared.fds]
    _close_others(kept_open)
    kept = bytearray()
    poll = select.poll()
    poll.register(control.fileno(), select.POLLIN)
    poll.register(said, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd == said:
                data = os.read(said, 65536)
                if not data:
                    poll.unregister(said)
                    continue
                _write(data)
                kept = (kept + data)[-_KEPT:]
                continue
            word = control.recv(1)
            if word == _DISARM:
                if shared is not None:
                    control.close()
                    _see_the_old_one_out(said, pidfd, onward, old, shared)
                _be_cat(said, onward)
            if word == _SAID:
                while data := os.read(said, 65536):
                    _write(data)
                    kept = (kept + data)[-_KEPT:]
                control.sendall(kept)
            elif not word:
                with suppress(OSError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                ended = select.poll()
                ended.register(pidfd, select.POLLIN)
                ended.poll(10_000)
                if shared is not None:
                    shared.give_back()
            return


def _see_the_old_one_out(said: int, pidfd: int, onward: int, old: int, shared: SharedPaths) -> None:
    """Until one of the two QEMUs has ended; then the paths that they shared are the other's."""
    os.dup2(onward, 2)  # who called the helper may wait until nobody has its output any more
    os.dup2(onward, 1)
    poll = select.poll()
    for fd in (said, pidfd, old):
        poll.register(fd, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poll.poll()}
        if said in ready:
            data = os.read(said, 65536)
            _write(data)
            if not data:
                poll.unregister(said)
        if pidfd in ready and old in ready:
            return shared.both_have_ended()
        if old in ready:
            return shared.old_has_ended()
        if pidfd in ready:
            return shared.new_has_ended()


def _be_cat(said: int, onward: int) -> None:
    """Go on as the smallest thing that does it; does not return."""
    os.dup2(onward, 2)
    os.dup2(onward, 1)
    os.dup2(said, 0)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    with suppress(OSError):
        os.execvp("cat", ["cat"])
    while data := os.read(0, 65536):
        _write(data)
    os._exit(0)


def _write(data: bytes) -> None:
    with suppress(OSError):
        while data:
            data = data[os.write(2, data) :]


def _close_others(kept: Iterable[int]) -> None:
    last = -1
    for fd in sorted(set(kept)):
        if last + 1 < fd:  # closerange(0, 0) closes everything on a Linux with close_range(2)
            os.closerange(last + 1, fd)
        last = fd
    os.closerange(last + 1, os.sysconf("SC_OPEN_MAX"))

"""The process that becomes the new QEMU: it waits for a word over `talk`, then executes.

Words are msgpack maps: {"cold": True}; {"go": True, "place": path, "version": [10, 0, 2], "guard":
pid}; {"fail": why, "status": n}. The descriptors are made before this process is forked (or by it),
so that none has to be sent: a connected monitor, a connected main channel, a pipe for stderr.
`talk` closes on exec, so that its end says "executed"; anything that is said instead is why not.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

import msgpack

from cprd.qemu.command import FDS_FOR_CPR
from cprd.qemu.voice import GUARD, mark

if TYPE_CHECKING:
    from cprd.qemu.command import Command

PIECE = 1 << 16


class Plumbing:
    """Both ends of what connects a new QEMU with its helper. Owns all of it."""

    def __init__(self) -> None:
        self.talk, self.talk_qemu = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.monitor, self.monitor_qemu = socket.socketpair()
        self.main, self.main_qemu = socket.socketpair()
        self.said, self.said_qemu = os.pipe()  # its stderr

    def keep_ours(self) -> None:
        """In the helper: close what is QEMU's."""
        for sock in (self.talk_qemu, self.monitor_qemu, self.main_qemu):
            sock.close()
        self._close("said_qemu")

    def keep_qemus(self) -> None:
        """In the process that becomes QEMU: close what is the helper's."""
        for sock in (self.talk, self.monitor, self.main):
            sock.close()
        self._close("said")

    def _close(self, which: str) -> None:
        fd = getattr(self, which)
        if fd >= 0:
            os.close(fd)
            setattr(self, which, -1)

    def close(self) -> None:
        self.keep_ours()
        self.keep_qemus()


def say(talk: socket.socket, **words: Any) -> bool:
    """False when the other side has ended (or become a QEMU)."""
    try:
        talk.send(msgpack.packb(words), socket.MSG_NOSIGNAL)
    except OSError:
        return False
    return True


def hear(talk: socket.socket) -> dict[str, Any] | None:
    """The next word; None when the other side has ended."""
    while True:
        try:
            data = talk.recv(PIECE)
        except ConnectionResetError:
            continue  # it ended without hearing us; what it said before comes next
        except OSError:
            return None
        return dict(msgpack.unpackb(data)) if data else None


def execute(command: Command, plumbing: Plumbing, word: dict[str, Any]) -> OSError:
    """Become the QEMU that waits for a state. Returns only why that failed."""
    try:
        place = os.path.join(word["place"], "cpr")
        cpr: int | str = place
        passed = [plumbing.monitor_qemu.fileno(), plumbing.main_qemu.fileno()]
        if tuple(word["version"]) >= FDS_FOR_CPR:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(place)
            listener.listen(1)
            cpr = listener.fileno()
            passed.append(cpr)
        for fd in passed:
            os.set_inheritable(fd, True)
        words = command.incoming(monitor=passed[0], main=passed[1], cpr=cpr)
        os.environ[GUARD] = mark(word["guard"])
        own = os.dup(2)
        os.dup2(plumbing.said_qemu, 2)
        try:
            os.execvp(words[0], words)
        except OSError as error:
            os.dup2(own, 2)
            return error
    except OSError as error:
        return error
    raise AssertionError("unreachable")

"""A QEMU as a process: which one it is, whether it still is, and its end.

A pid alone may mean another process later, so that a pidfd is held, and the start time (field 22 of
/proc/PID/stat) is what gets written down.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
from typing import TYPE_CHECKING, Any

from cprd.linux.processes import credentials, has_ended

if TYPE_CHECKING:
    import socket


async def readable(fd: int, timeout: float | None = None) -> bool:
    """Wait until `fd` is readable or hung up. False when `timeout` seconds are over before."""
    return await _ready(fd, timeout, write=False)


async def soon_readable(fd: int, timeout: float, *, at_once: float = 0.02) -> bool:
    """As `readable`, for what is expected within milliseconds while a guest stands still: waits
    `at_once` seconds in poll itself, with nothing else in between."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(min(timeout, at_once) * 1000)) or await readable(fd, timeout)


async def writable(fd: int, timeout: float | None = None) -> bool:
    """Wait until `fd` can be written to. False when `timeout` seconds are over before."""
    return await _ready(fd, timeout, write=True)


async def _ready(fd: int, timeout: float | None, *, write: bool) -> bool:
    loop = asyncio.get_running_loop()
    done: asyncio.Future[bool] = loop.create_future()
    add, remove = (
        (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
    )
    # A copy: two waits on one descriptor would take each other's place in the loop.
    own = os.dup(fd)
    timer = None
    try:
        add(own, _settle, done, True)
        if timeout is not None:
            timer = loop.call_later(timeout, _settle, done, False)
        return await done
    finally:
        remove(own)
        os.close(own)
        if timer is not None:
            timer.cancel()


def _settle(done: asyncio.Future[bool], result: bool) -> None:
    if not done.done():
        done.set_result(result)


class Process:
    """One process. Owns `pidfd`."""

    def __init__(self, pid: int, pidfd: int, uid: int) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.uid = uid
        self.started = start_time(pid)

    @classmethod
    def behind(cls, sock: socket.socket) -> Process | None:
        """Who listens at the other end; None where that cannot be seen (another pid namespace).

        Credentials are of the process that called listen(); QEMU does so itself even on a socket
        that it inherited."""
        uid, pid = credentials(sock)
        if pid <= 0:
            return None
        try:
            return cls(pid, os.pidfd_open(pid), uid)
        except OSError:
            return None

    @classmethod
    def open(cls, pid: int, uid: int = -1) -> Process | None:
        try:
            return cls(pid, os.pidfd_open(pid), uid)
        except OSError:
            return None

    @classmethod
    def find(cls, record: dict[str, Any] | None, uid: int = 0) -> Process | None:
        """The process that `record` describes, if it still is that one and has not ended. `uid`:
        whose word the record is; only root's is taken for another uid's process."""
        if not record or not isinstance(record.get("pid"), int):
            return None
        found = cls.open(record["pid"])
        if found is None:
            return None
        other = uid != 0 and _owner(found.pid) != uid
        if other or found.ended() or found.started != record.get("start"):
            found.close()
            return None
        return found

    def record(self) -> dict[str, int]:
        """What `find` needs."""
        return {"pid": self.pid, "start": self.started}

    def ended(self) -> bool:
        return has_ended(self.pidfd)

    def kill(self) -> None:
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass

    async def wait(self, timeout: float) -> bool:
        """Whether it ended within `timeout` seconds."""
        return await readable(self.pidfd, timeout)

    def close(self) -> None:
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def _owner(pid: int) -> int:
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return -1


def start_time(pid: int) -> int:
    """When it started, in clock ticks since boot; 0 when that cannot be read."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0

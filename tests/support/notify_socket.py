"""The socket of a service manager, played by a test: unread, read slowly, gone, and back again.

Only the socket is played: that a real systemd stores, and gives back, is tests/systemd's to show.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from pathlib import Path


class NotifySocket:
    """Bound to a path from the start, and read from `read()` on, by a thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.said: list[bytes] = []
        self.stored: dict[str, list[int]] = {}  # by FDNAME
        self._stores = True
        self._end, self._ended = os.pipe()
        self._reader: threading.Thread | None = None
        self._bind()

    def _bind(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))

    def read(self, *, delay: float = 0.0, stores: bool = True) -> None:
        """Begin to read, and to store as systemd does; each message `delay` seconds late."""
        self._stores = stores
        self._reader = threading.Thread(target=self._read, args=(delay,), daemon=True)
        self._reader.start()

    def reload_without_a_store(self) -> None:
        """Read a FileDescriptorStoreMax= of 0: what is stored is dropped, and nothing is stored any
        more. The directory of generators is made anew before."""
        (self.path.parent / "generator").mkdir()
        self._stores = False
        for name in list(self.stored):
            self._close(self.stored.pop(name))

    def _read(self, delay: float) -> None:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.register(self._end, select.POLLIN)
        while True:
            if self._end in dict(poll.poll()):
                return
            time.sleep(delay)  # as slow as it was told to be
            message, fds, _, _ = socket.recv_fds(self._socket, 4096, 253)
            self.said.append(message)
            lines = dict(line.split(b"=", 1) for line in message.split(b"\n"))
            name = lines.get(b"FDNAME", b"").decode()
            if b"FDSTOREREMOVE" in lines:
                self._close(self.stored.pop(name, []))
            if b"FDSTORE" in lines and self._stores:
                self.stored.setdefault(name, []).extend(fds)
                if lines.get(b"FDPOLL") == b"1":
                    self._watch(fds)
            else:
                self._close(fds)

    @staticmethod
    def _watch(fds: list[int]) -> None:
        """Poll each once, as an event loop does with what it has just been given."""
        poll = select.poll()
        for fd in fds:
            poll.register(fd, select.POLLHUP)
        poll.poll(0)

    @staticmethod
    def _close(fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)

    def go(self) -> None:
        """Go away, as a manager that ends: what it stored is lost."""
        if self._reader is not None:
            os.write(self._ended, b"x")
            self._reader.join()
            os.read(self._end, 1)
            self._reader = None
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        for fds in self.stored.values():
            self._close(fds)
        self.stored.clear()

    def back(self) -> None:
        """Come back at the same path, unread."""
        self._bind()

    def close(self) -> None:
        self.go()
        os.close(self._end)
        os.close(self._ended)

"""What the system calls of a hand-over cost in Python: a daemon that makes those of cprd, and
nothing else. No check, no life cycle, no record, no log, no event loop but epoll.

    .venv/bin/python benchmarks/bare_daemon.py SOCKET
"""

from __future__ import annotations

import _socket as socket
import fcntl
import os
import select
import sys
from typing import Any

import msgpack

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from cprd.linux.rights import queued, scm_fds, send, seqpacket_pair, unread

SIZES = {"save": 351, "load": 500, "confirm": 317}  # bytes of cprd's records
SHELF_FULL = 250  # messages


class Bare:
    def __init__(self, path: str) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(path)
        self.listener.listen(64)
        self.epoll, self.watch = select.epoll(), select.epoll()
        self.epoll.register(self.listener, select.EPOLLIN)
        self.connections: dict[int, socket.socket] = {}
        self.queues: dict[int, socket.socket] = {}  # by connection
        self.holds: dict[str, tuple[socket.socket, int]] = {}  # bundles and generations
        self.journal, self.end = os.memfd_create("journal"), 0
        self.claimants: dict[str, int] = {}  # pidfds
        self.waiting: dict[str, tuple[int, socket.socket, Any]] = {}  # loads of what is not held
        self.pidfd = os.pidfd_open(os.getpid())
        self.generation = 1 << 40
        self.shelf, self.outlet = seqpacket_pair()
        self.shelf.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self.on_shelf = 0
        self.pack = msgpack.Packer().pack

    def serve(self) -> None:
        while True:
            for fd, _ in self.epoll.poll():
                if fd == self.listener.fileno():
                    accepted, _ = self.listener._accept()  # type: ignore[attr-defined]
                    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, accepted)
                    self.connections[accepted] = sock
                    self.epoll.register(sock, select.EPOLLIN)
                else:
                    self.answer(fd, self.connections[fd])

    def answer(self, fd: int, sock: socket.socket) -> None:
        try:
            data = sock.recv(16385, socket.MSG_DONTWAIT)
        except ConnectionResetError:
            data = b""
        if not data:
            self.epoll.unregister(fd)
            self.connections.pop(fd).close()
            return
        request = msgpack.unpackb(data)
        name = request.get("name", "")
        if request["verb"] == "load" and name not in self.holds:
            self.waiting[name] = fd, sock, request
            return
        self.carry_out(fd, sock, request)
        if name in self.holds and name in self.waiting:
            self.carry_out(*self.waiting.pop(name))

    def carry_out(self, fd: int, sock: socket.socket, request: Any) -> None:
        fields, given = getattr(self, request["verb"])(fd, sock, request)
        ok = self.pack({"id": request["id"], "ok": fields})
        send(sock, ok, (given,) if given >= 0 else ())
        if given >= 0:
            os.close(given)
        if request["verb"] == "confirm":
            self.holds.pop(request["name"])[0].close()

    def hello(self, *_: Any) -> tuple[dict[str, Any], int]:
        fields = {"version": 2, "server": "bare", "uid": os.getuid(), "pid": os.getpid()}
        return {**fields, "lease_by": [], "kept": "memory", "limits": {}}, -1

    def queue(self, fd: int, *_: Any) -> tuple[dict[str, Any], int]:
        inlet, self.queues[fd] = seqpacket_pair()
        self.watch.register(self.queues[fd], 0)
        return {}, inlet.detach()

    def save(self, fd: int, sock: socket.socket, request: Any) -> tuple[dict[str, Any], int]:
        bundle = self.queues.pop(fd)
        self.watch.unregister(bundle)
        bundle.shutdown(socket.SHUT_RD)
        queued(bundle)
        scm_fds(bundle.fileno())
        self.park(bundle.fileno())
        self.record("save")
        self.generation += 1
        self.holds[request["name"]] = bundle, self.generation
        unread(sock)
        _, inlet = self.queue(fd)
        return {"generation": self.generation, "kept": "memory"}, inlet

    def load(self, fd: int, sock: socket.socket, request: Any) -> tuple[dict[str, Any], int]:
        bundle, generation = self.holds[request["name"]]
        token, pidfd = os.urandom(16), fcntl.fcntl(self.pidfd, fcntl.F_DUPFD_CLOEXEC, 0)
        self.park(pidfd)
        self.record("load")
        self.watch.register(pidfd, select.EPOLLIN)
        self.claimants[request["name"]] = pidfd
        said: dict[str, Any] = {
            "generation": generation,
            "token": token,
            "kept": "memory",
            "attempts": 1,
        }
        return {**said, "lease": 30.0, "saver": os.getpid(), "saver_uid": os.getuid()}, os.dup(
            bundle.fileno()
        )

    def confirm(self, fd: int, sock: socket.socket, request: Any) -> tuple[dict[str, Any], int]:
        self.record("confirm")
        pidfd = self.claimants.pop(request["name"])
        self.watch.unregister(pidfd)
        os.close(pidfd)
        return {"kept": "memory"}, -1

    def record(self, verb: str) -> None:
        self.end += os.pwrite(self.journal, bytes(SIZES[verb]), self.end % (1 << 20))

    def park(self, fd: int) -> None:
        send(self.shelf, bytes(19), (fd,))
        self.on_shelf += 1
        if self.on_shelf < SHELF_FULL:
            return
        for _ in range(self.on_shelf):
            self.outlet.recv(1)
        self.on_shelf = 0


if __name__ == "__main__":
    bare = Bare(sys.argv[1])
    print("ready", flush=True)
    bare.serve()

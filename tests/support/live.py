"""A small client of live holds, by hand: verbs as messages, and the library of live holds."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from cprd.linux.processes import is_ready
from cprd.linux.rights import receive
from cprd.live import carrier
from cprd.live.owner import Owner
from cprd.live.queue import make_pair
from cprd.live.reader import Found, read
from cprd.live.shape import SHAPE, Shape
from cprd.live.takeover import take_over
from cprd.protocol import messages
from tests.support.patience import PATIENCE
from tests.support.wire import HELLO, queue, read_answer, request


def hold_nonce() -> int:
    return int.from_bytes(os.urandom(7), "big") + 1


class Live:
    """A connection, and the live hold that it began or took. Closes everything at the end."""

    def __init__(
        self,
        path: str,
        name: str,
        *,
        wait: float = 0.0,
        nonce: bytes = b"",
        shape: Shape = SHAPE,
        root: int = -1,
    ) -> None:
        """Ask for `name`. `root`: to park instead of a root. Raises what cprd answers."""
        self.shape = shape
        self.path = path
        self.name = name
        self.sock = self.connect()
        self.owner: Owner | None = None
        self.found: Found | None = None
        self.bundle = -1
        self.tx, self.rx = make_pair()
        self.root = os.dup(self.rx.fileno() if root < 0 else root)
        try:
            fields = {"name": name, "wait": wait, "lease": 60.0}
            self.answer = self._parked("live", fields, nonce or messages.nonce())
        except BaseException:
            self.close()
            raise
        if not self.answer["found"]:
            self.own(Owner(self.tx, self.rx, hold_nonce(), shape=self.shape))

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(PATIENCE)
        sock.connect(self.path)
        sock.send(HELLO)
        read_answer(sock.recv(messages.MAX_ANSWER))
        return sock

    def reconnect(self) -> None:
        self.sock.close()
        self.sock = self.connect()

    @property
    def has_lost_cprd(self) -> bool:
        """Whether the connection has ended."""
        return is_ready(self.sock.fileno())

    def own(self, owner: Owner) -> None:
        self.owner = owner

    @property
    def kept(self) -> Owner:
        assert self.owner is not None
        return self.owner

    @property
    def ticket(self) -> dict[str, Any]:
        return {"name": self.name, **{key: self.answer[key] for key in ("generation", "token")}}

    def ask(self, verb: str, **fields: Any) -> dict[str, Any]:
        """One request and the answer; again on another connection, where cprd ends meanwhile."""
        return self._until_answered(lambda: self._ask(verb, fields))

    def _ask(self, verb: str, fields: dict[str, Any]) -> dict[str, Any]:
        self.sock.send(request(verb, **fields))
        data, fds, _ = receive(self.sock, messages.MAX_ANSWER)
        if not data:
            raise ConnectionResetError
        answer = read_answer(data)
        if fds:
            self.bundle = fds[0]
        return answer

    def _parked(self, verb: str, fields: dict[str, Any], nonce: bytes) -> dict[str, Any]:
        def act() -> dict[str, Any]:
            with queue(self.sock) as inlet:
                carrier.park(inlet, self.root)
                return self._ask(verb, {**fields, **carrier.PARKED, "live": True, "nonce": nonce})

        return self._until_answered(act)

    def _until_answered(self, act: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                return act()
            except (OSError, messages.Garbled):
                assert time.monotonic() < end
                time.sleep(0.005)
                with contextlib.suppress(OSError, messages.Garbled):
                    self.reconnect()

    def read(self) -> Found:
        """What a predecessor left."""
        root = carrier.root_of(self.bundle)
        try:
            self.found = read(root)
        finally:
            os.close(root)
        return self.found

    def confirm(self) -> Owner:
        """Take over, confirm, and own."""
        found = self.found or self.read()
        hold = found.hold or hold_nonce()
        owner = take_over(found, self.tx, self.rx, hold=hold, shape=self.shape)
        self.own(owner)
        self.answer |= self.confirm_root()
        owner.settle()
        return owner

    def new_owner(self) -> Owner:
        """An owner of nothing yet, for a state that was saved."""
        self.own(Owner(self.tx, self.rx, hold_nonce(), shape=self.shape))
        return self.kept

    def confirm_root(self) -> dict[str, Any]:
        return self._parked("confirm_next", self.ticket, messages.nonce())

    def end(self, *, keep: bool) -> None:
        if not keep:
            self.kept.clear()
        self.ask("end", **self.ticket, keep=keep, nonce=messages.nonce())

    def put_back(self) -> dict[str, Any]:
        return self._parked("put_back", self.ticket, messages.nonce())

    def close(self) -> None:
        if self.owner is not None:
            self.owner.close()
        else:
            self.tx.close()
            self.rx.close()
        if self.found is not None:
            self.found.close()
            self.found.state.close()
        for fd in (self.bundle, self.root):
            if fd >= 0:
                os.close(fd)
        self.bundle = self.root = -1
        self.sock.close()

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

"""Requests as bytes, for tests that speak the protocol by hand."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any

from cprd.errors import CprdError
from cprd.linux.rights import SO_PEEK_OFF, close_all, receive, send
from cprd.protocol import messages
from tests.support.patience import PATIENCE


def request(verb: str, **fields: Any) -> bytes:
    return messages.encode({"verb": verb, **fields})


HELLO = request("hello", version=messages.VERSION)


def read_answer(data: bytes) -> messages.Message:
    """The "ok" map of an answer. Raises the error that the daemon raised."""
    _, said = messages.parse_answer(data)
    if isinstance(said, CprdError):
        raise said
    return said


def silent(path: str) -> socket.socket:
    """A connection that has said nothing."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(PATIENCE)
    sock.connect(path)
    return sock


def load(name: str, wait: float = 0.0) -> bytes:
    nonce = messages.nonce()
    return request("load", name=name, wait=wait, lease=600.0, nonce=nonce)


def queue(sock: socket.socket) -> socket.socket:
    """Ask for a queue on a connection that has said hello. Returns the sending end. Raises what
    cprd answers."""
    sock.send(request("queue"))
    data, fds, _ = receive(sock, messages.MAX_ANSWER)
    try:
        assert read_answer(data) == {}
    except BaseException:
        close_all(fds)
        raise
    (fd,) = fds
    return socket.socket(fileno=fd)


def park(sock: socket.socket, bundle: int) -> socket.socket:
    """Ask for a queue, and park a copy of all that is queued in `bundle` (borrowed). Returns the
    sending end: closed before the answer to the save, it takes the bundle back."""
    inlet = queue(sock)
    for data, fds in contents(bundle):
        send(inlet, data, fds)
        close_all(fds)
    return inlet


def contents(bundle: int) -> list[tuple[bytes, Sequence[int]]]:
    """All messages of a queue, left there. The descriptors are the caller's."""
    found: list[tuple[bytes, Sequence[int]]] = []
    with socket.socket(fileno=os.dup(bundle)) as outlet:
        outlet.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
        try:
            while True:
                try:
                    data, fds, _ = receive(outlet, 65536, socket.MSG_PEEK | socket.MSG_DONTWAIT)
                except BlockingIOError:
                    return found
                if not data:
                    return found
                found.append((data, fds))
        finally:
            outlet.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, -1)


def save(
    name: str, fds: int, size: int, parked: int, depth: int = 0, **more: Any
) -> dict[str, Any]:
    """The fields of a save."""
    return {
        **{"name": name, "fds": fds, "bytes": size, "parked": parked, "depth": depth},
        **{"nonce": messages.nonce(), **more},
    }

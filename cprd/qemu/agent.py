"""The guest agent (qemu-ga) of a guest: sets the guest's clock, which stood still in a hold.

The agent speaks JSON lines over a virtio port, whose other end is a UNIX socket at which the QEMU
listens: -chardev socket,path=PATH,server=on,wait=off and -device virtserialport,...,
name=org.qemu.guest_agent.0.
"""

from __future__ import annotations

import json
import os
import socket
import time

from cprd.qemu import signals
from cprd.qemu.errors import Failed
from cprd.qemu.signals import Deadline

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

PATIENCE = 15.0  # s: a guest that has slept has other things to do first
_CHUNK = 1 << 16


def set_time(path: str) -> None:
    """Set the clock of the guest whose agent is behind the socket at `path` to that of this host.
    Blocks for PATIENCE s at most. Raises Failed."""
    deadline = Deadline(PATIENCE)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.setblocking(False)
            sock.connect(path)
            number = int.from_bytes(os.urandom(4), "big")
            # 0xff ends what an earlier client may have left half said.
            _send(sock, b"\xff", "guest-sync", id=number)
            messages = _messages(sock, deadline)
            while next(messages).get("return") != number:
                pass
            _send(sock, b"", "guest-set-time", time=time.time_ns())
            answer = next(messages)
    except (OSError, StopIteration) as error:
        raise Failed(f"no guest agent answers at {path} ({error or 'silence'})") from None
    if "error" in answer:
        raise Failed(f"the guest agent says: {answer['error'].get('desc', answer['error'])}")


def _send(sock: socket.socket, before: bytes, command: str, **arguments: Any) -> None:
    said = json.dumps({"execute": command, "arguments": arguments})
    sock.sendall(before + said.encode() + b"\n")


def _messages(sock: socket.socket, deadline: Deadline) -> Iterator[dict[str, Any]]:
    """Each message of the agent; ends with the connection, or the time."""
    partial = b""
    while signals.readable(sock.fileno(), deadline.left()):
        try:
            data = sock.recv(_CHUNK)
        except BlockingIOError:
            continue
        if not data:
            return
        *lines, partial = (partial + data).split(b"\n")
        for line in lines:
            try:
                message = json.loads(line.lstrip(b"\xff"))
            except ValueError:
                continue
            if isinstance(message, dict):
                yield message

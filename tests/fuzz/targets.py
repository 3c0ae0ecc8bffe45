"""Every decoder, with bytes that were recorded and the errors that a decoder may raise."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from typing import NamedTuple

from cprd import vmstate
from cprd.bundle import layout
from cprd.daemon.storage import record, shelf
from cprd.daemon.storage.journal import Journal
from cprd.errors import Busy, Damaged, LimitExceeded, ProtocolError
from cprd.linux import listen_fds
from cprd.protocol import messages
from cprd.qemu import stream
from tests.daemon import test_recorded as recorded
from tests.support import wire
from tests.vmstate.test_vmstate import THING, load_thing, thing


class Target(NamedTuple):
    decode: Callable[[bytes], object]
    errors: tuple[type[Exception], ...]
    seeds: tuple[bytes, ...]


def _shelf(data: bytes) -> object:
    """A shelf of two messages, without descriptors."""
    tx, outlet = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with tx, outlet:
        tx.setblocking(False)
        for message in (recorded.SHELF_HEADER, data[: shelf.MAX_RECORD] or b"\0"):
            with contextlib.suppress(BlockingIOError):
                tx.send(message)
        return shelf.read(outlet)


def _journal(data: bytes) -> object:
    """Read what lies in a journal, append where all is whole, and read again."""
    journal = Journal.create()
    try:
        os.pwrite(journal.fd, data, 0)
        before = [found for _, found, whole in journal.records() if whole]
        if not journal.strange:  # else nobody appends
            journal.append(b"record")
            before.append(b"record")
        assert [found for _, found, whole in journal.records() if whole] == before
        return before
    finally:
        journal.close()


def _stream(data: bytes) -> object:
    return stream.is_whole(data), stream.run_state(data), stream.machine(data)


def _listen_fds(data: bytes) -> object:
    """The variables, a line each. Another process is meant: no descriptor is touched."""
    values = (data.decode("utf-8", "surrogateescape").split("\n") + [""] * 4)[:4]
    environ = dict(zip(listen_fds.VARIABLES, values, strict=False))
    if environ["LISTEN_PID"] == str(os.getpid()):
        return None
    return listen_fds.take(environ)


def _header(data: bytes) -> object:
    return layout.Header(data)


_LOAD = wire.load("web")
_ROWS = messages.encode(messages.ok(holds=[{"name": "web", "age": 1.5}], more=None))
_BUSY = messages.encode({"error": "Busy", "why": "x", "pid": 1, "phase": "held", "until": 2.5})
_GLOBAL = b"\x0bglobalstate\0\0\0\1\0\0\0\1\0\0\0\x08running\0"
_MAIN = b"QEVM\0\0\0\3\x07\0\0\0\5pc-q35" + _GLOBAL + b"\0\6\0\0\0\2{}"

TARGETS = {
    "read_request": Target(
        messages.read_request, (ProtocolError,), (wire.HELLO, _LOAD, wire.request("status"))
    ),
    "parse_answer": Target(messages.parse_answer, (messages.Garbled,), (_ROWS, _BUSY)),
    "record": Target(
        record.decode,
        (record.Unreadable, ValueError),
        (recorded.EARLY_RECORD, recorded.CLAIMED_RECORD_2, recorded.CLAIMED_RECORD_6),
    ),
    "journal": Target(_journal, (), (recorded.JOURNAL,)),
    "shelf": Target(
        _shelf,
        (),
        (
            *(recorded.SHELF_SLOTS, recorded.SHELF_OUTCOMES, recorded.SHELF_COMPLETE),
            *(recorded.SHELF_QUEUES, recorded.SHELF_PIDFDS),
        ),
    ),
    "header": Target(_header, (Damaged, Busy), (recorded.BUNDLE,)),
    "manifest": Target(
        lambda data: layout.decode_manifest(data, 10),
        (Damaged, Busy, LimitExceeded),
        (recorded.MANIFEST,),
    ),
    "vmstate": Target(load_thing, (vmstate.VMStateError,), (vmstate.encode(THING, thing()).data,)),
    "stream": Target(_stream, (Damaged,), (_MAIN,)),
    "listen_fds": Target(_listen_fds, (ProtocolError,), (b"3\n1\na:b:c\n7", b"1\n2\n\n")),
}


def run(name: str, data: bytes) -> None:
    """Decode; any error but those meant is the caller's finding."""
    target = TARGETS[name]
    with contextlib.suppress(*target.errors):
        target.decode(data)

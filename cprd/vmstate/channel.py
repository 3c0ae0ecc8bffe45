"""How a stream and its descriptors travel: a UNIX stream socket, or memory.

Sending: the plain bytes so far, then each dummy byte in a separate message with a single
descriptor, as QEMU does. Receiving: any arrangement with no descriptor later than the dummy byte.
Lost control data (MSG_CTRUNC) is an error, never a shorter list.
"""

from __future__ import annotations

import _socket  # without the enums of socket, which take 5 ms to import
import errno
import os
import select
import time
from types import SimpleNamespace

from cprd.errors import InvalidInput, LimitExceeded, Timeout, Unavailable
from cprd.linux import rights
from cprd.linux.rights import close_all
from cprd.vmstate.description import VMStateDescription, encode, get, place
from cprd.vmstate.stream import Source, Stream, VMStateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence
    from typing import Any, Self

_CHUNK = 1 << 16

MAX_BYTES = 64 << 20
"""Bytes that `drain` keeps. QEMU's CPR state has 17 to 265 bytes a descriptor."""
MAX_FDS = 1 << 16
"""Descriptors that `drain` keeps; RLIMIT_NOFILE is nearly always lower."""


class Channel:
    """Carries bytes, and descriptors in order. close() closes what the channel still owns."""

    def send(self, data: bytes, fd: int = -1) -> None:
        """Send all of `data`; with `fd` (borrowed) `data` is the dummy byte."""
        raise NotImplementedError

    def receive(self) -> tuple[bytes, list[int]]:
        """Some bytes and descriptors, the caller's from now on. No bytes: the end. Raises
        LimitExceeded when descriptors were lost on the way (the others are closed; to go on
        receiving lets the sender finish)."""
        raise NotImplementedError

    def finish(self) -> None:
        """Tell the receiver that nothing follows (half-close): QEMU's loader waits for that."""

    def close(self) -> None:
        """Let go of everything; again is harmless."""

    def send_stream(self, stream: Stream) -> None:
        """Send a whole stream. The descriptors stay borrowed."""
        for data, number in stream.pieces():
            self.send(data, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class SocketChannel(Channel):
    """Over a connected AF_UNIX SOCK_STREAM socket, the channel's from now on.

    `timeout`: seconds for all steps from now on together (a peer that drips bytes does not stretch
    the time); `restart_clock` begins anew. None waits for ever. The blocking mode of the socket is
    neither used nor changed."""

    def __init__(self, sock: socket.socket, timeout: float | None = None) -> None:
        if sock.family != _socket.AF_UNIX or sock.type != _socket.SOCK_STREAM:
            raise InvalidInput(
                f"a channel needs a UNIX stream socket, this is {sock.family.name} {sock.type}"
            )
        self.sock = sock
        self.restart_clock(timeout)

    def restart_clock(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._deadline = None if timeout is None else time.monotonic() + timeout

    def fileno(self) -> int:
        return self.sock.fileno()

    def _wait(self, event: int, what: str) -> None:
        poll = select.poll()
        poll.register(self.sock, event)
        left = None if self._deadline is None else self._deadline - time.monotonic()
        if (left is not None and left <= 0) or not poll.poll(
            None if left is None else left * 1000 + 1
        ):
            raise Timeout(f"{what} within {self._timeout:g} s; the peer is stuck or slow")

    def send(self, data: bytes, fd: int = -1) -> None:
        if fd >= 0 and len(data) != 1:
            raise InvalidInput(f"a descriptor goes with one byte, not with {len(data)}")
        rest = memoryview(data)
        while rest:
            try:
                if fd >= 0:
                    rights.send(self.sock, data, [fd])
                    return
                rest = rest[self.sock.send(rest, _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                self._wait(select.POLLOUT, "the peer did not read the stream")
            except OSError as exc:
                if exc.errno == errno.EBADF and self.sock.fileno() >= 0:
                    raise InvalidInput(f"descriptor {fd} to send is not open") from exc
                raise Unavailable(f"the connection broke while sending: {exc}") from exc

    def receive(self) -> tuple[bytes, list[int]]:
        while True:
            # Looked at on each round: a peer that always has a byte ready never makes us wait.
            if self._deadline is not None and time.monotonic() >= self._deadline:
                raise Timeout(f"the stream did not end within {self._timeout:g} s")
            try:
                data, fds, flags = rights.receive(self.sock, _CHUNK, _socket.MSG_DONTWAIT)
            except BlockingIOError:
                self._wait(select.POLLIN, "the stream did not end")
            except OSError as exc:
                raise Unavailable(f"the connection broke while receiving: {exc}") from exc
            else:
                break
        if flags & _socket.MSG_CTRUNC:
            close_all(fds)
            raise LimitExceeded(
                f"descriptors were lost on receiving (MSG_CTRUNC, {len(fds)} arrived): this "
                "process is at its RLIMIT_NOFILE; raise it (ulimit -n, LimitNOFILE=) and repeat"
            )
        return data, fds.tolist()

    def finish(self) -> None:
        try:
            self.sock.shutdown(_socket.SHUT_WR)
        except OSError as exc:
            raise Unavailable(f"the connection broke before the stream's end: {exc}") from exc

    def wait_hangup(self) -> None:
        """Wait until the peer has closed (or half-closed): so QEMU says that the CPR state is
        loaded. Raises VMStateError for anything that the peer sends."""
        data, fds = self.receive()
        close_all(fds)
        if data:
            raise VMStateError(f"the receiver answered {len(data)} bytes where it only hangs up")

    def close(self) -> None:
        self.sock.close()


class Tape(Channel):
    """A channel in memory, to record a stream, and to replay a stream.

    Owns `fds`, unless the constructor raises. `offsets[k]` is where in `data` descriptor k
    arrived."""

    def __init__(
        self, data: bytes = b"", fds: Sequence[int] = (), offsets: Sequence[int] | None = None
    ) -> None:
        places = [0] * len(fds) if offsets is None else list(offsets)
        if len(places) != len(fds) or places != sorted(places):
            raise InvalidInput("offsets: one for each descriptor, in rising order")
        if places and not (places[0] >= 0 and places[-1] < len(data)):
            raise InvalidInput("offsets: a descriptor must lie beside a byte of the stream")
        self.data = bytearray(data)
        self.fds = list(fds)
        self.offsets = places
        self._read = 0

    def send(self, data: bytes, fd: int = -1) -> None:
        """As a socket does: keeps a duplicate of the descriptor."""
        self.feed(data, [os.dup(fd)] if fd >= 0 else [])

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Append what was received together; `fds` become the tape's."""
        self.offsets += [len(self.data)] * len(fds)
        self.fds += fds
        self.data += data

    def receive(self) -> tuple[bytes, list[int]]:
        count = sum(1 for place in self.offsets if place <= self._read)
        end = self.offsets[count] if count < len(self.offsets) else len(self.data)
        data = bytes(self.data[self._read : end])
        fds = self.fds[:count]
        del self.fds[:count], self.offsets[:count]
        self._read = end
        return data, fds

    def take_fds(self) -> list[int]:
        """All descriptors, in order: the caller's from now on."""
        fds = self.fds
        self.fds, self.offsets = [], []
        return fds

    def close(self) -> None:
        close_all(self.take_fds())


class Reader(Source):
    """Reads from a channel while the stream is still arriving: ahead, so that a channel has a
    single reader for good. Owns received descriptors until each is handed out; close() closes the
    others, never the channel."""

    __slots__ = ("channel",)

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self.channel = channel

    def _pull(self) -> bool:
        data, fds = self.channel.receive()
        self._arrive(data, fds)
        return bool(data)

    def close(self) -> None:
        close_all(number for _, number in self._arrived)
        self._arrived.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def drain(channel: Channel, max_bytes: int = MAX_BYTES, max_fds: int = MAX_FDS) -> Tape:
    """Read a channel to the end, whatever comes, and only then judge.

    A sender that is cut off in the middle may crash (QEMU 11.1 does). So a stream that is lost
    already, by lost descriptors or a limit, is read on and thrown away. The tape, the caller's,
    owns the descriptors; after an error all are closed."""
    tape = Tape()
    failure: LimitExceeded | None = None
    thrown = 0
    try:
        while True:
            try:
                data, fds = channel.receive()
            except LimitExceeded as exc:
                failure = failure or exc
                tape.close()
                thrown += _CHUNK  # at most
                if thrown > 4 * max_bytes:
                    break
                continue
            tape.feed(data, fds)
            if not data:
                break
            if failure is None and (len(tape.data) > max_bytes or len(tape.fds) > max_fds):
                failure = LimitExceeded(
                    f"the stream has more than {max_bytes} bytes or {max_fds} descriptors"
                )
            if failure is not None:
                tape.close()
                thrown += len(tape.data)
                tape.data.clear()
                if thrown > 4 * max_bytes:
                    break
        if failure is not None:
            raise failure
    except BaseException:
        tape.close()
        raise
    return tape


def as_channel(where: Channel | socket.socket | int, timeout: float | None = None) -> Channel:
    """A channel over a channel (returned as is), a connected UNIX stream socket (the channel's from
    now on; without `timeout` that of the socket counts), or a number (duplicated)."""
    if isinstance(where, Channel):
        return where
    if isinstance(where, int):
        import socket

        sock = socket.socket(fileno=os.dup(where))
        try:
            return SocketChannel(sock, timeout)
        except BaseException:
            sock.close()
            raise
    return SocketChannel(where, timeout if timeout is not None else where.gettimeout() or None)


def save(channel: Channel, vmsd: VMStateDescription, obj: Any, version: int | None = None) -> None:
    """Encode and send; of an object that does not fit, nothing. Descriptors stay the caller's. Does
    not half-close: call `channel.finish()` when nothing follows."""
    channel.send_stream(encode(vmsd, obj, version))


def load(
    reader: Reader, vmsd: VMStateDescription, obj: Any = None, version: int | None = None
) -> Any:
    """Load a state from a stream that goes on (`reader.finish()` says whether the stream ended).
    Returns `obj`, or a new SimpleNamespace, which owns the descriptors from then on. After an error
    all descriptors of this load are closed, and no attribute names any."""
    obj = SimpleNamespace() if obj is None else obj
    reader.taken, reader.assigned = [], []
    try:
        get(reader, vmsd, obj, vmsd.version_id if version is None else version)
    except BaseException as exc:
        close_all(reader.taken)
        for owner, name, blank in reader.assigned:
            setattr(owner, name, blank)
        if isinstance(exc, VMStateError):
            place(exc, vmsd, reader)
        raise
    finally:
        reader.taken, reader.assigned = [], []
    return obj

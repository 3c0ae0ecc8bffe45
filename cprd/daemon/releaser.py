"""The program behind `releasing`: python -I -S cprd/daemon/releaser.py fork|hold.

Standard input is a socket. `fork` forks a releaser for each socket received there. A releaser lets
go of whatever arrives at its socket, and acknowledges each message with a byte. A close may block
for ever, in the kernel, beyond any signal: nobody waits for a releaser. `hold` keeps inherited
descriptors until the daemon has gone, and ends. Standard library only, and little of the library: a
releaser costs some hundred KiB of its own.
"""

from __future__ import annotations

import _socket
import os
import signal
import struct
import sys
from array import array

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

CLOSE = b"c"  # close the descriptors of a message, once the daemon has closed its copies
CLOSED = b"o"  # the daemon has: whoever closes last may block
DRAIN = b"d"  # drop all that is queued in bundles and slots; close
WHOLE = b"w"  # let go of a live hold by the bundle: all that is kept; close
ROOT = b"r"  # the same, but for the segments, which another hold has
LET_GO = b"g"  # the acknowledgement of WHOLE and ROOT
FENCE = b"f"  # let nobody change the live hold in a bundle: no change of the owner counts any more
COUNT = b"n"  # acknowledge how much lies in the live hold in a bundle (COUNTED)
FENCED = b"F"  # the acknowledgement of FENCE
AFTER = b"a"  # close the descriptors of a message after the end of the daemon
MOST = 200  # descriptors in a message
LIVING, HANDED_ON = 4, 5  # versions of the last record of a live hold (storage/record.py)
_LAST = struct.Struct("<4sHIQB")  # the prefix of a record
COUNTED = struct.Struct("<QQ")
_MAGIC = b"CPRS"
_RECORD = 1 << 16  # bytes at most, of records in slots and in live holds
_TURNS = 1024  # records of one queue
_PEEK = _socket.MSG_PEEK | _socket.MSG_DONTWAIT
_SO_PEEK_OFF, _SO_DOMAIN = 42, 39
_SPACE = _socket.CMSG_SPACE(253 * 4)  # the kernel's limit


def received(sock: _socket.socket) -> tuple[bytes, list[int]]:
    """The next message and the descriptors, owned by the caller; no byte at the end."""
    return _received(sock, 1, _socket.MSG_CMSG_CLOEXEC)


def _received(sock: _socket.socket, size: int, how: int) -> tuple[bytes, list[int]]:
    data, ancillary, flags, _ = sock.recvmsg(size, _SPACE, how)
    fds = array("i")
    for level, kind, raw in ancillary:
        if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS):
            fds.frombytes(raw[: len(raw) - len(raw) % 4])
    if flags & _socket.MSG_CTRUNC:
        for fd in fds:
            os.close(fd)
        return b"", []  # no descriptor left: an end instead of a false acknowledgement
    return data, list(fds)


def empty(fd: int) -> None:
    """Drop everything queued in a socket. Blocks as long as a dropped file does."""
    sock = _socket.socket(fileno=os.dup(fd))
    _drop(sock)
    sock.close()


def _drop(sock: _socket.socket) -> None:
    while True:
        try:
            # An empty message looks like the end.
            if not sock.recv(1, _socket.MSG_DONTWAIT) and not _scm_fds(sock.fileno()):
                return
        except ConnectionResetError:  # said once, of what the other end left unread
            pass
        except OSError:
            return


def records(sock: _socket.socket | None, most: int = _TURNS) -> Iterator[tuple[bytes, list[int]]]:
    """The records of a queue with their descriptors, which are closed after each turn. Nothing is
    taken out. Closes `sock`."""
    if sock is None:
        return
    try:
        sock.setsockopt(_socket.SOL_SOCKET, _SO_PEEK_OFF, 0)
        for _ in range(most):
            try:
                data, fds = _received(sock, _RECORD, _PEEK | _socket.MSG_CMSG_CLOEXEC)
            except ConnectionResetError:  # said once, of what the other end left unread
                data, fds = _received(sock, _RECORD, _PEEK | _socket.MSG_CMSG_CLOEXEC)
            if not data:
                return
            try:
                yield data, fds
            finally:
                for one in fds:
                    os.close(one)
    except OSError:
        pass  # the end
    finally:
        sock.setsockopt(_socket.SOL_SOCKET, _SO_PEEK_OFF, -1)
        sock.close()


def _queue(fd: int) -> _socket.socket | None:
    """A copy of a SEQPACKET socket of AF_UNIX; None for anything else, for a client may park
    anything as a part of a live hold."""
    copy = os.dup(fd)
    try:
        sock = _socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        return None
    of = sock.getsockopt(_socket.SOL_SOCKET, _SO_DOMAIN)
    kind = sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_TYPE)
    if (of, kind) == (_socket.AF_UNIX, _socket.SOCK_SEQPACKET):
        return sock
    sock.close()
    return None


def shut(fd: int) -> bool:
    """Let nobody add to a queue. Returns whether `fd` is a queue."""
    sock = _queue(fd)
    if sock is None:
        return False
    try:
        sock.shutdown(_socket.SHUT_RD)
    except OSError:
        pass
    sock.close()
    return True


def fence(bundle: int) -> None:
    """Shut the live hold in a bundle."""
    for _, roots in records(_queue(bundle), 1):
        for root in roots:
            fence_root(root)


def fence_root(root: int) -> None:
    """Shut a live hold: first the root, then each segment."""
    shut(root)
    for _, segments in records(_queue(root)):
        for segment in segments:
            shut(segment)


def count(bundle: int) -> bytes:
    """How many descriptors the root of the live hold in a bundle has, and how many lie in the
    segments; no number where no root is found."""
    said = b"?"
    for _, roots in records(_queue(bundle), 1):
        for root in roots:
            found: dict[int, int] = {}  # by inode: a root that was rewritten has some twice
            for _, segments in records(_queue(root)):
                for segment in segments:
                    found[os.fstat(segment).st_ino] = _scm_fds(segment)
            queue = _queue(root)
            if queue is not None:
                queue.close()
                said = COUNTED.pack(_scm_fds(root), sum(found.values()))
    return said


def _scm_fds(fd: int) -> int:
    """Count the descriptors queued in a UNIX socket, without a read; 0 for anything else."""
    info = os.open(f"/proc/self/fdinfo/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _, _, found = os.read(info, 4096).partition(b"scm_fds:")
    finally:
        os.close(info)
    return int(found.split(None, 1)[0]) if found else 0


def let_go(slot: int) -> None:
    """Drain a slot, or a bundle. Of a live hold, as the last record in the slot says: all that is
    kept, wherever else an end of a queue is open still; or the root alone, whose segments another
    hold has."""
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM, 0, os.dup(slot))
    version = 0
    if sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_TYPE) == _socket.SOCK_DGRAM:  # no bundle
        sock.setsockopt(_socket.SOL_SOCKET, _SO_PEEK_OFF, -1)  # a killed reader leaves another
        try:
            version = _version(sock.recv(_LAST.size, _PEEK))  # as in every record
        except OSError:
            pass
    if version in (LIVING, HANDED_ON):
        _let_go_of_live(slot)  # should that fail, another releaser is asked
    _drop(sock)
    sock.close()


def _version(record: bytes) -> int:
    """The version of a record of a slot; 0: no record."""
    if len(record) < _LAST.size or record[:4] != _MAGIC:
        return 0
    version: int = _LAST.unpack_from(record)[1]
    return version


def _let_go_of_live(slot: int) -> None:
    bundles: list[int] = []
    version = 0
    for data, fds in records(_socket.socket(fileno=os.dup(slot))):
        bundles += [os.dup(fds[0])] if fds and not bundles else []
        if _version(data) and not data[_LAST.size - 1]:
            version = _version(data)
    for bundle in bundles:
        if version in (LIVING, HANDED_ON):
            for _, roots in records(_queue(bundle), 1):
                for root in roots:
                    let_go_of_root(root, deep=version == LIVING)
        os.close(bundle)


def let_go_of_live(bundle: int, deep: bool) -> None:
    """Drain the live hold in a bundle, then the bundle. Raises OSError where no descriptor is left
    to receive the root with: another releaser is asked. A client may park anything ahead of the
    root, and the bundle is drained all the same."""
    said = _scm_fds(bundle)
    for _, roots in records(_queue(bundle), 1):
        for root in roots:
            let_go_of_root(root, deep)
            said = 0
    if said:  # no root: was there no room for one, as there is none for two copies here?
        one = os.dup(bundle)
        try:
            os.close(os.dup(bundle))
        finally:
            os.close(one)
    empty(bundle)


def let_go_of_root(root: int, deep: bool) -> None:
    """Drain the root of a live hold; `deep`: first the segments, whoever else has an end of them.
    What is no queue is left alone."""
    if not shut(root):
        return
    if deep:
        for _, segments in records(_queue(root)):
            for segment in segments:
                if shut(segment):
                    empty(segment)
    empty(root)


def release(sock: _socket.socket) -> None:
    """Let go of everything that arrives, until the daemon has closed its end."""
    while True:
        kind, fds = received(sock)
        if not kind:
            return  # the end of this process closes the rest
        if kind == CLOSE:
            received(sock)  # CLOSED, or the end of the daemon
        said = b"."
        for fd in fds:
            if kind == DRAIN:
                let_go(fd)
            elif kind in (WHOLE, ROOT):
                let_go_of_live(fd, deep=kind == WHOLE)
                said = LET_GO
            elif kind == FENCE:
                fence(fd)
                said = FENCED
            elif kind == COUNT:
                said = count(fd)
            if kind != AFTER:
                os.close(fd)
        try:
            sock.send(said, _socket.MSG_NOSIGNAL)
        except OSError:
            pass  # the daemon has gone, and left more to release


def fork(wanted: _socket.socket) -> None:
    """Fork a releaser for each socket that arrives, until the daemon has closed its end."""
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # left open by whoever started the daemon
    while True:
        kind, fds = received(wanted)
        if not kind:
            return
        for fd in fds:
            if os.fork() == 0:
                wanted.close()
                release(_socket.socket(fileno=fd))
                os._exit(0)
            os.close(fd)


def main(what: str) -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(ignored, signal.SIG_IGN)  # SIGCHLD: ended releasers leave no zombie
    sock = _socket.socket(fileno=0)
    if what == "fork":
        fork(sock)
    else:
        sock.recv(1)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    finally:
        os._exit(0)

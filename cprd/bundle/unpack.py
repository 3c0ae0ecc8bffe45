"""Read a whole state out of a bundle.

A plain MSG_PEEK of the first message of each socket: nothing is consumed, there is no cursor, and
any number of readers disturb nobody.
"""

from __future__ import annotations

import _socket as socket  # as in rights
import errno
import os
from array import array

from cprd.bundle.layout import HEADER, LEAF, MAGIC, VERSION, Header, decode_manifest
from cprd.errors import Damaged, LimitExceeded
from cprd.linux.memfd import mapping, missing_seals
from cprd.linux.nofile import STAYS, check_room, cut_short, none_left
from cprd.linux.pause import point
from cprd.linux.rights import SO_PEEK_OFF, close_all, peek, queued
from cprd.state import InlineSection, MemfdSection, State
from cprd.state.descriptors import tail

_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT
_CTRUNC, _SOL_SOCKET = socket.MSG_CTRUNC, socket.SOL_SOCKET
_OURS = (errno.ENOMEM, errno.ENOBUFS)
SMALL = 64 * 1024  # bytes of a manifest; reading more touches more fresh pages than a mapping
_UNIX, _SEQPACKET = socket.AF_UNIX, socket.SOCK_SEQPACKET


def unpack(fd: int) -> State:
    """Peek a whole state out of a bundle; `fd` is borrowed, the bundle stays as before.

    The returned state owns the descriptors. Raises Damaged when anything is missing or too much,
    and LimitExceeded when the process has no room; no descriptor is left open then. Does not block.
    """
    carried = array("i")
    sock = as_socket(fd)
    try:
        root = _peek_header(sock)
        check_room(root.total, 8)
        _peek(sock, root.depth, root.index, carried)
        sock.close()
        point("load:peeked")
        return _state_of(root, carried)
    except BaseException:
        sock.close()
        close_all(carried)
        raise


def _peek(sock: socket.SocketType, depth: int, index: int, carried: array[int]) -> None:
    """Append all descriptors below one node to `carried`; the caller closes `carried` on an error.

    One look at each socket: four system calls for 253 descriptors. `sock` is borrowed, and reads
    another socket afterwards."""
    try:
        sock.setsockopt(_SOL_SOCKET, SO_PEEK_OFF, -1)
        data, fds, flags = peek(sock, HEADER.size + 1)
        waiting = queued(sock)
    except OSError as error:
        raise _unread("a part of the bundle cannot be read", error) from None
    count = len(fds)
    if (
        depth == 0 and count and waiting == HEADER.size and not flags & _CTRUNC
    ) and data == HEADER.pack(
        MAGIC, VERSION, LEAF, 0, count, count, 0, index
    ):  # as nearly always, 40 times for 10,000 descriptors
        carried.extend(fds)
        return
    try:
        header = Header(data)
        if flags & _CTRUNC:
            raise cut_short(f"a bundle with {header.total}")
        if len(fds) != header.here:
            raise Damaged(f"a part of the bundle says {header.here} descriptors, has {len(fds)}")
        if waiting != HEADER.size:
            raise Damaged("a part of the bundle has more than one message queued in it")
        if header.depth != depth or header.index != index:
            raise Damaged("the parts of the bundle are not in their places")
        if header.kind == LEAF:
            carried.extend(fds)
            fds = array("i")
            return
        before = len(carried)
        for number, child in enumerate(fds):
            os.dup2(child, sock.fileno(), inheritable=False)
            _peek(sock, depth - 1, number, carried)
        if len(carried) - before != header.total:
            raise Damaged(
                f"the bundle says {header.total} descriptors and holds {len(carried) - before}"
            )
    finally:
        close_all(fds)


def as_socket(fd: int) -> socket.SocketType:
    """A copy of `fd`, owned by the caller. An object with the number itself would close the number,
    perhaps much later, after an interrupt. Raises Damaged for anything but a socket, LimitExceeded.
    """
    try:
        copy = os.dup(fd)
    except OSError as error:
        raise none_left("to read a bundle with", error, STAYS) from None
    try:
        return socket.SocketType(_UNIX, _SEQPACKET, 0, fileno=copy)
    except OSError as error:
        os.close(copy)
        raise Damaged(f"not a bundle: {error.strerror}") from None


def _peek_header(sock: socket.SocketType) -> Header:
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, -1)
        for attempt in (1, 2):
            try:
                return Header(sock.recv(HEADER.size + 1, _PEEK))
            except ConnectionResetError:
                if attempt == 2:  # once is usual: its sender left something unread
                    raise
    except BlockingIOError:
        raise Damaged("not a whole bundle: nothing is queued in it") from None
    except OSError as error:
        raise _unread("not a bundle", error) from None
    raise AssertionError


def _unread(what: str, error: OSError) -> Exception:
    """What the reader lacks says nothing about a bundle."""
    if error.errno in _OURS:
        return LimitExceeded(
            f"no memory left to read a bundle with ({error.strerror}): raise the memory that this"
            " cgroup may use; what is held stays held"
        )
    return Damaged(f"{what}: {error.strerror}")


def _state_of(root: Header, carried: array[int]) -> State:
    """Make the state of `carried`; the state owns `carried` afterwards."""
    manifest = carried[0]
    _check_memfd(manifest, "the manifest")
    try:
        size = os.fstat(manifest).st_size
        if not size:
            raise Damaged("the manifest is empty")
        # A small manifest is read in a third of the time that a mapping takes.
        small = os.pread(manifest, size, 0) if size <= SMALL else b""
        mapped = None if small else mapping(manifest)
    except OSError as error:
        raise _unread("the manifest cannot be read", error) from None
    if mapped is None:
        names, ids, described = decode_manifest(small, root.total)
    else:
        with mapped, memoryview(mapped) as data:
            names, ids, described = decode_manifest(data, root.total)
    memfds = 0
    sections: dict[str, InlineSection | MemfdSection] = {}
    for key, packed, memfd, content in described:
        if memfd:
            memfds += 1
            if memfds >= len(carried):
                raise Damaged("the manifest names more sections than there are")
            _check_memfd(carried[memfds], f"section {key!r}")
            sections[key] = MemfdSection(carried[memfds], packed=packed, owned=True)
        else:
            sections[key] = InlineSection(content, packed=packed)
    fds = carried[1 + memfds :]
    if len(ids) != len(fds) or (sum(tail(names)[1:]) if fds else len(names)) != len(fds):
        raise Damaged(
            f"the manifest names {len(ids)} descriptors; there are {len(fds)}: an id and name each"
        )
    state = State.owning(names, ids, fds, sections)
    os.close(manifest)
    return state


def _check_memfd(fd: int, what: str) -> None:
    if missing_seals(fd) != []:
        raise Damaged(f"{what} of the bundle is not a sealed memfd")

"""Pack a whole state for the queue of ONE descriptor.

`pack` makes everything but the root; `Packed.park` puts the root into a queue, through the queue's
sending end. The receiving end of that queue is the bundle then."""

from __future__ import annotations

import _socket as socket  # as in rights; socket.socketpair() takes 10 us a pair to wrap its ends
import errno
import fcntl
import os
from array import array
from collections.abc import Sequence

from cprd.bundle.layout import (
    HEADER,
    INLINE,
    LEAF,
    MAGIC,
    MAX_DEPTH,
    NODE,
    VERSION,
    Section,
    encode_manifest,
)
from cprd.errors import InvalidInput, LimitExceeded
from cprd.linux.memfd import check_seals, sealed_memfd
from cprd.linux.nofile import hard_limit, none_left
from cprd.linux.pause import point
from cprd.linux.rights import SCM_MAX_FD, close_all, send
from cprd.state import MemfdSection, State

Columns = tuple[bytes, "array[int]", "array[int]"]
Root = tuple[bytes, Sequence[int], int]  # header, descriptors borrowed, depth
FEW = SCM_MAX_FD  # descriptors, of which each is looked at before packing: 0.15 us each
_fcntl, _GETFL, _APPEND = fcntl.fcntl, fcntl.F_GETFL, os.O_APPEND
_UNIX, _SEQPACKET = socket.AF_UNIX, socket.SOCK_SEQPACKET


class Packed:
    """A packed state apart from the queue of the root. Owns what packing made, until close()."""

    __slots__ = (
        *("_columns", "_forbidden", "_made", "_root", "_state"),
        *("depth", "fds", "parked", "size"),
    )

    def __init__(
        self,
        state: State,
        columns: Columns,
        root: Root,
        size: int,
        made: list[int],
        forbidden: Sequence[int],
    ) -> None:
        self.parked = len(root[1])  # descriptors in the root's message
        self.depth = root[2]  # of the root; 0: it is a leaf
        self.fds = len(columns[2])  # descriptors under keys
        self.size = size  # bytes of all sections
        self._state = state
        self._columns = columns
        self._root = root
        self._made = made
        self._forbidden = forbidden

    def park(self, inlet: socket.SocketType) -> None:
        """Send the root into the queue whose sending end is `inlet` (borrowed). Can be repeated,
        with other queues, until close(). Does not block.

        Raises InvalidInput (naming the key), LimitExceeded (naming the limit), BrokenPipeError
        when nobody has the receiving end."""
        header, fds, _ = self._root
        # What was made here cannot have the number of a descriptor that is to be saved, unless that
        # one was closed since: a file of our own would travel in its place. All are still open.
        ours = {*self._made, *self._forbidden, inlet.fileno()}
        if self._state.has_any(ours):
            _refuse_cycles(self._columns, self._forbidden)
            raise _closed_before(ours, self._columns)
        try:
            send(inlet, header, fds)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise BrokenPipeError(error.errno, error.strerror) from None
        except OSError as error:
            raise _explain(error, self._columns) from None
        point("pack:parked")

    def close(self) -> None:
        """Close everything that packing made. Call after the hand-over: each close makes the
        kernel look for garbage among sockets."""
        made, self._made = self._made, []
        close_all(made)


def pack(state: State, forbidden: Sequence[int] = ()) -> Packed:
    """Pack everything in `state`; the caller owns the result, `state` is untouched and has to
    stay as it is until close().

    `forbidden`: sockets (fds) that may not be in the state, because the bundle would come to lie in
    their own queues. Does not block. Raises InvalidInput (naming key or section) and LimitExceeded
    (naming the limit)."""
    columns = state.columns()
    if len(columns[2]) <= FEW:
        _refuse_cycles(columns, forbidden)
    try:
        return _pack_explained(state, columns, forbidden)
    except LimitExceeded:
        # A program that has more open than its soft limit allows (it was lowered since) has no
        # room for the sockets of a tree.
        with hard_limit() as (soft, hard):
            if soft == hard:
                raise
            return _pack_explained(state, columns, forbidden)


def _pack_explained(state: State, columns: Columns, forbidden: Sequence[int]) -> Packed:
    try:
        return _pack(state, columns, forbidden)
    except OSError as error:
        raise _explain(error, columns) from None


def _pack(state: State, columns: Columns, forbidden: Sequence[int]) -> Packed:
    names, ids, fds = columns
    made: list[int] = []
    try:
        described, memfds, size = _sections(state, made)
        manifest = sealed_memfd("cprd-manifest", encode_manifest(names, ids, described))
        made.append(manifest)
        carried = array("i", (manifest, *memfds)) + fds
        point("pack:manifest")
        root = _Parking(made).tree(carried, size)
    except BaseException:
        close_all(made)
        raise
    return Packed(state, columns, root, size, made, forbidden)


def _sections(state: State, made: list[int]) -> tuple[list[Section], list[int], int]:
    """The sections for the manifest, the memfds of large sections, and the bytes of all sections.
    Appends to `made` the memfds that were opened for the bundle."""
    described: list[Section] = []
    memfds: list[int] = []
    size = 0
    for key, section in state.sections():
        if isinstance(section, MemfdSection):
            check_seals(key, section.fd)
            memfds.append(section.fd)
            size += section.size()
        else:
            size += len(section.data)
            if len(section.data) <= INLINE:
                described.append((key, section.packed, False, bytes(section.data)))
                continue
            memfds.append(sealed_memfd(f"section.{key}", [section.data]))
            made.append(memfds[-1])
        described.append((key, section.packed, True, b""))
    return described, memfds, size


class _Parking:
    """Puts descriptors into sockets. `made` gets all that was opened, for the caller to close."""

    def __init__(self, made: list[int]) -> None:
        self.made = made

    def tree(self, carried: Sequence[int], size: int) -> Root:
        """The root of a tree that carries all of `carried` (borrowed)."""
        count = len(carried)
        if count <= SCM_MAX_FD:
            return _header(LEAF, 0, count, count, size, 0), carried, 0
        # Whole leaves first, then nodes above them until one is enough.
        level: list[int] = []
        totals: list[int] = []
        for index, start in enumerate(range(0, count, SCM_MAX_FD)):
            part = carried[start : start + SCM_MAX_FD]
            header = _header(LEAF, 0, len(part), len(part), 0, index)
            level.append(self.socket_with(header, part))
            totals.append(len(part))
        for depth in range(1, MAX_DEPTH):
            if len(level) <= SCM_MAX_FD:
                return _header(NODE, depth, len(level), sum(totals), size, 0), level, depth
            above: list[int] = []
            above_totals: list[int] = []
            for index, start in enumerate(range(0, len(level), SCM_MAX_FD)):
                part = level[start : start + SCM_MAX_FD]
                above_totals.append(sum(totals[start : start + SCM_MAX_FD]))
                header = _header(NODE, depth, len(part), above_totals[-1], 0, index)
                above.append(self.socket_with(header, part))
            level, totals = above, above_totals
        raise LimitExceeded(f"{count} descriptors do not fit in one bundle")

    def socket_with(self, header: bytes, fds: Sequence[int]) -> int:
        """A socket with one message of `fds`, borrowed, in the queue."""
        inlet, outlet = socket.socketpair(_UNIX, _SEQPACKET)
        self.made += (inlet.fileno(), outlet.fileno())
        try:
            send(inlet, header, fds)
            point("pack:sent")
        finally:
            inlet.detach()
            outlet_fd = outlet.detach()
        return outlet_fd


def _header(kind: int, depth: int, here: int, total: int, size: int, index: int) -> bytes:
    return HEADER.pack(MAGIC, VERSION, kind, depth, here, total, size, index)


def _refuse_cycles(columns: Columns, forbidden: Sequence[int]) -> None:
    """Raise InvalidInput for a socket whose queue would hold the bundle: the kernel would take the
    cycle for garbage.

    Before packing in states of few descriptors only, where copies of such a socket are found, too.
    In larger states after packing, for the socket itself: nobody has the bundle yet.

    Copies share the flags of the open file, and O_APPEND means nothing to a socket. So a client
    sets the flag on a connection, and descriptors without the flag are done with in 0.2 us, not in
    the 3 us of a readlink. Neither touches the file itself, which could block."""
    if not forbidden:
        return
    bad: set[str] | None = None  # looked up when a descriptor looks suspect
    for number, fd in enumerate(columns[2]):
        try:
            if fd not in forbidden:
                if not _fcntl(fd, _GETFL) & _APPEND:
                    continue
                if bad is None:
                    bad = _links(forbidden)
                if os.readlink(f"/proc/self/fd/{fd}") not in bad:
                    continue
        except (OSError, ValueError):
            continue  # not open: the kernel says so in a moment, and then it is explained
        raise InvalidInput(
            f"{_key(columns, number)}: fd {fd} is a connection to cprd itself; a bundle may not"
            " come to hold itself"
        )


def _links(fds: Sequence[int]) -> set[str]:
    """The names of sockets, by inode."""
    links = set()
    for fd in fds:
        try:
            links.add(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            pass  # closed by another thread meanwhile
    return links


def _key(columns: Columns, number: int) -> str:
    name = columns[0].split(b"\0")[number].decode("utf-8", "surrogateescape")
    return f"({name!r}, {columns[1][number]})"


def _explain(error: OSError, columns: Columns) -> Exception:
    """The kernel's errno as an error for the saving program."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return none_left("to pack with", error)
    if error.errno == errno.EBADF:
        for number, fd in enumerate(columns[2]):
            try:
                fcntl.fcntl(fd, fcntl.F_GETFD)
            except (OSError, ValueError):
                return _not_open(fd, columns, number)
    if error.errno == errno.EINVAL:
        for number, fd in enumerate(columns[2]):
            try:
                _try_one(fd)
            except OSError:
                return InvalidInput(
                    f"fd {fd} of {_key(columns, number)} cannot be passed to another process (the"
                    " kernel refuses some kinds, io_uring for one)"
                )
    return LimitExceeded(f"cannot park the descriptors: {error.strerror}")


def _not_open(fd: int, columns: Columns, number: int) -> InvalidInput:
    return InvalidInput(
        f"fd {fd} of {_key(columns, number)} is not an open descriptor, or was closed before save"
    )


def _closed_before(ours: set[int], columns: Columns) -> InvalidInput:
    """The error for the first descriptor that has a number of `ours`."""
    number, fd = next((number, fd) for number, fd in enumerate(columns[2]) if fd in ours)
    return _not_open(fd, columns, number)


def _try_one(fd: int) -> None:
    inlet, outlet = socket.socketpair(_UNIX, _SEQPACKET)
    try:
        send(inlet, b"x", [fd])
    finally:
        inlet.close()
        outlet.close()

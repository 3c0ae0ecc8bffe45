"""A whole state packed into ONE descriptor, and back.

A bundle is the receiving end of an AF_UNIX SOCK_SEQPACKET pair whose sending end is closed and
whose queue holds one message: a header and up to 253 descriptors. More descriptors make a tree:
every node is such a socket, the root's descriptors are the sockets below it. The first descriptor
of all is the manifest, a sealed memfd with the keys and the small sections; then come the sections
that are memfds, then the descriptors in the order in which they were saved.

Reading is a plain MSG_PEEK of the first message of each socket: nothing is consumed, there is no
cursor, and any number of readers disturb nobody. docs/bundle.md has the layout; the numbers behind
the choice are in benchmarks/.
"""

from __future__ import annotations

import _socket as socket  # as in rights; socket.socketpair() takes 10 us a pair to wrap its ends
import errno
import fcntl
import mmap
import os
import struct
import sys
from array import array
from collections.abc import Sequence

import msgpack

from cprd.errors import Busy, Damaged, InvalidInput, LimitExceeded
from cprd.linux.pause import point
from cprd.linux.rights import SCM_MAX_FD, SO_PEEK_OFF, close_all, hard_limit, receive, send
from cprd.state import (
    SEALS,
    InlineSection,
    MemfdSection,
    State,
    check_seals,
    encode_section,
    sealed_memfd,
)

VERSION = 1
MAGIC = b"CPRB"
LEAF, NODE = 1, 2
MAX_DEPTH = 3  # 253 ** 3 is 16 million: more than any table of descriptors
INLINE = 16 * 1024  # a section above this gets a memfd of its own
MAX_MANIFEST = 256 << 20
_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT
_CTRUNC, _SOL_SOCKET = socket.MSG_CTRUNC, socket.SOL_SOCKET
_UNIX, _SEQPACKET = socket.AF_UNIX, socket.SOCK_SEQPACKET
HEADER = struct.Struct("<4sHBBIIQQ")
"""magic, version, kind (LEAF: what it carries is the state's; NODE: sockets), depth (0 = leaf),
descriptors in this message, descriptors in all below it (manifest and sections included), bytes of
sections in all (root only), number among its siblings."""


class Header:
    """The header of one node. Errors of the layout raise Damaged; another version raises Busy: that
    is whole, for a program that can read it."""

    __slots__ = ("depth", "here", "index", "kind", "size", "total")

    def __init__(self, data: bytes) -> None:
        if not data:
            raise Damaged("not a whole bundle: nothing is queued in a part of it")
        version = int.from_bytes(data[4:6], "little")
        if data[:4] == MAGIC and len(data) >= 6 and version != VERSION:
            raise Busy(
                f"a bundle of version {version}; this cprd reads version {VERSION}: upgrade the"
                " program that wants to read it"
            )
        if len(data) != HEADER.size or data[:4] != MAGIC:
            raise Damaged("not a bundle: what is queued does not begin with its header")
        _, _, self.kind, self.depth, self.here, self.total, self.size, self.index = HEADER.unpack(
            data
        )
        leaf = self.kind == LEAF and self.depth == 0 and self.total == self.here
        node = self.kind == NODE and 0 < self.depth < MAX_DEPTH and self.total >= self.here
        if not (leaf or node) or not 0 < self.here <= SCM_MAX_FD:
            raise Damaged("a bundle whose header contradicts itself")


class Packed:
    """A packed state. `fd` is owned by whoever holds this object until close()."""

    __slots__ = ("_made", "depth", "fd", "fds", "parked", "size")

    def __init__(
        self, fd: int, parked: int, depth: int, fds: int, size: int, made: list[int]
    ) -> None:
        self.fd = fd
        self.parked = parked  # descriptors in the root's message
        self.depth = depth  # of the root; 0: it is a leaf
        self.fds = fds  # descriptors under keys
        self.size = size  # bytes of all sections
        self._made = made  # what else was made, of no use any more

    def close(self) -> None:
        """Close everything that packing made: not before the bundle has been handed over, for each
        of these closes makes the kernel look for garbage among its sockets."""
        made, self._made = self._made, []
        if self.fd >= 0:
            made.append(self.fd)
            self.fd = -1
        close_all(made)


def pack(state: State, forbidden: Sequence[int] = ()) -> Packed:
    """Park everything in `state` in a new bundle; the caller owns the result, `state` is untouched.

    `forbidden`: sockets (fds) that must not be in it, because the bundle would come to lie in their
    own queues. Raises InvalidInput (naming key or section) and LimitExceeded (naming the limit)."""
    if forbidden:
        _refuse_cycles(state, forbidden)
    try:
        return _pack_explained(state)
    except LimitExceeded:
        # A program that has more open than its soft limit allows (it was lowered since) has no
        # room for the sockets of a tree.
        with hard_limit() as (soft, hard):
            if soft == hard:
                raise
            return _pack_explained(state)


def _pack_explained(state: State) -> Packed:
    try:
        return _pack(state)
    except OSError as error:
        raise _explain(error, state) from None


def _pack(state: State) -> Packed:
    names, ids, fds = state._as_columns()
    parking = _Parking(state._as_numbers())
    try:
        manifest, sections, size = _manifest(state, names, ids)
        parking.made.append(manifest)
        parking.made += [fd for fd, temporary in sections if temporary]
        carried = array("i", (manifest, *(fd for fd, _ in sections))) + fds
        point("pack:manifest")
        root = parking.tree(carried, size)
        point("pack:parked")
    except BaseException:
        close_all(parking.made)
        raise
    return Packed(root, parking.parked, parking.depth, len(fds), size, parking.made)


class _Parking:
    """Puts descriptors into sockets. `made` has all that was opened for it and must be closed."""

    def __init__(self, numbers: set[int]) -> None:
        self.made: list[int] = []
        self.numbers = numbers  # of what is to be saved
        self.parked = self.depth = 0  # of the socket that was made last: the root, in the end

    def tree(self, carried: Sequence[int], size: int) -> int:
        """One socket (not in `made`) that carries all of `carried`, which stays the caller's."""
        self.check_new()
        count = len(carried)
        if count <= SCM_MAX_FD:
            return self.socket_with(LEAF, 0, carried, count, size, 0)
        # Whole leaves first, then nodes above them until one is enough.
        level: list[int] = []
        totals: list[int] = []
        for index, start in enumerate(range(0, count, SCM_MAX_FD)):
            part = carried[start : start + SCM_MAX_FD]
            level.append(self.socket_with(LEAF, 0, part, len(part), 0, index))
            self.made.append(level[-1])
            totals.append(len(part))
        for depth in range(1, MAX_DEPTH):
            if len(level) <= SCM_MAX_FD:
                return self.socket_with(NODE, depth, level, sum(totals), size, 0)
            above: list[int] = []
            above_totals: list[int] = []
            for index, start in enumerate(range(0, len(level), SCM_MAX_FD)):
                part = level[start : start + SCM_MAX_FD]
                above_totals.append(sum(totals[start : start + SCM_MAX_FD]))
                above.append(self.socket_with(NODE, depth, part, above_totals[-1], 0, index))
                self.made.append(above[-1])
            level, totals = above, above_totals
        raise LimitExceeded(f"{count} descriptors do not fit in one bundle")

    def socket_with(
        self, kind: int, depth: int, fds: Sequence[int], total: int, size: int, index: int
    ) -> int:
        """A socket (not in `made`) whose queue holds one message with `fds`, which stay the
        caller's."""
        inlet, outlet = socket.socketpair(_UNIX, _SEQPACKET)
        self.made += (inlet.fileno(), outlet.fileno())
        try:
            self.check_new(2)
            header = HEADER.pack(MAGIC, VERSION, kind, depth, len(fds), total, size, index)
            send(inlet, header, fds)
            self.parked, self.depth = len(fds), depth
            point("pack:sent")
        finally:
            inlet.detach()
            outlet_fd = outlet.detach()
        self.made.pop()
        return outlet_fd

    def check_new(self, last: int = 0) -> None:
        """What was just made cannot have the number of a descriptor that is to be saved, unless
        that one was closed since: a file of our own would travel in its place."""
        if not self.numbers.isdisjoint(self.made[-last:]):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def _manifest(
    state: State, names: bytearray | bytes, ids: array[int]
) -> tuple[int, list[tuple[int, bool]], int]:
    """The manifest's memfd (the caller owns it), the memfds of sections as (fd, made here for this
    bundle), the bytes of all sections."""
    described: list[tuple[str, int, int, bytes]] = []  # key, packed, memfd?, data
    memfds: list[tuple[int, bool]] = []
    size = 0
    try:
        for key, section in state._sections.items():
            if isinstance(section, MemfdSection):
                check_seals(key, section.fd)
                memfds.append((section.fd, False))
                described.append((key, section.packed, 1, b""))
                size += section.size()
                continue
            data, packed = encode_section(key, section)
            size += len(data)
            if len(data) <= INLINE:
                described.append((key, packed, 0, bytes(data)))
            else:
                memfds.append((sealed_memfd(f"section.{key}", [data]), True))
                described.append((key, packed, 1, b""))
        if sys.byteorder == "big":
            ids = ids[:]
            ids.byteswap()
        # One map, written piece by piece: the columns are not copied on their way.
        packer = msgpack.Packer(use_bin_type=True, autoreset=False)
        packer.pack_map_header(3)
        packer.pack("sections")
        packer.pack(described)
        raw_ids = memoryview(ids).cast("B")
        manifest: list[bytes | memoryview] = [packer.bytes(), *_binary("ids", raw_ids)]
        manifest += _binary("names", memoryview(names))
        length = sum(map(len, manifest))
        if length > MAX_MANIFEST:
            raise LimitExceeded(
                f"keys and small sections take {length} bytes; the limit is {MAX_MANIFEST}"
            )
        return sealed_memfd("cprd-manifest", manifest), memfds, size
    except BaseException:
        close_all(fd for fd, temporary in memfds if temporary)
        raise


def _binary(key: str, data: memoryview) -> tuple[bytes, memoryview]:
    """A key of a msgpack map and its binary value: what goes before it, and it."""
    return msgpack.packb(key) + struct.pack(">BI", 0xC6, len(data)), data  # 0xC6: bin 32


def _refuse_cycles(state: State, forbidden: Sequence[int]) -> None:
    """A socket may not lie in a queue that it is the way to: the kernel would take the cycle for
    garbage. Copies of such a socket are looked for in small states only; in large ones just the
    descriptor itself.

    Copies share the flags of the open file, and O_APPEND means nothing to a socket: it is set on
    the forbidden ones, and only what has it is looked at more closely (0.2 us a descriptor instead
    of the 3 us of a readlink; neither touches the file itself, which could block)."""
    if state._as_numbers().isdisjoint(forbidden):
        if state.fd_count > 1024:
            return
        for fd in forbidden:
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            if not flags & os.O_APPEND:
                fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_APPEND)
    bad = {os.readlink(f"/proc/self/fd/{fd}") for fd in forbidden}
    for name, id, fd in state.fds():
        try:
            if fd not in forbidden:
                if not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND:
                    continue
                if os.readlink(f"/proc/self/fd/{fd}") not in bad:
                    continue
        except OSError:
            continue  # not open: the kernel says so in a moment, and then it is explained
        raise InvalidInput(
            f"({name!r}, {id}): fd {fd} is a connection to cprd itself; a bundle may not come to"
            " hold itself"
        )


def _explain(error: OSError, state: State) -> Exception:
    """What the kernel's errno means for whoever saves."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return LimitExceeded(
            f"no descriptor left to pack with ({error.strerror}): RLIMIT_NOFILE is {soft} (hard"
            f" {hard}); raise it (ulimit -n, LimitNOFILE=)"
        )
    if error.errno == errno.EBADF:
        for name, id, fd in state.fds():
            try:
                fcntl.fcntl(fd, fcntl.F_GETFD)
            except OSError:
                return InvalidInput(f"fd {fd} of ({name!r}, {id}) was closed before save")
    if error.errno == errno.EINVAL:
        for name, id, fd in state.fds():
            try:
                _try_one(fd)
            except OSError:
                return InvalidInput(
                    f"fd {fd} of ({name!r}, {id}) cannot be passed to another process (the kernel"
                    " refuses some kinds, io_uring for one)"
                )
    return LimitExceeded(f"cannot park the descriptors: {error.strerror}")


def _try_one(fd: int) -> None:
    inlet, outlet = socket.socketpair(_UNIX, _SEQPACKET)
    try:
        send(inlet, b"x", [fd])
    finally:
        inlet.close()
        outlet.close()


def check(fd: int, parked: int, *, seal: bool) -> None:
    """Look at the outside of a bundle, whose root holds `parked` descriptors as its saver says:
    what cprd does with what is saved, O(1) in what lies below the root.

    `fd` is borrowed. With `seal`, nothing can be appended afterwards. Raises Damaged when it is
    not a whole bundle, OSError (EMFILE) when there is no descriptor left to look with.

    The header is not read. A read takes the socket's lock, and whoever else has the socket can
    sleep with that lock in hand (in recv(), in a page of a file system of its own); so can the
    owner of a TCP socket in send(), and getsockname() waits for it. Nothing here takes either."""
    if not os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
        raise Damaged("not a bundle: not a socket")
    found = scm_fds(fd)
    if found < 0:
        raise Damaged("not a bundle: not an AF_UNIX socket")
    sock = _as_socket(fd)
    try:
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) != socket.SOCK_SEQPACKET:
            raise Damaged("not a bundle: not a SOCK_SEQPACKET socket")
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise Damaged("not a bundle: a listening socket")
        _check_counts(sock, found, parked)
        if seal:  # not before: what is no bundle stays as it was
            try:
                sock.shutdown(socket.SHUT_RD)
            except OSError as error:
                if error.errno != errno.ENOTCONN:
                    raise
            _check_counts(sock, scm_fds(fd), parked)
    finally:
        sock.close()


def _check_counts(sock: socket.SocketType, found: int, parked: int) -> None:
    queued = _queued(sock)
    if not queued:
        raise Damaged("not a whole bundle: nothing is queued in it")
    if queued != HEADER.size:
        raise Damaged(f"not a whole bundle: {queued} bytes are queued in it, not {HEADER.size}")
    if found != parked:
        raise Damaged(f"not a whole bundle: it should hold {parked} descriptors and holds {found}")


def _as_socket(fd: int) -> socket.SocketType:
    """A copy of `fd`, to be closed by the caller: an object that had the number itself would close
    it, perhaps much later, should an interrupt lose it. Raises Damaged for what is no socket,
    LimitExceeded."""
    try:
        copy = os.dup(fd)
    except OSError as error:
        raise LimitExceeded(
            f"no descriptor left to read a bundle with ({error.strerror}): raise RLIMIT_NOFILE"
            " (resource.setrlimit, ulimit -n, LimitNOFILE=); what is held stays held"
        ) from None
    try:
        return socket.SocketType(_UNIX, _SEQPACKET, 0, fileno=copy)
    except OSError as error:
        os.close(copy)
        raise Damaged(f"not a bundle: {error.strerror}") from None


def _queued(sock: socket.SocketType) -> int:
    """Bytes in the queue: of all messages, and the payload of each is a header."""
    return int.from_bytes(fcntl.ioctl(sock.fileno(), 0x541B, b"\0" * 4), sys.byteorder)  # SIOCINQ


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
        raise Damaged(f"not a bundle: {error.strerror}") from None
    raise AssertionError


def scm_fds(fd: int) -> int:
    """How many descriptors are queued in a socket (fdinfo, Linux 5.6), without reading it."""
    info = os.open(f"/proc/self/fdinfo/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        said = os.read(info, 4096)
    finally:
        os.close(info)
    _, _, count = said.partition(b"scm_fds:")
    return int(count.split(None, 1)[0]) if count else -1


def unpack(fd: int) -> State:
    """Peek a whole state out of a bundle, which stays the caller's and as it was.

    The returned state owns its descriptors. Raises Damaged when anything is missing or too much,
    and LimitExceeded when they do not fit in this process; then none is left open."""
    sock = _as_socket(fd)
    try:
        root = _peek_header(sock)
    finally:
        sock.close()
    _room_for(root)
    carried = array("i")
    try:
        _peek(fd, root.depth, root.index, carried)
        point("load:peeked")
        return _state_of(root, carried)
    except BaseException:
        close_all(carried)
        raise


def _peek(fd: int, depth: int, index: int, carried: array[int]) -> None:
    """Append all descriptors below one node to `carried`, whose owner closes them on an error.

    One look at each socket: five system calls for 253 descriptors. `fd` is borrowed."""
    sock = _as_socket(fd)
    try:
        sock.setsockopt(_SOL_SOCKET, SO_PEEK_OFF, -1)
        data, fds, flags = _receive(sock)
        queued = _queued(sock)
    except OSError as error:
        raise Damaged(f"a part of the bundle cannot be read: {error.strerror}") from None
    finally:
        sock.close()
    count = len(fds)
    if (
        depth == 0 and count and queued == HEADER.size and not flags & _CTRUNC
    ) and data == HEADER.pack(
        MAGIC, VERSION, LEAF, 0, count, count, 0, index
    ):  # as nearly always, 40 times for 10,000 descriptors
        carried.extend(fds)
        return
    try:
        header = Header(data)
        if flags & _CTRUNC:
            raise _cut_short(header)
        if len(fds) != header.here:
            raise Damaged(f"a part of the bundle says {header.here} descriptors, has {len(fds)}")
        if queued != HEADER.size:
            raise Damaged("a part of the bundle has more than one message queued in it")
        if header.depth != depth or header.index != index:
            raise Damaged("the parts of the bundle are not in their places")
        if header.kind == LEAF:
            carried.extend(fds)
            fds = array("i")
            return
        before = len(carried)
        for number, child in enumerate(fds):
            _peek(child, depth - 1, number, carried)
        if len(carried) - before != header.total:
            raise Damaged(
                f"the bundle says {header.total} descriptors and holds {len(carried) - before}"
            )
    finally:
        close_all(fds)


def _receive(sock: socket.SocketType) -> tuple[bytes, array[int], int]:
    try:
        return receive(sock, HEADER.size + 1, _PEEK)
    except ConnectionResetError:  # said once when its sender left something unread
        return receive(sock, HEADER.size + 1, _PEEK)


def _room_for(root: Header) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if root.total + 8 > soft:
        raise LimitExceeded(
            f"{root.total} descriptors do not fit in this process: its soft RLIMIT_NOFILE is {soft}"
            f" (hard {hard}); raise it before loading (resource.setrlimit, ulimit -n,"
            " LimitNOFILE=); what is held stays held"
        )


def _cut_short(header: Header) -> Exception:
    """MSG_CTRUNC while peeking: nearly always EMFILE, which recvmsg does not say."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return LimitExceeded(
        f"not all of {header.total} descriptors could be installed (MSG_CTRUNC): open descriptors"
        f" reached RLIMIT_NOFILE, soft {soft} (hard {hard}), or a security module refused"
        " one; raise the limit before loading (resource.setrlimit, ulimit -n, LimitNOFILE=);"
        " what is held stays held"
    )


def _state_of(root: Header, carried: array[int]) -> State:
    """Make the state of what a bundle carried; it owns `carried` when this returns."""
    manifest = carried[0]
    sections: dict[str, InlineSection | MemfdSection] = {}
    memfds = 0
    try:
        _whole_memfd(manifest, "the manifest")
        size = os.fstat(manifest).st_size
        if size > MAX_MANIFEST:
            raise Damaged(f"a manifest of {size} bytes; the limit is {MAX_MANIFEST}")
        with mmap.mmap(manifest, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as mapped:
            said = msgpack.unpackb(mapped, raw=False, strict_map_key=True)
        for key, packed, memfd, data in said["sections"]:
            if not isinstance(key, str) or not isinstance(data, bytes) or key in sections:
                raise ValueError(f"section {key!r:.300}")
            if memfd:
                memfds += 1
                fd = carried[memfds]
                _whole_memfd(fd, f"section {key!r}")
                sections[key] = MemfdSection(fd, packed=bool(packed), owned=True)
            else:
                sections[key] = InlineSection(data, packed=bool(packed))
        ids = array("i")
        ids.frombytes(said["ids"])
        if sys.byteorder == "big":
            ids.byteswap()
        fds = carried[1 + memfds :]
        names = said["names"]
        if not isinstance(names, bytes):
            raise ValueError(f"names {names!r:.300}")
        if len(ids) != len(fds) or (names.count(b"\0") + 1 if fds else len(names)) != len(fds):
            raise Damaged(f"the manifest names {len(ids)} descriptors; there are {len(fds)}")
    except (
        *(OSError, ValueError, TypeError, LookupError, AttributeError),
        msgpack.UnpackException,
    ) as error:
        raise Damaged(f"the manifest cannot be read: {error!r}") from None
    state = State()
    state._adopt(names, ids, fds, sections)
    os.close(manifest)
    return state


def _whole_memfd(fd: int, what: str) -> None:
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        seals = 0
    if seals & SEALS != SEALS:
        raise Damaged(f"{what} of the bundle is not a sealed memfd")

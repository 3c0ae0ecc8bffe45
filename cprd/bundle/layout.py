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

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from cprd.early import Early

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

    __slots__ = ("data", "depth", "here", "index", "kind", "size", "total")

    def __init__(self, data: bytes) -> None:
        self.data = data
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
    packing = Packing(state, forbidden)
    try:
        return packing.fill()
    finally:
        packing.close()


class Packing:
    """A bundle in the making: `begin`, if somebody is to see it being filled, and `fill`."""

    def __init__(self, state: State, forbidden: Sequence[int] = ()) -> None:
        """`state` and `forbidden` as for pack(), which see."""
        if forbidden:
            _refuse_cycles(state, forbidden)
        self._state = state
        self._parking: _Parking | None = None
        self.begun = False  # fill() fills, or has filled, what begin() made

    def begin(self) -> Packed | None:
        """Make all sockets of a tree, with nothing in its leaves yet, for readers that follow
        (`early.Early`): what fill() will return, and still owned here. None where there is no tree,
        or none can be made: fill() says why."""
        parking = self._parking = _Parking(self._state)
        try:
            parking.build()
        except Exception:
            self.close()
            return None
        self.begun = parking.depth > 0
        return parking.packed([]) if self.begun else None

    def fill(self) -> Packed:
        """Park everything. Raises as pack() does."""
        try:
            return self._fill_explained()
        except LimitExceeded:
            # A program that has more open than its soft limit allows (it was lowered since) has no
            # room for the sockets of a tree.
            with hard_limit() as (soft, hard):
                if soft == hard:
                    raise
                return self._fill_explained()

    def _fill_explained(self) -> Packed:
        try:
            parking = self._parking
            if parking is None:
                self.begun = False
                parking = self._parking = _Parking(self._state)
                parking.build()
            packed = parking.fill()
            self._parking = None
            return packed
        except OSError as error:
            self.close()  # first: one of these may have got the number of a closed one
            raise _explain(error, self._state) from None
        finally:
            self.close()

    def close(self) -> None:
        """Close what was made for a bundle that has not become one."""
        parking, self._parking = self._parking, None
        if parking is not None:
            parking.close()


class _Parking:
    """Puts descriptors into sockets: a tree of sockets first, then what lies in its leaves. `made`
    has all that was opened for it, and belongs to it until it is filled."""

    def __init__(self, state: State) -> None:
        self.names, self.ids, self.fds = state._as_columns()
        self.numbers = state._as_numbers()
        self.state = state
        self.made: list[int] = []
        self.inlets: list[socket.socket] = []  # of the leaves; `made` owns their descriptors
        self.sections: list[tuple[str, int, int, bytes]] = []  # key, packed, memfd?, data
        self.memfds: list[int] = []  # of sections
        self.size = self.total = 0  # bytes of sections; descriptors
        self.root = -1
        self.parked = self.depth = 0  # of the root

    def close(self) -> None:
        self._detach()
        made, self.made = self.made, []
        close_all(made)

    def _detach(self) -> None:
        inlets, self.inlets = self.inlets, []
        for inlet in inlets:
            inlet.detach()

    def build(self) -> None:
        """Everything but what its leaves hold."""
        self._describe_sections()
        self.total = 1 + len(self.memfds) + len(self.fds)
        outlets = []
        for _ in range(0, self.total, SCM_MAX_FD):
            inlet, outlet = self._pair()
            self.inlets.append(inlet)
            outlets.append(outlet)
        self._check_new()
        # Whole leaves first, then nodes above them until one is enough.
        level, below = outlets, SCM_MAX_FD
        while len(level) > 1:
            self.depth += 1
            if self.depth == MAX_DEPTH:
                raise LimitExceeded(f"{self.total} descriptors do not fit in one bundle")
            is_root = len(level) <= SCM_MAX_FD
            above = []
            for index, start in enumerate(range(0, len(level), SCM_MAX_FD)):
                part = level[start : start + SCM_MAX_FD]
                total = min(self.total - start * below, SCM_MAX_FD * below)
                size = self.size if is_root else 0
                header = (MAGIC, VERSION, NODE, self.depth, len(part), total, size, index)
                inlet, outlet = self._pair()
                try:
                    send(inlet, HEADER.pack(*header), part)
                finally:
                    inlet.detach()
                above.append(outlet)
                self.parked = len(part)
            level, below = above, below * SCM_MAX_FD
        self.root = level[0]
        point("pack:built")

    def fill(self) -> Packed:
        """Everything into the leaves, the one with the manifest last: readers that follow have the
        others to read while it is made. All that was made is the result's."""
        carried = array("i", (-1, *self.memfds)) + self.fds
        for index in range(1, len(self.inlets)):
            self._fill_leaf(index, carried)
        manifest = _manifest(self.sections, self.names, self.ids)
        self.made.append(manifest)
        self._check_new()
        carried[0] = manifest
        point("pack:manifest")
        self._fill_leaf(0, carried)
        point("pack:parked")
        self._detach()
        made, self.made = self.made, []
        made.remove(self.root)
        return self.packed(made)

    def packed(self, made: list[int]) -> Packed:
        return Packed(self.root, self.parked, self.depth, len(self.fds), self.size, made)

    def _fill_leaf(self, index: int, carried: array[int]) -> None:
        part = carried[index * SCM_MAX_FD : (index + 1) * SCM_MAX_FD]
        here, size = len(part), 0
        if not self.depth:  # it is the root
            self.parked, size = here, self.size
        send(
            self.inlets[index], HEADER.pack(MAGIC, VERSION, LEAF, 0, here, here, size, index), part
        )
        point("pack:sent")

    def _pair(self) -> tuple[socket.socket, int]:
        """A new pair, whose descriptors are in `made`: inlet (to be detached), outlet."""
        inlet, outlet = socket.socketpair(_UNIX, _SEQPACKET)
        self.made += (inlet.fileno(), outlet.fileno())
        return inlet, outlet.detach()

    def _check_new(self) -> None:
        """What was made cannot have the number of a descriptor that is to be saved, unless that one
        was closed since: a file of our own would travel in its place."""
        if not self.numbers.isdisjoint(self.made):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def _describe_sections(self) -> None:
        for key, section in self.state._sections.items():
            if isinstance(section, MemfdSection):
                check_seals(key, section.fd)
                self.memfds.append(section.fd)
                self.sections.append((key, section.packed, 1, b""))
                self.size += section.size()
                continue
            data, packed = encode_section(key, section)
            self.size += len(data)
            if len(data) <= INLINE:
                self.sections.append((key, packed, 0, bytes(data)))
            else:
                memfd = sealed_memfd(f"section.{key}", [data])
                self.made.append(memfd)
                self.memfds.append(memfd)
                self.sections.append((key, packed, 1, b""))


def _manifest(
    sections: list[tuple[str, int, int, bytes]], names: bytearray | bytes, ids: array[int]
) -> int:
    """The manifest's memfd, which the caller owns."""
    if sys.byteorder == "big":
        ids = ids[:]
        ids.byteswap()
    # One map, written piece by piece: the columns are not copied on their way.
    packer = msgpack.Packer(use_bin_type=True, autoreset=False)
    packer.pack_map_header(3)
    packer.pack("sections")
    packer.pack(sections)
    raw_ids = memoryview(ids).cast("B")
    manifest: list[bytes | memoryview] = [packer.bytes(), *_binary("ids", raw_ids)]
    manifest += _binary("names", memoryview(names))
    length = sum(map(len, manifest))
    if length > MAX_MANIFEST:
        raise LimitExceeded(
            f"keys and small sections take {length} bytes; the limit is {MAX_MANIFEST}"
        )
    return sealed_memfd("cprd-manifest", manifest)


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
    size = queued(sock.fileno())
    if not size:
        raise Damaged("not a whole bundle: nothing is queued in it")
    if size != HEADER.size:
        raise Damaged(f"not a whole bundle: {size} bytes are queued in it, not {HEADER.size}")
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


def queued(fd: int) -> int:
    """Bytes in the queue: of all messages, and the payload of each is a header."""
    return int.from_bytes(fcntl.ioctl(fd, 0x541B, b"\0" * 4), sys.byteorder)  # SIOCINQ


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


def unpack(fd: int, early: Early | None = None) -> State:
    """Peek a whole state out of a bundle, which stays the caller's and as it was. `early`: what was
    read of it already, perhaps.

    The returned state owns its descriptors. Raises Damaged when anything is missing or too much,
    and LimitExceeded when they do not fit in this process; then none is left open."""
    sock = _as_socket(fd)
    try:
        root = _peek_header(sock)
    finally:
        sock.close()
    _room_for(root)
    if early is not None:
        state = early.finish(fd, root)
        if state is not None:
            point("load:peeked")
            return state
    carried = array("i")
    try:
        _peek(fd, root.depth, root.index, carried)
        point("load:peeked")
        return state_of(root, carried)
    except BaseException:
        close_all(carried)
        raise


def _peek(fd: int, depth: int, index: int, carried: array[int]) -> None:
    """Append all descriptors below one node to `carried`, whose owner closes them on an error.
    `fd` is borrowed."""
    if depth == 0:
        peek_leaf(fd, index, carried)
        return
    header, fds = _peek_node(fd, depth, index)
    try:
        before = len(carried)
        for number, child in enumerate(fds):
            _peek(child, depth - 1, number, carried)
        check_total(header, len(carried) - before)
    finally:
        close_all(fds)


def peek_tree(fd: int) -> tuple[Header, array[int]]:
    """The header of a root and the leaves right below it, which the caller owns. Raises Damaged
    for a bundle of any other shape, LimitExceeded when what it is to hold does not fit here."""
    header, fds = _peek_node(fd, 1, 0)
    try:
        _room_for(header)
    except BaseException:
        close_all(fds)
        raise
    return header, fds


def peek_leaf(fd: int, index: int, carried: array[int]) -> None:
    """Append the descriptors in one leaf to `carried`. `fd` is borrowed.

    One look at each socket: five system calls for 253 descriptors."""
    data, fds, flags, size = _look(fd)
    count = len(fds)
    if (count and size == HEADER.size and not flags & _CTRUNC) and data == HEADER.pack(
        MAGIC, VERSION, LEAF, 0, count, count, 0, index
    ):  # as nearly always, 40 times for 10,000 descriptors
        carried.extend(fds)
        return
    carried.extend(_checked(data, fds, flags, size, 0, index)[1])


def _peek_node(fd: int, depth: int, index: int) -> tuple[Header, array[int]]:
    """What one node holds: its header, and descriptors that the caller owns. `fd` is borrowed."""
    return _checked(*_look(fd), depth, index)


def _look(fd: int) -> tuple[bytes, array[int], int, int]:
    """One message (payload, descriptors, flags), and the bytes in all that are queued."""
    sock = _as_socket(fd)
    try:
        sock.setsockopt(_SOL_SOCKET, SO_PEEK_OFF, -1)
        size = queued(fd)
        return *_receive(sock), size
    except OSError as error:
        raise Damaged(f"a part of the bundle cannot be read: {error.strerror}") from None
    finally:
        sock.close()


def _checked(
    data: bytes, fds: array[int], flags: int, size: int, depth: int, index: int
) -> tuple[Header, array[int]]:
    try:
        header = Header(data)
        if flags & _CTRUNC:
            raise _cut_short(header)
        if len(fds) != header.here:
            raise Damaged(f"a part of the bundle says {header.here} descriptors, has {len(fds)}")
        if size != HEADER.size:
            raise Damaged("a part of the bundle has more than one message queued in it")
        if header.depth != depth or header.index != index:
            raise Damaged("the parts of the bundle are not in their places")
        return header, fds
    except BaseException:
        close_all(fds)
        raise


def check_total(header: Header, found: int) -> None:
    if found != header.total:
        raise Damaged(f"the bundle says {header.total} descriptors and holds {found}")


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


def state_of(root: Header, carried: array[int]) -> State:
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

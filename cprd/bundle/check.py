"""Say everything that is wrong with a bundle, for people who write clients.

A reader (unpack.py) stops at the first fault. Here each part is looked at as far as possible.
Descriptors of others get installed for a moment: for a child process with bounds.
"""

from __future__ import annotations

import _socket as socket  # as in rights
import os
import select
import stat
from array import array
from collections import Counter
from typing import Any

import msgpack

from cprd.bundle.layout import (
    HEADER,
    INLINE,
    LEAF,
    MAGIC,
    MAX_DEPTH,
    MAX_MANIFEST,
    MAX_NAME,
    MAX_PARTS,
    MAX_SECTIONS,
    NODE,
    VERSION,
)
from cprd.linux.memfd import mapping, missing_seals
from cprd.linux.nofile import cut_short
from cprd.linux.rights import SCM_MAX_FD, SO_PEEK_OFF, close_all, peek, queued

MOST = 200  # faults that are said
LONGEST = 1 << 16  # bytes of a message that are looked at
_SO_DOMAIN = 39


class Faults:
    """What was found. `wrong`: a sentence for each fault."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.more = 0

    def add(self, what: str) -> None:
        if len(self.wrong) < MOST:
            self.wrong.append(what)
        else:
            self.more += 1

    def all(self) -> list[str]:
        return [*self.wrong, f"... and {self.more} more"] if self.more else self.wrong


def check_bundle(fd: int, said: dict[str, Any] | None = None) -> dict[str, Any]:
    """Look at all of a bundle; `fd` is borrowed. `said`: what the save said, as "fds", "bytes".

    Returns {"wrong": [sentence, ...], "descriptors": count under keys, "sections": count}. Raises
    LimitExceeded when the descriptors do not fit in this process. Does not block."""
    look = _Look()
    try:
        root = look.node(fd, "the root", None, 0)
        manifest = _Manifest(look, root) if look.carried else None
        keys = manifest.keys if manifest else 0
        sections = manifest.sections if manifest else 0
        if said is not None and manifest is not None and not look.faults.wrong:
            for field, found in (("fds", keys), ("bytes", manifest.size)):
                if said[field] != found:
                    look.faults.add(
                        f"the save said {field} {said[field]}, and the bundle has {found}: lists"
                        " and quotas are wrong; readers take the bundle's word"
                    )
    finally:
        close_all(look.carried)
    return {"wrong": look.faults.all(), "descriptors": keys, "sections": sections}


class _Look:
    """A walk through the sockets. Owns `carried`, the descriptors of all leaves."""

    def __init__(self) -> None:
        self.faults = Faults()
        self.carried = array("i")

    def node(self, fd: int, where: str, depth: int | None, index: int) -> int:
        """Look at a socket (borrowed) and all below. Returns the bytes of sections that the header
        says."""
        read = self._read(fd, where)
        if read is None:
            return 0
        data, fds = read
        header = self._header(data, where, len(fds))
        if header is None:
            close_all(fds)
            return 0
        kind, said_depth, _, total, size, number = header
        if depth is not None and said_depth != depth:
            self.faults.add(f"{where}: depth {said_depth}, where {depth} belongs")
        if number != index:
            self.faults.add(f"{where}: number {number} among its siblings, and comes as {index}")
        if depth is not None and size:
            self.faults.add(f"{where}: {size} bytes of sections; only the root says a size")
        before = len(self.carried)
        below = said_depth if depth is None else min(said_depth, depth)  # each level is one less
        if kind == LEAF:
            self.carried.extend(fds)
        elif not 0 < below < MAX_DEPTH:
            close_all(fds)
            return size
        else:
            for child, sock in enumerate(fds):
                try:
                    self.node(sock, f"{where}, socket {child}", below - 1, child)
                finally:
                    os.close(sock)
        found = len(self.carried) - before
        if total != found:
            self.faults.add(f"{where}: says {total} descriptors in all below; found {found}")
        return size

    def _read(self, fd: int, where: str) -> tuple[bytes, array[int]] | None:
        """The message of a queue, with descriptors that the caller owns; None without any."""
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            self.faults.add(f"{where}: not a socket")
            return None
        sock = socket.SocketType(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=os.dup(fd))
        try:
            family = sock.getsockopt(socket.SOL_SOCKET, _SO_DOMAIN)
            kind = sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
            if (family, kind) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
                self.faults.add(f"{where}: not a SEQPACKET socket of AF_UNIX")
                return None
            sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, -1)
            data, fds, flags = peek(sock, LONGEST)
            self._look_at_queue(sock, where, len(data))
        except BlockingIOError:
            self.faults.add(f"{where}: nothing is queued")
            return None
        except OSError as error:
            self.faults.add(f"{where}: cannot be read as a socket: {error.strerror}")
            return None
        finally:
            sock.close()
        if flags & socket.MSG_CTRUNC:
            close_all(fds)
            raise cut_short(where)
        if not data:
            self.faults.add(f"{where}: nothing is queued")
            return None
        return data, fds

    def _look_at_queue(self, sock: socket.SocketType, where: str, length: int) -> None:
        waiting = queued(sock)
        if waiting > length:
            self.faults.add(f"{where}: {waiting} bytes are queued: more than the first message")
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLRDHUP)
        if length and not poll.poll(0):
            self.faults.add(f"{where}: the sending end is open: close it before the save")

    def _header(self, data: bytes, where: str, count: int) -> tuple[int, ...] | None:
        """kind, depth, here, total, size, index; None where nothing more can be said."""
        if data[:4] != MAGIC:
            self.faults.add(f"{where}: begins with {data[:4]!r}, not {MAGIC!r}")
            return None
        version = int.from_bytes(data[4:6], "little")
        if version != VERSION:
            self.faults.add(f"{where}: version {version}; this is a check of version {VERSION}")
            return None
        if len(data) != HEADER.size:
            self.faults.add(f"{where}: a message of {len(data)} bytes; a header has {HEADER.size}")
            return None
        _, _, kind, depth, here, total, size, index = HEADER.unpack(data)
        if here != count:
            self.faults.add(f"{where}: says {here} descriptors in its message, which has {count}")
        if not 0 < here <= SCM_MAX_FD:
            self.faults.add(f"{where}: {here} descriptors in a message; 1 to {SCM_MAX_FD} can be")
        if kind not in (LEAF, NODE):
            self.faults.add(f"{where}: kind {kind}; {LEAF} (leaf) and {NODE} (node) are known")
            return None
        if (kind == LEAF) != (depth == 0):
            self.faults.add(f"{where}: depth {depth} of kind {kind}; a leaf has 0, a node 1 or 2")
        if depth >= MAX_DEPTH:
            self.faults.add(f"{where}: depth {depth}; {MAX_DEPTH - 1} is the most")
        return kind, depth, here, total, size, index


class _Manifest:
    """The manifest of what a walk has carried together. `keys`, `sections`: how many; `size`:
    bytes of all sections."""

    def __init__(self, look: _Look, said: int) -> None:
        self.faults = look.faults
        self.carried = look.carried
        self.keys = self.sections = self.size = 0
        parts = self._parts()
        if parts is None:
            return
        memfds = self._look_at_sections(parts.get("sections", []))
        left = len(self.carried) - 1 - memfds
        if left < 0:
            self.faults.add(f"the manifest has {memfds} sections in memfds; {left + memfds} came")
            return
        self.keys = left
        self._look_at_keys(parts.get("names"), parts.get("ids"))
        if said != self.size:
            self.faults.add(f"the root says {said} bytes of sections; there are {self.size}")

    def _parts(self) -> dict[str, Any] | None:
        """The parts of the manifest by name."""
        data = self._content(self.carried[0], "the manifest")
        if data is None:
            return None
        if len(data) > MAX_MANIFEST:
            self.faults.add(f"the manifest has {len(data)} bytes; the limit is {MAX_MANIFEST}")
            return None
        try:
            pairs = msgpack.unpackb(
                data,
                raw=False,
                strict_map_key=False,
                object_pairs_hook=list,
                max_array_len=MAX_SECTIONS,
                max_map_len=MAX_SECTIONS,
                max_ext_len=0,
            )
        except MemoryError:
            raise
        except Exception as error:  # msgpack raises several unrelated classes
            self.faults.add(f"the manifest is not one msgpack value: {error!r:.200}")
            return None
        if data[0] & 0xF0 != 0x80 and data[0] not in (0xDE, 0xDF):
            self.faults.add("the manifest is not a map")
            return None
        if len(pairs) > MAX_PARTS:
            self.faults.add(f"the manifest has {len(pairs)} parts; the limit is {MAX_PARTS}")
        parts: dict[str, Any] = {}
        for key, value in pairs:
            name = key if isinstance(key, str) else _said(key, 100)
            if name is not key:
                self.faults.add(f"the manifest has a part whose name is no string: {name}")
            if name in parts:
                self.faults.add(f"the manifest has the part {_said(key, 100)} twice")
            parts[name] = value
        return parts

    def _content(self, fd: int, what: str) -> bytes | None:
        """The bytes of a sealed memfd."""
        missing = missing_seals(fd)
        if missing is None:
            self.faults.add(f"{what} is not a memfd")
            return None
        if missing:
            self.faults.add(f"{what} lacks the seals {', '.join(missing)}")
        mapped = mapping(fd) if not missing else None
        if mapped is None:
            if not missing:
                self.faults.add(f"{what} is empty")
            return None
        with mapped:
            return bytes(mapped)

    def _look_at_sections(self, sections: Any) -> int:
        """Returns how many are in memfds."""
        if not isinstance(sections, list):
            self.faults.add("the part 'sections' of the manifest is not an array")
            return 0
        memfds = 0
        seen: Counter[Any] = Counter()
        for number, section in enumerate(sections):
            if not isinstance(section, list) or len(section) != 4:
                self.faults.add(f"section {number} is not an array of key, packed, memfd, data")
                continue
            key, packed, memfd, data = section
            what = f"section {_said(key, 300)}"
            if not isinstance(key, str) or not 0 < len(key.encode("utf-8", "replace")) <= MAX_NAME:
                self.faults.add(f"{what}: a key has 1 to {MAX_NAME} bytes of UTF-8")
            elif seen[key]:
                self.faults.add(f"{what} comes twice")
            else:
                seen[key] += 1
            for field, value in (("packed", packed), ("memfd", memfd)):
                if not isinstance(value, int) or value not in (0, 1):
                    self.faults.add(f"{what}: {field} is {_said(value, 100)}; 0 and 1 can be")
            self.sections += 1
            if memfd:
                memfds += 1
                self._look_at_memfd(what, memfds, packed, data)
            elif not isinstance(data, bytes):
                self.faults.add(f"{what}: data is no binary")
            else:
                self.size += len(data)
                self._look_at_value(what, packed, data)
        return memfds

    def _look_at_memfd(self, what: str, number: int, packed: Any, data: Any) -> None:
        if data != b"":
            self.faults.add(f"{what}: in a memfd, and has data in the manifest")
        if number >= len(self.carried):
            return
        fd = self.carried[number]
        missing = missing_seals(fd)
        if missing is None:  # and nothing else is asked: a file system might not answer
            self.faults.add(f"{what} is not a memfd")
            return
        size = os.fstat(fd).st_size
        self.size += size
        if packed and size <= 64 * INLINE:
            content = self._content(fd, what)
            if content is not None:
                self._look_at_value(what, packed, content)
        elif missing:
            self.faults.add(f"{what} lacks the seals {', '.join(missing)}")

    def _look_at_value(self, what: str, packed: Any, data: bytes) -> None:
        if not packed:
            return
        parser = msgpack.Unpacker(max_buffer_size=max(1, len(data)))
        parser.feed(data)
        try:
            parser.skip()
        except Exception as error:
            self.faults.add(f"{what}: packed, and not a msgpack value: {error!r:.200}")
            return
        if parser.tell() != len(data):
            self.faults.add(f"{what}: packed, and more than one msgpack value")

    def _look_at_keys(self, names: Any, packed: Any) -> None:
        for part, value in (("names", names), ("ids", packed)):
            if not isinstance(value, bytes):
                self.faults.add(f"the part {part!r} of the manifest is missing, or no binary")
                return
        if len(packed) != 4 * self.keys:
            self.faults.add(
                f"the manifest has {len(packed)} bytes of ids; {self.keys} descriptors take"
                f" {4 * self.keys}"
            )
        each = names.split(b"\0") if names or self.keys else []
        if len(each) != self.keys:
            self.faults.add(f"the manifest has {len(each)} names for {self.keys} descriptors")
        for name in each:
            if not 0 < len(name) <= MAX_NAME:
                self.faults.add(f"the name {name!r:.300}: 1 to {MAX_NAME} bytes can be")
        if len(packed) == 4 * self.keys == 4 * len(each):
            ids = [
                int.from_bytes(packed[at : at + 4], "little", signed=True)
                for at in range(0, len(packed), 4)
            ]
            for (name, id), count in Counter(zip(each, ids, strict=True)).items():
                if count > 1:
                    self.faults.add(
                        f"the key ({name.decode('utf-8', 'replace')!r}, {id}) {count} times"
                    )


def _said(value: object, most: int) -> str:
    """At most so many letters of a value that may be deeper than Python's own stack."""
    try:
        return f"{value!r:.{most}}"
    except RecursionError:
        return f"a {type(value).__name__} of too many containers in each other"

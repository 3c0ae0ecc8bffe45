"""The addresses of `cprctl run --listen`, and which held listener serves which of them.

[HOST:]PORT is TCP (an IPv6 host in brackets, all addresses when it is left out), tcp:[HOST:]PORT
the same, udp:[HOST:]PORT UDP, unix:PATH a stream socket (unix:@NAME an abstract one),
seqpacket:PATH and dgram:PATH its siblings.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, NamedTuple

from cprd.errors import CprdError, InvalidInput

if TYPE_CHECKING:
    from collections.abc import Sequence

BACKLOG = 4096  # the kernel caps it at net.core.somaxconn
_UNIX = {
    "unix": socket.SOCK_STREAM,
    "seqpacket": socket.SOCK_SEQPACKET,
    "dgram": socket.SOCK_DGRAM,
}


class Address(NamedTuple):
    """Where to listen: socket(family, kind) bound to `where`."""

    text: str
    family: int
    kind: int
    where: tuple[str, int] | str


def parse(text: str) -> Address:
    """One --listen argument. Raises InvalidInput."""
    scheme, colon, rest = text.partition(":")
    if colon and scheme in _UNIX:
        path = "\0" + rest[1:] if rest.startswith("@") else rest
        if not rest or len(os.fsencode(path)) > 107:
            raise InvalidInput(f"--listen {text}: wants a path of 1 to 107 bytes")
        return Address(text, socket.AF_UNIX, _UNIX[scheme], path)
    kind = socket.SOCK_STREAM
    if colon and scheme in ("tcp", "udp"):
        kind = socket.SOCK_DGRAM if scheme == "udp" else socket.SOCK_STREAM
    else:
        rest = text
    host, _, port = rest.rpartition(":")
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise InvalidInput(f"--listen {text}: wants [HOST:]PORT, udp:[HOST:]PORT or unix:PATH")
    if host.startswith("[") and host.endswith("]"):
        return Address(text, socket.AF_INET6, kind, (host[1:-1], int(port)))
    if ":" in host:
        raise InvalidInput(f"--listen {text}: an IPv6 address goes in brackets, [{host}]:{port}")
    if host in ("", "*"):
        return Address(text, socket.AF_INET6, kind, ("::", int(port)))
    return Address(text, socket.AF_INET, kind, (host, int(port)))


def open_listener(address: Address) -> socket.socket:
    """A new socket bound (and listening); the caller owns it. Raises CprdError."""
    try:
        return _open(address)
    except OSError as error:
        raise CprdError(f"cannot listen on {address.text}: {error.strerror or error}") from None


def _open(address: Address) -> socket.socket:
    family, where = address.family, address.where
    if where == ("::", address.where[1]) and not _ipv6():
        family, where = socket.AF_INET, ("0.0.0.0", int(address.where[1]))
    sock = socket.socket(family, address.kind)
    try:
        if isinstance(where, str):
            _unlink_dead(where, address.kind)
        elif address.kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            both = where[0] == "::"
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not both)
        sock.bind(where)
        if address.kind != socket.SOCK_DGRAM:
            sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


def _unlink_dead(path: str, kind: int) -> None:
    """Remove a socket file that nobody listens on any more; leave anything else alone."""
    import stat

    if path.startswith("\0"):
        return
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX, kind) as probe:
            probe.connect(path)
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        os.unlink(path)


def serves(fd: int, address: Address) -> bool:
    """Whether the held socket `fd` (borrowed) is bound where `address` says. Port 0 is any port."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        return False
    try:
        if sock.type != address.kind:
            return False
        bound = sock.getsockname()
    except OSError:
        return False
    finally:
        sock.detach()
    if isinstance(address.where, str):
        name = os.fsdecode(bound) if isinstance(bound, bytes) else bound
        return bool(name == address.where)
    if not isinstance(bound, tuple) or address.where[1] not in (0, bound[1]):
        return False
    host = address.where[0]
    return bound[0] == host or (host == "::" and bound[0] == "0.0.0.0") or _same(host, bound[0])


def _same(host: str, bound: object) -> bool:
    """Whether a name (localhost) or another spelling of an address means `bound`."""
    try:
        return any(found[4][0] == bound for found in socket.getaddrinfo(host, None))
    except OSError:
        return False


def is_listener(fd: int) -> bool:
    """Whether the borrowed `fd` is a socket that accepts connections."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        return False
    try:
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) != 0
    except OSError:
        return False
    finally:
        sock.detach()


def match(addresses: Sequence[Address], held: dict[int, int]) -> list[int]:
    """For each address the id in `held` (id: descriptor, borrowed) of the listener that serves it,
    its own position preferred; -1 where a new one must be opened."""
    free = dict(held)
    found: list[int] = []
    for position, address in enumerate(addresses):
        order = sorted(free, key=lambda id: id != position)
        id = next((id for id in order if serves(free[id], address)), -1)
        free.pop(id, None)
        found.append(id)
    return found

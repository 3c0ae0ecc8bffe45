"""The argument of `cprctl run --listen`: [NAME=]ADDR[,OPTION...].

ADDR is [HOST:]PORT or tcp:[HOST:]PORT (an IPv6 host in brackets; without HOST all addresses of both
families), udp:[HOST:]PORT, unix:PATH (a stream socket; unix:@NAME an abstract one), seqpacket:PATH
or dgram:PATH. NAME is the descriptor's name in LISTEN_FDNAMES. A comma in a path is written `\\,`.
"""

from __future__ import annotations

import os
import re
import socket
from typing import TYPE_CHECKING, Any, NamedTuple

from cprd.errors import CprdError, InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Found = tuple[int, tuple[Any, ...]]  # family, address

KEY = "listener"  # the name of a listener without NAME=
BACKLOG = 4096  # the kernel caps it at net.core.somaxconn
RESOLVE = 5.0  # seconds for the name service
_UNIX = {"unix": socket.SOCK_STREAM, "seqpacket": socket.SOCK_SEQPACKET, "dgram": socket.SOCK_DGRAM}
_NAME = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*)=")


class Listen(NamedTuple):
    """One --listen: where to bind, and how."""

    text: str  # as it was given
    name: str = KEY
    id: int = 0  # position among the listeners of this name
    family: int = socket.AF_INET
    kind: int = socket.SOCK_STREAM
    host: str = ""  # numeric once resolved; "" for UNIX
    port: int = 0
    scope: int = 0  # interface index of a link-local IPv6 address
    path: str = ""  # absolute, or "\0..." an abstract name; "" for TCP and UDP
    both: bool = False  # no HOST: IPv6 and IPv4, where there is IPv6
    mode: int | None = None
    owner: tuple[int, int] | None = None  # uid, gid; -1 leaves it
    backlog: int = BACKLOG
    reuseport: bool = False
    v6only: bool = False
    freebind: bool = False
    device: str = ""

    @property
    def key(self) -> tuple[str, int]:
        return (self.name, self.id)

    @property
    def is_file(self) -> bool:
        return bool(self.path) and not self.path.startswith("\0")

    @property
    def wildcard(self) -> bool:
        return self.host in ("::", "0.0.0.0")


def parse_all(texts: Sequence[str]) -> list[Listen]:
    """All --listen arguments in order, each with its key. Raises InvalidInput."""
    counts: dict[str, int] = {}
    found: list[Listen] = []
    for text in texts:
        listen = parse(text)
        id = counts.get(listen.name, 0)
        counts[listen.name] = id + 1
        found.append(listen._replace(id=id))
    return found


def parse(text: str) -> Listen:
    """One --listen argument; a host name stays a name. Raises InvalidInput."""
    named = _NAME.match(text)
    rest = text[named.end() :] if named else text
    address, *options = (part.replace("\\,", ",") for part in re.split(r"(?<!\\),", rest))
    listen = _address(text, address)
    if named:
        listen = listen._replace(name=named.group(1))
    for option in options:
        listen = _option(listen, option)
    return listen


def _address(text: str, address: str) -> Listen:
    scheme, colon, rest = address.partition(":")
    if colon and scheme in _UNIX:
        return Listen(text, family=socket.AF_UNIX, kind=_UNIX[scheme], path=_path(text, rest))
    kind = socket.SOCK_STREAM
    if colon and scheme in ("tcp", "udp"):
        kind = socket.SOCK_DGRAM if scheme == "udp" else socket.SOCK_STREAM
    else:
        rest = address
    host, _, digits = rest.rpartition(":")
    if not digits.isascii() or not digits.isdigit() or int(digits) > 65535:
        raise InvalidInput(f"--listen {text}: wants [HOST:]PORT, udp:[HOST:]PORT or unix:PATH")
    listen = Listen(text, kind=kind, port=int(digits))
    if host.startswith("[") and host.endswith("]"):
        return listen._replace(family=socket.AF_INET6, host=host[1:-1])
    if ":" in host:
        raise InvalidInput(f"--listen {text}: an IPv6 address goes in brackets, [{host}]:{digits}")
    if host in ("", "*"):
        return listen._replace(family=socket.AF_INET6, host="::", both=True)
    return listen._replace(host=host)


def _path(text: str, path: str) -> str:
    """A UNIX path made absolute, or an abstract name with its leading NUL."""
    if path.startswith("@"):
        path = "\0" + path[1:]
        wrong = len(path) == 1
    else:
        wrong = not path or path.endswith("/") or "\0" in path
        if path and ".." in path.split("/"):  # after a symbolic link, not what the text says
            folder, name = os.path.split(path)
            path = os.path.join(os.path.realpath(folder), name)
        path = os.path.abspath(path) if path else path
    if wrong or len(os.fsencode(path)) > 107:
        raise InvalidInput(
            f"--listen {text}: wants the path of a file, 1 to 107 bytes with the directory"
        )
    return path


def _option(listen: Listen, option: str) -> Listen:
    name, equals, value = option.partition("=")
    flags = {"reuseport", "v6only", "freebind"}
    unix = listen.family == socket.AF_UNIX
    if name in flags and not equals:
        if unix or (name == "v6only" and listen.family != socket.AF_INET6):
            raise InvalidInput(f"--listen {listen.text}: {name} is of no use for this address")
        fields: dict[str, Any] = {name: True, "both": listen.both and name != "v6only"}
        return listen._replace(**fields)
    if name in ("mode", "owner") and not listen.is_file:
        raise InvalidInput(f"--listen {listen.text}: {name} is for the path of a UNIX socket")
    if name == "device" and unix:
        raise InvalidInput(f"--listen {listen.text}: a UNIX socket has no device")
    readers: dict[str, Callable[[str], Any]] = {
        "mode": _mode,
        "owner": _owner,
        "backlog": _backlog,
        "device": _device,
    }
    if name not in readers or not equals:
        known = "mode=, owner=, backlog=, reuseport, v6only, freebind, device="
        raise InvalidInput(
            f"--listen {listen.text}: {option!r} is no option; options are {known}, and a comma in"
            " a path is written \\,"
        )
    try:
        fields = {name: readers[name](value)}
        return listen._replace(**fields)
    except ValueError as error:
        raise InvalidInput(f"--listen {listen.text}: {option}: {error}") from None


def _mode(value: str) -> int:
    if not re.fullmatch("0?[0-7]{3}", value):
        raise ValueError("wants three octal digits, 660")
    return int(value, 8)


def _backlog(value: str) -> int:
    if not value.isascii() or not value.isdigit() or int(value) > 0x7FFFFFFF:
        raise ValueError("wants a number of connections")
    return int(value)


def _device(value: str) -> str:
    if not 0 < len(os.fsencode(value)) < 16:
        raise ValueError("wants the name of a network interface")
    return value


def _owner(value: str) -> tuple[int, int]:
    """USER, USER:GROUP or :GROUP, names or numbers, as chown(1) has it."""
    import grp
    import pwd

    user, colon, group = value.partition(":")
    if not user and not group:
        raise ValueError("wants USER, USER:GROUP or :GROUP")
    try:
        uid = int(user) if user.isdigit() else pwd.getpwnam(user).pw_uid if user else -1
        gid = int(group) if group.isdigit() else grp.getgrnam(group).gr_gid if group else -1
    except KeyError as error:
        raise ValueError(str(error.args[0])) from None
    del colon
    return uid, gid


# -- names ---------------------------------------------------------------------------------------


def resolve(listen: Listen, *, ipv6: bool) -> Listen:
    """`listen` with a numeric host. Blocks for 5 seconds at most, for the name service.

    `ipv6`: whether there is IPv6 here. Raises CprdError for a name without an address."""
    if listen.family == socket.AF_UNIX:
        return listen
    if listen.both:
        return listen if ipv6 else listen._replace(family=socket.AF_INET, host="0.0.0.0")
    found = _address_of(listen, socket.AI_NUMERICHOST | socket.AI_NUMERICSERV)
    if found is None:
        if listen.family == socket.AF_INET6:
            raise InvalidInput(f"--listen {listen.text}: {listen.host} is no IPv6 address")
        found = _by_name(listen)
    family, where = found
    scope = int(where[3]) if family == socket.AF_INET6 else 0
    return listen._replace(family=family, host=str(where[0]).partition("%")[0], scope=scope)


def _address_of(listen: Listen, flags: int) -> Found | None:
    """The first address of a host, IPv4 preferred for a name; None when there is none."""
    family = socket.AF_INET6 if listen.family == socket.AF_INET6 else socket.AF_UNSPEC
    try:
        found = socket.getaddrinfo(listen.host, listen.port, family, listen.kind, 0, flags)
    except (OSError, UnicodeError):
        return None
    found.sort(key=lambda each: each[0] != socket.AF_INET)
    return found[0][0], found[0][4]


def _by_name(listen: Listen) -> Found:
    import threading

    answers: list[Found | None] = []
    asking = threading.Thread(target=lambda: answers.append(_address_of(listen, 0)), daemon=True)
    asking.start()
    asking.join(RESOLVE)
    if not answers:
        raise CprdError(
            f"--listen {listen.text}: the name service did not say within {RESOLVE:g} s what"
            f" {listen.host} is: give the address as a number"
        )
    if answers[0] is None:
        raise CprdError(f"--listen {listen.text}: {listen.host} has no address: see /etc/hosts")
    return answers[0]

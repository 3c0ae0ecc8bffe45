"""Match held sockets with --listen arguments. No I/O: facts in, a plan out.

A held socket serves a --listen when a client that connects to the address arrives at the socket:
the same family, type, address, IPV6_V6ONLY (of a wildcard), interface and network namespace, and
the socket listens. A UNIX path is compared by inode, and so the caller says where a path leads.
Fixed addresses choose first, port 0 last; each prefers the socket under its own key.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cprd.cli.addresses import Listen
    from cprd.linux.sockets import Facts

NEW = -1
_MAPPED = bytes(10) + b"\xff\xff"  # ::ffff:0:0/96


class Held(NamedTuple):
    """One held socket."""

    key: tuple[str, int]
    fd: int  # borrowed from the state
    facts: Facts
    ours: bool  # made by `cprctl run`, not saved by the program under a key of its own
    leads: frozenset[str] = frozenset()  # those of the asked paths that lead to it


class Plan(NamedTuple):
    """The decision, as indices into the held sockets."""

    taken: list[int]  # for each --listen the held socket that serves it, or NEW
    left: list[int]  # of `cprctl run`'s own sockets those that no --listen wants
    useless: dict[int, str]  # of those left: why a socket that was asked for cannot serve
    later: list[int]  # the --listen for which one of those left has to be closed first
    blocked: list[tuple[int, int]]  # (--listen, held): in the way, and the program's own


def plan(asked: Sequence[Listen], held: Sequence[Held], namespace: int | None) -> Plan:
    """`namespace`: cookie of the service's network namespace."""
    taken = [NEW] * len(asked)
    free = set(range(len(held)))
    _choose(asked, held, taken, free, namespace)
    # A listener for any port may have none that is in the way of a fixed address, or a program's.
    fixed = [one for one, j in zip(asked, taken, strict=True) if j == NEW and not _any_port(one)]
    blocks = {j for j in free if any(in_the_way(held[j], one, namespace) for one in fixed)}
    apart = blocks | {j for j in free if not held[j].ours}
    free -= apart
    _choose(asked, held, taken, free, namespace, any_port=True)
    free |= apart
    left = sorted(j for j in free if held[j].ours)
    new = [(i, listen) for i, listen in enumerate(asked) if taken[i] == NEW]
    return Plan(
        taken=taken,
        left=left,
        useless={j: why for j in left if (why := _why_useless(held[j], asked, namespace))},
        later=[i for i, one in new if any(in_the_way(held[j], one, namespace) for j in left)],
        blocked=[
            (i, j)
            for i, one in new
            for j in sorted(free)
            if not held[j].ours and in_the_way(held[j], one, namespace)
        ],
    )


def _any_port(listen: Listen) -> bool:
    return not listen.path and listen.port == 0


def _choose(
    asked: Sequence[Listen],
    held: Sequence[Held],
    taken: list[int],
    free: set[int],
    namespace: int | None,
    *,
    any_port: bool = False,
) -> None:
    """Let the --listen with a fixed address, or those with port 0, choose from `free`: first the
    socket under the same key, then another, preferably one of `cprctl run`."""
    for same_key in (True, False):
        for i, listen in enumerate(asked):
            if taken[i] != NEW or _any_port(listen) != any_port:
                continue
            for j in sorted(free, key=lambda j: (not held[j].ours, j)):
                fits = held[j].key == listen.key or not same_key
                if fits and serves(held[j], listen, namespace):
                    taken[i] = j
                    free.discard(j)
                    break


def elsewhere(facts: Facts, namespace: int | None) -> bool:
    """Whether clients of this network namespace cannot reach the socket: a file leads to a
    socket from every namespace."""
    if facts.is_file or facts.namespace is None or namespace is None:
        return False
    return facts.namespace != namespace


def serves(held: Held, listen: Listen, namespace: int | None) -> bool:
    """Whether who connects to the address of `listen` arrives at the held socket."""
    facts = held.facts
    if (facts.family, facts.kind) != (listen.family, listen.kind) or facts.connected:
        return False
    if facts.kind != socket.SOCK_DGRAM and not facts.listening:
        return False
    if elsewhere(facts, namespace):
        return False
    if facts.family == socket.AF_UNIX:
        return listen.path in held.leads if listen.is_file else facts.path == listen.path
    if facts.device != listen.device or listen.port not in (0, facts.port) or not facts.port:
        return False
    if _number(facts.host) != _number(listen.host) or facts.scope != listen.scope:
        return False
    return not listen.wildcard or facts.v6only == listen.v6only


def in_the_way(held: Held, listen: Listen, namespace: int | None) -> bool:
    """Whether a new socket for `listen` cannot be bound as long as the held one is open."""
    facts = held.facts
    if facts.family == socket.AF_UNIX or listen.family == socket.AF_UNIX:
        if facts.family != listen.family:
            return False
        if listen.is_file:
            return listen.path in held.leads
        same = (facts.path, facts.kind) == (listen.path, listen.kind)
        return same and not elsewhere(facts, namespace)
    if elsewhere(facts, namespace) or facts.kind != listen.kind or listen.port == 0:
        return False
    accepted = not held.ours or facts.connected  # in nobody's way
    if facts.kind == socket.SOCK_STREAM and not facts.listening and accepted:
        return False
    return facts.port == listen.port and _overlap(facts, listen)


def conflict(one: Listen, other: Listen) -> bool:
    """Whether the kernel refuses to bind both: the same type and port, and an address in common."""
    if one.family == socket.AF_UNIX or other.family == socket.AF_UNIX:
        same_type = one.is_file or one.kind == other.kind
        return one.path == other.path and same_type
    if one.kind != other.kind or one.port != other.port or one.port == 0:
        return False
    return _overlap(one, other)


def _overlap(one: Facts | Listen, other: Facts | Listen) -> bool:
    if one.reuseport and other.reuseport:
        return False
    if one.device and other.device and one.device != other.device:
        return False
    a, b = _number(one.host), _number(other.host)
    if a == b and (one.scope == other.scope or not one.scope or not other.scope):
        return True
    return any(
        wild.host == ("0.0.0.0" if len(number) == 4 else "::")
        or (len(number) == 4 and wild.host == "::" and not wild.v6only)
        for wild, number in ((one, b), (other, a))
    )


def _number(host: str) -> bytes:
    """An address as 4 or 16 bytes; ::ffff:1.2.3.4 is 1.2.3.4."""
    if ":" not in host:
        return socket.inet_pton(socket.AF_INET, host)
    number = socket.inet_pton(socket.AF_INET6, host)
    return number[12:] if number.startswith(_MAPPED) else number


def _why_useless(held: Held, asked: Sequence[Listen], namespace: int | None) -> str:
    """Why a socket does not serve the address that was asked for; "" for another address."""
    facts = held.facts
    if facts.is_file:
        if any(listen.path == facts.path for listen in asked) and facts.path not in held.leads:
            return "its path does not lead to it any more"
        return ""
    if elsewhere(facts, namespace):
        return "it belongs to another network namespace, from where nobody comes here"
    if facts.kind != socket.SOCK_DGRAM and not facts.listening:
        return "it does not listen any more"
    return ""

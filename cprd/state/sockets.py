"""Descriptors of a state as socket objects."""

from __future__ import annotations

import os
from socket import socket

from cprd.errors import InvalidInput, LimitExceeded


def as_sockets(
    name: str, group: dict[int, int], family: int | None, type: int | None, blocking: bool
) -> dict[int, socket]:
    """Move the descriptors of `group` into socket objects by id; `group` is empty afterwards.

    Raises InvalidInput for a descriptor that is no such socket, LimitExceeded; `group` is as before
    then. After an interrupt `group` lacks at most the descriptor whose owner nobody can tell."""
    known = (-1, -1, -1)  # for the kernel to tell
    if family is not None and type is not None:
        known = _first(name, *next(iter(group.items())), family, type)
    fds, made = dict(group), dict[int, socket]()
    id = fd = -1
    try:
        group.clear()
        for id, fd in fds.items():
            made[id] = sock = socket(*known, fd)
            if known[0] == -1:
                _check(name, id, sock, family, type)
            sock.setblocking(blocking)
    except BaseException as error:
        for sock in made.values():
            sock.detach()
        if not isinstance(error, OSError | InvalidInput) and id not in made:
            fds.pop(id, None)  # an object may have it, and close it in a moment
        group.update(fds)
        if isinstance(error, OSError):
            raise InvalidInput(
                f"fd {fd} of ({name!r}, {id}) is no socket: {error.strerror}"
            ) from None
        raise
    return made


def _first(name: str, id: int, fd: int, family: int, type: int) -> tuple[int, int, int]:
    """Family, type and protocol of one descriptor, checked."""
    try:
        copy = os.dup(fd)
    except OSError as error:
        raise LimitExceeded(
            f"no descriptor left to look at ({name!r}, {id}) with ({error.strerror}): raise"
            " RLIMIT_NOFILE (ulimit -n, LimitNOFILE=)"
        ) from None
    try:
        sock = socket(fileno=copy)
    except OSError as error:
        os.close(copy)
        raise InvalidInput(f"fd {fd} of ({name!r}, {id}) is no socket: {error.strerror}") from None
    with sock:
        _check(name, id, sock, family, type)
        return sock.family, sock.type, sock.proto


def _check(name: str, id: int, sock: socket, family: int | None, type: int | None) -> None:
    """Raise InvalidInput for another family or type than the program expects."""
    for what, found, wanted in (("family", sock.family, family), ("type", sock.type, type)):
        if wanted is not None and found != wanted:
            raise InvalidInput(
                f"({name!r}, {id}) is a socket of the {what} {found.name}, not {wanted!r}"
            )

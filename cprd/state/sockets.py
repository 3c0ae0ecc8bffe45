"""Descriptors of a state as socket objects."""

from __future__ import annotations

from socket import socket

from cprd.errors import InvalidInput


def as_sockets(
    name: str, group: dict[int, int], family: int | None, type: int | None, blocking: bool
) -> dict[int, socket]:
    """Move the descriptors of `group` into socket objects by id; `group` is empty afterwards.

    Raises InvalidInput for a descriptor that is no such socket; `group` is as before then. After an
    interrupt `group` lacks at most the descriptor whose owner nobody can tell."""
    known_family = known_type = proto = -1  # for the kernel to tell
    fds, made = dict(group), dict[int, socket]()
    id: int | None = None
    fd = -1
    try:
        group.clear()
        for id, fd in fds.items():
            made[id] = sock = socket(known_family, known_type, proto, fd)
            if proto < 0:
                _check(name, id, sock, family, type)
                if family is not None and type is not None:
                    known_family, known_type, proto = sock.family, sock.type, sock.proto
        for sock in made.values():
            sock.setblocking(blocking)
    except BaseException as error:
        for sock in made.values():
            sock.detach()
        if not isinstance(error, OSError | InvalidInput) and id is not None and id not in made:
            fds.pop(id, None)  # an object may have it, and close it in a moment
        group.update(fds)
        if isinstance(error, OSError):
            raise InvalidInput(
                f"fd {fd} of ({name!r}, {id}) is no socket: {error.strerror}"
            ) from None
        raise
    return made


def as_socket(name: str, id: int, fd: int, blocking: bool) -> socket:
    """Make a socket object of `fd`, which the object owns. Raises InvalidInput; then `fd` is as
    before."""
    return as_sockets(name, {id: fd}, None, None, blocking)[id]


def _check(name: str, id: int, sock: socket, family: int | None, type: int | None) -> None:
    """Raise InvalidInput for another family or type than the program expects."""
    for what, found, wanted in (("family", sock.family, family), ("type", sock.type, type)):
        if wanted is not None and found != wanted:
            raise InvalidInput(
                f"({name!r}, {id}) is a socket of the {what} {found.name}, not {wanted!r}"
            )

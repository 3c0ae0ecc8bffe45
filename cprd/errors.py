"""What can go wrong, by name. The same names travel on the wire (`CODES`), so that an error raised
in the daemon is raised again, with the same class and the same words, in the client."""

from __future__ import annotations


class CprdError(Exception):
    """The root of all errors of cprd. The message says what happened and what to do next."""


class Unavailable(CprdError):
    """Nobody answers at the daemon's socket, or the connection broke where a retry is not safe."""


class NotHeld(CprdError):
    """No record in any phase bears the name: a cold start is right."""


class Busy(CprdError):
    """Something is held, and may not be had now; the message says why (claimed, in doubt, ...).

    `pid`: the process in the way; None where no process is, or where none can be seen. `phase`: of
    the hold; None where a name is out of sight. `until`: when a lease ends, in seconds of
    CLOCK_BOOTTIME; None where no time ends the wait."""

    def __init__(
        self,
        why: str = "",
        *,
        pid: int | None = None,
        phase: str | None = None,
        until: float | None = None,
    ) -> None:
        super().__init__(why)
        self.pid = pid
        self.phase = phase
        self.until = until


class Damaged(Busy):
    """What is held is not whole any more (or what was offered never was); never served in part."""


class AlreadyHeld(CprdError):
    """The name is taken, and `if_exists` was "error"."""


class Denied(CprdError):
    """The peer's credentials do not allow it."""


class Fenced(CprdError):
    """The claim (or the prepared save) is over: somebody else may have the state by now."""


class LimitExceeded(CprdError):
    """A limit of the system or a quota of the daemon; the message names it and how to raise it."""


class Timeout(CprdError):
    """The daemon accepted the connection and then stayed mute past the deadline."""


class ProtocolError(CprdError):
    """A message that the other side does not understand."""


class InvalidInput(CprdError, ValueError):
    """An argument that is refused before anything happened; the message names the field."""


class MissingKey(CprdError, KeyError):
    """A state has nothing under the key; the message names the key, and keys that are there."""

    __str__ = Exception.__str__  # KeyError's would quote the message


CODES: dict[str, type[CprdError]] = {
    cls.__name__: cls
    for cls in (
        CprdError,
        Unavailable,
        NotHeld,
        Busy,
        Damaged,
        AlreadyHeld,
        Denied,
        Fenced,
        LimitExceeded,
        Timeout,
        ProtocolError,
        InvalidInput,
    )
}


_EXTRAS = {"trio": "daemon", "rich": "cli"}
"""Packages that only a part of cprd needs, and the extra of cprd that brings each."""


def absent(package: str, part: str) -> str:
    """The words for `part` of cprd that lacks a package: how to install it."""
    return (
        f"{part} needs the Python package {package}: pip install 'cprd[{_EXTRAS[package]}]'"
        f" (Debian: apt-get install python3-{package})"
    )

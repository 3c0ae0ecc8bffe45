"""The daemon's configuration: a TOML file with a [limits] table, all optional."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, fields

from cprd.errors import InvalidInput
from cprd.protocol import messages
from cprd.protocol.holds import Quota

SYSTEM = "/etc/cprd/cprd.toml"


@dataclass(frozen=True, slots=True)
class Config:
    """Limits for each uid, and in all (docs/operations.md)."""

    holds: int = messages.HOLDS
    fds: int = messages.FDS
    connections: int = messages.CONNECTIONS
    all_connections: int = messages.ALL_CONNECTIONS
    lease: float = messages.LONGEST_LEASE

    @property
    def quota(self) -> Quota:
        return Quota(holds=self.holds, fds=self.fds)


def default_path(*, user: bool) -> str:
    """The file to read when none is named: for root and for a service of the system the system's
    file, if present; "" otherwise. So ExecStart= and ExecReload= of a unit agree."""
    service = "INVOCATION_ID" in os.environ  # systemd.exec(5)
    if user or not (service or os.geteuid() == 0):
        return ""
    return SYSTEM if os.path.lexists(SYSTEM) else ""  # a dangling link is an error


def read(path: str) -> Config:
    """Raises InvalidInput that names the file and the key."""
    try:
        with open(path, "rb") as file:
            content = tomllib.load(file)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidInput(f"{path}: {error}") from None
    limits = content.pop("limits", {})
    if content or not isinstance(limits, dict):
        raise InvalidInput(
            f"{path}: knows only the table [limits], not {next(iter(content), '?')!r}"
        )
    known = {field.name: field.default for field in fields(Config)}
    for key, value in limits.items():
        if key not in known:
            raise InvalidInput(f"{path}: unknown key limits.{key}; known: {', '.join(known)}")
        kinds = (int, float) if isinstance(known[key], float) else (int,)
        if type(value) not in kinds or not 0 < value <= 1 << 31:
            raise InvalidInput(f"{path}: limits.{key} wants a number above 0, not {value!r}")
    return Config(**limits)

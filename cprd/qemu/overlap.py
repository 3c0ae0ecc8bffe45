"""Sockets that the old QEMU and the new one both call theirs.

The new QEMU, binding the path of the old one's socket, takes the path away from it; and the old
one, when it quits, removes the path, which is the new one's by then. So each such socket gets a
second name before the new QEMU starts (to give the path back, should it fail) and again before the
old one quits.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class SharedPaths:
    """The paths among `paths` that are sockets now, i.e. the old QEMU's."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths = [path for path in dict.fromkeys(paths) if _is_socket(path)]

    def before_new(self) -> None:
        """Keep the old one's sockets under a second name."""
        for path in self._paths:
            _link(path, f"{path}.old")

    def give_back(self) -> None:
        """The new QEMU has failed and ended: the paths are the old one's again."""
        for path in self._paths:
            with suppress(OSError):
                os.rename(f"{path}.old", path)
            with suppress(OSError):
                os.unlink(f"{path}.old")  # a rename to itself leaves both names

    def before_quit(self) -> None:
        """Keep the new one's sockets under a second name."""
        for path in self._paths:
            with suppress(OSError):
                _link(path, f"{path}.new")

    def after_quit(self) -> None:
        """The old one has removed the paths (or not): they are the new one's for good."""
        for path in self._paths:
            with suppress(OSError):
                os.rename(f"{path}.new", path)
            with suppress(OSError):
                os.unlink(f"{path}.old")


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode)
    except OSError:
        return False


def _link(path: str, other: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(other)
    os.link(path, other, follow_symlinks=False)

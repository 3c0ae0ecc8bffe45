"""Sockets that the old QEMU and the new one both call theirs.

The new QEMU, binding the path of the old one's socket, takes the path away from it; and the old
one, when it quits, removes the path, which is the new one's by then. So each such socket gets a
second name before the new QEMU starts (PATH.old, to give the path back should it fail), and once
more when the new one listens (PATH.new, to put it where the old one has removed it). The guard
(guard.py) sees to the end of it, whatever becomes of cprctl; should even the guard be killed, the
next cprctl that comes to the path mends it.

Which sockets those are the kernel tells: where the old QEMU listens, and which of those paths are
another socket's once the new one is there. No option has to be understood for it.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

from cprd.qemu.failure import Refused
from cprd.qemu.listeners import unix_paths

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

OLD, NEW = ".old", ".new"


class SharedPaths:
    """The sockets of a running QEMU that lie at a path. Owns a descriptor of each directory: a
    QEMU may have a root of its own, which cannot be reached any more when it has ended."""

    def __init__(self, old: int, words: Sequence[str], also: Iterable[str] = ()) -> None:
        """`old`: the pid of the old QEMU; `words`: of the new one's command; `also`: paths at which
        that one listens by its words, for a QEMU whose sockets we may not see."""
        self._words = words
        self._paths: list[_Path] = []
        self.fds: list[int] = []
        here = {os.path.abspath(path) for path in also}
        there = {_seen_from_here(old, path) for path in unix_paths(old)}
        for path in sorted(here | there):
            found = _Path.open(path)
            if found is not None:
                self._paths.append(found)
                self.fds.append(found.at)

    def before_new(self) -> None:
        """Keep the old one's sockets under a second name. Raises Refused."""
        for path in list(self._paths):
            try:
                path.link("", OLD)
            except OSError as error:
                if any(path.name in word for word in self._words):
                    raise Refused(
                        f"{path.where}: {error.strerror}: the new QEMU would take this path from"
                        " the old one, and it cannot get a second name meanwhile"
                    ) from None
                self._paths.remove(path)

    def new_listens(self) -> None:
        """The new QEMU has made its sockets: what it has taken gets a third name, what it has not
        is none of ours. Raises Refused."""
        for path in list(self._paths):
            if path.is_old(""):
                path.remove(OLD, NEW)
                self._paths.remove(path)
                continue
            try:
                path.link("", NEW)
            except FileNotFoundError:
                continue  # it has removed the path, and does not listen there
            except OSError as error:
                raise Refused(
                    f"{path.where}: {error.strerror}: the old QEMU would remove this path when it"
                    " quits, and it cannot get a second name meanwhile"
                ) from None

    def give_back(self) -> None:
        """The new QEMU has failed and ended: the paths are the old one's again."""
        for path in self._paths:
            if path.is_old(OLD):  # (not what an upgrade that was killed long ago has left)
                path.rename(OLD, "")
            path.remove(OLD, NEW)  # (a rename to itself leaves both names)

    def old_has_ended(self) -> None:
        """It has removed the paths (or not): they are the new one's for good. Whoever does this
        second finds nothing to do; a path where somebody listens anew is left alone."""
        for path in self._paths:
            with suppress(OSError):
                path.link(NEW, "", replace=False)
            path.remove(OLD, NEW)

    def new_has_ended(self) -> None:
        """While the old one lives: it gets back what nobody has taken meanwhile."""
        for path in self._paths:
            if path.is_old(OLD) and (path.is_missing() or path.is_same("", NEW)):
                path.rename(OLD, "")
            path.remove(OLD, NEW)

    def both_have_ended(self) -> None:
        for path in self._paths:
            path.remove(OLD, NEW)

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()
        self._paths.clear()


def mend(where: str) -> None:
    """Nobody listens at `where`, but somebody does at one of its second names: put that back. It
    takes a guard that was killed to come to this."""
    path = _Path.open(os.path.abspath(where), missing=True)
    if path is None:
        return
    try:
        for suffix in (NEW, OLD):
            # (Only then is anybody asked: a monitor has one client at a time.)
            if path.is_missing(suffix) or not path.answers(suffix):
                continue
            if path.is_missing():
                with suppress(OSError):
                    path.link(suffix, "", replace=False)
                path.remove(suffix)
            elif not path.answers(""):
                path.rename(suffix, "")
            return
    finally:
        os.close(path.at)


class _Path:
    """NAME in the directory `at` (a descriptor), and its second names. `where`: for people."""

    def __init__(self, at: int, name: str, where: str) -> None:
        self.at = at
        self.name = name
        self.where = where
        self._old = self._stat("")

    @classmethod
    def open(cls, where: str, *, missing: bool = False) -> _Path | None:
        """None when there is no socket; with `missing` only when there is no directory."""
        directory, name = os.path.split(where)
        if not name:
            return None
        try:
            at = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return None
        found = cls(at, name, where)
        if missing or not found.is_missing():
            return found
        os.close(at)
        return None

    def is_missing(self, suffix: str = "") -> bool:
        """Whether there is no socket of that name."""
        there = self._stat(suffix)
        return there is None or not stat.S_ISSOCK(there.st_mode)

    def is_old(self, suffix: str) -> bool:
        """Whether that name is of the socket that was here first."""
        there = self._stat(suffix)
        return self._old is not None and there is not None and os.path.samestat(self._old, there)

    def is_same(self, one: str, other: str) -> bool:
        first, second = self._stat(one), self._stat(other)
        return first is not None and second is not None and os.path.samestat(first, second)

    def answers(self, suffix: str) -> bool:
        """Whether a process listens there. Nothing is said on that connection."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.setblocking(False)
            try:
                failure = sock.connect_ex(f"/proc/self/fd/{self.at}/{self.name}{suffix}")
            except OSError:
                return False
        return failure in (0, errno.EAGAIN, errno.EACCES)

    def link(self, old: str, new: str, *, replace: bool = True) -> None:
        if replace:
            self.remove(new)
        os.link(
            self.name + old,
            self.name + new,
            src_dir_fd=self.at,
            dst_dir_fd=self.at,
            follow_symlinks=False,
        )

    def rename(self, old: str, new: str) -> None:
        with suppress(OSError):
            os.rename(self.name + old, self.name + new, src_dir_fd=self.at, dst_dir_fd=self.at)

    def remove(self, *suffixes: str) -> None:
        for suffix in suffixes:
            with suppress(OSError):
                os.unlink(self.name + suffix, dir_fd=self.at)

    def _stat(self, suffix: str) -> os.stat_result | None:
        try:
            return os.stat(self.name + suffix, dir_fd=self.at, follow_symlinks=False)
        except OSError:
            return None


def _seen_from_here(pid: int, path: str) -> str:
    """Where the path that `pid` has bound lies for us."""
    try:
        if not path.startswith("/"):
            path = os.path.join(os.readlink(f"/proc/{pid}/cwd"), path)
        ours = os.stat("/")
        theirs = os.stat(f"/proc/{pid}/root")
    except OSError:
        return path
    if os.path.samestat(ours, theirs):
        return os.path.abspath(path)
    return f"/proc/{pid}/root{os.path.normpath(path)}"

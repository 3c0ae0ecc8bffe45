"""The UNIX sockets of a hand-over: ours in a private directory, the paths that two QEMUs share, and
the paths that a new QEMU would take from a stranger.

Ours lie beside the VM's own monitor: a QEMU in a chroot or of another uid sees them there, and
nobody else can enter the directory. A user of a directory locks it. The next hand-over removes the
directories that killed helpers have left.

Shared paths (an upgrade): a new QEMU that binds the path of the old QEMU's socket takes the path
away. The old QEMU, when it quits, removes the path, which is the new QEMU's by then. So each such
socket gets a second name before the new QEMU starts (PATH.old, to give the path back on a failure),
and another when the new QEMU listens (PATH.new, to put it back after the removal). The guard
(spawn.py) finishes the work, also after the death of cprctl. Should even the guard be killed, the
next cprctl that comes to the path mends it. The kernel tells which sockets are shared: where the
old QEMU listens, and which of those paths lead to another socket once the new QEMU is there.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import stat
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from cprd.errors import LimitExceeded
from cprd.qemu.errors import Refused
from cprd.qemu.process import Process, unix_paths

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cprd.qemu.command import Command

MARK = "untouched"
"""The name of a file: as long as it exists, the new QEMU of an upgrade was never told to run. The
file has the record of the old QEMU, and counts while the old QEMU lives."""

_SUN_PATH = 107
_NAME = re.compile(r"\.cprd-[0-9a-f]{8}")
_YOUNG = 60.0  # s for which a directory is let alone, locked or not: its maker may just have begun


class PrivateDirectory:
    """Owns the directory and its files; close() removes all."""

    def __init__(self, beside: str, uid: int = -1) -> None:
        """`beside`: the path of a socket. `uid`: of the QEMU (-1: ours). Raises Refused."""
        parent = os.path.dirname(os.path.abspath(beside))
        sweep(parent)
        self.keep = ""  # the name of a file that outlives close(), and the directory with it
        self.path = os.path.join(parent, f".cprd-{os.urandom(4).hex()}")
        try:
            os.mkdir(self.path, 0o700)
            # From here on by this descriptor: whose QEMU it is may own the directory above, and put
            # a link in our place; what we do as root there must not reach elsewhere.
            self._fd = os.open(self.path, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with suppress(OSError):  # (a file system without locks: then nobody sweeps)
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Refused(
                f"{parent}: {error.strerror}: our sockets lie beside the QEMU's monitor, so that"
                " directory must be writable"
            ) from None
        try:
            self._uid = uid if uid not in (-1, os.geteuid()) and os.geteuid() == 0 else -1
            if self._uid >= 0:
                if os.fstat(self._fd).st_uid != 0:
                    raise Refused(f"{self.path}: somebody put another directory in its place")
                os.chown(self._fd, self._uid, -1)
        except BaseException:
            self.close()
            raise

    def at(self, name: str) -> str:
        """The path of a file in the directory. Raises LimitExceeded (too long for a socket)."""
        path = os.path.join(self.path, name)
        if len(os.fsencode(path)) > _SUN_PATH:
            self.close()
            raise LimitExceeded(
                f"{path}: longer than the {_SUN_PATH} bytes of a socket's address: put the QEMU's"
                " monitor into a directory with a shorter name"
            )
        return path

    def listen(self, name: str) -> socket.socket:
        """A listening socket of that name, the caller's."""
        self.at(name)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(f"/proc/self/fd/{self._fd}/{name}")
            if self._uid >= 0:
                os.chown(name, self._uid, -1, dir_fd=self._fd, follow_symlinks=False)
            sock.listen(1)
        except BaseException:
            sock.close()
            raise
        return sock

    def create(self, name: str, said: str = "") -> str:
        """Create a file with that content; returns its path."""
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=self._fd)
        try:
            os.write(fd, said.encode())
        finally:
            os.close(fd)
        return os.path.join(self.path, name)

    def remove(self, name: str) -> None:
        os.unlink(name, dir_fd=self._fd)

    def __enter__(self) -> PrivateDirectory:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove all, but for `keep` and then the directory. Safe to repeat."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        with suppress(OSError):
            for name in os.listdir(fd):
                if name != self.keep:
                    os.unlink(name, dir_fd=fd)
        os.close(fd)
        with suppress(OSError):
            os.rmdir(self.path)


def sweep(parent: str) -> None:
    """Remove the directories that killed helpers left in `parent`. Best effort."""
    try:
        within = os.open(parent, os.O_DIRECTORY | os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        for name in os.listdir(within):
            if _NAME.fullmatch(name):
                with suppress(OSError):
                    _sweep_one(within, name)
    except OSError:
        pass
    finally:
        os.close(within)


def _sweep_one(within: int, name: str) -> None:
    fd = os.open(name, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=within)
    try:
        if time.time() - os.fstat(fd).st_mtime < _YOUNG:
            return
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: its helper lives
        if _counts(fd):
            return
        for entry in os.listdir(fd):
            os.unlink(entry, dir_fd=fd)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=within)


def _counts(fd: int) -> bool:
    """Whether there is a mark of a QEMU that lives: a hold may still depend on the mark."""
    try:
        mark = os.open(MARK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd)
    except FileNotFoundError:
        return False
    try:
        record = json.loads(os.read(mark, 4096))
    except ValueError:
        return True  # not ours to judge
    finally:
        os.close(mark)
    old = Process.find(record) if isinstance(record, dict) else None
    if old is None:
        return False
    old.close()
    return True


def remove_mark(mark: str, uid: int) -> None:
    """Remove a mark that was kept for `uid`, and its directory. Best effort. `mark` is a claim of
    the saver: only a directory of our naming, owned by `uid`, is touched."""
    place, name = os.path.split(mark)
    if name != MARK or not _NAME.fullmatch(os.path.basename(place)):
        return
    with suppress(OSError):
        fd = os.open(place, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_uid != uid:
                return
            for left in os.listdir(fd):
                os.unlink(left, dir_fd=fd)
        finally:
            os.close(fd)
        os.rmdir(place)


# Paths that two QEMUs share

OLD, NEW = ".old", ".new"


class SharedPaths:
    """The sockets of a running QEMU that lie at a path. Owns a descriptor of each directory: the
    root of a QEMU in a chroot is out of reach once that QEMU has ended."""

    def __init__(self, old: int, words: Sequence[str], also: Iterable[str] = ()) -> None:
        """`old`: the pid of the old QEMU; `words`: the new QEMU's command; `also`: paths at which
        the new QEMU listens by its words, for an old QEMU whose sockets we may not see."""
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
        """Give the old QEMU's sockets a second name. Raises Refused."""
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
        """The new QEMU has made its sockets. A path that the new QEMU took gets a third name; the
        other paths are left alone. Raises Refused."""
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
        """The new QEMU has failed and ended: the paths are the old QEMU's again."""
        for path in self._paths:
            if path.is_old(OLD):  # (not what an upgrade that was killed long ago has left)
                path.rename(OLD, "")
            path.remove(OLD, NEW)  # (a rename to itself leaves both names)

    def old_has_ended(self) -> None:
        """The old QEMU has removed the paths (or not): the new QEMU gets them for good. A second
        call does nothing. A path where somebody listens anew is left alone."""
        for path in self._paths:
            with suppress(OSError):
                path.link(NEW, "", replace=False)
            path.remove(OLD, NEW)

    def new_has_ended(self) -> None:
        """While the old QEMU lives: give back the paths that nobody has taken meanwhile."""
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
    """Put a second name of `where` back when a process listens there and none at `where`: the
    guard of an upgrade was killed."""
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
        """None without a socket; with `missing` only without a directory."""
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
        """Whether the name leads to the socket that was here first."""
        there = self._stat(suffix)
        return self._old is not None and there is not None and os.path.samestat(self._old, there)

    def is_same(self, one: str, other: str) -> bool:
        first, second = self._stat(one), self._stat(other)
        return first is not None and second is not None and os.path.samestat(first, second)

    def answers(self, suffix: str) -> bool:
        """Whether a process listens there. Says nothing on the connection."""
        return is_listening(f"/proc/self/fd/{self.at}/{self.name}{suffix}")

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
    """The path for us, of a path that `pid` has bound."""
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


# Paths where somebody listens already


def refuse_taken(command: Command) -> None:
    """Raises Refused when a process listens at the path of one of COMMAND's own monitors.

    A QEMU that binds the path of another QEMU's socket takes the path away without a word. And
    when cprd holds nothing, a QEMU at the path has the guest: another QEMU would run the guest
    twice. (A command without a monitor cannot be asked.) Says nothing on the connection."""
    for path, _ in command.monitors(people=True):
        mend(path)
        if is_listening(path):
            raise Refused(
                f"a QEMU listens at {path} already, and its guest may run: nothing was started."
                " Save it (cprctl qemu save), shut its guest down, or end it; then start again"
            )


def is_listening(path: str) -> bool:
    """Whether a process listens at a path. Says nothing on the connection."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)  # a queue full of clients is an answer as well
        try:
            failure = sock.connect_ex(path)
        except OSError:  # too long for an address: nobody listens there
            return False
    return failure in (0, errno.EAGAIN, errno.EACCES)

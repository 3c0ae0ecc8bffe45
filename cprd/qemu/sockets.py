"""The paths of UNIX sockets that two QEMUs share, and the paths that a new QEMU would take from a
stranger. (Our own sockets lie in a private directory: private.py.)

Shared paths (an upgrade): a new QEMU that binds the path of the old QEMU's socket takes the path
away. The old QEMU, when it quits, removes the path, which is the new QEMU's by then. So each such
socket gets a second name before the new QEMU starts (PATH.old, to give the path back on a failure),
and another when the new QEMU listens (PATH.new, to put it back after the removal). The guard
(spawn.py) finishes the work, also after the death of cprctl. Should even the guard be killed, the
next cprctl that comes to the path mends it. The kernel tells which sockets are shared: where the
old QEMU listens, and which of those paths lead to another socket once the new QEMU is there.
"""

from __future__ import annotations

import _socket as socket  # as in rights
import errno
import os
import stat

from cprd.linux.places import open_place
from cprd.qemu.errors import Refused
from cprd.qemu.process import unix_paths
from cprd.qemu.signals import Deadline, sleep

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cprd.qemu.command import Command

# Paths that two QEMUs share

OLD, NEW = ".old", ".new"
_BINDING = 0.5  # s
_NOBODY = (errno.ECONNREFUSED, errno.ENOENT, errno.ENOTDIR)
"""Of a connection to a path where nobody listens. (EPROTOTYPE: a listener of another kind.)"""


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
        there = {seen_from_here(old, path) for path in unix_paths(old)}
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
        self._await_new()
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

    def _await_new(self) -> None:
        """A QEMU whose monitor answers may not have bound all paths yet: a thread does so for
        `-netdev stream`. Wait for those in the command, a moment."""
        named = [path for path in self._paths if path.is_named(self._words)]
        deadline = Deadline(_BINDING)
        while any(path.is_missing() or path.is_old("") for path in named):
            if deadline.has_passed():
                return
            sleep(0.005)

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
            try:
                path.link(NEW, "", replace=False)
            except OSError:
                pass
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
            # (Only then is anybody asked: a monitor has one client at a time.) In a directory for
            # all, such as /tmp, anybody may have made that name.
            if not path.is_ours(suffix) or not path.answers(suffix):
                continue
            if path.is_missing():
                try:
                    path.link(suffix, "", replace=False)
                except OSError:
                    pass
                path.remove(suffix)
            elif path.is_ours("") and path.is_dead():
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
        """None without a socket; with `missing` only without a directory in which we may work.
        Raises Refused for a socket of root's in a directory of others'."""
        directory, name = os.path.split(where)
        if not name:
            return None
        try:
            at = open_place(directory, listed=False)
        except OSError as error:
            if error.errno == errno.EPERM and not missing:
                raise Refused(f"{where}: {error.strerror}") from None
            return None
        found = cls(at, name, where)
        if missing or not found.is_missing():
            return found
        os.close(at)
        return None

    def is_named(self, words: Sequence[str]) -> bool:
        """Whether words of QEMU's name the path, as far as can be told."""
        name = self.name.replace(",", ",,")
        return any(before + name in word for word in words for before in "=:/")

    def is_missing(self) -> bool:
        """Whether there is no socket of that name."""
        there = self._stat("")
        return there is None or not stat.S_ISSOCK(there.st_mode)

    def is_ours(self, suffix: str) -> bool:
        """Whether there is a socket of that name, bound by our uid."""
        there = self._stat(suffix)
        return there is not None and stat.S_ISSOCK(there.st_mode) and there.st_uid == os.geteuid()

    def is_old(self, suffix: str) -> bool:
        """Whether the name leads to the socket that was here first."""
        there = self._stat(suffix)
        return self._old is not None and there is not None and os.path.samestat(self._old, there)

    def is_same(self, one: str, other: str) -> bool:
        first, second = self._stat(one), self._stat(other)
        return first is not None and second is not None and os.path.samestat(first, second)

    def answers(self, suffix: str) -> bool:
        """Whether a process listens there. Says nothing on the connection."""
        return _try(f"/proc/self/fd/{self.at}/{self.name}{suffix}") in (0, errno.EAGAIN)

    def is_dead(self) -> bool:
        """Whether the socket has no listener, of whatever type, any more."""
        return _try(f"/proc/self/fd/{self.at}/{self.name}") == errno.ECONNREFUSED

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
        try:
            os.rename(self.name + old, self.name + new, src_dir_fd=self.at, dst_dir_fd=self.at)
        except OSError:
            pass

    def remove(self, *suffixes: str) -> None:
        for suffix in suffixes:
            try:
                os.unlink(self.name + suffix, dir_fd=self.at)
            except OSError:
                pass

    def _stat(self, suffix: str) -> os.stat_result | None:
        try:
            return os.stat(self.name + suffix, dir_fd=self.at, follow_symlinks=False)
        except OSError:
            return None


def seen_from_here(pid: int, path: str) -> str:
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
    monitors = [path for path, _ in command.monitors(people=True)]
    others = [path for _, path in command.listening() if path not in monitors]
    for path in (*monitors, *others):
        if path in monitors:
            mend(path)
        if is_listening(path):
            raise Refused(
                f"a QEMU listens at {path} already, and its guest may run: nothing was started."
                " Save it (cprctl qemu save), shut its guest down, or end it; then start again"
            )


def is_listening(path: str) -> bool:
    """Whether a process listens at a path, or may do so. Says nothing on the connection."""
    return _try(path) not in _NOBODY


def _try(path: str) -> int:
    """The errno of a connection to the socket at a path; 0 for success."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)  # a queue full of clients is an answer as well
        return sock.connect_ex(path)
    except OSError:  # too long for an address: nobody listens there
        return errno.ENOENT
    finally:
        sock.close()

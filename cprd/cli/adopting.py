"""Descriptors of a process that runs, for `cprctl save --pid`: by pidfd_getfd(2), from outside."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from cprd.errors import CprdError, Denied, InvalidInput

if TYPE_CHECKING:
    from typing import NoReturn

KEY = "listener"


class Process:
    """A running process, and duplicates of descriptors. Owns both until `close`."""

    def __init__(self, pid: int) -> None:
        """Raises CprdError when there is no such process."""
        self.pid = pid
        self.fds: list[int] = []
        try:
            self.pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise CprdError(f"--pid {pid}: there is no such process") from None
        except OSError as error:
            raise InvalidInput(f"--pid {pid}: {error.strerror}") from None

    def take(self, number: int) -> int:
        """A duplicate of descriptor `number`, borrowed until `close`. Raises CprdError."""
        from cprd.linux.sockets import copy_from

        try:
            fd = copy_from(self.pidfd, number)
        except OSError as error:
            if error.errno == errno.EBADF:
                raise InvalidInput(f"--pid {self.pid}: descriptor {number} is not open") from None
            self._refuse(error)
        self.fds.append(fd)
        return fd

    def listeners(self) -> list[tuple[str, int, int]]:
        """The listening sockets, each once, as (name, id, descriptor), in the order of
        descriptors. Raises CprdError for a process without."""
        from cprd.linux.sockets import facts
        from cprd.linux.stdio import note

        seen = set()
        found: list[tuple[str, int, int]] = []
        bound = []
        for number in self._numbers():
            link = f"/proc/{self.pid}/fd/{number}"
            try:
                if not os.readlink(link).startswith("socket:"):
                    continue
                fd = self.take(number)
            except (FileNotFoundError, InvalidInput):
                continue  # closed since
            known = facts(fd)
            if known is None or known.inode in seen:
                continue
            seen.add(known.inode)
            if known.listening:
                found.append((KEY, len(found), fd))
            elif (known.port or known.path) and not known.connected:
                bound.append(f"{number} ({known})")
        if bound:
            note(
                "cprctl: bound, and no listeners: are they wanted too? --fd KEY=N takes them:"
                f" {', '.join(bound)}"
            )
        if not found:
            raise CprdError(
                f"--pid {self.pid}: the process has no listening socket (is it the one that"
                " listens? see ss -lntp)"
            )
        return found

    def close(self) -> None:
        """Close everything."""
        for fd in (*self.fds, self.pidfd):
            os.close(fd)
        self.fds.clear()

    def _numbers(self) -> list[int]:
        try:
            return sorted(int(name) for name in os.listdir(f"/proc/{self.pid}/fd"))
        except PermissionError as error:
            self._refuse(error)
        except OSError:
            raise CprdError(f"--pid {self.pid}: the process has ended") from None

    def _refuse(self, error: OSError) -> NoReturn:
        if error.errno in (errno.EPERM, errno.EACCES):
            raise Denied(
                f"--pid {self.pid}: its descriptors may be taken by who may trace it: as root, or"
                " as its own user where kernel.yama.ptrace_scope is 0"
            ) from None
        if error.errno == errno.ESRCH:
            raise CprdError(f"--pid {self.pid}: the process has ended") from None
        raise CprdError(f"--pid {self.pid}: {error.strerror}") from None

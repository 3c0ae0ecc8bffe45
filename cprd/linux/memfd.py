"""Memory files: made, sealed, checked and mapped.

The four seals together mean that nobody can change a memfd any more, so a reader may map it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterable

from cprd.errors import InvalidInput, LimitExceeded

_NAMED = {
    "F_SEAL_SEAL": fcntl.F_SEAL_SEAL,
    "F_SEAL_SHRINK": fcntl.F_SEAL_SHRINK,
    "F_SEAL_GROW": fcntl.F_SEAL_GROW,
    "F_SEAL_WRITE": fcntl.F_SEAL_WRITE,
}
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def sealed_memfd(name: str, parts: Iterable[bytes | memoryview]) -> int:
    """Make a memfd of `parts`, one after another, sealed against every change.

    The caller owns the result. Raises LimitExceeded when descriptors or memory run out."""
    fd = -1
    try:
        fd = os.memfd_create(name[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        left = [memoryview(part).cast("B") for part in parts if len(part)]
        while left:
            written = os.writev(fd, left)
            while left and written >= len(left[0]):
                written -= len(left.pop(0))
            if written:
                left[0] = left[0][written:]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise LimitExceeded(
            f"cannot make a memfd for {name!r}: {error.strerror}; raise RLIMIT_NOFILE (EMFILE) or"
            " the memory that this cgroup may use (ENOMEM, ENOSPC)"
        ) from None
    return fd


def missing_seals(fd: int) -> list[str] | None:
    """Names of the seals that a memfd lacks; None when `fd` is not a memfd, or not open.

    `fd` is borrowed. Does not block."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except (OSError, ValueError, OverflowError):
        return None
    return [name for name, seal in _NAMED.items() if not seals & seal]


def check_seals(key: str, fd: int) -> None:
    """Raise InvalidInput, with the section's key, unless nobody can change the memfd any more."""
    missing = missing_seals(fd)
    if missing is None:
        raise InvalidInput(
            f"section {key!r}: fd {fd} is not a memfd; a descriptor of another kind goes by"
            " save_fd(name, id, fd)"
        )
    if missing:
        raise InvalidInput(
            f"section {key!r}: the memfd lacks the seals {', '.join(missing)}; add them with"
            " fcntl(F_ADD_SEALS) after unmapping it everywhere, or pass memory that must stay"
            " writable by save_fd(name, id, fd)"
        )


def mapping(fd: int) -> mmap.mmap | None:
    """Map a memfd read-only, whole; None for an empty memfd. The caller closes the mapping.

    MAP_PRIVATE: before Linux 6.7 a shared mapping of a write-sealed memfd is refused, even a
    read-only mapping."""
    size = os.fstat(fd).st_size
    if not size:
        return None
    return mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)

"""Memory beyond the life of a process: a memfd whose only trace here is the mapping.

No descriptor stays open, and a forked child has no mapping (MADV_DONTFORK): nobody but the owner
can write. `mmap.mmap` keeps a copy of the descriptor before Python 3.13, so libc maps here.
"""

from __future__ import annotations

import fcntl
import os
import weakref

from cprd.errors import InvalidInput, LimitExceeded
from cprd.linux.nofile import ADVICE

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ctypes

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_READ_WRITE, _SHARED, _DONTFORK = 3, 1, 10  # sys/mman.h


def make_memfd(name: str, size: int) -> int:
    """A memfd of zeros whose size nobody can change; the caller owns it. Raises LimitExceeded."""
    fd = -1
    try:
        fd = os.memfd_create(f"cprd.{name}"[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        return fd
    except BaseException as error:
        if fd >= 0:
            os.close(fd)
        if not isinstance(error, OSError):
            raise
        raise LimitExceeded(
            f"cannot make memory {name!r} of {size} bytes: {error.strerror}; raise RLIMIT_NOFILE"
            f" {ADVICE} (EMFILE) or the memory that this cgroup may use (ENOMEM, ENOSPC)"
        ) from None


class Memory:
    """A writable mapping of a memfd. `view` and all slices of it stay valid as long as any of them
    is in use. The memory itself is kept by whoever has the memfd."""

    def __init__(self, name: str, fd: int) -> None:
        """`fd` is borrowed. Raises LimitExceeded."""
        import ctypes

        libc = _libc()
        self.size = os.fstat(fd).st_size
        address = libc.mmap(None, self.size, _READ_WRITE, _SHARED, fd, 0)
        if address in (None, ctypes.c_void_p(-1).value):
            error = os.strerror(ctypes.get_errno())
            raise LimitExceeded(f"cannot map memory {name!r} of {self.size} bytes: {error}")
        block = (ctypes.c_ubyte * self.size).from_address(address)
        self._unmap = weakref.finalize(block, libc.munmap, address, self.size)
        self._unmap.atexit = False
        if libc.madvise(address, self.size, _DONTFORK):
            raise LimitExceeded(f"cannot keep memory {name!r} from forked children (madvise)")
        self.view = memoryview(block).cast("B")

    def forget(self) -> None:
        """In a forked child: there is no mapping, and what lies at its place is another's."""
        self._unmap.detach()


def check_size(name: str, size: int) -> None:
    if type(size) is not int or not 0 < size < 1 << 47:
        raise InvalidInput(f"memory {name!r}: size {size!r}: wants a positive number of bytes")


def _libc() -> ctypes.CDLL:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    size, pointer, number = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
    libc.mmap.restype = pointer
    libc.mmap.argtypes = [pointer, size, number, number, number, ctypes.c_long]
    libc.munmap.argtypes = [pointer, size]
    libc.madvise.argtypes = [pointer, size, number]
    return libc

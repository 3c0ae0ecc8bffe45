"""RLIMIT_NOFILE: how many descriptors a process may have, and a uid in flight. (And RLIMIT_AS, for
a process that reads what a stranger made.)

The soft limit counts; a process may raise the soft limit up to the hard limit.
"""

from __future__ import annotations

import _thread
import os

from cprd.errors import LimitExceeded

ADVICE = "(resource.setrlimit, ulimit -n, LimitNOFILE=)"
"""How an administrator, a shell and a program raise the limit: the end of an error message."""

STAYS = "what is held stays held"

# The module `resource` is imported late here: a start of QEMU saves 0.3 ms. Clients import it when
# they begin (client/sockets.py).


def limits() -> tuple[int, int]:
    """The soft and the hard limit of this process."""
    import resource

    return resource.getrlimit(resource.RLIMIT_NOFILE)


def none_left(what: str, error: OSError, so: str = "") -> LimitExceeded:
    """For people: no descriptor left `what`. `so`: what became of what was wanted."""
    return LimitExceeded(
        f"no descriptor left {what} ({error.strerror}): RLIMIT_NOFILE is {_soft()}; raise it"
        f" {ADVICE}{so and '; '}{so}"
    )


def cut_short(what: str) -> LimitExceeded:
    """The error for MSG_CTRUNC: nearly always EMFILE, but recvmsg gives no errno."""
    return LimitExceeded(
        f"not all descriptors of {what} could be installed here (MSG_CTRUNC): open descriptors"
        f" reached RLIMIT_NOFILE, which is {_soft()}, or a security module refused one; raise the"
        f" limit {ADVICE}; {STAYS}"
    )


def check_room(count: int, beside: int) -> None:
    """Raises LimitExceeded where so many descriptors do not fit in this process, beside others."""
    if count + beside > _soft():
        soft, hard = limits()
        raise LimitExceeded(
            f"{count} descriptors do not fit in this process: its soft RLIMIT_NOFILE is {soft}"
            f" (hard {hard}); raise it before loading {ADVICE}; {STAYS}"
        )


def _soft() -> int:
    """Without a descriptor left nothing can be imported, `resource` neither."""
    return os.sysconf("SC_OPEN_MAX")


def raise_soft_limit(wanted: int | None = None) -> tuple[int, int]:
    """Raise the soft limit to `wanted`, or to the hard limit; never lower it.

    Returns both limits as before. Raises LimitExceeded where the kernel refuses."""
    soft, hard = limits()
    set_soft_limit(max(soft, hard if wanted is None else min(hard, wanted)))
    return soft, hard


def set_soft_limit(soft: int) -> None:
    """Set the soft limit, at most to the hard limit. Raises LimitExceeded."""
    import resource

    before, hard = limits()
    if before == soft:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    except (OSError, ValueError) as error:
        raise LimitExceeded(
            f"the soft RLIMIT_NOFILE of {before} cannot become {soft} (hard {hard}): {error}"
        ) from None


UNSEEN = 512 << 20  # bytes that a process is taken to have mapped where nobody can tell

_raised = _thread.RLock()
# A forked child has no other threads: neither the lock of one may stay, nor the limit.
os.register_at_fork(
    before=_raised.acquire, after_in_parent=_raised.release, after_in_child=_raised.release
)


class hard_limit:
    """A block with the soft limit at the hard limit, and as before afterwards.

    For parking, not for longer: select() and started programs rely on a low soft limit. Gives both
    limits as before. One thread at a time: no thread takes another's raised limit for its own."""

    def __enter__(self) -> tuple[int, int]:
        _raised.acquire()
        try:
            self._before = raise_soft_limit()
        except BaseException:
            _raised.release()
            raise
        return self._before

    def __exit__(self, *exc: object) -> None:
        try:
            set_soft_limit(self._before[0])
        finally:
            _raised.release()


def limit_memory(room: int) -> None:
    """Let this process map `room` more bytes at most: what needs more raises MemoryError."""
    import resource

    try:
        with open("/proc/self/statm", "rb") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # no /proc here
        mapped = UNSEEN
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = mapped + room
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))

"""The store: a list of names and descriptors, older first, as systemd's descriptor store."""

import fcntl
import os
import resource
import select
import stat

Entry = tuple[str, int, bool]  # name; descriptor, owned; to be dropped at a hang-up (FDPOLL=1)
MOST = 4096
MAX_NAME = 255
# $LISTEN_FDNAMES has to fit one string of a program's environment (MAX_ARG_STRLEN).
MAX_NAMES = 32 * 4096 - 1024
F_DUPFD_QUERY = 1027  # Linux 6.10


def room() -> int:
    """How many entries may be kept: a start duplicates each, and some are in use besides."""
    return max(0, min(MOST, (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 300) // 2))


def store(entries: list[Entry], name: str, fd: int, *, polled: bool) -> bool:
    """Own `fd`: keep or close `fd`. Returns False where the store has no room. A known open file
    stays under the first name."""
    if len(name) > MAX_NAME or not all(" " <= letter <= "~" and letter != ":" for letter in name):
        name = "stored"
    known = any(same(kept, fd) for _, kept, _ in entries)
    names = sum(len(kept) + 1 for kept, _, _ in entries) + len(name) + 1
    fits = len(entries) < room() and names <= MAX_NAMES
    if fits and not known:
        entries.append((name, fd, polled))
    else:
        os.close(fd)
    return fits or known


def remove(entries: list[Entry], name: str) -> None:
    """Close every entry of that name."""
    _drop(entries, [fd for called, fd, _ in entries if called == name])


def look(entries: list[Entry]) -> None:
    """Poll the polled entries once, and close those that hung up."""
    poll = select.poll()
    for _, fd, polled in entries:
        if polled:
            poll.register(fd, 0)  # POLLHUP and POLLERR come unasked
    _drop(entries, [fd for fd, _ in poll.poll(0)])


def _drop(entries: list[Entry], fds: list[int]) -> None:
    entries[:] = [entry for entry in entries if entry[1] not in fds]
    for fd in fds:
        os.close(fd)


def same(one: int, other: int) -> bool:
    """Whether two descriptors are one open file. Before Linux 6.10 only for sockets: each has an
    inode and an open file of its own."""
    try:
        return fcntl.fcntl(one, F_DUPFD_QUERY, other) == 1
    except OSError:
        first, second = os.fstat(one), os.fstat(other)
        found = (first.st_dev, first.st_ino) == (second.st_dev, second.st_ino)
        return found and stat.S_ISSOCK(first.st_mode)

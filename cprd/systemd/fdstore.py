"""The descriptor store of systemd: store, remove, and find out whether the store has room.

As measured on systemd 252 to 262, the store never answers. A full store, or no store at all, drops
descriptors, and answers a barrier all the same. The manager closes a dropped descriptor some time
after the barrier (254 and later leave the closing to another process), so a descriptor without a
hang-up proves nothing: of 1,000 such questions to a store of size
0, 130 to 180 were answered "kept". `probe` waits for a positive sign instead, see `Witness`.

Every other entry goes with FDPOLL=0 (with polling the manager forgets a socket after the peer's
end) and alone (within one datagram neither order nor identity survives). The functions here make
steps for a driver (`notify.drive`).
"""

from __future__ import annotations

import os
import select

from cprd.errors import InvalidInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from cprd.systemd.notify import Manager, Steps

MAX_NAME = 255  # characters of a FDNAME
PROBE = "cprd-canary"  # so it is called by every version: a killed process leaves its probe


# Messages


def check_name(name: str) -> str:
    """`name`, if the manager will keep the name unchanged. For any other name the manager would
    silently use "stored", so raises InvalidInput before anything is sent."""
    if len(name) > MAX_NAME:
        raise InvalidInput(f"store name of {len(name)} characters: at most {MAX_NAME}")
    if not all(" " <= letter <= "~" and letter != ":" for letter in name):
        raise InvalidInput(f"store name {name!r}: printable ASCII without ':' only")
    return name


def store_message(name: str) -> bytes:
    """To go with exactly one descriptor. The manager ignores an open file already in the store,
    under any name: to rename, remove the file first."""
    return b"FDSTORE=1\nFDPOLL=0\nFDNAME=" + check_name(name).encode()


def remove_message(name: str) -> bytes:
    """Removes every entry called `name`; no such entry is fine too."""
    return b"FDSTOREREMOVE=1\nFDNAME=" + check_name(name).encode()


# Steps


def store(manager: Manager, name: str, fd: int) -> Steps[None]:
    """Offer a descriptor, borrowed, to the store. No answer comes: see `keep`."""
    return manager.tell(store_message(name), (fd,))


def remove(manager: Manager, name: str) -> Steps[None]:
    """Take every entry called `name` out of the store. The manager closes the copies."""
    return manager.tell(remove_message(name))


def probe(manager: Manager) -> Steps[bool]:
    """Whether the store has room now, and so had room for everything sent before (nothing may have
    been removed in between). Takes an entry for the time of the question. A killed process leaves
    a probe as PROBE: `remove` PROBE at start, before anything is stored."""
    if not Witness.works():
        return False
    with Witness() as witness:
        yield from manager.tell(
            b"FDSTORE=1\nFDPOLL=1\nFDNAME=" + PROBE.encode(), (witness.fileno(),)
        )
        yield from manager.barrier()
        kept = witness.polled()
    if kept:
        yield from remove(manager, PROBE)
    return kept


def keep(manager: Manager, entries: Sequence[tuple[str, int]]) -> Steps[bool]:
    """Store `entries` (name, descriptor; borrowed) and return whether the manager has every entry:
    True, then all survive the process. False: the manager has some or none, because the store is
    full, or not offered (FileDescriptorStoreMax=0, NotifyAccess= of another process), or because
    the manager went away; remove by name.

    True also for a descriptor that was in the store before, under any name.
    """
    for name, _ in entries:
        check_name(name)
    for name, fd in entries:
        yield from store(manager, name, fd)
    return (yield from probe(manager))


class Witness:
    """A descriptor that tells whether anybody, in any process, has polled the descriptor.

    The manager polls an entry stored with FDPOLL=1 at once, and never polls a dropped descriptor.
    An epoll descriptor shows the difference: a poll takes descriptors that are no longer ready off
    the head of the list of ready descriptors. So make `first` ready, then
    `second`, then take `first` back and make `first` ready again at the end: `first` comes first
    when nobody has polled in between, and second when somebody has. (In Linux since 2009,
    from ep_read_events_proc on; `works` tries both directions.)

    Owns three descriptors; close() or `with` closes all.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._first = self._second = -1
        try:
            self._first = os.eventfd(0)
            self._second = os.eventfd(0)
            for fd in (self._first, self._second):
                self._epoll.register(fd, select.EPOLLIN)
                os.eventfd_write(fd, 1)
            os.eventfd_read(self._first)
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        return self._epoll.fileno()

    def polled(self) -> bool:
        """Whether anybody has polled. To be asked once, for asking polls."""
        os.eventfd_write(self._first, 1)
        return [fd for fd, _ in self._epoll.poll(0)] == [self._second, self._first]

    def close(self) -> None:
        self._epoll.close()
        for fd in (self._first, self._second):
            if fd >= 0:
                os.close(fd)
        self._first = self._second = -1

    def __enter__(self) -> Witness:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def works() -> bool:
        """Whether epoll of the kernel behaves as described."""
        with Witness() as alone, Witness() as watched:
            poll = select.poll()
            poll.register(watched, select.POLLHUP)
            poll.poll(0)
            return watched.polled() and not alone.polled()

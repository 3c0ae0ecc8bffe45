"""A live hold as a program sees the hold: the verbs of a State, kept at every change.

No verb here talks to cprd; the clients add those that do.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import (
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from os import SEEK_SET, lseek
from weakref import ref

from cprd.client.live import Live, Unsure
from cprd.errors import Fenced, InvalidInput, MissingKey
from cprd.linux.memfd import sealed_memfd
from cprd.linux.rights import close_all
from cprd.live.owner import Batch, inside, runs
from cprd.live.puts import INLINE
from cprd.state import InlineSection, MemfdSection
from cprd.state.descriptors import UNSET, duplicate, number_of
from cprd.state.sections import check_section_key, close_section, decode, encode

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    import socket
    from typing import Any, Self

    from cprd.protocol.rows import Kept
    from cprd.state import HasFileno

    Section = InlineSection | MemfdSection

_gathering: ContextVar[tuple[Gathering, ...]] = ContextVar("cprd.batch", default=())


class Gathering:
    """The changes of one batch() block. `sections`: by key, None where one was deleted."""

    def __init__(self, live: Live) -> None:
        self.live = live
        self.batch = Batch(live.writer())
        self.sections: dict[str, Section | None] = {}
        self.gone: list[tuple[str, int]] = []
        self.block: Callable[[], Any] = lambda: None  # the generator

    @property
    def is_open(self) -> bool:
        """Whether the block goes on: no interrupt of its end leaves it open."""
        block = self.block()
        return block is not None and block.gi_frame is not None

    def close(self) -> None:
        for key, section in self.sections.items():
            self.live.give_up(key, section)
        self.sections = {}
        self.batch.close()


class OwnCopy:
    """What a process has of the hold besides the queues: sections, and descriptors that a
    predecessor left and nobody took. Agrees with what a successor would find."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._lock = threading.RLock()  # of the sections

    def _check(self) -> None:
        self._live.check()
        if self._live.unsure:
            self._settle()

    def _commit(
        self, unsure: Sequence[Unsure], change: Callable[..., None], *arguments: Any, **options: Any
    ) -> None:
        """Make a change, then the same in the own copy. An interrupt may come in between: the next
        verb learns whether the change was made."""
        live = self._live
        with self._lock:
            if live.unsure:
                self._settle()
                if live.unsure:
                    raise inside()
            owner = live.writer()
            for one in unsure:
                if not isinstance(one.section, InlineSection):
                    one.before = owner.place(one.key)
            live.changing = sys._getframe()
            live.unsure = unsure
            try:
                change(*arguments, **options)
            except Exception:
                live.changing = None
                self._settle()
                raise
            for one in unsure:
                self._finish(one)
            live.unsure = ()
            live.changing = None

    def _settle(self) -> None:
        """What an interrupted change has kept, or not, comes to the own copy."""
        live = self._live
        with self._lock:
            if live.changing is not None and runs(live.changing):
                return  # in a signal handler that has interrupted the change
            live.changing = None
            owner = live.owner
            if owner is None:
                return
            try:
                made = [one.is_made(owner.place(one.key)) for one in live.unsure]
            except Fenced:
                return
            for one, is_made in zip(live.unsure, made, strict=True):
                if is_made:
                    self._finish(one)
                elif live.sections.get(one.name) is not one.section:
                    close_section(one.section)
            live.unsure = ()

    def _finish(self, one: Unsure) -> None:
        """Bring a change that was made to the own copy. May be done twice."""
        if one.fd is None:
            self._store(one.name, one.section)
        else:
            self._forget([one.fd])

    def _untaken(self, keys: list[tuple[str, int]]) -> list[Unsure]:
        """Of keys that are to change: those of copies that a predecessor left and nobody took."""
        live = self._live
        if not live.state.fd_count:
            return []
        return [Unsure(*key, None) for key in keys if live.state.find_fd(*key) >= 0]

    def _store(self, key: str, section: Section | None) -> None:
        """What is kept now."""
        live = self._live
        live.asked.add(key)
        old = live.sections.get(key)
        if section is None:
            live.sections.pop(key, None)
        else:
            live.sections[key] = section
        if old is not section:
            close_section(old)

    def _forget(self, keys: Iterable[tuple[str, int]]) -> None:
        """Close copies that a predecessor left and nobody took, of keys that are gone."""
        live = self._live
        fds = [live.state.take_fd(name, id, -1) for name, id in keys]
        fds = [fd for fd in fds if fd >= 0]
        if fds and live.defer is not None:
            live.defer(lambda: close_all(fds))
        else:
            close_all(fds)


class LiveVerbs(OwnCopy, MutableMapping[str, "Any"]):
    """What a LiveState does without cprd. Thread-safe; no method blocks, except where a blocking
    client lets go of a file whose last close blocks (SO_LINGER, network file systems).

    Every method raises InvalidInput after the end and in a forked child, a change also before
    confirm(); a change raises Fenced once the hold was dropped by force, LimitExceeded at a limit
    of the system. A change that raised was not made, unless the message says otherwise."""

    def __init__(self, live: Live) -> None:
        super().__init__(live)
        self._line: Any = live.line
        self._batches = 0
        self.name = live.ticket.name
        self.found = live.found  # False: a cold start
        self.attempts = live.attempts  # loads of what was found, this load included
        self.last_reject = live.last_reject
        self.last_end = live.last_end  # of the predecessor: "killed by SIGKILL", ...; "": unknown
        live.taken()

    @property
    def generation(self) -> int:
        """The number of the hold: greater after each take-over."""
        return self._live.ticket.generation

    @property
    def kept(self) -> Kept:
        """ "store" (survives a crash of cprd alone or with the owner) or "memory" (a crash of both
        at once loses the state)."""
        return self._live.kept

    @property
    def confirmed(self) -> bool:
        """Whether changes count: at once after a cold start."""
        return self._live.owner is not None

    # Descriptors

    def save_fd(
        self,
        name: str,
        id: int | HasFileno = UNSET,
        fd: int | HasFileno = UNSET,
        *,
        replace: bool = False,
    ) -> None:
        """Keep `fd` under (name, id): save_fd(name, id, fd), or save_fd(name, fd) for id 0.

        Kept when this returns: `fd` is borrowed, and may be closed at once. Raises InvalidInput for
        a key in use unless `replace`, a bad name or id, an ssl.SSLSocket, what cannot be passed to
        another process."""
        if fd is UNSET:
            id, fd = 0, id
        if type(id) is not int:
            raise InvalidInput(f"id {id!r:.100} of {name!r}: wants a signed 32 bit integer")
        batch = self._batch() if self._batches else None
        if batch is not None:
            batch.batch.save_fd(name, id, fd, replace=replace)
            if replace:
                batch.gone.append((name, id))
            return
        owner = self._live.writer()
        unsure = self._untaken([(name, id)]) if replace else []
        if unsure:
            self._commit(unsure, owner.save_fd, name, id, fd, replace=True)
        else:
            owner.save_fd(name, id, fd, replace=replace)

    def save_fds(
        self, name: str, fds: Mapping[int, int | HasFileno] | Iterable[tuple[int, int | HasFileno]]
    ) -> None:
        """Keep many descriptors of one name, in one step: a mapping of ids, or pairs (id, fd)."""
        pairs = [*fds.items()] if isinstance(fds, Mapping) else [*fds]
        with self.batch():
            for id, fd in pairs:
                self.save_fd(name, id, fd)

    def take_fd(self, name: str, id: int = 0, default: int = UNSET) -> int:
        """Return the descriptor that a predecessor left under (name, id); the caller owns the
        descriptor. The key stays kept until delete_fd. An absent key, or one that was taken or
        saved here: `default` if given, else MissingKey."""
        live = self._live
        self._check()
        fd = live.state.take_fd(name, id, -1)
        if fd >= 0:
            return fd
        if default is not UNSET:
            return default
        if self.has_fd(name, id):
            raise MissingKey(
                f"({name!r}, {id}) is kept, and this process has the descriptor: taken before, or"
                " saved here"
            )
        live.state.take_fd(name, id)
        raise AssertionError

    def take_fds(self, name: str) -> dict[int, int]:
        """Return all descriptors of one name that were left, by id; the caller owns each."""
        self._check()
        return self._live.state.take_fds(name)

    def take_socket(self, name: str, id: int = 0, *, blocking: bool = True) -> socket.socket:
        """As State.take_socket: O_NONBLOCK is set or cleared, whatever a predecessor did."""
        self._check()
        return self._live.state.take_socket(name, id, blocking=blocking)

    def take_sockets(
        self,
        name: str,
        family: int | None = None,
        type: int | None = None,
        *,
        blocking: bool = True,
    ) -> dict[int, socket.socket]:
        """As State.take_sockets."""
        self._check()
        return self._live.state.take_sockets(name, family, type, blocking=blocking)

    def find_fd(self, name: str, id: int = 0) -> int:
        """Return the descriptor that was left under (name, id) and not taken, still the state's;
        -1 when absent."""
        self._check()
        return self._live.state.find_fd(name, id)

    def delete_fd(self, name: str, id: int = 0) -> None:
        """Let go of (name, id). An absent key is no error.

        Call before the program closes the descriptor, and take the descriptor out of epoll first:
        with the program's own close the peer of a connection is told (FIN)."""
        batch = self._batch() if self._batches else None
        if batch is not None:
            batch.batch.delete_fd(name, id)
            batch.gone.append((name, id))
            return
        owner = self._live.writer()
        unsure = self._untaken([(name, id)])
        if unsure:
            self._commit(unsure, owner.delete_fd, name, id)
        else:
            owner.delete_fd(name, id)

    def fds(self, name: str | None = None) -> Iterator[tuple[str, int, int]]:
        """Iterate (name, id, fd) of what was left and not taken: of one name, or of all."""
        self._check()
        return self._live.state.fds(name)

    def fd_keys(self, name: str | None = None) -> list[tuple[str, int]]:
        """The keys (name, id) of all kept descriptors, oldest first: of one name, or of all. Inside
        a batch as its end will leave them."""
        live = self._live
        self._check()
        if live.owner is not None:
            keys = live.owner.fd_keys()
        else:
            names, ids, _ = live.came
            texts = names.decode("utf-8", "surrogateescape").split("\0") if len(ids) else []
            keys = [*zip(texts, ids, strict=True)]
        batch = self._batch() if self._batches else None
        if batch is not None:
            keys = batch.batch.fd_keys(keys)
        return keys if name is None else [key for key in keys if key[0] == name]

    def has_fd(self, name: str, id: int = 0) -> bool:
        """Whether a descriptor is kept under (name, id), taken or not."""
        owner = self._live.owner
        if owner is None or self._batches:
            return (name, id) in self.fd_keys()
        return owner.has_fd(name, id)

    # Sections

    def __getitem__(self, key: str) -> Any:
        section = self._section(key)
        data = section.view() if isinstance(section, MemfdSection) else memoryview(section.data)
        return decode(key, data) if section.packed else data

    def __setitem__(self, key: str, value: Any) -> None:
        check_section_key(key)
        if self._live.unsure:
            self._settle()
        old = self._live.sections.get(key)
        if isinstance(old, MemfdSection) and old.is_view(value):
            return  # kept as it is
        section = encode(key, value)
        if len(section.data) > INLINE:
            fd = sealed_memfd(f"section.{key}", [section.data])
            self._put(key, MemfdSection(fd, packed=section.packed, owned=True))
        else:
            self._put(key, InlineSection(bytes(section.data), packed=section.packed))

    def __delitem__(self, key: str) -> None:
        self._section(key)
        self._put(key, None)

    def __contains__(self, key: object) -> bool:
        return any(key == each for each in self)

    def __iter__(self) -> Iterator[str]:
        self._check()
        keys = dict.fromkeys(self._live.sections)
        batch = self._batch() if self._batches else None
        for key, section in batch.sections.items() if batch is not None else ():
            if section is None:
                keys.pop(key, None)
            else:
                keys[key] = None
        return iter(keys)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"<cprd.LiveState {self.name!r}, generation {self.generation}>"

    def save_section_fd(self, key: str, memfd: int | HasFileno) -> None:
        """Keep a section that already is a sealed memfd (borrowed, not copied)."""
        check_section_key(key)
        fd = duplicate(number_of(memfd), f"section {key!r}")
        self._put(key, MemfdSection(fd, packed=False, owned=True))

    def section_fd(self, key: str) -> int:
        """Return a section as a sealed memfd at its beginning, owned by the state."""
        with self._lock:
            section = self._section(key)
            if isinstance(section, InlineSection):
                fd = sealed_memfd(f"section.{key}", [section.data])
                section = MemfdSection(fd, packed=section.packed, owned=True)
                batch = self._batch() if self._batches else None
                inside = batch is not None and key in batch.sections
                (batch.sections if batch and inside else self._live.sections)[key] = section
            lseek(section.fd, 0, SEEK_SET)
            return section.fd

    # Several at once, memory, the end

    def batch(self) -> AbstractContextManager[Self]:
        """Several changes in one step: the changes of the block are there as a whole when the block
        ends, or, after an exception, not at all. For the verbs of this thread, or of this task;
        others go on. Descriptors are borrowed until the end. memory() takes no part."""
        if self._batches and self._batch() is not None:
            return nullcontext(self)  # part of the outer one
        batch = Gathering(self._live)
        block = self._gather(batch)
        batch.block = ref(block)
        return contextmanager(lambda: block)()

    def _gather(self, batch: Gathering) -> Generator[Self]:
        others = [other for other in _gathering.get() if other.is_open]
        token = _gathering.set((*others, batch))
        with self._lock:
            self._batches += 1
        try:
            yield self
            unsure = self._untaken(batch.gone)
            unsure += [Unsure(key, None, section) for key, section in batch.sections.items()]
            self._commit(unsure, self._live.writer().commit, batch.batch)
            batch.sections = {}
        finally:
            with self._lock:
                self._batches -= 1
            _gathering.reset(token)
            batch.close()

    def memory(self, name: str, size: int) -> memoryview:
        """Return `size` bytes of writable memory that outlives this process, the same view each
        time. A write is kept by itself, at no cost; a copy of many bytes may be torn by a kill, one
        aligned store of 8 bytes is not. Zeros when new, else as left. A forked child has none.

        Raises InvalidInput for another size than the memory has."""
        return self._live.writer().memory(name, size)

    def delete_memory(self, name: str) -> None:
        """Forget memory. Views stay usable, and are kept no longer. An absent name is no error."""
        self._live.writer().delete_memory(name)

    def untaken(self) -> list[tuple[str, int] | str]:
        """Keys of what was left and never asked for: (name, id), then sections."""
        self._check()
        return self._live.untaken()

    def leave(self) -> None:
        """End this process's use of all kept sockets without a word to the peers: every number of
        such a socket, copies included, refers to an inert socket afterwards (reads: end of file,
        writes: BrokenPipeError). No library can say goodbye on a connection that the successor
        shares. Call when no handler is in the midst of an answer; then close the libraries'
        objects, or end the process by os._exit(). Later changes raise InvalidInput.

        A thread that sleeps in accept() or recv() of such a socket goes on until that call ends.
        Does not block. Raises LimitExceeded; then nothing has changed."""
        self._live.silence()

    # Within

    def _batch(self) -> Gathering | None:
        for batch in _gathering.get():
            if batch.live is self._live and batch.is_open:
                return batch
        return None

    def _section(self, key: str) -> Section:
        live = self._live
        self._check()
        live.asked.add(key)
        batch = self._batch() if self._batches else None
        section = live.sections.get(key)
        if batch is not None:
            section = batch.sections.get(key, section)
        if section is None:
            some = ", ".join(map(repr, self)) or "none"
            raise MissingKey(f"no section {key!r}: the sections are {some:.300}")
        return section

    def _put(self, key: str, section: Section | None) -> None:
        """Keep a section, or none. `section` is owned from now on."""
        try:
            with self._lock:
                batch = self._batch() if self._batches else None
                into = self._live.writer() if batch is None else batch.batch
                change: tuple[Any, ...] = (into.save_section, key, section)
                if section is None:
                    change = (into.delete_section, key)
                elif isinstance(section, MemfdSection):
                    change = (partial(into.save_section_fd, packed=section.packed), key, section.fd)
                if batch is None:
                    self._commit((Unsure(key, None, section),), *change)
                else:
                    change[0](*change[1:])
                    old, batch.sections[key] = batch.sections.get(key), section
                    close_section(old)
        except BaseException:
            self._live.give_up(key, section)
            raise

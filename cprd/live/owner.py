"""The owner of a live hold: the verbs, and who may use them.

One lock for all: threads take turns, and a fork() of another thread waits until no copy of a kept
descriptor is installed. A forked child has no part in the hold. Once fenced, always fenced.
"""

from __future__ import annotations

import _socket as socket  # as in queue
import errno
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from os import getpid
from sys import _getframe

from cprd.errors import CprdError, Fenced, InvalidInput, LimitExceeded, MissingKey
from cprd.linux.processes import here
from cprd.linux.rights import close_all
from cprd.live import puts as make
from cprd.live.memory import Memory, check_size, make_memfd
from cprd.live.records import FD, Key
from cprd.live.root import Root
from cprd.live.segment import Put
from cprd.live.shape import SHAPE, Shape
from cprd.live.steps import Defer
from cprd.live.writer import Writer
from cprd.state.descriptors import number_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any

    from cprd.state import HasFileno


Place = tuple[int, bytes, object]


class Owner:
    """Keeps a state at every change: what a verb changed is kept when the verb returns.

    No verb talks to cprd. Verbs never block but for letting go of a file whose last close blocks
    (SO_LINGER, network file systems); with `defer` that goes to another thread. Verbs may be
    called in any thread, not in a signal handler that interrupts another verb.

    Every verb raises Fenced once the hold was dropped by force, InvalidInput after close() and in
    a forked child, LimitExceeded at a limit of the system. Unless the message of a LimitExceeded
    says otherwise, nothing was changed then."""

    def __init__(
        self,
        tx: socket.SocketType,
        rx: socket.SocketType,
        hold: int,
        *,
        shape: Shape = SHAPE,
        defer: Defer | None = None,
        begin: bool = True,
    ) -> None:
        """`tx`, `rx`: both ends of the root, owned from now on. `hold`: the nonce, 1 to 2^64 - 1.
        `begin`: the hold is empty, which is written down now."""
        self._lock = threading.RLock()
        root = Root(tx, rx, hold, shape)
        later = None if defer is None else partial(self._defer, defer)
        self._writer = Writer(root, self._lock, shape, later)
        self._quick = self._writer.quick
        self._ledger = self._writer.ledger
        self._where = self._ledger.where
        self._ask_linger = defer is not None
        self._memories: dict[str, Memory] = {}
        self._inherited: dict[str, int] = {}  # memfds of a predecessor's memory, not mapped yet
        self._pid = os.getpid()
        self._over: CprdError | None = None
        # Of the verb that runs: a frame; the key of a save_fd.
        self._changing: FrameType | Key | None = None
        _owners.add(self)
        if begin:
            self._act(self._writer.write_root)

    # Verbs

    def save_fd(self, name: str, id: int, fd: int | HasFileno, *, replace: bool = False) -> None:
        """Keep a descriptor under (name, id); it may be closed as soon as this returns.

        Raises InvalidInput for a key in use unless `replace`, a bad name or id, or what cannot be
        passed to another process."""
        key = make.fd_key(name, id)
        kind: Any = type(fd)
        plain = kind is int or (
            kind.__base__ is socket.SocketType and kind.fileno is socket.SocketType.fileno
        )
        thing: Any = fd if plain else number_of(fd)
        if here[0] != self._pid:
            self._refuse_child()
        with self._lock:  # as _act, in less time
            if self._over is not None or self._changing is not None:
                self._refuse()
            try:
                self._changing = key
                if not self._quick.save_fd(key, thing):
                    self._save_fd(key, number_of(thing), replace)
            except (Fenced, OSError) as error:
                raise self._failed(error) from None
            finally:
                self._changing = None

    def delete_fd(self, name: str, id: int = 0) -> None:
        """Let go of a descriptor. An absent key is no error.

        Once the program has closed its own, the peer of a connection is told (FIN)."""
        self._act(self._delete, make.fd_key(name, id))

    def save_section(self, key: str, value: Any) -> None:
        """Keep a msgpack value or a buffer; replaces what was under `key`. Above 4 KiB: a memfd.

        Raises InvalidInput for a value that msgpack cannot say."""
        found = make.section_key(key)
        made = make.Made()
        self._act(self._save_value, make.put_section(found, self._birth(found, True), value, made))

    def save_section_fd(self, key: str, memfd: int | HasFileno, *, packed: bool = False) -> None:
        """Keep a section that already is a sealed memfd, which is borrowed and not copied.
        `packed`: with one msgpack value in it, not raw bytes."""
        found = make.section_key(key)
        put = make.put_section_fd(found, self._birth(found, True), number_of(memfd), packed)
        self._change([put], ())

    def delete_section(self, key: str) -> None:
        """Forget a section. Raises MissingKey."""
        found = make.section_key(key)
        if not self.keeps(found):
            raise MissingKey(f"no section {key!r}")
        self._change([], [found])

    def memory(self, name: str, size: int) -> memoryview:
        """Writable memory that outlives this process; a write costs nothing but the write.

        Zeros when new, else as the predecessor left it. The view of a name is always the same.
        Raises InvalidInput for another size than the memory has."""
        key = make.memory_key(name)
        check_size(name, size)
        with self._lock:
            self._learn()
            memory = self._memories.get(name) if key in self._where else None
            if memory is None:
                memory = self._map(name, key, size)
            if memory.size != size:
                raise InvalidInput(
                    f"memory {name!r} has {memory.size} bytes, not {size}: delete_memory() it first"
                )
            return memory.view

    def delete_memory(self, name: str) -> None:
        """Forget memory. What is mapped here stays so as long as a view of it is in use. An absent
        name is no error."""
        self._change([], [make.memory_key(name)])
        self._memories.pop(name, None)
        close_all([self._inherited.pop(name, -1)])

    @contextmanager
    def batch(self) -> Iterator[Batch]:
        """Several changes in one step: there as a whole when the block ends, or not at all.

        An exception leaves everything as it was. Descriptors are borrowed until the block ends."""
        batch = Batch(self)
        try:
            yield batch
            self.commit(batch)
        finally:
            batch.close()

    def commit(self, batch: Batch) -> None:
        """Make the changes of a batch, in one step."""
        batch.check()
        self._change([*batch.puts.values()], [*batch.gone])

    def clear(self) -> None:
        """Keep nothing any more, in one step, and let go of everything. May block."""
        self._act(self._writer.clear)
        self._memories.clear()
        close_all(self._inherited.values())
        self._inherited.clear()

    def settle(self) -> None:
        """Finish what an earlier change, or a predecessor that was killed, did not come to: let go
        of what is not kept. For a successor, as soon as cprd has confirmed. The next change does
        the same. May block as delete_fd may."""
        self._act(self._writer.settle)

    def close(self) -> None:
        """Stop owning, keep everything: the next owner finds it. Safe to repeat."""
        with self._lock:
            if self._over is None or isinstance(self._over, Fenced):
                self._end(InvalidInput("this live hold was closed: its owner called close()"))

    # Questions

    @property
    def segments(self) -> int:
        return len(self._ledger.pool.segments)

    @property
    def unfinished(self) -> bool:
        """Whether the next change has something to finish for an earlier one."""
        return self._writer.unfinished

    @property
    def is_changing(self) -> bool:
        """Whether the caller has interrupted a verb: is a signal handler, or a finalizer."""
        return self._changing is not None and runs(self._changing)

    def keeps(self, key: Key) -> bool:
        """Whether a key is kept."""
        self._learn()
        return key in self._where

    @property
    def kept(self) -> int:
        """How many keys are kept: descriptors, sections and memory."""
        self._learn()
        return len(self._where)

    def has_fd(self, name: str, id: int) -> bool:
        return self.keeps(make.fd_key(name, id))

    def place(self, key: Key) -> Place | None:
        """Where a key is kept: op, value, and what is another object after each change of a key
        with a descriptor; None: nowhere. Finishes what an interrupt left."""
        if self.unfinished and not self.is_changing:
            self._act(self._writer.recover)
        segment = self._where.get(key)
        kept = None if segment is None else segment.keys.get(key)
        return None if kept is None else (kept[0], kept[2], segment)

    def fd_keys(self) -> list[tuple[str, int]]:
        """The keys of all descriptors, oldest first."""
        self._learn()
        with self._lock:
            kept = [(key, seg.keys.get(key)) for key, seg in self._where.items()]
        born = [(found[1], key) for key, found in kept if key[0] == FD and found is not None]
        return [_text(key) for _, key in sorted(born)]

    def sockets(self) -> set[int]:
        """The inodes of all kept sockets. Takes a moment for each: copies are made and closed."""
        found: set[int] = set()
        self._act(self._writer.sockets, found)
        return found

    # For what takes a hold over

    def fence(self, why: Fenced) -> None:
        """Somebody else has the hold by now: every verb raises `why`."""
        with self._lock:
            if self._over is None:
                self._end(why)

    def expect(self, files: int) -> None:
        """A state that was saved is to be kept now, with so many files, large sections included:
        whatever the usual limit, for files cost the owner two descriptors each."""
        self._writer.branches.files = max(self._writer.branches.files, files)

    def inherit(self, births: int, memories: dict[str, int]) -> Writer:
        """The writer, to be filled; births go on above `births`; owns the memfds of `memories`."""
        self._ledger.births = count(births + 1)
        self._inherited = memories
        return self._writer

    # Within

    def _learn(self) -> None:
        """After an interrupt: learn whether the last change was made."""
        if self._writer.steps.pending is not None:
            with self._lock:
                if self._over is None and not self.is_changing:
                    self._act(self._writer.recover)

    def _birth(self, key: Key, replace: bool) -> int:
        """The place of a key in the order of keys: of the key that is replaced, or a new one."""
        self._learn()
        segment = self._where.get(key)
        if segment is None:
            return next(self._ledger.births)
        if not replace:
            raise InvalidInput(
                f"key ({key[1].decode('utf-8', 'replace')!r}, {key[2]}) is used already:"
                " delete_fd() it first"
            )
        kept = segment.keys.get(key)
        return kept[1] if kept is not None else next(self._ledger.births)

    def _map(self, name: str, key: Key, size: int) -> Memory:
        if key in self._where and name not in self._inherited:
            raise InvalidInput(f"memory {name!r} was not kept by this process")
        fd = self._inherited.get(name, -1)
        if fd >= 0 and key in self._where:
            memory = Memory(name, fd)
            if memory.size == size:
                self._memories[name] = memory
                del self._inherited[name]
                os.close(fd)
            return memory
        made = make.Made()
        made.fd = make_memfd(name, size)
        memory = Memory(name, made.fd)
        # Before the change: an interrupt after the commit would leave a key without its memory.
        self._memories[name] = memory
        try:
            self._change([make.put_memory(key, next(self._ledger.births), made.fd)], ())
        except CprdError:
            del self._memories[name]
            raise
        return memory

    def _save_fd(self, key: Key, fd: int, replace: bool) -> None:
        self._writer.recover()
        birth = self._birth(key, replace)
        put = make.put_fd(key, birth, fd, self._ledger.inodes, self._ask_linger)
        self._writer.change([put], ())

    def _save_value(self, put: Put) -> None:
        if not self._quick.save_value(put):
            self._writer.change([put], ())

    def _delete(self, key: Key) -> None:
        writer = self._writer
        if not writer.quick.remove(key):
            writer.change([], [key])
        elif writer.ledger.pool.is_loose:
            writer.shrink()

    def _defer(self, defer: Defer, release: Callable[[], None]) -> None:
        defer(partial(self._release_late, release))

    def _release_late(self, release: Callable[[], None]) -> None:
        """In another thread. What was made void there meanwhile is let go of as well."""
        release()
        if self.unfinished and self._over is None:
            with suppress(CprdError):  # the next change says so
                self._act(self._writer.recover)

    def _change(self, puts: list[Put], gone: Iterable[Key]) -> None:
        self._act(self._writer.change, puts, gone)

    def _act(self, step: Any, *arguments: Any) -> None:
        """Take one step of the writer, alone."""
        if here[0] != self._pid:
            self._refuse_child()
        with self._lock:
            if self._over is not None or self._changing is not None:
                self._refuse()
            try:
                self._changing = _getframe()
                step(*arguments)
            except (Fenced, OSError) as error:
                raise self._failed(error) from None
            finally:
                self._changing = None

    def _refuse_child(self) -> None:
        """Raise in a forked child, which a C library may have forked."""
        if getpid() != self._pid:
            raise _forked()
        here[0] = self._pid

    def _refuse(self) -> None:
        """Raise, but for a change that an interrupt ended."""
        if self._over is not None:
            raise type(self._over)(*self._over.args)
        if self.is_changing:
            raise inside()

    def _failed(self, error: Fenced | OSError) -> Exception:
        """What a verb raises."""
        if isinstance(error, Fenced):
            self._end(error)
            return error
        if error.errno is None:
            return error  # of a signal handler, and no error of the kernel
        return _explained(error)

    def _end(self, why: CprdError) -> None:
        """Close all ends. What is mapped stays mapped."""
        self._over = why
        self._writer.close()
        close_all(self._inherited.values())
        self._inherited.clear()

    def _after_fork(self) -> None:
        """In the child."""
        self._lock = threading.RLock()
        self._changing = None
        for memory in self._memories.values():
            memory.forget()
        self._end(_forked())


class Batch:
    """Changes that are made in one step: the verbs of an owner, gathered. The last one of a key
    counts. Descriptors are borrowed until the change is made."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self.puts: dict[Key, Put] = {}
        self.gone: dict[Key, None] = {}
        self._made: list[make.Made] = []
        self._alive: list[object] = []
        self._files: dict[Key, tuple[int, int]] = {}  # device and inode, of what was borrowed

    def save_fd(self, name: str, id: int, fd: int | HasFileno, *, replace: bool = False) -> None:
        """As Owner.save_fd; an object with fileno() is kept alive."""
        key = make.fd_key(name, id)
        number = fd if type(fd) is int else number_of(fd)
        owner = self._owner
        if key in self.puts and not replace:
            raise InvalidInput(f"key ({name!r}, {id}) is used already: delete_fd() it first")
        birth = self._birth(key, replace)
        self._alive.append(fd)
        self._put(make.put_fd(key, birth, number, owner._ledger.inodes, owner._ask_linger))
        self._files[key] = _file(number)

    def delete_fd(self, name: str, id: int = 0) -> None:
        self._delete(make.fd_key(name, id))

    def save_section(self, key: str, value: Any) -> None:
        found = make.section_key(key)
        made = make.Made()
        self._made.append(made)
        self._put(make.put_section(found, self._birth(found, True), value, made))

    def save_section_fd(self, key: str, memfd: int | HasFileno, *, packed: bool = False) -> None:
        found = make.section_key(key)
        self._alive.append(memfd)
        birth = self._birth(found, True)
        self._put(make.put_section_fd(found, birth, number_of(memfd), packed))

    def delete_section(self, key: str) -> None:
        """Raises MissingKey."""
        found = make.section_key(key)
        there = found not in self.gone and self._owner.keeps(found)
        if not there and found not in self.puts:
            raise MissingKey(f"no section {key!r}")
        self._delete(found)

    def fd_keys(self, kept: list[tuple[str, int]]) -> list[tuple[str, int]]:
        """The keys of all descriptors after the batch, of `kept` before."""
        new = [key for key in self.puts if key[0] == FD]
        gone = {_text(key) for key in self.gone if key[0] == FD}
        keys = dict.fromkeys(key for key in kept if key not in gone)
        return [*(keys | dict.fromkeys(map(_text, new)))]

    def check(self) -> None:
        """Raise InvalidInput for a descriptor that the program closed too early: by now the number
        may be another file's."""
        for key, file in self._files.items():
            put = self.puts.get(key)
            if put is not None and _file(put[3]) != file:
                name = key[1].decode("utf-8", "replace")
                raise InvalidInput(
                    f"fd {put[3]} of ({name!r}, {key[2]}) was closed inside the batch: descriptors"
                    " are borrowed until the end of the block; nothing was changed"
                )

    def close(self) -> None:
        """Close what was made for the batch. Safe to repeat."""
        while self._made:
            self._made.pop().close()

    def _birth(self, key: Key, replace: bool) -> int:
        """The place of a key: what is replaced keeps the place, what was deleted comes last."""
        if key in self.puts:
            return self.puts[key][2]
        owner = self._owner
        return next(owner._ledger.births) if key in self.gone else owner._birth(key, replace)

    def _put(self, put: Put) -> None:
        self.puts[put[1]] = put
        self.gone.pop(put[1], None)

    def _delete(self, key: Key) -> None:
        self.puts.pop(key, None)
        self.gone[key] = None


def _text(key: Key) -> tuple[str, int]:
    """The name and id of a descriptor's key."""
    return key[1].decode("utf-8", "surrogateescape"), key[2]


def _file(fd: int) -> tuple[int, int]:
    """Device and inode of an open file; of a closed one what no file has."""
    try:
        found = os.fstat(fd)
    except OSError:
        return -1, -1
    return found.st_dev, found.st_ino


def inside() -> InvalidInput:
    return InvalidInput(
        "a change of the live hold inside another one: a signal handler or finalizer that"
        " interrupts a verb may not call a verb"
    )


def _forked() -> InvalidInput:
    return InvalidInput(
        "a live hold belongs to the process that opened it, not to a forked child: open the hold"
        " after the last fork (of a daemonizing program, too)"
    )


def _explained(error: OSError) -> CprdError:
    """What the kernel's errno means for whoever saves."""
    if error.errno == errno.EBADF:
        return InvalidInput("a descriptor is not open, or was closed during the call")
    if error.errno == errno.EINVAL:
        return InvalidInput(
            "a descriptor cannot be passed to another process (the kernel refuses some kinds,"
            " io_uring for one)"
        )
    return LimitExceeded(f"cannot keep the descriptors: {error.strerror}; nothing was changed")


def runs(mark: FrameType | Key) -> bool:
    """Whether a verb is among the callers of this call, by a frame, or by the key of a save_fd; an
    interrupt may have left the mark."""
    caller: FrameType | None = _getframe()
    while caller is not None:
        if caller is mark or (caller.f_code is _SAVE_FD and caller.f_locals.get("key") is mark):
            return True
        caller = caller.f_back
    return False


_SAVE_FD = Owner.save_fd.__code__
_owners: weakref.WeakSet[Owner] = weakref.WeakSet()
_held: list[Owner] = []


def _before_fork() -> None:
    for owner in sorted(_owners, key=id):
        owner._lock.acquire()
        _held.append(owner)


def _after_fork_in_parent() -> None:
    while _held:
        _held.pop()._lock.release()


def _after_fork_in_child() -> None:
    while _held:
        _held.pop()._after_fork()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)

"""Owners of live holds in processes of their own, which are killed; and what must be found then.

The test keeps the receiving ends of the roots, as cprd does. A child process is forked, not
started: thousands are killed in a run.
"""

from __future__ import annotations

import _socket
import contextlib
import mmap
import os
import pickle
import select
import signal
import struct
import traceback
from collections.abc import Iterator
from typing import Any

from cprd.daemon import releaser
from cprd.linux import pause
from cprd.linux.rights import close_all
from cprd.live.owner import Batch, Owner
from cprd.live.queue import make_pair
from cprd.live.reader import Found, read
from cprd.live.shape import Shape
from cprd.live.takeover import take_over
from tests.support.patience import PATIENCE

Op = tuple[Any, ...]
"""("save", name, id, thing) replaces; ("delete", name, id); ("section", key, value);
("drop", key); ("memory", name); ("write", name, byte); ("forget", name); ("batch", op, ...);
("clear",)."""

SMALL = Shape(keys=2, records=2, spread=2, root_records=3, part=2)
MIDDLE = Shape(keys=4, records=3, spread=0, root_records=5, part=3)
MEMORY = 4096
HOLD = 0x1122334455667788


def fenced(root: int) -> list[int]:
    """Fence a live hold, as a releaser does. Returns `segments_of` the root."""
    releaser.fence_root(root)
    return segments_of(root)


def segments_of(root: int) -> list[int]:
    """The segments of a live hold, each once; owned by the caller."""
    found: dict[int, int] = {}
    for _, segments in releaser.records(_socket.socket(fileno=os.dup(root))):
        for fd in segments:
            inode = os.fstat(fd).st_ino
            if inode not in found:
                found[inode] = os.dup(fd)
    return [*found.values()]


class Things:
    """What is kept: pipes, to be told apart by their inodes, and from `shared` on memfds."""

    def __init__(self, pipes: int = 24, memfds: int = 6) -> None:
        self.fds: list[int] = []
        self._other: list[int] = []
        for _ in range(pipes):
            reading, writing = os.pipe()
            self.fds.append(reading)
            self._other.append(writing)
        self.pipes = pipes
        self.fds += [os.memfd_create("thing") for _ in range(memfds)]
        self.inodes = [os.fstat(fd).st_ino for fd in self.fds]

    def close(self) -> None:
        close_all([*self.fds, *self._other])


class Model:
    """What must be kept, in order."""

    def __init__(self, things: Things) -> None:
        self.things = things
        self.fds: dict[tuple[str, int], int] = {}
        self.sections: dict[str, Any] = {}
        self.memories: dict[str, int] = {}

    def copy(self) -> Model:
        other = Model(self.things)
        other.fds, other.sections = dict(self.fds), dict(self.sections)
        other.memories = dict(self.memories)
        return other

    def apply(self, op: Op) -> None:
        verb, *rest = op
        if verb == "save":
            self.fds[rest[0], rest[1]] = self.things.inodes[rest[2]]
        elif verb == "delete":
            self.fds.pop((rest[0], rest[1]), None)
        elif verb == "section":
            self.sections[rest[0]] = rest[1]
        elif verb == "drop":
            self.sections.pop(rest[0], None)
        elif verb == "memory":
            self.memories.setdefault(rest[0], 0)
        elif verb == "write":
            self.memories[rest[0]] = rest[1]
        elif verb == "forget":
            self.memories.pop(rest[0], None)
        elif verb == "clear":
            self.fds, self.sections, self.memories = {}, {}, {}
        else:
            for part in rest:
                self.apply(part)

    def seen(self) -> Any:
        """In the form of `seen_in`."""
        return [*self.fds.items()], [*self.sections.items()], sorted(self.memories.items())


def seen_in(found: Found) -> Any:
    """What was found, as plain values; closes it."""
    try:
        fds = [((name, id), os.fstat(fd).st_ino) for name, id, fd in found.state.fds()]
        sections = [
            (key, bytes(value) if isinstance(value, memoryview) else value)
            for key, value in found.state.items()
        ]
        memories = sorted((name, os.pread(fd, 1, 0)[0]) for name, fd in found.memories.items())
        return fds, sections, memories
    finally:
        found.state.close()
        found.close()


def act(owner: Owner, things: Things, op: Op) -> None:
    """Make one change."""
    verb, *rest = op
    if verb == "batch":
        with owner.batch() as batch:
            for part in rest:
                _gather(owner, batch, things, part)
    elif verb == "memory":
        owner.memory(rest[0], MEMORY)
    elif verb == "write":
        owner.memory(rest[0], MEMORY)[0] = rest[1]
    elif verb == "forget":
        owner.delete_memory(rest[0])
    elif verb == "clear":
        owner.clear()
    elif verb == "drop":
        with contextlib.suppress(KeyError):
            owner.delete_section(rest[0])
    else:
        _gather(owner, owner, things, op)


def _gather(owner: Owner, into: Owner | Batch, things: Things, op: Op) -> None:
    verb, *rest = op
    if verb == "save":
        into.save_fd(rest[0], rest[1], things.fds[rest[2]], replace=True)
    elif verb == "delete":
        into.delete_fd(rest[0], rest[1])
    elif verb == "section":
        into.save_section(rest[0], rest[1])
    elif verb == "drop":
        with contextlib.suppress(KeyError):
            into.delete_section(rest[0])
    else:
        raise AssertionError(op)


class Root:
    """Both ends of a root; the test's own receiving end stays when an owner has them."""

    def __init__(self) -> None:
        self.tx, self.rx = make_pair()
        self.kept = os.dup(self.rx.fileno())

    def close(self) -> None:
        self.tx.close()
        self.rx.close()
        close_all([self.kept])
        self.kept = -1

    def ends(self) -> tuple[_socket.socket, _socket.socket]:
        """Copies of both ends, for an owner in this process."""
        made = [
            _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, os.dup(end.fileno()))
            for end in (self.tx, self.rx)
        ]
        return made[0], made[1]


class Told:
    """What a process says in shared memory before somebody kills it."""

    def __init__(self) -> None:
        self._shared: Any = mmap.mmap(-1, mmap.PAGESIZE)

    def _say(self, place: int, number: int) -> None:
        # One store, which a kill cannot tear: struct.pack_into() writes zeros before the number.
        with memoryview(self._shared) as raw, raw.cast("I") as words:
            words[place] = number

    @property
    def confirmed(self) -> bool:
        return bool(struct.unpack_from("I", self._shared)[0])

    @property
    def done(self) -> int:
        """How many changes of the script have returned."""
        return int(struct.unpack_from("I", self._shared, 4)[0])


class Child(Told):
    """A forked process that owns a hold: begins with an empty one, or takes over `before`, makes
    the changes of `script`, then those that come by `tell`.

    At pause point `kill_at` (counted from 1) it is killed."""

    def __init__(
        self,
        root: Root,
        things: Things,
        shape: Shape,
        script: list[Op],
        before: Root | None = None,
        kill_at: int = 0,
        log: str = "",
        at_op: int = -1,
    ) -> None:
        super().__init__()
        told, self._tell = os.pipe()
        self._done, done = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.close(self._tell)
                os.close(self._done)
                where = f"#{kill_at}" if kill_at else ""
                if at_op < 0:
                    pause.arm(where, log)
                self._run(root, things, shape, script, before, (told, done), (at_op, where))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        close_all([told, done])

    def _run(
        self,
        root: Root,
        things: Things,
        shape: Shape,
        script: list[Op],
        before: Root | None,
        ends: tuple[int, int],
        at: tuple[int, str],
    ) -> None:
        tx, rx = root.tx, root.rx
        os.close(root.kept)
        if before is None:
            owner = Owner(tx, rx, HOLD, shape=shape)
        else:
            found = read(before.kept)
            os.close(before.kept)
            before.tx.close()
            before.rx.close()
            owner = take_over(found, tx, rx, hold=HOLD, shape=shape)
            found.state.close()
        self._say(0, 1)
        for number, op in enumerate(script):
            if at[0] == number:
                pause.arm(at[1])
            act(owner, things, op)
            self._say(1, number + 1)
        while data := os.read(ends[0], 65536):
            op, where = pickle.loads(data)
            pause.arm(where)
            act(owner, things, op)
            pause.arm()
            os.write(ends[1], b"d")

    def tell(self, op: Op, kill_at: int = 0) -> bool:
        """One more change; with `kill_at` it is killed there. Whether the change returned."""
        os.write(self._tell, pickle.dumps((op, f"#{kill_at}" if kill_at else "")))
        if not kill_at:
            assert os.read(self._done, 1) == b"d", "the owner died of a change"
            return True
        poll = select.poll()
        poll.register(self._done, select.POLLIN)
        try:
            while not poll.poll(2):
                if os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT | os.WNOHANG):
                    return False
            assert os.read(self._done, 1) == b"d", "the owner died of a change"
            return True
        finally:
            self.kill()

    def stopped_or_ended(self) -> bool:
        """Wait; True: it stands at its pause point. False: it has ended well."""
        with _alarm(self.pid):
            found = os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert found is not None
        if found.si_code == os.CLD_STOPPED:
            return True
        assert (found.si_code, found.si_status) == (os.CLD_EXITED, 0), "the owner failed"
        return False

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.close()

    def finish(self) -> None:
        """Let it end by itself."""
        close_all([self._tell])
        self._tell = -1
        assert not self.stopped_or_ended()
        self.close()

    def close(self) -> None:
        os.waitpid(self.pid, 0)
        close_all([self._done] + [self._tell] * (self._tell >= 0))
        self._shared_close()

    def _shared_close(self) -> None:
        # Read once more by the test after this.
        data = self._shared[:8]
        self._shared.close()
        self._shared = data

    def end(self) -> None:
        """No more changes come."""
        close_all([self._tell])
        self._tell = -1


@contextlib.contextmanager
def _alarm(pid: int) -> Iterator[None]:
    """Kill a child that hangs."""

    def late(*_: object) -> None:
        os.kill(pid, signal.SIGKILL)

    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)

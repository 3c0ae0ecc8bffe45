"""The owner among others: peers, forked children, threads, limits, and cprd that takes the hold
away."""

from __future__ import annotations

import _socket
import ctypes
import fcntl
import gc
import os
import random
import resource
import select
import signal
import socket
import struct
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest

from cprd import Fenced, InvalidInput, LimitExceeded, MissingKey
from cprd.daemon.releaser import let_go_of_root
from cprd.linux import pause
from cprd.linux.rights import close_all, scm_fds
from cprd.live import branches, quick
from cprd.live.owner import Owner
from cprd.live.pool import MAX_OWN
from cprd.live.queue import make_pair
from cprd.live.reader import no_collection, read
from cprd.live.shape import Shape
from cprd.live.takeover import take_over
from tests.live.owning import HOLD, SMALL, Root, fenced, segments_of
from tests.support.descriptors import io_uring, open_fds
from tests.support.patience import patience, rest

pytestmark = pytest.mark.usefixtures("nothing_leaks")


@contextmanager
def owning(**options: object) -> Iterator[tuple[Owner, Root]]:
    root = Root()
    owner = Owner(*root.ends(), HOLD, **options)  # type: ignore[arg-type]
    try:
        yield owner, root
    finally:
        owner.close()
        root.close()


@contextmanager
def connections(count: int) -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    """TCP connections: the server's end and the peer's."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        made = []
        try:
            for _ in range(count):
                peer = socket.create_connection(listener.getsockname())
                made.append((listener.accept()[0], peer))
            yield made
        finally:
            for pair in made:
                for sock in pair:
                    sock.close()


@contextmanager
def eventfds(count: int) -> Iterator[list[int]]:
    fds = [os.eventfd(0) for _ in range(count)]
    try:
        yield fds
    finally:
        close_all(fds)


def is_told(peer: socket.socket, seconds: float) -> bool:
    """Whether the peer sees FIN within so long."""
    poll = select.poll()
    poll.register(peer, select.POLLIN)
    return bool(poll.poll(seconds * 1000)) and peer.recv(1) == b""


def in_flight(root: Root) -> int:
    """Descriptors parked in the root, and in all segments: what the kernel counts."""
    copies = segments_of(root.kept)
    try:
        return len(copies) + sum(scm_fds(fd) for fd in copies)
    finally:
        close_all(copies)


# Peers


@pytest.mark.parametrize("kept", [10, 10_000])
def test_a_peer_is_told_at_once(kept: int) -> None:
    with owning() as (owner, _), connections(4) as made, eventfds(1) as (other,):
        for number, (mine, _) in enumerate(made):
            owner.save_fd("conn", number, mine)
            for id in range(kept // 4):
                owner.save_fd(f"other{number}", id, other)
        assert owner.kept == kept // 4 * 4 + 4
        for number, (mine, peer) in enumerate(made):
            owner.delete_fd("conn", number)
            mine.close()
            assert is_told(peer, patience(0.1)), f"{number} of {kept}"


def test_a_peer_is_told_after_a_successor_let_go() -> None:
    with owning() as (owner, root), connections(3) as made, socket.socket() as other:
        for number, (mine, _) in enumerate(made):
            owner.save_fd("conn", number, mine)
            mine.close()
        owner.save_fd("other", 0, other)
        owner.close()
        found = read(root.kept)
        new = Root()
        successor = take_over(found, *new.ends())
        root.close()
        found.state.close()
        for number, (_, peer) in enumerate(made):
            assert not is_told(peer, 0)
            successor.delete_fd("conn", number)
            assert is_told(peer, patience(0.1))
        successor.close()
        new.close()


def test_a_successor_lets_go_of_what_its_predecessor_did_not_come_to() -> None:
    """The owner is killed between the commit of a deletion and the end of the deletion."""
    with connections(3) as made:
        root, new = Root(), Root()
        pid = os.fork()
        if pid == 0:
            owner = Owner(root.tx, root.rx, HOLD, shape=Shape(spread=0))
            for number, (mine, _) in enumerate(made):
                owner.save_fd("conn", number, mine)
            pause.arm("live:sent")
            owner.delete_fd("conn", 1)
            os._exit(1)
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for mine, _ in made:
            mine.close()
        found = read(root.kept)
        assert [id for _, id, _ in found.state.fds()] == [0, 2]
        found.state.close()
        successor = take_over(found, *new.ends())
        root.close()
        assert not is_told(made[1][1], 0)
        successor.settle()
        assert is_told(made[1][1], patience(0.1))
        assert not is_told(made[0][1], 0)
        successor.close()
        new.close()


# What stays


@pytest.mark.parametrize("verb", ["section", "sections", "replace", "save"])
def test_many_owners_leave_what_the_keys_need(verb: str) -> None:
    """One after the other, with a few changes each."""
    root = Root()
    owner = Owner(root.tx, root.rx, HOLD)
    with eventfds(1) as (fd,):
        for number in range(200):
            owner.save_section("count", number)
            if verb == "sections":
                owner.save_section(f"count.{number}", number)
            elif verb == "replace":
                owner.save_fd("fd", 0, fd, replace=True)
            elif verb == "save":
                owner.save_fd("fd", number, fd)
            kept = owner.kept
            assert owner.segments <= kept / 4 + 50, f"owner {number}, {kept} kept"
            assert in_flight(root) <= 1.5 * kept + 60
            owner.close()
            new = Root()
            found = read(root.kept)
            found.state.close()
            owner = take_over(found, *new.ends())
            root.close()
            root = new
            owner.settle()
        assert len(owner.fd_keys()) == {"replace": 1, "save": 200}.get(verb, 0)
    owner.close()
    root.close()


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("changes", [100_000, pytest.param(1_000_000, marks=pytest.mark.full)])
def test_many_changes_leave_what_the_keys_need(changes: int) -> None:
    """1,000 keys, changed at random: descriptors in flight, the owner's, and its memory."""
    draw = random.Random(1)
    fds = [os.eventfd(0) for _ in range(10)]
    with owning() as (owner, root):
        kept = set()
        for id in range(1000):
            owner.save_fd("key", id, fds[id % 10])
            kept.add(id)
        before, memory = open_fds(), _resident()
        for number in range(changes):
            id = draw.randrange(2000)
            if id in kept:
                owner.delete_fd("key", id)
                kept.discard(id)
            elif len(kept) < 1000:
                owner.save_fd("key", id, fds[number % 10])
                kept.add(id)
        for id in sorted(kept)[900:]:
            owner.delete_fd("key", id)
        kept = set(sorted(kept)[:900])
        assert owner.kept == len(kept)
        assert in_flight(root) <= 1.2 * len(kept) + 20
        assert open_fds() <= before + 2 * 40
        assert _resident() - memory < 8 << 20
        owner.close()
        found = read(root.kept)
        assert {id for _, id, _ in found.state.fds()} == kept
        found.state.close()
        found.close()
    close_all(fds)


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def test_sections_leave_what_they_need() -> None:
    with owning() as (owner, root):
        for number in range(3000):
            owner.save_section(f"s{number}", b"x" * 100)
        most = owner.segments
        for number in range(2990):
            owner.delete_section(f"s{number}")
        assert owner.segments <= 30 < most
        for number in range(20_000):
            owner.save_section("hot", number)
        assert owner.segments <= 30
        owner.close()
        found = read(root.kept)
        assert found.state["hot"] == 19_999
        assert len(found.state) == 11
        found.state.close()
        found.close()


# Files of the program


def test_a_lock_on_a_kept_file_stays() -> None:
    """Closing any copy of a regular file ends the POSIX locks of the process on it."""
    with tempfile.TemporaryFile() as file, owning() as (owner, _), eventfds(1) as (other,):
        fcntl.lockf(file, fcntl.LOCK_EX)
        owner.save_fd("file", 0, file)
        for number in range(20):
            owner.save_fd("other", number, other)
        for number in range(20):
            owner.delete_fd("other", number)
        owner.save_fd("file", 1, file)
        owner.delete_fd("file", 0)
        assert _locked_for_others(file.fileno())
        owner.delete_fd("file", 1)
        assert _locked_for_others(file.fileno())


def _locked_for_others(fd: int) -> bool:
    lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
    pid = os.fork()
    if pid == 0:
        found = struct.unpack("hhqqi4x", fcntl.fcntl(fd, fcntl.F_GETLK, lock))[0]
        os._exit(found == fcntl.F_WRLCK)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def test_there_is_a_limit_of_files() -> None:
    with owning() as (owner, _), tempfile.TemporaryFile() as file:
        for number in range(MAX_OWN):
            owner.save_fd("file", number, file)
        with pytest.raises(LimitExceeded, match=f"the limit is {MAX_OWN}"):
            owner.save_fd("file", MAX_OWN, file)
        owner.delete_fd("file", 3)
        owner.save_fd("file", MAX_OWN, file)
        assert owner.kept == MAX_OWN


def test_a_socket_of_the_hold_is_refused() -> None:
    with owning() as (owner, root), eventfds(1) as (fd,):
        owner.save_fd("a", 0, fd)
        mine = owner._writer.ledger.where[(0, b"a", 0)]
        assert mine.tx is not None
        for end in (root.kept, mine.rx.fileno(), mine.tx.fileno()):
            with pytest.raises(InvalidInput, match="live hold itself"):
                owner.save_fd("b", 0, end)
            with socket.socket(fileno=os.dup(end)) as sock:
                with pytest.raises(InvalidInput, match="live hold itself"):
                    owner.save_fd("b", 0, sock)


class Another(_socket.socket):
    """Says the number of another descriptor, as HasFileno may."""

    number = -1

    def fileno(self) -> int:
        return self.number


def test_a_socket_that_says_another_number_is_looked_at_by_that() -> None:
    with owning() as (owner, root), closing(socket.socket()) as plain, closing(Another()) as sock:
        for id in range(70):  # so that one record for a key more is the usual way
            owner.save_fd("a", id, plain)
        sock.number = root.kept
        with pytest.raises(InvalidInput, match="live hold itself"):
            owner.save_fd("b", 0, sock)


def test_a_child_forked_while_another_thread_reads_collects_garbage() -> None:
    reads, forked = threading.Event(), threading.Event()

    def read_on() -> None:
        with no_collection():
            reads.set()
            forked.wait(patience(10))

    thread = threading.Thread(target=read_on)
    thread.start()
    reads.wait(patience(10))
    pid = os.fork()
    if pid == 0:
        os._exit(not gc.isenabled())
    forked.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert gc.isenabled()


def test_what_may_block_goes_to_another_thread() -> None:
    """The last close of a lingering socket waits for its peer."""
    begun, go, ended = threading.Event(), threading.Event(), threading.Event()

    def defer(release: Callable[[], None]) -> None:
        def run() -> None:
            begun.set()
            go.wait(patience(20))
            release()
            ended.set()

        threading.Thread(target=run).start()

    with owning(defer=defer) as (owner, root), connections(3) as made:
        for number, (mine, _) in enumerate(made):
            if number == 1:
                mine.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 5))
            owner.save_fd("conn", number, mine)
        owner.delete_fd("conn", 1)
        made[1][0].close()
        assert begun.wait(patience(5))
        assert not is_told(made[1][1], 0)
        # Meanwhile its neighbours can be let go of, and others come.
        owner.delete_fd("conn", 0)
        owner.save_fd("conn", 3, made[2][0])
        go.set()
        assert ended.wait(patience(5))
        assert is_told(made[1][1], patience(5))
        owner.save_section("next", 1)
        made[0][0].close()
        assert is_told(made[0][1], patience(0.5))
        owner.close()
        found = read(root.kept)
        assert [id for _, id, _ in found.state.fds()] == [2, 3]
        found.state.close()
        found.close()


# Children and threads


def test_a_forked_child_has_no_part() -> None:
    with owning() as (owner, root):
        fd = os.eventfd(0)
        owner.save_fd("a", 0, fd)
        memory = owner.memory("m", 4096)
        memory[0] = 5
        before = open_fds()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                with pytest.raises(InvalidInput, match="forked child"):
                    owner.save_fd("a", 1, fd)
                with pytest.raises(InvalidInput, match="forked child"):
                    owner.delete_fd("a", 0)
                assert open_fds() <= before - 6  # root, segments, ballast
                owner.close()
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            memory[0] = 9
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGSEGV
        assert memory[0] == 5
        owner.save_fd("a", 1, fd)
        owner.close()
        os.close(fd)
        found = read(root.kept)
        assert found.state.fd_count == 2
        assert os.pread(found.memories["m"], 1, 0) == b"\5"
        found.state.close()
        found.close()


def test_a_child_that_a_c_library_forked_has_no_part() -> None:
    """No code of Python runs at such a fork."""
    libc = ctypes.PyDLL(None)
    with owning() as (owner, _), eventfds(1) as (fd,), socket.socket() as sock:
        owner.save_fd("a", 0, fd)
        pid = libc.fork()
        if pid == 0:
            status = 1
            try:
                for thing in (fd, sock):
                    with pytest.raises(InvalidInput, match="forked child"):
                        owner.save_fd("a", 1, thing)
                with pytest.raises(InvalidInput, match="forked child"):
                    owner.delete_fd("a", 0)
                with owning() as (other, _):  # of its own
                    other.save_fd("a", 1, fd)
                    other.save_fd("a", 2, sock)
                    assert other.kept == 2
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        owner.save_fd("a", 1, fd)
        assert owner.kept == 2


def test_a_fork_while_changes_go_on_keeps_no_copy() -> None:
    """A child that lives on has none of the connections that are let go of meanwhile."""
    with owning() as (owner, _), connections(40) as made:
        children: list[tuple[int, int]] = []

        def forks() -> None:
            for _ in range(12):
                told, tell = os.pipe()
                pid = os.fork()
                if pid == 0:
                    for mine, peer in made:  # its own inheritance
                        mine.close()
                        peer.close()
                    os.read(told, 1)
                    os._exit(0)
                os.close(told)
                children.append((pid, tell))

        for mine, _ in made:
            owner.save_fd("conn", mine.fileno(), mine)
        numbers = [mine.fileno() for mine, _ in made]
        thread = threading.Thread(target=forks)
        thread.start()
        spare = os.eventfd(0)
        for turn in range(400):
            owner.save_fd("spare", turn, spare)
            owner.delete_fd("spare", turn)
        for number in numbers:
            owner.delete_fd("conn", number)
        thread.join(patience(20))
        assert not thread.is_alive()
        try:
            for mine, peer in made:
                mine.close()
                assert is_told(peer, patience(1.0))
        finally:
            os.close(spare)
            for pid, tell in children:
                os.write(tell, b"e")  # later children have this end, too
                os.close(tell)
                os.waitpid(pid, 0)


def test_a_fork_waits_until_no_copy_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    with owning(shape=Shape(spread=0)) as (owner, _), eventfds(3) as fds:
        for number, fd in enumerate(fds):
            owner.save_fd("c", number, fd)
        mine = owner.segments * 2 + 4  # root and ballast
        counts: list[int] = []

        def fork() -> None:
            pid = os.fork()
            if pid == 0:
                os._exit(open_fds() != before - mine)
            counts.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

        thread = threading.Thread(target=fork)

        def point(name: str) -> None:
            if name == "live:send" and not thread.ident:
                thread.start()
                rest(0.1)  # in which the child must not come

        before = open_fds()
        monkeypatch.setattr(quick, "point", point)
        owner.delete_fd("c", 1)
        thread.join(patience(10))
        assert counts == [0]


def test_a_key_that_comes_meanwhile_is_in_use() -> None:
    with owning() as (owner, _), eventfds(2) as (first, second):

        class Late:
            def fileno(self) -> int:
                owner.save_fd("a", 0, first)  # as another thread may, at this moment
                return second

        with pytest.raises(InvalidInput, match="is used already"):
            owner.save_fd("a", 0, Late())


def test_threads_take_turns() -> None:
    with owning(shape=SMALL) as (owner, root):
        fds = [os.eventfd(0) for _ in range(4)]

        def work(number: int) -> None:
            for turn in range(300):
                owner.save_fd(f"t{number}", turn, fds[number])
                owner.save_section(f"t{number}", turn)
                if turn > 3:
                    owner.delete_fd(f"t{number}", turn - 3)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(patience(30))
        owner.close()
        found = read(root.kept)
        assert sorted((name, id) for name, id, _ in found.state.fds()) == sorted(
            (f"t{n}", id) for n in range(4) for id in (0, 297, 298, 299)
        )
        assert dict(found.state) == {f"t{n}": 299 for n in range(4)}
        found.state.close()
        found.close()
        close_all(fds)


# Fenced


@pytest.mark.parametrize("at", range(1, 30, 3))
def test_nothing_is_acknowledged_after_a_fence(at: int) -> None:
    """An owner that stands in the middle of a change, and goes on after its hold was dropped."""
    root = Root()
    fds = [os.eventfd(n + 1) for n in range(8)]
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(root.kept)
            owner = Owner(root.tx, root.rx, HOLD, shape=SMALL)
            for number, fd in enumerate(fds):
                owner.save_fd("c", number, fd)
            os.write(tell, b"r")
            pause.arm(f"#{at}")
            os.write(tell, _changes(owner, fds))
            status = 0
        finally:
            os._exit(status)
    assert os.read(told, 1) == b"r"
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
    segments = fenced(root.kept)
    found = read(root.kept)
    keys = {(name, id) for name, id, _ in found.state.fds()}
    found.state.close()
    found.close()
    os.kill(pid, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    returned, error, again = os.read(told, 4096).split(b";")
    assert (error, again) == (b"Fenced", b"Fenced")
    # Each change that returned is in what was read after the fence.
    for key, there in [(("c", n), False) for n in range(0, 8, 2)] + [(("d", 0), True)]:
        if f"{key[0]}{key[1]}" in returned.decode().split():
            assert (key in keys) is there, (key, returned)
    let_go_of_root(root.kept, deep=True)
    assert all(scm_fds(fd) == 0 for fd in segments)
    close_all([*segments, *fds, told, tell])
    root.close()


def _changes(owner: Owner, fds: list[int]) -> bytes:
    """In the owner: changes until one is refused; which returned, the error, and another try."""
    returned: list[str] = []
    try:
        owner.save_fd("d", 0, fds[0])
        returned.append("d0")
        for number in range(0, 8, 2):
            owner.delete_fd("c", number)
            returned.append(f"c{number}")
        for number in range(100):
            owner.save_fd("e", number, fds[0])
            owner.delete_fd("e", number)
    except Fenced:
        error = "Fenced"
    again = "returned"
    try:
        owner.save_section("s", 1)
    except Fenced:
        again = "Fenced"
    return f"{' '.join(returned)};{error};{again}".encode()


def test_a_hold_that_ends_deep_lets_go_of_everything() -> None:
    """Although a forked child of the owner has ends of its queues."""
    with connections(20) as made:
        root = Root()
        told, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            owner = Owner(root.tx, root.rx, HOLD)
            for number, (mine, _) in enumerate(made):
                owner.save_fd("conn", number, mine)
            os.write(tell, b"r")
            signal.pause()
        assert os.read(told, 1) == b"r"
        for mine, _ in made:
            mine.close()
        os.kill(pid, signal.SIGSTOP)
        segments = fenced(root.kept)
        assert scm_fds(root.kept) == len(segments) == 16
        # The owner itself has the connections open; its queues do not.
        let_go_of_root(root.kept, deep=True)
        assert not any(scm_fds(fd) for fd in (*segments, root.kept))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for _, peer in made:
            assert is_told(peer, patience(1.0))
        close_all([*segments, told, tell])
        root.close()


def test_clear_lets_go_of_everything() -> None:
    with owning() as (owner, root), connections(20) as made:
        for number, (mine, _) in enumerate(made):
            owner.save_fd("conn", number, mine)
            mine.close()
        owner.save_section("s", b"x" * 9000)
        owner.clear()
        for _, peer in made:
            assert is_told(peer, patience(1.0))
        assert (owner.kept, owner.segments, in_flight(root)) == (0, 0, 0)
        owner.save_section("s", 1)
        owner.close()
        found = read(root.kept)
        assert dict(found.state) == {"s": 1}
        found.state.close()
        found.close()


# Limits


def test_at_the_limit_in_flight_deletions_still_count() -> None:
    """A user who has as much in flight as RLIMIT_NOFILE allows: a save is refused and changes
    nothing; a deletion counts, and its descriptors are let go of with the ballast's help."""
    if os.geteuid() != 0:
        pytest.skip("wants root, to become another user")
    root = Root()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(root.kept)
            os.setgid(4711)
            os.setuid(4711)
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
            status = _at_the_limit(Owner(root.tx, root.rx, HOLD))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    found = read(root.kept)
    ids = {id for _, id, _ in found.state.fds()}
    assert not ids & {0, 1, 20, 21, 40, 41}
    assert len(ids) > 200
    found.state.close()
    found.close()
    root.close()


def _at_the_limit(owner: Owner) -> int:
    fd = os.eventfd(0)
    with pytest.raises(LimitExceeded, match="ETOOMANYREFS"):
        _save(owner, range(400), fd)
    full = owner.kept
    for id in (0, 20, 40, *range(50, 70)):
        owner.delete_fd("c", id)
    for id in range(1000, 1010):
        owner.save_fd("c", id, fd)
    with pytest.raises(LimitExceeded):
        _save(owner, range(2000, 2100), fd)
    assert full - 10 <= owner.kept
    # Another process of the same user takes all that is left, and the ballast's place, too.
    greedy = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    owner._writer.ballast.let_go()
    try:
        while True:
            socket.send_fds(greedy[0], [b"x"], [fd], socket.MSG_DONTWAIT)
    except OSError:
        pass
    for id in (1, 21, 41):
        with pytest.raises(LimitExceeded, match="the change counts"):
            owner.delete_fd("c", id)
        assert not owner.has_fd("c", id)
    assert owner.unfinished
    greedy[0].close()
    greedy[1].close()
    owner.delete_fd("c", 1000)
    assert not owner.unfinished
    return 0


def _save(owner: Owner, ids: range, fd: int) -> None:
    for id in ids:
        owner.save_fd("c", id, fd)


def test_without_room_for_descriptors_nothing_is_read() -> None:
    with owning() as (owner, root):
        fd = os.eventfd(0)
        for number in range(300):
            owner.save_fd("c", number, fd)
        os.close(fd)
        owner.close()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        before = open_fds()
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + 200, hard))
        try:
            with pytest.raises(LimitExceeded, match="what is held stays held"):
                read(root.kept)
            assert open_fds() == before
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        found = read(root.kept)
        assert found.state.fd_count == 300
        found.state.close()
        found.close()


# Words


def test_what_is_refused_changes_nothing() -> None:
    with owning() as (owner, _), socket.socket() as sock:
        owner.save_fd("a", 0, sock)
        for call, words in (
            (lambda: owner.save_fd("a", 0, sock), "used already"),
            (lambda: owner.save_fd("", 0, sock), "1 to 255 bytes"),
            (lambda: owner.save_fd("a", 1 << 31, sock), "32 bit"),
            (lambda: owner.save_fd("a", 1, 99_999), "not an open descriptor"),
            (lambda: owner.save_section("s", {"x": {1}}), "sorted"),
            (lambda: owner.memory("m", 0), "positive"),
        ):
            with pytest.raises(InvalidInput, match=words):
                call()
        with pytest.raises(MissingKey, match="no section 'none'"):
            owner.delete_section("none")
        owner.delete_fd("none", 5)
        with pytest.raises(ZeroDivisionError):
            _fail(owner, sock)
        owner.memory("m", 100)
        with pytest.raises(InvalidInput, match="has 100 bytes, not 200"):
            owner.memory("m", 200)
        assert owner.kept == 2
        owner.close()
        with pytest.raises(InvalidInput, match="was closed"):
            owner.save_section("s", 1)


@pytest.mark.parametrize("number", [1, 2])
def test_what_the_kernel_passes_to_nobody_is_refused(number: int) -> None:
    """Alone, as the first key of a segment and as a later one, and among others."""
    fd, ring = os.eventfd(0), io_uring()
    with owning() as (owner, root):
        for id in range(1, number):
            owner.save_fd("a", id, fd)
        with pytest.raises(InvalidInput, match="cannot be passed to another process"):
            owner.save_fd("a", 0, ring)
        with pytest.raises(InvalidInput, match="cannot be passed to another process"):
            _both(owner, fd, ring)
        owner.save_fd("a", number, fd)
        found = read(root.kept)
        keys = [("a", id) for id in range(1, number + 1)]
        assert [(name, id) for name, id, _ in found.state.fds()] == keys
        found.state.close()
        found.close()
    close_all([fd, ring])


def _both(owner: Owner, fd: int, ring: int) -> None:
    with owner.batch() as batch:
        batch.save_fd("b", 0, fd)
        batch.save_fd("b", 1, ring)


def test_a_small_send_buffer_is_made_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    """net.core.wmem_default may be small."""

    def small() -> tuple[socket.SocketType, socket.SocketType]:
        tx, rx = make_pair()
        tx.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        return tx, rx

    monkeypatch.setattr(branches, "make_pair", small)
    values = {f"s{number}": os.urandom(4000) for number in range(40)}
    with owning() as (owner, root):
        for key, value in values.items():
            owner.save_section(key, value)
        found = read(root.kept)
        assert {key: found.state[key] for key in found.state} == values
        found.state.close()
        found.close()


def _fail(owner: Owner, sock: socket.socket) -> None:
    with owner.batch() as batch:
        batch.save_fd("b", 0, sock)
        raise ZeroDivisionError


def test_memory_is_the_same_for_the_successor() -> None:
    with owning() as (owner, root):
        memory = owner.memory("journal", 1 << 20)
        before = open_fds()
        memory[10:14] = b"live"
        assert owner.memory("journal", 1 << 20) is memory
        assert open_fds() == before
        owner.close()
        found = read(root.kept)
        new = Root()
        take = take_over(found, *new.ends())
        with pytest.raises(InvalidInput, match="1048576 bytes"):
            take.memory("journal", 1 << 10)
        again = take.memory("journal", 1 << 20)
        assert bytes(again[10:14]) == b"live"
        again[0] = 1
        assert memory[0] == 1
        take.delete_memory("journal")
        assert again[0] == 1
        assert take.memory("journal", 16).tobytes() == bytes(16)
        take.close()
        found.state.close()
        new.close()


def test_descriptors_of_the_owner_are_few() -> None:
    """An eighth of the keys, for both ends of the segments."""
    fd = os.eventfd(0)
    with owning() as (owner, root):
        before = open_fds()
        for number in range(4096):
            owner.save_fd("c", number, fd)
        assert open_fds() - before <= 4096 / 8 + 4
        assert in_flight(root) <= 4096 * 1.07 + 4
    os.close(fd)

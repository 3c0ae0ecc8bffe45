"""A successor that waits reads a large bundle while it is being filled. Whatever becomes of the
saver in between: it gets all of it or nothing, and what it had read already is let go of."""

from __future__ import annotations

import gc
import os
import resource
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

import cprd
import cprd.trio
from cprd.bundle.layout import HEADER, MAGIC, NODE, VERSION
from cprd.client import link, verbs
from cprd.client.link import open_socket, read
from cprd.linux import rights
from cprd.linux.rights import receive, send
from cprd.protocol import messages
from tests.conftest import DaemonProcess, open_fds, until
from tests.daemon.test_sweep import Walker, learn
from tests.support.child import Child, Line
from tests.support.goods import Goods, goods
from tests.support.walk import NAME

pytestmark = pytest.mark.usefixtures("nothing_leaks")

MANY = verbs.ANNOUNCED + 100  # five leaves


def loads(line: Line, path: str, client: str, wait: float, soft: int | None) -> None:
    """Waits for NAME again and again, and says what came: tag and count, or the error's name."""
    if soft is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    def tell(got: cprd.State | cprd.CprdError) -> None:
        if isinstance(got, cprd.State):
            values = [os.eventfd_read(fd) for name, _, fd in got.fds() if name == "eventfd"]
            for (name, _, fd), value in zip(list(got.fds()), values, strict=False):
                assert name == "eventfd"
                os.eventfd_write(fd, value)
            whole = values == list(range(values[0], values[0] + len(values)))
            line.say(f"{got['tag']} {got.fd_count} {'whole' if whole else values}")
        else:
            line.say(f"{type(got).__name__}: {got}")

    def blocking() -> None:
        with cprd.connect(path) as daemon:
            line.say("ready")
            while line.hear() == "load":
                try:
                    with daemon.load(NAME, wait=wait) as claim:
                        tell(claim.state)
                except cprd.CprdError as error:
                    tell(error)

    async def on_trio() -> None:
        async with cprd.trio.connect(path) as daemon:
            line.say("ready")
            while line.hear() == "load":
                try:
                    async with daemon.load(NAME, wait=wait) as claim:
                        tell(claim.state)
                except cprd.CprdError as error:
                    tell(error)

    trio.run(on_trio) if client == "trio" else blocking()


class Successor:
    """A process that waits for NAME."""

    def __init__(self, child: Child) -> None:
        self.child = child
        assert child.hear() == "ready"
        self.base = open_fds(child.pid)

    def load(self) -> None:
        """Let it begin to wait, and see that it does."""
        self.child.say("load")
        time.sleep(0.1)

    def fds(self) -> int:
        """How many descriptors it has more than at first."""
        return open_fds(self.child.pid) - self.base

    def lets_go(self) -> None:
        until(lambda: self.fds() <= 0, lambda: f"{self.fds()} descriptors too many in it")

    def got(self, tag: str, count: int = MANY + 1) -> None:
        assert self.child.hear() == f"{tag} {count} whole"
        self.lets_go()


@contextmanager
def successor(
    daemon: DaemonProcess, client: str = "blocking", wait: float = 60.0, soft: int | None = None
) -> Iterator[Successor]:
    with Child(loads, daemon.path, client, wait, soft) as child:
        waits = Successor(child)
        waits.load()
        yield waits


@contextmanager
def saver_at(
    daemon: DaemonProcess, cargo: Goods, point: str, act: str = "save"
) -> Iterator[Walker]:
    walker = Walker(daemon.path, "blocking", act, cargo, {"CPRD_PAUSE": point})
    try:
        walker.stands()
        yield walker
    finally:
        if walker.process.poll() is None:
            walker.kill()


def go_on(walker: Walker) -> None:
    os.kill(walker.process.pid, signal.SIGCONT)
    walker.finish()


CLIENTS = pytest.mark.parametrize("client", ["blocking", "trio"])


@CLIENTS
def test_it_reads_what_is_there_while_the_saver_still_parks(
    daemon: DaemonProcess, client: str
) -> None:
    with successor(daemon, client) as waits, goods("new", MANY) as cargo:
        with saver_at(daemon, cargo, "pack:sent#3") as walker:
            until(lambda: waits.fds() >= 3 * 253, lambda: f"{waits.fds()} descriptors in it")
            assert waits.fds() < 3 * 253 + 20
            go_on(walker)
        waits.got("new")
        with daemon.connect() as connection:
            assert connection.list() == []


@CLIENTS
def test_all_may_be_read_before_the_answer_comes(daemon: DaemonProcess, client: str) -> None:
    with successor(daemon, client) as waits, goods("new", MANY) as cargo:
        with saver_at(daemon, cargo, "pack:parked") as walker:
            until(lambda: waits.fds() >= MANY, lambda: f"{waits.fds()} descriptors in it")
            go_on(walker)
        waits.got("new")


def test_a_saver_on_trio_announces_too(daemon: DaemonProcess) -> None:
    with successor(daemon) as waits, goods("new", MANY) as cargo:
        walker = Walker(daemon.path, "trio", "save", cargo, {"CPRD_PAUSE": "pack:sent#3"})
        walker.stands()
        until(lambda: waits.fds() >= 3 * 253, lambda: f"{waits.fds()} descriptors in it")
        go_on(walker)
        waits.got("new")


@pytest.mark.parametrize("saver", ["blocking", pytest.param("trio", marks=pytest.mark.full)])
def test_a_saver_killed_at_every_step_leaves_all_or_nothing(
    daemon: DaemonProcess, tmp_path: Path, saver: str
) -> None:
    with daemon.connect() as connection, successor(daemon) as waits:
        with goods("new", MANY) as cargo:
            points = learn(tmp_path, daemon.path, saver, "save", cargo)
            waits.got("new")
        base = daemon.fds()
        assert {"pack:built", "pack:sent", "pack:manifest", "save:packed"} <= set(points)
        for number, point in enumerate(points, 1):
            with goods("new", MANY) as cargo, goods("later", MANY) as later:
                waits.load()
                walker = Walker(daemon.path, saver, "save", cargo, {"CPRD_PAUSE": f"#{number}"})
                walker.stands()
                if point == "save:answered":
                    waits.got("new")
                    walker.kill()
                    continue
                time.sleep(0.02)  # for it to read what is there
                walker.kill()
                waits.lets_go()
                for ours, theirs in cargo.pairs:  # that nobody has what was being saved
                    ours.close()
                    assert theirs.recv(1) == b"", point
                assert connection.list() == [], point
                connection.save(NAME, later.state())
                waits.got("later")
        until(lambda: daemon.fds() == base, lambda: f"{daemon.fds()} descriptors in cprd")


@pytest.mark.parametrize("client", ["blocking", pytest.param("trio", marks=pytest.mark.full)])
def test_a_successor_killed_at_every_step_costs_nothing(
    start_daemon: Callable[..., DaemonProcess], tmp_path: Path, client: str
) -> None:
    daemon = start_daemon()
    with daemon.connect() as connection, goods("new", MANY) as cargo:
        base = daemon.fds()
        log = tmp_path / "points"

        def waits_for_it(env: dict[str, str]) -> Walker:
            walker = Walker(daemon.path, client, "wait-confirm", cargo, env)
            time.sleep(0.3)
            return walker

        first = waits_for_it({"CPRD_PAUSE_LOG": str(log)})
        connection.save(NAME, cargo.state())
        first.finish()
        points = log.read_text().split()
        assert {"load:early", "load:early-read", "load:claimed"} <= set(points)
        for number, point in enumerate(points, 1):
            walker = waits_for_it({"CPRD_PAUSE": f"#{number}"})
            connection.save(NAME, cargo.state())
            walker.stands()
            walker.kill()
            if point == "confirm:answered":
                assert connection.list() == []
                continue
            connection.wait(NAME, 10)
            with connection.load(NAME) as claim:
                cargo.check(claim.state)
        daemon.await_fds(base)


@CLIENTS
def test_a_refused_save_is_let_go_by_who_followed_it(daemon: DaemonProcess, client: str) -> None:
    with (
        successor(daemon, client) as waits,
        daemon.connect() as connection,
        goods("old") as old,
        goods("new", MANY) as new,
    ):
        prepared = connection.prepare(NAME, old.state())
        base = daemon.fds()
        with daemon.connect() as other, pytest.raises(cprd.AlreadyHeld):
            other.save(NAME, new.state())
        waits.lets_go()
        assert_let_go(new)
        daemon.await_fds(base)
        prepared.commit()
        waits.got("old", 4)


@contextmanager
def a_save_that_fails(daemon: DaemonProcess) -> Iterator[tuple[cprd.Daemon, Goods]]:
    """A connection and what is to be saved in this block, in vain, while a successor waits. Then
    nobody has anything of it, and the next save is served."""
    with (
        successor(daemon) as waits,
        daemon.connect() as connection,
        goods("new", MANY) as new,
        goods("later", MANY) as later,
    ):
        base = daemon.fds()
        yield connection, new
        waits.lets_go()
        assert_let_go(new)
        daemon.await_fds(base)
        assert connection.list() == []
        connection.save(NAME, later.state())
        waits.got("later")


def test_a_save_that_fails_while_it_parks_is_let_go_by_all(daemon: DaemonProcess) -> None:
    with a_save_that_fails(daemon) as (connection, new):
        state = new.state()
        closed = new.eventfds.pop()
        os.close(closed)
        with pytest.raises(cprd.InvalidInput, match=rf"fd {closed} of .* was closed before save"):
            connection.save(NAME, state)


class Interrupt(BaseException):
    pass


def test_an_interrupted_save_is_let_go_by_all(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(name: str) -> None:
        if name == "pack:manifest":
            raise Interrupt

    with a_save_that_fails(daemon) as (connection, new):
        with monkeypatch.context() as patch:
            patch.setattr("cprd.bundle.layout.point", interrupt)
            with pytest.raises(Interrupt):
                connection.save(NAME, new.state())


def assert_let_go(cargo: Goods) -> None:
    """That nobody but us has its connections."""
    for ours, theirs in cargo.pairs:
        ours.close()
        assert theirs.recv(1) == b""


@CLIENTS
def test_a_wait_that_ends_meanwhile_is_answered_in_time(daemon: DaemonProcess, client: str) -> None:
    with successor(daemon, client, wait=1.0) as waits, goods("new", MANY) as cargo:
        began = time.monotonic()
        with saver_at(daemon, cargo, "pack:sent#3") as walker:
            until(lambda: waits.fds() >= 3 * 253, lambda: f"{waits.fds()} descriptors in it")
            assert waits.child.hear().startswith("NotHeld: ")
            assert time.monotonic() - began < 3.0
            waits.lets_go()
            go_on(walker)
        waits.load()
        waits.got("new")


def test_of_two_that_wait_one_reads(daemon: DaemonProcess) -> None:
    with (
        successor(daemon) as first,
        successor(daemon, "trio") as second,
        goods("new", MANY) as cargo,
    ):
        with saver_at(daemon, cargo, "pack:sent#3") as walker:
            until(lambda: first.fds() >= 3 * 253, lambda: f"{first.fds()} descriptors in it")
            assert second.fds() <= 0
            go_on(walker)
        first.got("new")
        assert second.fds() <= 0


@CLIENTS
def test_one_that_has_no_room_for_it_says_so_and_it_stays_held(
    daemon: DaemonProcess, client: str
) -> None:
    with successor(daemon, client, soft=600) as waits, goods("new", MANY) as cargo:
        with daemon.connect() as connection:
            connection.save(NAME, cargo.state())
            assert waits.child.hear().startswith("LimitExceeded: ")
            waits.lets_go()
            connection.wait(NAME, 10)
            with connection.load(NAME) as claim:
                cargo.check(claim.state)


def test_a_daemon_that_is_killed_in_between_gets_the_whole_save(daemon: DaemonProcess) -> None:
    with successor(daemon) as waits, goods("new", MANY) as cargo:
        with saver_at(daemon, cargo, "pack:sent#3") as walker:
            until(lambda: waits.fds() >= 3 * 253, lambda: f"{waits.fds()} descriptors in it")
            daemon.restart()
            go_on(walker)
        waits.got("new")


@pytest.mark.parametrize("answered", [False, True], ids=["asked", "answered"])
def test_a_daemon_that_stands_still_makes_it_wait(
    start_daemon: Callable[..., DaemonProcess], answered: bool
) -> None:
    daemon = start_daemon(env={"CPRD_PAUSE": "daemon:saved" if answered else "daemon:announced"})
    with successor(daemon) as waits, goods("new", MANY) as cargo:
        walker = Walker(daemon.path, "blocking", "save", cargo)
        os.waitid(os.P_PID, daemon.pid, os.WSTOPPED | os.WNOWAIT)
        if answered:
            assert waits.child.hear() == f"new {MANY + 1} whole"
        os.kill(daemon.pid, signal.SIGCONT)
        walker.finish()
        if not answered:
            assert waits.child.hear() == f"new {MANY + 1} whole"
        waits.lets_go()


# What the daemon is told, word by word


@contextmanager
def raw(path: str, **limits: Any) -> Iterator[socket.SocketType]:
    with closing(open_socket(path)) as sock:
        sock.settimeout(10)
        send(
            sock, messages.encode({"verb": "hello", "version": messages.VERSION, "limits": limits})
        )
        read(sock, 0)
        yield sock


def offer(cargo: Goods, verb: str, name: str = NAME) -> tuple[bytes, Any]:
    """A save of a small state, in its words; and the bundle, to be closed."""
    from cprd.bundle.layout import pack

    packed = pack(cargo.state())
    fields: dict[str, Any] = {"fds": packed.fds, "bytes": packed.size, "parked": packed.parked}
    fields |= {"depth": packed.depth, "ttl": None, "after_exit": "no", "if_exists": "error"}
    message = {"verb": verb, "name": name, **fields, "require": None, "nonce": messages.nonce()}
    return messages.encode(message), packed


WAIT = {"verb": "load", "name": NAME, "wait": 10.0, "lease": 5.0, "generation": None}


@pytest.mark.parametrize("limits", [{}, {"early": 1}, {"early": None}], ids=repr)
def test_who_did_not_ask_for_it_is_told_of_nothing_early(
    daemon: DaemonProcess, limits: dict[str, Any]
) -> None:
    with goods("new") as cargo, raw(daemon.path, **limits) as waits, raw(daemon.path) as saver:
        send(waits, messages.encode({**WAIT, "nonce": messages.nonce()}))
        time.sleep(0.1)
        data, packed = offer(cargo, "announce")
        send(saver, data, [packed.fd])
        send(saver, messages.FILLED)
        assert read(saver, 0).fields["generation"]
        packed.close()
        answer = read(waits, 0)
        assert not answer.early
        answer.close()


def test_what_is_announced_and_not_filled_is_let_go(daemon: DaemonProcess) -> None:
    with raw(daemon.path, early=True) as waits, raw(daemon.path) as saver:
        send(waits, messages.encode({**WAIT, "nonce": messages.nonce()}))
        until(lambda: daemon.fds() > 0, lambda: "")
        base = daemon.fds()
        for end in ("not filled", "announced again", "another request", "the connection's"):
            with goods("new") as cargo:
                data, packed = offer(cargo, "announce")
                send(saver, data, [packed.fd])
                packed.close()
                early = read(waits, 0)
                assert early.early
                assert len(early.fds) == 1
                early.close()
                until(lambda: daemon.fds() == base + 1, lambda: f"{daemon.fds()}, not {base + 1}")
                if end == "not filled":
                    send(saver, messages.encode({"verb": "filled", "save": False}))
                elif end == "announced again":
                    with goods("again") as other:
                        data, packed = offer(other, "announce", "another")
                        send(saver, data, [packed.fd])
                        packed.close()
                        until(lambda: daemon.fds() == base + 1, lambda: f"{daemon.fds()}")
                        assert_let_go(cargo)
                    send(saver, messages.encode({"verb": "filled", "save": False}))
                elif end == "another request":
                    send(saver, messages.encode({"verb": "status"}))
                    assert read(saver, 0).fields["phases"] == {}
                else:
                    saver.close()
                if cargo.pairs[0][0].fileno() >= 0:
                    assert_let_go(cargo)


def test_filled_without_an_announcement_is_refused(daemon: DaemonProcess) -> None:
    with raw(daemon.path) as sock:
        for _ in range(2):
            send(sock, messages.FILLED)
            with pytest.raises(cprd.ProtocolError, match="nothing was announced"):
                read(sock, 0)


def test_an_announcement_is_refused_when_it_is_a_save(daemon: DaemonProcess) -> None:
    """Its errors are the save's."""
    with goods("new") as cargo, raw(daemon.path) as sock:
        send(sock, messages.encode({"verb": "announce", "name": 7}))
        send(sock, messages.FILLED)
        with pytest.raises(cprd.ProtocolError, match="save: the field 'name' wants"):
            read(sock, 0)
        data, packed = offer(cargo, "announce", "no/such/name")
        for count, why in ((1, "wants NAME"), (0, "descriptors with it")):
            if not count:
                packed.close()
                data, packed = offer(cargo, "announce")
            send(sock, data, [packed.fd] * count)
            send(sock, messages.FILLED)
            with pytest.raises(cprd.CprdError, match=why):
                read(sock, 0)
        packed.close()


def test_what_is_no_bundle_is_let_go_by_who_was_told_of_it(daemon: DaemonProcess) -> None:
    """Whatever a saver of the same name announces, the waiting goes on."""
    reading, writing = os.pipe()
    with successor(daemon) as waits, goods("new", MANY) as cargo, goods("small") as small:
        try:
            with raw(daemon.path) as saver:
                data, packed = offer(small, "announce")
                for fds in ([reading], [saver.fileno()], [packed.fd]):
                    send(saver, data, fds)
                packed.close()
                waits.lets_go()
                with daemon.connect() as connection:
                    connection.save(NAME, cargo.state())
                waits.got("new")
        finally:
            os.close(reading)
            os.close(writing)


def test_a_bundle_that_was_read_early_and_another_that_was_saved(daemon: DaemonProcess) -> None:
    """It is the one that was saved that counts."""
    with goods("first", MANY) as first, goods("second", MANY) as second:
        with successor(daemon) as waits, daemon.connect() as connection:
            with saver_at(daemon, first, "pack:parked") as walker:
                until(lambda: waits.fds() >= MANY, lambda: f"{waits.fds()} descriptors in it")
                connection.save(NAME, second.state())
                waits.got("second")
                waits.load()
                go_on(walker)
            waits.got("first")


def test_received_from_early_it_is_damaged(daemon: DaemonProcess) -> None:
    """A waiting program that receives instead of peeking destroys what is being saved: said so,
    and never served in part."""
    with goods("new", MANY) as cargo, raw(daemon.path, early=True) as waits:
        send(waits, messages.encode({**WAIT, "nonce": messages.nonce()}))
        time.sleep(0.1)
        with saver_at(daemon, cargo, "pack:sent#3") as walker:
            early = read(waits, 0)
            assert early.early
            with socket.socket(fileno=os.dup(early.fds[0])) as root:
                _, leaves, _ = receive(root, 64)
            os.kill(walker.process.pid, signal.SIGCONT)
            assert walker.process.wait(30) != 0
        for fd in (*leaves, *early.fds):
            os.close(fd)
        with daemon.connect() as connection:
            assert connection.list() == []


# Who is interrupted, or short of something


def test_an_interrupt_around_the_announcement_leaves_the_connection_in_step(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = rights.send

    def interrupted(sock: Any, data: bytes, *rest: Any) -> None:
        if b"announce" in data:
            raise KeyboardInterrupt
        real(sock, data, *rest)

    with goods("new", MANY) as new, goods("a") as a, daemon.connect() as connection:
        with monkeypatch.context() as patch:
            patch.setattr(link, "send", interrupted)
            with pytest.raises(KeyboardInterrupt):
                connection.save(NAME, new.state())
        assert connection.status()["pid"] == daemon.pid
        connection.save("a", a.state())
        with connection.load("a") as claim:
            assert claim.state["tag"] == "a"


@pytest.mark.parametrize("where", ["packed", "sending"])
def test_an_interrupt_after_it_was_filled_lets_go_of_it(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """On a connection that has a claim, and stays open."""
    real = rights.send

    def at(name: str) -> None:
        if name == "save:packed":
            raise Interrupt

    def interrupted(sock: Any, data: bytes, *rest: Any) -> None:
        if data == messages.FILLED:
            raise Interrupt
        real(sock, data, *rest)

    with daemon.connect() as connection, goods("old") as old, goods("new", MANY) as new:
        connection.save("other", old.state())
        with connection.load("other"):
            with monkeypatch.context() as patch:
                if where == "packed":
                    patch.setattr(verbs, "point", at)
                else:
                    patch.setattr(link, "send", interrupted)
                with pytest.raises(Interrupt):
                    connection.save(NAME, new.state())
            assert_let_go(new)


def test_what_was_announced_is_let_go_before_a_later_request_waits(daemon: DaemonProcess) -> None:
    with goods("new") as cargo, raw(daemon.path) as sock:
        data, packed = offer(cargo, "announce")
        send(sock, data, [packed.fd])
        packed.close()
        send(sock, messages.encode({**WAIT, "nonce": messages.nonce()}))
        assert_let_go(cargo)


def test_a_daemon_without_a_descriptor_for_it_answers_once(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)

    def at(name: str) -> None:
        if name == "pack:built":
            taken = {int(number) for number in os.listdir(f"/proc/{daemon.pid}/fd")}
            free = next(number for number in range(10000) if number not in taken)
            resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (free, limits[1]))
        if name == "pack:manifest":
            time.sleep(0.1)
            resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, limits)

    with goods("new", MANY) as new, goods("a") as a, daemon.connect() as connection:
        connection.save("a", a.state())
        with monkeypatch.context() as patch:
            patch.setattr("cprd.bundle.layout.point", at)
            with pytest.raises(cprd.LimitExceeded, match="no descriptor left to receive with"):
                connection.save(NAME, new.state())
        with connection.load("a") as claim:
            assert claim.state["tag"] == "a"
        connection.save(NAME, new.state())


def test_what_is_announced_with_too_many_descriptors_is_not_kept(daemon: DaemonProcess) -> None:
    with goods("new") as cargo, raw(daemon.path) as sock:
        base = daemon.fds()
        data, packed = offer(cargo, "announce")
        send(sock, data, [packed.fd] * 253)
        packed.close()
        assert_let_go(cargo)
        daemon.await_fds(base)
        send(sock, messages.FILLED)
        with pytest.raises(cprd.ProtocolError, match="wants 1 descriptors with it, has 0"):
            read(sock, 0)


@CLIENTS
def test_a_daemon_that_is_lost_ends_the_following(daemon: DaemonProcess, client: str) -> None:
    with successor(daemon, client) as waits, goods("new", MANY) as cargo:
        with saver_at(daemon, cargo, "pack:sent#3") as walker:
            until(lambda: waits.fds() >= 3 * 253, lambda: f"{waits.fds()} descriptors in it")
            daemon.restart()
            until(lambda: waits.fds() < 20, lambda: f"{waits.fds()} descriptors in it")
            go_on(walker)
        waits.got("new")


@CLIENTS
def test_a_leaf_that_will_never_be_filled_is_not_waited_for(
    daemon: DaemonProcess, client: str
) -> None:
    with successor(daemon, client) as waits, goods("new", MANY) as cargo, goods("x") as small:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
        (inlet, root), (filling, leaf) = pairs
        with raw(daemon.path) as saver, inlet, root, leaf:
            filling.close()
            header = HEADER.pack(MAGIC, VERSION, NODE, 1, 1, 10, 0, 0)
            send(inlet, header, [leaf.fileno()])
            data, packed = offer(small, "announce")
            send(saver, data, [root.fileno()])
            packed.close()
            time.sleep(0.1)
            before = cpu_time(waits.child.pid)
            time.sleep(1.0)
            assert cpu_time(waits.child.pid) - before < 0.2
            waits.lets_go()
        with daemon.connect() as connection:
            connection.save(NAME, cargo.state())
        waits.got("new")


def cpu_time(pid: int) -> float:
    return time.clock_gettime((~pid << 3) | 2)


def test_a_claim_that_is_forgotten_meanwhile(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Giving it back is another request on that connection."""

    def at(name: str) -> None:
        if name == "pack:manifest":
            gc.collect()

    with daemon.connect() as connection, goods("old") as old, goods("new", MANY) as new:
        connection.save("other", old.state())
        forgotten: list[Any] = [connection.load("other")]
        forgotten.append(forgotten)
        del forgotten
        with monkeypatch.context() as patch:
            patch.setattr("cprd.bundle.layout.point", at)
            connection.save(NAME, new.state())
        assert {row["phase"] for row in connection.list()} == {"held"}


@CLIENTS
def test_files_that_are_slow_to_close_do_not_make_the_wait_longer(
    daemon: DaemonProcess, client: str
) -> None:
    with successor(daemon, client, wait=2.0) as waits, goods("new", MANY, connections=3) as cargo:
        for ours, _ in cargo.pairs:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 4))
            ours.settimeout(0)
            with suppress(BlockingIOError):
                while True:
                    ours.send(b"x" * 65536)
        began = time.monotonic()
        with saver_at(daemon, cargo, "pack:parked") as walker:
            until(lambda: waits.fds() >= MANY, lambda: f"{waits.fds()} descriptors in it")
            for ours, _ in cargo.pairs:
                ours.close()
            os.kill(waits.child.pid, signal.SIGSTOP)  # for it to be the last that closes them
            time.sleep(0.1)
            walker.kill()
            os.kill(waits.child.pid, signal.SIGCONT)
        assert waits.child.hear().startswith("NotHeld: ")
        assert time.monotonic() - began < 4.0


def test_one_that_is_served_later_is_not_announced(daemon: DaemonProcess) -> None:
    with successor(daemon) as waits, goods("new", MANY) as cargo, daemon.connect() as connection:
        until_then = os.pidfd_open(os.getpid())
        try:
            connection.save(NAME, cargo.state(), after_exit=until_then)
        finally:
            os.close(until_then)
        time.sleep(0.2)
        assert waits.fds() <= 0
        connection.drop(NAME)

"""cprd makes the queues and receives no descriptor; what is parked and not saved, it lets go of."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cprd
from cprd.bundle.layout import HEADER, LEAF, MAGIC
from cprd.linux.rights import close_all, receive, send, take_no_rights
from cprd.protocol import messages
from tests.daemon.test_hostile import lingering, nobody_else_waits, nulls, packed, raw
from tests.support import wire
from tests.support.bundles import pack
from tests.support.child import Child, Line
from tests.support.daemon import DaemonProcess
from tests.support.goods import state_of
from tests.support.patience import PATIENCE, until
from tests.support.wire import silent

pytestmark = pytest.mark.usefixtures("nothing_leaks")


def ask(sock: socket.socket, verb: str, **fields: Any) -> dict[str, Any]:
    """The "ok" of an answer, without descriptors. Raises what cprd raised."""
    sock.send(wire.request(verb, **fields))
    return heard(sock)


def heard(sock: socket.socket) -> dict[str, Any]:
    try:
        data, fds, _ = receive(sock, messages.MAX_ANSWER)
    except ConnectionResetError:  # said once where cprd has left something unread
        data, fds, _ = receive(sock, messages.MAX_ANSWER)
    close_all(fds)
    return wire.read_answer(data)


def saved(sock: socket.socket, **more: Any) -> dict[str, Any]:
    """Save an empty state."""
    bundle = pack(cprd.State())
    try:
        with wire.park(sock, bundle.fd):
            return ask(sock, "save", **wire.save("web", 0, 0, bundle.parked, **more))
    finally:
        bundle.close()


@contextlib.contextmanager
def watched() -> Iterator[tuple[socket.socket, Callable[[], None]]]:
    """A socket to park and close, and what waits until nobody has it."""
    near, far = socket.socketpair()
    far.settimeout(PATIENCE)

    def gone() -> None:
        assert far.recv(1) == b""

    with near, far:
        yield near, gone


# Nothing comes in


def test_a_descriptor_cannot_be_sent_to_cprd(daemon: DaemonProcess) -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        if not take_no_rights(one):
            pytest.skip("wants Linux 6.16 (SO_PASSRIGHTS)")
    (null,) = nulls(1)
    for connect in (silent, raw):
        with connect(daemon.path) as sock:
            with pytest.raises(PermissionError):
                send(sock, packed(verb="status"), [null])
    os.close(null)


@pytest.mark.parametrize("said_hello", [True, False])
def test_before_linux_6_16_descriptors_are_refused_unread(
    start_daemon: Callable[..., DaemonProcess], said_hello: bool
) -> None:
    """Three last references to sockets that linger for a minute cost the event loop nothing."""
    daemon = start_daemon(env={"CPRD_NO_PASSRIGHTS": "1"})
    with contextlib.ExitStack() as stack, nobody_else_waits(daemon):
        before = daemon.fds()
        for _ in range(3):
            ours, theirs = lingering()
            stack.enter_context(theirs)
            sock = stack.enter_context((raw if said_hello else silent)(daemon.path))
            os.kill(daemon.pid, signal.SIGSTOP)  # until its copy is the last one
            message = packed(verb="status") if said_hello else wire.HELLO
            send(sock, message, [ours.fileno(), *([ours.fileno()] * 252)])
            os.close(ours.detach())
            os.kill(daemon.pid, signal.SIGCONT)
            with pytest.raises(cprd.ProtocolError, match=r"descriptors came.*Ask for a queue"):
                heard(sock)
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""
        # The sockets of the connections at most; of what came, nothing was installed.
        assert daemon.fds() <= before + 4
    with daemon.connect() as connection:
        connection.save("web", cprd.State())


@pytest.mark.parametrize("where", ["journal:record", "daemon:applied", "daemon:saved"])
def test_nothing_foreign_is_in_the_table_of_cprd_while_it_saves(
    start_daemon: Callable[..., DaemonProcess], tmp_path: Path, where: str
) -> None:
    (tmp_path / "file").write_text("x")
    daemon = start_daemon(env={"CPRD_PAUSE": where})
    near, far = socket.socketpair()
    with near, far, (tmp_path / "file").open() as file:
        fds = [near.fileno(), file.fileno(), os.memfd_create("foreign"), os.eventfd(0)]
        names = {os.readlink(f"/proc/self/fd/{fd}") for fd in fds[:3]}

        def save(line: Line) -> None:
            del line
            with daemon.connect() as connection:
                connection.save("web", state_of("", [], fds))

        with Child(save) as saver:
            until(lambda: stands(daemon.pid), lambda: f"cprd does not come to {where}")
            table = f"/proc/{daemon.pid}/fd"
            links = {os.readlink(f"{table}/{fd}") for fd in os.listdir(table)}
            assert not names & links
            assert len([link for link in links if "eventfd" in link]) <= 1  # of its event loop
            os.kill(daemon.pid, signal.SIGCONT)
            assert saver.wait() == 0
        close_all(fds[2:])
    with daemon.connect() as connection:
        assert connection.list()[0]["fds"] == 4


def stands(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


# The queue of a connection


def refusals(daemon: DaemonProcess) -> int:
    return sum("refused" in line and "verb=queue" in line for line in daemon.log())


def test_a_connection_has_one_unread_queue_at_most(daemon: DaemonProcess) -> None:
    with raw(daemon.path) as sock:
        for turn in (1, 2):
            for _ in range(3):
                sock.send(wire.request("queue"))
            until(lambda: refusals(daemon) == 2 * turn, lambda: repr(daemon.log()))  # noqa: B023
            assert heard(sock) == {}
            for _ in range(2):
                with pytest.raises(cprd.LimitExceeded, match="unread"):
                    heard(sock)
        # Once all is read there is another, and what the one before was given is let go of.
        with watched() as (near, gone), wire.queue(sock) as first:
            send(first, b"x", [near.fileno()])
            near.close()
            with wire.queue(sock):
                gone()


def test_a_queue_ends_with_its_connection(daemon: DaemonProcess) -> None:
    before = daemon.fds()
    with watched() as (near, gone), raw(daemon.path) as sock:
        with wire.queue(sock) as inlet:
            send(inlet, b"x", [near.fileno()])
            near.close()
            sock.close()
            gone()
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                send(inlet, b"x")
    daemon.await_fds(before)


def test_a_queue_ends_with_the_sending_end(daemon: DaemonProcess) -> None:
    """A client that gave up closes it, and goes on with the connection."""
    with watched() as (near, gone), raw(daemon.path) as sock:
        before = daemon.fds()
        with wire.queue(sock) as inlet:
            send(inlet, b"x", [near.fileno()])
            near.close()
        gone()
        daemon.await_fds(before)
        with pytest.raises(cprd.ProtocolError, match="no queue"):
            ask(sock, "save", **wire.save("web", 0, 0, 1))
        assert saved(sock)["generation"]


def test_who_leaves_a_queue_unread_is_counted_until_it_is_read(daemon: DaemonProcess) -> None:
    """Unread it is charged to cprd, whatever becomes of the connection."""
    with daemon.connect() as other, raw(daemon.path) as sock:
        before = daemon.fds()
        sock.send(wire.request("queue"))
        sock.send(b"noise")
        daemon.await_log("not a msgpack message")
        for _ in range(3):
            assert other.status()["connections"] == 2
        assert daemon.fds() == before  # the receiving end has gone
        assert heard(sock) == {}
        with pytest.raises(cprd.ProtocolError):
            heard(sock)
        assert sock.recv(1) == b""
        until(lambda: other.status()["connections"] == 1, lambda: "counted still")


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_an_unread_queue_of_a_client_that_has_gone_holds_up_nothing(
    daemon: DaemonProcess, how: str
) -> None:
    def asks(line: Line) -> None:
        for _ in range(20):
            with silent(daemon.path) as sock:
                sock.send(wire.HELLO)
                sock.send(wire.request("queue"))
        socks = [silent(daemon.path) for _ in range(20)]
        for sock in socks:
            sock.send(wire.HELLO)
            sock.send(wire.request("queue"))
        line.say("asked")
        line.hear()
        for sock in socks:
            sock.close()
        line.hear()

    with daemon.connect() as connection:
        before = daemon.fds()
        with Child(asks) as child:
            child.hear()
            until(lambda: connection.status()["connections"] == 21, lambda: "not 20 of them")
            if how == "killed":
                child.kill()
            else:
                child.say()
            until(lambda: connection.status()["connections"] == 1, lambda: "kept", 2.0)
            daemon.await_fds(before)


def test_a_save_wants_a_queue_and_the_next_may_come_with_the_answer(daemon: DaemonProcess) -> None:
    with raw(daemon.path) as sock:
        for verb in ("save", "prepare"):
            with pytest.raises(cprd.ProtocolError, match=r"no queue, .* ask for one"):
                ask(sock, verb, **wire.save("web", 0, 0, 1))
        bundle = pack(cprd.State())
        with wire.park(sock, bundle.fd):
            sock.send(wire.request("save", **wire.save("web", 0, 0, 1, queue=True)))
            data, fds, _ = receive(sock, messages.MAX_ANSWER)
        assert wire.read_answer(data)["generation"]
        with socket.socket(fileno=fds[0]) as inlet:
            for content, parked in wire.contents(bundle.fd):
                send(inlet, content, parked)
                close_all(parked)
            ask(sock, "save", **wire.save("two", 0, 0, 1))
        bundle.close()
    with daemon.connect() as connection, connection.load("two") as claim:
        assert claim.state.fd_count == 0


def test_a_second_message_in_the_queue_is_damaged_and_let_go_of(daemon: DaemonProcess) -> None:
    header = HEADER.pack(MAGIC, 1, LEAF, 0, 1, 1, 0, 0)
    with watched() as (near, gone), raw(daemon.path) as sock:
        with wire.queue(sock) as inlet:
            for _ in range(2):
                send(inlet, header, [near.fileno()])
            near.close()
            with pytest.raises(cprd.Damaged, match="not a whole bundle"):
                ask(sock, "save", **wire.save("web", 0, 0, 1))
            gone()
        assert ask(sock, "list", after=None)["holds"] == []


def test_a_repeated_save_comes_in_another_queue_and_gets_the_first_answer(
    daemon: DaemonProcess,
) -> None:
    nonce = messages.nonce()
    with raw(daemon.path) as sock, raw(daemon.path) as again:
        before = daemon.fds()
        first = saved(sock, nonce=nonce)
        assert saved(again, nonce=nonce)["generation"] == first["generation"]
        daemon.await_fds(before + 1)  # the slot


def test_a_connection_in_its_own_queue_ends_with_its_process(daemon: DaemonProcess) -> None:
    """Nobody closes it: cprd has it."""

    def parks_itself(line: Line) -> None:
        sock = raw(daemon.path)
        ask(sock, "load", name="web", wait=0, lease=600, generation=None, nonce=b"n" * 16)
        send(wire.queue(sock), b"x", [sock.fileno()])
        line.say("parked")
        line.hear()

    with daemon.connect() as connection:
        connection.save("web", cprd.State())
        before = daemon.fds()
        with Child(parks_itself) as child:
            child.hear()
            assert connection.list()[0]["phase"] == "claimed"
            child.kill()
            until(lambda: connection.status()["connections"] == 1, lambda: "it is served still")
            assert connection.list()[0]["phase"] == "held"
        daemon.await_fds(before)


# A process by pid and inode


def test_a_pid_with_another_inode_is_a_process_that_has_ended(daemon: DaemonProcess) -> None:
    mine = os.pidfd_open(os.getpid())
    inode = os.fstat(mine).st_ino
    os.close(mine)
    with raw(daemon.path) as sock, daemon.connect() as connection:
        me = {"pid": os.getpid(), "inode": inode}
        other = {**me, "inode": inode + 1}
        saved(sock, after_exit="process", **me)
        with pytest.raises(cprd.Busy, match=f"pid {os.getpid()}, has not ended"):
            connection.load("web")
        saved(sock, after_exit="process", if_exists="replace", **other)
        load = {"name": "web", "wait": 0, "lease": 60, "generation": None}
        claim = ask(sock, "load", **load, nonce=messages.nonce())
        ticket = {"name": "web", "generation": claim["generation"], "token": claim["token"]}
        with pytest.raises(cprd.InvalidInput, match="has ended"):
            ask(sock, "begin", **ticket, **other, nonce=messages.nonce())
        assert connection.list()[0]["phase"] == "claimed"
        ask(sock, "begin", **ticket, **me, nonce=messages.nonce())
        assert connection.list()[0]["acting"] == os.getpid()
        with pytest.raises(cprd.InvalidInput, match="named by pid"):
            saved(sock, after_exit="process")


def test_without_inodes_the_client_says_that_its_process_has_ended(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before Linux 6.9: cprd watches a process that got the pid in between."""
    from cprd.linux import processes

    def identity(pidfd: int) -> tuple[int, int]:
        del pidfd
        return os.getpid(), 0  # lives: the other process, with the same pid

    with Child(lambda line: line.hear()) as child, daemon.connect() as connection:
        pidfd = os.pidfd_open(child.pid)
        monkeypatch.setattr(processes, "identity", identity)
        connection.save("alive", cprd.State(), after_exit=pidfd)
        child.kill()
        connection.save("web", cprd.State(), after_exit=pidfd)
        os.close(pidfd)
        with pytest.raises(cprd.Busy):
            connection.load("alive")
        with connection.load("web"):
            pass


# Other versions


V1_HELLO = (
    b"\x84\xa4verb\xa5hello\xa7version\x01\xa6limits\x81\xa6answer\xce\x00\x01\x00\x00\xa2id\x01"
)


@pytest.mark.parametrize(
    ("hello", "needs"),
    [
        (V1_HELLO, r"speaks version 1 and needs cprd 0\.1: upgrade the client to cprd 0\.2"),
        (packed(verb="hello", version=7, more={}), "needs the cprd of version 7.*the daemon"),
    ],
)
def test_a_client_of_another_version_hears_which_cprd_it_needs(
    daemon: DaemonProcess, hello: bytes, needs: str
) -> None:
    with silent(daemon.path) as sock:
        sock.send(hello)
        answer = messages.decode(sock.recv(messages.MAX_ANSWER), messages.MAX_ANSWER)
        assert (answer["error"], answer["version"]) == ("ProtocolError", messages.VERSION)
        with pytest.raises(cprd.ProtocolError, match=needs):
            wire.read_answer(messages.encode(answer))
        assert sock.recv(1) == b""

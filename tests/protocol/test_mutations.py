"""Each small change of each vector is a clear error or has the documented meaning. Never is a hold
damaged by it, never does cprd or a client fail otherwise.

A share of all changes by default; all of them where `full` is asked for."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import cprd
from cprd.bundle.check import check_bundle
from cprd.bundle.layout import LIVE_ROOT
from cprd.bundle.unpack import unpack
from cprd.errors import CODES, Busy, CprdError, Damaged, ProtocolError
from cprd.linux.rights import close_all, receive
from cprd.live import carrier, reader
from cprd.live.check import check_live
from cprd.live.queue import make_pair
from cprd.protocol import messages
from tests.support import mutations, wire
from tests.support.bundles import pack
from tests.support.daemon import DaemonProcess
from tests.support.patience import PATIENCE, patience
from tools import vectors
from tools.vectors import BUNDLE, LIVE, WIRE, Vector, stored

pytestmark = pytest.mark.usefixtures("nothing_leaks")

SHARE = 16  # of so many changes one is tried by default
Shares = pytest.mark.parametrize(
    "share", [pytest.param(1, marks=pytest.mark.full, id="all"), pytest.param(SHARE, id="some")]
)
NAME, PRECIOUS = "vm", "precious-and-far-away"


# cprd


class Stage:
    """A cprd with a precious hold, and a raw connection for changed requests. `fields` makes what
    a verb needs under NAME, and the request that cprd would do."""

    def __init__(self, daemon: DaemonProcess, stack: contextlib.ExitStack) -> None:
        self.daemon = daemon
        self.client = stack.enter_context(daemon.connect())
        self.holder = stack.enter_context(daemon.connect())  # claims hang on this one
        state = cprd.State()
        state["text"] = PRECIOUS
        self.precious = self.client.save(PRECIOUS, state).generation
        self.state = cprd.State()
        self.state["text"] = "any"
        self.packed = pack(self.state)
        stack.callback(self.packed.close)
        self.tx, self.rx = make_pair()
        stack.callback(self.tx.close)
        stack.callback(self.rx.close)
        self.sock = self.connect()
        stack.callback(self.close_socket)
        self.inlet: socket.socket | None = None
        stack.callback(self.close_inlet)
        self.claim: cprd.Claim | None = None

    def connect(self, *, greeted: bool = True) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(PATIENCE)
        sock.connect(self.daemon.path)
        if greeted:
            sock.send(wire.HELLO)
            wire.read_answer(sock.recv(messages.MAX_ANSWER))
        return sock

    def reconnect(self, *, greeted: bool = True) -> None:
        self.close_inlet()
        self.sock.close()
        self.sock = self.connect(greeted=greeted)

    def close_socket(self) -> None:
        self.sock.close()

    def close_inlet(self) -> None:
        if self.inlet is not None:
            self.inlet.close()
        self.inlet = None

    def park(self, *, root: bool) -> None:
        """A queue with a bundle, or with the root of a live hold."""
        self.close_inlet()
        if root:
            self.inlet = wire.queue(self.sock)
            carrier.park(self.inlet, self.rx.fileno())
        else:
            self.inlet = wire.park(self.sock, self.packed.fd)

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        self.sock.send(messages.encode(message))
        data, fds, _ = receive(self.sock, messages.MAX_ANSWER)
        close_all(fds)
        return wire.read_answer(data)

    def clear(self) -> None:
        """Nothing is held but the precious."""
        if self.claim is not None:
            self.claim.close()
            self.claim = None
        for row in self.client.list():
            if row["name"] != PRECIOUS:
                mine = row["uid"] == os.getuid()
                self.client.drop(row["name"] if mine else f"{row['uid']}/{row['name']}", force=True)

    def fields(self, vector: Vector) -> dict[str, Any]:
        """The request of a vector, for what is there."""
        message = messages.decode(bytes.fromhex(vector["hex"]), messages.MAX_REQUEST)
        verb = message["verb"]
        if "name" in message:
            message["name"] = NAME
        if "nonce" in message:
            message["nonce"] = messages.nonce()
        if verb in ("commit", "abort"):
            prepare = {"verb": "prepare", "name": NAME, "fds": 0, "nonce": messages.nonce()}
            self.park(root=False)
            message |= _claim_of(self.ask(prepare))
        elif verb in ("end", "put_back"):
            self.park(root=True)
            begin = {"verb": "live", "name": NAME, "nonce": messages.nonce()}
            message |= _claim_of(self.ask(begin))
        elif verb not in ("hello", "queue", "save", "prepare", "list", "status", "live"):
            self.client.save(NAME, self.state)
            if verb in ("renew", "begin", "confirm", "confirm_next", "reject"):
                self.claim = self.holder.load(NAME)
                ticket = self.claim._claim.ticket
                message |= {"generation": ticket.generation, "token": ticket.token}
            elif "generation" in message:
                message["generation"] = self.client.show(NAME)["generation"]
        for field in ("pid", "inode"):
            if field in message:
                message[field] = os.getpid() if field == "pid" else 0
        message.pop("require", None)
        if verb in ("save", "prepare", "confirm_next", "live", "put_back"):
            self.park(root=verb in ("live", "put_back") or message.get("live", False))
            message |= {"fds": 0} if "fds" in message else {}
            message |= {"parked": 1, "depth": 0} if "parked" in message else {}
        return message


def _claim_of(answer: dict[str, Any]) -> dict[str, Any]:
    return {"generation": answer["generation"], "token": answer["token"]}


def read(data: bytes, *, first: bool) -> dict[str, Any] | ProtocolError:
    """What cprd makes of the bytes of a request, as the code says."""
    try:
        return messages.read_first(data) if first else messages.read_request(data)
    except ProtocolError as error:
        return error


def answer_to(stage: Stage, data: bytes, meant: Any) -> dict[str, Any] | CprdError:
    """What cprd says. A wait is ended by another request, whose answer is read as well."""
    stage.sock.send(data or b"\xc1")
    waits = isinstance(meant, dict) and (meant.get("wait") or meant.get("timeout"))
    if waits:
        stage.sock.send(wire.request("list"))
    said, fds, _ = receive(stage.sock, messages.MAX_ANSWER)
    close_all(fds)
    if waits:
        assert "ok" in messages.decode(stage.sock.recv(messages.MAX_ANSWER), messages.MAX_ANSWER)
    return messages.parse_answer(said)[1]


def try_requests(stage: Stage, vector: Vector, share: int) -> int:
    """Send the changes of one request. Returns how many."""
    first = vector["name"] == "hello"
    verb = vector["means"]["verb"]
    message = stage.fields(vector)
    todo = list(mutations.of_message(message))
    picked = [n for n in mutations.some(range(len(todo)), share) if todo[n][1]]
    for number in picked:
        if first:
            stage.reconnect(greeted=False)
        what, data = todo[number]
        meant = read(data, first=first)
        said = answer_to(stage, data, meant)
        told = f"{vector['name']}, {what}: {meant!r:.300} -> {said!r:.300}"
        if isinstance(meant, ProtocolError):
            assert isinstance(said, ProtocolError), told
            assert str(said) == str(meant), told
            if isinstance(meant, messages.BadRequest) and not first:
                continue  # the connection goes on, and nothing was changed
            assert stage.sock.recv(1) == b"", told
            stage.reconnect()
            if verb not in ON_THE_CONNECTION:
                continue
        else:
            whole = read(messages.encode(message), first=first)
            check_outcome(meant, said, same_meaning(meant, whole), told)
        rows = stage.client.list()
        phases = {row["name"]: row["phase"] for row in rows}
        assert phases.pop(PRECIOUS) == "held", told
        by_hand = isinstance(meant, dict) and meant.get("damaged")
        assert by_hand or "damaged" not in phases.values(), told
        stage.reconnect()
        stage.clear()
        message = stage.fields(vector)
        todo = list(mutations.of_message(message))
    stage.reconnect()
    stage.clear()
    return len(picked)


ON_THE_CONNECTION = (
    "save",
    "prepare",
    "commit",
    "abort",
    "confirm_next",
    "live",
    "put_back",
    "end",
)
"""Verbs whose request wants what hangs on the connection."""


def same_meaning(one: Any, other: Any) -> bool:
    """Whether two requests want the same; a nonce is as good as another."""
    wants = [{k: v for k, v in each.items() if k not in ("nonce", "id")} for each in (one, other)]
    return wants[0] == wants[1]


def check_outcome(
    meant: dict[str, Any], said: dict[str, Any] | CprdError, same: bool, told: str
) -> None:
    """A request that makes sense is done, or refused in words; done where it means the same."""
    if isinstance(said, CprdError):
        assert type(said) in CODES.values(), told
        assert str(said), told
        assert not same or "nonce came with another" in str(said), told
    else:
        messages.read_fields(meant["verb"], said)


@Shares
def test_changed_requests_meet_cprd(daemon: DaemonProcess, share: int) -> None:
    pid, tried = daemon.pid, 0
    requests = [vector for vector in stored(f"{WIRE}-requests") if "means" in vector]
    with contextlib.ExitStack() as stack:
        stage = Stage(daemon, stack)
        for vector in requests:
            tried += try_requests(stage, vector, share)
        with stage.client.load(PRECIOUS) as claim:
            assert claim.generation == stage.precious
            assert claim.state["text"] == PRECIOUS
    assert daemon.pid == pid
    assert daemon.alive()
    print(f"{tried} changed requests")
    assert tried > 100


# Readers


def error_of(act: Callable[[], Any]) -> CprdError | None:
    """What was refused; anything but an error of cprd is a failure."""
    try:
        act()
    except CprdError as error:
        return error
    return None


def reads(vector: Vector, read: Callable[[int], None], check: Callable[[int], Any]) -> str:
    """What a reader and the checker make of a vector: "" or the name of the error."""
    fd = vectors.build(vector)
    try:
        wrong = check(fd)["wrong"]
        error = error_of(lambda: read(fd))
        if error is None:
            return ""
        assert str(error)
        assert wrong, f"the checker saw nothing: {error}"
        return type(error).__name__
    finally:
        os.close(fd)


def changed_queues(vector: Vector, *path: Any) -> Iterator[tuple[str, Vector]]:
    """Changes of each message, memfd and descriptor in a queue."""
    if "memfd" in vector:
        for what, data in mutations.of_bytes(bytes.fromhex(vector["memfd"])):
            yield f"{path}: {what}", {**vector, "memfd": data.hex()}
        yield f"{path}: not sealed", {**vector, "sealed": False}
    for at, message in enumerate(vector.get("queue", ())):
        for changed, what in _changed_messages(message, (*path, at)):
            queue = [*vector["queue"][:at], *changed, *vector["queue"][at + 1 :]]
            yield what, {"queue": queue}


def _changed_messages(message: Vector, path: tuple[Any, ...]) -> Iterator[tuple[list[Vector], str]]:
    carries = message["carries"]
    yield [], f"{path}: gone"
    yield [message, message], f"{path}: twice"
    for what, data in mutations.of_bytes(bytes.fromhex(message["hex"])):
        yield [{**message, "hex": data.hex()}] if data else [], f"{path}: {what}"
    for at, one in enumerate(carries[:3]):
        others = carries[:at], carries[at + 1 :]
        for what, instead in (
            *(("dropped", []), ("twice", [one, one]), ("an eventfd", [{"descriptor": 9}])),
            *(("an empty queue", [{"queue": []}]), ("a memfd", [{"memfd": "00", "sealed": True}])),
        ):
            changed = {**message, "carries": [*others[0], *instead, *others[1]]}
            yield [changed], f"{path}, {at} {what}"
        for what, inner in changed_queues(one, *path, at):
            yield [{**message, "carries": [*others[0], inner, *others[1]]}], what


def read_bundle(fd: int) -> None:
    unpack(fd).close()


@Shares
def test_changed_bundles_meet_a_reader_and_the_checker(share: int) -> None:
    outcomes: dict[str, int] = {}
    for vector in stored(BUNDLE):
        if "means" not in vector:
            continue
        small = vector["name"] in ("empty", "small")  # the manifests of others are long
        every = changed_queues({"queue": vector["queue"]})
        for _, changed in mutations.some(every, share if small else 60 * share):
            outcome = reads(changed, read_bundle, check_bundle)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    print(outcomes)
    assert outcomes["Damaged"] > 10
    assert outcomes.keys() <= {"", "Damaged", "Busy"}


@Shares
def test_changed_live_holds_meet_a_reader_and_the_checker(
    share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "RETRIES", 1)  # nobody changes them while they are read

    def read_live(bundle: int) -> None:
        root = carrier.root_of(bundle)
        try:
            held = reader.read(root)
        finally:
            os.close(root)
        held.state.close()
        held.close()

    outcomes: dict[str, int] = {}
    bundle: Vector = {"hex": LIVE_ROOT.hex()}
    for vector in stored(LIVE):
        if "queue" not in vector:
            continue
        whole = {"queue": [{**bundle, "carries": [{"queue": vector["queue"]}]}]}
        for _, changed in mutations.some(changed_queues(whole), share):
            outcome = reads(changed, read_live, check_live)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    print(outcomes)
    assert outcomes["Damaged"] > 10
    assert outcomes.keys() <= {"", "Damaged", "Busy"}


# Clients


class Puppet:
    """A daemon that greets, and answers each other request with the bytes that are set."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.says = b""
        (hello,) = [v for v in stored(f"{WIRE}-answers") if v["name"] == "hello"]
        self.greeting = messages.decode(bytes.fromhex(hello["hex"]), messages.MAX_ANSWER)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(path)
        self.listener.listen(8)
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._converse, args=(sock,), daemon=True).start()

    def _converse(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            while data := sock.recv(messages.MAX_REQUEST):
                message = messages.decode(data, messages.MAX_REQUEST)
                if message["verb"] == "hello":
                    sock.send(messages.encode({**self.greeting, "id": message.get("id")}))
                else:
                    sock.send(self.says)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


ASKED: dict[str, Callable[[cprd.Daemon], Any]] = {
    "list": lambda daemon: daemon.list(),
    "status": lambda daemon: daemon.status(),
    "show": lambda daemon: daemon.show("web"),
    "wait": lambda daemon: daemon.wait("web", 0.1),
    "drop": lambda daemon: daemon.drop("web"),
    "release": lambda daemon: daemon.release("web"),
    "load": lambda daemon: daemon.load("web").close(),
    "save": lambda daemon: daemon.save("web", cprd.State()),
}


@Shares
def test_changed_answers_meet_a_client(share: int, tmp_path: Any) -> None:
    """Each is a value of the right types, or an error of cprd."""
    puppet = Puppet(str(tmp_path / "puppet.sock"))
    answers = {v["name"]: bytes.fromhex(v["hex"]) for v in stored(f"{WIRE}-answers")}
    errors = [answers[name] for name in ("busy", "damaged", "not-held")]
    tried = wrong = 0
    try:
        with cprd.connect(puppet.path, timeout=patience(1)) as daemon:
            for verb, ask in ASKED.items():
                for answer in (answers[verb], *(errors if verb == "load" else ())):
                    message = messages.decode(answer, messages.MAX_ANSWER)
                    for _, data in mutations.some(mutations.of_message(message), share):
                        id_of_nobody = b"\xa2id" in data
                        if not data or id_of_nobody:
                            continue
                        puppet.says = data
                        tried += 1
                        error = error_of(lambda: ask(daemon))  # noqa: B023
                        wrong += error is not None
                        assert error is None or str(error)
    finally:
        puppet.close()
    print(f"{tried} changed answers, {wrong} errors")
    assert tried > wrong > 20


@Shares
def test_changed_bundles_travel_through_cprd(daemon: DaemonProcess, share: int) -> None:
    """What is wrong inside is kept, is found by the first who reads, and names the saver."""
    (small,) = [vector for vector in stored(BUNDLE) if vector["name"] == "small"]
    saver = f"saved by pid {os.getpid()} of uid {os.getuid()}"
    tried = 0
    with daemon.connect() as client:
        for what, changed in mutations.some(changed_queues({"queue": small["queue"]}), share):
            fd = vectors.build(changed)
            refused = error_of(lambda: save_as_it_is(client, fd))  # noqa: B023
            os.close(fd)
            if refused is not None:
                assert isinstance(refused, Damaged), what
                assert "bundle" in str(refused), what
                continue
            tried += 1
            error = error_of(lambda: client.load(NAME).close())
            if isinstance(error, Damaged):
                assert saver in str(error), what
                assert client.show(NAME)["phase"] == "damaged", what
            elif error is not None:
                assert isinstance(error, Busy), what
                assert "version" in str(error), what
            assert [row["name"] for row in client.list()] == [NAME]
            client.drop(NAME, force=True)
    print(f"{tried} changed bundles saved")


def save_as_it_is(client: cprd.Daemon, bundle: int) -> None:
    with socket.socket(fileno=os.dup(client.fileno())) as sock, wire.park(sock, bundle):
        sock.send(wire.request("save", name=NAME, fds=0, nonce=messages.nonce()))
        wire.read_answer(sock.recv(messages.MAX_ANSWER))

"""`cprctl run` and sets of addresses: what must be reachable afterwards.

The model knows endpoints: what a client connects to. An address covers endpoints, a wildcard
several. After a start each endpoint of each --listen reaches the descriptor of that --listen, no
other endpoint reaches anything that was held, and a held socket that serves exactly an asked
address is the one that the command gets. What cannot be had is refused, and then everything is held
as before.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import errno
import json
import os
import resource
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

import cprd
from cprd.cli.become import Crew, RaisedLimit
from cprd.cli.load import look_at
from cprd.cli.opening import Opened
from cprd.cli.run import Start, addresses, begin
from tests.support.checkout import CHECKOUT
from tests.support.daemon import DaemonProcess
from tests.support.descriptors import open_fds
from tests.support.patience import until

STREAM, DGRAM, SEQPACKET = socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET
V4, W4, V6 = "127.0.0.1", "127.0.0.2", "::1"
COVERS = {V4: [V4], W4: [W4], V6: [V6], "0.0.0.0": [V4, W4], "::": [V4, W4, V6], "only6": [V6]}
SCHEMES: dict[int, str] = {STREAM: "unix", DGRAM: "dgram", SEQPACKET: "seqpacket"}
Endpoint = tuple[str, object, object]  # "tcp", host, port; "udp", ...; "unix", path, kind


class Spec(NamedTuple):
    """An address in the model."""

    kind: int
    host: str = ""  # "only6": the IPv6 wildcard, for IPv6 alone
    port: int = 0  # 1 or 2 stand for two free ports, 0 for any
    path: str = ""  # "a", "b": files; "@a": an abstract name

    def text(self, ports: list[int], place: str, spelling: str) -> str:
        """For --listen."""
        if self.path:
            scheme = SCHEMES[self.kind]
            if self.path.startswith("@"):
                return f"{scheme}:@{place}{self.path}"
            path = {
                "absolute": f"{place}/d/{self.path}",
                "dotted": f"{place}/./e/../d//{self.path}",
                "relative": os.path.relpath(f"{place}/d/{self.path}"),
                "linked": f"{place}/link/{self.path}",
            }[spelling]
            return f"{scheme}:{path}"
        scheme = "udp:" if self.kind == DGRAM else ""
        host = {"::": "", "only6": "[::]:", V6: "[0:0::1]:"}.get(self.host, f"{self.host}:")
        only = ",v6only" if self.host == "only6" else ""
        return f"{scheme}{host}{ports[self.port]}{only}"

    def covers(self, ports: list[int]) -> set[Endpoint]:
        if self.path:
            return {("unix", self.path, self.kind if self.path.startswith("@") else None)}
        if not self.port:
            return set()
        name = "udp" if self.kind == DGRAM else "tcp"
        return {(name, host, ports[self.port]) for host in COVERS[self.host]}

    def make(self, ports: list[int], place: str) -> socket.socket:
        if self.path:
            sock = socket.socket(socket.AF_UNIX, self.kind)
            abstract = self.path.startswith("@")
            sock.bind(f"\0{place}{self.path}" if abstract else f"{place}/d/{self.path}")
        else:
            host = "::" if self.host == "only6" else self.host
            sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, self.kind)
            if ":" in host:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, self.host == "only6")
            sock.bind((host, ports[self.port]))
        if self.kind != DGRAM:
            sock.listen(16)
        return sock


class HeldSpec(NamedTuple):
    spec: Spec
    key: str  # "listener": run's own; else a key of the program
    elsewhere: bool  # made in another network namespace
    fate: str  # of a path: "", "unlinked", "stale", "other's"


INET = st.builds(
    Spec,
    kind=st.sampled_from([STREAM, STREAM, DGRAM]),
    host=st.sampled_from(list(COVERS)),
    port=st.sampled_from([1, 1, 2]),
    path=st.just(""),
)
UNIX = st.builds(
    Spec,
    kind=st.sampled_from([STREAM, DGRAM, SEQPACKET]),
    host=st.just(""),
    port=st.just(0),
    path=st.sampled_from(["a", "b", "@a"]),
)
ANY_PORT = st.sampled_from([Spec(STREAM, V4, 0), Spec(STREAM, "::", 0)])
ONE_HELD = st.builds(
    HeldSpec,
    spec=st.one_of(INET, INET, UNIX),
    key=st.sampled_from(["listener", "listener", "listener", "admin"]),
    elsewhere=st.sampled_from([False, False, False, True]),
    fate=st.sampled_from(["", "", "", "unlinked", "stale", "other's"]),
)
Asked = tuple[Spec, str, str]  # what, spelled how, with which NAME=
SPELLINGS = st.sampled_from(["absolute", "dotted", "relative", "linked"])


@st.composite
def examples(draw: st.DrawFn) -> tuple[list[HeldSpec], list[Asked]]:
    """A held set that can exist, and what is asked for: some of the same in another order, some
    new; now and then two that exclude each other."""
    held: list[HeldSpec] = []
    for one in draw(st.lists(ONE_HELD, max_size=4)):
        fits = one if is_file(one.spec) else one._replace(fate="")
        if possible([*held, fits]):
            held.append(fits)
    same = st.sampled_from([one.spec for one in held]) if held else st.nothing()
    wanted = st.tuples(st.one_of(same, same, INET, UNIX, ANY_PORT), SPELLINGS, NAMES)
    asked: list[Asked] = []
    for each in draw(st.lists(wanted, min_size=1, max_size=4)):
        if draw(st.integers(0, 9)) == 0 or not any(clash(each[0], other[0]) for other in asked):
            asked.append(each)
    return held, asked or [(Spec(STREAM, V4, 1), "absolute", "")]


NAMES = st.sampled_from(["", "", "web="])


def is_file(spec: Spec) -> bool:
    return bool(spec.path) and not spec.path.startswith("@")


def clash(one: Spec, other: Spec) -> bool:
    return bool(one.covers([0, 1, 2]) & other.covers([0, 1, 2]))


def possible(held: list[HeldSpec]) -> bool:
    """Whether such a held set can exist at all."""
    *rest, last = held
    same = [one for one in rest if is_file(one.spec) or one.elsewhere == last.elsewhere]
    return not any(clash(one.spec, last.spec) for one in same)


# In another network namespace: makes a socket for each line, and passes it back.
MAKER = """
import array, json, socket, sys
sys.path.insert(0, sys.argv[1])
from tests.cli.test_run_property import Spec
channel = socket.socket(fileno=int(sys.argv[2]))
import subprocess; subprocess.run(["ip", "link", "set", "lo", "up"], check=False)
channel.send(b"ready")
while data := channel.recv(4096):
    spec, ports, place = json.loads(data)
    with Spec(*spec).make(ports, place) as sock:
        rights = array.array("i", [sock.fileno()])
        channel.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
"""
Make = Callable[[Spec, list[int], str], socket.socket]


@pytest.fixture(scope="module")
def make_elsewhere() -> Iterator[Make]:
    """A maker of sockets in another network namespace."""
    unshare = ["unshare", "--net", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, "true"], check=False).returncode
    ):
        pytest.skip("needs network namespaces: as root, or kernel.unprivileged_userns_clone=1")
    ours, theirs = socket.socketpair(socket.AF_UNIX, SEQPACKET)
    root = str(CHECKOUT)
    process = subprocess.Popen(
        [*unshare, sys.executable, "-c", MAKER, root, str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        env={**os.environ, "PYTHONPATH": root},
    )
    theirs.close()
    ours.settimeout(30)
    assert ours.recv(100) == b"ready"

    def make(spec: Spec, ports: list[int], place: str) -> socket.socket:
        ours.send(json.dumps([spec, ports, place]).encode())
        _, ancillary, _, _ = ours.recvmsg(100, socket.CMSG_SPACE(4))
        rights = array.array("i")
        rights.frombytes(ancillary[0][2])
        return socket.socket(fileno=rights[0])

    yield make
    ours.close()
    process.wait(20)


@pytest.fixture(scope="module")
def one_daemon() -> Iterator[DaemonProcess]:
    with tempfile.TemporaryDirectory(prefix="cprd-test.") as place:
        daemon = DaemonProcess(Path(place))
        yield daemon
        daemon.stop()


def free_ports() -> list[int]:
    """[0, two ports that nothing has], below those that the kernel gives to clients."""
    found = [0]
    while len(found) < 3:
        port = secrets.randbelow(20_000) + 10_000
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for kind in (STREAM, DGRAM):
                sock = stack.enter_context(socket.socket(socket.AF_INET6, kind))
                sock.bind(("::", port))
            found.append(port)
    return found


# -- what a client sees --------------------------------------------------------------------------


def arrives(family: int, kind: int, where: object, fds: list[int]) -> int:
    """At which of `fds` a client arrives that connects to `where`; -1 at none of them."""
    with socket.socket(family, kind) as client:
        client.setblocking(False)
        try:
            client.connect(where)  # type: ignore[arg-type]
            if kind == DGRAM:
                client.send(b"x")
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno in (errno.ECONNREFUSED, errno.ENOENT, errno.EPROTOTYPE):
                return -1
            raise
        for fd in fds:
            sock = socket.socket(fileno=os.dup(fd))
            with sock, contextlib.suppress(OSError):
                if (sock.family, sock.type) == (family, kind) or family == socket.AF_INET:
                    sock.setblocking(False)
                    if kind == DGRAM:
                        assert sock.recv(9) == b"x"
                    else:
                        sock.accept()[0].close()
                    return fd
    return -1


class World:
    """One example: its place, its ports, the held set, and one start."""

    def __init__(self, daemon: DaemonProcess, place: str, make_elsewhere: Make) -> None:
        self.daemon, self.place, self.make_elsewhere = daemon, place, make_elsewhere
        self.ports = free_ports()
        for name in ("d", "e"):
            os.mkdir(f"{place}/{name}")
        os.symlink(f"{place}/d", f"{place}/link")
        self.live: list[socket.socket] = []  # other servers

    def hold(self, held: list[HeldSpec]) -> list[int]:
        """Hold these; their inodes."""
        state = cprd.State()
        inodes = []
        made = []
        counts: dict[str, int] = {}
        for one in held:
            make = self.make_elsewhere if one.elsewhere else Spec.make
            sock = make(one.spec, self.ports, self.place)
            made.append(sock)
            inodes.append(os.fstat(sock.fileno()).st_ino)
            id = counts[one.key] = counts.get(one.key, -1) + 1
            state.save_fd(one.key, id, sock)
            if one.fate:
                path = f"{self.place}/d/{one.spec.path}"
                os.unlink(path)
                if one.fate != "unlinked":
                    other = one.spec.make(self.ports, self.place)
                    if one.fate == "stale":
                        other.close()
                    else:
                        self.live.append(other)
        if held:
            with self.daemon.connect() as connection:
                connection.save("web", state)
        for sock in made:
            sock.close()
        return inodes

    def start(self, texts: list[str], crew: Crew) -> None:
        args = argparse.Namespace(
            listen=texts, bind=False, name="web", socket=self.daemon.path, user=False
        )
        start = Start(
            name="web",
            asked=addresses(args),
            ttl=None,
            bind=False,
            crew=crew,
            opened=Opened(),
            look=look_at(args),
            limit=RaisedLimit(),
            ours=set(),
        )
        start.ours.update(listen.key for listen in start.asked)
        before = {n: signal.getsignal(n) for n in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)}
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            with self.daemon.connect() as connection:
                begin(connection, start)
        except BaseException:
            start.opened.undo()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)

    def where(self, endpoint: Endpoint, kind: int) -> tuple[int, int, object]:
        name, host, port = endpoint
        if name == "unix":
            path = str(host)
            abstract = path.startswith("@")
            there = f"\0{self.place}{path}" if abstract else f"{self.place}/d/{path}"
            return socket.AF_UNIX, kind, there
        family = socket.AF_INET6 if ":" in str(host) else socket.AF_INET
        return family, DGRAM if name == "udp" else STREAM, (host, port)

    def end(self) -> None:
        for sock in self.live:
            sock.close()
        with self.daemon.connect() as connection, contextlib.suppress(cprd.NotHeld):
            connection.drop("web")


def usable(one: HeldSpec) -> bool:
    """Whether clients here reach it: a file leads to its socket from every namespace."""
    return not one.fate if is_file(one.spec) else not one.elsewhere


def serving(spec: Spec, held: list[HeldSpec]) -> list[int]:
    return [j for j, one in enumerate(held) if usable(one) and one.spec == spec]


def expectation(asked: list[Spec], held: list[HeldSpec], ports: list[int]) -> str:
    """ "started", or why not."""
    for i, spec in enumerate(asked):
        if any(spec.covers(ports) & other.covers(ports) for other in asked[:i]):
            return "two exclude each other"
    for spec in asked:
        if serving(spec, held):
            continue
        cover = spec.covers(ports)
        for one in held:
            if one.fate == "other's" and one.spec.path == spec.path:
                return "in use"
            blocks = usable(one) and one.spec.covers(ports) & cover
            if blocks and one.key != "listener":
                return "in the way"
    return "started"


def check(
    daemon: DaemonProcess, make_elsewhere: Make, held: list[HeldSpec], asked: list[Asked]
) -> None:
    with tempfile.TemporaryDirectory(prefix="cprd-test.") as place:
        world = World(daemon, place, make_elsewhere)
        specs = [spec for spec, _, _ in asked]
        crew = Crew()
        try:
            inodes = world.hold(held)
            texts = [name + spec.text(world.ports, place, how) for spec, how, name in asked]
            expected = expectation(specs, held, world.ports)
            event(expected)
            if expected == "started":
                world.start(texts, crew)
                reached(world, specs, held, crew, inodes)
            else:
                refused(world, texts, held, crew, inodes)
        finally:
            crew.close()
            world.end()


def reached(
    world: World, asked: list[Spec], held: list[HeldSpec], crew: Crew, inodes: list[int]
) -> None:
    fds = crew.fds[: len(asked)]
    covered: set[Endpoint] = set()
    for spec, fd in zip(asked, fds, strict=True):
        cover = spec.covers(world.ports)
        covered |= cover
        for endpoint in cover:
            family, kind, where = world.where(endpoint, spec.kind)
            assert arrives(family, kind, where, fds) == fd, f"{spec} by {where}"
        if not spec.port and spec.host:
            with socket.socket(fileno=os.dup(fd)) as sock:
                port = sock.getsockname()[1]
            covered |= {("tcp", host, port) for host in COVERS[spec.host]}  # a held one, perhaps
            assert arrives(socket.AF_INET, STREAM, (V4, port), fds) == fd
        same = serving(spec, held)
        if same:
            assert os.fstat(fd).st_ino in {inodes[j] for j in same}
            event("the held one")
    for one in held:
        if one.key == "listener" and usable(one):
            for endpoint in one.spec.covers(world.ports) - covered:
                family, kind, where = world.where(endpoint, one.spec.kind)
                until(partial(_gone, family, kind, where), partial("somebody at {}".format, where))
    with world.daemon.connect() as connection:
        [row] = [row for row in connection.list() if row["name"] == "web"]
        assert row["phase"] == "held"
        kept = {(d["name"], d["id"]) for d in connection.show("web")["descriptors"]}
    assert set(crew.keys[: len(asked)]) <= kept


def _gone(family: int, kind: int, where: object) -> bool:
    return not alive(family, kind, where)


def alive(family: int, kind: int, where: object) -> bool:
    with socket.socket(family, kind) as client:
        client.settimeout(1)
        try:
            client.connect(where)  # type: ignore[arg-type]
            if kind == DGRAM and family != socket.AF_UNIX:
                client.send(b"x")
                client.send(b"x")  # the first one's ICMP answer
        except OSError:
            return False
        return True


def refused(
    world: World, texts: list[str], held: list[HeldSpec], crew: Crew, inodes: list[int]
) -> None:
    files = sorted(os.listdir(f"{world.place}/d"))
    with pytest.raises(cprd.CprdError) as failed:
        world.start(texts, crew)
    assert any(text in str(failed.value) for text in texts)
    crew.close()
    assert sorted(os.listdir(f"{world.place}/d")) == files, "a failed start leaves no file"
    if not held:
        return
    with world.daemon.connect() as connection:
        claim = connection.load("web", wait=5)
        with claim:
            still = {os.fstat(fd).st_ino for _, _, fd in claim.state.fds()}
            claim.reject("a look")
    assert still == set(inodes)


QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
PHASES = [Phase.explicit, Phase.reuse, Phase.generate]


@given(example=examples())
@settings(max_examples=60, suppress_health_check=QUIET, phases=PHASES)
def test_what_is_asked_for_is_reachable_and_nothing_else(
    one_daemon: DaemonProcess, make_elsewhere: Make, example: tuple[list[HeldSpec], list[Asked]]
) -> None:
    before = open_fds()
    check(one_daemon, make_elsewhere, *example)
    until(lambda: open_fds() == before, lambda: f"{open_fds()} descriptors, not {before}")


@pytest.mark.full
@pytest.mark.timeout(1800)
@given(example=examples())
@settings(max_examples=2000, suppress_health_check=QUIET, phases=PHASES)
def test_what_is_asked_for_is_reachable_and_nothing_else_at_length(
    one_daemon: DaemonProcess, make_elsewhere: Make, example: tuple[list[HeldSpec], list[Asked]]
) -> None:
    check(one_daemon, make_elsewhere, *example)

"""What one unprivileged uid can do to everybody else: attacks on a real cprd, as a table.

    .venv/bin/python benchmarks/attacks.py [--seconds S] [ATTACK ...]       (as root)

cprd runs as a user of its own, without capabilities. Two victims, root and uid 2002, save, load and
confirm ten descriptors again and again, first undisturbed, then while uid 2001 attacks. The table
shows the victims' p50 and p99, in ms, and the growth of cprd's memory.

Exit status: 0 when in each attack the victims' p99 is at most 50 ms or three times that of the same
run without the attack, whichever is larger, cprd's memory grew by at most 30 MiB, and all that was
held can be loaded afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import encodings.idna  # noqa: F401  # the attackers may not be able to read it
import json
import os
import resource  # noqa: F401  # as above: cprd imports it late
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import cprd  # noqa: E402
import cprd.client.blocking_live  # noqa: E402  # as above
import cprd.live.takeover  # noqa: E402
from cprd.protocol import messages  # noqa: E402

warnings.simplefilter("ignore", RuntimeWarning)  # nobody here asks for what was saved
OWN, ATTACKER, VICTIMS = 2000, 2001, (0, 2002)
BOUND = 0.050  # s, on a machine that is not `--slower`
TIMES = 3.0
GROWTH = 30 << 20  # bytes
NOFILE = 20_000
NICE = -12
KEPT = 600  # holds of root beside each attack
# Arrays in arrays, each of which promises as many elements as may be: room is made at once.
BOMB, FIRST_BOMB = (
    (b"\xdc" + items.to_bytes(2, "big")) * 1000 + b"\xc0" * (messages.MAX_REQUEST - 3000)
    for items in (messages.MAX_ITEMS, messages.HELLO_ITEMS)
)
PATHS = f"{ROOT}:{sysconfig.get_path('purelib')}"
HELLO = messages.encode({"verb": "hello", "version": messages.VERSION})


def end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def become(uid: int) -> None:
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)


class Child:
    """A process that runs `work(path, say)` as `uid`; `say` sends one JSON line here."""

    def __init__(self, uid: int, work: Callable[..., None], path: str) -> None:
        hear, tell = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(hear)
            status = 1
            try:
                if uid:
                    become(uid)
                end_with_parent()
                work(path, lambda said: os.write(tell, json.dumps(said).encode() + b"\n"))
                status = 0
            except BaseException as error:
                print(f"{work.__name__}: {error!r}", file=sys.stderr, flush=True)
            finally:
                os._exit(status)
        os.close(tell)
        self._hear = os.fdopen(hear, "rb")

    def hear(self) -> list[float]:
        line = self._hear.readline()
        assert line, "a child ended without a word"
        heard: list[float] = json.loads(line)
        return heard

    def lives(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def end(self, number: int) -> None:
        os.kill(self.pid, number)
        os.waitpid(self.pid, 0)
        self._hear.close()


# The victims


def hands_over(path: str, say: Callable[[object], object]) -> None:
    """Save, load and confirm ten descriptors until SIGTERM; say how long each round took. Root
    connects anew for each."""
    enough: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: enough.append(number))
    state = cprd.State()
    for number in range(10):
        state.save_fd("event", number, os.eventfd(0))
    name = f"victim.{os.getuid()}"
    took: list[float] = []
    daemon = cprd.connect(path)
    say("here")
    while not enough:
        begin = time.monotonic()
        if not os.getuid():
            daemon.close()
            try:
                daemon = cprd.connect(path)
            except OSError:  # the signal came while connect() waited
                break
        daemon.save(name, state, if_exists="replace")
        with daemon.load(name):
            pass
        took.append(time.monotonic() - begin)
        time.sleep(0.003)
    daemon.close()
    say(took)


def undisturbed_for(path: str, seconds: float) -> list[list[float]]:
    victims = [Child(uid, hands_over, path) for uid in VICTIMS]
    try:
        for victim in victims:
            victim.hear()
        time.sleep(seconds)  # the measurement itself
    finally:
        for victim in victims:
            os.kill(victim.pid, signal.SIGTERM)
        waits = [victim.hear() for victim in victims]
        for victim in victims:
            victim.end(signal.SIGKILL)
    return waits


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


# The attacks. Each says "here" when it is under way, and goes on until it is killed.


def link(path: str, *, hello: bool = True) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(30)
    sock.connect(path)
    if hello:
        sock.send(HELLO)
        sock.recv(messages.MAX_ANSWER)
    return sock


def ask(sock: socket.socket) -> None:
    sock.send(messages.encode({"verb": "status"}))


def links(path: str, count: int, *, hello: bool = True) -> list[socket.socket]:
    made = []
    for _ in range(count):
        with contextlib.suppress(OSError):
            made.append(link(path, hello=hello))
    return made


def keep_alive(path: str, count: int, mine: list[socket.socket], *, hello: bool) -> None:
    """Open again what cprd has closed."""
    for index, sock in enumerate(mine):
        with contextlib.suppress(BlockingIOError, OSError):
            if not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                sock.close()
                mine[index] = link(path, hello=hello)
    if len(mine) < count:
        mine += links(path, min(20, count - len(mine)), hello=hello)


def mute(path: str, say: Callable[[object], object]) -> None:
    mine = links(path, 490, hello=False)
    say("here")
    while True:
        keep_alive(path, 490, mine, hello=False)
        time.sleep(0.1)


def dripping(path: str, say: Callable[[object], object]) -> None:
    mine = links(path, 100)
    say("here")
    while True:
        for sock in mine:
            with contextlib.suppress(OSError):
                ask(sock)
                sock.recv(messages.MAX_ANSWER)
            time.sleep(0.001)


def never_reading(path: str, say: Callable[[object], object]) -> None:
    mine = links(path, 490)
    say("here")
    while True:
        for index, sock in enumerate(mine):
            try:
                sock.setblocking(False)
                ask(sock)
            except BlockingIOError:
                pass
            except OSError:
                with contextlib.suppress(OSError):
                    mine[index] = link(path)


def _flood(path: str, say: Callable[[object], object], count: int) -> None:
    mine = links(path, count)
    say("here")
    while True:
        for sock in mine:
            with contextlib.suppress(OSError):
                ask(sock)
        for sock in mine:
            with contextlib.suppress(OSError):
                sock.recv(messages.MAX_ANSWER)


def flood_by_1(path: str, say: Callable[[object], object]) -> None:
    _flood(path, say, 1)


def flood_by_8(path: str, say: Callable[[object], object]) -> None:
    _flood(path, say, 8)


def flood_by_50(path: str, say: Callable[[object], object]) -> None:
    _flood(path, say, 50)


def _bombs(path: str, say: Callable[[object], object], count: int) -> None:
    mine = links(path, count)
    say("here")
    while True:
        for index, sock in enumerate(mine):
            try:
                sock.setblocking(False)
                sock.send(BOMB)
            except BlockingIOError:
                pass
            except OSError:
                sock.close()
                with contextlib.suppress(OSError):
                    mine[index] = link(path)


def bombs_by_1(path: str, say: Callable[[object], object]) -> None:
    _bombs(path, say, 1)


def bombs_by_490(path: str, say: Callable[[object], object]) -> None:
    _bombs(path, say, 490)


def bombs_as_hello(path: str, say: Callable[[object], object]) -> None:
    say("here")
    while True:
        with contextlib.suppress(OSError):
            sock = link(path, hello=False)
            sock.send(FIRST_BOMB)
            sock.close()


def connects(path: str, say: Callable[[object], object]) -> None:
    say("here")
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        with contextlib.suppress(OSError):
            sock.connect(path)
        sock.close()


def ttls(path: str, say: Callable[[object], object]) -> None:
    """Holds whose time is over at the same moment, again and again."""
    said = False
    with cprd.connect(path) as daemon:
        state = cprd.State()
        state.save_fd("event", 0, os.eventfd(0))
        while True:
            end = time.monotonic() + 2.0
            for number in range(1900):
                with contextlib.suppress(cprd.CprdError):
                    left = max(0.1, end - time.monotonic())
                    daemon.save(f"ttl.{number}", state, if_exists="replace", ttl=left)
            if not said:
                said = bool(say("here")) or True
            time.sleep(max(0.0, end + 0.2 - time.monotonic()))


def claims(path: str, say: Callable[[object], object]) -> None:
    """Claims that end together, with the process that has them."""
    with cprd.connect(path) as daemon:
        state = cprd.State()
        state.save_fd("event", 0, os.eventfd(0))
        for number in range(400):
            daemon.save(f"claim.{number}", state, if_exists="replace")
    say("here")
    while True:
        pid = os.fork()
        if pid == 0:
            end_with_parent()
            daemon = cprd.connect(path)
            kept = []
            for number in range(400):
                with contextlib.suppress(cprd.CprdError):
                    kept.append(daemon.load(f"claim.{number}"))
            os._exit(0)
        os.waitpid(pid, 0)


def waiters(path: str, say: Callable[[object], object]) -> None:
    """Loads that wait for one name, each with the shortest lease."""
    mine = links(path, 400)
    request = {"verb": "load", "name": "w", "wait": 60.0, "lease": 0.001, "generation": None}
    for sock in mine:
        with contextlib.suppress(OSError):
            sock.send(messages.encode({**request, "nonce": os.urandom(16)}))
    say("here")
    with cprd.connect(path) as daemon:
        state = cprd.State()
        state.save_fd("event", 0, os.eventfd(0))
        while True:
            with contextlib.suppress(cprd.CprdError):
                daemon.save("w", state, if_exists="replace")
            time.sleep(0.01)


def lingering(path: str, say: Callable[[object], object]) -> None:
    """Connections whose last close would wait, at each end of a hold."""
    said = False
    with cprd.connect(path) as daemon, socket.create_server(("127.0.0.1", 0)) as listener:
        while True:
            state = cprd.State()
            pairs = []
            for number in range(100):
                ours = socket.create_connection(listener.getsockname())
                theirs, _ = listener.accept()
                ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 2))
                ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
                ours.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        ours.send(b"x" * 65536)
                state.save_fd("conn", number, ours)
                pairs.append((ours, theirs))
            with contextlib.suppress(cprd.CprdError):
                daemon.save("linger", state, if_exists="replace")
            for ours, _ in pairs:
                ours.close()  # the hold has another
            with contextlib.suppress(cprd.CprdError):
                daemon.drop("linger", force=True)
            if not said:
                said = bool(say("here")) or True


def self_holding(path: str, say: Callable[[object], object]) -> None:
    """Bundles whose leaves hold the leaves themselves: only the kernel's collector frees these."""
    said = False
    with cprd.connect(path) as daemon:
        while True:
            pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(20)]
            state = cprd.State()
            for number, (one, other) in enumerate(pairs):
                with contextlib.suppress(OSError):
                    socket.send_fds(one, [b"x"], [one.fileno(), other.fileno()])
                    socket.send_fds(other, [b"x"], [one.fileno(), other.fileno()])
                state.save_fd("loop", number, other.fileno())
            with contextlib.suppress(cprd.CprdError):
                daemon.save("loops", state, if_exists="replace")
            for one, other in pairs:
                one.close()
                other.close()
            with contextlib.suppress(cprd.CprdError):
                daemon.drop("loops", force=True)
            if not said:
                said = bool(say("here")) or True


def churn(path: str, say: Callable[[object], object]) -> None:
    """Foreign sockets in flight that come and go, beside 2,000 holds, root's included."""
    with cprd.connect(path) as daemon:
        state = cprd.State()
        state.save_fd("event", 0, os.eventfd(0))
        with contextlib.suppress(cprd.LimitExceeded):
            for number in range(2000 - KEPT):
                daemon.save(f"many.{number}", state, if_exists="replace")
        say("here")
        while True:
            a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            c, d = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            for _ in range(100):
                with contextlib.suppress(OSError):
                    socket.send_fds(a, [b"x"], [c.fileno(), b.fileno()], socket.MSG_DONTWAIT)
            for sock in (a, b, c, d):
                sock.close()


def lists(path: str, say: Callable[[object], object]) -> None:
    """Whole pages of long names, from one connection that asks without a pause."""
    with cprd.connect(path) as daemon:
        state = cprd.State()
        state.save_fd("event", 0, os.eventfd(0))
        for number in range(1300):
            daemon.save(f"list.{number}." + "x" * 200, state)
    say("here")
    sock = link(path)
    while True:
        sock.send(messages.encode({"verb": "list"}))
        sock.recv(messages.MAX_ANSWER)


def hang_ups(path: str, say: Callable[[object], object]) -> None:
    """A process with as many connections as it may have ends, again and again."""
    said = False
    while True:
        pid = os.fork()
        if pid == 0:
            end_with_parent()
            mine = links(path, 490)
            os._exit(0 if mine else 1)
        os.waitpid(pid, 0)
        if not said:
            said = bool(say("here")) or True


def unread(path: str, say: Callable[[object], object]) -> None:
    """Whole pages of long names asked for by 400 connections that read nothing; the process ends,
    again and again."""
    with cprd.connect(path) as daemon:
        state = cprd.State()
        state.save_fd("event", 0, os.eventfd(0))
        for number in range(600):
            daemon.save(f"unread.{number}." + "x" * 200, state)
    said = False
    while True:
        pid = os.fork()
        if pid == 0:
            end_with_parent()
            for sock in links(path, 400):
                sock.setblocking(False)
                with contextlib.suppress(OSError):
                    while True:
                        sock.send(messages.encode({"verb": "list", "after": 0}))
                sock.detach()
            time.sleep(0.5)
            os._exit(0)
        os.waitpid(pid, 0)
        if not said:
            said = bool(say("here")) or True


def owners(path: str, say: Callable[[object], object]) -> None:
    """Owners of live holds, eight at once, each of which ends without a word."""
    said = False
    while True:
        pids = []
        for number in range(8):
            pids.append(os.fork())
            if not pids[-1]:
                end_with_parent()
                with contextlib.suppress(cprd.CprdError):
                    live = cprd.live(f"owned.{number}", path)
                    live.confirm()
                    live.save_fd("event", 0, os.eventfd(0))
                os._exit(0)
        for pid in pids:
            os.waitpid(pid, 0)
        if not said:
            said = bool(say("here")) or True


ATTACKS = {
    attack.__name__.replace("_", "-"): attack
    for attack in (
        *(mute, dripping, never_reading, flood_by_1, flood_by_8, flood_by_50, bombs_by_1),
        *(
            bombs_by_490,
            bombs_as_hello,
            connects,
            ttls,
            claims,
            waiters,
            lingering,
            self_holding,
            churn,
            lists,
            hang_ups,
            unread,
            owners,
        ),
    )
}


def interpreter() -> str:
    """A Python that cprd's user may run, with the packages that cprd needs."""
    for found in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        words = ["setpriv", f"--reuid={OWN}", f"--regid={OWN}", "--clear-groups", "env"]
        words += [f"PYTHONPATH={PATHS}", found, "-c", "import cprd.daemon.command, trio, msgpack"]
        if subprocess.run(words, capture_output=True, check=False, cwd="/").returncode == 0:
            return found
    raise SystemExit(f"uid {OWN} can run no Python {sys.version_info.minor} that has trio")


def answers(path: str) -> bool:
    """Whether cprd listens: the file of the socket is there a moment before."""
    try:
        cprd.connect(path).close()
    except cprd.Unavailable:
        return False
    return True


@contextlib.contextmanager
def own_cprd() -> Iterator[tuple[str, int]]:
    """A cprd with a user of its own, no capability and a hard limit of descriptors."""
    with tempfile.TemporaryDirectory(prefix="cprd-attacks.") as place:
        os.chmod(place, 0o755)
        run = Path(place, "run")
        run.mkdir()
        os.chown(run, OWN, OWN)
        path = str(run / "cprd.sock")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("CPRD_", "LISTEN_"))}
        process = subprocess.Popen(
            [
                *("setpriv", f"--reuid={OWN}", f"--regid={OWN}", "--clear-groups"),
                *("--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"),
                *("prlimit", f"--nofile={NOFILE}:{NOFILE}"),
                *(interpreter(), "-m", "cprd.daemon.command", "--socket", path),
            ],
            stderr=subprocess.PIPE,
            env={**kept, "PYTHONPATH": PATHS},
        )
        assert process.stderr is not None
        reader = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
        process.stderr.close()
        try:
            end = time.monotonic() + 10
            while not answers(path):
                if time.monotonic() > end:
                    raise SystemExit("cprd did not start")
                time.sleep(0.01)
            prefer_releasers(process.pid)
            yield path, process.pid
        finally:
            process.terminate()
            process.wait()
            reader.wait()


def prefer_releasers(pid: int) -> None:
    """Releasers have a session of their own, which the scheduler is to prefer as well: otherwise
    cprd, the victims and the attacker leave no time to them on a busy machine."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for child in children:
        with contextlib.suppress(OSError):
            Path(f"/proc/{child}/autogroup").write_text(str(os.getpriority(os.PRIO_PROCESS, 0)))


def memory(pid: int) -> int:
    """Resident bytes of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def keep_some(path: str) -> None:
    with cprd.connect(path) as daemon:
        for number in range(KEPT):
            state = cprd.State()
            state.save_fd("event", number, os.eventfd(number))
            daemon.save(f"kept.{number}", state)


def all_kept(path: str) -> bool:
    """Whether all that root holds, and all that the attacker has left, can be loaded."""
    with cprd.connect(path) as daemon:
        for row in daemon.list():
            if row["phase"] != "held":
                continue
            with contextlib.suppress(cprd.NotHeld):  # a ttl was over
                daemon.load(f"{row['uid']}/{row['name']}").confirm()
        return sum(row["name"].startswith("kept.") for row in daemon.list()) == 0


def measure(attack: Callable[..., None], seconds: float, bound: float) -> tuple[str, bool]:
    """One row of the table, and whether cprd withstood."""
    with own_cprd() as (path, pid):
        keep_some(path)
        undisturbed_for(path, 0.2)  # to warm up
        calm = undisturbed_for(path, seconds)
        before = memory(pid)
        attacker = Child(ATTACKER, attack, path)
        try:
            attacker.hear()
            under = undisturbed_for(path, seconds)
            grown = memory(pid) - before
            assert attacker.lives(), "the attacker ended before the measurement"
        finally:
            attacker.end(signal.SIGKILL)
        with cprd.connect(path) as daemon:
            names = [row["name"] for row in daemon.list()]
        whole = sum(name.startswith("kept.") for name in names) == KEPT and all_kept(path)
    cells, good = [], grown <= GROWTH and whole
    for still, attacked in zip(calm, under, strict=True):
        base, worst = quantile(still, 0.99), quantile(attacked, 0.99)
        good = good and worst <= max(bound, TIMES * base)
        figures = (quantile(still, 0.5), base, quantile(attacked, 0.5), worst)
        cells.append(" ".join(f"{1000 * figure:6.1f}" for figure in figures))
    row = "   ".join(
        [*cells, f"{grown / (1 << 20):5.1f}", "" if whole else "LOST", "" if good else "MISSED"]
    )
    return row.rstrip(), good


@contextlib.contextmanager
def others_aside() -> Iterator[None]:
    """Whoever else uses this machine does not count: the scheduler prefers this session."""
    group = Path("/proc/self/autogroup")
    with contextlib.suppress(OSError):
        group.write_text(str(NICE))
    os.setpriority(os.PRIO_PROCESS, 0, NICE)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            group.write_text("0")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--slower", type=float, default=1.0, help="times that the 50 ms are taken")
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help=", ".join(ATTACKS))
    options = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("the attacks want several uids: run them as root")
    chosen = options.attacks or list(ATTACKS)
    unknown = [name for name in chosen if name not in ATTACKS]
    if unknown:
        raise SystemExit(f"no such attack: {', '.join(unknown)}; there are {', '.join(ATTACKS)}")
    with others_aside():
        return report(chosen, options.seconds, BOUND * options.slower)


def report(chosen: list[str], seconds: float, bound: float) -> int:
    print(f"{'':16} root: p50, p99, attacked p50, p99   uid 2002: the same          MiB")
    failed = False
    for name in chosen:
        row, good = measure(ATTACKS[name], seconds, bound)
        print(f"{name:16} {row}", flush=True)
        failed = failed or not good
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

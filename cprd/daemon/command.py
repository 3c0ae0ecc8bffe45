"""The command `cprd`: options, limits, the socket, signals; then the daemon."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import stat
import sys

from cprd.daemon import log
from cprd.errors import CprdError, InvalidInput, Unavailable
from cprd.linux.paths import default_socket
from cprd.linux.stdio import stand_in
from cprd.systemd import notify

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cprd.daemon.config import Config
    from cprd.daemon.server import Server
    from cprd.daemon.storage.shelves import Keeper

OLDEST_KERNEL = (5, 10)
BACKLOG = 512


def main(argv: list[str] | None = None) -> int:
    """Run the daemon until SIGTERM. Exit status: 0 stopped as asked, 1 failed, 2 usage."""
    stand_in()
    options = _parser().parse_args(argv)
    try:
        _check_kernel()
        from cprd.daemon import config

        file = options.config or config.default_path(user=options.user)
        settings = config.read(file) if file else config.Config()
        if options.check:
            which = file or "the defaults"
            print(f"cprd: the configuration is good ({which}); would serve {_path(options)}")
            return 0
        named = notify.listen_fds(os.environ)
        given = _sort(named)
        if given.listener is None:
            given.listener, given.path = _listen(options), _path(options)
        elif given.path:
            given.path = _path(options)
        given.look()
        if options.keep:
            _become_parent(given)
    except CprdError as error:
        print(f"cprd: {error}", file=sys.stderr)
        return 1
    import trio

    # Signals that come while the event loop ends find these handlers.
    late: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda number, _: late.append(number))
    try:
        again = trio.run(_serve, given, settings)
    except CprdError as error:
        print(f"cprd: {error}", file=sys.stderr)
        return 1
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # what comes now is for the next one
    if signal.SIGTERM in late or signal.SIGINT in late:
        again = None
    if again is not None:
        _become_new(again, given)
    if given.path:
        given.unlink()
    # Not the interpreter's own end: a thread that is still closing a foreign file must not keep it.
    os._exit(0)


class Given:
    """What came in at the start: from systemd, or from oneself across exec."""

    def __init__(self) -> None:
        self.listener: socket.socket | None = None
        self.path = ""  # of the listener, when it is ours to remove at the end
        self.inode = (0, 0)  # of the socket's file
        self.shelves: dict[int, dict[str, socket.socket]] = {}
        self.durable: set[int] = set()  # of these, those that the store has
        self.closing: list[tuple[int, int]] = []  # (uid, fd) that the one before had yet to close
        self.once: set[int] = set()  # those that it had once, as far as is known

    def look(self) -> None:
        """Remember which file it is."""
        if self.path:
            try:
                self.inode = _inode(self.path)
            except OSError:
                pass  # removed meanwhile

    def unlink(self) -> None:
        """Remove the socket's file, unless another daemon has made one of its own there."""
        try:
            if _inode(self.path) == self.inode:
                os.unlink(self.path)
        except OSError:
            pass


def _become_parent(given: Given) -> None:
    """Execute the parent of --keep, which starts this command again without --keep. Raises
    CprdError."""
    from cprd.keep.become import become_parent
    from cprd.linux.nofile import hard_limit

    if given.shelves:
        raise InvalidInput(
            "descriptors of a store came in ($LISTEN_FDS): the manager keeps what cprd holds"
            " already, so leave out --keep"
        )
    assert given.listener is not None
    command = [sys.executable, *(word for word in sys.orig_argv[1:] if word != "--keep")]
    inode = given.inode if given.path else None
    try:
        with hard_limit():  # stays raised across exec
            become_parent(given.listener, inode, command)
    except CprdError:
        if given.path:
            given.unlink()
        raise


def _inode(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
OWN_LISTENER = "cprd-own-listener"
LOCAL = "local."  # before the names of shelves that no store has
ONCE = "once."  # of those that it had once, and may have still
CLOSING = "c."  # and a uid: what is still to be closed, which can block
MOST_CLOSING = 5000  # names of more than that do not fit one variable


def _sort(named: list[tuple[str, int]]) -> Given:
    """Tell the descriptors that came in apart, by name. Raises InvalidInput."""
    given = Given()
    for name, fd in named:
        sock = None if name.startswith(CLOSING) else _as_socket(fd)
        parts = name.removeprefix(LOCAL).removeprefix(ONCE).split(".")
        if name.startswith(CLOSING) and name[len(CLOSING) :].isdigit():
            given.closing.append((int(name[len(CLOSING) :]), fd))
        elif name == notify.CANARY:  # left by one that was killed; the store drops it later
            if sock is not None:
                sock.detach()
            os.close(fd)
        elif len(parts) == 3 and parts[0] == "shelf" and parts[1].isdigit() and sock is not None:
            ends = given.shelves.setdefault(int(parts[1]), {})
            if parts[2] in ends:
                sock.close()
                continue
            ends[parts[2]] = sock
            if name.startswith(ONCE):
                given.once.add(int(parts[1]))
            elif not name.startswith(LOCAL):
                given.durable.add(int(parts[1]))
        elif sock is not None and _listens(sock) and given.listener is None:
            if sock.type != socket.SOCK_SEQPACKET or sock.family != socket.AF_UNIX:
                raise InvalidInput(f"the socket {name} of systemd wants ListenSequentialPacket=")
            given.listener = sock
            given.path = "?" if name == OWN_LISTENER else ""
        else:
            log.event("unknown-descriptor", level=log.WARNING, name=name)
            if sock is not None:
                sock.detach()
            os.close(fd)
    return given


def _listens(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _as_socket(fd: int) -> socket.socket | None:
    try:
        return socket.socket(fileno=fd)
    except OSError:
        return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cprd",
        description="Holds state and open descriptors while nobody runs.",
        allow_abbrev=False,  # --keep has to be found in the command line by its name
    )
    parser.add_argument("--socket", metavar="PATH", help="where to listen ($CPRD_SOCKET)")
    parser.add_argument(
        "--user", action="store_true", help="listen in $XDG_RUNTIME_DIR, for this user only"
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="limits (TOML, docs/operations.md); default, as root or as a service:"
        " /etc/cprd/cprd.toml if it exists",
    )
    parser.add_argument("--check", action="store_true", help="check the configuration and exit")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="start cprd from a small parent, which keeps what cprd holds while cprd is killed and"
        " restarted: for places without systemd (docs/containers.md)",
    )
    return parser


def _path(options: argparse.Namespace) -> str:
    path: str = options.socket or default_socket(user=options.user)
    return path


def _check_kernel() -> None:
    release = os.uname().release
    try:
        version = tuple(int(part) for part in release.split("-")[0].split(".")[:2])
    except ValueError:
        return
    if version < OLDEST_KERNEL:
        raise Unavailable(
            f"Linux {release} is too old: cprd wants {OLDEST_KERNEL[0]}.{OLDEST_KERNEL[1]} or later"
        )
    try:
        with open("/proc/self/fdinfo/0", "rb"):
            pass
    except FileNotFoundError:
        if not os.path.isdir("/proc/self"):
            raise Unavailable("cprd wants /proc to be mounted") from None


def _listen(options: argparse.Namespace) -> socket.socket:
    """A listening socket at its path. Raises Unavailable."""
    path = _path(options)
    _prepare_directory(path, options.user)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        _remove_stale(path)
        old = os.umask(0o177 if options.user else 0o111)
        try:
            sock.bind(path)
        finally:
            os.umask(old)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise Unavailable(f"cannot listen at {path}: {error.strerror or error}") from None
    return sock


def _prepare_directory(path: str, user: bool) -> None:
    directory = os.path.dirname(path)
    if directory and not os.path.isdir(directory):
        try:
            os.makedirs(directory, 0o700 if user else 0o755)
        except OSError as error:
            raise Unavailable(f"cannot make {directory}: {error.strerror}") from None


def _remove_stale(path: str) -> None:
    """Remove the socket of a daemon that is gone; refuse to take over a living one's."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise Unavailable(f"{path} is in the way: it is not a socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            os.unlink(path)
            return
        except BlockingIOError:
            pass
    raise Unavailable(f"another cprd serves {path}")


async def _serve(given: Given, settings: Config) -> Keeper | None:
    """Serve until a signal. Returns the keeper whose shelves go along when the daemon is to
    re-execute itself, None when it is to end."""
    import trio

    from cprd.daemon.clock import now
    from cprd.daemon.closer import Closer
    from cprd.daemon.server import Server, raise_nofile
    from cprd.daemon.storage.fdstore import Store
    from cprd.daemon.storage.shelves import Keeper
    from cprd.protocol.registry import Registry

    raise_nofile()
    assert given.listener is not None
    closer = Closer()
    for uid, fd in given.closing:
        closer.close(uid, [fd])
    registry = Registry(settings.quota, first_generation=int(now() * 1e9))
    manager = _manager()
    keeper = Keeper(closer, now, registry.replies, managed=manager is not None)
    daemon = Server(settings, keeper, closer, registry)
    daemon.adopt(*keeper.adopt(_pairs(given), frozenset(given.durable), frozenset(given.once)))
    again = False
    with trio.open_signal_receiver(*SIGNALS) as signals:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # blocked by the one that became us
        async with trio.open_nursery() as nursery:
            if manager is not None:
                store = Store(keeper, manager)
                await store.settle()
                nursery.start_soon(store.tend)
            nursery.start_soon(daemon.serve, given.listener)
            log.event(
                "ready",
                pid=os.getpid(),
                socket=given.path or "inherited",
                kept=keeper.kept,
                holds=len(registry),
            )
            if manager is not None:
                await _tell(manager, notify.ready(_status(daemon)))
                nursery.start_soon(_report, manager, daemon)
            async for number in signals:
                if number == signal.SIGHUP:
                    daemon.reloading = trio.Event()
                    if manager is not None:
                        await _tell(manager, notify.reloading())
                    again = await trio.to_thread.run_sync(_new_version_works)
                    if not again:
                        daemon.reloading.set()
                        daemon.reloading = None
                        if manager is not None:
                            text = "reload refused: cprd --check failed; " + _status(daemon)
                            await _tell(manager, notify.ready(text))
                        continue
                else:
                    lost = 0 if keeper.kept == "store" else len(registry)
                    log.event(
                        "stopping",
                        level=log.WARNING if lost else log.INFO,
                        signal=signal.Signals(number).name,
                        lost=lost or None,
                    )
                    if manager is not None:
                        await _tell(manager, notify.stopping(_status(daemon)))
                daemon.stopping = True
                nursery.cancel_scope.cancel()
                break
    closer.drained(1.0)
    given.closing = closer.stop()
    return keeper if again else None


def _pairs(given: Given) -> dict[int, tuple[socket.socket, socket.socket]]:
    """(outlet, inlet) of each shelf that came in. Where one end is missing, another takes its place
    that leads nowhere: without an inlet it can be read, and is written anew as soon as anything is
    to be written; without an outlet it is empty."""
    pairs = {}
    for number, ends in given.shelves.items():
        if len(ends) != 2:
            log.event("half-a-shelf", level=log.WARNING, number=number, has=next(iter(ends)))
            stray, gone = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            gone.close()
            ends.setdefault("out", stray)
            ends.setdefault("in", stray)
        pairs[number] = (ends["out"], ends["in"])
    return pairs


def _manager() -> notify.Manager | None:
    """The service manager, if there is one that listens."""
    try:
        return notify.Manager.from_environment(os.environ)
    except CprdError as error:
        log.event("no-manager", level=log.ERROR, why=str(error))
        return None


def _new_version_works() -> bool:
    """Whether what would be executed now starts up as far as --check goes."""
    import subprocess

    command = [sys.executable, *sys.orig_argv[1:], "--check"]
    try:
        check = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.event("reload-refused", level=log.ERROR, why=str(error))
        return False
    if check.returncode:
        said = check.stderr.decode(errors="replace").strip().splitlines()
        why = said[-1] if said else f"exit status {check.returncode}"
        log.event("reload-refused", level=log.ERROR, why=f"cprd --check: {why}")
    return check.returncode == 0


def _become_new(keeper: Keeper, given: Given) -> None:
    """Re-execute: the same PID, the listener and the shelves go along, all else is closed."""
    assert given.listener is not None
    named = [(OWN_LISTENER if given.path else "cprd.socket", given.listener.fileno())]
    for shelf in keeper.shelves():
        for name, end in zip(shelf.names, (shelf.outlet, shelf.tx), strict=True):
            mark = "" if shelf.durable else ONCE if shelf.was_durable else LOCAL
            named.append((mark + name, end.fileno()))
    named += [(f"{CLOSING}{uid}", fd) for uid, fd in given.closing[:MOST_CLOSING]]
    log.event("re-executing", pid=os.getpid())
    notify.pass_on(named, os.environ)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


async def _tell(manager: notify.Manager, message: bytes) -> None:
    """Tell the manager, if it can be had; it is not worth dying for."""
    import trio

    with trio.move_on_after(5.0):
        try:
            await notify.adrive(manager.tell(message))
        except CprdError as error:
            log.event("manager-mute", level=log.WARNING, why=str(error))


def _status(daemon: Server) -> str:
    return f"{len(daemon.registry)} holds, kept: {daemon.keeper.kept}"


async def _report(manager: notify.Manager, daemon: Server) -> None:
    """Keep the watchdog quiet and the status line true."""
    import trio

    interval = notify.watchdog_interval(os.environ)
    pause = 10.0 if interval is None else min(10.0, interval / 2)
    said = ""
    while True:
        text = _status(daemon)
        message = notify.WATCHDOG if interval is not None else b""
        if text != said:
            message += (b"\n" if message else b"") + notify.status(text)
            said = text
        if message:
            await _tell(manager, message)
        await trio.sleep(pause)


if __name__ == "__main__":
    sys.exit(main())

"""The command `cprd`: options, limits, the socket, signals; then the daemon."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import stat
import sys

from cprd import log
from cprd.errors import CprdError, InvalidInput, Unavailable
from cprd.paths import default_socket

OLDEST_KERNEL = (5, 10)
BACKLOG = 512


def main(argv: list[str] | None = None) -> int:
    """Run the daemon until SIGTERM. Exit status: 0 stopped as asked, 1 failed, 2 usage."""
    options = _parser().parse_args(argv)
    try:
        _check_kernel()
        from cprd import config

        settings = config.read(options.config) if options.config else config.Config()
        if options.check:
            print(f"cprd: the configuration is good; would serve {_path(options)}")
            return 0
        listener, path = _listener(options)
    except CprdError as error:
        print(f"cprd: {error}", file=sys.stderr)
        return 1
    import trio

    try:
        trio.run(_serve, listener, path, settings)
    finally:
        if path:
            _unlink_own(path, listener)
        listener.close()
    # Not the interpreter's own end: a thread that is still closing a foreign file must not keep it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cprd", description="Holds state and open descriptors while nobody runs."
    )
    parser.add_argument("--socket", metavar="PATH", help="where to listen ($CPRD_SOCKET)")
    parser.add_argument(
        "--user", action="store_true", help="listen in $XDG_RUNTIME_DIR, for this user only"
    )
    parser.add_argument("--config", metavar="FILE", help="limits (TOML, docs/operations.md)")
    parser.add_argument("--check", action="store_true", help="check the configuration and exit")
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


def _listener(options: argparse.Namespace) -> tuple[socket.socket, str]:
    """The listening socket, and its path when it is ours to remove at the end."""
    from cprd import systemd

    for _, fd in systemd.listen_fds(os.environ):
        sock = socket.socket(fileno=fd)
        if sock.type != socket.SOCK_SEQPACKET or sock.family != socket.AF_UNIX:
            raise InvalidInput("the socket from systemd wants ListenSequentialPacket=")
        return sock, ""
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
    return sock, path


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


def _unlink_own(path: str, listener: socket.socket) -> None:
    del listener
    try:
        os.unlink(path)
    except OSError:
        pass


async def _serve(listener: socket.socket, path: str, settings: object) -> None:
    import trio

    from cprd.closer import Closer
    from cprd.config import Config
    from cprd.daemon import Daemon, now
    from cprd.holds import Registry
    from cprd.keeper import Keeper

    assert isinstance(settings, Config)
    closer = Closer()
    registry = Registry(settings.quota, first_generation=int(now() * 1e9))
    daemon = Daemon(settings, Keeper(closer), closer, registry)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(daemon.serve, listener)
            log.event("ready", pid=os.getpid(), socket=path or "from systemd", kept="memory")
            async for number in signals:
                lost = len(registry) if daemon.keeper.kept == "memory" else 0
                log.event(
                    "stopping",
                    level=log.WARNING if lost else log.INFO,
                    signal=signal.Signals(number).name,
                    lost=lost or None,
                )
                nursery.cancel_scope.cancel()
                break
    closer.drained(1.0)


if __name__ == "__main__":
    sys.exit(main())

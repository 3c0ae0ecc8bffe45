"""The command `cprd`: options, checks before the start, and the exit status."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from cprd.daemon import listener, reexec
from cprd.errors import CprdError, InvalidInput, Unavailable, absent
from cprd.linux import listen_fds
from cprd.linux.paths import default_socket
from cprd.linux.stdio import note, say, stand_in

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from cprd.daemon.config import Config

OLDEST_KERNEL = (5, 10)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main(argv: list[str] | None = None) -> int:
    """Run the daemon until SIGTERM. Exit status: 0 stopped as asked, 1 failed, 2 usage."""
    stand_in()
    options = _parser().parse_args(argv)
    try:
        _check_kernel()
        _check_packages()
        settings = _settings(options)
        if options.check:
            return 0
        given = _given(options)
        if options.keep:
            _become_parent(given)
        _serve(given, settings)
    except CprdError as error:
        note(f"cprd: {error}")
        return 1
    # Not the interpreter's own end: nothing here is worth the time.
    os._exit(0)


def _settings(options: argparse.Namespace) -> Config:
    """The configuration. With --check, import the whole daemon as well, and print the result."""
    from cprd.daemon import config

    file = options.config or config.default_path(user=options.user)
    settings = config.read(file) if file else config.Config()
    if options.check:
        import cprd.daemon.running  # noqa: F401

        which = file or "the defaults"
        say(f"cprd: the configuration is good ({which}); would serve {_path(options)}")
    return settings


def _given(options: argparse.Namespace) -> reexec.Given:
    """Descriptors from the start; with a new listener, where no listener came in."""
    given = reexec.sort(listen_fds.take(os.environ))
    if not given.listeners:
        own = listener.listen(_path(options), private=options.user)
        given.listeners.append((reexec.OWN_LISTENER, own))
    if given.has_own_listener:
        given.own = listener.SocketFile(_path(options))
    return given


def _become_parent(given: reexec.Given) -> NoReturn:
    """Execute the parent of --keep, which starts `cprd` again without --keep. Raises
    CprdError."""
    from cprd.keep.become import become_parent
    from cprd.linux.nofile import hard_limit

    if given.shelves:
        raise InvalidInput(
            "descriptors of a store came in ($LISTEN_FDS): the manager keeps what cprd holds"
            " already, so leave out --keep"
        )
    command = [sys.executable, *(word for word in sys.orig_argv[1:] if word != "--keep")]
    # To the next cprd a listener is the parent's, which removes the file at the end.
    listeners = [
        ("cprd.socket" if name == reexec.OWN_LISTENER else name, sock)
        for name, sock in given.listeners
    ]
    try:
        with hard_limit():  # stays raised across exec
            become_parent(listeners, given.own.identity if given.own else None, command)
    except CprdError:
        if given.own is not None:
            given.own.unlink()
        raise


def _serve(given: reexec.Given, settings: Config) -> None:
    """Serve until a signal. Does not return where the signal asked for a new version."""
    import trio

    from cprd.daemon.running import Running

    # Signals that come while the event loop ends find these handlers.
    late: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda number, _: late.append(number))
    running = Running(given, settings, SIGNALS)
    again = False
    try:
        again = trio.run(running.run)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # what comes now is for the next one
        again = again and signal.SIGTERM not in late and signal.SIGINT not in late
    finally:
        if not again:
            running.end()
    if again:
        running.become_new()
    if given.own is not None:
        given.own.unlink()


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


def _check_packages() -> None:
    """Raises Unavailable where a package is missing."""
    try:
        import trio  # noqa: F401
    except ModuleNotFoundError:
        raise Unavailable(absent("trio", "the daemon")) from None


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


if __name__ == "__main__":
    sys.exit(main())

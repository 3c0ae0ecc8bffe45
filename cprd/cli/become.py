"""Become a command by exec, with descriptors as a service manager passes them.

LISTEN_FDS, LISTEN_PID and LISTEN_FDNAMES as in sd_listen_fds(3): the descriptors are 3 and up, in
the state's order, then the sections as sealed memfds. A `Crew` owns everything until exec, and
becomes a state again should exec fail.
"""

from __future__ import annotations

import fcntl
import os
import signal
from typing import TYPE_CHECKING, Any, NoReturn

from cprd.cli.names import listen_fdnames
from cprd.errors import CprdError, InvalidInput, LimitExceeded
from cprd.linux import listen_fds
from cprd.linux.listen_fds import FIRST
from cprd.linux.nofile import raise_soft_limit, set_soft_limit
from cprd.linux.stdio import flush, note

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Sequence

    from cprd import State


def program(command: Sequence[str] | None) -> str:
    """The file that `command` would execute, asked before anything is claimed. Raises InvalidInput
    without a command, CprdError without such a program, or for a file that is not executable."""
    if not command or not command[0]:
        raise InvalidInput("what is to be started? Put the command after --: ... -- CMD [ARG ...]")
    name = command[0]
    if "/" in name:
        candidates = [name]
    else:
        path = os.environ.get("PATH", os.defpath)
        candidates = [os.path.join(folder or ".", name) for folder in path.split(os.pathsep)]
    for candidate in candidates:
        if os.path.isfile(candidate) and os.access(candidate, os.X_OK):
            return candidate
    if any(os.path.exists(candidate) for candidate in candidates):
        raise CprdError(f"{name} cannot be executed: it is no executable file (chmod +x?)")
    raise CprdError(f"{name} is not there: no such program" + ("" if "/" in name else " in $PATH"))


class RaisedLimit:
    """The soft RLIMIT_NOFILE at the hard one while a state is loaded, put back at the end."""

    def __init__(self) -> None:
        self.soft, self.hard = raise_soft_limit()

    def restore(self, count: int) -> None:
        """Put the limit back for a command that gets `count` descriptors. Where `count` does not
        fit, the limit stays raised, with as many numbers free as the command expects, and a
        note."""
        soft = self.soft
        if count and FIRST + count >= soft:
            soft = min(self.hard, FIRST + count + self.soft)
            note(
                f"cprctl: the soft RLIMIT_NOFILE of {self.soft} is too low for {count} descriptors:"
                f" the command starts with {soft} (set LimitNOFILE= or ulimit -Sn to choose)"
            )
        set_soft_limit(soft)


class Crew:
    """Descriptors and sections for the command; owns the descriptors."""

    def __init__(self) -> None:
        self.keys: list[tuple[str, int]] = []
        self.fds: list[int] = []
        self.sections: dict[str, tuple[bool, Any]] = {}  # key: (raw bytes?, the value)
        # Whether something was held before; None until cprd has been told that it is ours now: from
        # then on whatever goes wrong has to be put right by us.
        self.warm: bool | None = None

    def add(self, name: str, id: int, fd: int) -> None:
        """One more descriptor, owned by the crew from now on."""
        self.keys.append((name, id))
        self.fds.append(fd)

    def insert(self, position: int, name: str, id: int, fd: int) -> None:
        """One more descriptor, owned by the crew from now on, before those at `position` and up."""
        self.keys.insert(position, (name, id))
        self.fds.insert(position, fd)

    def close(self) -> None:
        """Close everything."""
        for fd in self.fds:
            os.close(fd)
        self.keys.clear()
        self.fds.clear()
        self.sections.clear()

    def take(self, state: State, *, but: Container[tuple[str, int]] = ()) -> None:
        """Take over all that `state` has, `but` for the descriptors under some keys. The values of
        `state` stay readable."""
        for name, id, _ in list(state.fds()):
            if (name, id) not in but:
                self.add(name, id, state.take_fd(name, id))
        for key in state:
            value = state[key]
            raw = isinstance(value, memoryview)
            self.sections[key] = (raw, None if raw else value)
            memfd = fcntl.fcntl(state.section_fd(key), fcntl.F_DUPFD_CLOEXEC, FIRST)
            self.fds.append(memfd)
            os.lseek(memfd, 0, os.SEEK_SET)  # it stands where it was written to, at its end

    def fdnames(self) -> str:
        """LISTEN_FDNAMES; raises LimitExceeded."""
        return listen_fdnames(self.keys, self.sections)

    def as_state(self) -> State:
        """Everything as a state again, borrowing from the crew."""
        from cprd import State

        state = State()
        for (name, id), fd in zip(self.keys, self.fds, strict=False):
            state.save_fd(name, id, fd)
        memfds = self.fds[len(self.keys) :]
        for (key, (raw, value)), fd in zip(self.sections.items(), memfds, strict=True):
            if raw:
                state.save_section_fd(key, fd)
            else:
                state[key] = value
        return state


class Interrupted(BaseException):
    """A signal came that ends a process; the argument is the number."""


class Deferred:
    """From now on a signal that ends a process is only noted, until exec: once confirmed, nobody
    else has what was taken, and a death by SIGTERM would lose all."""

    def __init__(self) -> None:
        self.number = 0
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        del frame
        self.number = number

    def check(self) -> None:
        """Raises Interrupted if a signal came."""
        if self.number:
            raise Interrupted(self.number)


def become(
    file: str,
    command: Sequence[str],
    crew: Crew,
    limit: RaisedLimit,
    deferred: Deferred,
    variables: Callable[[], dict[str, str]] | None = None,
) -> NoReturn:
    """Exec `file` with `crew`, and with systemd's variables, or the result of `variables`, called
    once the descriptors have their numbers. Raises OSError, or Interrupted for a signal that came
    before; then the crew is whole."""
    environment = {key: value for key, value in os.environ.items() if key != "CPRD_BIND"}
    names = crew.fdnames()
    listen_fds.place(crew.fds)
    listen_fds.announce(0 if variables is not None else len(crew.fds), names, environment)
    if variables is not None:
        environment |= variables()
    limit.restore(len(crew.fds))
    flush()
    # Python ignores these two, and what is ignored stays ignored across exec.
    both = (signal.SIGPIPE, signal.SIGXFSZ)
    ignored = [number for number in both if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    try:
        deferred.check()
        os.execve(file, list(command), environment)
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)


def not_become(error: BaseException, name: str, back: Callable[[], str]) -> NoReturn:
    """The end of a start that failed between the confirm and the command: `back` saves what was
    taken, and returns what is held now, for people. Raises, or ends us by the signal that came."""
    if isinstance(error, Interrupted):
        signal.signal(error.args[0], signal.SIG_DFL)  # a second one ends us at once
        why = signal.Signals(error.args[0]).name
    else:
        why = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    RaisedLimit()  # what it takes to save may be more than the command was to get
    try:
        result = back()
    except Exception as lost:
        raise CprdError(
            f"the command did not start ({why}), and {name} could not be saved back: {lost}"
        ) from None
    said = f"the command did not start ({why}); {result}"
    if isinstance(error, Interrupted):
        note(f"cprctl: {said}")
        os.kill(os.getpid(), error.args[0])
    raise CprdError(said) from None


def check_names(shown: dict[str, Any]) -> None:
    """Refuse what LISTEN_FDNAMES cannot hold from what `show` says, so before the claim."""
    listen_fdnames(
        [(d["name"], d["id"]) for d in shown.get("descriptors", ())],
        [s["key"] for s in shown.get("sections", ())],
    )


def check_room(count: int, limit: RaisedLimit) -> None:
    """Refuse before the claim what the hard RLIMIT_NOFILE cannot hold."""
    if FIRST + count + 16 > limit.hard:
        raise LimitExceeded(
            f"{count} descriptors do not fit below this process's hard RLIMIT_NOFILE of"
            f" {limit.hard}: raise it (LimitNOFILE=, ulimit -Hn)"
        )

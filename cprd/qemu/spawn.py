"""Starting a new QEMU: the descriptors that connect it with its helper, its exec, and the guard
that ends it should its helper die; and the service manager's view of that.

The process that becomes the new QEMU waits for words over `talk`, then executes: "cold"; or "go"
and the path at which to listen for the CPR state; or "fail", why, and a name in cprd.errors.CODES.
The descriptors are made before that process is forked, so that none has to be sent. `talk` closes
on exec: its end says "executed"; any word says why not.
"""

from __future__ import annotations

import _socket as socket  # as in rights
import errno
import os
import select
from mmap import mmap

from cprd.errors import CprdError, LimitExceeded
from cprd.linux import identity, processes
from cprd.linux.stdio import note
from cprd.qemu import signals

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any, NoReturn

    from cprd.qemu.command import Command
    from cprd.qemu.sockets import SharedPaths

_PIECE = 1 << 16

# Its descriptors and its exec


class Plumbing:
    """Both ends of what connects a new QEMU with its helper, and the guard. Owns all of them."""

    def __init__(self) -> None:
        self.guard = Guard()
        self.talk, self.talk_qemu = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.monitor, self.monitor_qemu = socket.socketpair()
        self.main, self.main_qemu = socket.socketpair()
        self.stderr, self.stderr_qemu = os.pipe()

    def keep_ours(self) -> None:
        """In the helper: close QEMU's ends."""
        for sock in (self.talk_qemu, self.monitor_qemu, self.main_qemu):
            sock.close()
        self._close("stderr_qemu")

    def keep_qemus(self) -> None:
        """In the process that becomes QEMU: close the helper's ends."""
        for sock in (self.talk, self.monitor, self.main):
            sock.close()
        self.guard.close()
        self.close_stderr()

    def close_stderr(self) -> None:
        """The guard alone reads QEMU's stderr."""
        self._close("stderr")

    def post_guard(self, pidfd: int, **options: Any) -> int:
        """Start the guard of the QEMU behind `pidfd` (borrowed), as nobody's child; `options`: of
        _Guarding. Returns the guard's pid. Raises LimitExceeded."""
        pid = fork_twice()
        if not pid:
            try:
                _Guarding(self.guard, self.stderr, pidfd, **options).run()
            finally:
                os._exit(0)
        self.close_stderr()
        return pid

    def _close(self, which: str) -> None:
        fd = getattr(self, which)
        if fd >= 0:
            os.close(fd)
            setattr(self, which, -1)

    def close(self) -> None:
        self.keep_ours()
        self.keep_qemus()


def say(talk: socket.socket, *words: str) -> bool:
    """Send words without NUL. False when the other side has ended (or become a QEMU)."""
    try:
        talk.send("\0".join(words).encode("utf-8", "surrogateescape"), socket.MSG_NOSIGNAL)
    except OSError:
        return False
    return True


def say_or_note(talk: socket.socket, why: str, code: str, *, executed: bool) -> None:
    """Say why nothing was started; on our own stderr where the process may be a QEMU by now."""
    if executed or not say(talk, "fail", why.replace("\0", ""), code):
        note(f"cprctl: {why}")


def hear(talk: socket.socket) -> list[str]:
    """Wait for the next words; none when the other side has ended."""
    while True:
        try:
            data = talk.recv(_PIECE)
        except ConnectionResetError:
            continue  # it ended without hearing us; what it said before comes next
        except OSError:
            return []
        return data.decode("utf-8", "surrogateescape").split("\0") if data else []


def fork_twice() -> int:
    """Fork, so that the new process is nobody's child. Returns the pid; 0 in the new process. The
    process in between ends at once, and so does the caller's wait. Raises LimitExceeded."""
    told = mmap(-1, 4)  # shared
    try:
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            if pid := int.from_bytes(told[:], "little"):
                return pid
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    except OSError as error:
        raise LimitExceeded(
            f"no process left ({error.strerror}): raise RLIMIT_NPROC (ulimit -u), or TasksMax= of"
            " the unit"
        ) from None
    try:
        if pid := os.fork():
            told[:] = pid.to_bytes(4, "little")
            os._exit(0)
    except OSError:
        os._exit(1)
    return 0


def take_rights(command: Command, uid: int) -> None:
    """For root, with COMMAND to be executed next for a guest of `uid`: a bare QEMU runs as that
    user. Wrappers run as root, by whose hand they stand there, and change the uid themselves."""
    if not identity.is_root() or not uid:
        return
    if command.wrappers:
        identity.act_as_ourselves()
    else:
        identity.become(uid)


def become_qemu(command: Command, plumbing: Plumbing, cpr: str, uid: int) -> OSError:
    """Become the QEMU that waits for a state of `uid`, at the path `cpr`. Returns only the
    failure."""
    own = os.dup(2)
    try:
        take_rights(command, uid)
        monitor, main = plumbing.monitor_qemu.fileno(), plumbing.main_qemu.fileno()
        for fd in (monitor, main):
            os.set_inheritable(fd, True)
        words = command.incoming(monitor=monitor, main=main, cpr=cpr)
        os.dup2(plumbing.stderr_qemu, 2)
        os.execvp(words[0], words)
    except OSError as error:
        os.dup2(own, 2)
        return error


# The guard
#
# A QEMU that waits for a state which nobody will send would stand there for ever. So a small
# process reads QEMU's stderr. Once armed, and until it is told that the guest is about to run, the
# end of the helper (however it comes) ends that QEMU. Afterwards it only passes on QEMU's stderr,
# as `cat`, until QEMU ends: nobody can take the pipe out of a running QEMU again. In an upgrade it
# outlives the helper, and gives the shared paths (sockets.py) to the QEMU that is left, before it
# becomes `cat`.

_KEPT = 4096  # bytes of QEMU's stderr, for the reason of a reject
_REPORT = b"r"
_ARMED, _DISARMED = 1, 2  # 0 before: nothing was executed


class Guard:
    """The helper's end, and before the forks the guard's end too."""

    def __init__(self) -> None:
        self._control, self.guards = socket.socketpair()
        self.told = mmap(-1, 1)  # shared: the guest stands still, and to wake the guard takes long

    def arm(self) -> None:
        """From now on the end of the helper ends QEMU."""
        self.guards.close()
        self.told[0] = _ARMED

    def disarm(self) -> None:
        """From now on QEMU may outlive the helper: say so before the guest runs, never after. The
        guard looks when the helper has ended or has closed this."""
        self.told[0] = _DISARMED

    def report(self) -> str:
        """QEMU's last words, for a QEMU that has ended, on one line."""
        data = b""
        try:
            self._control.sendall(_REPORT)
            self._control.settimeout(3.0)
            while piece := self._control.recv(_KEPT):
                data += piece
        except OSError:
            pass
        return " ".join(data.decode("utf-8", "replace").split())

    def close(self) -> None:
        self._control.close()
        self.guards.close()


class _Guarding:
    """The guard itself. `stderr`: the pipe to read; `pidfd`: of the QEMU; `onward`: where QEMU's
    stderr goes once the guest runs; `old`: the pidfd of the QEMU before, and the paths that both
    share."""

    def __init__(
        self,
        guard: Guard,
        stderr: int,
        pidfd: int,
        *,
        onward: int = 2,
        old: int = -1,
        shared: SharedPaths | None = None,
    ) -> None:
        self.control, self.told = guard.guards, guard.told
        self.stderr = stderr
        self.pidfd = pidfd
        self.onward = onward
        self.old = old
        self.shared = shared
        self.kept = b""

    def run(self) -> None:
        signals.ignore()  # QEMU has something to say when it is ended, too
        kept_open = [0, 1, 2, self.control.fileno(), self.stderr, self.pidfd, self.onward]
        if self.shared is not None:
            kept_open += [self.old, *self.shared.fds]
        _close_others(kept_open)
        poll = select.poll()
        poll.register(self.control.fileno(), select.POLLIN)
        poll.register(self.stderr, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd != self.stderr:
                    return self._obey(self.control.recv(1))
                if not self._pass_on():
                    poll.unregister(self.stderr)

    def _pass_on(self) -> bool:
        """Read a piece of QEMU's stderr, and write it on ours. False at its end."""
        data = os.read(self.stderr, _PIECE)
        self.kept = (self.kept + data)[-_KEPT:]
        _write(data)
        return bool(data)

    def _obey(self, word: bytes) -> None:
        """The helper's only word; none when the helper has ended."""
        if word == _REPORT:
            while self._pass_on():
                pass
            self.control.sendall(self.kept)
        elif self.told[0] == _DISARMED:
            if self.shared is not None:
                self._give_paths(self.shared)
            self._be_cat()
        elif self.told[0] == _ARMED:
            try:
                processes.kill(self.pidfd)
            except OSError:
                pass
            ended = select.poll()
            ended.register(self.pidfd, select.POLLIN)
            ended.poll(10_000)
            if self.shared is not None:
                self.shared.give_back()

    def _give_paths(self, shared: SharedPaths) -> None:
        """Wait until one of the two QEMUs has ended; the shared paths are the other's then."""
        os.dup2(self.onward, 2)  # cprctl's caller may wait until nobody has its output any more
        os.dup2(self.onward, 1)
        poll = select.poll()
        for fd in (self.stderr, self.pidfd, self.old):
            poll.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self.stderr in ready and not self._pass_on():
                poll.unregister(self.stderr)
            if self.pidfd in ready and self.old in ready:
                return shared.both_have_ended()
            if self.old in ready:
                return shared.old_has_ended()
            if self.pidfd in ready:
                return shared.new_has_ended()

    def _be_cat(self) -> NoReturn:
        """Go on as the smallest program that passes stderr on; not as a user that could trace it,
        for it has our output."""
        identity.act_as_ourselves()
        os.dup2(self.onward, 2)
        os.dup2(self.onward, 1)
        os.dup2(self.stderr, 0)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        try:
            os.execvp("cat", ["cat", "-v"] if os.isatty(2) else ["cat"])
        except OSError:
            pass
        while data := os.read(0, _PIECE):
            _write(data)
        os._exit(0)


_RAW = bytes(byte for byte in (*range(32), 127) if byte not in b"\t\n")


def _write(data: bytes) -> None:
    """Pass on what a QEMU said; to a terminal without control characters."""
    try:
        if os.isatty(2):
            data = data.translate(bytes.maketrans(_RAW, b"?" * len(_RAW)))
        while data:
            data = data[os.write(2, data) :]
    except OSError:
        pass


def _close_others(kept: Iterable[int]) -> None:
    last = -1
    for fd in sorted(set(kept)):
        if last + 1 < fd:  # closerange(0, 0) closes everything on a Linux with close_range(2)
            os.closerange(last + 1, fd)
        last = fd
    os.closerange(last + 1, os.sysconf("SC_OPEN_MAX"))


# The service manager


def notify(message: str) -> None:
    """Send a notification, if a manager asked for some. A manager that is away is no failure."""
    _tell(message.encode(), taken_in=False)


def notify_main_pid(pid: int, status: str) -> None:
    """Say that `pid` is the service from now on, and wait until the manager has taken that in: the
    old main process may end only then. A manager that is away is no failure."""
    from cprd.systemd.notify import mainpid
    from cprd.systemd.notify import status as status_line

    _tell(mainpid(pid) + b"\n" + status_line(status), taken_in=True)


def _tell(message: bytes, *, taken_in: bool) -> None:
    if "NOTIFY_SOCKET" not in os.environ:
        return
    from cprd.systemd.notify import Manager, drive

    try:
        manager = Manager.from_environment(os.environ)
        if manager is None:
            return
        with manager:
            drive(manager.tell(message), timeout=10.0)
            if taken_in:
                drive(manager.barrier(), timeout=10.0)
    except (CprdError, OSError) as error:
        note(f"cprctl: the service manager was not told: {error}")

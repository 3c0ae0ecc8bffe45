"""Starting cprd: its descriptors from 3 on, its environment, its signals."""

import fcntl
import os
import signal

from cprd.keep import entries, log
from cprd.keep.record import Record

FIRST_FD = 3
HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
IGNORED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGQUIT, signal.SIGPIPE)
NOT_STARTED = 203  # exit status, as systemd's


def start(command: list[str], record: Record) -> int:
    """Start a child with the sockets and the entries, newest entry first. Returns the PID."""
    passed = [*record.sockets, *((name, fd) for name, fd, _ in reversed(record.entries))]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
    try:
        pid = os.fork()
        if pid == 0:
            become(command, record, passed)
        return pid
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def become(command: list[str], record: Record, passed: list[tuple[str, int]]) -> None:
    """Execute `command` with copies of the passed descriptors from 3 on. Never returns."""
    try:
        own, names = str(os.getpid()), ":".join(name for name, _ in passed)
        environ = dict(os.environ, NOTIFY_SOCKET=record.notify_path, FDSTORE=str(entries.room()))
        environ.update(LISTEN_PID=own, LISTEN_FDS=str(len(passed)), LISTEN_FDNAMES=names)
        environ.update(WATCHDOG_PID=own, WATCHDOG_USEC=str(int(record.watchdog * 1e6)))
        environ.pop("LISTEN_PIDFDID", None)
        above = FIRST_FD + len(passed)
        copies = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for _, fd in passed]
        for target, copy in enumerate(copies, FIRST_FD):
            os.dup2(copy, target, inheritable=True)
        for number in (*HEARD, *IGNORED):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # what came since the fork acts now
        os.execvpe(command[0], command, environ)
    except BaseException as error:
        log.event("not-started", command=command[0], why=error)
    finally:
        os._exit(NOT_STARTED)

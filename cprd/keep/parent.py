"""The parent's loop: messages, signals, deaths, and the one deadline of the child's stage."""

import math
import os
import select
import signal
import socket
import sys
import time

from cprd.keep import child, entries, log, messages
from cprd.keep.record import Record

# The child's stages, and how many seconds each may last. READY=1 ends "starting", each WATCHDOG=1
# begins "ready" anew, SIGTERM begins "stopping", the child's end "waiting". A killed process that a
# file system holds in close() runs no code of its own any more: the next one may start. See late().
WITHIN = {"starting": 90.0, "stopping": 5.0, "aborted": 2.0, "killed": 5.0}
PAUSE_FIRST, PAUSE_MOST = 0.05, 10.0  # s before a start; doubled by each start without READY=1
MESSAGES = 64  # in one turn
PASSED_UP = ("READY", "STATUS", "RELOADING", "MONOTONIC_USEC")


class Parent:
    """Owns the descriptors of `record`."""

    def __init__(self, record: Record, command: list[str]) -> None:
        self.record, self.command = record, command
        self.notify = socket.socket(fileno=record.notify)
        self.wake, wake_up = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.pause = PAUSE_FIRST
        # From a descriptor that found no room or did not arrive until the next barrier: the witness
        # must not find room either.
        self.refuses = False
        self.ending = self.reloads = False
        self.status: int | None = None
        usec = os.environ.get("WATCHDOG_USEC", "")
        self.up_every = int(usec) / 3e6 if usec.isdigit() and int(usec) else math.inf
        signal.set_wakeup_fd(wake_up, warn_on_full_buffer=False)
        for number in child.IGNORED:
            signal.signal(number, signal.SIG_IGN)
        for number in child.HEARD:
            signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, child.HEARD)
        os.write(wake_up, b"\0")  # so that the first turn looks at everything
        self.enter(record.stage)

    def run(self) -> int:
        """Until the child has ended as asked. Returns the exit status."""
        while self.status is None:
            try:
                self.turn()
            except Exception as error:  # all that is kept would end with this process
                log.event("keep-error", why=repr(error))
                time.sleep(0.1)
        return self.status

    def enter(self, stage: str) -> None:
        within = {"waiting": self.pause, "ready": self.record.watchdog, **WITHIN}[stage]
        self.record.stage, self.deadline = stage, time.monotonic() + within

    def turn(self) -> None:
        poll = select.poll()
        for fd in (self.wake, self.record.notify):
            poll.register(fd, select.POLLIN)
        for _, fd, polled in self.record.entries:
            if polled:
                poll.register(fd, 0)
        left = min(self.deadline - time.monotonic(), self.up_every)
        poll.poll(max(0, math.ceil(left * 1000)))
        if self.up_every < math.inf:
            messages.send_up("WATCHDOG=1")
        entries.look(self.record.entries)
        self.read(MESSAGES)
        for number in self.signals():
            self.hear(number)
        self.reap()
        if self.status is None and time.monotonic() >= self.deadline:
            self.late()
        if self.reloads:
            self.become_newer()

    def read(self, most: float) -> None:
        """Handle messages. Only the child's own words count, as with NotifyAccess=main."""
        while most > 0 and (message := messages.receive(self.notify)) is not None:
            most -= 1
            if message.pid == self.record.child:
                self.handle(message)
            message.close()

    def handle(self, message: messages.Message) -> None:
        """Take kept descriptors out of `message.fds`."""
        fields, kept = message.fields, self.record.entries
        self.refuses = self.refuses or message.cut
        if "BARRIER" in fields:  # answered by its descriptor's end
            entries.look(kept)
            self.refuses = False
        elif fields.get("FDSTORE") == "1":
            name, polled = fields.get("FDNAME", "stored"), fields.get("FDPOLL") != "0"
            while message.fds and not self.refuses:
                self.refuses = not entries.store(kept, name, message.fds.pop(), polled=polled)
            if self.refuses:
                log.event("not-stored", name=name, kept=len(kept), most=entries.room())
            entries.look(kept)
        elif "FDSTOREREMOVE" in fields and "FDNAME" in fields:
            entries.remove(kept, fields["FDNAME"])
        if "READY" in fields and self.record.stage == "starting":
            self.record.served, self.pause = True, PAUSE_FIRST
            self.enter("ready")
        elif "WATCHDOG" in fields and self.record.stage == "ready":
            self.enter("ready")
        self.record.said = fields.get("STATUS", self.record.said)
        messages.send_up(*(f"{key}={fields[key]}" for key in PASSED_UP if key in fields))

    def signals(self) -> bytes:
        try:
            return os.read(self.wake, 4096)
        except BlockingIOError:
            return b""

    def hear(self, number: int) -> None:
        if number == signal.SIGHUP:
            self.reloads = True
            self.kill(number)
        elif number in (signal.SIGTERM, signal.SIGINT):
            self.ending = True
            messages.send_up("STOPPING=1")
            if self.record.stage in ("starting", "ready"):
                self.enter("stopping")
            elif self.record.stage == "waiting":
                self.status = 0
            self.kill(number)
            self.kill(signal.SIGCONT)

    def kill(self, number: int) -> None:
        if self.record.child:  # not reaped yet, so the PID is still the child's
            os.kill(self.record.child, number)

    def reap(self) -> None:
        """Take every ended child: for PID 1 all orphans of the container."""
        try:
            while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                if ended[0] == self.record.child:
                    self.gone(os.waitstatus_to_exitcode(ended[1]))
        except ChildProcessError:
            pass

    def gone(self, code: int) -> None:
        """The child ended. Its last messages come first: the next child needs everything."""
        self.read(math.inf)
        self.record.child, self.refuses = 0, False
        if self.ending or (code >= 0 and not self.record.served):
            self.status = code if code >= 0 else 128 - code
            return
        if self.record.stage == "starting":
            self.pause = min(2 * self.pause, PAUSE_MOST)
        self.enter("waiting")
        how = f"signal {-code}" if code < 0 else f"status {code}"
        log.event("cprd-ended", how=how, kept=len(self.record.entries), pause=self.pause)
        messages.send_up(f"STATUS=cprd ended ({how}): starting it again")

    def late(self) -> None:
        """The deadline of the stage has passed."""
        stage = self.record.stage
        if stage == "waiting":
            self.record.child = child.start(self.command, self.record)
            self.enter("starting")
            return
        log.event("cprd-late", pid=self.record.child, stage=stage)
        if stage == "killed":
            self.gone(-signal.SIGKILL)
        else:
            first = stage in ("starting", "ready")  # a stopped process dies of SIGKILL alone
            self.enter("aborted" if first else "killed")
            self.kill(signal.SIGABRT if first else signal.SIGKILL)

    def become_newer(self) -> None:
        """Execute the parent anew, if the newer program can read the record; otherwise go on."""
        signal.pthread_sigmask(signal.SIG_BLOCK, child.HEARD)
        for number in self.signals():  # those that come from here on wait for the newer parent
            self.hear(number)
        self.reloads = False
        memfd = self.record.write()
        line, rest = sys.orig_argv[:4], [str(memfd), *self.command]
        line[0] = sys.executable
        try:
            if self.status is None and not self.ending:
                self.record.pass_on(True)
                try_out([*line, "check", *rest])
                log.event("keep-re-executing", pid=os.getpid(), kept=len(self.record.entries))
                os.execv(sys.executable, [*line, *rest])
        except OSError as error:
            log.event("keep-reload-refused", why=error)
        finally:
            os.close(memfd)
            self.record.pass_on(False)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, child.HEARD)

    def end(self) -> None:
        """Remove the sockets' files, and say what ends here."""
        record = self.record
        for path in (record.notify_path, record.path):
            try:
                found = os.lstat(path)
                if path == record.notify_path or (found.st_dev, found.st_ino) == record.inode:
                    os.unlink(path)
            except OSError:
                pass  # gone, or not ours
        kept = {"cprd_said": record.said, "descriptors": len(record.entries)}
        log.event("keep-ended", status=self.status, **kept, why="what was kept here ends here")


def try_out(line: list[str]) -> None:
    """Raises OSError unless the program ends well within 10 s."""
    pid = os.posix_spawn(line[0], line, os.environ)
    pidfd = os.pidfd_open(pid)
    poll = select.poll()  # not select(): the number may be above 1023
    poll.register(pidfd, select.POLLIN)
    if not poll.poll(10_000):
        os.kill(pid, signal.SIGKILL)
    os.close(pidfd)
    if os.waitpid(pid, 0)[1]:
        raise OSError("the newer parent cannot go on from here")


def main(arguments: list[str]) -> int:
    """Be the parent, or (with "check" first) try whether that works. Returns the exit status."""
    checks = arguments[0] == "check"
    memfd, *command = arguments[checks:]
    record = Record.read(int(memfd))
    if checks:
        return 0
    os.close(int(memfd))
    record.pass_on(False)
    parent = Parent(record, command)
    status = parent.run()
    parent.end()
    return status

"""QEMU's monitor (QMP): JSON lines over a UNIX socket, each wait with a deadline.

An answered error (MonitorRefused) means that QEMU did nothing; silence (MonitorLost) means that
nobody knows. The difference decides whether a hand-over may be taken back.
"""

from __future__ import annotations

import _socket as socket  # as in rights
import json
import os
from collections import deque
from contextlib import suppress

from cprd.errors import CprdError, InvalidInput
from cprd.linux import identity
from cprd.linux.processes import credentials, effective_uid, group
from cprd.qemu import signals
from cprd.qemu.acting import act_as
from cprd.qemu.errors import (
    ChangedUser,
    MonitorBusy,
    MonitorGone,
    MonitorLost,
    MonitorRefused,
    NoListener,
    OtherOwner,
    Refused,
)
from cprd.qemu.process import Process
from cprd.qemu.signals import Deadline

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Event = tuple[str, str, float]  # name, status, seconds since 1970 by QEMU's clock

ANSWER = 10.0  # s for a command; QEMU's main loop can be busy with a slow disk
GREETING = 5.0  # s; a monitor that has a client already never greets
QUIT = 20.0  # s until a QEMU that was told to quit is killed: it may have much memory to free
_CHUNK = 1 << 16
_LONGEST = 4 << 20  # bytes of one message; QEMU's own are some 100 KB at most
_EVENTS = 10_000  # that are remembered
_REMEMBERED = ("MIGRATION", "STOP", "RESUME", "SHUTDOWN")
_AT_ONCE = 8 << 20  # bytes that are taken in before somebody looks at the clock again


class Monitor:
    """One connection to a QEMU. Owns the socket and `process`: the listener, None where unseen."""

    def __init__(self, sock: socket.socket, where: str, process: Process | None) -> None:
        self.where = where
        self.process = process
        self.version = (0, 0, 0)
        self.package = ""  # the build, of a distribution
        self._sock = sock
        self._sock.setblocking(False)
        self._partial = bytearray()  # of a line
        self._greeting: dict[str, Any] | None = None
        self._number = 0
        self._capabilities: int | None = None
        self._answers: dict[int, dict[str, Any]] = {}
        self._waited: dict[int, str] = {}  # the commands
        self._events: deque[Event] = deque(maxlen=_EVENTS)
        self._ended = ""  # why nothing comes any more

    @classmethod
    def connect(
        cls, path: str, timeout: float = GREETING, *, changed_user: bool = False
    ) -> Monitor:
        """Speak to the monitor that listens at `path`. `changed_user`: also where that QEMU has
        changed its user since; root acts as that user from then on.

        Raises NoListener, Refused (nobody can tell whether a QEMU listens), OtherOwner (for root,
        before a word is said), ChangedUser, MonitorBusy (no greeting within `timeout` s),
        MonitorLost (no QMP)."""
        path = socket_path(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _connect(sock, path)
            _check_owner(sock, path)
            process = Process.behind(sock)
            monitor = cls(sock, path, process)
        except BaseException:
            sock.close()
            raise
        try:
            monitor.check_user(act=changed_user)
            monitor.negotiate(timeout)
            monitor.check_user(act=changed_user)  # (a QEMU changes its user before it greets)
        except BaseException:
            monitor.close()
            raise
        return monitor

    def check_user(self, *, act: bool) -> None:
        """Raises ChangedUser when the QEMU runs as another uid than the uid that listens; with
        `act` root acts as the first instead."""
        if self.process is None:
            return
        uid = effective_uid(self.process.pid)
        if uid in (-1, self.process.uid):
            return
        if act and identity.is_root() and os.geteuid() in (0, uid):
            act_as(uid)
            return
        raise ChangedUser(
            f"the QEMU at {self.where} runs as uid {uid}, and its monitor is uid"
            f" {self.process.uid}'s (-run-with user=, -runas): it cannot be handed over. Start the"
            f" VM as uid {uid} from the first (as root: cprctl qemu start {uid}/NAME -- QEMU ...),"
            " without that option, and with its monitor in a directory of that user's"
        )

    def negotiate(self, timeout: float) -> None:
        """Wait for the greeting. Raises MonitorBusy, MonitorLost."""
        deadline = Deadline(timeout)
        try:
            while self._greeting is None:
                self._await(deadline)
            qemu = self._greeting["version"]["qemu"]
            self.package = str(self._greeting["version"].get("package", ""))
            self.version = (int(qemu["major"]), int(qemu["minor"]), int(qemu["micro"]))
            request = self._capabilities or self.send("qmp_capabilities")
            while request not in self._answers:
                self._await(deadline)
            self.answer(request)
        except TimeoutError:
            raise MonitorBusy(
                f"{self.where}: no greeting within {timeout:g} s. A monitor serves one client at a"
                " time, and another one has it (or QEMU hangs): close that one, or give this"
                " command a -qmp of its own"
            ) from None
        except (MonitorLost, MonitorRefused, KeyError, TypeError, ValueError) as error:
            raise MonitorLost(
                f"{self.where}: no QMP is spoken there, or a -qmp-pretty one, which is for people:"
                f" {self._ended or error}"
            ) from None

    # Commands

    def send(self, command: str, /, **arguments: Any) -> int:
        """Send a command; returns the number of this request. Raises MonitorGone, MonitorLost."""
        # Nothing is read first: `cont` goes out while a guest stands still.
        if self._ended:
            raise MonitorGone(f"QEMU's monitor broke before {command} was sent")
        self._number += 1
        message = {"execute": command, "id": self._number}
        if arguments:
            message["arguments"] = arguments
        # (QEMU reads a byte at a time, with four system calls for each.)
        whole = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        rest = memoryview(whole)
        deadline = Deadline(ANSWER)
        try:
            while rest:
                try:
                    rest = rest[self._sock.send(rest, socket.MSG_NOSIGNAL) :]
                except BlockingIOError:
                    if not signals.writable(self._sock.fileno(), deadline.left()):
                        raise MonitorLost(f"QEMU does not read {command}") from None
        except OSError as error:
            self._ended = self._ended or str(error)
            if len(rest) == len(whole):
                raise MonitorGone(f"QEMU's monitor broke before {command} was sent") from None
            raise MonitorLost(f"QEMU's monitor broke at {command}: {error}") from None
        finally:
            if rest:  # half a command: nothing can follow
                self._ended = self._ended or f"{command} was sent in part"
        self._waited[self._number] = command
        return self._number

    def answer(self, request: int, timeout: float = ANSWER) -> Any:
        """The value that a command returns. Raises MonitorRefused, MonitorLost."""
        deadline = Deadline(timeout)
        command = self._waited.get(request, "a command")
        try:
            while not self.has_answered(request):
                self._await(deadline)
            answer = self._answers.pop(request)
        except TimeoutError:
            raise MonitorLost(f"QEMU did not answer {command} within {timeout:g} s") from None
        except MonitorLost as error:
            raise MonitorLost(f"QEMU's monitor broke at {command}: {error}") from None
        finally:
            self._waited.pop(request, None)
        if "error" in answer:
            said = answer["error"].get("desc", answer["error"])
            raise MonitorRefused(f"QEMU refuses {command}: {said}")
        return answer.get("return")

    def has_answered(self, request: int) -> bool:
        """Whether the answer has been received."""
        return request in self._answers

    def execute(self, command: str, timeout: float = ANSWER, /, **arguments: Any) -> Any:
        """Run one command; returns its value. Raises MonitorRefused, MonitorLost, MonitorGone."""
        return self.answer(self.send(command, **arguments), timeout)

    def send_all(self, questions: list[tuple[str, dict[str, Any]]]) -> list[int]:
        """Send several commands at once; before the greeting, too: a QEMU that is about to begin
        answers them as soon as QEMU can. Raises MonitorLost, MonitorGone."""
        if self._greeting is None and self._capabilities is None:
            self._capabilities = self.send("qmp_capabilities")
        return [self.send(command, **arguments) for command, arguments in questions]

    def answers(self, requests: list[int]) -> list[Any]:
        """The answers to several commands; None for each that is refused. Raises MonitorLost."""
        answers = []
        for request in requests:
            try:
                answers.append(self.answer(request))
            except MonitorRefused:
                answers.append(None)
        return answers

    def ask(self, *questions: tuple[str, dict[str, Any]]) -> list[Any]:
        """The answers to several commands that are sent at once; None for each that is refused.
        Raises MonitorLost, MonitorGone."""
        return self.answers(self.send_all(list(questions)))

    def status(self) -> str:
        """The run state: "running", "paused", "postmigrate", ..."""
        return self._word("query-status")

    def migration(self) -> str:
        """The status of the last migration; "" for none."""
        return self._word("query-migrate")

    def _word(self, question: str) -> str:
        """The "status" in an answer."""
        answer = self.execute(question)
        if not isinstance(answer, dict):
            raise MonitorLost(f"QEMU's answer to {question} has no form: {str(answer)[:80]!r}")
        return str(answer.get("status", ""))

    # Events

    def event(self, wanted: Callable[[Event], bool], timeout: float) -> Event:
        """Take the first event that is `wanted`, received or to come. Raises MonitorLost."""
        deadline = Deadline(timeout)
        while True:
            found = self.seen(wanted)
            if found is not None:
                self._events.remove(found)
                return found
            try:
                self._await(deadline)
            except TimeoutError:
                raise MonitorLost(f"QEMU sent no such event within {timeout:g} s") from None
            except MonitorLost:
                raise MonitorLost("QEMU's monitor broke while an event was awaited") from None

    def seen(self, wanted: Callable[[Event], bool]) -> Event | None:
        """The first received event that is `wanted`; the event stays. Does not wait."""
        return next((event for event in self._events if wanted(event)), None)

    def forget_events(self) -> None:
        """Only later events count."""
        self.receive()
        self._events.clear()

    def ended_at_rest(self, timeout: float = 2.0) -> bool:
        """For a QEMU that has ended: whether its guest stood still from the last STOP to the end.
        QEMU's last words are still in the socket, and are read to their end."""
        deadline = Deadline(timeout)
        with suppress(MonitorLost):
            while True:
                try:
                    self._await(deadline)
                except TimeoutError:
                    return False
        turns = [name for name, _, _ in self._events if name in ("STOP", "RESUME")]
        return turns[-1:] != ["RESUME"]

    # The socket

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def has_ended(self) -> bool:
        """Whether QEMU has hung up, and all that QEMU said has been read."""
        return bool(self._ended)

    def receive(self) -> None:
        """Take in what has arrived. Does not wait, and raises nothing."""
        taken = 0
        while not self._ended and taken < _AT_ONCE:
            try:
                data = self._sock.recv(_CHUNK)
            except BlockingIOError:
                return
            except OSError as error:
                self._ended = str(error)
                return
            if not data:
                self._ended = "QEMU hung up"
                return
            taken += len(data)
            self._partial += data
            if b"\n" in data:
                *lines, rest = self._partial.split(b"\n")
                self._partial = rest
                for line in lines:
                    self._take(line)
            elif len(self._partial) > _LONGEST:
                self._ended = "a message without an end"

    def _take(self, line: bytearray) -> None:
        if not line.strip():
            return
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            self._ended = self._ended or f"no JSON object: {bytes(line[:80])!r}"
        elif "event" in message:
            if (event := _event(message)) is not None:
                self._events.append(event)
        elif "QMP" in message:
            self._greeting = message["QMP"]
        elif message.get("id") in self._waited:
            self._answers[message["id"]] = message

    def _await(self, deadline: Deadline) -> None:
        """Wait for more from QEMU. Raises TimeoutError, MonitorLost (nothing comes any more)."""
        if self._ended:
            raise MonitorLost(self._ended)
        if not signals.readable(self._sock.fileno(), deadline.left()):
            raise TimeoutError
        self.receive()

    def close(self) -> None:
        """Hang up: QEMU serves the next client then. Closes `process` too."""
        self._sock.close()
        self._ended = self._ended or "closed"
        if self.process is not None:
            self.process.close()

    def end(self) -> None:
        """Quit a QEMU whose guest has left, and wait until QEMU has ended; kill QEMU if need be."""
        self.quit()
        self.await_end()

    def quit(self) -> None:
        """Tell a QEMU whose guest has left to quit. Waits for nothing but a QEMU unseen."""
        with suppress(CprdError):
            request = self.send("quit")
            if self.process is None:
                self.answer(request)

    def await_end(self) -> None:
        """Wait until a QEMU that was told to quit has ended; kill QEMU if need be."""
        if self.process is not None and not self.process.wait(QUIT):
            self.process.kill()
            self.process.wait(QUIT)


def _event(message: dict[str, Any]) -> Event | None:
    """What is remembered of an event: nothing but the few fields that cprctl reads."""
    name, data, at = (message.get(key) for key in ("event", "data", "timestamp"))
    if name not in _REMEMBERED:
        return None
    status = data.get("status") if isinstance(data, dict) else ""
    time = 0.0
    if isinstance(at, dict) and all(isinstance(part, int) for part in at.values()):
        time = at.get("seconds", 0) + at.get("microseconds", 0) / 1e6
    return name, status if isinstance(status, str) else "", time


def _connect(sock: socket.socket, path: str) -> None:
    sock.setblocking(False)
    try:
        sock.connect(path)
    except BlockingIOError:
        raise MonitorBusy(
            f"{path}: its queue of clients is full: somebody else uses this monitor; give"
            " this command a -qmp of its own"
        ) from None
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise NoListener(
            f"{path}: {error.strerror}: no QEMU listens there; --qmp wants the path of a"
            " running QEMU's -qmp unix:PATH,server=on,wait=off"
        ) from None
    except OSError as error:  # no permission, no socket, too long for an address, ...
        raise Refused(
            f"{path}: {error.strerror or error} (uid {os.geteuid()}): whether a QEMU listens there"
            " cannot be told; --qmp wants the path of a running QEMU's"
            " -qmp unix:PATH,server=on,wait=off"
        ) from None


def _check_owner(sock: socket.socket, path: str) -> None:
    """Root acts as the uid of the QEMU, or not at all; in the group of the QEMU, without which the
    kernel shows nothing of that process."""
    if not identity.is_root():
        return
    uid, _ = credentials(sock)
    acting = os.geteuid()
    if uid != acting:
        raise OtherOwner(f"the QEMU at {path} is of uid {uid}, not of uid {acting}", uid)
    if acting:
        identity.act_as(acting, group(sock))


def socket_path(text: str) -> str:
    """The path in a --qmp argument: PATH or unix:PATH[,options]. Raises InvalidInput."""
    path = text.removeprefix("unix:")
    if path != text:
        path = path.partition(",")[0]
    if not path:
        raise InvalidInput(f"--qmp {text!r}: wants the path of a UNIX socket")
    return path


def machine_type(monitor: Monitor) -> str:
    """The machine type, as in the head of a main stream ("pc-q35-10.0"); "" where QEMU does not
    say."""
    with suppress(MonitorRefused):
        kind = monitor.execute("qom-get", path="/machine", property="type")
        return str(kind).removesuffix("-machine")
    return ""


def migration_is(*statuses: str) -> Callable[[Event], bool]:
    """For `event`: the migration came to one of these statuses."""
    return lambda event: event[0] == "MIGRATION" and event[1] in statuses


def event_is(*names: str) -> Callable[[Event], bool]:
    """For `event`: an event of one of these names."""
    return lambda event: event[0] in names

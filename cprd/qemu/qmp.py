"""QEMU's monitor, through qemu.qmp: each wait bounded, each failure saying which kind it is.

An answered error (MonitorRefused) means that nothing was done; silence (MonitorLost) means that
nobody knows. Which of the two it was decides whether a hand-over may be taken back.
"""

from __future__ import annotations

import asyncio
import json
import select
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cprd.errors import InvalidInput
from cprd.qemu.failure import (
    MonitorBusy,
    MonitorGone,
    MonitorLost,
    MonitorRefused,
    MonitorSpokeFirst,
    Nobody,
    Refused,
)
from cprd.qemu.process import Process

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Event = dict[str, Any]

ANSWER = 10.0  # s for a command; QEMU's main loop can be busy with a slow disk
_LOST = "CPRD_LOST"  # among the events: the connection has ended
GREETING = 5.0  # s; a monitor that has a client already never greets


class Monitor:
    """One connection to a QEMU. `process` (owned) is who listens there, None where unseen."""

    def __init__(
        self, client: Any, where: str, process: Process | None, sock: socket.socket
    ) -> None:
        self._client = client
        self._sock = sock  # the client's
        self._seen: list[Event] = []
        self.where = where
        self.process = process
        self._watching = asyncio.ensure_future(self._watch())

    @classmethod
    async def connect(cls, path: str, timeout: float = GREETING) -> Monitor:
        """Speak to the monitor that listens at `path`.

        Raises Nobody (nobody listens), Refused (it cannot be told), MonitorBusy (no greeting in
        `timeout` s)."""
        for _ in range(3):
            with suppress(MonitorSpokeFirst):
                return await cls._connect(path, timeout)
        return await cls._connect(path, timeout)

    @classmethod
    async def _connect(cls, path: str, timeout: float) -> Monitor:
        path = socket_path(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            try:
                sock.connect(path)
            except BlockingIOError:
                raise MonitorBusy(
                    f"{path}: its queue of clients is full: somebody else uses this monitor; give"
                    " this command a -qmp of its own"
                ) from None
            except (FileNotFoundError, ConnectionRefusedError) as error:
                raise Nobody(
                    f"{path}: {error.strerror}: no QEMU listens there; --qmp wants the path of a"
                    " running QEMU's -qmp unix:PATH,server=on,wait=off"
                ) from None
            except OSError as error:  # no permission, no socket, too long for an address, ...
                raise Refused(
                    f"{path}: {error.strerror or error}: whether a QEMU listens there cannot be"
                    " told; --qmp wants the path of a running QEMU's"
                    " -qmp unix:PATH,server=on,wait=off"
                ) from None
            process = Process.behind(sock)
        except BaseException:
            sock.close()
            raise
        try:
            return await cls.over(sock, path, timeout, process)
        except BaseException:
            if process is not None:
                process.close()
            raise

    @classmethod
    async def over(
        cls,
        sock: socket.socket,
        where: str,
        timeout: float = GREETING,
        process: Process | None = None,
    ) -> Monitor:
        """Greet and negotiate over a connected socket, which becomes the monitor's in any case."""
        from qemu.qmp import QMPClient, QMPError
        from qemu.qmp.qmp_client import NegotiationError

        client = QMPClient(where)
        sock.setblocking(False)
        try:
            await asyncio.wait_for(client.connect(sock), timeout)
        except TimeoutError:
            sock.close()
            raise MonitorBusy(
                f"{where}: no greeting within {timeout:g} s. A monitor serves one client at a time,"
                " and another one has it (or QEMU hangs): close that one, or give this command a"
                " -qmp of its own"
            ) from None
        except (QMPError, OSError, EOFError) as error:
            sock.close()
            early = isinstance(getattr(error, "exc", None), NegotiationError)
            raise (MonitorSpokeFirst if early else MonitorLost)(
                f"{where}: no QMP is spoken there, or a -qmp-pretty one, which is for people:"
                f" {_words(error)}"
            ) from None
        return cls(client, where, process, sock)

    @property
    def version(self) -> tuple[int, int, int]:
        qemu = self._client.greeting.QMP.version["qemu"]
        return (int(qemu["major"]), int(qemu["minor"]), int(qemu["micro"]))

    async def execute(self, command: str, timeout: float = ANSWER, /, **arguments: Any) -> Any:
        """Run one command; what it returns. Raises MonitorRefused or MonitorLost."""
        from qemu.qmp import ExecuteError, QMPError, StateError

        try:
            async with asyncio.timeout(timeout):
                return await self._client.execute(command, arguments or None)
        except ExecuteError as error:
            raise MonitorRefused(f"QEMU refuses {command}: {error}") from None
        except StateError:
            raise MonitorGone(f"QEMU's monitor broke before {command} was sent") from None
        except TimeoutError:
            raise MonitorLost(f"QEMU did not answer {command} within {timeout:g} s") from None
        except (QMPError, OSError, EOFError) as error:
            raise MonitorLost(f"QEMU's monitor broke at {command}: {_words(error)}") from None

    async def execute_at_once(self, command: str) -> Any:
        """As execute(), without arguments, for when a guest stands still: written here and now, not
        when the client's writing task has its turn. What it takes for that is not part of
        qemu.qmp's interface; without it this is execute()."""
        client = self._client
        parts = ("_get_exec_id", "_pending", "_reply", "_writer")
        if not self._running() or not all(hasattr(client, part) for part in parts):
            return await self.execute(command)
        message = client.make_execute_msg(command)
        number = message["id"] = client._get_exec_id()
        client._pending[number] = asyncio.Queue(maxsize=1)
        client._writer.write(bytes(message))
        return await self._answered(command, client._reply(number))

    async def _answered(self, command: str, reply: Awaitable[Any]) -> Any:
        from qemu.qmp import QMPError

        try:
            async with asyncio.timeout(ANSWER):
                answer = await reply
        except TimeoutError:
            raise MonitorLost(f"QEMU did not answer {command} within {ANSWER:g} s") from None
        except (QMPError, OSError, EOFError) as error:
            raise MonitorLost(f"QEMU's monitor broke at {command}: {_words(error)}") from None
        if "error" in answer:
            raise MonitorRefused(f"QEMU refuses {command}: {answer['error'].get('desc')}")
        if "return" not in answer:
            raise MonitorLost(f"QEMU answered {command} with what is no answer")
        return answer["return"]

    async def catch_up(self) -> None:
        """Read what has come so far, so that next_event() sees what comes next."""
        if self._sock.fileno() < 0:  # it has ended, and that has been seen
            return
        poll = select.poll()
        poll.register(self._sock.fileno(), select.POLLIN)
        for _ in range(100):
            more = poll.poll(0)
            await asyncio.sleep(0)
            if not more:
                break

    async def event(self, wanted: Callable[[Event], bool], timeout: float) -> Event:
        """The next event that is `wanted`, also of those that came before. Raises MonitorLost."""
        self.gather_events()
        for at, event in enumerate(self._seen):
            if wanted(event):
                return self._seen.pop(at)
        try:
            async with asyncio.timeout(timeout):
                while self._running():
                    event = dict(await self._client.events.get())
                    if wanted(event):
                        return event
                    if event["event"] != _LOST:
                        self._seen.append(event)
        except TimeoutError:
            raise MonitorLost(f"QEMU sent no such event within {timeout:g} s") from None
        raise MonitorLost("QEMU's monitor broke while an event was awaited")

    def next_event(self, wanted: Callable[[Event], bool], seconds: float) -> Event | None:
        """What comes next, if it is `wanted` and comes within so many seconds, which are waited in
        poll itself: for what is expected while a guest stands still. It is only looked at, and will
        be read as an event as well. None: see event()."""
        poll = select.poll()
        try:
            poll.register(self._sock.fileno(), select.POLLIN)
            if not poll.poll(seconds * 1000):
                return None
            came = self._sock.recv(4096, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            for line in came.split(b"\n")[:-1]:
                event = json.loads(line)
                if "event" in event and wanted(event):
                    return dict(event)
        except (OSError, ValueError, TypeError):
            pass
        return None

    async def _watch(self) -> None:
        """Whoever waits for an event is woken when the connection ends."""
        from qemu.qmp import Message

        await self._client.runstate_changed()
        await self._client.events.put(Message({"event": _LOST}))

    def gather_events(self) -> None:
        """Move what has arrived to those seen: at once, where one wait for each would cost more."""
        self._seen += [dict(event) for event in self._client.events.clear()]

    def forget_events(self) -> None:
        """Only what comes from now on counts."""
        self._seen.clear()
        self._client.events.clear()

    async def rested(self, timeout: float = 2.0) -> bool:
        """Of a QEMU that has ended: whether its guest has stood still from the last STOP to its
        end. (What it said last is still in the socket when it has ended, and is read to its end.)
        Nothing may have been sent to it meanwhile: that breaks off the reading."""
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout
        while self._running():
            if loop.time() > until:
                return False
            await asyncio.sleep(0.005)
        self.gather_events()
        turns = [event["event"] for event in self._seen if event["event"] in ("STOP", "RESUME")]
        return turns[-1:] != ["RESUME"]

    def has_seen(self, name: str) -> bool:
        """Whether such an event has come, and nobody has taken it yet."""
        self.gather_events()
        return any(event["event"] == name for event in self._seen)

    def _running(self) -> bool:
        from qemu.qmp import Runstate

        return bool(self._client.runstate == Runstate.RUNNING)

    async def status(self) -> str:
        """The run state: "running", "paused", "postmigrate", ..."""
        return str((await self.execute("query-status"))["status"])

    async def migration(self) -> str:
        """The status of the last migration, "" when there was none."""
        return str((await self.execute("query-migrate")).get("status", ""))

    async def close(self) -> None:
        """Hang up; QEMU serves the next client then. `process` is closed too."""
        with suppress(Exception):
            await asyncio.wait_for(self._client.disconnect(), 1.0)
        self._watching.cancel()
        if self.process is not None:
            self.process.close()


def socket_path(text: str) -> str:
    """The path in what people write as --qmp: PATH or unix:PATH[,options]. Raises InvalidInput."""
    path = text.removeprefix("unix:")
    if path != text:
        path = path.partition(",")[0]
    if not path:
        raise InvalidInput(f"--qmp {text!r}: wants the path of a UNIX socket")
    return path


async def machine_type(monitor: Monitor) -> str:
    """As the head of a main stream has it ("pc-q35-10.0"); "" where QEMU does not say."""
    with suppress(MonitorRefused):
        kind = await monitor.execute("qom-get", path="/machine", property="type")
        return str(kind).removesuffix("-machine")
    return ""


def migration_is(*statuses: str) -> Callable[[Event], bool]:
    """For `event`: the migration came to one of these statuses."""

    def wanted(event: Event) -> bool:
        return event["event"] == "MIGRATION" and event["data"]["status"] in statuses

    return wanted


def event_is(*names: str) -> Callable[[Event], bool]:
    return lambda event: event["event"] in names


def stamp(event: Event) -> float:
    """When QEMU says it happened, in seconds since 1970."""
    at = event["timestamp"]
    return float(at["seconds"] + at["microseconds"] / 1e6)


def _words(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__

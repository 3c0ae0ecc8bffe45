"""The connection is lost in the place of each answer, one after the other: the client in C asks
again, on another connection, with the same nonce, and everything is done once."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cprd
from cprd.linux.rights import close_all, receive, send
from tests.c.building import Programs
from tests.c.conftest import Build
from tests.daemon.test_sweep import stops
from tests.support.daemon import DaemonProcess
from tests.support.patience import PATIENCE, until

pytestmark = [pytest.mark.usefixtures("nothing_leaks"), pytest.mark.xdist_group("c")]

NAME = "web"


class Between:
    """Passes messages and descriptors between a client and cprd; the answer number `lost` (from 1,
    of all connections) is not passed on, and the connection ends there."""

    def __init__(self, place: Path, daemon: str) -> None:
        self.path = str(place / "between")
        self.answers = 0
        self.lost = 0
        self._daemon = daemon
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(self.path)
        self._listener.listen()
        self._ends = False
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def lose(self, number: int) -> None:
        self.answers, self.lost = 0, number

    def _serve(self) -> None:
        threads = []
        while not self._ends:
            client, _ = self._listener.accept()
            threads.append(threading.Thread(target=self._pass, args=(client,)))
            threads[-1].start()
        for thread in threads:
            thread.join(PATIENCE)

    def _pass(self, client: socket.socket) -> None:
        server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with client, server:
            if self._ends:
                return
            server.connect(self._daemon)
            while data := client.recv(1 << 17):
                self.heard(data)
                server.send(data)
                data, fds, _ = receive(server, 1 << 17)
                try:
                    self.answers += 1
                    if self.answers == self.lost or not data:
                        return
                    send(client, self.said(client, data), fds)
                finally:
                    close_all(fds)

    def heard(self, data: bytes) -> None:
        """A request passes."""

    def said(self, client: socket.socket, data: bytes) -> bytes:
        """An answer passes; as the client gets it."""
        return data

    def close(self) -> None:
        self._ends = True
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as last:
            last.connect(self.path)
        self._thread.join(PATIENCE)
        self._listener.close()


@pytest.fixture
def between(tmp_path: Path, daemon: DaemonProcess) -> Iterator[Between]:
    made = Between(tmp_path, daemon.path)
    yield made
    made.close()


def held(connection: cprd.Daemon) -> list[tuple[str, int]]:
    return [(row["phase"], row["fds"]) for row in connection.list()]


def await_held(connection: cprd.Daemon, wanted: list[tuple[str, int]]) -> None:
    until(lambda: held(connection) == wanted, lambda: f"{held(connection)}")


Left = list[tuple[str, int]]
ACTS: dict[str, tuple[list[str], int | None, Left]] = {
    "save": (["save", NAME], None, [("held", 1)]),
    "prepare": (["save", NAME, "--prepare"], None, [("held", 1)]),
    "abort": (["save", NAME, "--abort"], None, []),
    "replace": (["save", NAME, "--replace"], 2, [("held", 1)]),
    "confirm": (["load", NAME], 2, []),
    "begin": (["load", NAME, "--begin"], 2, []),
    "reject": (["load", NAME, "--begin", "--reject=no"], 2, [("held", 2)]),
    "next": (["load", NAME, "--next"], 2, [("held", 1)]),
    "drop": (["drop", NAME], 2, []),
}


ENDED: dict[str, tuple[int, Left]] = {
    "prepare": (3, [("in-doubt", 1)]),
    "abort": (3, [("in-doubt", 1)]),
    "next": (3, [("held", 2)]),
}
"""The end of a connection ends its claims and prepared saves: where an answer is lost meanwhile the
client is told, and this is left. By act: the number of the answer."""


def test_each_answer_is_lost_once_and_everything_is_done_once(
    daemon: DaemonProcess, between: Between, built: Build
) -> None:
    programs = built("sanitized")
    reading, writing = os.pipe()
    with daemon.connect() as connection:
        for act in ACTS:
            lose_each_answer(connection, between, programs, act, (reading, writing))
    close_all([reading, writing])


def lose_each_answer(
    connection: cprd.Daemon, between: Between, programs: Programs, act: str, ends: tuple[int, int]
) -> None:
    words, before, after = ACTS[act]
    number, answers = 0, 1
    while number < answers:
        if before:
            state = cprd.State()
            for id in range(before):
                state.save_fd("old", id, ends[0])
            connection.save(NAME, state)
        between.lose(number)
        lost, left = ENDED.get(act, (-1, after))
        spec = f"fd new 0 {ends[1]}\n"
        done = programs.start(between.path, *words, stdin=spec, fds=(ends[1],))
        assert done.returncode == (number == lost), (act, number, done.stderr)
        assert ("Fenced: " in done.stderr) == (number == lost)
        await_held(connection, left if number == lost else after)
        answers = between.answers + 1 if not number else answers
        number += 1
        if held(connection):
            connection.drop(NAME, force=True)
    assert answers >= 3  # of hello and a request, and one more than there are


def test_a_live_hold_is_begun_confirmed_and_ended_once(
    daemon: DaemonProcess, between: Between, built: Build
) -> None:
    programs = built("sanitized")
    reading, writing = os.pipe()
    changes = f"save new 0 {writing}\ndelete old 0\nend\n"
    with daemon.connect() as connection:
        state = cprd.State()
        state.save_fd("old", 0, reading)
        fenced = []
        for number in range(9):
            connection.save(NAME, state)
            between.lose(number)
            done = programs.start(between.path, "live", NAME, stdin=changes, fds=(writing,))
            if done.returncode:
                assert "Fenced: the claim on 'web' is over" in done.stderr
                assert "Sanitizer" not in done.stderr
                fenced.append(number)
                await_held(connection, [("held", 1)])
                connection.drop(NAME)
            else:
                assert done.stdout.splitlines()[1:] == ["taken", "ok", "ok", "ok", "ok"]
                await_held(connection, [])
        # hello, a queue, live (claimed), and another queue: then the claim has ended with it.
        assert fenced == [4]
    close_all([reading, writing])


def test_a_killed_cprd_is_waited_for_and_asked_again(
    start_daemon: Callable[..., DaemonProcess], built: Build
) -> None:
    """In memory mode the next cprd knows nothing, so that the same request is done for the first
    time there."""
    daemon = start_daemon(env={"CPRD_PAUSE": "daemon:saved"})
    said: list[str] = []
    client = threading.Thread(
        target=lambda: said.append(built("sanitized").run(daemon.path, "save", NAME))
    )
    client.start()
    stops(daemon.pid)
    del daemon.env["CPRD_PAUSE"]
    daemon.restart()
    client.join(PATIENCE)
    with daemon.connect() as connection:
        assert held(connection) == [("held", 0)]
        assert str(connection.list()[0]["generation"]) in said[0]


@pytest.mark.parametrize("verb", ["load", "live"])
def test_a_claim_that_ends_by_force_while_it_is_read_is_fenced_and_no_damage(
    daemon: DaemonProcess, built: Build, verb: str
) -> None:
    """cprd empties the bundle of a hold that is dropped."""
    reading, writing = os.pipe()
    with daemon.connect() as connection:
        state = cprd.State()
        state.save_fd("old", 0, reading)
        connection.save(NAME, state)
        client = subprocess.Popen(
            [built("pause").command, verb, NAME],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "CPRD_SOCKET": daemon.path, "CPRD_PAUSE": f"{verb}:answered"},
        )
        stops(client.pid)
        connection.drop(NAME, force=True)
        close_all([reading])
        ended = select.poll()
        ended.register(writing, 0)
        assert ended.poll(PATIENCE * 1000)  # nobody has the reading end: the bundle is empty
        os.kill(client.pid, signal.SIGCONT)
        _, said = client.communicate(timeout=PATIENCE)
    close_all([writing])
    assert client.returncode == 1
    assert said.startswith("cprd-c: Fenced: ")

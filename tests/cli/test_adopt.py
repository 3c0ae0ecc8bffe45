"""`cprctl save --pid`: a service that runs is put under cprd, and nobody notices."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import cprd
from benchmarks.listeners import PROGRAMS, Count, Service, is_there, stream
from cprd.cli.adopting import Process
from tests.support.cprctl import cprctl
from tests.support.daemon import DaemonProcess

pytestmark = pytest.mark.usefixtures("nothing_leaks")


async def adopt(name: str, daemon: DaemonProcess, place: Path, seconds: float) -> Count:
    """Clients of a program that is started without cprd, saved while it runs, and then restarted
    with it."""
    plain = Service(name, place, None)
    held = Service(name, place, daemon.path, port=plain.port)
    plain.start()
    try:
        await plain.until_it_answers()
        load = asyncio.create_task(stream(plain, seconds, 200))
        await asyncio.sleep(seconds * 0.2)  # of the load's time: any moment of it will do
        assert plain.process is not None
        pid = str(plain.process.pid)
        done = await asyncio.to_thread(cprctl, daemon, "save", name, "--pid", pid, "--listeners")
        assert done.returncode == 0, done.stderr
        early = await asyncio.to_thread(cprctl, daemon, "run", name, "--", "true")
        assert early.returncode == 4, early.stderr
        assert f"pid {pid}" in early.stderr
        await asyncio.sleep(seconds * 0.2)  # so it is here
        await plain.end(signal.SIGTERM)
        held.start()
        return await load
    finally:
        await plain.end(signal.SIGKILL)
        if held.process is not None:
            await held.end(signal.SIGKILL)
        plain.log.close()
        held.log.close()


@pytest.mark.parametrize("name", ["redis", pytest.param("nginx", marks=pytest.mark.full)])
def test_a_service_that_runs_is_put_under_cprd_without_an_outage(
    daemon: DaemonProcess, tmp_path: Path, name: str
) -> None:
    if not is_there(PROGRAMS[name]):
        pytest.skip(f"needs {PROGRAMS[name].file}: apt-get install {PROGRAMS[name].package}")
    count = asyncio.run(adopt(name, daemon, tmp_path, 3.0))
    assert count.refused == 0, count
    assert count.reset <= count.asked // 50, count


SLEEP = """
import signal, socket, sys
kept = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
twice = kept[0].dup()
udp = socket.socket(type=socket.SOCK_DGRAM); udp.bind(("127.0.0.1", 0))
client = socket.create_connection(kept[0].getsockname())
served = kept[0].accept()[0]
print(udp.fileno(), *(sock.getsockname()[1] for sock in kept), flush=True)
signal.pause()
"""


def test_listeners_are_taken_once_each_and_the_rest_by_number(daemon: DaemonProcess) -> None:
    with subprocess.Popen(
        [sys.executable, "-S", "-c", SLEEP], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            udp, *ports = process.stdout.readline().split()
            pid = str(process.pid)
            done = cprctl(daemon, "save", "web", "--pid", pid, "--listeners", "--fd", f"dns={udp}")
            assert done.returncode == 0, done.stderr
            assert re.search(rf"bound, and no listeners.*{udp} \(udp 127", done.stderr)
            with daemon.connect() as connection:
                assert connection.show("web")["fds"] == 3
                with pytest.raises(cprd.Busy, match=pid):
                    connection.load("web")
            wrong = cprctl(daemon, "save", "other", "--pid", pid, "--fd", "a=999")
            assert (wrong.returncode, "999 is not open" in wrong.stderr) == (2, True)
        finally:
            process.kill()
    with daemon.connect() as connection, connection.load("web", wait=10) as claim:
        keys = [(name, id) for name, id, _ in claim.state.fds()]
        assert keys == [("listener", 0), ("listener", 1), ("dns", 0)]
        found = [socket.socket(fileno=os.dup(fd)) for _, _, fd in claim.state.fds("listener")]
        assert [str(sock.getsockname()[1]) for sock in found] == ports
        for sock in found:
            sock.close()


def test_what_cannot_be_taken_is_said(daemon: DaemonProcess) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    for words, status, why in (
        (["--pid", str(ended.pid), "--listeners"], 1, "no such process"),
        (["--pid", str(os.getpid()), "--listeners"], 1, "no listening socket"),
        (["--listeners"], 2, "of which process"),
        (["--pid", "0", "--listeners"], 2, "process id"),
    ):
        done = cprctl(daemon, "save", "web", *words)
        assert done.returncode == status, done.stderr
        assert why in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
def test_another_users_process_is_denied() -> None:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgid(65534)
            os.setuid(65534)
            Process(os.getppid()).listeners()
        except cprd.CprdError as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read) as answer:
        assert re.match("Denied: .*by who may trace it", answer.read())

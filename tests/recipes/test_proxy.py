"""The proxy of the page in front of Debian's redis and PostgreSQL: killed in mid transaction, and
at random moments, no byte is lost or comes twice."""

from __future__ import annotations

import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.recipes.recipe import Lines, Recipe, free_port, left_in
from tests.support.daemon import DaemonProcess
from tests.support.patience import PATIENCE, rest, until

pytestmark = pytest.mark.usefixtures("nothing_leaks")


@contextmanager
def running(command: list[str], port: int, user: str | None = None) -> Iterator[None]:
    """A server that listens on `port`, ended with the block."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, user=user, cwd="/")

    def listens() -> bool:
        assert process.poll() is None, f"{command} ended by itself"
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        until(listens, lambda: f"{command} does not listen")
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE)


@contextmanager
def redis() -> Iterator[int]:
    if shutil.which("redis-server") is None:
        pytest.skip("needs redis-server: apt-get install redis-server")
    port = free_port()
    options = ["--port", str(port), "--save", "", "--bind", "127.0.0.1"]
    with running(["redis-server", *options], port):
        yield port


def find(name: str) -> str:
    """A program of PostgreSQL's server, which Debian keeps out of $PATH."""
    places = [*Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), shutil.which(name) or ""]
    if not str(places[0]) or not shutil.which("psql"):
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    return str(places[0])


@contextmanager
def postgres(place: Path) -> Iterator[int]:
    port, data = free_port(), place / "data"
    user = None if os.getuid() else "nobody"  # root is refused
    data.mkdir()
    if user:
        os.chown(data, pwd.getpwnam(user).pw_uid, -1)
        for folder in (place, *place.parents[:2]):
            folder.chmod(folder.stat().st_mode | 0o755)
    made = subprocess.run(
        [find("initdb"), "-D", str(data), "-A", "trust", "-N", "-U", "tester"],
        capture_output=True,
        check=False,
        cwd="/",
        user=user,
    )
    assert made.returncode == 0, made.stderr
    options = ["-p", str(port), "-c", "listen_addresses=127.0.0.1", "-k", str(data), "-F"]
    with running([find("postgres"), "-D", str(data), *options], port, user):
        yield port


@pytest.mark.full
def test_a_transaction_of_redis_goes_on_after_the_kill_of_the_proxy(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    with redis() as port, Recipe("proxy.py", daemon, tmp_path, str(port)) as proxy:
        with Lines(proxy.connect()) as client, Lines(proxy.connect()) as other:
            for each in (client, other):
                each.send(b"PING\r\n")
                assert each.line() == b"+PONG\r\n"
            for number in range(1, 6):
                client.send(b"MULTI\r\n")
                assert client.line() == b"+OK\r\n"
                client.send(b"INCR a\r\nINC")
                assert client.line() == b"+QUEUED\r\n"
                proxy.kill(signal.SIGTERM if number == 3 else signal.SIGKILL)
                client.send(b"R b\r\nEXEC\r\n")
                proxy.start()
                said = [client.line() for _ in range(4)]
                assert said == [b"+QUEUED\r\n", b"*2\r\n", b":%d\r\n" % number, b":%d\r\n" % number]
            other.send(b"GET a\r\n")
            assert other.line() + other.line() == b"$1\r\n5\r\n"
            other.sock.shutdown(socket.SHUT_WR)
            assert other.sock.recv(1) == b""
            client.sock.shutdown(socket.SHUT_WR)
            assert client.sock.recv(1) == b""
        until(lambda: proxy.tasks() <= 2, lambda: f"{proxy.tasks()} threads")
        proxy.kill()
    assert left_in(daemon, "proxy") == ([("listener", 0)], [])


@pytest.mark.full
def test_no_byte_is_lost_and_none_comes_twice_at_kills_at_random(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    """A client writes as fast as the proxy takes, and counts the answers."""
    count, kills = 200_000, 30
    with redis() as port, Recipe("proxy.py", daemon, tmp_path, str(port)) as proxy:
        with Lines(proxy.connect()) as client:

            def say() -> None:
                for begin in range(0, count, 100):
                    client.send(b"INCR n\r\n" * 100)
                    if begin % 10_000 == 0:
                        gate.acquire()

            gate = threading.Semaphore(2)
            writer = threading.Thread(target=say)
            writer.start()
            chosen = random.Random(7)
            over = threading.Event()

            def kill() -> None:
                done = 0
                while not over.is_set():
                    rest(chosen.uniform(0.0, 0.05))  # any moment
                    if done < kills:
                        proxy.again()
                        done += 1
                killed.append(done)

            killed: list[int] = []
            killer = threading.Thread(target=kill)
            killer.start()
            try:
                for number in range(1, count + 1):
                    assert client.line() == b":%d\r\n" % number
                    if number % 10_000 == 0:
                        gate.release()
            finally:
                over.set()
                killer.join()
                gate.release(100)
                writer.join()
        assert killed[0] >= 10
        proxy.kill()
    with daemon.connect() as connection:
        connection.drop("proxy")


@pytest.mark.full
def test_a_transaction_of_postgresql_goes_on_after_the_kill_of_the_proxy(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    find("initdb")
    with postgres(tmp_path) as port, Recipe("proxy.py", daemon, tmp_path, str(port)) as proxy:
        proxy.connect().close()
        address = f"postgresql://tester@127.0.0.1:{proxy.port}/postgres"
        psql = subprocess.Popen(
            ["psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert psql.stdin is not None
        assert psql.stdout is not None
        with psql:
            psql.stdin.write("CREATE TEMP TABLE t (n int); SELECT 'begun';\n")
            assert psql.stdout.readline() == "begun\n"
            for number in range(1, 4):
                psql.stdin.write(f"BEGIN; INSERT INTO t VALUES ({number}); SELECT 'in';\n")
                assert psql.stdout.readline() == "in\n"
                proxy.kill()
                psql.stdin.write("SELECT txid_current() IS NOT NULL; COMMIT;\n")
                proxy.start()
                assert psql.stdout.readline() == "t\n"
                psql.stdin.write("SELECT count(*), sum(n) FROM t;\n")
                assert psql.stdout.readline() == f"{number}|{number * (number + 1) // 2}\n"
            psql.stdin.write("\\q\n")
            assert psql.wait(PATIENCE) == 0
        proxy.kill()
    with daemon.connect() as connection:
        connection.drop("proxy")

"""The proxy of the page in front of Debian's redis and PostgreSQL: killed in mid transaction, and
at random moments, no byte is lost or comes twice."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from tests.recipes.recipe import Lines, Recipe, left_in
from tests.recipes.servers import find, postgres, redis
from tests.support.daemon import DaemonProcess
from tests.support.patience import PATIENCE, rest, until

pytestmark = pytest.mark.usefixtures("nothing_leaks")


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
    count, kills = 2_000_000, 18  # the twentieth in a row would be quarantined
    heard = 0
    chosen = random.Random(7)
    over = threading.Event()
    gate = threading.Semaphore(2)
    killed: list[int] = []

    def say() -> None:
        for begin in range(0, count, 100):
            if over.is_set():
                return
            client.send(b"INCR n\r\n" * 100)
            if begin % 10_000 == 0:
                gate.acquire()

    def kill() -> None:
        for _ in range(kills):
            before = heard
            until(lambda: heard > before + 100, lambda: "no answers", PATIENCE)  # noqa: B023
            rest(chosen.uniform(0.0, 0.005))  # any moment
            proxy.again()
            killed.append(heard)
        over.set()

    with redis() as port, Recipe("proxy.py", daemon, tmp_path, str(port)) as proxy:
        with Lines(proxy.connect()) as client:
            threads = [threading.Thread(target=say), threading.Thread(target=kill)]
            for thread in threads:
                thread.start()
            try:
                while not over.is_set():
                    assert client.line() == b":%d\r\n" % (heard + 1)
                    heard += 1
                    if heard % 10_000 == 0:
                        gate.release()
            finally:
                over.set()
                gate.release(1000)
                for thread in threads:
                    thread.join()
        assert len(set(killed)) == kills
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

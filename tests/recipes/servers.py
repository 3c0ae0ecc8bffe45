"""Debian's redis and PostgreSQL, for the recipes in front of these."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.cprctl import free_port
from tests.support.patience import PATIENCE, until


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

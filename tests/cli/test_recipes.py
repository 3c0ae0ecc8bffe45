"""The recipes of docs/run.md, as they stand there but for the ports: each program is killed, a
client comes while nobody runs, and the next start serves the client."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.listeners import search_path
from tests.support.checkout import CHECKOUT
from tests.support.daemon import DaemonProcess
from tests.support.patience import PATIENCE, until

pytestmark = [pytest.mark.full]

PAGE = (CHECKOUT / "docs/run.md").read_text().split("## Recipes")[1].split("\n## ")[0]
RECIPES = dict(re.findall(r"^\| ([^|]+?) \| `(.+)` \|$", PAGE, re.MULTILINE))

HTTP = (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", b"HTTP/1.1 200")
ASKS = {
    "redis": (b"PING\r\n", b"+PONG"),
    "pgbouncer": (b"\0\0\0\x08\x04\xd2\x16\x2f", b"N"),  # SSLRequest
}
NEEDS = {
    "gunicorn": "pip install gunicorn",
    "uvicorn": "pip install uvicorn",
    "node": "apt-get install nodejs",
    "nginx": "apt-get install nginx",
    "redis-server": "apt-get install redis-server",
    "haproxy": "apt-get install haproxy",
    "pgbouncer": "apt-get install pgbouncer",
    "runsv": "apt-get install runit",
    "supervisord": "apt-get install supervisor",
}
APP = """
class app:
    def __init__(self, scope, start=None):
        self.start = start
        if start is not None: start("200 OK", [("Content-Length", "2")])
    def __iter__(self):
        yield b"ok"
    async def __call__(self, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})
"""
FILES = {
    "app.py": APP,
    "server.js": 'require("http").createServer((q, r) => r.end("ok")).listen(PORT)',
    "nginx.conf": "pid PLACE/pid; error_log PLACE/error; events {} http { access_log off;"
    ' server { listen PORT; location / { return 200 "ok"; } } }',
    "haproxy.cfg": "defaults\n mode http\n timeout client 9s\n timeout server 9s\n timeout connect"
    " 9s\nfrontend web\n bind :PORT\n http-request return status 200\n",
    "pgbouncer.ini": "[databases]\nx = host=127.0.0.1\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
    "listen_port = PORT\nunix_socket_dir =\nauth_type = any\nuser = nobody\n",
    "service/run": "#!/bin/sh\ncd PLACE\nLINE\n",
    "supervisord.conf": "[supervisord]\nnodaemon = true\nlogfile = PLACE/supervisord.log\n"
    "pidfile = PLACE/supervisord.pid\n[program:web]\nLINE\ndirectory = PLACE\nautorestart = true\n"
    "stopasgroup = true\nkillasgroup = true\n",
}


def needs(*programs: str) -> None:
    for program in programs:
        if shutil.which(program, path=path()) is None:
            pytest.skip(f"needs {program}: {NEEDS[program]}")


def path() -> str:
    return f"{Path(sys.executable).parent}:{search_path()}"


def prepare(place: Path, name: str) -> tuple[str, int]:
    """The recipe and its port, with the files that it wants in `place`."""
    with socket.create_server(("", 0)) as free:
        port = int(free.getsockname()[1])
    line = re.sub(r"\b(8000|6379|6432)\b", str(port), RECIPES[name])
    line = line.replace("cprctl", f"{sys.executable} -m cprd.cli", 1)
    line += f" --port {port}" if name == "redis" else ""
    (place / "service").mkdir()
    for file, text in FILES.items():
        filled = text.replace("PORT", str(port)).replace("PLACE", str(place))
        (place / file).write_text(filled.replace("LINE", line))
    (place / "service/run").chmod(0o755)
    return line, port


@contextlib.contextmanager
def started(line: str, place: Path, daemon: DaemonProcess) -> Iterator[subprocess.Popen[bytes]]:
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT), "CPRD_SOCKET": daemon.path, "PATH": path()}
    env = {key: value for key, value in env.items() if not key.startswith(("LISTEN_", "NOTIFY_"))}
    with (place / "log").open("ab") as log:
        process = subprocess.Popen(
            ["sh", "-c", line],
            cwd=place,
            env=env,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(PATIENCE)


def answered(client: socket.socket, name: str) -> None:
    question, answer = ASKS.get(name, HTTP)
    client.settimeout(PATIENCE)
    client.sendall(question)
    assert client.recv(len(answer), socket.MSG_WAITALL) == answer


def connect(port: int) -> socket.socket:
    """A connection, made as soon as somebody listens."""
    made: list[socket.socket] = []

    def listens() -> bool:
        with contextlib.suppress(ConnectionRefusedError):
            made.append(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE))
        return bool(made)

    until(listens, lambda: "nobody listens")
    return made[0]


PROGRAMS = {
    "gunicorn": "gunicorn",
    "uvicorn": "uvicorn",
    "node": "node",
    "nginx": "nginx",
    "redis": "redis-server",
    "haproxy": "haproxy",
    "pgbouncer": "pgbouncer",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_recipe(daemon: DaemonProcess, tmp_path: Path, name: str) -> None:
    needs(PROGRAMS[name])
    line, port = prepare(tmp_path, name)
    tmp_path.chmod(0o777)
    with started(f"exec {line}", tmp_path, daemon), connect(port) as client:
        answered(client, name)
    for _ in range(2):
        with connect(port) as early, started(f"exec {line}", tmp_path, daemon):
            answered(early, name)


SUPERVISORS = {
    "a shell loop": ("node", "{}"),
    "runit, in `run`": ("runsv", "exec runsv service"),
    "supervisord, in `[program:web]`": ("supervisord", "exec supervisord -c supervisord.conf"),
}


@pytest.mark.parametrize("name", SUPERVISORS)
def test_a_supervisor(daemon: DaemonProcess, tmp_path: Path, name: str) -> None:
    program, command = SUPERVISORS[name]
    needs(program, "node")
    line, port = prepare(tmp_path, name)
    with started(command.format(line), tmp_path, daemon):
        for _ in range(3):
            with connect(port) as client:
                answered(client, name)
            with daemon.connect() as connection:
                [pid] = re.findall(r"pid (\d+)", connection.list()[0]["reason"])
            os.kill(int(pid), signal.SIGKILL)


def test_every_recipe_is_tried() -> None:
    tried = {*PROGRAMS, *SUPERVISORS, "systemd, in `[Service]`"}  # tests/systemd/test_run.py
    assert set(RECIPES) == tried

"""Unchanged programs, restarted under a stream of new connections.

    benchmarks/listeners.py [--seconds S] [--rate N] [PROGRAM ...]

For each program: N connections a second for S seconds, each with one request, while the program is
ended and started anew twice; once by SIGTERM, once by kill -9 of its process group, each with and
without `cprctl run --bind`. Prints the table of docs/run.md. `refused` counts connections refused,
`reset` connections (UDP: questions) without an answer, `worst` is the longest time from connect()
to the answer. Exits with 1 when a connection was refused under cprd.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks.stage import ROOT, private_cprd

PATIENCE = 20.0  # seconds for an answer; a start takes one at most
RESTARTS = (0.3, 0.65)  # when, as parts of the whole time


class Program(NamedTuple):
    """A server: command, addresses, request."""

    file: str  # in $PATH
    package: str  # Debian's
    command: Callable[[int, Path], list[str]]  # from a port and a directory for its files
    listen: tuple[str, ...]  # for --listen; {} is the port
    ask: Callable[[int], Awaitable[None]]  # raises ConnectionRefusedError, OSError, EOFError


class Count(NamedTuple):
    """The clients' results."""

    asked: int
    refused: int
    reset: int
    worst: float  # seconds

    def __str__(self) -> str:
        return f"{self.refused} | {self.reset} | {self.worst:.2f} s"


# -- what clients ask ----------------------------------------------------------------------------


def tcp(question: bytes, answer: bytes) -> Callable[[int], Awaitable[None]]:
    """Send `question`; the answer begins with `answer`."""

    async def ask(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(question)
            if await reader.readexactly(len(answer)) != answer:
                raise EOFError("another answer")
        finally:
            writer.close()

    return ask


class _Answer(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.came: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: object) -> None:
        if not self.came.done():
            self.came.set_result(data)

    def error_received(self, error: Exception) -> None:
        if not self.came.done():
            self.came.set_exception(error)


async def dns(port: int) -> None:
    """Ask for the address of a.test."""
    loop = asyncio.get_running_loop()
    where = ("127.0.0.1", port)
    transport, protocol = await loop.create_datagram_endpoint(_Answer, remote_addr=where)
    try:
        transport.sendto(struct.pack(">6H", 7, 0x100, 1, 0, 0, 0) + b"\1a\4test\0\0\1\0\1")
        data = await protocol.came
        if socket.inet_aton("10.0.0.1") not in data:
            raise EOFError("another answer")
    finally:
        transport.close()


HTTP = tcp(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", b"HTTP/1.1 200")
MQTT = tcp(b"\x10\x0e\0\4MQTT\4\2\0\x3c\0\2me", b"\x20\2\0\0")


# -- the programs --------------------------------------------------------------------------------


def redis(port: int, place: Path) -> list[str]:
    options = f"--port {port} --bind 127.0.0.1 --dir {place} --save"
    return ["redis-server", *options.split(), ""]


def nginx(port: int, place: Path) -> list[str]:
    (place / "nginx.conf").write_text(
        f"""daemon off; worker_processes 2; pid {place}/pid; error_log {place}/error;
        events {{}} http {{ access_log off; client_body_temp_path {place}/b;
        proxy_temp_path {place}/p; fastcgi_temp_path {place}/f; uwsgi_temp_path {place}/u;
        scgi_temp_path {place}/s;
        server {{ listen 127.0.0.1:{port}; location / {{ return 200 "ok"; }} }} }}"""
    )
    return ["nginx", "-e", f"{place}/error", "-c", f"{place}/nginx.conf"]


def node(port: int, place: Path) -> list[str]:
    del place
    serve = 'require("http").createServer((q, r) => r.end("ok")).listen(%d, "127.0.0.1")'
    return ["node", "-e", serve % port]


def haproxy(port: int, place: Path) -> list[str]:
    (place / "haproxy.cfg").write_text(
        f"""defaults\n mode http\n timeout client 9s\n timeout server 9s\n timeout connect 9s
frontend web\n bind 127.0.0.1:{port}\n http-request return status 200\n"""
    )
    return ["haproxy", "-db", "-f", f"{place}/haproxy.cfg"]


def mosquitto(port: int, place: Path) -> list[str]:
    (place / "mosquitto.conf").write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
    return ["mosquitto", "-c", f"{place}/mosquitto.conf"]


def dnsmasq(port: int, place: Path) -> list[str]:
    options = "-k --listen-address=127.0.0.1 --bind-interfaces --no-resolv --no-hosts --user="
    options += f" --group= --conf-file=/dev/null --pid-file={place}/pid --address=/test/10.0.0.1"
    return ["dnsmasq", f"--port={port}", *options.split()]


ONE = ("127.0.0.1:{}",)
PROGRAMS = {
    "redis": Program("redis-server", "redis-server", redis, ONE, tcp(b"PING\r\n", b"+PONG")),
    "nginx": Program("nginx", "nginx", nginx, ONE, HTTP),
    "node": Program("node", "nodejs", node, ONE, HTTP),
    "haproxy": Program("haproxy", "haproxy", haproxy, ONE, HTTP),
    "mosquitto": Program("mosquitto", "mosquitto", mosquitto, ONE, MQTT),
    "dnsmasq": Program(
        "dnsmasq", "dnsmasq-base", dnsmasq, ("udp:127.0.0.1:{}", "127.0.0.1:{}"), dns
    ),
}


def search_path() -> str:
    """$PATH, and where Debian has its servers."""
    return f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"


def is_there(program: Program) -> bool:
    """Whether the program is installed."""
    return shutil.which(program.file, path=search_path()) is not None


# -- the measurement -----------------------------------------------------------------------------


class Service:
    """A program as a service manager runs it: in a process group of its own."""

    def __init__(self, name: str, place: Path, cprd: str | None, *, port: int = 0) -> None:
        """`cprd`: the path of its socket; None to run without. `port` 0: a free one."""
        self.program = PROGRAMS[name]
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = port or free.getsockname()[1]
        self.command = self.program.command(self.port, place)
        drop = ("CPRD_", "LISTEN_", "NOTIFY_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(drop)}
        self.env = {**kept, "PATH": search_path(), "PYTHONPATH": ROOT}
        if cprd is not None:
            self.env["CPRD_SOCKET"] = cprd
            listen = [f"--listen={text.format(self.port)}" for text in self.program.listen]
            run = [sys.executable, "-m", "cprd.cli", "run", name, *listen, "--bind", "--"]
            self.command = [*run, *self.command]
        self.log = (place / "log").open("ab")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            env=self.env,
            start_new_session=True,
        )

    async def end(self, number: int) -> None:
        """By a signal: SIGTERM to the process, SIGKILL to its group, as systemd does."""
        assert self.process is not None
        if number == signal.SIGKILL:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        await asyncio.to_thread(self.process.wait, PATIENCE)

    async def until_it_answers(self) -> None:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                await asyncio.wait_for(self.program.ask(self.port), 1.0)
                return
            except (OSError, EOFError, TimeoutError):
                assert self.process is not None
                if self.process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"it did not start: see {self.log.name}") from None
                await asyncio.sleep(0.02)


async def stream(service: Service, seconds: float, rate: int) -> Count:
    """Clients of a service: `rate` connections a second."""
    waits: list[float] = []
    refused = reset = 0

    async def one() -> None:
        nonlocal refused, reset
        began = time.monotonic()
        try:
            await asyncio.wait_for(service.program.ask(service.port), PATIENCE)
            waits.append(time.monotonic() - began)
        except ConnectionRefusedError:
            refused += 1
        except (OSError, EOFError, TimeoutError):
            reset += 1

    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for i in range(int(seconds * rate)):
            await asyncio.sleep(max(0.0, began + i / rate - time.monotonic()))
            group.create_task(one())
    return Count(int(seconds * rate), refused, reset, max(waits, default=0.0))


async def _measure(service: Service, number: int, seconds: float, rate: int) -> Count:
    service.start()
    try:
        await service.until_it_answers()
        began = time.monotonic()
        load = asyncio.create_task(stream(service, seconds, rate))
        for part in RESTARTS:
            await asyncio.sleep(max(0.0, began + part * seconds - time.monotonic()))
            await service.end(number)
            service.start()
        count = await load
        assert service.process is not None
        if service.process.poll() is not None:
            raise RuntimeError(f"it did not stay: see {service.log.name}")
        return count
    finally:
        await service.end(signal.SIGKILL)
        service.log.close()


def measure(
    name: str, cprd: str | None, number: int, place: Path, *, seconds: float, rate: int
) -> Count:
    """Clients of one program through two restarts. `place`: a directory for its files and log.

    Raises RuntimeError when the program does not start."""
    place.mkdir(parents=True, exist_ok=True)
    return asyncio.run(_measure(Service(name, place, cprd), number, seconds, rate))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("program", nargs="*", choices=[*PROGRAMS, []], default=[])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rate", type=int, default=200)
    args = parser.parse_args()
    print("| program | restart | refused | reset | worst wait | refused | reset | worst wait |")
    print("|---|---|---|---|---|---|---|---|")
    failed = 0
    with tempfile.TemporaryDirectory(prefix="cprd-bench.") as folder:
        for name in args.program or PROGRAMS:
            if not is_there(PROGRAMS[name]):
                print(f"{name}: apt-get install {PROGRAMS[name].package}", file=sys.stderr)
                continue
            for number, word in ((signal.SIGTERM, "stop+start"), (signal.SIGKILL, "kill -9+start")):
                how = {"seconds": args.seconds, "rate": args.rate}
                place = Path(folder) / f"{name}.{number}"
                with private_cprd() as (path, _):
                    held = measure(name, path, number, place / "held", **how)
                plain = measure(name, None, number, place / "plain", **how)
                failed += held.refused
                print(f"| {name} | {word} | {held} | {plain} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

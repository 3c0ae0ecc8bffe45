"""What the documents show is what the code does."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import cprd
import cprd.asyncio
import cprd.trio
from cprd.errors import CODES
from cprd.protocol.lifecycle import TRANSITIONS
from cprd.protocol.messages import ANSWERS, REQUESTS
from tests.support.checkout import CHECKOUT
from tests.support.daemon import DaemonProcess
from tests.support.patience import PATIENCE, patience, until


def test_the_table_of_transitions_is_the_one_in_the_code() -> None:
    page = (CHECKOUT / "docs/lifecycle.md").read_text()
    table = page.split("| phase | event | then |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", table, re.M)
    assert {(phase, event): then for phase, event, then in rows} == TRANSITIONS


def test_every_verb_is_documented_with_its_fields() -> None:
    page = (CHECKOUT / "docs/protocol.md").read_text().partition("## All verbs")[2]
    asked: dict[str, set[str]] = {}
    answered: dict[str, set[str]] = {}
    row = r"^\| (`[^|]+`) \| ([^|]*)\| ([^|]*)\|$"
    for verbs, fields, answer in re.findall(row, page, re.M):
        for verb in re.findall(r"`(\w+)`", verbs):
            asked[verb] = {field for field in re.split(r",\s*", fields.strip()) if field}
            for field in asked[verb]:
                assert REQUESTS[verb][field.strip("*")].required == ("*" not in field), field
            answered[verb] = set(re.findall(r"\w+", re.sub(r"\(.*?\)|\*\*.*?\*\*", "", answer)))
    bare = {verb: {field.strip("*") for field in fields} for verb, fields in asked.items()}
    assert bare == {verb: set(fields) for verb, fields in REQUESTS.items()}
    assert answered == {verb: set(fields) for verb, fields in ANSWERS.items()}


def test_the_python_page_has_every_public_name_with_its_parameters() -> None:
    page = (CHECKOUT / "docs/python.md").read_text()
    documented = set(re.findall(r"^`((?:\w+\.)?\w+\(.*\))` →", page, re.M))
    carriers = {
        "columns",
        "has_any",
        "owning",
        "sections",
        "take_sections",
        "forget_asked",
    }  # for what packs a state and unpacks one
    wanted = {f"connect{_parameters(cprd.connect)}", f"live{_parameters(cprd.live)}"}
    for made in (cprd.State, cprd.Claim, cprd.Daemon, cprd.Prepared, cprd.LiveState):
        ours = [base for base in made.__mro__ if base.__module__.startswith("cprd.")]
        for name in {name for base in ours for name in vars(base) if name[0] != "_"} - carriers:
            method = getattr(made, name)
            assert f"`{made.__name__}.{name}" in page
            if callable(method):
                wanted.add(f"{made.__name__}.{name}{_parameters(method)}")
    assert documented == wanted - {"Daemon.close()", "Daemon.fileno()"}
    for error in CODES:
        assert f"`{error}`" in page or f"cprd.{error}`" in page
    for name in cprd.__all__:
        assert re.search(rf"\b{name}\b", page), name
    for name, wait in (
        ("Daemon", "wait"),
        ("Claim", "renew"),
        ("Prepared", "commit"),
        ("LiveState", "confirm"),
    ):
        assert hasattr(getattr(cprd.trio, name), wait)
    of_asyncio = set(re.findall(r"^\| `(?:await )?(\w+\(.*\))` \|", page, re.M))
    functions = {getattr(cprd.asyncio, name) for name in cprd.asyncio.__all__}
    functions = {each for each in functions if inspect.isfunction(each)} - {
        cprd.asyncio.connect,
        cprd.asyncio.live,
    }
    assert of_asyncio == {
        f"{each.__name__}{_parameters(each)}".replace("b''", 'b""') for each in functions
    }


def test_the_clients_have_the_same_methods_with_the_same_parameters() -> None:
    for name in ("Claim", "Daemon", "LiveState", "Prepared"):
        blocking, on_trio = getattr(cprd, name), getattr(cprd.trio, name)
        assert getattr(cprd.asyncio, name) is on_trio
        public = {key for key in vars(blocking) if key[0] != "_"}
        assert public | {"aclose"} >= {key for key in vars(on_trio) if key[0] != "_"} >= public
        for key in public:
            if callable(getattr(blocking, key)):
                assert _parameters(getattr(blocking, key)) == _parameters(getattr(on_trio, key))
    assert _parameters(cprd.connect) == _parameters(cprd.trio.connect)
    assert _parameters(cprd.live) == _parameters(cprd.trio.live)
    assert _parameters(cprd.connect) == _parameters(cprd.asyncio.connect)
    assert _parameters(cprd.live) == _parameters(cprd.asyncio.live)


def _parameters(function: Callable[..., object]) -> str:
    """As they are written in a call: without self, without types."""
    signature = inspect.signature(function)
    bare = [
        parameter.replace(annotation=parameter.empty)
        for parameter in signature.parameters.values()
        if parameter.name != "self"
    ]
    text = str(signature.replace(parameters=bare, return_annotation=signature.empty))
    return re.sub("<object object at 0x[0-9a-f]+>", "...", text)


def test_pages_that_are_linked_exist() -> None:
    for page in [CHECKOUT / "README.md", *(CHECKOUT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_importing_cprd_pulls_in_nothing_heavy() -> None:
    heavy = {"trio", "asyncio", "rich", "dataclasses", "inspect", "logging", "subprocess", "json"}
    code = "import sys, cprd; print(' '.join(sys.modules))"
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CHECKOUT
    )
    assert not heavy & set(said.stdout.split())


def test_the_parts_of_cprd_are_imported_when_they_are_asked_for() -> None:
    code = """
import sys, cprd
assert not {"trio", "cprd.trio", "cprd.cpr", "cprd.vmstate"} & set(sys.modules)
assert not {"asyncio", "cprd.asyncio"} & set(sys.modules)
cprd.asyncio.adopt, cprd.trio.connect, cprd.cpr.save_fd, cprd.vmstate
assert sys.modules["cprd.trio"] is cprd.trio
assert not hasattr(cprd, "nonsense")
from cprd import *
assert "trio" not in globals()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CHECKOUT)


class Chat:
    """The server of the README, as processes one after the other, and its clients."""

    def __init__(self, daemon: DaemonProcess, place: Path) -> None:
        code = re.findall(r"```python\n(.*?)```", (CHECKOUT / "README.md").read_text(), re.S)[0]
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        assert "7000" in code
        self.script = place / "chat.py"
        self.script.write_text(code.replace("7000", str(self.port)))
        self.env = {**daemon.env, "CPRD_SOCKET": daemon.path}
        self.clients: list[socket.socket] = []
        self.start()

    def start(self, **env: str) -> None:
        command = [sys.executable, "-W", "error", str(self.script)]
        self.server = subprocess.Popen(command, env={**self.env, **env}, stderr=subprocess.DEVNULL)

    def reach(self) -> None:
        def reached() -> bool:
            with contextlib.suppress(OSError):
                address = ("127.0.0.1", self.port)
                self.clients.append(socket.create_connection(address, timeout=PATIENCE))
                return True
            return False

        until(reached, lambda: "no server")

    def end(self, number: int) -> None:
        self.server.send_signal(number)
        self.server.send_signal(signal.SIGCONT)
        assert self.server.wait(patience(1)) == -number

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *error: object) -> None:
        self.server.kill()
        self.server.wait()
        for client in self.clients:
            client.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_server_of_the_readme_keeps_its_clients(
    daemon: DaemonProcess, tmp_path: Path, number: signal.Signals
) -> None:
    with Chat(daemon, tmp_path) as chat:
        chat.reach()
        chat.reach()
        for _ in range(5):
            address = ("127.0.0.1", chat.port)
            with socket.create_connection(address, timeout=PATIENCE) as rude:
                rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                rude.sendall(b"and off")  # close() resets: others must not notice
        for count in range(1, 4):
            for index, client in enumerate(chat.clients):
                client.sendall(b"from %d" % index)
                if count == 2:  # said while nobody runs
                    continue
                assert client.recv(100) == b"%d: from %d" % (count, index)
            if count == 1:
                chat.end(number)
                # Another claimant leaves O_NONBLOCK as it likes, and gives all back.
                with contextlib.suppress(ZeroDivisionError), cprd.connect(daemon.path) as late:
                    with late.load("chat", wait=PATIENCE) as claim:
                        for _, _, fd in claim.state.fds():
                            os.set_blocking(fd, True)
                        raise ZeroDivisionError
            if count == 2:
                chat.start(CPRD_PAUSE="confirm:answered")
                os.waitid(os.P_PID, chat.server.pid, os.WSTOPPED)
                chat.end(number)  # with all that was held in its hands alone
                chat.start()
                for index, client in enumerate(chat.clients):
                    assert client.recv(100) == b"2: from %d" % index


def test_a_client_of_the_readme_that_never_reads_stops_nobody(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    with Chat(daemon, tmp_path) as chat:
        chat.reach()
        chat.reach()
        lazy, busy = chat.clients
        lazy.setblocking(False)
        sent = 0
        for _ in range(300):
            with contextlib.suppress(BlockingIOError):
                while True:
                    sent += lazy.send(b"x" * 4000)
            busy.sendall(b"on")
            assert busy.recv(100).endswith(b": on")
        lazy.settimeout(PATIENCE)
        answered = 0
        while answered < sent:  # and once it reads, nothing is missing
            data = lazy.recv(65536)
            assert data, "hung up on it"
            answered += data.count(b"x")
        assert answered == sent
        chat.end(signal.SIGTERM)

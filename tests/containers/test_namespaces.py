"""What docs/containers.md says, in real user, pid, mount and network namespaces."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cprd
from cprd.errors import Unavailable
from tests.keep.keeping import children, environment
from tests.support.daemon import DaemonProcess
from tests.support.patience import PATIENCE, until

from .inside import ALL, Inside, missing

pytestmark = pytest.mark.usefixtures("nothing_leaks")

Start = Callable[..., Inside]


@pytest.fixture
def inside(nothing_leaks: None) -> Iterator[Start]:
    """inside(code, *namespaces, socket=, outer=): a program in a container."""
    lacking = missing(*ALL)
    if lacking:
        pytest.skip(f"containers need {lacking}")
    made: list[Inside] = []

    def start(*arguments: Any, **options: Any) -> Inside:
        made.append(Inside(*arguments, **options))
        return made[-1]

    yield start
    for one in made:
        one.close()


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mapping other uids needs root")

SAVE = """
state = cprd.State()
state.save_fd("event", 0, event := os.eventfd(41))
memory = os.memfd_create("memory")
os.write(memory, b"whole")
state.save_fd("memory", 0, memory)
state["pid"] = os.getpid()
with cprd.connect() as daemon:
    saved = daemon.save("web", state, after_exit=True)
    say(daemon.greeting["uid"], "process" in daemon.greeting["lease_by"], os.getpid())
"""
LOAD = """
with cprd.connect() as daemon:
    with daemon.load("web", wait=10) as claim:
        memory = claim.state.find_fd("memory", 0)
        say(os.eventfd_read(claim.state.find_fd("event", 0)), os.pread(memory, 9, 0).decode())
"""


def test_a_container_that_is_made_anew_has_what_the_one_before_left(
    inside: Start, daemon: DaemonProcess
) -> None:
    """cprd on the host, for all containers of it; every namespace is another one at the second
    start, and pid 1 is pid 1 again: `after_exit` and `lease_by` go by the process itself."""
    first = inside(SAVE + "hear()", *ALL, socket=daemon.path)
    uid, by_process, pid = first.hears().split()
    assert (uid, pid) == (str(os.geteuid()), "1")
    second = inside(LOAD, *ALL, socket=daemon.path)
    with daemon.connect() as client:
        # It waits for the end of the one that saved, which is another process than itself.
        until(lambda: client.status()["connections"] >= 2, lambda: "the second does not wait")
        assert [row["phase"] for row in client.list()] == ["held"]
        first.tell()
        assert second.hears() == "41 whole"
        assert second.wait() == 0
        assert client.list() == []
    assert by_process == "True" or os.uname().release < "6.5"


# Not by pid 1 of its namespace, whose end would end the fork as well.
CLAIM = """
if os.fork():
    os.wait()
    signal.pause()
with cprd.connect() as daemon:
    claim = daemon.load("web", lease=600)
    if os.fork() == 0:
        signal.pause()  # and keeps the connection open
    say("claimed", "process" in daemon.greeting["lease_by"])
    signal.pause()
"""


def test_a_claim_ends_with_its_process_though_that_is_in_another_pid_namespace(
    inside: Start, daemon: DaemonProcess
) -> None:
    with daemon.connect() as client:
        client.save("web", cprd.State())
        claimant = inside(CLAIM, *ALL, socket=daemon.path)
        said = claimant.hears().split()
        assert client.list()[0]["phase"] == "claimed"
        if said != ["claimed", "True"]:
            pytest.skip("before Linux 6.5 a claim from another pid namespace ends by connection")
        (program,) = children(claimant.pid)
        os.kill(program, signal.SIGKILL)
        until(lambda: client.list()[0]["phase"] == "held", lambda: str(client.list()))


@needs_root
def test_a_container_with_a_mapping_of_its_own_has_names_of_its_own(
    inside: Start, daemon: DaemonProcess
) -> None:
    """cprd on the host sees the uids of the host, whatever a container calls them."""
    with daemon.connect() as client:
        client.save("web", cprd.State())  # root's own
        one = inside(SAVE, *ALL, socket=daemon.path, outer=100000)
        other = inside(SAVE, *ALL, socket=daemon.path, outer=200000)
        assert (one.hears().split()[0], other.hears().split()[0]) == ("100000", "200000")
        assert (one.wait(), other.wait()) == (0, 0)
        assert sorted(row["uid"] for row in client.list()) == [0, 100000, 200000]
        theirs = inside(LOAD, *ALL, socket=daemon.path, outer=200000)
        assert theirs.hears() == "41 whole"
        assert theirs.wait() == 0
        assert sorted(row["uid"] for row in client.list()) == [0, 100000]
        with client.load("100000/web") as claim:
            assert claim.state["pid"] == 1


def in_container(command: list[str], *namespaces: str) -> subprocess.Popen[str]:
    line = ["unshare", *namespaces, "--map-root-user", "--fork", "--kill-child", *command]
    return subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment())


@needs_root
def test_a_sidecar_refuses_whom_it_has_no_uid_for(inside: Start, daemon: DaemonProcess) -> None:
    """cprd in a user namespace with one uid: all others look alike there."""
    path = os.path.join(os.path.dirname(daemon.path), "sidecar.sock")
    command = [sys.executable, "-m", "cprd.daemon.command", "--keep", "--socket", path]
    sidecar = in_container(command, "--user", "--pid", "--mount-proc", "--net")
    assert sidecar.stderr is not None
    try:
        while "ready pid=" not in (line := sidecar.stderr.readline()):
            assert line
        with cprd.connect(path) as client:
            assert client.greeting["uid"] == 0
            assert client.save("web", cprd.State()).kept == "store"
        code = (
            f"import cprd\ntry: cprd.connect({path!r})\nexcept cprd.Denied as error: print(error)"
        )
        said = subprocess.run(
            [sys.executable, "-c", f"import os, cprd; os.setuid(1)\n{code}"],
            capture_output=True,
            text=True,
            env=environment(),
            check=False,
        )
        assert said.returncode == 0, said.stderr
        assert "uid of another user namespace" in said.stdout
    finally:
        (init,) = children(sidecar.pid)
        os.kill(init, signal.SIGTERM)
        assert sidecar.wait(PATIENCE) == 0
        sidecar.stderr.close()


MOUNTS = """
import subprocess
place, volume = sys.argv[1:3]
os.makedirs(f"{place}/dir")
open(f"{place}/file.sock", "w").close()
for source, target in ((f"{volume}/cprd.sock", "file.sock"), (volume, "dir")):
    subprocess.run(["mount", "--bind", source, f"{place}/{target}"], check=True)

def look(path):
    try:
        with cprd.connect(path) as daemon:
            return str(daemon.status()["pid"])
    except Unavailable as error:
        return str(error)

while True:
    say(look(f"{place}/file.sock"))
    say(look(f"{place}/dir/cprd.sock"))
    if hear() == "end":
        break
"""


def test_the_socket_comes_in_by_its_directory_never_by_its_file(
    inside: Start, daemon: DaemonProcess, tmp_path: Path
) -> None:
    volume = os.path.dirname(daemon.path)
    container = inside(MOUNTS, "--user", "--mount", arguments=(str(tmp_path), volume))
    assert (container.hears(), container.hears()) == (str(daemon.pid), str(daemon.pid))
    daemon.restart()
    container.tell()
    by_file, by_directory = container.hears(), container.hears()
    assert by_directory == str(daemon.pid)
    assert "Connection refused" in by_file
    assert "bind mount" in by_file
    assert "mount the socket's directory instead, never the file" in by_file
    container.tell("end")
    assert container.wait() == 0


def test_a_socket_file_without_a_cprd_is_not_taken_for_a_mount(daemon: DaemonProcess) -> None:
    daemon.kill()
    with pytest.raises(
        Unavailable, match="the socket's file is there and its cprd has gone"
    ) as why:
        daemon.connect()
    assert "bind mount" not in str(why.value)
    os.unlink(daemon.path)
    with pytest.raises(Unavailable, match="No such file") as why:
        daemon.connect()
    assert "is there" not in str(why.value)
    daemon.start()


LISTENER = """
listener = socket.create_server(("127.0.0.1", 0))
state = cprd.State()
state.save_fd("listener", 0, listener)
with cprd.connect() as daemon:
    daemon.save("web", state)
say(listener.getsockname()[1])
"""
REACH = """
port = int(hear())
with cprd.connect() as daemon:
    with daemon.load("web", wait=10) as claim:
        listener = socket.socket(fileno=claim.state.take_fd("listener", 0))
try:
    socket.create_connection(("127.0.0.1", port), timeout=20).close()
    say("reached")
except OSError as error:
    say(type(error).__name__, listener.getsockname()[1] == port)
"""


def test_a_listener_stays_in_the_network_namespace_that_it_was_made_in(
    inside: Start, daemon: DaemonProcess
) -> None:
    """So the network namespace has to outlive the container (a pod's does)."""
    first = inside(LISTENER, *ALL, socket=daemon.path)
    port = first.hears()
    second = inside(REACH, *ALL, socket=daemon.path)
    second.tell(port)
    said = second.hears()
    assert said.endswith("True")
    assert "reached" not in said

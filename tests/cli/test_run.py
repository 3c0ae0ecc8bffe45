"""`cprctl run`: which listener a service gets, what is said, and what a failed start leaves."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import cprd
from cprd.cli.addresses import parse, parse_all, resolve
from cprd.cli.opening import Opened, adjust
from cprd.linux import sockets
from tests.support.cprctl import CPRCTL, cprctl, environment, free_port
from tests.support.daemon import DaemonProcess
from tests.support.patience import in_time, patience, until

pytestmark = pytest.mark.usefixtures("nothing_leaks")

# A command that says what it was given.
TELL = """
import json, os, socket
said = []
for i in range(int(os.environ.get("LISTEN_FDS", "0"))):
    sock = socket.socket(fileno=3 + i)
    name = sock.getsockname()
    said.append([name[:2] if isinstance(name, tuple) else name, os.fstat(3 + i).st_ino,
                 os.get_blocking(3 + i), sock.getsockopt(1, 15)])
print(json.dumps([os.environ.get("LISTEN_FDNAMES"), said], default=repr))
"""
HIDE = "sleep 60 >&- 2>&- & echo $!"


def run(
    daemon: DaemonProcess, *listen: str, options: tuple[str, ...] = (), **extra: Any
) -> tuple[str, list[Any], str]:
    """Start TELL as web: (LISTEN_FDNAMES, [name, inode, blocking, reuseport] each, stderr)."""
    words = [word for address in listen for word in ("--listen", address)]
    command = [sys.executable, "-S", "-c", TELL]
    done = cprctl(daemon, "run", "web", *words, *options, "--", *command, **extra)
    assert done.returncode == 0, done.stderr
    names, said = json.loads(done.stdout)
    return names, said, done.stderr


def fails(daemon: DaemonProcess, *listen: str, status: int = 1) -> str:
    words = [word for address in listen for word in ("--listen", address)]
    done = cprctl(daemon, "run", "web", *words, "--", "true")
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    return done.stderr


@contextmanager
def full_queue(path: Path, kind: int) -> Iterator[None]:
    """Somebody listens at `path`, whose queue is full: connect() would wait."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket(socket.AF_UNIX, kind))
        server.bind(str(path))
        server.listen(0)
        while True:
            client = stack.enter_context(socket.socket(socket.AF_UNIX, kind))
            client.setblocking(False)
            if client.connect_ex(str(path)):
                break
        yield


# -- the argument --------------------------------------------------------------------------------


def test_options_of_an_address(tmp_path: Path) -> None:
    listen = parse(f"web=unix:{tmp_path}/a\\,b,mode=660,owner=0:0,backlog=7")
    assert (listen.name, listen.path) == ("web", f"{tmp_path}/a,b")
    assert (listen.mode, listen.owner, listen.backlog) == (0o660, (0, 0), 7)
    assert parse("[::]:80,v6only,reuseport,device=lo")[-4:] == (True, True, False, "lo")
    assert parse(f"unix:{tmp_path}/x=y").name == "listener"
    keys = [each.key for each in parse_all(["1", "web=2", "3", "web=4", "a.b=5"])]
    assert keys == [("listener", 0), ("web", 0), ("listener", 1), ("web", 1), ("a.b", 0)]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("80,nonsense", "no option"),
        ("80,mode=660", "UNIX"),
        ("unix:/a,v6only", "of no use"),
        ("127.0.0.1:80,v6only", "of no use"),
        ("unix:/a,mode=9", "octal"),
        ("unix:/a,owner=no-such-user", "no-such-user"),
        ("80,backlog=x", "number"),
        ("80,reuseport=1", "no option"),
        ("unix:/" + "a" * 110, "107"),
        ("unix:/a/", "path of a file"),
        ("unix:@", "path of a file"),
        ("[nonsense]:80", "IPv6"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, why: str) -> None:
    with pytest.raises(cprd.InvalidInput, match=why):
        resolve(parse(text), ipv6=True)


def test_names_and_spellings_become_numbers() -> None:
    assert resolve(parse("localhost:80"), ipv6=True).host == "127.0.0.1"
    assert resolve(parse("[0:0:0::1]:80"), ipv6=True).host == "::1"
    assert resolve(parse("80"), ipv6=False).host == "0.0.0.0"
    with pytest.raises(cprd.CprdError, match="has no address"):
        resolve(parse("no-such-host.invalid:80"), ipv6=True)


def test_two_that_exclude_each_other_are_refused_before_anything_is_done(
    daemon: DaemonProcess,
) -> None:
    port = free_port()
    said = fails(daemon, f"127.0.0.1:{port}", f"{port}", status=2)
    assert f"127.0.0.1:{port} and --listen {port}" in said
    names, said_of, _ = run(daemon, f"127.0.0.1:{port},reuseport", f"127.0.0.1:{port},reuseport")
    assert names == "listener:listener.1"
    assert [each[3] for each in said_of] == [1, 1]
    again = run(daemon, f"127.0.0.1:{port},reuseport", f"127.0.0.1:{port},reuseport")
    assert again[1] == said_of


@pytest.mark.parametrize("host", ["192.0.2.7", "[2001:db8::7]"])
def test_an_address_that_this_machine_does_not_have_yet(host: str) -> None:
    made = Opened()
    with pytest.raises(cprd.CprdError, match="cannot listen on"):
        made.open([parse(f"{host}:0")])
    listen = parse(f"{host}:0,freebind")
    made.open([listen])
    with socket.socket(fileno=made.take(listen.key)) as sock:
        assert sock.getsockname()[0] == host.strip("[]")
    made.undo()


def test_a_listener_of_one_device(daemon: DaemonProcess) -> None:
    listen = parse("0.0.0.0:0,device=lo")
    made = Opened()
    made.open([listen])
    with socket.socket(fileno=made.take(listen.key)) as sock:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16) == b"lo\0"
    made.undo()
    assert "No such device" in fails(daemon, "0.0.0.0:0,device=none0")


# -- which listener ------------------------------------------------------------------------------


def test_names_and_order_may_change_and_the_sockets_stay(daemon: DaemonProcess) -> None:
    a, b = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    names, first, _ = run(daemon, a, b, "127.0.0.1:0")
    assert names == "listener:listener.1:listener.2"
    names, second, said = run(daemon, f"web={b}", "127.0.0.1:0", f"admin={a}")
    assert (names, said) == ("web:listener:admin", "")
    assert second == [first[1], first[2], first[0]]
    names, third, _ = run(daemon)  # and without --listen, under the names that they have
    assert (names, sorted(third)) == ("web:listener:admin", sorted(first))
    _, fourth, said = run(daemon, a)
    assert fourth == [first[0]]
    assert said.count("is closed") == 2, "what was called web is closed as well"


def test_another_network_namespace_is_noticed(daemon: DaemonProcess) -> None:
    port = free_port()
    _, first, _ = run(daemon, f"127.0.0.1:{port}")
    unshare = ["unshare", "--net", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    if subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("needs network namespaces: as root, or kernel.unprivileged_userns_clone=1")
    tell = [sys.executable, "-S", "-c", TELL]
    inside = f"ip link set lo up; exec {' '.join(CPRCTL)} run web"
    for listen, expected in (("", first), (f" --listen 127.0.0.1:{port}", None)):
        done = subprocess.run(
            [*unshare, "sh", "-c", f'{inside}{listen} -- "$@"', "sh", *tell],
            env=environment(daemon),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "another network namespace" in done.stderr
        got = json.loads(done.stdout)[1]
        assert (got == expected) if expected else (got[0][1] != first[0][1])


def test_what_waits_in_a_listener_that_is_closed_is_counted(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    port, udp, path = free_port(), free_port(), tmp_path / "sock"
    run(daemon, f"127.0.0.1:{port}", f"udp:127.0.0.1:{udp}", f"unix:{path}")
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        client = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        client.sendto(b"x", ("127.0.0.1", udp))
        local = stack.enter_context(socket.socket(socket.AF_UNIX))
        local.connect(str(path))
        _, _, said = run(daemon, "[::1]:0")
        assert f"tcp 127.0.0.1:{port} is closed, with 3 connections that" in said
        assert re.search(rf"udp 127.0.0.1:{udp} is closed, with \d+ bytes of datagrams", said)
        assert re.search(rf"unix stream {path} is closed, with 1 connection that", said)
    assert not path.exists(), "the file of a listener that is closed is removed"


def test_a_socket_of_the_program_that_is_in_the_way_is_named(daemon: DaemonProcess) -> None:
    with socket.create_server(("127.0.0.1", 0)) as own, daemon.connect() as connection:
        port = own.getsockname()[1]
        state = cprd.State()
        state.save_fd("admin", 0, own)
        connection.save("web", state)
    said = fails(daemon, f"0.0.0.0:{port}")
    assert f"web holds admin (tcp 127.0.0.1:{port})" in said
    assert "cprctl drop web" in said
    names, _, said = run(daemon, f"127.0.0.1:{port}")
    assert (names, said) == ("listener", ""), "asked for by its address, it serves"


def test_the_other_hold_with_the_address_is_named(daemon: DaemonProcess) -> None:
    port = free_port()
    assert run(daemon, f"127.0.0.1:{port}")
    listen = ["--listen", f"0.0.0.0:{port}"]
    done = cprctl(daemon, "run", "wbe", *listen, "--", "true")
    assert done.returncode == 1
    assert f"in use: web holds tcp 127.0.0.1:{port} listening (cprctl drop web" in done.stderr


def test_a_connection_is_no_listener(daemon: DaemonProcess) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = server.getsockname()[1]
        stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        served = stack.enter_context(server.accept()[0])
        state = cprd.State()
        state.save_fd("listener", 0, served)  # bound where the listener was
        server.close()
        with daemon.connect() as connection:
            connection.save("web", state)
        inode = os.fstat(served.fileno()).st_ino
        _, [new], said = run(daemon, f"127.0.0.1:{port}")
    assert new[1] != inode
    assert "does not listen" in said


def test_listeners_block_again(daemon: DaemonProcess) -> None:
    address = f"127.0.0.1:{free_port()}"
    unblock = "import os; os.set_blocking(3, False)"
    words = ["run", "web", "--listen", address, "--", sys.executable, "-S", "-c", unblock]
    assert cprctl(daemon, *words).returncode == 0
    assert [each[2] for each in run(daemon, address)[1]] == [True]


# -- UNIX paths ----------------------------------------------------------------------------------


def reaches(path: Path, inode: int) -> bool:
    """Whether who connects to `path` waits in the held listener with that inode."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        listing = Path("/proc/net/unix").read_text(errors="replace")
    return any(line.split()[6:] == [str(inode), str(path)] for line in listing.splitlines())


def test_mode_and_owner_are_those_that_are_asked_for_now(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    path = tmp_path / "sock"
    owner = "12345:12346" if os.geteuid() == 0 else f"{os.geteuid()}:{os.getegid()}"
    _, first, _ = run(daemon, f"unix:{path},mode=600")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    _, second, _ = run(daemon, f"unix:{path},mode=666,owner={owner}")
    assert second == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o666
    assert f"{path.stat().st_uid}:{path.stat().st_gid}" == owner


@pytest.mark.parametrize("put", ["a link", "a file", "another socket"])
@pytest.mark.parametrize("known", [True, False])
def test_mode_and_owner_are_of_the_socket_itself_whatever_lies_at_its_path_by_now(
    tmp_path: Path, put: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may write in the directory could have a file of somebody else given away."""
    if not known:  # without CAP_NET_ADMIN, the kernel does not tell the file of a socket
        monkeypatch.setattr(sockets, "_SIOCUNIXFILE", 0x89EF)
    path, moved, secret = tmp_path / "sock", tmp_path / "moved", tmp_path / "secret"
    owner = "12345:12346" if os.geteuid() == 0 else f"{os.geteuid()}:{os.getegid()}"
    other = socket.socket(socket.AF_UNIX)
    if put == "another socket":
        other.bind(str(secret))
    else:
        secret.touch()
    secret.chmod(0o600)
    before = secret.stat()
    with other, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        path.rename(moved)
        if put == "a link":
            path.symlink_to(secret)
        else:
            os.link(secret, path)
        listen = parse(f"unix:{path},mode=666,owner={owner}")
        if known and os.geteuid() == 0:
            adjust(listener.fileno(), listen)
            found = moved.stat()
            assert (stat.S_IMODE(found.st_mode), f"{found.st_uid}:{found.st_gid}") == (0o666, owner)
        else:
            with pytest.raises(cprd.CprdError, match="another file lies at the path"):
                adjust(listener.fileno(), listen)
    after = secret.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (
        before.st_mode,
        before.st_uid,
        before.st_gid,
    )


@pytest.mark.parametrize("spelling", ["sock", "./sock", "../d/sock", "{}/../d/sock", "{}/./sock"])
def test_another_spelling_of_a_path_is_the_same_listener(
    daemon: DaemonProcess, tmp_path: Path, spelling: str
) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    _, first, _ = run(daemon, f"unix:{folder}/sock")
    _, second, said = run(daemon, f"unix:{spelling.format(folder)}", cwd=folder)
    assert (second, said) == (first, "")
    assert reaches(folder / "sock", first[0][1])


def test_a_failed_start_leaves_no_file_and_the_hold_as_it_was(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    own, new = tmp_path / "own", tmp_path / "new"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        fails(daemon, f"unix:{new}", f"127.0.0.1:{port}")  # cold
        assert not new.exists()
        _, first, _ = run(daemon, f"unix:{own}")
        said = fails(daemon, f"unix:{own}", f"unix:{new}", f"127.0.0.1:{port}")
        assert "in use" in said
        assert not new.exists()
    broken = tmp_path / "broken"
    broken.write_text("#!/nowhere/interpreter\n")
    broken.chmod(0o755)
    done = cprctl(daemon, "run", "other", "--listen", f"unix:{new}", "--", str(broken))
    assert "did not start" in done.stderr
    assert not new.exists()
    assert run(daemon, f"unix:{own}")[1] == first


@pytest.mark.parametrize("kind", ["unix", "seqpacket"])
def test_a_full_queue_at_the_path_is_in_use_at_once(
    daemon: DaemonProcess, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "sock"
    type_ = socket.SOCK_STREAM if kind == "unix" else socket.SOCK_SEQPACKET
    run(daemon, f"unix:{tmp_path}/own")
    with full_queue(path, type_):
        began = time.monotonic()
        assert "Address already in use" in fails(daemon, f"unix:{tmp_path}/own", f"{kind}:{path}")
        assert in_time(time.monotonic() - began, 2)
        assert path.exists()
    with daemon.connect() as connection:
        assert connection.list()[0]["phase"] == "held"


def test_a_file_that_is_no_socket_is_left_alone(daemon: DaemonProcess, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("precious")
    assert "no socket" in fails(daemon, f"unix:{path}")
    assert path.read_text() == "precious"


def test_when_somebody_else_is_in_the_way_as_well_it_is_said_what_is_held_now(
    daemon: DaemonProcess,
) -> None:
    with socket.create_server(("127.0.0.2", 0)) as other:
        port = other.getsockname()[1]
        run(daemon, f"127.0.0.1:{port}")
        said = fails(daemon, f"0.0.0.0:{port}")
        assert "in use" in said
        assert "web held only what was in the way, and holds nothing now" in said
    with daemon.connect() as connection:
        assert connection.list() == []


# -- without a hold, without cprd ----------------------------------------------------------------


def test_a_name_with_nothing_held_and_no_listen_is_an_error(daemon: DaemonProcess) -> None:
    assert "is 'web' the right name" in fails(daemon, status=3)


def test_cold_starts_without_cprd_when_asked_to(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setattr(daemon, "path", f"{daemon.path}.nobody")
    assert "cprd" in fails(daemon, address)
    names, said_of, said = run(daemon, address, options=("--cold",))
    assert (names, len(said_of)) == ("listener", 1)
    assert "nothing is held" in said


def test_a_ttl_runs_from_the_end_of_the_command(daemon: DaemonProcess) -> None:
    address = f"127.0.0.1:{free_port()}"
    ttl = f"{patience(0.5)}"
    words = ["run", "web", "--listen", address, "--ttl", ttl, "--", "sleep", f"{patience(1)}"]
    for _ in range(2):  # cold, and (it was in time) warm
        assert cprctl(daemon, *words).returncode == 0
        with daemon.connect() as connection:
            assert [row["name"] for row in connection.list()] == ["web"]
    with daemon.connect() as connection:
        until(lambda: not connection.list(), lambda: "held")


def test_the_file_of_a_listener_that_is_closed_goes_unless_somebody_serves_there(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    address, path = f"127.0.0.1:{free_port()}", tmp_path / "sock"
    run(daemon, f"unix:{path}")
    run(daemon, address)
    assert not path.exists()
    hide = ["run", "web", "--listen", f"unix:{path}", "--", "sh", "-c", HIDE]
    sleeper = int(cprctl(daemon, *hide).stdout)
    try:
        run(daemon, address)
        assert path.exists()
    finally:
        os.kill(sleeper, signal.SIGKILL)


def test_a_command_that_goes_into_the_background_is_noticed(daemon: DaemonProcess) -> None:
    address = f"127.0.0.1:{free_port()}"
    hide = ["run", "web", "--listen", address, "--", "sh", "-c", HIDE]
    done = cprctl(daemon, *hide)
    sleeper = int(done.stdout)
    try:
        comm = Path(f"/proc/{sleeper}/comm")
        until(lambda: comm.read_text() == "sleep\n", comm.read_text)  # still the shell until then
        _, _, said = run(daemon, address)
        assert f"pid {sleeper} (sleep)" in said
        assert "foreground" in said
    finally:
        os.kill(sleeper, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{sleeper}/fd/3").exists(), lambda: "alive")
    assert run(daemon, address)[2] == ""

"""The daemon as a process: how it starts, what it refuses to start with, how it ends, its log."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

import cprd
from cprd.daemon import command
from cprd.daemon import config as configuration
from tests.support.checkout import CHECKOUT
from tests.support.child import Child, Line
from tests.support.daemon import DaemonProcess, answers
from tests.support.goods import goods, state_of
from tests.support.patience import PATIENCE, until

Start = Callable[..., DaemonProcess]


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run cprd until it ends by itself."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("CPRD_")}
    return subprocess.run(
        [sys.executable, "-m", "cprd.daemon.command", *arguments],
        env={**kept, "PYTHONPATH": str(CHECKOUT), **env},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_sigterm_ends_it_cleanly_and_takes_its_socket_away(daemon: DaemonProcess) -> None:
    with daemon.connect() as connection:
        connection.save("web", state_of("x", [], []))
        assert daemon.stop() == 0
        assert not os.path.exists(daemon.path)
        daemon.await_log("stopping signal=SIGTERM lost=1")
    with pytest.raises(cprd.Unavailable, match="no cprd answers"):
        cprd.connect(daemon.path)


def test_what_waits_ends_with_the_daemon(daemon: DaemonProcess) -> None:
    assert daemon.process is not None
    with daemon.connect() as connection:
        connection.status()
        daemon.process.send_signal(signal.SIGINT)
        assert daemon.process.wait(PATIENCE) == 0
        daemon.await_log("stopping signal=SIGINT")


def test_a_stale_socket_is_taken_over(daemon: DaemonProcess) -> None:
    daemon.kill()
    assert os.path.exists(daemon.path)
    daemon.start()
    daemon.connect().close()


def test_a_living_daemons_socket_is_not_taken_over(daemon: DaemonProcess) -> None:
    second = run("--socket", daemon.path)
    assert second.returncode == 1
    assert second.stderr == f"cprd: another cprd serves {daemon.path}\n"
    daemon.connect().close()


def test_a_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    refused = run("--socket", str(tmp_path / "file"))
    assert refused.returncode == 1
    assert "is not a socket" in refused.stderr
    assert (tmp_path / "file").read_text() == "precious"


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = run("--socket", str(tmp_path / "file" / "cprd.sock"))
    assert refused.returncode == 1
    assert str(tmp_path / "file") in refused.stderr


def test_check_serves_nothing_and_says_what_it_would(tmp_path: Path) -> None:
    config = tmp_path / "cprd.toml"
    config.write_text("[limits]\nholds = 7\nlease = 1.5\n")
    path = str(tmp_path / "cprd.sock")
    good = run("--check", "--config", str(config), "--socket", path)
    assert good.returncode == 0
    assert path in good.stdout
    assert not os.path.exists(path)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[limits]\nhold = 7\n", "limits.hold"),
        ("[limits]\nholds = 0\n", "limits.holds"),
        ("[limits]\nholds = true\n", "limits.holds"),
        ('[limits]\nholds = "7"\n', "limits.holds"),
        ("limits = 3\n", "limits"),
        ("[limit]\nholds = 7\n", "limit"),
        ("[limits\n", "cprd.toml"),
        (None, "cprd.toml"),
    ],
)
def test_a_wrong_configuration_is_refused_and_named(
    tmp_path: Path, text: str | None, named: str
) -> None:
    config = tmp_path / "cprd.toml"
    if text is not None:
        config.write_text(text)
    for check in (["--check"], []):
        refused = run("--config", str(config), "--socket", str(tmp_path / "s"), *check)
        assert refused.returncode == 1
        assert named in refused.stderr
        assert refused.stderr.count("\n") == 1
    assert not os.path.exists(tmp_path / "s")


def test_the_systems_configuration_is_read_where_none_is_named_and_not_for_a_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cprd.toml"
    monkeypatch.setattr(configuration, "SYSTEM", str(file))
    monkeypatch.setenv("INVOCATION_ID", "0" * 32)  # as a service has it
    assert configuration.default_path(user=False) == ""
    file.symlink_to(tmp_path / "nowhere")
    assert configuration.default_path(user=False) == str(file)
    assert configuration.default_path(user=True) == ""
    with pytest.raises(cprd.CprdError, match=r"cprd\.toml"):
        configuration.read(configuration.default_path(user=False))
    monkeypatch.delenv("INVOCATION_ID")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert configuration.default_path(user=False) == ""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert configuration.default_path(user=False) == str(file)


def test_wrong_usage_ends_with_2() -> None:
    assert run("--soccet", "x").returncode == 2


def test_without_a_runtime_directory_user_says_what_is_missing() -> None:
    refused = run("--user", XDG_RUNTIME_DIR="")
    assert refused.returncode == 1
    assert "$XDG_RUNTIME_DIR" in refused.stderr


@pytest.mark.parametrize(
    ("release", "good"),
    [("5.9.16", False), ("4.19.0-27-amd64", False), ("5.10.0", True), ("6.1.0-13-arm64", True)],
)
def test_an_old_kernel_is_refused_by_its_name(
    monkeypatch: pytest.MonkeyPatch, release: str, good: bool
) -> None:
    real = os.uname()
    fake = os.uname_result((real.sysname, real.nodename, release, real.version, real.machine))
    monkeypatch.setattr(os, "uname", lambda: fake)
    if good:
        command._check_kernel()
    else:
        with pytest.raises(cprd.Unavailable, match=re.escape(release)):
            command._check_kernel()


def test_one_line_an_event_and_nothing_of_what_is_held(new_daemon: DaemonProcess) -> None:
    secret = "hunter2-and-more"
    name = 'naïve name="x'
    with new_daemon.connect() as connection, goods(secret) as cargo:
        state = cargo.state()
        state["password"] = {secret: secret}
        state.save_fd(secret, 0, cargo.eventfds[0])
        connection.save(name, state)
        connection.load(name).close()
        with pytest.raises(cprd.AlreadyHeld):
            connection.save(name, state)
        with connection.load(name):
            pass
        with pytest.raises(cprd.NotHeld):
            connection.load(name)
    new_daemon.stop()
    lines = new_daemon.log()
    assert not [line for line in lines if secret in line]
    events = [line.split()[0] for line in lines]
    assert events == [
        "ready",
        *("held", "claimed", "held", "refused", "claimed", "ended", "refused"),
        "stopping",
    ]
    for line in lines:
        assert re.fullmatch(r'[a-z-]+( [a-z_]+=("[^"]*"|[^ "=]+|\'[^\']*\'))*', line), line
    held = lines[1]
    assert f"uid={os.geteuid()} " in held
    assert "generation=" in held


def _begin_as_a_stranger(line: Line, path: str) -> None:
    os.setuid(12345)
    with cprd.connect(path) as connection:
        connection.save("web", cprd.State())
        connection.load("web").begin()
        os._exit(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: two uids")
def test_the_log_says_who_asked(start_daemon: Start) -> None:
    """The owner, and the operator who released or dropped: uid and pid as the kernel says."""
    daemon = start_daemon()
    with Child(_begin_as_a_stranger, daemon.path) as saver:
        assert saver.wait() == 0
    theirs, mine = f"by_uid=12345 by_pid={saver.pid}", f"by_uid=0 by_pid={os.getpid()}"
    assert theirs in daemon.await_log("held uid=12345 name=web")
    assert theirs in daemon.await_log("claimed uid=12345 name=web")
    assert theirs in daemon.await_log("in-doubt uid=12345 name=web")
    seen = len(daemon.log())
    with daemon.connect() as connection:
        connection.release("12345/web", force=True)
        assert mine in daemon.await_log("held uid=12345 name=web", since=seen)
        connection.drop("12345/web")
        assert mine in daemon.await_log("ended how=drop uid=12345 name=web", since=seen)
        connection.save("short", cprd.State(), ttl=0.1)
        assert "by_" not in daemon.await_log('ended how="ttl over" uid=0 name=short')
        with pytest.raises(cprd.NotHeld):
            connection.drop("nothing")
        assert f"uid=0 pid={os.getpid()}" in daemon.await_log("refused verb=drop")


def test_a_name_cannot_forge_a_line_of_the_log(daemon: DaemonProcess) -> None:
    with daemon.connect() as connection:
        for name in ("x\nended", "x\x1b[31m", "x\u2028y"):
            with pytest.raises(cprd.InvalidInput):
                connection.drop(name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        import msgpack

        from tests.support import wire

        sock.connect(daemon.path)
        sock.send(wire.HELLO)
        sock.recv(65536)
        drop = {"verb": "drop", "name": "x\nended", "force": True, "nonce": b"n" * 16}
        sock.send(msgpack.packb(drop))
        sock.recv(65536)
        sock.send(msgpack.packb({"verb": "x\nended how=drop"}))
        sock.recv(65536)
    daemon.stop()
    assert not [line for line in daemon.log() if line.startswith("ended")]


def test_it_accepts_again_when_descriptors_are_free_again(
    start_daemon: Callable[..., DaemonProcess],
) -> None:
    """Without a descriptor left it turns clients away, lives, and comes back by itself."""
    daemon = start_daemon(nofile=(64, 64), config="[limits]\nconnections = 500\n")
    socks = []
    try:
        for _ in range(100):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sock.settimeout(PATIENCE)
            sock.connect(daemon.path)
            socks.append(sock)
    finally:
        for sock in socks:
            sock.close()
    assert daemon.alive()

    def served() -> bool:  # cprd may not have seen yet that all of them went
        try:
            with daemon.connect() as connection:
                return connection.list() == []
        except cprd.LimitExceeded:
            return False

    until(served, lambda: "cprd turns everybody away")


# Its log


def test_a_line_has_the_time_unless_the_journal_adds_the_time(tmp_path: Path) -> None:
    """$JOURNAL_STREAM says which stream the journal reads: it may be inherited, and stderr not."""
    line = "from cprd.daemon import log; log.event('x', y=1)"
    with open(tmp_path / "log", "w+b") as file:
        found = os.fstat(file.fileno())
        for stream, expected in (
            (None, r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z x y=1\n"),
            ("8:12345", r"\d{4}-\d\d-\d\dT\S+Z x y=1\n"),
            (f"{found.st_dev}:{found.st_ino}", r"<6>x y=1\n"),
        ):
            env = {"PYTHONPATH": str(CHECKOUT), **({"JOURNAL_STREAM": stream} if stream else {})}
            file.seek(0)
            file.truncate()
            subprocess.run([sys.executable, "-c", line], stderr=file, env=env, check=True)
            file.seek(0)
            said = file.read().decode()
            assert re.fullmatch(expected, said), said
            if not stream:
                then = datetime.strptime(said.split()[0], "%Y-%m-%dT%H:%M:%S.%fZ")
                assert abs(then.replace(tzinfo=UTC).timestamp() - time.time()) < PATIENCE


def test_a_log_that_nobody_reads_makes_nobody_wait(start_daemon: Start) -> None:
    daemon = start_daemon()
    with daemon.connect() as connection:
        daemon.leave_log_unread(True)
        try:
            for _ in range(1500):  # more than the pipe takes, and a thousand lines
                connection.save("web", cprd.State())
                connection.drop("web")
        finally:
            daemon.leave_log_unread(False)
        assert daemon.await_log("log-lines-lost")
        connection.save("last", cprd.State())
        assert daemon.await_log("name=last")


@pytest.mark.parametrize("closed", ["its reader", "stdin, stdout and stderr"])
def test_a_log_that_has_gone_costs_nothing(tmp_path: Path, closed: str) -> None:
    path = str(tmp_path / "sock")
    command = [sys.executable, "-m", "cprd.daemon.command", "--socket", path]
    if closed != "its reader":
        command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(CHECKOUT)}
    )
    assert process.stderr is not None
    process.stderr.close()
    try:
        until(lambda: answers(path), lambda: "no cprd")
        with cprd.connect(path) as connection:
            connection.save("web", cprd.State())

            def started() -> float:
                return time.monotonic() - float(connection.status()["uptime"])

            before = started()
            os.kill(process.pid, signal.SIGHUP)
            until(lambda: started() > before + 0.03, lambda: "not re-executed")
            assert [row["name"] for row in connection.list()] == ["web"]
        process.terminate()
        assert process.wait(PATIENCE) == 0
        assert not os.path.exists(path)
    finally:
        process.kill()
        process.wait()


def test_the_socket_of_another_daemon_stays_where_it_is(start_daemon: Start) -> None:
    """Somebody removed the file, and started another one in its place."""
    first = start_daemon()
    os.unlink(first.path)
    start_daemon("--socket", first.path)
    with cprd.connect(first.path) as connection:
        connection.save("web", cprd.State())
        first.stop()
        with cprd.connect(first.path) as second:
            assert [row["name"] for row in second.list()] == ["web"]

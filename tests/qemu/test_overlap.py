"""Sockets at paths that the old QEMU and the new one share: after an upgrade they are the new
one's, whoever was killed on the way."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from cprd.linux.processes import credentials
from cprd.qemu.private import MARK, PrivateDirectory
from cprd.qemu.process import Process
from cprd.qemu.sockets import SharedPaths, mend
from tests.qemu.conftest import MakeMachine
from tests.qemu.machine import Machine
from tests.qemu.steps import guard_named_by, rows
from tests.support.patience import PATIENCE


def listener(path: Path | str) -> int:
    """The pid of who listens there."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(str(path))
        return credentials(sock)[1]


def second_names(vm: Machine) -> list[str]:
    return [path.name for path in vm.place.iterdir() if path.suffix in (".old", ".new")]


def stopped_upgrade(vm: Machine, step: str) -> subprocess.Popen[bytes]:
    words = ("qemu", "upgrade", vm.name, "--qmp", vm.qmp, "--", *vm.command)
    process = vm.popen(*words, env={"CPRD_PAUSE": f"qemu-upgrade:{step}"})
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    return process


LISTENING = {
    "chardev": "-chardev socket,id=z,path={path},server=on,wait=off",
    "chardev-with-a-comma": "-chardev socket,id=y,path={path},,x,server=on,wait=off",
    "debugger": "-gdb unix:{path},server=on,wait=off",
    "debug-console": "-debugcon unix:{path},server=on,wait=off",
    "serial-line-and-monitor": "-serial mon:unix:{path},server=on,wait=off",
    "monitor": "-monitor unix:{path},server=on,wait=off",
    "vnc": "-display vnc=unix:{path}",
    "network": "-netdev stream,id=n0,server=on,addr.type=unix,addr.path={path}",
    "network-as-json": '-netdev {{"type":"stream","id":"n1","server":true,'
    '"addr":{{"type":"unix","path":"{path}"}}}}',
}


def test_every_path_at_which_both_listen_is_the_new_ones(make_machine: MakeMachine) -> None:
    vm = make_machine()
    paths = {row: vm.place / row for row in LISTENING}
    for row, words in LISTENING.items():
        vm.command += words.format(path=paths[row]).split()
    paths["chardev-with-a-comma"] = vm.place / "chardev-with-a-comma,x"
    at = vm.command.index("-display")
    del vm.command[at : at + 2]  # (the VNC server is the display)
    process = vm.start()
    vm.goes_on()
    assert {row for row, path in paths.items() if listener(path) != process.pid} == set()
    for _ in range(2):
        vm.execute("cont")  # (a debugger that comes stops the guest, and we have been there)
        vm.goes_on(5)
        done = vm.upgrade(vm.qmp, vm.command)
        assert done.returncode == 0, done.stderr
        (new,) = vm.alive()
        assert {row for row, path in paths.items() if listener(path) != new} == set()
        assert second_names(vm) == []


@pytest.mark.parametrize("gap", [False, True])
def test_a_path_that_is_bound_late_is_the_new_ones(tmp_path: Path, gap: bool) -> None:
    """QEMU binds `-netdev stream` in a thread, perhaps after its monitor answers; before that it
    removes the path, if it is slow with a gap in between."""
    path = tmp_path / "net,work"
    with socket.socket(socket.AF_UNIX) as old, socket.socket(socket.AF_UNIX) as new:
        old.bind(str(path))
        old.listen()
        shared = SharedPaths(os.getpid(), ["-netdev", f"stream,addr.path={tmp_path}/net,,work"])
        shared.before_new()

        def bind() -> None:
            path.unlink(missing_ok=True)
            new.bind(str(path))
            new.listen()

        if gap:
            path.unlink()
        late = threading.Timer(0.05, bind)
        late.start()
        shared.new_listens()
        late.join()
        inode = path.stat().st_ino
        path.unlink()  # as the old QEMU does when it quits
        shared.old_has_ended()
        assert path.stat().st_ino == inode
        assert sorted(os.listdir(tmp_path)) == [path.name]
        shared.close()


def test_what_the_new_one_does_not_listen_at_is_left_alone(vm: Machine) -> None:
    """Of a chardev that a monitor added, and of a neighbour; and no second name stays."""
    late = vm.place / "late"
    address = {"type": "unix", "data": {"path": str(late)}}
    backend = {"type": "socket", "data": {"addr": address, "server": True, "wait": False}}
    vm.execute("chardev-add", id="late", backend=backend)
    assert listener(late) == vm.alive()[0]
    done = vm.upgrade(vm.qmp, vm.command)
    assert done.returncode == 0, done.stderr
    assert not late.exists()  # its QEMU has taken it along
    assert second_names(vm) == []
    assert vm.status() == "running"


def test_a_second_name_that_is_taken_costs_nothing(vm: Machine) -> None:
    (vm.place / "qmp.old").mkdir()
    done = vm.upgrade(vm.qmp, vm.command)
    assert done.returncode == 1
    assert "cannot get a second name" in done.stderr
    assert "the guest runs on in its QEMU" in done.stderr
    assert vm.status() == "running"
    vm.goes_on(5)
    (vm.place / "qmp.old").rmdir()
    assert vm.upgrade(vm.qmp, vm.command).returncode == 0
    assert vm.status() == "running"


def test_a_second_name_of_long_ago_is_not_given_back(vm: Machine) -> None:
    """By an upgrade that fails before it gives second names itself."""
    listen(vm.place / "qmp.old").close()
    (old,) = vm.alive()
    process = stopped_upgrade(vm, "guarded")
    process.kill()
    process.wait(PATIENCE)
    vm.until(lambda: vm.alive() == [old] and second_names(vm) == [], "the end of the new one")
    assert vm.status() == "running"


@pytest.mark.usefixtures("subreaper")
@pytest.mark.parametrize("moment", ["running", "succeeded", "quit"])
def test_the_path_outlives_a_helper_that_is_killed_while_the_old_qemu_quits(
    vm: Machine, moment: str
) -> None:
    (old,) = vm.alive()
    process = stopped_upgrade(vm, moment)
    (new,) = set(vm.alive()) - {old}
    process.kill()
    process.wait(PATIENCE)
    if moment != "quit":  # by anybody: it removes the path
        vm.ask(lambda monitor: monitor.execute("quit"), f"{vm.qmp}.old")
    vm.until(lambda: vm.alive() == [new] and second_names(vm) == [], "the end of the old one")
    assert listener(vm.qmp) == new
    vm.goes_on(5)
    stopped = vm.cprctl("qemu", "stop", "vm", "--qmp", vm.qmp)
    assert stopped.returncode == 0, stopped.stderr
    assert [row["phase"] for row in rows(vm)] == ["held"]
    vm.start()
    vm.goes_on()


@pytest.mark.usefixtures("subreaper")
@pytest.mark.parametrize("verb", ["save", "stop", "check", "start"])
def test_even_the_guard_was_killed_and_the_next_command_finds_the_path(
    vm: Machine, verb: str
) -> None:
    (old,) = vm.alive()
    process = stopped_upgrade(vm, "succeeded")
    (new,) = set(vm.alive()) - {old}
    _kill_guard(new)
    process.kill()
    process.wait(PATIENCE)
    vm.ask(lambda monitor: monitor.execute("quit"), f"{vm.qmp}.old")
    vm.until(lambda: vm.alive() == [new], "the end of the old one")
    assert not os.path.exists(vm.qmp)
    if verb == "start":
        assert vm.start().wait(PATIENCE) == 4
        assert vm.cprctl("drop", "vm", "--force").returncode == 0
        assert vm.start().wait(PATIENCE) == 1
        assert "listens at" in vm.said()
        assert listener(vm.qmp) == new
        vm.goes_on(5)
        return
    words = [verb, "--qmp", vm.qmp] if verb == "check" else [verb, "vm", "--qmp", vm.qmp]
    done = vm.cprctl("qemu", *words)
    assert done.returncode == 0, done.stderr
    if verb == "check":
        assert listener(vm.qmp) == new
        vm.goes_on(5)
        return
    assert [row["phase"] for row in rows(vm)] == ["held"]
    vm.start()
    vm.goes_on()


@pytest.mark.usefixtures("subreaper")
def test_the_new_qemu_ends_while_the_old_one_still_lives(vm: Machine) -> None:
    """The old one, stopped for good, has its path again: whoever looks for it finds it."""
    (old,) = vm.alive()
    process = stopped_upgrade(vm, "succeeded")
    process.kill()
    process.wait(PATIENCE)
    (new,) = set(vm.alive()) - {old}
    os.kill(new, signal.SIGKILL)
    vm.until(lambda: vm.alive() == [old] and second_names(vm) == [], "the path given back")
    assert listener(vm.qmp) == old
    assert vm.status() == "postmigrate"


def _kill_guard(qemu: int) -> None:
    guard = guard_named_by(qemu)
    guard.kill()
    assert guard.wait(PATIENCE)
    guard.close()


# Without any QEMU


def listen(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen(1)
    return sock


def answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


@pytest.mark.parametrize("first", ["missing", "dead"])
@pytest.mark.parametrize("second", ["new", "old"])
def test_a_path_is_mended_from_its_second_name(tmp_path: Path, first: str, second: str) -> None:
    path = tmp_path / "qmp"
    if first == "dead":
        listen(path).close()
    with listen(tmp_path / f"qmp.{second}"):
        mend(str(path))
        assert answers(path)
        assert [entry.name for entry in tmp_path.iterdir()] == ["qmp"]


def test_a_path_where_somebody_listens_is_not_mended(tmp_path: Path) -> None:
    with listen(tmp_path / "qmp") as there, listen(tmp_path / "qmp.new"):
        mend(str(tmp_path / "qmp"))
        there.accept()[0].close()  # (asked, since there was a second name)
        there.close()
        assert not answers(tmp_path / "qmp")
        assert answers(tmp_path / "qmp.new")


def test_a_dead_second_name_mends_nothing(tmp_path: Path) -> None:
    listen(tmp_path / "qmp.new").close()
    mend(str(tmp_path / "qmp"))
    mend(str(tmp_path / "nowhere" / "qmp"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["qmp.new"]


@pytest.mark.parametrize("where", ["relative", "in a root of its own"])
def test_a_socket_is_found_where_its_process_sees_it(tmp_path: Path, where: str) -> None:
    if where != "relative" and os.geteuid() != 0:
        pytest.skip("needs root")
    ready, said = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.chdir(tmp_path)
            if where != "relative":
                os.chroot(tmp_path)
            here = listen(Path("qmp" if where == "relative" else "/qmp"))
            os.write(said, b"x")
            signal.pause()
            here.close()
        finally:
            os._exit(1)
    try:
        assert os.read(ready, 1)
        shared = SharedPaths(child, [])
        shared.before_new()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["qmp", "qmp.old"]
        (tmp_path / "qmp").unlink()
        with listen(tmp_path / "qmp"):
            shared.new_listens()
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            (tmp_path / "qmp").unlink()
            shared.old_has_ended()  # although its root is gone with it
            assert answers(tmp_path / "qmp")
        assert [path.name for path in tmp_path.iterdir()] == ["qmp"]
        shared.close()
    finally:
        os.close(ready)
        os.close(said)


# What killed helpers leave beside a monitor


def _left(place: Path, name: str, mark: str | None = None) -> Path:
    """As a helper that was killed an hour ago leaves it."""
    left = place / f".cprd-{name}"
    left.mkdir()
    listen(left / "cpr").close()
    if mark is not None:
        (left / MARK).write_text(mark)
    os.utime(left, (0, time.time() - 3600))
    return left


def test_what_a_killed_helper_left_is_swept_by_the_next(tmp_path: Path) -> None:
    old, own = subprocess.Popen(["sleep", "60"]), Process.open(os.getpid())
    assert own is not None
    try:
        process = Process.open(old.pid)
        assert process is not None
        mark = str(process.record()).replace("'", '"')
        process.close()
        swept = [
            _left(tmp_path, "00000001"),
            _left(tmp_path, "00000002", mark.replace(str(old.pid), "999999999")),
        ]
        kept = [
            _left(tmp_path, "00000003", mark),  # `start` may go on from it
            _left(tmp_path, "00000004", "what?"),
            _left(tmp_path, "5"),  # no name of ours
        ]
        young = tmp_path / ".cprd-00000006"
        young.mkdir()
        (tmp_path / ".cprd-00000007").symlink_to(kept[2])
        first = PrivateDirectory(str(tmp_path / "qmp"))
        os.utime(first.path, (0, 0))
        second = PrivateDirectory(str(tmp_path / "qmp"))
        assert [path for path in swept if path.exists()] == []
        assert [path for path in kept if not (path / "cpr").exists()] == []
        assert young.exists()
        assert os.path.exists(first.path), "it is in use"
        first.close()
        second.close()
    finally:
        own.close()
        old.kill()
        old.wait()
    PrivateDirectory(str(tmp_path / "qmp")).close()
    assert not kept[0].exists(), "the QEMU that it told of has ended"

"""What a QEMU is connected to: a server for a single QEMU excludes an upgrade, and `check` says so
by the kernel's word."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cprd.linux import unix_diag
from cprd.qemu import servers
from tests.qemu.conftest import MakeMachine
from tests.qemu.machine import Machine
from tests.qemu.test_check import check, replaced
from tests.qemu.test_same_machine import starts
from tests.support.patience import PATIENCE, until


def refused(vm: Machine, words: list[str], named: str) -> None:
    """An upgrade is refused at once, and the guest goes on."""
    began = time.monotonic()
    done = vm.upgrade(vm.qmp, words)
    assert done.returncode == 1
    assert named in done.stderr
    assert time.monotonic() - began < 10
    vm.goes_on(3)


class Tpm:
    """A real swtpm."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.path = place / "sock"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.place.mkdir(exist_ok=True)
        ctrl = f"type=unixio,path={self.path}"
        self.process = subprocess.Popen(
            ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={self.place}", "--ctrl", ctrl],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        until(self.path.exists, lambda: "swtpm does not listen")

    def has_ended(self) -> bool:
        assert self.process is not None
        return self.process.poll() is not None

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(PATIENCE)


@pytest.fixture
def tpms(tmp_path: Path) -> Iterator[list[Tpm]]:
    if shutil.which("swtpm") is None:
        pytest.skip("wants swtpm: apt-get install swtpm")
    found = [Tpm(tmp_path / name) for name in ("one", "two")]
    try:
        yield found
    finally:
        for each in found:
            each.close()


def test_a_tpm_serves_one_qemu_and_ends_with_it(make_machine: MakeMachine, tpms: list[Tpm]) -> None:
    """A real swtpm listens on while it has a client, and lets the second wait: for 33 s."""
    tpm, other = tpms
    tpm.start()
    assert tpm.process is not None
    vm = make_machine(
        *("-chardev", f"socket,id=t,path={tpm.path}", "-tpmdev", "emulator,id=tpm0,chardev=t"),
        *("-device", "tpm-tis,tpmdev=tpm0"),
    )
    vm.start()
    vm.goes_on(3)
    status, lines = check(vm)
    assert status == 0
    (line,) = (line for line in lines if line.startswith("not by upgrade: "))
    assert f"{tpm.path} (swtpm, pid {tpm.process.pid})" in line
    refused(vm, vm.command, f"{tpm.path}, which serves a single QEMU")
    saved = vm.save()
    assert saved.returncode == 0, saved.stderr
    vm.until(tpm.has_ended, "the end of swtpm")
    assert vm.start().wait(20) != 0
    vm.until(lambda: "held as before" in vm.said(), "held")
    tpm.start()
    starts(vm, vm.command)
    # Another swtpm has a place: the state of the TPM is part of the stream.
    other.start()
    done = vm.upgrade(vm.qmp, replaced(str(tpm.path), str(other.path))(vm.command))
    assert done.returncode == 0, done.stderr
    vm.goes_on(3)
    vm.until(tpm.has_ended, "the end of the first swtpm")


def test_a_server_that_has_stopped_listening_is_found_by_the_kernel(
    make_machine: MakeMachine,
) -> None:
    """It was added by a monitor: no word of the command line names it."""
    vm = make_machine()
    vm.start()
    vm.goes_on(3)
    path = str(vm.place / "server")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        address = {"type": "unix", "data": {"path": path}}
        backend = {"type": "socket", "data": {"addr": address, "server": False}}
        vm.execute("chardev-add", id="late", backend=backend)
        connection, _ = listener.accept()
        assert not [line for line in check(vm)[1] if line.startswith("not by upgrade")]
        words = [*vm.command, "-chardev", f"socket,id=late,path={path}"]
        listener.close()
        (line,) = (line for line in check(vm)[1] if line.startswith("not by upgrade: "))
        assert f"-chardev late is connected to {path}" in line
        refused(vm, words, f"{path}, where nobody listens")
        connection.close()
    assert not [line for line in check(vm)[1] if line.startswith("not by upgrade")]


def test_a_file_with_the_name_of_a_protocol_is_no_disk_server(tmp_path: Path) -> None:
    """And QEMU escapes nothing in the name of an image on a server."""
    path = tmp_path / "a+b%41"

    def drive(name: str) -> dict[str, Any]:
        return {"drive": "d1", "chain": [{"name": name}]}

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        names = [f"nbd+unix:///?socket={path}", "nbd.img", "nbd", "nbd-1/disk.img"]
        greeting = threading.Thread(target=lambda: server.accept()[0].send(b"NBDMAGIC"))
        greeting.start()
        assert servers.full([drive(name) for name in names], os.getpid()) == []
        greeting.join(PATIENCE)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        name = f"nbd://127.0.0.1:{closed.getsockname()[1]}/disk"
        (said,) = servers.full([drive(name)], os.getpid())
        assert name in said


def test_a_disk_server_with_one_place_excludes_an_upgrade(
    make_machine: MakeMachine, tmp_path: Path
) -> None:
    """A real qemu-nbd listens on while its client has the only place, and leaves the next waiting.
    What has asked for a place disturbs nobody who comes later."""
    if shutil.which("qemu-nbd") is None:
        pytest.skip("wants qemu-nbd: apt-get install qemu-utils")
    path, image = tmp_path / "nbd", tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    vm = make_machine(
        *("-drive", f"file=nbd+unix:///?socket={path},format=raw,if=none,id=d1"),
        *("-device", "virtio-blk-pci,drive=d1"),
    )

    def serve(places: int) -> subprocess.Popen[bytes]:
        path.unlink(missing_ok=True)
        words = ["qemu-nbd", "-t", "-f", "raw", "-k", str(path), f"--shared={places}", str(image)]
        server = subprocess.Popen(words, stderr=subprocess.DEVNULL)
        until(path.exists, lambda: "qemu-nbd does not listen")
        return server

    server = serve(1)
    try:
        vm.start()
        vm.goes_on(3)
        status, lines = check(vm)
        assert status == 0, lines
        (line,) = (line for line in lines if line.startswith("not by upgrade: "))
        assert f"disk 'd1' is on nbd+unix://?socket={path}" in line
        refused(vm, vm.command, "qemu-nbd --shared=2")
        assert vm.save().returncode == 0
        starts(vm, vm.command)
        assert vm.save().returncode == 0
        server.kill()
        server.wait(PATIENCE)
        server = serve(2)
        starts(vm, vm.command)
        assert not [line for line in check(vm)[1] if line.startswith("not by upgrade")]
        done = vm.upgrade(vm.qmp, vm.command)
        assert done.returncode == 0, done.stderr
        vm.goes_on(3)
    finally:
        server.kill()
        server.wait(PATIENCE)


VIRTIOFSD = os.environ.get("CPRD_TEST_VIRTIOFSD", "/usr/libexec/virtiofsd")


@pytest.mark.hardware  # as good as: Debian 12 has none
@pytest.mark.full
def test_a_file_system_serves_one_qemu_and_ends_with_it(
    make_machine: MakeMachine, tmp_path: Path
) -> None:
    if not os.path.exists(VIRTIOFSD):
        pytest.skip("wants virtiofsd (Debian 13 has it), or its path in $CPRD_TEST_VIRTIOFSD")
    path = tmp_path / "fs"
    (tmp_path / "shared").mkdir()

    def serve() -> subprocess.Popen[bytes]:
        words = ["--socket-path", str(path), "--shared-dir", str(tmp_path / "shared")]
        server = subprocess.Popen([VIRTIOFSD, *words, "--sandbox=none"], stderr=subprocess.DEVNULL)
        until(path.exists, lambda: "virtiofsd does not listen")
        return server

    server = serve()
    vm = make_machine(
        *("-chardev", f"socket,id=f,path={path}"),
        *("-device", "vhost-user-fs-pci,chardev=f,tag=shared"),
    )
    vm.start()
    vm.goes_on(3)
    status, lines = check(vm)
    assert status == 0, lines
    (line,) = (line for line in lines if line.startswith("not by upgrade: "))
    assert f"{path} (virtiofsd, pid " in line
    refused(vm, vm.command, f"{path}, which serves a single QEMU")
    assert vm.save().returncode == 0
    server.wait(PATIENCE)
    server = serve()
    starts(vm, vm.command)
    assert vm.save().returncode == 0
    server.wait(PATIENCE)


def test_the_kernel_tells_both_ends_of_a_connection(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(path)
        listener.listen()
        client.connect(path)
        server, _ = listener.accept()
        with server:
            every = unix_diag.every()
            assert every is not None
            found = {each.inode: each for each in every}
            ours, theirs, at = (
                os.fstat(each.fileno()).st_ino for each in (client, server, listener)
            )
            assert (found[ours].peer, found[theirs].peer) == (theirs, ours)
            assert (found[theirs].path, found[ours].path) == (path, "")
            assert [found[each].listening for each in (at, theirs, ours)] == [True, False, False]
            there = os.stat(path)
            assert found[theirs].file[1] == there.st_ino & 0xFFFFFFFF

"""All of it without privileges: cprd, cprctl and QEMU as one ordinary user."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.qemu.machine import Machine
from tests.qemu.steps import rows
from tests.qemu.test_overlap import listener, second_names
from tests.support.daemon import answers
from tests.support.others import UID, USER, python_and_path
from tests.support.patience import PATIENCE, until


class Users(Machine):
    """A VM of whose commands each one is run by that user."""

    python = ""

    def argv(self, *words: str) -> list[str]:
        return [*USER, self.python, "-m", "cprd.cli", *words]


@pytest.fixture
def place() -> Iterator[Path]:
    """The user's own directory."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else")
    path = Path(tempfile.mkdtemp(prefix="cprd-user."))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@pytest.fixture
def vm(place: Path) -> Iterator[Users]:
    """The user's VM, and the user's cprd."""
    interpreter, found = python_and_path()
    machine = Users(place, str(place / "run" / "cprd.sock"))
    machine.python = interpreter
    machine.env |= {"HOME": str(place), "PYTHONPATH": found}
    (place / "run").mkdir()
    for path in (place, *place.iterdir()):
        os.chown(path, UID, UID)
    words = [*USER, interpreter, "-m", "cprd.daemon.command", "--socket", machine.daemon]
    with open(place / "cprd.log", "wb") as log:
        daemon = subprocess.Popen(words, env=machine.env, stdout=log, stderr=log)
    try:
        until(lambda: answers(machine.daemon), (place / "cprd.log").read_text)
        yield machine
    finally:
        machine.close()
        daemon.terminate()
        daemon.wait(PATIENCE)


def uid_of(pid: int) -> int:
    return os.stat(f"/proc/{pid}").st_uid


def test_a_guest_outlives_its_qemus_without_any_privilege(vm: Users) -> None:
    vm.start()
    vm.goes_on()
    checked = vm.cprctl("qemu", "check", "--qmp", vm.qmp)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert [uid_of(pid) for pid in vm.alive()] == [UID]

    saved = vm.save()
    assert saved.returncode == 0, saved.stderr
    assert vm.alive() == []
    (row,) = rows(vm)
    assert (row["name"], row["uid"], row["phase"]) == ("vm", UID, "held")

    vm.start()
    vm.goes_on()
    for _ in range(2):
        done = vm.upgrade(vm.qmp, vm.command)
        assert done.returncode == 0, done.stderr
        assert listener(vm.qmp) == vm.alive()[0]
        assert second_names(vm) == []
        vm.goes_on()
    assert rows(vm) == []

    wrong = [word.replace("size=128M", "size=64M") for word in vm.command]
    refused = vm.upgrade(vm.qmp, wrong)
    assert refused.returncode == 1
    assert "the guest runs on in its QEMU" in refused.stderr
    vm.goes_on()
    stopped = vm.cprctl("qemu", "stop", "vm", "--qmp", vm.qmp)
    assert stopped.returncode == 0, stopped.stderr
    vm.start()
    vm.goes_on()
    assert [uid_of(pid) for pid in vm.alive()] == [UID]
    assert [path.name for path in vm.place.iterdir() if path.name.startswith(".cprd-")] == []

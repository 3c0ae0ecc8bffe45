"""All of it without privileges: cprd, cprctl and QEMU as one ordinary user."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.qemu.machine import CHECKOUT, PATIENCE, Machine
from tests.qemu.test_overlap import listener, second_names

UID = 1000
USER = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--inh-caps=-all", "env"]
"""(env: setpriv itself executes what it is given with root's rights to find it.)"""

PATHS = f"{CHECKOUT}:{sysconfig.get_path('purelib')}"


class Users(Machine):
    """A VM of whose commands each one is run by that user."""

    python = ""

    def argv(self, *words: str) -> list[str]:
        return [*USER, self.python, "-m", "cprd.cli", *words]


def python() -> str:
    """An interpreter which that user may run, with all that we need; "" when there is none."""
    for found in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        words = [
            *USER,
            f"PYTHONPATH={PATHS}",
            found,
            "-c",
            "import cprd.daemon.command, cprd.cli",
        ]
        if subprocess.run(words, capture_output=True, check=False, cwd="/").returncode == 0:
            return found
    return ""


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
    interpreter = python()
    if not interpreter:
        pytest.skip(f"uid {UID} may not run {sys.executable} or read {PATHS}: let it")
    machine = Users(place, str(place / "run" / "cprd.sock"))
    machine.python = interpreter
    machine.env |= {"HOME": str(place), "PYTHONPATH": PATHS}
    (place / "run").mkdir()
    for path in (place, *place.iterdir()):
        os.chown(path, UID, UID)
    words = [*USER, interpreter, "-m", "cprd.daemon.command", "--socket", machine.daemon]
    with open(place / "cprd.log", "wb") as log:
        daemon = subprocess.Popen(words, env=machine.env, stdout=log, stderr=log)
    try:
        end = time.monotonic() + PATIENCE
        while not Path(machine.daemon).exists():
            assert daemon.poll() is None, (place / "cprd.log").read_text()
            assert time.monotonic() < end
            time.sleep(0.01)
        yield machine
    finally:
        machine.close()
        daemon.terminate()
        daemon.wait(PATIENCE)


def rows(vm: Machine) -> list[dict[str, Any]]:
    return list(json.loads(vm.cprctl("list", "--json").stdout))


def uid_of(pid: int) -> int:
    return os.stat(f"/proc/{pid}").st_uid


@pytest.mark.hardware  # as good as: a clone and a Python that others may read
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

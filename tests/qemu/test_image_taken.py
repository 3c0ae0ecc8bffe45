"""Another process takes the lock of the image while the guest stands: the guest stays, whole, in
its old QEMU, and nobody says that the guest runs."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.qemu.conftest import MakeMachine
from tests.qemu.machine import Machine
from tests.qemu.steps import Standing, kill, words
from tests.support.patience import PATIENCE


@contextmanager
def image_in_use(vm: Machine, image: Path | None = None) -> Iterator[None]:
    """Another process has the image, with its lock."""
    words = ["qemu-io", "-f", "raw", str(image or vm.disk)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as taker:
        assert taker.stdout is not None
        assert taker.stdout.read(8) == b"qemu-io>"
        try:
            yield
        finally:
            taker.communicate(b"quit\n", timeout=PATIENCE)


def is_free(vm: Machine, image: Path | None = None) -> bool:
    """Whether nobody has the lock of the image."""
    words = ["qemu-io", "-f", "raw", "-c", "quit", str(image or vm.disk)]
    done = subprocess.run(words, capture_output=True, check=False)
    return done.returncode == 0


def stays(
    vm: Machine, status: int, said: str, unharmed: Callable[[], object] | None = None
) -> None:
    """Stopped, with QEMU's words; `cont` is the cure once the image is free."""
    assert status == 1
    assert "runs on" not in said
    assert 'Failed to get shared "write" lock' in said
    assert "`cont` there" in said
    assert len(vm.alive()) == 1
    assert vm.status() == "postmigrate"
    if unharmed is None:
        vm.stands(0.3)
    else:
        unharmed()


@pytest.mark.parametrize("devices", [[], ["-device", "e1000"]])
def test_in_an_upgrade(make_machine: MakeMachine, devices: list[str]) -> None:
    """The main stream of an e1000 does not fit the new QEMU's socket: the old QEMU is in the middle
    of its stream, and would resume, and abort, at a hang-up."""
    vm = make_machine(*devices)
    vm.start()
    vm.goes_on()
    (old,) = vm.alive()
    upgrade = Standing(vm, "qemu-upgrade:prepared", *words(vm, "upgrade"))
    (new,) = (pid for pid in vm.alive() if pid != old)
    os.kill(new, signal.SIGSTOP)
    upgrade.let_go()
    vm.until(lambda: is_free(vm), "the old QEMU lets go of its image")
    with image_in_use(vm):
        kill(new)
        stays(vm, *upgrade.end())
    vm.execute("cont")
    vm.goes_on()


@pytest.mark.parametrize("taken", [True, False])
def test_in_a_save(vm: Machine, taken: bool) -> None:
    save = Standing(vm, "qemu-save:main", *words(vm, "save"))
    assert vm.cprctl("save", vm.name, "--fd", "x=0").returncode == 0  # cprd refuses it now
    if not taken:
        status, said = save.go()
        assert status == 4 or status == 1
        assert "the guest runs on in its QEMU" in said
    else:
        with image_in_use(vm):
            stays(vm, *save.go())
        vm.execute("cont")
    vm.goes_on()

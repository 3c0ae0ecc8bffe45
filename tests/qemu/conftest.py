"""A cprd and VMs of real QEMU for a test."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DaemonProcess
from tests.qemu.machine import QEMU, Machine

MakeMachine = Callable[..., Machine]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if shutil.which(QEMU) is None:
        for item in items:
            if "tests/qemu" in str(item.path):
                item.add_marker(pytest.mark.skip(reason=f"{QEMU} is not installed"))


@pytest.fixture
def make_machine(daemon: DaemonProcess) -> Iterator[MakeMachine]:
    """make_machine(*extra, **options): a VM whose cprd is `daemon`; it ends with the test."""
    with contextlib.ExitStack() as stack:

        def make(*extra: str, **options: Any) -> Machine:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cprd-vm.")))
            place.chmod(0o755)
            machine = Machine(place, daemon.path, *extra, **options)
            stack.callback(machine.close)
            return machine

        yield make


@pytest.fixture
def vm(make_machine: MakeMachine) -> Machine:
    """The usual VM (q35, 128 MiB), booted by `qemu start` from nothing, its guest counting."""
    machine = make_machine()
    machine.start()
    machine.goes_on()
    return machine

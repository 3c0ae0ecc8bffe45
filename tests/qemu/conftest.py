"""A cprd and VMs of real QEMU for a test."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.qemu.linux import Linux, Missing, fetch
from tests.qemu.linux_guest import BOOTING, Guest
from tests.qemu.machine import QEMU, Machine
from tests.qemu.sweep import adopt_orphans
from tests.support.daemon import DaemonProcess

MakeMachine = Callable[..., Machine]
Boot = Callable[..., Guest]


@pytest.fixture(autouse=True, scope="session")
def qemu_is_new() -> None:
    """Skip where there is no QEMU that knows CPR transfer."""
    found = "none"
    if shutil.which(QEMU) is not None and shutil.which("qemu-img") is not None:
        said = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True)
        found = said.stdout.split(" version ")[1].split()[0]
        if int(found.split(".")[0]) >= 10:
            return
    pytest.skip(
        f"wants QEMU 10 or newer, and qemu-img (found: {found}): run tests/run as root once, or"
        " apt-get install qemu-system-x86 qemu-utils (Debian 12: -t bookworm-backports)"
    )


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


@pytest.fixture
def subreaper() -> Iterator[None]:
    """Orphans become our children until the test ends: other tests look at what they leave."""
    adopt_orphans()
    yield
    adopt_orphans(False)


@pytest.fixture(scope="session")
def linux(tmp_path_factory: pytest.TempPathFactory) -> Linux:
    try:
        return fetch(tmp_path_factory.mktemp("linux"))
    except Missing as why:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(why))


@pytest.fixture
def boot(make_machine: MakeMachine, linux: Linux, tmp_path: Path) -> Boot:
    def make(machine: str = "q35", sleep_at: int = 0, *more: str) -> Guest:
        port = tmp_path / "port"
        vm = make_machine(
            *linux.arguments(sleep_at),
            *("-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0"),
            *("-device", "virtio-serial-pci", "-chardev", f"file,id=p0,path={port},append=on"),
            *("-device", "virtserialport,chardev=p0,name=t"),
            *more,
            machine=machine,
            memory="256M",
            smp=2,
            disk="qcow2",
        )
        vm.start()
        guest = Guest(vm, port, cpus=2)
        guest.goes_on(4, BOOTING)
        return guest

    return make

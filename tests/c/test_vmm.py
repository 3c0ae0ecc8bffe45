"""The VMM of examples/c goes from process to process, and the guest does not notice."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest

import cprd
from tests.c.building import NEEDED, SOURCE
from tests.c.conftest import Build
from tests.support.daemon import DaemonProcess
from tests.support.patience import PATIENCE

pytestmark = pytest.mark.xdist_group("c")


PARTS = ["parts/live_read.c", "parts/state.c"]
MOST_LINES = {"cprd.c": 900, "cprd_live.c": 500, "vmm.c": 99, **dict.fromkeys(PARTS, 500)}


def test_one_file_is_enough_for_saved_states(tmp_path: Path) -> None:
    """And the compiler has no word to say."""
    if shutil.which("cc") is None:
        pytest.skip(f"needs cc: apt-get install {NEEDED['gcc']}")
    sources = [str(SOURCE / name) for name in ("vmm.c", "cprd.c")]
    options = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-o", str(tmp_path / "vmm")]
    subprocess.run(["cc", *options, *sources, "-pthread"], check=True, timeout=PATIENCE)


def test_the_library_is_few_files_in_lines_that_fit() -> None:
    paths = [*SOURCE.glob("*.[ch]"), *SOURCE.glob("parts/*")]
    assert {str(path.relative_to(SOURCE)) for path in paths} == {
        *("cprd.h", "cprd.c", "cprd_live.c", "command.c", "vmm.c", *PARTS),
    }
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 100, f"{path.name}:{number}"
    for name, most in MOST_LINES.items():
        assert len((SOURCE / name).read_text().splitlines()) <= most, name


class Vmm:
    def __init__(self, program: str, path: str, nofile: int = 0) -> None:
        """`nofile`: the soft limit of descriptors."""
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        self.process = subprocess.Popen(
            [*(["prlimit", f"--nofile={nofile}:{hard}"] if nofile else []), program, "guest"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "CPRD_SOCKET": path},
        )

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()

    def end(self) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, said


def test_the_guest_goes_on_in_the_next_process(daemon: DaemonProcess, built: Build) -> None:
    program = built("sanitized").vmm
    vmm = Vmm(program, daemon.path)
    assert vmm.says() == "cold boot: RAM 0, device 0"
    for generation in range(3):
        vmm.tell("run")
        assert vmm.says() == f"RAM {generation + 1}, device {generation + 1}"
        vmm.tell("save")
        assert vmm.end() == (0, "")
        vmm = Vmm(program, daemon.path)
        assert vmm.says() == f"restored: RAM {generation + 1}, device {generation + 1}"
    assert vmm.end() == (0, "")
    with daemon.connect() as connection:
        assert connection.list() == []


def test_where_the_hand_over_fails_the_guest_goes_on_where_it_is(
    daemon: DaemonProcess, built: Build
) -> None:
    program = built("sanitized").vmm
    vmm = Vmm(program, daemon.path)
    assert vmm.says() == "cold boot: RAM 0, device 0"
    with daemon.connect() as connection:
        connection.save("guest", cprd.State())
        vmm.tell("save")
        assert vmm.says() == "RAM 1, device 1"  # it goes on
        connection.drop("guest")
        vmm.tell("save")
        code, said = vmm.end()
    assert code == 0
    assert "the guest goes on here: 'guest' is held already" in said
    vmm = Vmm(program, daemon.path)
    assert vmm.says() == "restored: RAM 1, device 1"
    assert vmm.end() == (0, "")


def test_a_hold_without_the_device_is_given_back_and_no_second_guest_starts(
    daemon: DaemonProcess, built: Build
) -> None:
    with daemon.connect() as connection:
        connection.save("guest", cprd.State())
        vmm = Vmm(built("sanitized").vmm, daemon.path)
        assert vmm.end()[0] == 1
        [row] = connection.list()
        assert row["last_reject"] == "no state of the device in it"
        connection.drop("guest")


def test_a_vmm_with_all_descriptors_in_use_is_handed_over_all_the_same(
    daemon: DaemonProcess, built: Build
) -> None:
    """Standard streams, the connection, RAM and the interrupt: 0 to 5."""
    vmm = Vmm(built("pause").vmm, daemon.path, nofile=6)
    assert vmm.says() == "cold boot: RAM 0, device 0"
    vmm.tell("save")
    assert vmm.end() == (0, "")
    vmm = Vmm(built("pause").vmm, daemon.path, nofile=6)
    code, said = vmm.end()
    assert code == 1
    assert "do not fit in this process: its soft RLIMIT_NOFILE is 6" in said
    vmm = Vmm(built("pause").vmm, daemon.path)
    assert vmm.says() == "restored: RAM 0, device 0"
    assert vmm.end() == (0, "")

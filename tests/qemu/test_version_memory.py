"""The QEMU's version is learnt by running it, and remembered only where that cannot go wrong."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from cprd.qemu.command import Command
from cprd.qemu.version import forget, version_of
from tests.qemu.conftest import MakeMachine
from tests.qemu.machine import PATIENCE, QEMU
from tests.qemu.test_failures import rows


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with programs, first on the path; nothing is remembered yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return programs


def script(path: Path, version: str) -> Path:
    """Says that version, and notes that it was asked."""
    path.write_text(f"#!/bin/sh\necho >>{path}.asked\necho QEMU emulator version {version}\n")
    path.chmod(0o755)
    return path


def asked(path: Path) -> int:
    log = path.with_name(f"{path.name}.asked")
    return len(log.read_text().splitlines()) if log.exists() else 0


def remembered(place: Path) -> list[str]:
    file = place.parent / "cache" / "cprd" / "qemu-versions"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize(
    "wrappers",
    [
        [],
        ["prlimit", "--core=0"],
        ["taskset", "-c", "0"],
        ["nice", "-n", "1", "setpriv", "--no-new-privs"],
    ],
)
def test_a_program_that_can_be_told_is_asked_once(place: Path, wrappers: list[str]) -> None:
    command = Command([*wrappers, QEMU, "-nodefaults"])
    version = version_of(command)
    (line,) = remembered(place)
    assert line.startswith(".".join(map(str, version)) + " ")
    assert version_of(command) == version
    assert remembered(place) == [line]
    forget(command)
    assert remembered(place) == []
    assert version_of(command) == version


def test_another_file_under_the_same_name_is_asked_anew(place: Path) -> None:
    """A package upgrade: another inode; or the same one, written anew: another mtime."""
    name = "qemu-system-x86_64"
    program = place / name
    found = shutil.which(QEMU)
    assert found is not None
    shutil.copy2(found, program)
    command = Command([str(program)])
    version = version_of(command)
    old = program.stat()
    shutil.copy2(program, place / "new")
    (place / "new").rename(program)
    assert program.stat().st_mtime_ns == old.st_mtime_ns
    assert version_of(command) == version
    os.utime(program, (1, 1))
    assert version_of(command) == version
    assert len(remembered(place)) == 3


@pytest.mark.parametrize(
    ("wrappers", "name"),
    [
        ([], "vmm"),  # called otherwise: which of the words is the program?
        (["taskset", "-c", "0"], "vmm"),
        ([], "qemu-system-x86_64"),  # a script
        (["prlimit", "--core=0"], "qemu-system-x86_64"),
    ],
)
def test_what_may_be_another_qemu_tomorrow_is_asked_each_time(
    place: Path, wrappers: list[str], name: str
) -> None:
    program = script(place / name, "11.1.3")
    command = Command([*wrappers, str(program)])
    assert version_of(command) == (11, 1, 3)
    assert version_of(command) == (11, 1, 3)
    assert asked(program) == 2
    assert remembered(place) == []
    script(program, "10.0.2")  # the same file
    assert version_of(command) == (10, 0, 2)


@pytest.mark.parametrize("wrapper", ["chroot", "env", "bwrap", "sudo", "ip", "wrap"])
@pytest.mark.parametrize("behind", [[], ["prlimit", "--core=0"]])
def test_a_wrapper_that_may_look_elsewhere_is_asked_each_time(
    place: Path, wrapper: str, behind: list[str]
) -> None:
    program = script(place / wrapper, "11.1.3")
    command = Command([*behind, str(program), "x", QEMU])
    for _ in range(2):
        assert version_of(command) == (11, 1, 3)
    assert asked(program) == 2
    assert remembered(place) == []


def test_a_qemu_of_another_version_behind_the_same_wrapper_is_started(
    make_machine: MakeMachine,
) -> None:
    """What was learnt of one program is not believed of the next."""
    vm = make_machine()
    vm.start()
    vm.goes_on()
    assert vm.save().returncode == 0
    newer, here = vm.place / "vmm11", vm.place / "vmm"
    run = f'exec {QEMU} "$@"\n'
    here.write_text(f"#!/bin/sh\n{run}")
    newer.write_text(
        '#!/bin/sh\ncase "$*" in *-version*) echo QEMU emulator version 11.1.3; exit;; esac\n' + run
    )
    for program in (newer, here):
        program.chmod(0o755)
    rest = vm.command[vm.command.index(QEMU) + 1 :]
    wrong = vm.start(command=["taskset", "-c", "0", str(newer), *rest])
    assert wrong.wait(PATIENCE) != 0  # it says that it is newer, and does not know our words
    vm.until(lambda: rows(vm)[0]["phase"] == "held", "held again")
    vm.start(command=["taskset", "-c", "0", str(here), *rest])
    vm.goes_on()
    assert rows(vm) == []

"""A plain clone on a machine that has Python and nothing else: tools/bootstrap.py and what follows.

Each test has a clone of its own, whose pyproject.toml asks for one package, `held`, and whose
cprctl needs it. Its wheel lies in a directory that pip is pointed to, so that the real venv and the
real pip run without any network.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.checkout import CHECKOUT

PROJECT = """[project]
dependencies = ["held"]
optional-dependencies = { all = ["held"], qemu = ["held"], more = ["held>=1"], none = ["held>=2"] }
scripts = { cprctl = "cprd.cli:main" }
"""
CPRCTL = """import sys


def main():
    print("cprctl", *sys.argv[1:])
    return 3
"""


class Clone:
    """A clone in `path`; `environment` is what its commands are run with."""

    def __init__(self, path: Path) -> None:
        self.path = path
        package = path / "cprd"
        package.mkdir()
        shutil.copy(CHECKOUT / "cprd/__main__.py", package)
        (path / "tools").mkdir()
        shutil.copy(CHECKOUT / "tools/bootstrap.py", path / "tools")
        (package / "__init__.py").write_text("import held\n")
        (package / "trio.py").write_text("raise ImportError('taken for the package trio')\n")
        (package / "cli.py").write_text(CPRCTL)
        (path / "pyproject.toml").write_text(PROJECT)
        wheels = path / "wheels"
        wheels.mkdir()
        with zipfile.ZipFile(wheels / "held-1.0-py3-none-any.whl", "w") as wheel:
            info = "held-1.0.dist-info"
            wheel.writestr("held.py", "")
            wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: held\nVersion: 1.0\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
        self.environment = os.environ | {
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(wheels),
        }

    def command(self, *extras: str) -> list[str]:
        return [sys.executable, "-I", str(self.path / "tools/bootstrap.py"), *extras]

    def prepare(self, *extras: str) -> subprocess.CompletedProcess[str]:
        return self.run(*self.command(*extras))

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=self.environment, cwd="/", capture_output=True, text=True, check=False
        )

    def hide(self, *modules: str) -> None:
        """Have the Pythons that bootstrap.py starts lack MODULES, as Debian's own does. (Without
        ensurepip an environment costs a third.)"""
        place = self.path / "hidden"
        place.mkdir()
        for module in modules:
            (place / f"{module}.py").write_text("raise ImportError('not packaged with Python')\n")
        self.environment["PYTHONPATH"] = str(place)


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_a_python_without_our_packages_makes_an_environment_and_goes_on_in_it(clone: Clone) -> None:
    cprctl = [sys.executable, "-S", str(clone.path / "cprd"), "load", "x y"]  # -S: no packages
    first = clone.run(*cprctl)
    assert (first.returncode, first.stdout) == (3, "cprctl load x y\n"), first.stderr
    assert "installing into" in first.stderr
    assert "held 1.0" in first.stderr
    assert clone.run(*cprctl).stderr == "", "the second start had something to do"
    installed = clone.run(str(clone.path / ".venv/bin/cprctl"), "load", "x y")
    assert (installed.returncode, installed.stdout) == (3, first.stdout), installed.stderr


def test_neither_venv_nor_pip_nor_root_says_what_to_install(clone: Clone) -> None:
    clone.hide("ensurepip", "pip")
    clone.environment["PATH"] = str(clone.path)  # no apt-get, should this be root
    done = clone.prepare()
    assert (done.returncode, done.stdout) == (1, "")
    assert "apt-get install python3-venv" in done.stderr
    assert not (clone.path / ".venv").exists()


def test_pip_without_venv_s_own_pip_fills_the_environment(clone: Clone) -> None:
    clone.hide("ensurepip")
    done = clone.prepare()
    assert done.returncode == 0, done.stderr
    assert "installed: held 1.0\n" in done.stderr, "pip went into the environment as well"


def test_killed_half_way_it_is_done_again(clone: Clone) -> None:
    clone.hide("ensurepip")
    with subprocess.Popen(clone.command(), env=clone.environment, stderr=subprocess.PIPE) as half:
        assert half.stderr is not None
        assert b"making" in half.stderr.readline()
        os.kill(half.pid, signal.SIGKILL)
    done = clone.prepare()
    assert done.returncode == 0, done.stderr
    assert clone.run(done.stdout.strip(), "-c", "import held, cprd").returncode == 0


def test_two_starts_at_once_make_one_environment(clone: Clone) -> None:
    clone.hide("ensurepip")
    starts = [
        subprocess.Popen(
            clone.command(), env=clone.environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    answers = [start.communicate() for start in starts]
    assert [start.returncode for start in starts] == [0, 0], answers
    assert sum(b"making" in stderr for _, stderr in answers) == 1


def test_an_index_without_our_packages_is_a_failure_the_second_time_as_well(clone: Clone) -> None:
    clone.hide("ensurepip")
    assert clone.prepare("none").returncode == 1
    done = clone.prepare("none")
    assert (done.returncode, done.stdout) == (1, "")
    assert "pip could not install" in done.stderr
    assert clone.prepare("more").returncode == 0
    assert clone.prepare().stderr == "", "less than what is there needs nothing new"


def test_somebody_else_s_environment_is_left_alone(clone: Clone) -> None:
    theirs = clone.path / ".venv/precious"
    theirs.parent.mkdir()
    theirs.write_text("work of days")
    done = clone.prepare()
    assert done.returncode == 1
    assert "move it out of the way" in done.stderr
    assert theirs.read_text() == "work of days"


def test_no_module_is_left_out_of_the_wheel() -> None:
    """setuptools packs folders with an __init__.py only, and leaves others out without a word."""
    folders = {path.parent for path in (CHECKOUT / "cprd").rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]

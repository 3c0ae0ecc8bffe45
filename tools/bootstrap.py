"""What a plain clone needs before anything else of cprd can be imported: an environment with the
packages that pyproject.toml asks for. Nothing but the standard library is used here, and each thing
that gets installed is named on stderr first.

    python3 tools/bootstrap.py [EXTRA ...]

prints the path of the Python to use. Exit status: 0 ready; 1 not, and a line says what to install.

The environment is `.venv` in the clone or, where the clone cannot be written to, a directory under
$XDG_CACHE_HOME/cprd (~/.cache/cprd). Removing that directory undoes all but the apt package. Debian
guards its own Python against pip (PEP 668) and ships `ensurepip` apart from it, so there are three
ways in: venv with a pip of its own; venv filled by the pip that there is; as root, python3-venv by
apt, and then the first way.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from importlib import metadata

CLONE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OLDEST_PYTHON = (3, 11)
STAMP = "made-by-cprd"
SCRIPT = """#!{python}
import sys

from {module} import {function}

sys.exit({function}())
"""


class CannotPrepare(Exception):
    """No environment can be made here; the message says what to install."""


def say(text: str) -> None:
    print(f"cprd: {text}", file=sys.stderr, flush=True)


def works(*command: str) -> bool:
    """Whether COMMAND can be run and exits with 0; its output is dropped."""
    nothing = subprocess.DEVNULL
    try:
        return not subprocess.call(command, stdin=nothing, stdout=nothing, stderr=nothing)
    except OSError:
        return False


def run(*command: str) -> bool:
    """Whether COMMAND exits with 0; all that it prints goes to stderr. It inherits the lock: should
    this process be killed, the next one waits for what COMMAND still does."""
    return not subprocess.call(command, stdin=subprocess.DEVNULL, stdout=2, close_fds=False)


def environment(extras: list[str]) -> str:
    """The path of a Python that has cprd's packages and those of EXTRAS; made when need be.

    Two callers at once wait for each other. Raises CannotPrepare.
    """
    if sys.version_info < OLDEST_PYTHON:
        found = ".".join(map(str, sys.version_info[:3]))
        raise CannotPrepare(f"this is Python {found}; start it with a python3 of 3.11 or newer")
    wanted, scripts = read_project(extras)
    where = place()
    python = os.path.join(where, "bin", "python")
    contents = [f"{sys.version_info[0]}.{sys.version_info[1]} {CLONE}", *sorted(wanted)]
    contents += [f"{name} = {entry}" for name, entry in scripts.items()]  # they may move
    if holds_all(where, contents):
        return python
    os.makedirs(os.path.dirname(where), exist_ok=True)
    lock = os.open(CLONE, os.O_RDONLY | os.O_DIRECTORY)
    os.set_inheritable(lock, True)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not holds_all(where, contents):
            fill(where, wanted)
            settle(where, scripts)
            # As pip does for what it installs: a guest waits while cprctl is compiled.
            run(python, "-m", "compileall", "-q", os.path.join(CLONE, "cprd"))
            with open(os.path.join(where, STAMP), "w", encoding="utf-8") as file:
                file.write("\n".join(contents) + "\n")
    finally:
        os.close(lock)
    return python


def read_project(extras: list[str]) -> tuple[list[str], dict[str, str]]:
    """What pyproject.toml asks for: packages, those of EXTRAS too; and script -> entry point."""
    import tomllib

    try:
        with open(os.path.join(CLONE, "pyproject.toml"), "rb") as file:
            project = tomllib.load(file)["project"]
    except FileNotFoundError:
        raise CannotPrepare(
            "packages that cprd needs are missing from this Python: pip install msgpack trio rich"
        ) from None
    wanted: list[str] = [*project["dependencies"]]
    for extra in extras:
        wanted += _expanded(project["optional-dependencies"], extra)
    return wanted, project["scripts"]


def _expanded(optional: dict[str, list[str]], extra: str) -> list[str]:
    """The packages of one extra, with those of the extras of cprd that the extra names."""
    wanted: list[str] = []
    for package in optional[extra]:
        if package.startswith("cprd["):
            for other in package[len("cprd[") : -1].split(","):
                wanted += _expanded(optional, other)
        else:
            wanted.append(package)
    return wanted


def place() -> str:
    """Where the environment lies, or is to lie."""
    inside = os.path.join(CLONE, ".venv")
    if os.access(CLONE, os.W_OK):
        return inside
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(home, "cprd", hashlib.sha256(CLONE.encode()).hexdigest()[:12])


def holds_all(where: str, contents: list[str]) -> bool:
    """Whether the environment was completed for this Python and clone, with at least CONTENTS."""
    try:
        with open(os.path.join(where, STAMP), encoding="utf-8") as file:
            return set(contents) <= set(file.read().splitlines())
    except OSError:
        return False


def fill(where: str, wanted: list[str]) -> None:
    """Make the environment if it is not there, and have pip add WANTED. Raises CannotPrepare."""
    python = os.path.join(where, "bin", "python")
    pip = find_pip(python)
    if pip is None:
        make(where)
        pip = find_pip(python)
    if pip is None:
        raise CannotPrepare(f"there is no working pip in {where}: install python3-pip")
    say(f"installing into {where} with pip: {', '.join(wanted)}, and what these need in turn")
    if not run(*pip, "install", "--quiet", *wanted):
        raise CannotPrepare(
            "pip could not install them (above it says why); as root Debian's own packages will do "
            "for the demo: apt-get install python3-msgpack python3-trio python3-rich"
        )


def find_pip(python: str) -> list[str] | None:
    """The command of a pip that installs for PYTHON; None if PYTHON or any pip is missing."""
    version = f"({sys.version_info[0]}, {sys.version_info[1]})"
    if not works(python, "-c", f"import sys; sys.exit(sys.version_info[:2] != {version})"):
        return None
    for pip in ([python, "-m", "pip"], [sys.executable, "-m", "pip", "--python", python]):
        if works(*pip, "--version"):
            return pip
    return None


def make(where: str) -> None:
    """Make an empty environment, with pip in it if that can be. Raises CannotPrepare."""
    if os.path.exists(where):
        if os.listdir(where) and not os.path.exists(os.path.join(where, STAMP)):
            raise CannotPrepare(f"{where} is not of this Python's making: move it out of the way")
        shutil.rmtree(where)
    if not works(sys.executable, "-c", "import ensurepip"):
        if works(sys.executable, "-m", "pip", "--version"):
            return start(where, "--without-pip")
        install_venv()
    return start(where)


def start(where: str, *options: str) -> None:
    say(f"making a Python environment: {where}")
    os.makedirs(where)
    with open(os.path.join(where, STAMP), "w", encoding="utf-8"):
        pass  # ours from the first moment on, so that a start that was interrupted may be redone
    if not run(sys.executable, "-m", "venv", *options, where):
        raise CannotPrepare("venv failed (above it says why): install python3-venv and try again")


def install_venv() -> None:
    """As root on Debian and its kin: python3-venv by apt. Raises CannotPrepare."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise CannotPrepare(
            "this Python has neither venv nor pip: as root, apt-get install python3-venv "
            "(elsewhere, the package with Python's ensurepip), and try again; for the demo and "
            "cprctl, Debian's own packages will do: python3-msgpack python3-trio python3-rich"
        )
    say("installing with apt-get, for venv and pip are missing here: python3-venv")
    os.environ.setdefault("DEBIAN_FRONTEND", "noninteractive")
    run("apt-get", "-q", "update")
    run("apt-get", "-q", "-y", "--no-install-recommends", "install", "python3-venv")
    if not works(sys.executable, "-c", "import ensurepip"):
        raise CannotPrepare(f"python3-venv did not reach {sys.executable} (above it says why)")


def settle(where: str, scripts: dict[str, str]) -> None:
    """Make the clone importable in the environment, write its commands, say what lies there."""
    library = os.path.join(
        where, "lib", f"python{sys.version_info[0]}.{sys.version_info[1]}", "site-packages"
    )
    with open(os.path.join(library, "cprd-clone.pth"), "w", encoding="utf-8") as file:
        file.write(CLONE + "\n")
    python = os.path.join(where, "bin", "python")
    for name, entry in scripts.items():
        module, function = entry.split(":")
        path = os.path.join(where, "bin", name)
        with open(path, "w", encoding="utf-8") as file:
            file.write(SCRIPT.format(python=python, module=module, function=function))
        os.chmod(path, 0o755)
    there = sorted(f"{d.name} {d.version}" for d in metadata.distributions(path=[library]))
    say(f"installed: {', '.join(there)}")


def main() -> int:
    try:
        print(environment(sys.argv[1:]))
    except (CannotPrepare, OSError) as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

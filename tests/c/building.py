"""The client in C, built: each kind once a run, in a directory of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.checkout import CHECKOUT
from tests.support.patience import patience

SOURCE = CHECKOUT / "examples/c"
NEEDED = {"gcc": "gcc libc6-dev", "clang": "clang libclang-rt-dev libc6-dev", "make": "make"}
PAUSE = f"PAUSE={CHECKOUT / 'tests/c/pause.c'}"
KINDS = {
    "plain": [],
    "pause": [PAUSE],
    "sanitized": ["SANITIZE=1", "CFLAGS=-g"],
    "small": [PAUSE, "SMALL=1"],
    "sanitized small": ["SANITIZE=1", PAUSE, "SMALL=1", "CFLAGS=-g"],
}


class Programs:
    """cprd-c and vmm in `place`."""

    def __init__(self, place: Path) -> None:
        self.command = str(place / "cprd-c")
        self.vmm = str(place / "vmm")

    def run(
        self, path: str, *words: str, stdin: str = "", fds: tuple[int, ...] = (), status: int = 0
    ) -> str:
        """What cprd-c prints, connected to the cprd at `path`; where `status` is another one than
        0, what cprd-c says on stderr. `fds` are inherited."""
        done = self.start(path, *words, stdin=stdin, fds=fds)
        assert done.returncode == status, (done.returncode, done.stderr)
        return done.stderr if status else done.stdout

    def start(
        self, path: str, *words: str, stdin: str, fds: tuple[int, ...]
    ) -> subprocess.CompletedProcess[str]:
        """As run, whatever the status."""
        return subprocess.run(
            [self.command, *words],
            input=stdin,
            text=True,
            capture_output=True,
            env={**os.environ, "CPRD_SOCKET": path},
            pass_fds=fds,
            timeout=patience(60),
            check=False,
        )


def build(place: Path, kind: str, compiler: str = "gcc") -> Programs:
    """Build the programs; skips where a compiler is absent."""
    for tool in (compiler, "make"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}: apt-get install {NEEDED[tool]}")
    place.mkdir()
    done = subprocess.run(
        ["make", "-s", "-C", str(SOURCE), f"CC={compiler}", f"OUT={place}", *KINDS[kind]],
        capture_output=True,
        text=True,
        timeout=patience(120),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return Programs(place)

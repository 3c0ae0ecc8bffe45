"""Programs in namespaces of their own, as a container runtime starts them: unshare(1) and maps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.keep.keeping import children, environment
from tests.support.patience import PATIENCE

ALL = ("--user", "--pid", "--mount", "--net", "--ipc", "--uts")

# `say` and `hear` are lines to and from a test. A uid of another mapping is taken after all of cprd
# is imported, for that uid may not be able to read it, and without exec, which takes capabilities.
START = """
import os, resource, signal, socket, sys
import cprd, cprd.bundle.layout, cprd.bundle.inspect, cprd.linux.stale
from cprd.errors import *

def say(*words):
    print(*words, flush=True)

def hear():
    return sys.stdin.readline().strip()

if sys.argv.pop(1) == "map":
    import ctypes
    assert ctypes.CDLL(None).unshare(0x10000000) == 0  # CLONE_NEWUSER
    say("in")
    hear()
    os.setgid(0)
    os.setuid(0)
"""


class Inside:
    """A Python program in new namespaces. close() ends all that runs in there."""

    def __init__(
        self,
        code: str,
        *namespaces: str,
        socket: str = "",
        outer: int | None = None,
        arguments: tuple[str, ...] = (),
    ) -> None:
        """`outer`: the uid out here that uid 0 of the new user namespace is, which needs root; else
        it is our own. `socket`: where cprd.connect() finds cprd."""
        by_itself = outer is not None
        own = [name for name in namespaces if name != "--user" or not by_itself]
        mapped = ["--map-root-user"] if "--user" in own else []
        self.process = subprocess.Popen(
            [
                *("unshare", *own, *mapped, "--fork", "--kill-child"),
                *(sys.executable, "-c", START + code, "map" if by_itself else "", *arguments),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(**({"CPRD_SOCKET": socket} if socket else {})),
        )
        if by_itself:
            assert self.hears() == "in"
            for name in ("gid_map", "uid_map"):
                Path(f"/proc/{self.pid}/{name}").write_text(f"0 {outer} 1000\n")
            self.tell()

    @property
    def pid(self) -> int:
        """Of the program, as seen from here."""
        return children(self.process.pid)[0]

    def hears(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def tell(self, line: str = "") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def wait(self) -> int:
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


def missing(*namespaces: str) -> str:
    """Why such namespaces cannot be had here; "" if they can."""
    mapped = ["--map-root-user"] if "--user" in namespaces else []
    command = ["unshare", *namespaces, *mapped, "--fork", "true"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"unshare(1) of util-linux: {error}"
    return "" if said.returncode == 0 else f"namespaces of one's own: {said.stderr.strip()}"

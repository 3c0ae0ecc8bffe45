"""cprctl as a user calls it, for a test's cprd."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.support.checkout import CHECKOUT
from tests.support.daemon import DaemonProcess
from tests.support.patience import PATIENCE

CPRCTL = [sys.executable, "-m", "cprd.cli"]


def environment(daemon: DaemonProcess, **extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(CHECKOUT), "CPRD_SOCKET": daemon.path, **extra}


def cprctl(
    daemon: DaemonProcess,
    *words: str,
    fds: Sequence[int] = (),
    nofile: str = "",
    cwd: Path | None = None,
    **extra: str,
) -> subprocess.CompletedProcess[str]:
    """To its end. `fds` are passed on; `nofile`: soft:hard RLIMIT_NOFILE; `extra` goes into the
    environment."""
    prefix = ["prlimit", f"--nofile={nofile}"] if nofile else []
    return subprocess.run(
        [*prefix, *CPRCTL, *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=environment(daemon, **extra),
        cwd=cwd,
        pass_fds=fds,
        check=False,
    )


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody has, to listen at."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])

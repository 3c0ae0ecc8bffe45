"""`cprctl show` beside a file whose server has died in all but name.

A real FUSE file system, which stops answering once its file is open: a stat of that file hangs, and
so does every close.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.checkout import CHECKOUT
from tests.support.daemon import DaemonProcess
from tests.support.patience import PATIENCE, in_time

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root"),
    pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="no /dev/fuse"),
]
SAVE = """
import os, signal, sys
import cprd
state = cprd.State()
state.save_fd("foreign", 0, os.open(sys.argv[1], os.O_RDONLY))
with cprd.connect() as daemon:
    daemon.save("web", state)
print("saved", flush=True)
signal.pause()
"""


TAKE = """
import os
import cprd
with cprd.connect() as daemon, daemon.load("web") as claim:
    fd = claim.state.take_fd("foreign", 0)
print("taken", flush=True)
os.close(fd)
"""


@pytest.fixture
def ended_last(daemon: DaemonProcess, tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that end after the file system, whose end unblocks whoever hangs in it. The first
    has saved the file as "web", and has it open."""
    directory = tmp_path / "mute"
    directory.mkdir()
    program = CHECKOUT / "tests" / "support" / "mute_file_system.py"
    server = start(daemon, str(program), str(directory))
    if not said(server):
        server.communicate()
        pytest.skip("this root may not mount a FUSE file system")
    saver = start(daemon, "-c", SAVE, str(directory / "file"))
    processes = [saver]
    try:
        assert said(server) == "open"
        assert said(saver) == "saved"
        yield processes
    finally:
        end(server)
        for process in processes:
            end(process)
        ctypes.CDLL(None).umount2(str(directory).encode(), 2)  # MNT_DETACH


def start(daemon: DaemonProcess, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "CPRD_SOCKET": daemon.path},
    )


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate(timeout=PATIENCE)


def test_show_answers_although_the_file_hangs_whoever_closes_it(
    daemon: DaemonProcess, ended_last: list[subprocess.Popen[str]]
) -> None:
    begun = time.monotonic()
    show = start(daemon, "-m", "cprd.cli", "show", "web", "--json")
    out, err = show.communicate(timeout=PATIENCE)  # all who have its stdout end
    assert in_time(time.monotonic() - begun, 10)
    assert show.returncode == 0, err
    (found,) = json.loads(out)["descriptors"]
    assert found["name"] == "foreign"
    assert found["what"].endswith("/mute/file, read-only")
    # And it does hang whoever closes it, or all this would prove nothing.
    taker = start(daemon, "-c", TAKE)
    ended_last.append(taker)
    assert said(taker) == "taken"
    with pytest.raises(subprocess.TimeoutExpired):
        taker.wait(0.5)

"""The FUSE daemon of the page: killed with a request in its hands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.recipes.recipe import Recipe
from tests.support.daemon import DaemonProcess
from tests.support.patience import PATIENCE, until

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("nothing_leaks")]

WORDS = b"hello from the daemon\n"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A mount point, unmounted at the end."""
    if os.getuid() or not os.path.exists("/dev/fuse"):
        pytest.skip("needs root and /dev/fuse (modprobe fuse)")
    where = tmp_path / "mount"
    where.mkdir()
    yield where
    subprocess.run(["umount", "-l", str(where)], check=False, capture_output=True)


def reader(file: Path) -> subprocess.Popen[bytes]:
    """A process that reads the file, and may hang."""
    command = [sys.executable, "-c", f"import sys; sys.stdout.write(open({str(file)!r}).read())"]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def test_a_mounted_file_system_outlives_its_daemon(
    daemon: DaemonProcess, tmp_path: Path, place: Path
) -> None:
    file = place / "hello"
    with Recipe("fuse.py", daemon, tmp_path, str(place)) as fuse:
        until(file.exists, lambda: "not mounted")
        assert file.read_bytes() == WORDS
        assert os.listdir(place) == ["hello"]
        with file.open("rb") as opened:
            for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
                fuse.kill(number)
                waiting = [reader(file) for _ in range(3)]  # nobody answers
                fuse.start()
                for each in waiting:
                    assert each.communicate(timeout=PATIENCE)[0] == WORDS
                opened.seek(0)
                assert opened.read() == WORDS


def test_a_request_that_was_read_and_not_answered_comes_again(
    daemon: DaemonProcess, tmp_path: Path, place: Path
) -> None:
    file = place / "hello"
    with Recipe("fuse.py", daemon, tmp_path, str(place)) as fuse:
        until(file.exists, lambda: "not mounted")
        usual = fuse.script.read_text()
        answering = "        body = answer("
        stopping = "        kind == READ and os.kill(os.getpid(), 19)\n"
        slow = usual.replace(answering, stopping + answering)
        assert slow != usual
        fuse.kill()
        fuse.script.write_text(slow)  # stops with a request in its hands
        fuse.start()
        assert fuse.process is not None
        waiting = reader(file)
        os.waitid(os.P_PID, fuse.process.pid, os.WSTOPPED | os.WNOWAIT)
        fuse.script.write_text(usual)
        fuse.again()
        assert waiting.communicate(timeout=PATIENCE)[0] == WORDS

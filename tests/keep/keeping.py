"""cprd under --keep, to be stopped at its pause points, killed there, and asked again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

from tests.support.checkout import CHECKOUT
from tests.support.descriptors import open_fds
from tests.support.keeping import Kept, program
from tests.support.patience import PATIENCE, until

# Of a parent that keeps nothing: three streams, the listening socket, the socket for messages, and
# both ends of the pipe that signals come by.
OWN_FDS = 7
DROPPED = ("CPRD_", "LISTEN_", "NOTIFY_SOCKET", "JOURNAL_STREAM", "FDSTORE", "WATCHDOG_")


def environment(**more: str) -> dict[str, str]:
    """Ours, without what a manager may have given us."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(DROPPED)}
    return {**kept, "PYTHONPATH": str(CHECKOUT), **more}


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class KeptByParent(Kept):
    """`parent` is the process that was started; `pid` is cprd's. Owns both until close()."""

    def __init__(self, place: Path, *arguments: str, settings: str = "") -> None:
        """`settings`: Python that cprd's program runs at start."""
        self.place = place
        place.chmod(0o755)
        (place / "cprd-test.py").write_text(program(str(place)))
        if settings:
            self.settings(settings)
        self.path = str(place / "cprd.sock")
        self.log = place / "log"
        self.env = environment(CPRD_SOCKET=self.path)
        with open(self.log, "ab") as log:
            self.parent = subprocess.Popen(
                [sys.executable, str(place / "cprd-test.py"), "--keep", *arguments],
                stderr=log,
                env=self.env,
            )
        self.pid = 0
        self.await_start()

    def await_start(self) -> None:

        def started() -> bool:
            if f"ready pid={self._child()} " in self.said():
                return True
            assert self.parent.poll() is None, self.said()
            return self._stands_in_its_start()

        until(started, self.said)
        self.pid = self._child()

    def _child(self) -> int:
        """The cprd that is there, if it is another one than `pid`."""
        found = children(self.parent.pid)
        return found[0] if found and found[0] != self.pid else 0

    def _stands_in_its_start(self) -> bool:
        child = self._child()
        if not child or not (self.place / "pause-at-start").exists():
            return False
        before, self.pid = self.pid, child
        stands = self.stands()
        self.pid = before
        return stands

    def said(self) -> str:
        return self.log.read_text()

    def stored(self) -> int:
        return open_fds(self.parent.pid) - OWN_FDS

    def client(
        self,
        program: str,
        *arguments: str,
        user: str | None = None,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
    ) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", program, *arguments]
        return subprocess.Popen(command, user=user, stdout=stdout, stderr=stderr, env=self.env)

    def kill_client(self, child: subprocess.Popen[bytes]) -> None:
        child.kill()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask the parent to end. Returns its exit status."""
        self.parent.send_signal(number)
        return self.parent.wait(PATIENCE)

    def close(self) -> None:
        """End both, whatever state they are in."""
        if self.parent.poll() is None:
            found = children(self.parent.pid)
            self.parent.kill()
            for child in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            self.parent.wait()

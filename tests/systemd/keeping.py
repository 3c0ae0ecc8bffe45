"""A cprd in its own unit, to be stopped at its pause points, killed there, and asked again.

The unit is the one that we ship; only its program is another (tests/support/keeping.py). The tests
speak to it from outside the machine, through its socket.
"""

from __future__ import annotations

import signal
import subprocess
from typing import IO

from tests.support.keeping import SMALL, Kept, Task, Thing, program, things
from tests.support.patience import until

from .machine import Machine, MachineError
from .ours import install

__all__ = ["SMALL", "UNIT", "Keeping", "Task", "Thing", "things"]

UNIT = "cprd.service"


class Keeping(Kept):
    """cprd in a booted machine, with its unit started."""

    def __init__(self, machine: Machine, *, settings: str = "", drop_in: str = "") -> None:
        """`settings`: Python that its program runs at start. `drop_in`: for the unit."""
        self.machine = machine
        install(machine)
        self.place = machine.root / "run/cprd"
        (machine.root / "run/boot/cprd-test.py").write_text(program("/run/cprd"))
        if settings:
            self.settings(settings)
        machine.unit(
            f"{UNIT}.d/test.conf",
            "[Service]\nExecStart=\nExecStart=test-python /run/boot/cprd-test.py\n"
            f"RestartSec=20ms\n{drop_in}",
        )
        machine.systemctl("start", "cprd.socket", UNIT)
        self.path = str(self.place / "cprd.sock")
        self.pid = machine.main_pid(UNIT)

    def await_start(self) -> None:
        """Wait for another main process than the one before."""

        def started() -> bool:
            try:
                pid = self.machine.main_pid(UNIT)
            except (MachineError, OSError):
                return False
            if pid in (0, self.pid):
                return False
            self.pid = pid
            return True

        until(started, lambda: self.said()[-3000:])

    def said(self) -> str:
        return self.machine.journal(UNIT)

    def stored(self) -> int:
        return int(self.machine.show(UNIT, "NFileDescriptorStore"))

    def client(
        self,
        program: str,
        *arguments: str,
        user: str | None = None,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
    ) -> subprocess.Popen[bytes]:
        file = self.machine.root / "run/boot/client.py"
        file.write_text(program)
        line = ("test-python", "/run/boot/client.py", *arguments)
        return self.machine.popen(*line, user=user, stdout=stdout, stderr=stderr)

    def kill_client(self, child: subprocess.Popen[bytes]) -> None:
        self.machine.signal(child, signal.SIGKILL)

    def systemctl(self, *arguments: str) -> None:
        self.machine.systemctl(*arguments)
        self.pid = self.machine.main_pid(UNIT)

"""A real cprd in which a few lines of Python run first: to make shelves small, or a task fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.daemon import DaemonProcess

PROGRAM = """
import sys
import cprd.daemon.running
{lines}
from cprd.daemon.command import main
sys.exit(main())
"""


class Seeded(DaemonProcess):
    """`lines` run at each start, also when the daemon executes itself anew."""

    def __init__(self, place: Path, lines: str, **options: Any) -> None:
        self.lines = lines
        super().__init__(place, **options)

    def start(self) -> None:
        at = self.command.index("-m") if "-m" in self.command else self.command.index("-c")
        self.command[at : at + 2] = ["-c", PROGRAM.format(lines=self.lines)]
        super().start()

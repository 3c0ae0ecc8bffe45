"""A real QEMU with the test guest: its command line, its life, and what its serial log proves."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cprd.qemu.monitor import Monitor
from tests.qemu.guest import boot_sector
from tests.support.checkout import CHECKOUT
from tests.support.patience import PATIENCE, rest, until

QEMU = os.environ.get("CPRD_TEST_QEMU", "qemu-system-x86_64")
T = TypeVar("T")

_LINE = re.compile(r"([0-9A-F]{8}) ([0-9A-F]{8})( DIFF)?([WE])?")


class Machine:
    """One VM by name: its directory, its command line, every QEMU it ever had."""

    def __init__(
        self,
        place: Path,
        daemon: str,
        *extra: str,
        name: str = "vm",
        machine: str = "q35",
        memory: str = "128M",
        smp: int = 1,
        disk: str = "raw",
        options: str = "aux-ram-share=on",
        backend: str = "memory-backend-memfd",
        share: str = "on",
        wrappers: Sequence[str] = (),
    ) -> None:
        self.place = place
        self.name = name
        self.daemon = daemon
        self.log = place / "serial.log"
        self.qmp = str(place / "qmp")
        self.disk = place / f"disk.{disk}"
        if not self.disk.exists():
            raw = place / "disk.new"
            raw.write_bytes(boot_sector().ljust(1 << 20, b"\0"))
            if disk == "raw":
                raw.rename(self.disk)
            else:
                subprocess.run(
                    ["qemu-img", "convert", "-f", "raw", "-O", disk, raw, self.disk], check=True
                )
        self.command = [
            *wrappers,
            QEMU,
            "-accel",
            "tcg",
            "-machine",
            f"{machine},memory-backend=ram0,{options}",
            "-object",
            f"{backend},id=ram0,size={memory},share={share}",
            "-m",
            memory,
            "-smp",
            str(smp),
            "-nodefaults",
            "-display",
            "none",
            "-chardev",
            f"file,id=s0,path={self.log},append=on",
            "-serial",
            "chardev:s0",
            "-drive",
            f"file={self.disk},format={disk},if=none,id=d0",
            "-device",
            "virtio-blk-pci,drive=d0,bootindex=1",
            "-qmp",
            f"unix:{self.qmp},server=on,wait=off",
            *extra,
        ]
        env = {k: v for k, v in os.environ.items() if not k.startswith(("CPRD_", "NOTIFY_"))}
        self.env = {**env, "CPRD_SOCKET": daemon, "PYTHONPATH": str(CHECKOUT)}
        self.processes: list[subprocess.Popen[bytes]] = []
        self.err = place / "stderr"

    # cprctl

    def argv(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "cprd.cli", *words]

    def cprctl(
        self, *words: str, env: dict[str, str] | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.argv(*words),
            env={**self.env, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def popen(self, *words: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """`cprctl` in the background; `said` has what it says."""
        with open(self.err, "ab") as err:
            return subprocess.Popen(
                self.argv(*words),
                env={**self.env, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=err,
                stderr=err,
            )

    def save(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.cprctl("qemu", "save", self.name, "--qmp", self.qmp, *words, **options)

    def start(
        self, *words: str, env: dict[str, str] | None = None, command: Sequence[str] | None = None
    ) -> subprocess.Popen[bytes]:
        """`cprctl qemu start`: the process that becomes the QEMU."""
        words = ("qemu", "start", self.name, *words, "--", *(command or self.command))
        self.processes.append(self.popen(*words, env=env))
        return self.processes[-1]

    def upgrade(self, qmp: str, command: Sequence[str], **options: Any) -> Any:
        words = ("qemu", "upgrade", self.name, "--qmp", qmp, "--", *command)
        return self.cprctl(*words, **options)

    def said(self) -> str:
        return self.err.read_text(errors="replace") if self.err.exists() else ""

    # The guest

    def lines(self) -> list[str]:
        """Whole lines of the serial log."""
        if not self.log.exists():
            return []
        return self.log.read_text(errors="replace").split("\n")[:-1]

    def boots(self) -> int:
        """How often the guest was booted. (A QEMU that was killed may have left half a line.)"""
        return self.log.read_text(errors="replace").count("BOOT") if self.log.exists() else 0

    def ticks(self) -> int:
        """The guest's last tick, 0 before the first."""
        lines = self.lines()
        found = _LINE.fullmatch(lines[-1]) if lines else None
        return int(found[1], 16) if found else 0

    def goes_on(self, ticks: int = 20) -> int:
        """Wait until the guest has counted so many ticks more; its count. Nothing may be wrong."""
        goal = self.ticks() + ticks
        self.until(lambda: self.ticks() >= goal, f"tick {goal}")
        self.unharmed()
        return self.ticks()

    def unharmed(self) -> None:
        """One BOOT; each tick once and in order; RAM and register agree; no write failed."""
        lines = self.lines()
        assert lines[:1] == ["BOOT"], f"the log begins with {lines[:1]}"
        for at, line in enumerate(lines[1:], 1):
            found = _LINE.fullmatch(line)
            assert found, f"line {at}: {line!r}"
            assert not found[3], f"RAM and register differ at line {at}: {line!r}"
            assert int(found[1], 16) == at, f"line {at} says {line!r}: a gap or a repeat"
            assert found[4] != "E", f"a write failed at line {at}"

    def stands(self, seconds: float) -> None:
        """The guest does not count for so long."""
        before = self.ticks()
        rest(seconds)  # nothing to wait for: this is about what does not happen
        assert self.ticks() == before

    def until(self, true: Callable[[], object], what: str) -> None:
        until(true, lambda: f"never {what}; tick {self.ticks()}; {self.said()[-2000:]}")

    # Its QEMUs

    def alive(self) -> list[int]:
        """The pids of all QEMUs of this VM, found by their command lines."""
        found = []
        needle = os.fsencode(str(self.place))
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            try:
                words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
                state = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            is_qemu = any(os.path.basename(word).startswith(b"qemu-system") for word in words[:1])
            if is_qemu and state != "Z" and any(needle in word for word in words):
                found.append(int(entry))
        return found

    def status(self, qmp: str | None = None) -> str:
        return str(self.ask(lambda monitor: monitor.status(), qmp))

    def execute(self, command: str, **arguments: Any) -> Any:
        return self.ask(lambda monitor: monitor.execute(command, **arguments))

    def ask(self, question: Callable[[Monitor], Any], qmp: str | None = None) -> Any:
        where = qmp or self.qmp
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(where)
        except BaseException:
            sock.close()
            raise
        monitor = Monitor.over(sock, where)  # whoever's QEMU it is
        try:
            return question(monitor)
        finally:
            monitor.close()

    def await_status(self, status: str) -> None:
        self.until(lambda: self._status() == status, f"status {status}, is {self._status()}")

    def _status(self) -> str:
        try:
            return self.status()
        except Exception as error:  # (not there yet)
            return type(error).__name__

    def close(self) -> None:
        for pid in self.alive():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait(PATIENCE)

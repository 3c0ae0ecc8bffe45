"""cprctl at one of its steps, and what a QEMU and cprd have to do with it then."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from pathlib import Path
from typing import Any

from cprd.qemu.process import Process
from tests.qemu.machine import Machine
from tests.support.patience import PATIENCE


def rows(vm: Machine) -> list[dict[str, Any]]:
    return list(json.loads(vm.cprctl("list", "--json").stdout))


def settings(vm: Machine) -> tuple[Any, Any]:
    """What a hand-over changes in a QEMU, and has to put back."""
    return (
        vm.execute("query-migrate-parameters")["mode"],
        vm.execute("query-migrate-capabilities"),
    )


def words(vm: Machine, verb: str) -> list[str]:
    """`save` or `upgrade` of this VM."""
    rest = ["--", *vm.command] if verb == "upgrade" else []
    return ["qemu", verb, vm.name, "--qmp", vm.qmp, *rest]


def kill(pid: int) -> None:
    """SIGKILL, and wait until all of it has ended: its threads too."""
    end = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        assert select.select([end], [], [], PATIENCE)[0]
    finally:
        os.close(end)


class Standing:
    """A cprctl that stands at a step until `go`."""

    def __init__(self, vm: Machine, step: str, *command: str) -> None:
        self.process = subprocess.Popen(
            vm.argv(*command),
            env={**vm.env, "CPRD_PAUSE": step},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        found = os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert found is not None
        if found.si_code == os.CLD_EXITED:
            raise AssertionError(f"it ended before {step}: {self.process.communicate()}")
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def let_go(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def go(self) -> tuple[int, str]:
        """To its end: exit status, and what it said on stderr."""
        self.let_go()
        return self.end()

    def end(self) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=2 * PATIENCE)
        return self.process.returncode, said


def guard_named_by(qemu: int) -> Process:
    """The guard that reads the stderr of a QEMU; the caller's."""
    environment = Path(f"/proc/{qemu}/environ").read_bytes().split(b"\0")
    (mark,) = (entry for entry in environment if entry.startswith(b"CPRD_GUARD="))
    guard = Process.open(int(mark.partition(b"=")[2].partition(b":")[0]))
    assert guard is not None
    return guard

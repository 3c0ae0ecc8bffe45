"""`cprctl qemu stop` says that a guest has ended only when it has; and what is to be done with one
that it can neither save nor shut down."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from cprd.qemu.process import command_line
from tests.qemu.machine import Machine
from tests.qemu.steps import Standing, guard_named_by, kill, rows, words
from tests.support.daemon import DaemonProcess
from tests.support.others import USER, python_and_path
from tests.support.patience import PATIENCE, rest


def stop(vm: Machine, qmp: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    wait = ("--powerdown-timeout", "2")
    return vm.cprctl("qemu", "stop", vm.name, "--qmp", qmp or vm.qmp, *wait, env=env)


def test_it_ends_after_the_guard_that_reads_the_stderr_of_qemu(vm: Machine) -> None:
    """Beside which systemd, told SendSIGKILL=no, would start no other QEMU."""
    assert vm.upgrade(vm.qmp, vm.command).returncode == 0
    (qemu,) = vm.alive()
    guard = guard_named_by(qemu)
    vm.until(lambda: command_line(guard.pid) == ["cat"], "the guard as cat")
    os.kill(guard.pid, signal.SIGSTOP)
    process = vm.popen("qemu", "stop", vm.name, "--qmp", vm.qmp)
    try:
        vm.until(lambda: not vm.alive(), "the end of QEMU")
        rest(0.3)  # in which it must not end
        assert process.poll() is None
    finally:
        os.kill(guard.pid, signal.SIGCONT)
    assert process.wait(PATIENCE) == 0, vm.said()
    assert guard.ended()
    guard.close()


def test_its_monitor_is_not_for_us(vm: Machine) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    interpreter, path = python_and_path()
    os.chmod(vm.qmp, 0o600)
    done = subprocess.run(
        [*USER, interpreter, "-m", "cprd.cli", "qemu", "stop", vm.name, "--qmp", vm.qmp],
        env={**vm.env, "PYTHONPATH": path},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Permission denied" in done.stderr
    vm.goes_on()


@pytest.mark.parametrize("wrong", ["nowhere/qmp", "x" * 108])
def test_the_path_is_no_monitors(vm: Machine, wrong: str) -> None:
    done = stop(vm, str(vm.place / wrong))
    assert done.returncode == 1, done.stderr
    assert wrong[:60] in done.stderr
    vm.goes_on()


def test_the_units_main_process_lives_but_not_at_that_path(vm: Machine) -> None:
    (pid,) = vm.alive()
    wrong = str(vm.place / "mistyped")
    done = stop(vm, wrong, MAINPID=str(pid))
    assert done.returncode == 1
    assert f"the unit's main process (pid {pid}) lives" in done.stderr.lower()
    vm.goes_on()
    kill(pid)
    for main in (str(pid), "0", ""):
        assert stop(vm, MAINPID=main).returncode == 0


def test_a_guest_that_was_handed_over_and_of_which_nothing_is_held(
    vm: Machine, daemon: DaemonProcess
) -> None:
    """cprd, which kept it in memory only, has been killed and has forgotten it. The guest stands in
    its QEMU; nobody but the operator can know that it runs nowhere else."""
    standing = Standing(vm, "qemu-save:completed", *words(vm, "save"))
    standing.process.kill()
    standing.end()
    daemon.restart()
    assert vm.status() == "postmigrate"
    saved = vm.save()
    assert saved.returncode == 1
    assert "nothing is held under 'vm'" in saved.stderr
    assert "by `cont`" in saved.stderr
    stopped = stop(vm)
    assert stopped.returncode == 1
    assert "by `cont`" in stopped.stderr
    assert "cannot see a power button" in stopped.stderr
    vm.execute("cont")
    vm.goes_on()
    assert vm.save().returncode == 0
    assert [row["phase"] for row in rows(vm)] == ["held"]
    vm.start()
    vm.goes_on()

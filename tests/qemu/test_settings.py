"""Every migration setting that a QEMU has, of whatever version, one by one: a hand-over works, or
`check` names the setting."""

from __future__ import annotations

from typing import Any

import pytest

from cprd.qemu.errors import MonitorRefused
from tests.qemu.conftest import MakeMachine
from tests.qemu.machine import Machine
from tests.qemu.test_check import check
from tests.qemu.test_same_machine import starts

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]


def attempt(vm: Machine, command: str, **arguments: Any) -> bool:
    """Whether QEMU takes the setting at all."""
    try:
        vm.execute(command, **arguments)
    except MonitorRefused:
        return False
    return True


def other(name: str, value: Any) -> list[Any]:
    """Values to try instead: QEMU takes one of them, as a rule."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value // 2, value * 2, 1]
    if name == "tls-creds":
        return ["nobody"]
    return ["zlib", "ignore", "cpr-reboot", "legacy", "x", ""]


def goes_through(vm: Machine, name: str) -> bool:
    """The guest goes through a hold; or check names the setting, and the guest goes on."""
    status, lines = check(vm)
    if status:
        assert name in " ".join(lines), (name, lines)
        assert vm.save().returncode == 1
        vm.goes_on(3)
        return False
    saved = vm.save()
    assert saved.returncode == 0, f"{name}: {saved.stderr}"
    starts(vm, vm.command)
    return True


def test_each_capability(make_machine: MakeMachine) -> None:
    vm = make_machine()
    vm.start()
    vm.goes_on()
    rows = vm.execute("query-migrate-capabilities")
    taken = []
    for row in rows:
        name = row["capability"]
        changed = {"capability": name, "state": not row["state"]}
        if attempt(vm, "migrate-set-capabilities", capabilities=[changed]):
            assert goes_through(vm, name), name
            taken.append(name)
    print(f"{len(taken)} of {len(rows)} capabilities:", *taken)
    assert {"return-path", "events", "x-ignore-shared", "postcopy-ram", "multifd"} <= set(taken)


def test_each_parameter(make_machine: MakeMachine) -> None:
    vm = make_machine()
    vm.start()
    vm.goes_on()
    before = vm.execute("query-migrate-parameters")
    taken, named = [], []
    for name, value in before.items():
        for each in other(name, value):
            if attempt(vm, "migrate-set-parameters", **{name: each}):
                if goes_through(vm, name):
                    taken.append(name)
                else:
                    named.append(name)
                    assert attempt(vm, "migrate-set-parameters", **{name: value})
                break
    print(f"{len(taken)} of {len(before)} parameters:", *taken, "; named:", *named)
    assert {"mode", "max-bandwidth", "downtime-limit"} <= set(taken)
    assert named == ["tls-creds"]

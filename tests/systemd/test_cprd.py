"""The daemon in the unit that we ship, as the user that we ship it for."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import pytest

from tests.support.patience import until

from .conftest import Boot
from .machine import Machine
from .ours import install

SAVE = """
import os, socket, sys, cprd
with cprd.connect() as daemon:
    state = cprd.State()
    state.save_fd("event", 0, os.eventfd(7))
    state.save_fd("listener", 0, socket.create_server(("127.0.0.1", 0)))
    state["words"] = {"tally": 42}
    print(daemon.save(sys.argv[1], state, require="store").kept)
"""
LOAD = """
import os, sys, cprd
with cprd.connect() as daemon:
    with daemon.load(sys.argv[1], wait=20) as claim:
        state = claim.state
        value = os.eventfd_read(state.find_fd("event", 0))
        print(value, state["words"], len(list(state.fds())))
"""


@pytest.fixture
def machine(systemd: Machine) -> Machine:
    """With cprd installed and started."""
    install(systemd)
    (systemd.root / "run/boot/save.py").write_text(SAVE)
    (systemd.root / "run/boot/load.py").write_text(LOAD)
    systemd.systemctl("start", "cprd.socket", "cprd.service")
    return systemd


def save(machine: Machine, name: str, user: str | None = None) -> None:
    assert machine.run("test-python", "/run/boot/save.py", name, user=user) == "store\n"


def load(machine: Machine, name: str, user: str | None = None) -> str:
    return machine.run("test-python", "/run/boot/load.py", name, user=user).strip()


def names(machine: Machine) -> dict[str, str]:
    rows = json.loads(machine.run("cprctl", "list", "--json"))
    return {row["name"]: row["phase"] for row in rows}


def status(machine: Machine) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(machine.run("cprctl", "status", "--json"))
    return found


WHOLE = "7 {'tally': 42} 2"


def test_holds_of_several_users_survive_kill_9_restart_and_reload(machine: Machine) -> None:
    save(machine, "web")
    save(machine, "web", user="daemon")
    save(machine, "web", user="nobody")  # /proc of others is hidden from the unit
    os.kill(machine.main_pid("cprd.service"), signal.SIGKILL)
    save(machine, "second")  # waits for the next cprd, without an error
    machine.systemctl("restart", "cprd.service")
    pid = machine.main_pid("cprd.service")
    machine.systemctl("reload", "cprd.service")
    assert machine.main_pid("cprd.service") == pid
    machine.systemctl("daemon-reexec")
    assert load(machine, "web", user="daemon") == WHOLE
    assert load(machine, "web", user="nobody") == WHOLE
    assert load(machine, "web") == WHOLE
    assert load(machine, "second") == WHOLE
    machine.systemctl("restart", "cprd.service")
    assert names(machine) == {}


def test_stopped_and_started_the_holds_are_there_from_254_on(machine: Machine) -> None:
    save(machine, "web")
    machine.systemctl("stop", "cprd.socket", "cprd.service")
    machine.systemctl("start", "cprd.socket", "cprd.service")
    assert names(machine) == ({"web": "held"} if machine.version >= 254 else {})


def test_the_end_says_how_many_holds_a_stop_ends(systemd: Machine) -> None:
    """As user cprd, from within the hardened unit; where D-Bus is there, systemd can be asked."""
    install(systemd)
    (systemd.root / "run/boot/save.py").write_text(SAVE)
    systemd.systemctl("start", "cprd.socket", "cprd.service")
    save(systemd, "web")
    save(systemd, "mail")
    systemd.systemctl("restart", "cprd.service")
    said = systemd.await_journal("^stopping signal=SIGTERM.*", "cprd.service")
    if systemd.version < 254:
        assert said.endswith("lost_unless_restarted=2")
    else:  # without D-Bus the unit's settings are root's to see
        assert said.endswith('systemd does not say whether the store outlives a stop"')
    assert names(systemd) == {"web": "held", "mail": "held"}


@pytest.mark.parametrize("preserve", ["yes", "restart"])
def test_the_end_knows_a_store_that_outlives_a_stop(boot_systemd: Boot, preserve: str) -> None:
    machine = boot_systemd(bus=True)
    install(machine)
    (machine.root / "run/boot/save.py").write_text(SAVE)
    machine.unit(
        "cprd.service.d/preserve.conf", f"[Service]\nFileDescriptorStorePreserve={preserve}\n"
    )
    machine.systemctl("start", "cprd.socket", "cprd.service")
    save(machine, "web")
    machine.systemctl("restart", "cprd.service")
    said = machine.await_journal("^stopping signal=SIGTERM.*", "cprd.service")
    outlives = preserve == "yes" and machine.version >= 254
    lost = "" if outlives else " lost_unless_restarted=1"
    assert said == f"stopping signal=SIGTERM{lost}"


def test_a_reload_with_a_broken_configuration_leaves_the_old_one_running(machine: Machine) -> None:
    """With the unit as it stands: what is checked is what would be read."""
    save(machine, "web")
    configuration = machine.root / "etc/cprd/cprd.toml"
    configuration.write_text("[limits]\nholds = 7\n")
    pid = machine.main_pid("cprd.service")
    machine.systemctl("reload", "cprd.service")
    assert status(machine)["limits"]["holds"] == 7
    configuration.write_text("[limits]\nnonsense = 1\n")
    refused, words = machine.attempt("systemctl", "reload", "cprd.service")
    assert refused != 0, words
    assert "limits.nonsense" in machine.journal("cprd.service")
    assert machine.main_pid("cprd.service") == pid
    assert machine.show("cprd.service", "ActiveState") == "active"
    assert status(machine)["limits"]["holds"] == 7
    assert load(machine, "web") == WHOLE


def test_without_a_store_the_daemon_says_memory(systemd: Machine) -> None:
    install(systemd)
    systemd.unit("cprd.service.d/none.conf", "[Service]\nFileDescriptorStoreMax=0\n")
    systemd.systemctl("start", "cprd.socket", "cprd.service")
    assert status(systemd)["kept"] == "memory"
    assert systemd.show("cprd.service", "StatusText") == "0 holds, kept: memory"


@pytest.mark.parametrize("program", ["/run/boot/missing", "false"])
def test_a_version_that_does_not_start_loses_nothing_while_it_is_tried(
    machine: Machine, program: str
) -> None:
    save(machine, "web")
    broken = machine.unit(
        "cprd.service.d/broken.conf", f"[Service]\nExecStart=\nExecStart={program}\n"
    )
    machine.attempt("systemctl", "restart", "cprd.service")
    machine.await_journal("restart counter is at 8", "cprd.service")
    broken.unlink()
    machine.systemctl("daemon-reload")
    assert load(machine, "web") == WHOLE


def test_a_cprd_that_the_watchdog_ends_loses_nothing(systemd: Machine) -> None:
    install(systemd)
    (systemd.root / "run/boot/save.py").write_text(SAVE)
    (systemd.root / "run/boot/load.py").write_text(LOAD)
    systemd.unit("cprd.service.d/watchdog.conf", "[Service]\nWatchdogSec=1s\n")
    systemd.systemctl("start", "cprd.socket", "cprd.service")
    save(systemd, "web")
    os.kill(systemd.main_pid("cprd.service"), signal.SIGSTOP)
    systemd.await_journal("Watchdog timeout", "cprd.service")
    assert load(systemd, "web") == WHOLE


def test_the_socket_alone_starts_it(systemd: Machine) -> None:
    install(systemd)
    (systemd.root / "run/boot/save.py").write_text(SAVE)
    systemd.systemctl("start", "cprd.socket")
    assert systemd.show("cprd.service", "ActiveState") == "inactive"
    save(systemd, "web")
    assert names(systemd) == {"web": "held"}
    assert systemd.show("cprd.service", "ActiveState") == "active"


def test_each_socket_of_the_unit_is_served_and_the_rest_named(systemd: Machine) -> None:
    install(systemd)
    systemd.unit(
        "cprd.socket.d/more.conf",
        "[Socket]\nListenSequentialPacket=/run/cprd/second.sock\nListenStream=/run/cprd/stream\n",
    )
    systemd.systemctl("start", "cprd.socket", "cprd.service")
    for path in ("/run/cprd/second.sock", "/run/cprd/cprd.sock"):
        said = systemd.run("cprctl", "--socket", path, "list", "--json")
        assert json.loads(said) == []
    systemd.await_journal("not-served name=cprd.socket .*/run/cprd/stream", "cprd.service")


def test_systemctl_status_says_how_many_are_held_and_where(machine: Machine) -> None:
    save(machine, "web")
    machine.systemctl("restart", "cprd.service")
    assert machine.show("cprd.service", "StatusText") == "1 holds, kept: store"
    (machine.root / "etc/cprd/cprd.toml").write_text("[limits]\nnonsense = 1\n")
    os.kill(machine.main_pid("cprd.service"), signal.SIGHUP)
    machine.await_journal("reload-refused", "cprd.service")

    def said() -> str:
        return machine.show("cprd.service", "StatusText")

    until(lambda: said().startswith("reload refused"), said)

"""What can go wrong with a hand-over, and where the guest is then: in one QEMU, or held, never in
two."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

import cprd
from cprd.qemu.command import Command
from tests.qemu.conftest import MakeMachine
from tests.qemu.machine import Machine
from tests.qemu.steps import rows, settings
from tests.qemu.sweep import kill_where_it_stops, stopped
from tests.support.daemon import DaemonProcess
from tests.support.patience import PATIENCE

# Save


def test_nobody_answers_at_cprds_socket(vm: Machine, daemon: DaemonProcess) -> None:
    before = settings(vm)
    daemon.stop()
    saved = vm.save()
    assert saved.returncode == 1
    assert "cprd" in saved.stderr
    vm.goes_on()
    assert settings(vm) == before


def test_cprd_refuses_for_want_of_room_and_the_settings_are_put_back(
    make_machine: MakeMachine, start_daemon: Callable[..., DaemonProcess]
) -> None:
    small = start_daemon(config="[limits]\nholds = 1\n")
    vm = make_machine()
    vm.env["CPRD_SOCKET"] = small.path
    vm.start()
    vm.goes_on()
    with cprd.connect(small.path) as daemon:
        daemon.save("other", cprd.State())
    before = settings(vm)
    saved = vm.save()
    assert saved.returncode == 1
    assert "quota" in saved.stderr or "holds" in saved.stderr, saved.stderr
    assert "the guest runs on in its QEMU" in saved.stderr
    assert settings(vm) == before
    vm.goes_on()


@pytest.mark.parametrize("where", ["qemu-save:cpr", "qemu-save:main", "qemu-save:prepared"])
def test_cprd_is_killed_in_the_middle_of_a_save(
    vm: Machine, daemon: DaemonProcess, where: str
) -> None:
    saving = vm.popen("qemu", "save", "vm", "--qmp", vm.qmp, env={"CPRD_PAUSE": where})
    os.waitid(os.P_PID, saving.pid, os.WSTOPPED)
    daemon.restart()
    saving.send_signal(signal.SIGCONT)
    saving.wait(PATIENCE)
    if saving.returncode == 0:  # it found the new cprd, and began anew there
        assert vm.alive() == []
        vm.start()
    vm.goes_on()
    assert len(vm.alive()) == 1
    assert rows(vm) == []


def test_the_name_is_taken_by_something_else(vm: Machine, daemon: DaemonProcess) -> None:
    with daemon.connect() as connection:
        connection.save("vm", cprd.State())
    saved = vm.save()
    assert saved.returncode == 4
    assert "held already" in saved.stderr
    vm.goes_on()
    assert vm.save("--replace").returncode == 0
    vm.start()
    vm.goes_on()


def test_another_client_has_the_monitor(vm: Machine) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(vm.qmp)
        other.recv(4096)
        saved = vm.save()
    assert saved.returncode == 4
    assert "one client at a time" in saved.stderr
    vm.goes_on()


def test_no_qemu_listens_at_the_monitors_path(vm: Machine) -> None:
    saved = vm.cprctl("qemu", "save", "vm", "--qmp", str(vm.place / "nowhere"))
    assert saved.returncode == 1
    assert "no QEMU listens there" in saved.stderr


@pytest.mark.parametrize(
    ("options", "cure"),
    [({"share": "off"}, "share=on"), ({"options": "aux-ram-share=off"}, "aux-ram-share=on")],
)
def test_memory_that_cannot_travel_is_refused_with_its_cure(
    make_machine: MakeMachine, options: dict[str, Any], cure: str
) -> None:
    vm = make_machine(**options)
    vm.start()
    vm.goes_on()
    saved = vm.save()
    assert saved.returncode == 1
    assert cure in saved.stderr
    checked = vm.cprctl("qemu", "check", "--qmp", vm.qmp)
    assert checked.returncode == 1
    assert cure in checked.stdout
    vm.goes_on()


@pytest.mark.usefixtures("subreaper")
def test_a_save_dies_between_prepare_and_shut_and_then_its_qemu_dies(vm: Machine) -> None:
    saving = vm.popen(
        "qemu", "save", "vm", "--qmp", vm.qmp, env={"CPRD_PAUSE": "qemu-save:prepared"}
    )
    kill_where_it_stops(saving)
    vm.goes_on(500)  # five seconds that are not in what is held
    os.kill(vm.alive()[0], signal.SIGKILL)
    vm.until(lambda: not vm.alive(), "the end of QEMU")
    again = vm.start()
    assert again.wait(PATIENCE) == 4
    assert "--force" in vm.said()
    assert vm.alive() == []
    assert rows(vm)[0]["phase"] == "in-doubt"


def test_migrations_are_set_to_use_tls(vm: Machine) -> None:
    vm.execute("object-add", **{"qom-type": "tls-creds-anon", "id": "t0", "endpoint": "client"})
    vm.execute("migrate-set-parameters", **{"tls-creds": "t0"})
    before = settings(vm)
    saved = vm.save()
    assert saved.returncode == 1
    assert "tls-creds=t0" in saved.stderr
    assert settings(vm) == before
    vm.goes_on()


# Start


def test_a_guest_that_its_user_paused_stays_paused(vm: Machine) -> None:
    vm.execute("stop")
    assert vm.save().returncode == 0
    vm.start()
    vm.await_status("paused")
    vm.stands(0.5)
    vm.until(lambda: rows(vm) == [], "the end of the hold")
    vm.execute("cont")
    vm.goes_on()


def test_what_was_confirmed_cannot_be_started_again(vm: Machine) -> None:
    assert vm.save().returncode == 0
    vm.start()
    vm.goes_on()
    second = vm.start()
    assert second.wait(PATIENCE) == 1  # nothing is held; it is seen that a QEMU runs here
    assert "listens at" in vm.said()
    vm.goes_on()


def test_start_without_cprd_boots_nothing(make_machine: MakeMachine, daemon: DaemonProcess) -> None:
    vm = make_machine()
    daemon.stop()
    assert vm.start().wait(PATIENCE) == 1
    assert vm.alive() == []
    assert vm.lines() == []
    vm.start("--cold")
    vm.goes_on()


def _changed(vm: Machine, old: str, new: str) -> list[str]:
    assert any(old in word for word in vm.command)
    return [word.replace(old, new) for word in vm.command]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("128M", "64M", "ram0"),
        ("q35,", "pc,", "Machine type pc-q35"),
        ("id=ram0", "id=ram1", "ram"),
        ("virtio-blk-pci,drive=d0", "virtio-blk-pci,drive=d0,addr=0x9", "in the old QEMU"),
        ("qemu-system-x86_64", "/nonexistent/qemu-system-x86_64", "No such file"),
        ("-nodefaults", "-nonsense", "nonsense"),
    ],
)
def test_a_command_that_does_not_fit_costs_nothing_and_says_why(
    vm: Machine, old: str, new: str, said: str
) -> None:
    assert vm.save().returncode == 0
    wrong = vm.start(command=_changed(vm, old, new))
    assert wrong.wait(PATIENCE) != 0
    vm.until(lambda: rows(vm)[0]["phase"] == "held", "held again")
    assert said in vm.said()
    if "qemu-system" not in old:
        assert said in rows(vm)[0]["last_reject"] or "version" in rows(vm)[0]["last_reject"]
    vm.start()
    vm.goes_on()


def test_the_old_qemu_is_killed_in_the_middle_of_an_upgrade(vm: Machine) -> None:
    (old,) = vm.alive()
    words = ("qemu", "upgrade", "vm", "--qmp", vm.qmp, "--", *vm.command)
    process = vm.popen(*words, env={"CPRD_PAUSE": "qemu-upgrade:completed"})
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    os.kill(old, signal.SIGKILL)
    process.send_signal(signal.SIGCONT)
    assert process.wait(PATIENCE) == 0  # it was no longer needed
    vm.goes_on()
    assert rows(vm) == []


def test_the_image_is_locked_by_somebody(vm: Machine) -> None:
    assert vm.save().returncode == 0
    locker = subprocess.Popen(
        ["qemu-io", "-f", "raw", str(vm.disk)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert locker.stdout is not None
    locker.stdout.read(8)  # its prompt: it has the image
    process = vm.start()
    assert process.wait(PATIENCE) != 0
    vm.until(lambda: rows(vm)[0]["phase"] == "held", "held again")
    assert "lock" in rows(vm)[0]["last_reject"]
    locker.communicate(b"quit\n")
    vm.start()
    vm.goes_on()


@pytest.mark.usefixtures("subreaper")
@pytest.mark.parametrize("where", ["listening", "cpr", "main", "loaded", "begun", "disarmed"])
def test_the_new_qemu_is_killed_while_it_is_being_given_the_state(vm: Machine, where: str) -> None:
    assert vm.save().returncode == 0
    process = vm.start(env={"CPRD_PAUSE": f"qemu-start:{where}"})
    helper = stopped()
    process.kill()
    process.wait(PATIENCE)
    os.kill(helper, signal.SIGCONT)
    vm.until(lambda: rows(vm)[0]["phase"] in ("held", "in-doubt"), "the end of the claim")
    vm.until(lambda: rows(vm)[0]["claimant"] is None, "the end of the helper")
    force = rows(vm)[0]["phase"] == "in-doubt"
    assert not force, rows(vm)  # it had not been told to run
    vm.start()
    vm.goes_on()


def test_half_a_stream_is_held(vm: Machine, daemon: DaemonProcess) -> None:
    assert vm.save().returncode == 0
    with daemon.connect() as connection:
        with connection.load("vm") as claim:
            state = cprd.State()
            for name, id, fd in claim.state.fds():
                state.save_fd(name, id, fd)
            for key in claim.state:
                state[key] = claim.state[key]
            state["main"] = bytes(claim.state["main"])[:60_000]
            claim.confirm(next=state, after_exit=False)
    assert vm.start().wait(PATIENCE) != 0
    vm.until(lambda: rows(vm)[0]["phase"] == "held", "held again")
    assert rows(vm)[0]["last_reject"]
    assert vm.alive() == []


@pytest.mark.parametrize("option", ["-daemonize", "-S", "-incoming", "-loadvm", "-snapshot"])
def test_options_that_cannot_be_are_refused_with_a_reason(option: str) -> None:
    with pytest.raises(cprd.InvalidInput, match=option):
        Command(["qemu-system-x86_64", "-m", "1G", option, "x"])


# Upgrade


@pytest.mark.parametrize(
    ("old", "new", "said"), [("128M", "64M", "ram0"), ("q35,", "pc,", "Machine type")]
)
def test_an_upgrade_to_what_does_not_fit_leaves_the_guest_where_it_is(
    vm: Machine, old: str, new: str, said: str
) -> None:
    before = vm.alive()
    as_before = settings(vm)
    done = vm.upgrade(vm.qmp, _changed(vm, old, new))
    assert done.returncode == 1
    assert said in done.stderr
    assert "the guest runs on in its QEMU" in done.stderr
    assert vm.alive() == before
    vm.goes_on()
    assert settings(vm) == as_before
    assert rows(vm) == []


def test_an_upgrade_that_cannot_keep_the_sockets_puts_the_settings_back(vm: Machine) -> None:
    as_before = settings(vm)
    in_the_way = vm.place / "qmp.old"
    in_the_way.mkdir()
    done = vm.upgrade(vm.qmp, vm.command)
    assert done.returncode == 1
    assert "the guest runs on in its QEMU" in done.stderr
    assert settings(vm) == as_before
    vm.goes_on()
    in_the_way.rmdir()


@pytest.mark.parametrize(
    "where",
    ["listening", "cpr", "prepared", "ready", "main", "whole", "loaded", "completed", "disarmed"],
)
def test_the_new_qemu_of_an_upgrade_is_killed(vm: Machine, where: str) -> None:
    before = vm.alive()
    words = ("qemu", "upgrade", "vm", "--qmp", vm.qmp, "--", *vm.command)
    process = vm.popen(*words, env={"CPRD_PAUSE": f"qemu-upgrade:{where}"})
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    (new,) = set(vm.alive()) - set(before)
    end = os.pidfd_open(new)
    os.kill(new, signal.SIGKILL)
    assert select.select([end], [], [], PATIENCE)[0]
    os.close(end)
    process.send_signal(signal.SIGCONT)
    assert process.wait(PATIENCE) == 1, vm.said()
    assert "the guest runs on in its QEMU" in vm.said()
    vm.goes_on()
    assert vm.alive() == before
    assert vm.status() == "running"  # at its old path
    assert rows(vm) == []


@pytest.mark.usefixtures("subreaper")
@pytest.mark.parametrize("next_step", ["upgrade", "save", "start"])
def test_what_a_killed_helper_left_in_doubt_ends_with_the_next_step(
    vm: Machine, next_step: str
) -> None:
    assert vm.save().returncode == 0
    kill_where_it_stops(vm.start(env={"CPRD_PAUSE": "qemu-start:running"}))
    vm.goes_on()
    assert rows(vm)[0]["phase"] == "in-doubt"
    if next_step == "upgrade":
        assert vm.upgrade(vm.qmp, vm.command).returncode == 0
        assert rows(vm) == []
    elif next_step == "save":
        assert vm.save().returncode == 0
        assert [row["phase"] for row in rows(vm)] == ["held"]
        vm.start()
    else:
        assert vm.start().wait(PATIENCE) == 4
        assert "has taken this state" in vm.said()
    vm.goes_on()
    assert len(vm.alive()) == 1


def test_an_upgrade_of_a_paused_guest(vm: Machine) -> None:
    vm.execute("stop")
    assert vm.upgrade(vm.qmp, vm.command).returncode == 0
    assert vm.status() == "paused"
    vm.stands(0.3)
    vm.execute("cont")
    vm.goes_on()


# Stop


def test_stop_saves(vm: Machine) -> None:
    stopped = vm.cprctl("qemu", "stop", "vm", "--qmp", vm.qmp)
    assert stopped.returncode == 0, stopped.stderr
    assert rows(vm)[0]["phase"] == "held"
    vm.start()
    vm.goes_on()


@pytest.mark.parametrize("why", ["cprd is down", "the machine goes down"])
def test_stop_presses_the_power_button_instead(
    vm: Machine, daemon: DaemonProcess, why: str
) -> None:
    words = ["qemu", "stop", "vm", "--qmp", vm.qmp]
    if why == "cprd is down":
        daemon.stop()
    else:
        marker = vm.place / "going-down"
        marker.touch()
        words += ["--down-marker", str(marker)]
    stopped = vm.cprctl(*words)
    assert stopped.returncode == 0, stopped.stderr
    assert vm.alive() == []
    assert vm.lines()[-1] == "OFF"


def test_stop_of_a_guest_that_ended_by_itself(vm: Machine) -> None:
    vm.execute("system_powerdown")
    vm.until(lambda: not vm.alive(), "the end of QEMU")
    stopped = vm.cprctl("qemu", "stop", "vm", "--qmp", vm.qmp)
    assert stopped.returncode == 0, stopped.stderr

"""The whole promise at once: a real QEMU in vm@.service, cprd in cprd.service, both as shipped, in
a real systemd. The guest goes on through every restart that there is, or it is shut down by its
own power button; no signal ever ends it."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.qemu.machine import QEMU
from tests.support.patience import PATIENCE, rest

from .machine import Machine
from .vm import Guest, install_cprd, needs_qemu, processes, unit_line

MakeGuest = Callable[..., Guest]


@pytest.fixture
def make_guest(systemd: Machine) -> Iterator[MakeGuest]:
    """make_guest(**options): a VM's unit in a machine with everything that we ship."""
    needs_qemu()
    install_cprd(systemd)
    with contextlib.ExitStack() as stack:

        def make(name: str = "test", **options: Any) -> Guest:
            guest = Guest(systemd, name, **options)
            stack.callback(guest.close)
            return guest

        yield make


@pytest.fixture
def guest(make_guest: MakeGuest) -> Guest:
    """The usual one, booted and counting."""
    guest = make_guest()
    guest.systemctl("start")
    guest.runs_in_the_unit()
    return guest


def stop_cprd(machine: Machine) -> None:
    machine.systemctl("stop", "cprd.socket", "cprd.service")


def start_cprd(machine: Machine) -> None:
    machine.systemctl("start", "cprd.socket", "cprd.service")


def kill_cprd(machine: Machine) -> None:
    os.kill(machine.main_pid("cprd.service"), signal.SIGKILL)


def impatient(guest: Guest) -> None:
    """vm@.service as it stands, but that nobody waits for minutes for a stubborn guest."""
    stop = unit_line("vm@.service", "ExecStop=cprctl ")
    telling = unit_line("vm@.service", "ExecStop=-+")
    guest.systemd.unit(
        f"{guest.unit}.d/impatient.conf",
        f"[Service]\nExecStop=\n{telling}\n{stop} --powerdown-timeout 1\nTimeoutStopSec=3s\n",
    )


# The guest goes on


def test_restart_reload_and_restart_again_the_guest_goes_on(guest: Guest) -> None:
    seen = {guest.runs_in_the_unit()}
    for verb in ("restart", "reload", "reload", "restart", "reload", "restart"):
        guest.systemctl(verb)
        pid = guest.runs_in_the_unit()
        assert pid not in seen
        seen.add(pid)
        assert guest.phases() == {}
    assert guest.systemd.show(guest.unit, "NRestarts") == "0"


def test_cprd_and_the_machine_restarted_together_in_both_orders(guest: Guest) -> None:
    seen = {guest.runs_in_the_unit()}
    for units in (
        ("cprd.service", guest.unit),
        (guest.unit, "cprd.service"),
        ("cprd.socket", "cprd.service", guest.unit),
        (guest.unit, "cprd.socket", "cprd.service"),
    ):
        keeper = guest.systemd.main_pid("cprd.service")
        guest.systemd.systemctl("restart", *units)
        assert guest.systemd.main_pid("cprd.service") != keeper
        pid = guest.runs_in_the_unit()
        assert pid not in seen
        seen.add(pid)
        assert guest.phases() == {}


def test_cprd_killed_while_no_qemu_runs_the_guest_goes_on(guest: Guest) -> None:
    guest.systemctl("stop")
    assert guest.alive() == []
    assert guest.state() == "inactive"
    kill_cprd(guest.systemd)
    assert guest.phases() == {"test": "held"}  # waits for the next cprd
    guest.systemd.systemctl("daemon-reexec")
    guest.systemctl("start")
    guest.runs_in_the_unit()
    assert guest.phases() == {}


def test_a_reload_that_is_refused_leaves_the_guest_where_it_is(guest: Guest) -> None:
    pid = guest.runs_in_the_unit()
    guest.configure(guest.arguments.replace("128M", "256M"))
    assert guest.attempt("reload") != 0
    assert guest.runs_in_the_unit() == pid
    guest.configure()
    stop_cprd(guest.systemd)
    assert guest.attempt("reload") != 0
    assert guest.runs_in_the_unit() == pid
    start_cprd(guest.systemd)
    guest.systemctl("reload")
    assert guest.runs_in_the_unit() != pid


def test_two_guests_restarted_at_once_keep_to_themselves(make_guest: MakeGuest) -> None:
    guests = [make_guest("one"), make_guest("two", machine="pc")]
    units = [guest.unit for guest in guests]
    guests[0].systemd.systemctl("start", *units)
    for guest in guests:
        guest.goes_on()
    guests[0].systemd.systemctl("restart", "vm@*")
    for guest in guests:
        guest.runs_in_the_unit()


def test_a_guest_paused_by_its_user_stays_paused(guest: Guest) -> None:
    guest.execute("stop")
    for verb in ("restart", "reload"):
        guest.systemctl(verb)
        assert guest.status() == "paused"
    assert guest.state() == "active"
    guest.execute("cont")
    guest.runs_in_the_unit()


def test_restarted_with_a_broken_configuration_it_goes_on_once_that_is_mended(guest: Guest) -> None:
    guest.configure(guest.arguments.replace("128M", "256M"))
    assert guest.attempt("restart") != 0
    assert guest.phases() == {"test": "held"}
    guest.configure()
    guest.await_state("active")  # by itself: it is tried again
    guest.runs_in_the_unit()
    assert guest.phases() == {}


def kill_cprd_during(verb: str, guest: Guest, after: float) -> None:
    """A job of the VM's unit; `after` seconds from its start on, cprd is killed."""
    pid = guest.systemd.main_pid("cprd.service")
    job = guest.systemd.popen("systemctl", verb, guest.unit)
    rest(after)  # for any moment will do (those that matter are in the sweeps of both sides)
    os.kill(pid, signal.SIGKILL)
    assert job.wait(3 * PATIENCE) == 0, f"killed after {after} s: {guest.systemd.journal()}"
    guest.runs_in_the_unit()
    assert guest.phases() == {}


@pytest.mark.parametrize("verb", ["restart", "reload"])
def test_cprd_killed_in_the_midst_of_it_the_guest_goes_on(guest: Guest, verb: str) -> None:
    for after in (0.15, 0.25, 0.4):
        kill_cprd_during(verb, guest, after)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_hundred_restarts_and_reloads_while_cprd_is_killed(guest: Guest) -> None:
    for turn in range(100):
        kill_cprd_during(("restart", "reload")[turn % 2], guest, turn // 2 / 80)


# It cannot be saved


def too_many_descriptors(machine: Machine) -> None:
    (machine.root / "etc/cprd/small.toml").write_text("[limits]\nfds = 3\n")
    machine.unit(
        "cprd.service.d/small.conf",
        "[Service]\nExecStart=\nExecStart=cprd --config /etc/cprd/small.toml\n",
    )
    machine.systemctl("restart", "cprd.service")


def mended(machine: Machine) -> None:
    (machine.units / "cprd.service.d/small.conf").unlink()
    machine.systemctl("daemon-reload")
    machine.systemctl("restart", "cprd.service")


@pytest.mark.parametrize("misfortune", [stop_cprd, too_many_descriptors])
def test_not_saved_the_guest_is_shut_down_by_its_power_button(
    guest: Guest, misfortune: Callable[[Machine], None]
) -> None:
    misfortune(guest.systemd)
    guest.systemctl("stop")
    guest.went_off_by_itself()
    guest.no_signal()
    assert guest.state() == "inactive"
    assert "not saved: " in guest.said()


def test_a_guest_that_can_neither_be_saved_nor_shut_down_goes_on(make_guest: MakeGuest) -> None:
    """And nothing is started beside it; once cprd takes it, it is saved by hand, and goes on."""
    guest = make_guest(stubborn=True)
    impatient(guest)
    guest.systemctl("start")
    pid = guest.runs_in_the_unit()
    too_many_descriptors(guest.systemd)
    guest.attempt("stop")
    assert guest.state() == "failed"
    guest.no_signal()
    assert "not saved: " in guest.said()
    assert "it still runs" in guest.said()
    guest.goes_on()
    mended(guest.systemd)
    assert guest.attempt("start") != 0  # systemd's own word: it would not kill what is left
    qmp = "unix:/run/vm/test/qmp,server=on,wait=off"
    beside, words = guest.ctl("qemu", "start", "test", "--", QEMU, "-m", "1M", "-qmp", qmp)
    assert beside == 1
    assert "a QEMU listens at /run/vm/test/qmp already" in words
    guest.goes_on()
    assert guest.alive() == [pid]
    saved, words = guest.ctl("qemu", "save", "test", "--qmp", "/run/vm/test/qmp")
    assert saved == 0, words
    guest.systemctl("start")
    assert guest.runs_in_the_unit() != pid


def test_without_an_answer_from_cprd_nothing_is_booted(guest: Guest) -> None:
    guest.systemctl("stop")
    stop_cprd(guest.systemd)
    guest.systemd.unit("cprd.service.d/away.conf", "[Unit]\nConditionPathExists=/nowhere\n")
    guest.systemd.unit("cprd.socket.d/away.conf", "[Unit]\nConditionPathExists=/nowhere\n")
    assert guest.attempt("start") != 0
    assert guest.alive() == []
    if guest.systemd.version < 254:
        return  # (stopped, cprd has lost what it held; what follows is what 254 is for)
    (guest.systemd.units / "cprd.service.d/away.conf").unlink()
    (guest.systemd.units / "cprd.socket.d/away.conf").unlink()
    guest.systemd.systemctl("daemon-reload")
    guest.await_state("active")  # by itself
    guest.runs_in_the_unit()


def pausing(guest: Guest, point: str) -> Path:
    """From now on what cprctl does for this unit stops at a pause point; until the file is gone."""
    return guest.systemd.unit(
        f"{guest.unit}.d/pausing.conf", f"[Service]\nEnvironment=CPRD_PAUSE={point}\n"
    )


def paused(guest: Guest) -> int:
    """The process that stopped there, once it did."""
    found: list[int] = []

    def look() -> bool:
        found.extend(pid for pid in processes(guest.systemd) if is_stopped(pid))
        return bool(found)

    guest.until(look, "at the pause point")
    return found[0]


def is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


@pytest.mark.full
def test_cprd_hangs_in_the_last_moment_of_a_save_and_the_guest_is_saved_by_hand(
    guest: Guest,
) -> None:
    """In doubt: the guest is stopped, and lies whole in its QEMU, which nobody ends."""
    patience = pausing(guest, "qemu-save:completed")
    stop = guest.systemd.popen("systemctl", "stop", guest.unit)
    saver = paused(guest)
    keeper = guest.systemd.main_pid("cprd.service")
    os.kill(keeper, signal.SIGSTOP)
    os.kill(saver, signal.SIGCONT)
    guest.systemd.await_journal("Control process exited", guest.unit, timeout=60)
    os.kill(keeper, signal.SIGCONT)
    assert guest.status() == "postmigrate"
    saved, words = guest.ctl("qemu", "save", "test", "--qmp", "/run/vm/test/qmp")
    assert saved == 0, words
    stop.wait()
    patience.unlink()
    guest.systemd.systemctl("daemon-reload")
    guest.systemctl("start")
    guest.runs_in_the_unit()
    assert guest.phases() == {}


@pytest.mark.full
def test_stopped_while_it_was_still_starting_the_guest_is_left_alone(guest: Guest) -> None:
    guest.systemctl("stop")
    impatient(guest)
    patience = pausing(guest, "qemu-start:loaded")
    start = guest.systemd.popen("systemctl", "start", guest.unit)
    helper = paused(guest)
    stop = guest.systemd.popen("systemctl", "stop", guest.unit)
    guest.await_state("deactivating")
    os.kill(helper, signal.SIGCONT)
    assert start.wait() != 0
    stop.wait()
    assert guest.state() == "failed"
    guest.goes_on()
    [pid] = guest.alive()
    patience.unlink()
    guest.systemd.systemctl("daemon-reload")
    assert guest.attempt("start") != 0
    saved, words = guest.ctl("qemu", "save", "test", "--qmp", "/run/vm/test/qmp")
    assert saved == 0, words
    guest.systemctl("start")
    assert guest.runs_in_the_unit() != pid


# It ends


def test_a_guest_that_switches_itself_off_stays_off(guest: Guest) -> None:
    guest.execute("system_powerdown")
    guest.await_state("inactive")
    guest.went_off_by_itself()
    assert guest.systemd.show(guest.unit, "Result") == "success"
    assert guest.systemd.show(guest.unit, "NRestarts") == "0"
    assert "the guest ended by itself" in guest.said()


def test_a_qemu_that_crashes_is_booted_anew_and_only_then(guest: Guest) -> None:
    pid = guest.runs_in_the_unit()
    os.kill(pid, signal.SIGKILL)
    guest.until(lambda: guest.words().count("BOOT") == 2, "booted again")
    guest.await_state("active")
    assert guest.alive() != [pid]
    guest.systemctl("restart")
    last = guest.words()[-1]
    guest.until(lambda: guest.words()[-1] > last, "going on")
    assert guest.words().count("BOOT") == 2


def outlive_the_guest(machine: Machine) -> None:
    """cprd is there to the very end: it is not for want of it that nothing is saved."""
    for name in ("cprd.socket", "cprd.service"):
        machine.unit(f"{name}.d/last.conf", "[Unit]\nDefaultDependencies=no\n")


@pytest.mark.parametrize("how", ["poweroff", pytest.param("reboot", marks=pytest.mark.full)])
def test_the_machine_goes_down_the_guest_is_shut_down_and_its_disk_closed(
    make_guest: MakeGuest, how: str, tmp_path: Path
) -> None:
    guest = make_guest(disk="qcow2")
    guest.systemctl("start")
    guest.goes_on(40)
    assert guest.is_dirty()
    outlive_the_guest(guest.systemd)
    guest.systemd.poweroff(how)
    assert guest.words()[-1] == "OFF"
    guest.unharmed()
    written = [line.split()[0] for line in guest.lines() if line.endswith("W")]
    assert guest.sector(1, tmp_path)[:4] == struct.pack("<I", int(written[-1], 16))
    assert not guest.is_dirty()


def test_the_machine_goes_down_and_a_guest_that_ignores_it_does_not_keep_it(
    make_guest: MakeGuest, tmp_path: Path
) -> None:
    """Its QEMU quits, which closes its images, before systemd kills all that is left."""
    guest = make_guest(disk="qcow2", stubborn=True)
    impatient(guest)
    guest.systemctl("start")
    guest.goes_on(40)
    assert guest.is_dirty()
    outlive_the_guest(guest.systemd)
    guest.systemd.poweroff()
    guest.unharmed()
    assert guest.words()[-1] != "OFF"
    assert not guest.is_dirty()
    guest.sector(1, tmp_path)

"""`cprctl qemu check`: which argument keeps a VM from being handed over, and that it is the one.

A refusal counts only if it is true (`save` refuses as well, and the guest runs on unharmed) and if
what it tells to change is all that has to be changed.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from tests.qemu.conftest import MakeMachine
from tests.qemu.machine import Machine
from tests.support.cprctl import free_port
from tests.support.patience import PATIENCE

Words = list[str]
Edit = Callable[[Words], Words]


def replaced(old: str, new: str) -> Edit:
    def edit(words: Words) -> Words:
        changed = [word.replace(old, new) for word in words]
        assert changed != words
        return changed

    return edit


def without_backend(words: Words) -> Words:
    """Memory as QEMU makes it by itself."""
    at = words.index("-object")
    return replaced(",memory-backend=ram0", "")(words[:at] + words[at + 2 :])


def added(*more: str) -> Edit:
    return lambda words: [*words, *more]


def boot(vm: Machine, edit: Edit = list) -> subprocess.Popen[bytes]:
    """The VM with its command changed; not by cprctl, which need not be asked for that."""
    with open(vm.err, "ab") as err:
        process = subprocess.Popen(
            edit(vm.command), stdin=subprocess.DEVNULL, stdout=err, stderr=err
        )
    vm.processes.append(process)
    vm.until(
        lambda: process.poll() is None and not vm._status().endswith(("Error", "Listener")),
        "a monitor",
    )
    return process


def end(vm: Machine) -> None:
    vm.execute("quit")
    vm.processes[-1].wait(PATIENCE)
    vm.log.unlink()  # it boots anew


def check(vm: Machine) -> tuple[int, list[str]]:
    done = vm.cprctl("qemu", "check", "--qmp", vm.qmp)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def settings(vm: Machine) -> Any:
    """Everything of a QEMU that a migration can be told."""
    return vm.execute("query-migrate-parameters"), vm.execute("query-migrate-capabilities")


REFUSED = {
    "memory-backend-without-share": (
        replaced(",share=on", ",share=off"),
        ["ram0", "share=on", "-object"],
    ),
    "no-aux-ram-share": (
        replaced("aux-ram-share=on", "aux-ram-share=off"),
        ["-machine", "aux-ram-share=on"],
    ),
    "memory-of-qemu's-own": (
        without_backend,
        ["-object memory-backend-memfd", "share=on", "memory-backend=ram0"],
    ),
    "private-anonymous-memory": (
        lambda words: replaced("backend-memfd,", "backend-ram,")(
            replaced(",share=on", ",share=off")(words)
        ),
        ["ram0", "share=on", "memory-backend-memfd"],
    ),
    "stream-without-an-end": (
        replaced("aux-ram-share=on", "aux-ram-share=on,suppress-vmdesc=on"),
        ["suppress-vmdesc=on"],
    ),
}


@pytest.mark.parametrize("row", REFUSED)
def test_the_argument_it_names_is_the_one_to_change(make_machine: MakeMachine, row: str) -> None:
    edit, named = REFUSED[row]
    vm = make_machine()
    boot(vm, edit)
    vm.goes_on(5)
    before = settings(vm)
    status, lines = check(vm)
    assert status == 1
    (line,) = lines
    assert line.startswith("no: ")
    for word in named:
        assert word in line
    assert settings(vm) == before

    refused = vm.save()
    assert refused.returncode == 1
    assert line.removeprefix("no: ") in refused.stderr
    assert vm.cprctl("show", vm.name).returncode == 3
    assert settings(vm) == before
    vm.goes_on(5)
    end(vm)

    boot(vm)  # with the arguments as they should be
    vm.goes_on(5)
    assert check(vm) == (0, ["this VM (running) can be handed over"])
    assert vm.save().returncode == 0


def test_all_that_is_wrong_is_said_at_once(make_machine: MakeMachine) -> None:
    vm = make_machine(share="off", options="aux-ram-share=off")
    boot(vm)
    status, lines = check(vm)
    assert status == 1
    assert len(lines) == 2
    assert "share=on to its -object" in " ".join(lines)
    assert "aux-ram-share=on" in " ".join(lines)


def test_a_device_that_qemu_itself_refuses_is_named(make_machine: MakeMachine) -> None:
    vm = make_machine()
    null = "driver=null-co,if=none,id=n0,size=1M,read-zeroes=on"
    boot(vm, added("-drive", null, "-device", "nvme,serial=x,drive=n0"))
    status, lines = check(vm)
    blockers = vm.execute("query-migrate").get("blocked-reasons", [])
    if not blockers:  # (QEMU 11 can migrate it)
        assert status == 0
        return
    assert status == 1
    assert "nvme" in lines[0]
    vm.goes_on(5)
    assert vm.save().returncode == 1
    vm.goes_on(5)


def test_memory_in_a_file_is_said_to_stay_where_it_is(make_machine: MakeMachine) -> None:
    """It can be handed over, but does not lie with cprd: the note says so, the hold shows it."""
    vm = make_machine()
    file = vm.place / "ram"
    vm.command = replaced("memory-backend-memfd,", f"memory-backend-file,mem-path={file},")(
        vm.command
    )
    boot(vm)
    vm.goes_on(5)
    status, lines = check(vm)
    assert status == 0
    (note,) = (line for line in lines if line.startswith("note: "))
    assert "ram0" in note
    assert "path" in note
    assert vm.save().returncode == 0
    assert vm.alive() == []
    assert "ram0" not in vm.cprctl("show", vm.name).stdout
    vm.start()
    vm.goes_on()


ONLY_BY_SAVE = {
    "pidfile": ("-pidfile {place}/pid", "-pidfile"),
    "port-forwarding": (
        "-netdev user,id=n0,hostfwd=tcp:127.0.0.1:0-:22 -device virtio-net-pci,netdev=n0",
        "hostfwd=tcp:127.0.0.1:0-:22",
    ),
    "vnc-by-tcp": ("-vnc 127.0.0.1:77,to=200", "-vnc 127.0.0.1:77"),
    "vnc-as-a-display": ("-display vnc=127.0.0.1:77,to=200", "-display 127.0.0.1:77"),
    "serial-line-by-tcp": (
        "-serial tcp:127.0.0.1:{port},server=on,wait=off",
        "-serial tcp:127.0.0.1:{port}",
    ),
    "monitor-by-telnet": (
        "-monitor telnet:127.0.0.1:{port},server,nowait",
        "-monitor telnet:127.0.0.1:{port}",
    ),
    "chardev-by-tcp": (
        "-chardev socket,id=z,host=127.0.0.1,port={port},server=on,wait=off",
        "-chardev 'z'",
    ),
    "debugger-by-tcp": ("-gdb tcp:127.0.0.1:{port}", "-gdb tcp:127.0.0.1:{port}"),
    "port-forwarding-as-of-old": (
        "-net nic -net user,hostfwd=tcp:127.0.0.1:{port}-:22",
        "hostfwd=tcp:127.0.0.1:{port}-:22",
    ),
    "port-forwarding-as-json": (
        '-netdev {{"type":"user","id":"n0","hostfwd":[{{"str":"tcp:127.0.0.1:{port}-:22"}}]}}',
        "hostfwd=tcp:127.0.0.1:{port}-:22",
    ),
    "network-by-tcp": ("-netdev socket,id=n0,listen=127.0.0.1:{port}", "listen=127.0.0.1:{port}"),
    "network-by-a-stream": (
        "-netdev stream,id=n0,server=on,addr.type=inet,addr.host=127.0.0.1,addr.port={port}",
        "addr.port={port}",
    ),
}


@pytest.mark.parametrize("row", ONLY_BY_SAVE)
def test_what_two_qemus_cannot_have_at_once_is_named(make_machine: MakeMachine, row: str) -> None:
    more, named = ONLY_BY_SAVE[row]
    vm = make_machine()
    port = free_port()
    words = more.format(place=vm.place, port=port).split()
    boot(vm, added(*words))
    status, lines = check(vm)
    assert status == 0
    (line,) = (line for line in lines if line.startswith("not by upgrade: "))
    assert named.format(port=port) in line
    assert lines[-1] == "this VM (running) can be handed over"
    upgraded = vm.upgrade(vm.qmp, [*vm.command, *words])
    assert upgraded.returncode == 1
    assert line.removeprefix("not by upgrade: ") in upgraded.stderr
    vm.goes_on(5)


def test_a_port_that_no_argument_names_is_found_all_the_same(make_machine: MakeMachine) -> None:
    """Added by a monitor: what the kernel knows of the process counts."""
    vm = make_machine()
    boot(vm)
    port = free_port()
    address = {"type": "inet", "data": {"host": "127.0.0.1", "port": str(port)}}
    backend = {"type": "socket", "data": {"addr": address, "server": True, "wait": False}}
    vm.execute("chardev-add", id="late", backend=backend)
    _, lines = check(vm)
    (line,) = (line for line in lines if line.startswith("not by upgrade: "))
    assert f"127.0.0.1:{port} (TCP)" in line


@pytest.mark.parametrize("where", ["-snapshot", "snapshot=on"])
def test_a_disk_that_goes_with_its_qemu_is_refused(make_machine: MakeMachine, where: str) -> None:
    vm = make_machine()
    boot(vm, added(where) if where[0] == "-" else replaced("if=none,", "if=none,snapshot=on,"))
    vm.goes_on(5)
    status, lines = check(vm)
    assert status == 1
    assert "'d0'" in lines[0]
    assert "without -snapshot and snapshot=on" in lines[0]
    saved = vm.save()
    assert saved.returncode == 1
    assert lines[0].removeprefix("no: ") in saved.stderr
    vm.goes_on(5)


def test_a_monitor_that_is_pretty_is_said_to_be_of_no_use(make_machine: MakeMachine) -> None:
    vm = make_machine()
    pretty = vm.place / "pretty"
    boot(vm, added("-chardev", f"socket,id=p,path={pretty},server=on,wait=off", "-mon",
                   "chardev=p,mode=control,pretty=on"))  # fmt: skip
    assert check(vm) == (0, ["this VM (running) can be handed over"])  # there is another one
    end(vm)
    at = vm.command.index("-qmp")
    vm.command[at] = "-qmp-pretty"
    vm.start()
    vm.goes_on(5)
    assert "cannot speak to such a one" in vm.said()
    refused = vm.save()
    assert refused.returncode == 1
    assert "no QMP is spoken there" in refused.stderr


def test_a_log_that_the_next_qemu_would_empty_is_named(make_machine: MakeMachine) -> None:
    vm = make_machine()
    boot(vm, replaced(",append=on", ""))
    status, lines = check(vm)
    assert status == 0
    assert lines[0].startswith(f"note: {vm.log} ")
    assert "append=on" in lines[0]


def test_a_block_job_under_way_would_be_lost(make_machine: MakeMachine) -> None:
    vm = make_machine()
    boot(vm)
    vm.execute(
        "drive-mirror",
        device="d0",
        target=str(vm.place / "copy"),
        format="raw",
        sync="full",
        speed=1,
        **{"job-id": "slow"},
    )
    status, lines = check(vm)
    assert status == 1
    assert "slow" in lines[0]
    assert "block-job-cancel" in lines[0]
    vm.execute("block-job-cancel", device="slow", force=True)
    vm.until(lambda: vm.execute("query-block-jobs") == [], "the end of the job")
    vm.execute("block-dirty-bitmap-add", node="d0", name="backup")
    status, lines = check(vm)
    assert status == 0
    assert "the dirty bitmap 'backup' of disk 'd0'" in lines[0]


def test_what_a_guest_does_decides_as_well(make_machine: MakeMachine) -> None:
    vm = make_machine()
    boot(vm, added("-no-shutdown"))
    vm.goes_on(5)
    vm.execute("stop")
    assert check(vm) == (0, ["this VM (paused) can be handed over"])
    vm.execute("cont")
    vm.execute("system_powerdown")
    vm.await_status("shutdown")
    status, lines = check(vm)
    assert status == 1
    assert "nothing to keep" in lines[0]


def test_a_qemu_that_waits_for_a_state_has_none(make_machine: MakeMachine) -> None:
    vm = make_machine()
    boot(vm, added("-incoming", "defer"))
    status, lines = check(vm)
    assert status == 1
    assert "waits for a state" in lines[0]


def test_a_monitor_that_somebody_else_has_is_busy_and_says_so(make_machine: MakeMachine) -> None:
    vm = make_machine()
    boot(vm)
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(vm.qmp)
        other.settimeout(PATIENCE)
        assert other.recv(1)  # it is greeted: the monitor is its
        done = vm.cprctl("qemu", "check", "--qmp", vm.qmp)
    assert done.returncode == 4
    assert "one client at a time" in done.stderr
    vm.goes_on(5)
    assert check(vm)[0] == 0


def test_where_no_qemu_listens_that_is_said(make_machine: MakeMachine) -> None:
    vm = make_machine()
    done = vm.cprctl("qemu", "check", "--qmp", vm.qmp)
    assert done.returncode == 1
    assert vm.qmp in done.stderr
    assert "no QEMU listens there" in done.stderr

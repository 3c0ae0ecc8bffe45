"""The units that we ship: systemd finds nothing wrong with them, they are as closed as promised,
and what they close does not get in the way of what cprd needs."""

from __future__ import annotations

import os
import re
import signal
import tomllib
from pathlib import Path

import pytest

from tests.support.checkout import CHECKOUT

from .machine import Machine
from .ours import SERVED, UNITS, install

UNKNOWN_TO_252 = "Unknown key 'FileDescriptorStorePreserve'"

NEEDS = """
import ctypes, errno, os, resource, select, signal, socket, threading, time
from cprd.linux import listen_fds
from cprd.systemd import fdstore, notify

manager = notify.Manager.from_environment(os.environ)
held = listen_fds.take(os.environ)
(_, public), *stored = held
listener = socket.socket(fileno=public)
if stored:
    print("back", *(f"{name}={os.pread(fd, 9, 0).decode()}" for name, fd in stored), flush=True)
else:
    fd = os.memfd_create("m", os.MFD_ALLOW_SEALING)
    os.write(fd, b"precious")
    print("kept", notify.drive(fdstore.keep(manager, [("thing", fd)]), 10), flush=True)
notify.drive(manager.tell(notify.READY), 10)

epoll = select.epoll()
threading.Thread(target=epoll.close).start()
os.close(os.eventfd(0))
a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
print("limit", resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard, flush=True)
kcmp = ctypes.CDLL(None, use_errno=True).syscall(312, os.getpid(), os.getpid(), 0, 0, 0)
print("kcmp", kcmp, flush=True)

while True:
    client, _ = listener.accept()
    pid, uid, gid = __import__("struct").unpack("3i", client.getsockopt(1, 17, 12))
    pidfd = os.pidfd_open(pid)
    _, fds, flags, _ = socket.recv_fds(client, 100, 300)
    print("client uid", uid, "passed", len(fds), flush=True)
    for fd in fds:
        os.close(fd)
    client.send(b"done")
"""

CLIENT = """
import os, socket
own = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
own.connect("/run/cprd/cprd.sock")
inet = socket.create_server(("127.0.0.1", 0))
socket.send_fds(own, [b"here"], [os.eventfd(0), inet.fileno(), os.memfd_create("x")])
print(own.recv(9))
"""


def test_systemd_finds_nothing_wrong(systemd: Machine) -> None:
    install(systemd)
    words = systemd.run(
        *("systemd-analyze", "verify", "--man=no", "cprd.socket", "cprd.service"),
        *("vm@test.service", "chat@7000.service"),
    )
    ours = [line for line in words.splitlines() if re.search(r"cprd|vm@|chat@", line)]
    if systemd.version < 254:
        assert len(ours) == 1
        assert UNKNOWN_TO_252 in ours[0]
    else:
        assert ours == []


def test_the_service_is_as_closed_as_promised(systemd: Machine) -> None:
    words = systemd.run(
        *("systemd-analyze", "security", "--offline=yes", "--threshold=7"), UNITS / "cprd.service"
    )
    level = re.search(r"exposure level for cprd\.service: ([0-9.]+)", words)
    assert level
    assert float(level[1]) <= 0.5


def test_installed_twice_the_user_and_the_directory_stay(systemd: Machine) -> None:
    install(systemd)
    systemd.run("systemd-sysusers", UNITS / "cprd.sysusers")
    assert systemd.run("stat", "-c", "%U %a", "/run/cprd").split() == ["cprd", "755"]


def test_the_hardened_service_keeps_and_serves_through_kill_9(systemd: Machine) -> None:
    """The unit as it stands, but for its program: what that does is all that cprd needs."""
    install(systemd)
    program = systemd.root / "run/boot/needs.py"
    program.write_text(NEEDS)
    systemd.unit(
        "cprd.service.d/program.conf",
        "[Service]\nExecStart=\nExecStart=test-python /run/boot/needs.py\nExecReload=\n",
    )
    systemd.systemctl("start", "cprd.socket", "cprd.service")
    systemd.await_journal("^kept True$", "cprd.service")
    systemd.await_journal("^limit True$", "cprd.service")
    systemd.await_journal("^kcmp 0$", "cprd.service")
    (systemd.root / "run/boot/client.py").write_text(CLIENT)
    for user, uid in (("nobody", 65534), ("daemon", 1), ("root", 0)):
        assert systemd.run("test-python", "/run/boot/client.py", user=user) == "b'done'\n"
        systemd.await_journal(f"^client uid {uid} passed 3$", "cprd.service")
    os.kill(systemd.main_pid("cprd.service"), signal.SIGKILL)
    systemd.await_journal("^back thing=precious$", "cprd.service")
    systemd.systemctl("restart", "cprd.service")
    assert systemd.journal("cprd.service").count("back thing=precious") == 2


def test_stop_and_start_lose_the_store_only_before_254(systemd: Machine) -> None:
    install(systemd)
    (systemd.root / "run/boot/needs.py").write_text(NEEDS)
    systemd.unit(
        "cprd.service.d/program.conf",
        "[Service]\nExecStart=\nExecStart=test-python /run/boot/needs.py\nExecReload=\n",
    )
    systemd.systemctl("start", "cprd.socket", "cprd.service")
    systemd.systemctl("stop", "cprd.service")
    systemd.systemctl("start", "cprd.service")
    came_back = "back thing=precious" in systemd.journal("cprd.service")
    assert came_back == (systemd.version >= 254)


def test_every_program_of_ours_that_a_unit_starts_is_installed() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    texts = [(UNITS / name).read_text() for name in SERVED]
    started = set(re.findall(r"^Exec\w+=(cpr[^\s]*|python\S*)", "\n".join(texts), re.MULTILINE))
    assert started == {"cprd", "cprctl", "cprd-demo-server"} == set(project["scripts"])


@pytest.mark.parametrize("example", ["vm@.service", "chat@.service"])
def test_no_example_is_restarted_with_cprd(example: str) -> None:
    text = (UNITS / example).read_text()
    assert not re.search(r"^(Requires|BindsTo|PartOf)=", text, re.MULTILINE)
    assert re.search(r"^Wants=cprd\.socket cprd\.service$", text, re.MULTILINE)
    # Ordered after cprd, it could not stop while that is being restarted: see test_vm.py.
    assert not re.search(r"^(After|Before)=.*cprd", text, re.MULTILINE)


def test_a_stop_that_fails_leaves_the_guest_alone(systemd: Machine) -> None:
    """With vm@.service as it stands but for its commands: ExecStop= fails; QEMU's place is taken
    by a program that notes each signal. It gets none that ends it, and it lives on."""
    install(systemd)
    guest = (
        "trap 'echo GOT TERM' TERM; trap 'echo GOT HUP' HUP; systemd-notify --ready;"
        " while :; do sleep 1000 & wait $!; done"
    )
    systemd.unit(
        "vm@test.service.d/commands.conf",
        f'[Service]\nExecStart=\nExecStart=sh -c "{guest.replace("$", "$$")}"\n'
        "ExecStop=\nExecStop=false\nTimeoutStopSec=1s\n",
    )
    systemd.systemctl("start", "vm@test.service")
    pid = systemd.main_pid("vm@test.service")
    systemd.attempt("systemctl", "stop", "vm@test.service")
    assert systemd.show("vm@test.service", "ActiveState") == "failed"
    assert os.path.exists(f"/proc/{pid}")
    assert "GOT" not in systemd.journal("vm@test.service")


def test_a_stopping_machine_is_told_to_the_unprivileged_stop_command(
    systemd: Machine, tmp_path: Path
) -> None:
    install(systemd)
    text = (UNITS / "vm@.service").read_text()
    telling = next(line for line in text.splitlines() if line.startswith("ExecStop=-+"))
    tmp_path.chmod(0o755)
    (tmp_path / "told").touch()
    (tmp_path / "told").chmod(0o666)
    look = f"ls /run/vm >> {tmp_path}/told; id -un >> {tmp_path}/told"
    systemd.unit(
        "vm@test.service.d/commands.conf",
        "[Service]\nPrivateTmp=no\nExecStart=\n"
        "ExecStart=sh -c 'systemd-notify --ready; exec sleep 1000'\n"
        f"KillSignal=SIGTERM\nExecStop=\n{telling}\nExecStop=sh -c '{look}'\n",
    )
    systemd.systemctl("start", "vm@test.service")
    systemd.systemctl("restart", "vm@test.service")
    assert systemd.run("stat", "-c", "%U", "/run/vm").strip() == "root"
    assert (tmp_path / "told").read_text().split() == ["test", "vm"]
    systemd.poweroff()
    assert (tmp_path / "told").read_text().split() == [
        *("test", "vm"),
        *("test", "test.going-down", "vm"),
    ]


def test_a_start_limit_takes_the_socket_down_too(systemd: Machine) -> None:
    """Why our units have none: clients find nobody until an operator comes."""
    install(systemd)
    systemd.unit(
        "cprd.service.d/limit.conf",
        "[Unit]\nStartLimitIntervalSec=60\nStartLimitBurst=3\n"
        "[Service]\nExecStart=\nExecStart=false\nRestartSec=0\n",
    )
    systemd.systemctl("start", "cprd.socket")
    systemd.attempt("systemctl", "start", "--no-block", "cprd.service")
    systemd.await_journal("start-limit-hit", "cprd.socket")
    assert systemd.show("cprd.socket", "ActiveState") == "failed"
    systemd.unit("cprd.service.d/limit.conf", "")
    systemd.systemctl("reset-failed", "cprd.socket", "cprd.service")
    systemd.systemctl("start", "cprd.socket")
    systemd.run("cprctl", "list")

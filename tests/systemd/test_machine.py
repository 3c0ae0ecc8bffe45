"""The fixture itself: it boots, it runs what the tests need, and it leaves nothing."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support.checkout import CHECKOUT
from tests.support.patience import PATIENCE

from .machine import BOOT, Machine, MachineError

KEEPER = """
import os, socket, sys
from cprd.linux import listen_fds
from cprd.systemd import fdstore, notify

manager = notify.Manager.from_environment(os.environ)
assert manager is not None
held = listen_fds.take(os.environ)
if held:
    words = [f"{name}={os.pread(fd, 99, 0).decode()}" for name, fd in held]
    print("came back:", *words, flush=True)
else:
    fd = os.memfd_create("kept")
    os.write(fd, b"precious")
    assert notify.drive(fdstore.keep(manager, [("thing", fd)]), 10)
    print("stored", flush=True)
notify.drive(manager.tell(notify.READY + b"\\n" + notify.status("here")), 10)
import signal
from tests.support.patience import PATIENCE
signal.pause()
"""


def inside(machine: Machine) -> list[int]:
    """Every process of the machine, by its PID out here."""
    own = os.readlink(f"/proc/{machine.pid}/ns/pid")
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                if os.readlink(f"/proc/{entry}/ns/pid") == own:
                    found.append(int(entry))
            except OSError:
                continue
    return found


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """What the names begin with of all that runs of boot.py make in this test, and no others."""
    text = f"cprd-boot-{os.getpid()}."
    monkeypatch.setenv("CPRD_BOOT_MARK", text)
    return text


def cgroups(mark: str) -> set[str]:
    """Every cgroup that a run of boot.py made, seen through a mount of its own."""
    listing = (
        f"set -e; mount -t cgroup2 cgroup2 /mnt; cd /mnt; find . -type d -name '{mark}*' -prune"
    )
    enter = "import os, sys; from tests.systemd import boot; boot.own_mounts(); "
    enter += "os.execvp('sh', ['sh', '-c', sys.argv[1]])"
    done = subprocess.run(
        [sys.executable, "-c", enter, listing],
        cwd=CHECKOUT,
        check=True,
        capture_output=True,
        text=True,
    )
    return set(done.stdout.split())


def leftovers(mark: str) -> set[str]:
    """What runs of boot.py have in the file systems that everybody sees."""
    temporary = {str(path) for path in Path(tempfile.gettempdir()).glob(mark + "*")}
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    return temporary | cgroups(mark) | {line for line in mounts if mark in line}


def test_a_unit_runs_and_its_words_are_in_the_journal(systemd: Machine) -> None:
    systemd.unit("hello.service", "[Service]\nType=oneshot\nExecStart=echo hello from inside\n")
    systemd.systemctl("start", "hello.service")
    assert systemd.await_journal("hello from", "hello.service") == "hello from inside"
    assert systemd.show("hello.service", "Result") == "success"
    assert systemd.version >= 250


def test_a_unit_that_fails_says_so_with_the_journal(systemd: Machine) -> None:
    systemd.unit(
        "bad.service", "[Service]\nType=oneshot\nExecStart=sh -c 'echo my reason; exit 3'\n"
    )
    with pytest.raises(MachineError, match="my reason"):
        systemd.systemctl("start", "bad.service")


def test_a_hardened_unit_of_another_user_finds_python_and_the_checkout(systemd: Machine) -> None:
    systemd.unit(
        "probe.service",
        "[Service]\nType=oneshot\nUser=nobody\nProtectHome=yes\nPrivateTmp=yes\n"
        "ProtectSystem=strict\nNoNewPrivileges=yes\n"
        "ExecStart=test-python -c 'import cprd.errors as e, trio, msgpack; print(e.__file__)'\n",
    )
    systemd.systemctl("start", "probe.service")
    assert systemd.await_journal("errors.py", "probe.service").startswith("/run/boot/checkout/")


def test_a_stored_descriptor_survives_kill_9_and_restart(systemd: Machine, tmp_path: Path) -> None:
    (tmp_path / "keeper.py").write_text(KEEPER)
    systemd.unit(
        "keeper.service",
        "[Unit]\nStartLimitIntervalSec=0\n[Service]\nType=notify\nNotifyAccess=main\n"
        "FileDescriptorStoreMax=8\nRestart=always\nRestartSec=0\n"
        f"ExecStart=test-python {tmp_path}/keeper.py\n",
    )
    systemd.systemctl("start", "keeper.service")
    assert systemd.show("keeper.service", "NFileDescriptorStore") == "1"
    os.kill(systemd.main_pid("keeper.service"), signal.SIGKILL)
    systemd.await_journal("came back: thing=precious", "keeper.service")
    systemd.systemctl("restart", "keeper.service")
    assert systemd.journal("keeper.service").count("came back: thing=precious") == 2


def test_nothing_of_the_machine_around_is_changed(systemd: Machine) -> None:
    before = Path("/etc/passwd").read_text()
    systemd.run("sh", "-c", "echo x:x:1234:1234::/: >> /etc/passwd; touch /var/lib/mark /tmp/mark")
    assert "x:x:1234" in systemd.run("cat", "/etc/passwd")
    assert Path("/etc/passwd").read_text() == before
    assert not Path("/var/lib/mark").exists()
    assert not Path("/tmp/mark").exists()
    status, _ = systemd.attempt("sh", "-c", "echo 1 > /proc/sys/fs/nr_open")
    assert status != 0


def test_a_poweroff_stops_the_units_and_ends_the_machine(systemd: Machine, tmp_path: Path) -> None:
    systemd.unit(
        "last.service",
        "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=true\n"
        f"ExecStop=touch {tmp_path}/stopped\n",
    )
    systemd.systemctl("start", "last.service")
    systemd.poweroff()
    assert (tmp_path / "stopped").exists()


def test_closed_it_leaves_no_process_no_cgroup_and_no_mount(
    systemd_boots: None, tmp_path: Path, mark: str
) -> None:
    machine = Machine(tmp_path)
    machine.unit("sleeper.service", "[Service]\nExecStart=sleep 1000\nKillMode=none\n")
    machine.systemctl("start", "sleeper.service")
    processes = inside(machine)
    assert len(processes) >= 3  # PID 1, the journal, the sleeper
    assert leftovers(mark)
    machine.close()
    assert not [pid for pid in processes if os.path.exists(f"/proc/{pid}")]
    assert not leftovers(mark)


def test_a_killed_holder_takes_every_process_along_and_the_next_run_sweeps(
    systemd_boots: None, tmp_path: Path, mark: str
) -> None:
    machine = Machine(tmp_path)
    init = os.pidfd_open(machine.pid)
    machine.holder.kill()
    machine.close()
    assert select.select([init], [], [], PATIENCE)[0]
    os.close(init)
    # The cgroup may go on being busy for a moment after PID 1's end: until a run finds it empty.
    for _ in range(20):
        subprocess.run([sys.executable, "-I", BOOT, "--", "true"], check=True, cwd="/")
        if not leftovers(mark):
            break
    assert not leftovers(mark)


def test_boot_runs_one_command_and_hands_back_its_status(systemd_boots: None) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-I", BOOT, f"--bind={CHECKOUT}", "--"),  # (it may lie below /tmp)
            *("sh", "-c", "systemctl is-system-running; pwd; exit 7"),
        ],
        check=False,
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
    )
    assert done.returncode == 7
    assert done.stdout.split() == ["running", str(CHECKOUT)]

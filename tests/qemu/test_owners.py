"""Root's tools and the VMs of another user: whose words count, and who does what as whom."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cprd
from cprd.linux import identity
from cprd.linux.child import in_a_child
from cprd.qemu.doubt import LOOK
from cprd.qemu.private import PrivateDirectory
from cprd.qemu.process import Process, guard_mark, output_of
from cprd.qemu.sockets import mend
from cprd.state import InlineSection
from tests.qemu.conftest import MakeMachine
from tests.qemu.machine import Machine
from tests.qemu.steps import Standing, rows, words
from tests.qemu.test_overlap import listener, second_names
from tests.qemu.test_unkillable import Mute
from tests.qemu.test_unprivileged import uid_of
from tests.support.checkout import CHECKOUT
from tests.support.daemon import DaemonProcess
from tests.support.patience import PATIENCE, until

USER, OTHER = 4242, 4243
SETPRIV = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")


def give_away(vm: Machine, uid: int = USER) -> None:
    for path in (vm.place, *vm.place.iterdir()):
        shutil.chown(path, uid, uid)


@pytest.fixture
def theirs(make_machine: MakeMachine) -> Machine:
    """A VM of the user's, in a directory of the user's, started by root by its full name."""
    vm = make_machine(wrappers=[*SETPRIV, "prlimit", "--core=0"])
    give_away(vm)
    vm.name = f"{USER}/vm"
    vm.start()
    vm.goes_on()
    return vm


def bare(vm: Machine) -> list[str]:
    """Its QEMU command without the wrappers."""
    return vm.command[len(SETPRIV) + 2 :]


def as_user(code: str, *words: str, uid: int = USER) -> None:
    """Run some Python in a child of ours that has become that user."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            exec(code, {"words": words, "os": os, "cprd": cprd, "socket": socket})
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


HOLD = """
state = cprd.State()
state.save_fd("x", 0, os.eventfd(0))
cprd.connect(words[0]).save(words[1], state)
"""


# Whose NAME


def test_root_saves_starts_upgrades_and_stops_for_another_user_by_the_full_name(
    theirs: Machine,
) -> None:
    vm = theirs
    checked = vm.cprctl("qemu", "check", "--qmp", vm.qmp)
    assert (checked.returncode, checked.stderr) == (0, "")
    saved = vm.save()
    assert saved.returncode == 0, saved.stderr
    assert [(row["name"], row["uid"], row["phase"]) for row in rows(vm)] == [("vm", USER, "held")]
    assert vm.alive() == []
    vm.start()
    vm.goes_on()
    for command in (vm.command, bare(vm)):
        done = vm.upgrade(vm.qmp, command)
        assert done.returncode == 0, done.stderr
        assert listener(vm.qmp) == vm.alive()[0]
        assert [uid_of(pid) for pid in vm.alive()] == [USER]
        assert second_names(vm) == []
        vm.goes_on()
    stopped = vm.cprctl("qemu", "stop", "vm", "--owner", str(USER), "--qmp", vm.qmp)
    assert stopped.returncode == 0, stopped.stderr
    vm.start(command=bare(vm))
    vm.goes_on()
    assert [uid_of(pid) for pid in vm.alive()] == [USER], "a bare QEMU runs as the owner"
    assert rows(vm) == []
    assert left(vm) == []


def left(vm: Machine) -> list[str]:
    """What is beside the monitor and belongs to root, or is a private directory."""
    return [
        path.name
        for path in vm.place.iterdir()
        if path.name.startswith(".cprd-") or (path.lstat().st_uid == 0 and path != vm.err)
    ]


def test_a_bare_name_is_refused_with_the_words_to_type(theirs: Machine) -> None:
    vm = theirs
    vm.name = "vm"
    for typed in (words(vm, "save"), ["qemu", "stop", "vm", "--qmp", vm.qmp], words(vm, "upgrade")):
        done = vm.cprctl(*typed)
        assert done.returncode == 1
        whole = shlex.join(["cprctl", *typed[:2], f"{USER}/vm", *typed[3:]])
        assert done.stderr.endswith(f"say whose it is: {whole}\n"), done.stderr
    vm.goes_on()
    assert rows(vm) == []
    again = vm.cprctl(*shlex.split(done.stderr.partition("say whose it is: cprctl ")[2]))
    assert again.returncode == 0, again.stderr
    vm.goes_on()


def test_the_vm_of_root_is_not_saved_or_moved_for_another_user(vm: Machine) -> None:
    for name in (f"{USER}/vm", "vm"):
        vm.name = name
        owner = () if "/" in name else ("--owner", str(USER))
        for done in (vm.save(*owner), vm.cprctl("qemu", "stop", name, *owner, "--qmp", vm.qmp)):
            assert done.returncode == 1
            assert f"(uid {USER})" in done.stderr  # may not even connect
    assert rows(vm) == []
    vm.goes_on()
    vm.name = "0/vm"
    assert vm.save().returncode == 0
    assert [(row["name"], row["uid"]) for row in rows(vm)] == [("vm", 0)]


def test_a_name_of_another_user_neither_starts_nor_keeps_the_vm_of_root(
    make_machine: MakeMachine, daemon: DaemonProcess
) -> None:
    """Root's QEMU resumed the guest of whoever held its name; an empty hold kept it off."""
    as_user(HOLD, daemon.path, "vm")
    vm = make_machine()
    waited = vm.cprctl("wait", "vm", "--timeout", "0")
    assert waited.returncode == 3
    assert f"of uid 0; but uid {USER} holds a 'vm': {USER}/vm" in waited.stderr
    vm.start()
    vm.goes_on()
    assert f"{USER}/vm" in vm.said()
    assert vm.save().returncode == 0
    vm.start()
    vm.goes_on()
    assert [(row["uid"], row["phase"]) for row in rows(vm)] == [(USER, "held")]


def ids(pid: int) -> list[int]:
    return identities(pid)[0]


@pytest.mark.parametrize("uid", [USER, OTHER])
def test_a_qemu_that_changes_its_user_is_nobodys_to_hand_over(
    make_machine: MakeMachine, uid: int
) -> None:
    """-run-with user=: root's socket, another user's process. The process counts."""
    vm = make_machine("-run-with", f"user={uid}:{uid}", "-no-shutdown")
    give_away(vm, uid)
    vm.start()
    vm.goes_on()
    assert "cannot be handed over" in vm.said()
    (pid,) = vm.alive()
    assert ids(pid) == [uid] * 4
    checked = vm.cprctl("qemu", "check", "--qmp", vm.qmp)
    assert checked.returncode == 1
    assert f"no: the QEMU at {vm.qmp} runs as uid {uid}" in checked.stdout
    assert f"{uid}/NAME" in checked.stdout
    for done in (vm.save(), vm.upgrade(vm.qmp, bare_without_user(vm))):
        assert done.returncode == 1
        assert f"runs as uid {uid}" in done.stderr
    vm.goes_on()
    assert rows(vm) == []
    assert not [name for name in os.listdir(vm.place) if name.startswith(".cprd-")]
    Path(vm.qmp).chmod(0o666)  # that user may speak to it, too, and learns the same
    vm.name = f"{uid}/vm"
    for done in (vm.save(), vm.cprctl("qemu", "check", "--owner", str(uid), "--qmp", vm.qmp)):
        assert done.returncode == 1
        assert "uid 0" in done.stderr
    vm.goes_on()


def bare_without_user(vm: Machine) -> list[str]:
    at = vm.command.index("-run-with")
    return [*vm.command[:at], *vm.command[at + 2 :]]


def test_such_a_qemu_has_a_power_button_and_takes_no_held_state(make_machine: MakeMachine) -> None:
    vm = make_machine("-no-shutdown")
    vm.start()
    vm.goes_on()
    assert vm.save().returncode == 0
    right = vm.command
    vm.command = [*right, "-run-with", f"user={USER}:{USER}"]
    assert vm.start().wait(PATIENCE) == 1
    assert "held as before" in vm.said()
    give_away(vm)  # (its files: the QEMU opens them as root, and writes as the user)
    shutil.chown(vm.place, 0, 0)
    assert vm.cprctl("drop", vm.name, "--force").returncode == 0
    vm.log.unlink()
    vm.start()
    vm.goes_on()
    stopped = vm.cprctl("qemu", "stop", "vm", "--qmp", vm.qmp, "--powerdown-timeout", "5")
    assert stopped.returncode == 0, stopped.stderr
    assert f"not saved: the QEMU at {vm.qmp} runs as uid {USER}" in stopped.stderr
    assert "the guest was shut down" in stopped.stderr
    assert vm.alive() == []


# As whom, and where


def identities(pid: int) -> tuple[list[int], int]:
    """(real, effective, saved and file system uid; effective capabilities) of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return [int(uid) for uid in found["Uid"].split()], int(found["CapEff"], 16)


def entries(vm: Machine) -> dict[str, int]:
    """What is in its directory and in private ones there, and whose."""
    return {
        str(path.relative_to(vm.place)): path.lstat().st_uid
        for path in vm.place.rglob("*")
        if path != vm.err
    }


@pytest.mark.parametrize(
    ("verb", "moments"),
    [
        ("save", ("qemu-save:connected", "qemu-save:settings", "qemu-save:main")),
        ("upgrade", ("qemu-upgrade:connected", "qemu-upgrade:guarded", "qemu-upgrade:ready")),
    ],
)
def test_all_that_root_makes_for_a_user_is_the_users_at_every_moment(
    theirs: Machine, verb: str, moments: tuple[str, ...]
) -> None:
    """Made by root and given away afterwards, the user could put a link in its place."""
    vm = theirs
    for moment in moments:
        standing = Standing(vm, moment, *words(vm, verb))
        assert identities(standing.process.pid) == ([0, USER, 0, USER], 0)
        as_user(SIGNALS, str(standing.process.pid))
        assert set(entries(vm).values()) == {USER}, entries(vm)
        standing.signal(signal.SIGTERM)
        status, said = standing.go()
        assert status == 128 + signal.SIGTERM, said
        vm.goes_on(3)
    assert left(vm) == []


SIGNALS = """
try:
    os.kill(int(words[0]), 9)
except PermissionError:
    os._exit(0)
os._exit(1)
"""


def test_a_directory_that_is_swapped_leads_root_nowhere(theirs: Machine, tmp_path: Path) -> None:
    """The user puts a link to a directory of root's in the place of the private one."""
    vm = theirs
    tmp_path.chmod(0o700)
    standing = Standing(vm, "qemu-save:settings", *words(vm, "save"))
    (name,) = (path.name for path in vm.place.iterdir() if path.name.startswith(".cprd-"))
    as_user(
        "os.rename(words[0], words[0] + '.mine'); os.symlink(words[1], words[0])",
        str(vm.place / name),
        str(tmp_path),
    )
    status, said = standing.go()
    assert status == 1, said
    assert "the guest runs on in its QEMU" in said
    assert list(tmp_path.iterdir()) == []
    assert set(entries(vm).values()) == {USER}
    vm.goes_on()


@pytest.mark.full
def test_a_thief_of_directories_gets_nothing_of_roots(theirs: Machine, tmp_path: Path) -> None:
    """The user swaps each private directory for a link as fast as can be."""
    vm = theirs
    tmp_path.chmod(0o700)
    thief = os.fork()
    if thief == 0:
        try:
            as_user(THIEF, str(vm.place), str(tmp_path))
        finally:
            os._exit(0)
    try:
        for _ in range(30):
            if vm.save().returncode == 0:
                break  # (the thief was late; afterwards there is no QEMU)
            assert set(entries(vm).values()) == {USER}
    finally:
        (vm.place / "over").touch()
        os.waitpid(thief, 0)
        (vm.place / "over").unlink()
    assert list(vm.place.glob("stolen*")) != []
    assert set(entries(vm).values()) == {USER}
    assert list(tmp_path.iterdir()) == []


THIEF = """
place, stolen = words[0], 0
while not os.path.exists(place + "/over"):
    for name in os.listdir(place):
        path = place + "/" + name
        if name.startswith(".cprd-") and not os.path.islink(path):
            try:
                os.rename(path, place + "/stolen" + str(stolen))
                os.symlink(words[1], path)
                stolen += 1
            except OSError:
                pass
"""


def test_what_a_saver_wrote_leads_root_nowhere(
    make_machine: MakeMachine, daemon: DaemonProcess, tmp_path: Path
) -> None:
    """A section says where the monitor was, for which uid the directory is, and where a mark is."""
    mark = tmp_path / ".cprd-00000001"
    mark.mkdir()
    (mark / "untouched").touch()
    as_user(FORGED, daemon.path, str(tmp_path / "qmp"), str(mark / "untouched"))
    vm = make_machine(wrappers=[*SETPRIV, "prlimit", "--core=0"])
    give_away(vm)
    vm.name = f"{USER}/vm"
    without = [word for word in vm.command if word != "-qmp" and not word.startswith("unix:")]
    assert vm.start(command=without).wait(PATIENCE) != 0
    vm.until(lambda: re.search("than those that are held|damaged", vm.said()), "why")
    assert vm.cprctl("drop", vm.name, "--force").returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == [mark.name]
    assert (mark / "untouched").exists()


FORGED = """
state = cprd.State()
state.save_fd("ram0", 0, os.memfd_create("ram0"))
state["cpr"], state["main"] = b"QCPR", b"QEVM"
record = {"pid": os.getpid(), "start": 0}
state["qemu"] = {
    "format": 1, "version": "10.0.0", "qmp": words[1], "status": "running", "machine": "q35",
    "uid": 0, "old": record, "new": None, "untouched": words[2],
}
cprd.connect(words[0]).save("vm", state)
"""


def test_in_a_directory_of_others_root_does_nothing_for_its_own_vm(vm: Machine) -> None:
    vm.place.chmod(0o777)
    for done in (vm.save(), vm.upgrade(vm.qmp, vm.command)):
        assert done.returncode == 1
        assert "root does nothing in it" in done.stderr
    vm.place.chmod(0o755)
    assert vm.save().returncode == 0


def test_a_living_socket_in_a_directory_for_all_is_not_renamed_over(tmp_path: Path) -> None:
    """A SEQPACKET listener answers a STREAM probe with EPROTOTYPE: it lives."""
    place = tmp_path / "for-all"
    place.mkdir()
    place.chmod(0o1777)
    for each in (tmp_path, *tmp_path.parents):
        if str(each).startswith("/tmp/"):
            each.chmod(each.stat().st_mode | 0o711)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as living:
        living.bind(str(place / "qmp"))
        living.listen()
        there = (place / "qmp").stat().st_ino
        with socket.socket(socket.AF_UNIX) as second:
            second.bind(str(place / "qmp.new"))
            second.listen()
            mend(str(place / "qmp"))
            assert (place / "qmp").stat().st_ino == there
            living.close()
            os.chown(place / "qmp.new", USER, USER)
            mend(str(place / "qmp"))
            assert (place / "qmp").stat().st_ino == there, "a stranger's second name"
            os.chown(place / "qmp.new", 0, 0)
            mend(str(place / "qmp"))
            assert (place / "qmp").stat().st_ino != there


def test_leftovers_of_others_are_left_alone(tmp_path: Path) -> None:
    old = tmp_path / ".cprd-00000001"
    old.mkdir()
    (old / "cpr").touch()
    os.utime(old, (0, 0))
    os.chown(old, USER, USER)
    PrivateDirectory(str(tmp_path / "qmp")).close()
    assert (old / "cpr").exists()
    os.chown(old, 0, 0)
    os.utime(old, (0, 0))
    PrivateDirectory(str(tmp_path / "qmp")).close()
    assert not old.exists()


def test_the_environment_of_a_qemu_names_no_guard_that_the_kernel_does_not_show(
    tmp_path: Path,
) -> None:
    """$CPRD_GUARD of another process made root write into the output of any process."""
    victim = tmp_path / "victim"
    with victim.open("w") as out:
        named = subprocess.Popen(["sleep", "60"], stdout=out)
    env = {"CPRD_GUARD": guard_mark(named.pid)}
    theirs = subprocess.Popen(
        ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "sleep", "60"],
        env={**os.environ, **env},
        stderr=subprocess.PIPE,
    )
    try:
        until(lambda: uid_of(theirs.pid) == USER, lambda: "still root")
        process = Process.open(theirs.pid, USER)
        assert process is not None
        for uid in (0, USER):
            identity.act_as(uid)
            try:
                fd = output_of(process, 2)
                assert os.readlink(f"/proc/self/fd/{fd}") != str(victim)
                os.close(fd)
            finally:
                identity.act_as_ourselves()
        process.close()
    finally:
        for each in (named, theirs):
            each.kill()
            each.communicate()


def test_acting_as_a_user_and_back() -> None:
    before = (os.getresuid(), os.getresgid(), sorted(os.getgroups()))
    identity.act_as(USER, 77)
    try:
        assert (os.getresuid(), os.getresgid()[1], os.getgroups()) == ((0, USER, 0), 77, [77])
        with pytest.raises(PermissionError):
            os.listdir("/root")
        with identity.wholly():
            assert os.getresuid() == (USER, USER, 0)
            with pytest.raises(PermissionError):
                os.kill(1, 0)
        assert os.getresuid() == (0, USER, 0)
    finally:
        identity.act_as_ourselves()
    assert (os.getresuid(), os.getresgid(), sorted(os.getgroups())) == before


# What others hold


def test_root_looks_into_no_hold_of_another_uid(vm: Machine, daemon: DaemonProcess) -> None:
    """Into every one in doubt, in the process of the command: a manifest took a minute, a file of
    a file system that does not answer took for ever."""
    for number in range(30):
        as_user(DOUBTFUL, daemon.path, f"doubt{number}")
    assert [row["phase"] for row in rows(vm)] == ["in-doubt"] * 30
    traced = vm.place / "opened"
    done = vm.save(env={"CPRD_PAUSE_LOG": str(traced)})
    assert done.returncode == 0, done.stderr
    assert "load:peeked" not in traced.read_text().split()


DOUBTFUL = """
state = cprd.State()
state.save_fd("x", 0, os.eventfd(0))
prepared = cprd.connect(words[0]).prepare(words[1], state)
"""


@pytest.mark.parametrize("what", ["nested", "long", "deep"])
def test_a_section_that_swells_is_shown_without_its_value(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    data = {
        "nested": b"\x91" * 4000 + b"\xc0",
        "long": b"\xdd\x00\x00\x0f\xff" + b"\xc0" * 4000,
        "deep": b"\x91" * 17 + b"\xc0",
    }[what]
    state = cprd.State()
    state.save_fd("x", 0, 0)
    section = InlineSection(data, packed=True)
    monkeypatch.setattr(cprd.State, "sections", lambda _: iter([("s", section)]))
    with daemon.connect() as connection:
        connection.save("swollen", state)
        monkeypatch.undo()
        (shown,) = connection.show("swollen")["sections"]
    assert shown["value"] is None


def test_a_look_that_swells_is_ended() -> None:
    with pytest.raises(cprd.LimitExceeded, match="memory"):
        in_a_child(lambda: {"x": bytes(400 << 20)}, memory=64 << 20)


@pytest.mark.full
def test_a_hold_that_does_not_answer_keeps_a_save_for_seconds_and_not_for_ever(
    vm: Machine, daemon: DaemonProcess, tmp_path: Path
) -> None:
    """Another process looks into what is held under NAME."""
    if not os.path.exists("/dev/fuse"):
        pytest.skip("no /dev/fuse")
    mute = Mute(tmp_path / "mute")
    code = f"import os, cprd\nwords = {[daemon.path, str(mute.place)]}\n{MUTE}"
    saver = subprocess.Popen([sys.executable, "-c", code], cwd=CHECKOUT)
    try:
        until(lambda: [row["phase"] for row in rows(vm)] == ["held"], lambda: "no hold")
        began = time.monotonic()
        done = vm.save()
        assert time.monotonic() - began < 3 * LOOK
        assert done.returncode in (1, 4), done.stderr
        assert "was given up" in done.stderr or "is held already" in done.stderr
        vm.goes_on()
    finally:
        mute.close()
        saver.wait(PATIENCE)


MUTE = """
state = cprd.State()
state.save_fd("x", 0, os.open(words[1] + "/file", os.O_RDONLY))
cprd.connect(words[0]).save("vm", state)
os._exit(0)
"""


# What a QEMU says


PLAYS_QEMU = """
import json, os, socket
listener = socket.socket(socket.AF_UNIX)
listener.bind(words[0] + "~")
listener.listen(5)
os.rename(words[0] + "~", words[0])
version = {"qemu": {"major": 10, "minor": 0, "micro": 2}}
usual = {"query-status": {"status": "running"}, "query-migrate": {}}
while True:
    monitor, _ = listener.accept()
    try:
        monitor.sendall(json.dumps({"QMP": {"version": version}}).encode() + b"\\n")
        for line in monitor.makefile("rb"):
            asked = json.loads(line)
            answer = usual.get(asked["execute"], ["\\x1b[31m"])
            monitor.sendall(json.dumps({"id": asked["id"], "return": answer}).encode() + b"\\n")
    except OSError:
        pass
"""


def test_answers_of_another_form_are_said_in_a_line(make_machine: MakeMachine) -> None:
    theirs = make_machine()
    give_away(theirs)
    theirs.name = f"{USER}/vm"
    code = f"import sys\nwords = sys.argv[1:]\n{PLAYS_QEMU}"
    peer = subprocess.Popen([*SETPRIV, sys.executable, "-c", code, theirs.qmp])
    try:
        theirs.until(lambda: Path(theirs.qmp).exists(), "a listener")
        for verb in (["check"], ["save", theirs.name], ["upgrade", theirs.name]):
            more = ["--", *theirs.command] if verb[0] == "upgrade" else []
            done = theirs.cprctl("qemu", *verb, "--qmp", theirs.qmp, *more)
            assert done.returncode == 1
            assert "another form than QEMU's" in done.stderr
            assert done.stderr.count("\n") == 1
            assert "\x1b" not in done.stderr
    finally:
        peer.kill()
        peer.wait()


def test_no_escape_sequence_of_a_qemu_reaches_a_terminal(make_machine: MakeMachine) -> None:
    vm = make_machine()
    escape = "\x1b]0;owned\x07"
    vm.command += ["-chardev", f"file,id=c0,path={vm.place}/{escape}", "-serial", "chardev:c0"]
    vm.start()
    vm.goes_on()
    checked = vm.cprctl("qemu", "check", "--qmp", vm.qmp)
    assert checked.returncode == 0, checked.stderr
    assert "owned" in checked.stdout
    assert "\x1b" not in checked.stdout
    assert vm.save().returncode == 0
    assert "\x1b" not in vm.cprctl("show", "vm").stdout
    leader, terminal = pty.openpty()
    try:
        wrong = [*vm.command, "-device", f"no-such-device{escape}"]
        process = subprocess.Popen(
            vm.argv("qemu", "start", "vm", "--", *wrong),
            env=vm.env,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
        )
        os.close(terminal)
        said = b""
        with contextlib.suppress(OSError):  # EIO: nobody has the terminal any more
            while piece := os.read(leader, 4096):
                said += piece
        assert process.wait(PATIENCE) != 0
    finally:
        os.close(leader)
    assert b"no-such-device" in said
    assert b"\x1b" not in said
    assert b"\x07" not in said

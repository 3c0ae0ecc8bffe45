"""cprd.systemd.fdstore against the real store: what is kept, what is silently not, and what comes
back.

Each test runs a small service whose main process is the program given; what it prints is in the
journal.
"""

from __future__ import annotations

import os
import signal
import textwrap
from pathlib import Path

from cprd.linux import listen_fds

from .machine import Machine

HEAD = """
import os, select, signal, socket, sys
from cprd.linux import listen_fds
from cprd.systemd import fdstore, notify
manager = notify.Manager.from_environment(os.environ)
assert manager is not None
held = listen_fds.take(os.environ)

def do(steps):
    return notify.drive(steps, 20)

def say(*words):
    print(*words, flush=True)

def memfd(text):
    fd = os.memfd_create(text)
    os.write(fd, text.encode())
    return fd

def read(fd):
    return os.pread(fd, 99, 0).decode()
"""
TAIL = """
do(manager.tell(notify.READY))
while True:
    signal.pause()
"""


def service(
    machine: Machine, directory: Path, program: str, settings: str = "", start: bool = True
) -> None:
    """Write (and start) x.service, running `program` with `do`, `say`, `manager` and `held`."""
    (directory / "program.py").write_text(HEAD + textwrap.dedent(program) + TAIL)
    machine.unit(
        "x.service",
        "[Unit]\nStartLimitIntervalSec=0\n[Service]\nType=notify\nNotifyAccess=main\n"
        f"FileDescriptorStoreMax=16\nRestart=always\nRestartSec=0\n{settings}\n"
        f"ExecStart=test-python {directory}/program.py\n",
    )
    if start:
        machine.systemctl("start", "x.service")


def stored(machine: Machine) -> int:
    return int(machine.show("x.service", "NFileDescriptorStore"))


def kill(machine: Machine) -> None:
    os.kill(machine.main_pid("x.service"), signal.SIGKILL)


def test_a_full_store_is_noticed_and_what_was_in_it_stays(systemd: Machine, tmp_path: Path) -> None:
    program = """
    if not held:
        say("first", do(fdstore.keep(manager, [("a", memfd("a")), ("b", memfd("b"))])))
        say("no room for a probe", do(fdstore.keep(manager, [("c", memfd("c"))])))
        say("no room at all", do(fdstore.keep(manager, [("d", memfd("d"))])))
        do(fdstore.remove(manager, "c"))
        say("room again", do(fdstore.probe(manager)))
    say("held", *(f"{name}={read(fd)}" for name, fd in held))
    """
    service(systemd, tmp_path, program, "FileDescriptorStoreMax=3")
    journal = systemd.journal("x.service")
    for line in (
        "first True",
        "no room for a probe False",
        "no room at all False",
        "room again True",
    ):
        assert line in journal
    assert stored(systemd) == 2
    kill(systemd)
    systemd.await_journal("^held b=b a=a$", "x.service")


def test_without_a_store_nothing_is_said_to_be_kept(systemd: Machine, tmp_path: Path) -> None:
    program = 'say("kept", do(fdstore.keep(manager, [("a", memfd("a"))])))'
    service(systemd, tmp_path, program, "FileDescriptorStoreMax=0")
    systemd.await_journal("^kept False$", "x.service")


def test_a_store_that_drops_everything_is_never_said_to_keep(
    systemd: Machine, tmp_path: Path
) -> None:
    """From 254 on what is dropped is closed well after the barrier: whoever waits for it to hang up
    is told "kept" by one question in six."""
    program = """
    say("kept", sum(do(fdstore.probe(manager)) for _ in range(300)), "of 300")
    """
    service(systemd, tmp_path, program, "FileDescriptorStoreMax=0\nLogRateLimitIntervalSec=0")
    systemd.await_journal("^kept 0 of 300$", "x.service")


def test_a_store_with_room_for_one_always_keeps_one(systemd: Machine, tmp_path: Path) -> None:
    program = """
    say("kept", sum(do(fdstore.probe(manager)) for _ in range(300)), "of 300")
    """
    service(systemd, tmp_path, program, "FileDescriptorStoreMax=1")
    systemd.await_journal("^kept 300 of 300$", "x.service")


def test_a_child_that_the_manager_does_not_listen_to_is_not_told_kept(
    systemd: Machine, tmp_path: Path
) -> None:
    program = """
    pid = os.fork()
    if pid == 0:
        say("child kept", do(fdstore.keep(manager, [("a", memfd("a"))])))
        os._exit(0)
    os.waitpid(pid, 0)
    """
    service(systemd, tmp_path, program)
    systemd.await_journal("^child kept False$", "x.service")
    assert stored(systemd) == 0


def test_what_hung_up_or_never_connected_survives_kill_9_and_daemon_reexec(
    systemd: Machine, tmp_path: Path
) -> None:
    program = """
    if not held:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        far.close()
        lonely = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        pipe, end = os.pipe()
        os.close(end)
        kept = [("near", near.fileno()), ("lonely", lonely.fileno()), ("pipe", pipe)]
        say("kept", do(fdstore.keep(manager, kept)))
    say("held", *(name for name, _ in held))
    """
    service(systemd, tmp_path, program)
    systemd.await_journal("^kept True$", "x.service")
    systemd.systemctl("daemon-reexec")
    systemd.systemctl("daemon-reload")
    kill(systemd)
    systemd.await_journal("^held pipe lonely near$", "x.service")
    assert stored(systemd) == 3


def test_a_parked_bundle_is_whole_after_kill_9(systemd: Machine, tmp_path: Path) -> None:
    """What a shelf rests on: a pair is stored once, then appended to without a word to PID 1."""
    program = """
    if not held:
        a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        assert do(fdstore.keep(manager, [("a", a.fileno()), ("b", b.fileno())]))
        do(manager.tell(notify.READY))
        for number in range(100):
            fd = memfd(str(number))
            socket.send_fds(a, [b"record %d" % number], [fd], socket.MSG_DONTWAIT)
            os.close(fd)
        os.kill(os.getpid(), signal.SIGKILL)
    b = socket.socket(fileno=dict(held)["b"])
    seen = []
    while len(seen) < 100:
        text, fds, _, _ = socket.recv_fds(b, 99, 9)
        seen.append(text == b"record " + read(fds[0]).encode())
    say("all there", all(seen))
    """
    service(systemd, tmp_path, program)
    systemd.await_journal("^all there True$", "x.service")


def test_a_probe_left_by_a_killed_process_comes_back_by_name_and_goes(
    systemd: Machine, tmp_path: Path
) -> None:
    program = """
    if not held:
        witness = fdstore.Witness()
        do(fdstore.store(manager, fdstore.PROBE, witness.fileno()))
        do(manager.tell(notify.READY))
        os.kill(os.getpid(), signal.SIGKILL)
    say("held", *(name for name, _ in held))
    for _, fd in held:
        os.close(fd)
    do(fdstore.remove(manager, fdstore.PROBE))
    do(manager.barrier())
    say("removed")
    """
    service(systemd, tmp_path, program)
    systemd.await_journal("^held cprd-canary$", "x.service")
    systemd.await_journal("^removed$", "x.service")
    assert stored(systemd) == 0


def test_a_probe_lets_go_of_every_descriptor_it_used(systemd: Machine, tmp_path: Path) -> None:
    program = """
    do(manager.barrier())
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        assert do(fdstore.probe(manager))
    do(manager.barrier())
    say("descriptors more", len(os.listdir("/proc/self/fd")) - before)
    """
    service(systemd, tmp_path, program)
    systemd.await_journal("^descriptors more 0$", "x.service")
    assert stored(systemd) == 0


def test_sockets_come_first_then_the_store_newest_first(systemd: Machine, tmp_path: Path) -> None:
    program = """
    if len(held) == 2:
        odd = [("one", memfd("1")), ("two", memfd("2")), ("~/ odd", memfd("3"))]
        assert do(fdstore.keep(manager, odd))
        do(manager.tell(notify.READY))
        os.kill(os.getpid(), signal.SIGKILL)
    say("held", *(f"{name}@{fd}" for name, fd in held))
    say("inheritable", *(fd for _, fd in held if os.get_inheritable(fd)))
    say("left", *(name for name in os.environ if name.startswith("LISTEN")))
    """
    systemd.unit(
        "x.socket",
        "[Unit]\nStartLimitIntervalSec=0\n[Socket]\nTriggerLimitIntervalSec=0\n"
        f"ListenSequentialPacket={tmp_path}/s1\nListenSequentialPacket={tmp_path}/s2\n"
        "FileDescriptorName=public\n",
    )
    service(systemd, tmp_path, program, "Sockets=x.socket", start=False)
    systemd.systemctl("start", "x.socket")
    systemd.systemctl("start", "x.service")
    systemd.await_journal("^held public@3 public@4 ~/ odd@5 two@6 one@7$", "x.service")
    systemd.await_journal("^inheritable$", "x.service")
    systemd.await_journal("^left$", "x.service")


def test_names_up_to_the_bound_come_back_and_one_byte_more_ends_the_service(
    systemd: Machine, tmp_path: Path
) -> None:
    program = """
    if not held:
        count = int(open(sys.argv[0] + ".count").read())
        last = int(open(sys.argv[0] + ".last").read())
        names = ["%03d" % n + "x" * 252 for n in range(count)] + ["y" * last]
        say("left", listen_fds.names_left(names))
        fds = [os.memfd_create("m") for _ in names]
        assert do(fdstore.keep(manager, list(zip(names, fds))))
        do(manager.tell(notify.READY))
        os.kill(os.getpid(), signal.SIGKILL)
    say("came back", len(held), "left", listen_fds.names_left(name for name, _ in held))
    """
    count, last = divmod(listen_fds.names_left([]), 256)
    (tmp_path / "program.py.count").write_text(str(count))
    (tmp_path / "program.py.last").write_text(str(last - 1))
    service(systemd, tmp_path, program, "FileDescriptorStoreMax=1024\nLimitNOFILE=16384")
    systemd.await_journal(f"^came back {count + 1} left 0$", "x.service")
    systemd.systemctl("stop", "x.service")

    (tmp_path / "program.py.last").write_text(str(last))
    systemd.systemctl("start", "--no-block", "x.service")
    systemd.await_journal("^left -1$", "x.service")
    systemd.await_journal("Argument list too long", "x.service")
    assert systemd.journal("x.service").count("came back") == 1
    systemd.systemctl("stop", "x.service")


def test_a_reload_lasts_until_ready_is_said_again(systemd: Machine, tmp_path: Path) -> None:
    program = """
    def again(*_):
        do(manager.tell(notify.reloading() + b"\\n" + notify.status("at it")))
        os.environ["AGAIN"] = "1"
        held.append(("own", memfd("own")))
        listen_fds.pass_on(held, os.environ)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    signal.signal(signal.SIGHUP, again)
    if "AGAIN" in os.environ:
        say("again", os.getpid(), *(f"{name}={read(fd)}" for name, fd in held))
    """
    service(systemd, tmp_path, program, "ExecReload=kill -HUP $MAINPID")
    pid = systemd.main_pid("x.service")
    systemd.systemctl("reload", "x.service")
    systemd.await_journal(r"^again \d+ own=own$", "x.service")
    assert systemd.main_pid("x.service") == pid
    assert systemd.show("x.service", "ActiveState") == "active"


def test_another_process_becomes_the_main_one(systemd: Machine, tmp_path: Path) -> None:
    program = """
    do(manager.tell(notify.READY))
    pid = os.fork()
    if pid:
        do(manager.tell(notify.mainpid(pid)))
        do(manager.barrier())
        os._exit(0)
    while os.getppid() != 1:
        signal.sigtimedwait([signal.SIGCHLD], 0.01)
    say("my parent is gone")
    say("kept", do(fdstore.keep(manager, [("a", memfd("a"))])))
    """
    service(systemd, tmp_path, program)
    systemd.await_journal("^kept True$", "x.service")
    assert systemd.show("x.service", "NRestarts") == "0"


def test_a_stopped_manager_delays_the_caller_no_longer_than_asked(
    systemd: Machine, tmp_path: Path
) -> None:
    program = f"""
    from cprd.errors import Timeout
    do(manager.tell(notify.READY))
    with open({str(tmp_path)!r} + "/go") as go:
        go.read()
    try:
        notify.drive(manager.barrier(), 0.05)
    except Timeout:
        outcome = "timed out"
    count = 0
    while manager.send_now(notify.WATCHDOG):
        count += 1
    with open({str(tmp_path)!r} + "/full", "w") as full:
        full.write(outcome)
    say("kept", do(fdstore.keep(manager, [("a", memfd("a"))])), "behind", count > 100)
    """
    os.mkfifo(tmp_path / "go")
    os.mkfifo(tmp_path / "full")
    service(systemd, tmp_path, program)
    os.kill(systemd.pid, signal.SIGSTOP)
    try:
        (tmp_path / "go").write_text("")
        assert (tmp_path / "full").read_text() == "timed out"
    finally:
        os.kill(systemd.pid, signal.SIGCONT)
    systemd.await_journal("^kept True behind True$", "x.service")


def test_under_trio_many_tasks_keep_at_once(systemd: Machine, tmp_path: Path) -> None:
    program = """
    import trio
    from cprd.daemon.manager import adrive
    async def one(number):
        fd = memfd(str(number))
        await adrive(fdstore.store(manager, f"n{number}", fd))
        await adrive(manager.barrier())
        os.close(fd)
    async def main():
        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(one, number)
        say("room", await adrive(fdstore.probe(manager)))
    if not held:
        trio.run(main)
        do(manager.tell(notify.READY))
        os.kill(os.getpid(), signal.SIGKILL)
    say("held", *sorted(f"{name}={read(fd)}" for name, fd in held))
    """
    service(systemd, tmp_path, program)
    systemd.await_journal("^room True$", "x.service")
    expected = " ".join(f"n{number}={number}" for number in range(10))
    systemd.await_journal(f"^held {expected}$", "x.service")


def test_the_watchdog_in_the_environment_is_for_the_main_process(
    systemd: Machine, tmp_path: Path
) -> None:
    program = 'say("every", notify.watchdog_interval(os.environ))'
    service(systemd, tmp_path, program, "WatchdogSec=30s")
    systemd.await_journal(r"^every 30\.0$", "x.service")

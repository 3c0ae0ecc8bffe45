"""Programs that know nothing of cprd: `cprctl run --bind`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cprd
from benchmarks.listeners import PROGRAMS, is_there, measure
from cprd.bind import build, program
from tests.support.cprctl import cprctl, free_port
from tests.support.daemon import DaemonProcess

CC = shutil.which("cc")
needs_cc = pytest.mark.skipif(
    CC is None, reason="needs a C compiler: apt-get install gcc libc6-dev"
)


# -- real programs -------------------------------------------------------------------------------


def through_restarts(daemon: DaemonProcess, place: Path, name: str, **how: Any) -> None:
    if not is_there(PROGRAMS[name]):
        pytest.skip(f"needs {PROGRAMS[name].file}: apt-get install {PROGRAMS[name].package}")
    for number in (signal.SIGTERM, signal.SIGKILL):
        count = measure(name, daemon.path, number, place / str(int(number)), **how)
        assert count.refused == 0, (number, count)
        assert count.reset <= count.asked // 50, (number, count)  # in its hands when it ended


@needs_cc
def test_redis_is_restarted_and_refuses_nobody(daemon: DaemonProcess, tmp_path: Path) -> None:
    through_restarts(daemon, tmp_path, "redis", seconds=3.0, rate=200)


@needs_cc
@pytest.mark.full
@pytest.mark.parametrize("name", PROGRAMS)
def test_unmodified_programs_are_restarted_and_refuse_nobody(
    daemon: DaemonProcess, tmp_path: Path, name: str
) -> None:
    through_restarts(daemon, tmp_path, name, seconds=10.0, rate=200)


# -- what the object does ------------------------------------------------------------------------

# A program with habits: as JSON, what became of each.
HABITS = r"""
import fcntl, json, os, socket, sys, time
port, free, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
held = [int(e.split(":")[1]) for e in os.environ["CPRD_BIND"].split(",")]
said = {"low": sorted(int(n) for n in os.listdir("/proc/self/fd") if int(n) < 100)}

def inode(sock): return os.fstat(sock.fileno()).st_ino
def tcp(reuse=False):
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, reuse)
    return sock

os.closerange(3, 5000)                           # close_range()
for fd in range(3, 1100):                        # close()
    try: os.close(fd)
    except OSError: pass

first = tcp()
first.setblocking(False)
first.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
number, closes = first.fileno(), os.get_inheritable(first.fileno())
first.bind(("127.0.0.1", port))
said["same number"] = first.fileno() == number
said["tcp"] = inode(first) in held
said["kept"] = not os.get_blocking(number) and os.get_inheritable(number) == closes
said["option"] = first.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
first.listen(1)
clients = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(20)]
said["queue"] = len(clients)
first.shutdown(socket.SHUT_RDWR)
said["after shutdown"] = socket.create_connection(("127.0.0.1", port), 5).fileno() > 0
first.close()
again = tcp(); again.bind(("127.0.0.1", port)); said["again"] = inode(again) in held
os.set_inheritable(again.fileno(), True)
heir = tcp(); os.set_inheritable(heir.fileno(), True); heir.bind(("127.0.0.1", port))
said["stays inheritable"] = os.get_inheritable(heir.fileno())
workers = []
for _ in range(3):
    read, write = os.pipe()
    if os.fork() == 0:
        mine = tcp(reuse=True); mine.bind(("127.0.0.1", port)); mine.listen()
        os.write(write, b"1" if inode(mine) in held else b"0"); os._exit(0)
    workers.append(os.read(read, 1).decode()); os.wait()
said["workers"] = "".join(workers)

other = tcp(); other.bind(("127.0.0.1", free)); other.listen()
said["other port"] = inode(other) not in held
udp = socket.socket(type=socket.SOCK_DGRAM); udp.bind(("127.0.0.1", port))
said["other type"] = inode(udp) not in held
try: tcp().bind(("0.0.0.0", port)); said["wildcard"] = "bound"
except OSError as error: said["wildcard"] = error.strerror
six = socket.socket(socket.AF_INET6); six.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
six.bind(("::1", port)); said["other family"] = inode(six) not in held

os.chdir(os.path.dirname(path))
os.unlink(path)                                  # as redis does before it binds
unix = socket.socket(socket.AF_UNIX); unix.bind("./" + os.path.basename(path))
said["unix"] = inode(unix) in held
free_path = path + ".free"
plain = socket.socket(socket.AF_UNIX); plain.bind(free_path); os.remove(free_path)
said["other path"] = inode(plain) not in held and not os.path.exists(free_path)
os.remove(path); said["path stays"] = os.path.exists(path)
child = "import os; print([n for n in os.listdir('/proc/self/fd') if int(n) > 100])"
said["child"] = os.popen(f"{sys.executable} -S -c \"{child}\"").read().strip()
said["env"] = [k for k in os.environ if k.startswith("LISTEN_")]
print(json.dumps(said))
"""


@needs_cc
def test_bind_is_answered_and_nothing_else_is_changed(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    script, path = tmp_path / "habits.py", tmp_path / "sock"
    script.write_text(HABITS)
    port, free = free_port(), free_port()
    listen = [f"--listen=127.0.0.1:{port}", f"--listen=unix:{path}"]
    command = [sys.executable, "-S", str(script), str(port), str(free), str(path)]
    wrapped = ["sh", "-c", 'exec "$@"', "sh", *command]
    for words in (command, wrapped):  # the second start is warm, and by way of a shell
        done = cprctl(daemon, "run", "web", *listen, "--bind", "--", *words)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == {
            "low": [0, 1, 2, 3],  # 3 is its own, of the directory
            "same number": True,
            "tcp": True,
            "kept": True,
            "option": 1,
            "queue": 20,
            "after shutdown": True,
            "again": True,
            "stays inheritable": True,
            "workers": "111",
            "other port": True,
            "other type": True,
            "wildcard": "Address already in use",
            "other family": True,
            "unix": True,
            "other path": True,
            "path stays": True,
            "child": "[]",
            "env": [],
        }
        assert f"in the way: --listen 0.0.0.0:{port} would be it" in done.stderr
        assert f"listens on 127.0.0.1:{free} as well, which is not held" in done.stderr
        assert done.stderr.count("cprd: ") == 2
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))  # nobody runs, and it waits


@needs_cc
def test_a_hold_with_more_than_listeners_is_not_for_a_program_that_binds(
    daemon: DaemonProcess,
) -> None:
    near, far = socket.socketpair()
    with near, far, daemon.connect() as connection:
        state = cprd.State()
        state.save_fd("conn", 0, near)
        connection.save("web", state)
        listen = f"127.0.0.1:{free_port()}"
        done = cprctl(daemon, "run", "web", "--listen", listen, "--bind", "--", "true")
        assert done.returncode == 1
        assert "more than listeners, which a command started with --bind cannot take: conn" in (
            done.stderr
        )
        assert connection.list()[0]["phase"] == "held"


# -- what it is no use for -----------------------------------------------------------------------

GO_NOTE = 'asm(".section .note.go,\\"a\\",@note\\n.long 4,4,4\\n.asciz \\"Go\\\\0\\"\\n.long 0");'


def compiled(place: Path, name: str, *options: str, note: str = "") -> str:
    source = place / f"{name}.c"
    source.write_text(f"{note}\nint main(void) {{ return 0; }}\n")
    assert CC is not None
    path = str(place / name)
    done = subprocess.run(
        [CC, *options, "-o", path, str(source)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cc {' '.join(options)} does not work here: {done.stderr.strip()[-200:]}")
    return path


def env_script(place: Path) -> str:
    script = place / "script"
    script.write_text("#!/usr/bin/env -S static -x\n")
    script.chmod(0o755)
    return str(script)


@needs_cc
def test_programs_that_would_not_notice_are_refused(daemon: DaemonProcess, tmp_path: Path) -> None:
    static = compiled(tmp_path, "static", "-static")
    raised = compiled(tmp_path, "raised")
    if os.geteuid() == 0:
        os.chown(raised, 12345, -1)
        os.chmod(raised, 0o4755)
    else:
        raised = next(filter(shutil.which, ("su", "passwd", "mount")), "")
        raised = shutil.which(raised) or pytest.skip("needs a set-user-ID program")
    go = compiled(tmp_path, "go", note=GO_NOTE)
    path = f"{tmp_path}:{os.environ['PATH']}"
    for command, why in (
        (static, "statically linked"),
        (raised, "set-user-ID"),
        (go, "written in Go"),
        (env_script(tmp_path), "statically linked"),
    ):
        listen = f"127.0.0.1:{free_port()}"
        done = cprctl(daemon, "run", "web", "--listen", listen, "--bind", "--", command, PATH=path)
        assert done.returncode == 1, (command, done.stderr)
        assert why in done.stderr
        assert done.stderr.count("\n") == 1
    with daemon.connect() as connection:
        assert connection.list() == []


def test_without_a_compiler_it_says_so(daemon: DaemonProcess, tmp_path: Path) -> None:
    if any(Path(build.HERE).glob("bind-*.so")):
        pytest.skip("an object is built beside its source: remove cprd/bind/bind-*.so")
    listen = f"127.0.0.1:{free_port()}"
    words = ["run", "web", "--listen", listen, "--bind", "--", sys.executable, "-c", ""]
    done = cprctl(daemon, *words, PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path), CC="")
    assert done.returncode == 1
    assert "no C compiler" in done.stderr
    assert "apt-get install gcc" in done.stderr


@needs_cc
def test_an_object_that_others_could_have_written_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CACHE_DIRECTORY", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "HERE", str(tmp_path / "nowhere"))
    made = build.find_or_build()
    assert made.startswith(f"{tmp_path}/cprd/bind-")
    elf = program.read(made)
    assert elf is not None
    at = os.stat(made).st_mtime_ns
    assert build.find_or_build() == made
    assert os.stat(made).st_mtime_ns == at, "it is not built again"
    os.chmod(made, 0o722)
    assert build.find_or_build() == made
    assert os.stat(made).st_mode & 0o022 == 0, "built anew"
    for folder, mode in ((tmp_path / "cprd", 0o777), (tmp_path, 0o777)):
        before = folder.stat().st_mode
        os.chmod(folder, mode)
        with pytest.raises(cprd.CprdError, match="can be written or replaced by others"):
            build.find_or_build()
        os.chmod(folder, before)
    assert build.find_or_build() == made


@needs_cc
def test_the_source_compiles_without_a_warning(tmp_path: Path) -> None:
    assert CC is not None
    options = ["-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    out = ["-o", str(tmp_path / "bind.so"), build.SOURCE]
    subprocess.run([CC, *options, *out], check=True, timeout=60)

#!/usr/bin/env python3
"""Boots this machine's own systemd, for real and for a moment, beside whatever else runs.

    boot.py [--tree DIR] [--bind SRC[:DST]]... [--units DIR]... [--bus] [--host-net] [-- COMMAND...]

systemd becomes PID 1 of new PID, mount, cgroup, IPC, UTS and network namespaces. With a COMMAND, it
runs beside that systemd and its exit status is ours (125: systemd did not come up). Without one, a
line of JSON, {"pid": PID}, says where the machine is, and it lasts until our stdin ends. Either way
nothing stays behind: one SIGKILL to PID 1 ends all its processes, and the mounts are in namespaces
that end with us. Ended by SIGKILL ourselves, we leave an empty directory in the temporary directory
and an empty cgroup, which the next run removes.

What keeps the machine around it safe, in the order in which it is done:

- A cgroup of its own comes first, then the cgroup namespace. A systemd moves every process of the
  cgroup it finds itself in; in a shared one that would be everybody's.
- Units come from /run/systemd/system alone, on a tmpfs: the stock ones named in STOCK and the
  caller's. No generators. Nothing of the machine's own boot is started.
- /etc and /var are overlays whose upper layers vanish; /run, /tmp, /var/tmp and /dev are new;
  /proc/sys is read-only but for the private network's part (a systemd raises fs.nr_open, ...).
- PID 1 starts with an empty environment that calls it a container, so that it leaves console,
  clock, kernel log and real power switches alone.

Needs root (CAP_SYS_ADMIN), cgroup2 and overlayfs in the kernel, nsenter, and systemd itself. It
uses bare libc calls by ctypes: some forty mounts by mount(8) would take longer than the boot.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import fcntl
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FAILED = 125
MARK = os.environ.get("CPRD_BOOT_MARK", "cprd-boot.")
DEADLINE = 30.0  # seconds for a boot that takes 0.1
UNITS = "run/systemd/system"
OWN = "run/boot"
STOCK = [
    *(
        f"{name}.target"
        for name in ("basic", "sysinit", "sockets", "timers", "paths", "local-fs", "swap")
    ),
    *(
        f"{name}.target"
        for name in ("multi-user", "shutdown", "umount", "final", "poweroff", "reboot", "exit")
    ),
    *(f"systemd-{name}.service" for name in ("journald", "poweroff", "reboot", "exit")),
    *(f"systemd-{name}.socket" for name in ("journald", "journald-dev-log")),
]
BUS = ["dbus.socket", "dbus.service"]
DEVICES = ["null", "zero", "full", "random", "urandom", "tty", "kvm", "net/tun"]
PATHS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG = 1
NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
NEWPID, NEWNET = 0x20000000, 0x40000000
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}

libc = ctypes.CDLL(None, use_errno=True)


class BootError(Exception):
    """Why no systemd came up, in words for the person who wanted one."""


def call(what: str, result: int) -> None:
    """Raise the OSError that a libc call left behind."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    call(
        f"mount {source} on {target}",
        libc.mount(
            source.encode(), target.encode(), kind.encode() or None, flags, options.encode() or None
        ),
    )


def unmount_all(target: str) -> None:
    """Take off whatever is mounted at `target`, in layers, with all that is mounted below."""
    while libc.umount2(target.encode(), MNT_DETACH) == 0:
        pass


def uncover(root: Path, names: list[str]) -> None:
    """Take off everything that is mounted at or below each of `names` in root, innermost first."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    for target in reversed([line.split()[4] for line in lines]):  # in the order of mounting
        if any(Path(target).is_relative_to(root / name) for name in names):
            unmount_all(target)


def unshare(flags: int) -> None:
    call("unshare", libc.unshare(flags))


def own_mounts() -> None:
    """A mount namespace of our own, from which nothing gets out and whose root is a mount, as
    pivot_root wants it. The root of a plain chroot is none: it is bound onto itself, and entered
    through "..", which steps onto what is mounted there."""
    shared = root_is_shared()
    unshare(NEWNS)
    try:
        mount("", "/", flags=MS_REC | MS_PRIVATE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        if shared:
            raise BootError(
                "a chroot from which mounts would get out: before entering it, "
                "mount --bind DIR DIR && mount --make-private DIR"
            ) from error
        mount("/", "/", flags=MS_BIND | MS_REC)
        os.chdir("/..")
        os.chroot(".")
        mount("", "/", flags=MS_REC | MS_PRIVATE)


def root_is_shared() -> bool:
    """Whether mounts made below "/" might show up in another mount namespace."""
    fd = os.open("/", os.O_PATH)
    try:
        info = dict(
            line.split(":", 1) for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
        )
    finally:
        os.close(fd)
    for line in Path("/proc/1/mountinfo").read_text().splitlines():
        if line.split()[0] == info["mnt_id"].strip():
            return "shared:" in line.split(" - ")[0]
    return True


def die_with_parent() -> None:
    call("prctl", libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))


# What a run owns outside its namespaces: two directories, held by a lock as long as it lives.


def lock(directory: Path) -> int | None:
    """A descriptor that holds `directory`; None when a living run holds it, or it is gone."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def sweep(parent: Path) -> None:
    """Remove what runs that were killed left in `parent`: empty trees of directories."""
    for old in parent.glob(MARK + "*"):
        held = lock(old)
        if held is not None:
            remove_tree(old)
            os.close(held)


def remove_tree(top: Path) -> None:
    """rmdir, leaf first. No files: a cgroup's go with it, elsewhere there are none."""
    for directory, _, _ in os.walk(top, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(directory)


class Place:
    """The working directory (a tmpfs, in our mount namespace only) and the cgroup of one run."""

    def __init__(self) -> None:
        temporary = Path(tempfile.gettempdir())
        sweep(temporary)
        self.work = Path(tempfile.mkdtemp(prefix=MARK, dir=temporary))
        self.held = [lock(self.work)]
        mount("tmpfs", str(self.work), "tmpfs", 0, "mode=755")
        for name in ("cg", "root", "over"):
            (self.work / name).mkdir()
        mount("cgroup2", str(self.work / "cg"), "cgroup2")
        own = next(
            line[3:].rstrip("\n")
            for line in Path("/proc/self/cgroup").read_text().splitlines()
            if line.startswith("0::")
        )
        parent = self.work / "cg" / own.strip("/")
        sweep(parent)
        self.cgroup = Path(tempfile.mkdtemp(prefix=MARK, dir=parent))
        self.held.append(lock(self.cgroup))

    def close(self) -> None:
        """Once every process is gone: no cgroup, no mount, no directory."""
        events = os.open(self.cgroup / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        changed = select.poll()
        changed.register(events, select.POLLPRI)
        until = time.monotonic() + DEADLINE
        while b"populated 1" in os.pread(events, 256, 0) and time.monotonic() < until:
            changed.poll(1000)
        os.close(events)
        remove_tree(self.cgroup)
        os.chdir("/")
        unmount_all(str(self.work))
        self.work.rmdir()
        for fd in self.held:
            if fd is not None:
                os.close(fd)


# The root that is booted.


def build_root(place: Place, options: argparse.Namespace) -> Path:
    root = place.work / "root"
    mount(options.tree, str(root), flags=MS_BIND | MS_REC)
    mount("", str(root), flags=MS_REC | MS_PRIVATE)
    for name in ("proc", "sys", "dev", "run", "tmp", "var/tmp"):
        (root / name).mkdir(parents=True, exist_ok=True)
    uncover(root, ["proc", "sys", "dev", "run", "tmp", "etc", "var"])
    own = secrets.token_hex(16)
    for name in ("etc", "var"):
        cover(place, name)
    (root / "etc/machine-id").unlink(missing_ok=True)
    (root / "etc/machine-id").write_text(own + "\n")
    mount("tmpfs", str(root / "run"), "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    for name in ("tmp", "var/tmp"):
        mount("tmpfs", str(root / name), "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    build_dev(root / "dev")
    for name in (UNITS, OWN, "run/lock"):
        (root / name).mkdir(parents=True)
    for pair in options.bind:
        source, _, target = pair.partition(":")
        bind(root, os.path.abspath(source), target or os.path.abspath(source))
    link_units(root, options)
    return root


def cover(place: Place, name: str) -> None:
    """Whatever is written below root/`name` goes to a layer that vanishes with us."""
    for layer in ("upper", "work"):
        (place.work / "over" / name / layer).mkdir(parents=True)
    os.chdir(place.work)  # relative, for a path of the overlay's must have neither ':' nor ','
    mount(
        "overlay",
        str(place.work / "root" / name),
        "overlay",
        0,
        f"lowerdir=root/{name},upperdir=over/{name}/upper,workdir=over/{name}/work",
    )


def build_dev(dev: Path) -> None:
    mount("tmpfs", str(dev), "tmpfs", MS_NOSUID, "mode=755")
    for name in ("pts", "shm", "mqueue", "net"):
        (dev / name).mkdir()
    for name in DEVICES:
        if os.path.exists(f"/dev/{name}"):
            (dev / name).touch()
            mount(f"/dev/{name}", str(dev / name), flags=MS_BIND)
    options = "newinstance,ptmxmode=0666,mode=620"
    mount("devpts", str(dev / "pts"), "devpts", MS_NOSUID | MS_NOEXEC, options)
    mount("tmpfs", str(dev / "shm"), "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    (dev / "ptmx").symlink_to("pts/ptmx")
    (dev / "fd").symlink_to("/proc/self/fd")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        (dev / name).symlink_to(f"/proc/self/fd/{number}")


def bind(root: Path, source: str, target: str) -> None:
    """Make `source` be at `target` in the root, unless the very same thing is there already."""
    inside = root / target.lstrip("/")
    if inside.exists() and os.path.samefile(source, inside):
        return
    if os.path.isdir(source):
        inside.mkdir(parents=True, exist_ok=True)
    else:
        inside.parent.mkdir(parents=True, exist_ok=True)
        inside.touch()
    mount(source, str(inside), flags=MS_BIND | MS_REC)


def link_units(root: Path, options: argparse.Namespace) -> None:
    units = root / UNITS
    wanted = ["systemd-journald.service", "multi-user.target", *(BUS if options.bus else [])]
    for name in [*STOCK, *(BUS if options.bus else [])]:
        stock = f"/usr/lib/systemd/system/{name}"
        if (root / stock.lstrip("/")).exists():
            (units / name).symlink_to(stock)
    names = " ".join(wanted)
    (units / "boot.target").write_text(
        "[Unit]\nDescription=The throwaway machine\nAllowIsolate=yes\n"
        f"Requires=basic.target\nWants={names}\nAfter=basic.target {names}\n"
    )
    for directory in options.units:
        for file in Path(directory).iterdir():
            subprocess.run(["cp", "-RP", file, units], check=True)


# PID 1, and the stem it grows from.


def grow(place: Place, root: Path, options: argparse.Namespace, pid_to: int) -> int:
    """In a process of its own: become nothing but the parent of PID 1. Returns its exit status."""
    die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    (place.cgroup / "cgroup.procs").write_text(str(os.getpid()))  # before NEWCGROUP: it is the root
    unshare(NEWNS | NEWCGROUP | NEWPID | NEWIPC | NEWUTS | (0 if options.host_net else NEWNET))
    pid = os.fork()
    if pid == 0:
        try:
            become_init(root, not options.host_net)
        except OSError as error:
            os.write(2, f"cannot become PID 1: {error}\n".encode())
        os._exit(FAILED)
    os.write(pid_to, b"%d" % pid)
    os.close(pid_to)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status if status >= 0 else 128 - status


def become_init(root: Path, own_net: bool) -> None:
    die_with_parent()
    os.chdir(root)
    plain = MS_NOSUID | MS_NODEV | MS_NOEXEC
    mount("proc", "proc", "proc", plain)
    mount("proc/sys", "proc/sys", flags=MS_BIND)
    mount("", "proc/sys", flags=MS_REMOUNT | MS_BIND | MS_RDONLY | plain)
    if own_net:
        mount("proc/sys/net", "proc/sys/net", flags=MS_BIND)
        mount("", "proc/sys/net", flags=MS_REMOUNT | MS_BIND | plain)
    try:
        mount("sysfs", "sys", "sysfs", MS_RDONLY | plain)
    except OSError:  # allowed only to the owner of the network namespace
        mount("/sys", "sys", flags=MS_BIND | MS_REC)
    mount("cgroup2", "sys/fs/cgroup", "cgroup2", plain)
    call("pivot_root", libc.syscall(SYS_PIVOT_ROOT[os.uname().machine], b".", b"."))
    call("umount", libc.umount2(b".", MNT_DETACH))
    os.chdir("/")
    os.setsid()
    os.execve(
        "/usr/lib/systemd/systemd",
        ["systemd", "--system", "--unit=boot.target", "--show-status=no"],
        {
            "container": "cprd-test",
            "PATH": PATHS,
            "LANG": "C.UTF-8",
            "SYSTEMD_UNIT_PATH": "/" + UNITS,
            "SYSTEMD_GENERATOR_PATH": f"/{OWN}/none",
            "SYSTEMD_ENVIRONMENT_GENERATOR_PATH": f"/{OWN}/none",
            "SYSTEMD_LOG_LEVEL": os.environ.get("CPRD_SYSTEMD_LOG", "info"),
            "NOTIFY_SOCKET": f"/{OWN}/notify",
        },
    )


class Running:
    """A booted machine: `pid` is its PID 1 as seen from here, `stem` the parent of that."""

    def __init__(self, place: Place, options: argparse.Namespace) -> None:
        root = build_root(place, options)
        self.log = place.work / "log"
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        notify.bind(str(root / OWN / "notify"))
        pid_from, pid_to = os.pipe()
        self.stem = os.fork()
        if self.stem == 0:
            try:
                null = os.open(os.devnull, os.O_RDONLY)
                log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                for target, fd in ((0, null), (1, log), (2, log)):
                    os.dup2(fd, target)
                # Not ours any more: the locks, and above all the socket that PID 1 goes on telling
                # (254+), which blocks it for ever once that is full and nobody reads.
                os.closerange(3, pid_to)
                os.closerange(pid_to + 1, 4096)
                os._exit(grow(place, root, options, pid_to))
            except BaseException as error:  # a second copy of us must not run our cleanup
                os.write(2, f"{error}\n".encode())
                os._exit(FAILED)
        self.end = os.pidfd_open(self.stem)
        os.close(pid_to)
        with open(pid_from, "rb") as pipe:
            self.pid = int(pipe.read() or b"0")
        self.init = os.pidfd_open(self.pid) if self.pid else -1
        with notify:
            self.await_ready(notify)

    def await_ready(self, notify: socket.socket) -> None:
        """Until PID 1 says, as it does to a container's manager, that its first units are up."""
        until = time.monotonic() + DEADLINE
        while True:
            left = until - time.monotonic()
            told = select.select([notify.fileno(), self.end], [], [], max(left, 0))[0]
            if notify.fileno() in told:
                if b"READY=1" in notify.recv(65536).split(b"\n"):
                    return
            elif told or left <= 0:
                how = "ended" if told else "did not get ready"
                words = self.log.read_text() if self.log.exists() else ""
                self.kill()
                raise BootError(f"systemd {how}\n{words}".rstrip())

    def enter(self, command: list[str], host_net: bool) -> subprocess.Popen[bytes]:
        environ = dict(os.environ, SYSTEMD_UNIT_PATH="/" + UNITS, SYSTEMD_PAGER="")
        return subprocess.Popen([*nsenter(self.pid, host_net), *command], env=environ)

    def kill(self) -> None:
        """All processes of the machine die with PID 1, and its parent ends after that."""
        if self.init >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.init, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.stem, 0)


def nsenter(pid: int, host_net: bool = False) -> list[str]:
    """The start of a command line that runs the rest beside PID 1, in our own directory."""
    spaces = ["--mount", "--pid", "--ipc", "--uts", "--cgroup", *([] if host_net else ["--net"])]
    return ["nsenter", f"--target={pid}", "--root", *spaces, f"--wdns={os.getcwd()}", "--"]


def missing(tree: str) -> list[str]:
    """What this machine lacks, each with what to do about it."""
    found = []
    if os.geteuid() != 0:
        found.append("root (run the tests as root, or in a container with CAP_SYS_ADMIN)")
    if not os.path.exists(os.path.join(tree, "usr/lib/systemd/systemd")):
        found.append("systemd (apt-get install systemd)" if tree == "/" else f"a systemd in {tree}")
    if not any(os.path.exists(f"{d}/nsenter") for d in os.get_exec_path()):
        found.append("nsenter (apt-get install util-linux)")
    kinds = Path("/proc/filesystems").read_text().split()
    found += [f"{k} in the kernel" for k in ("cgroup2", "overlay") if k not in kinds]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n", maxsplit=1)[0])
    parser.add_argument("--tree", default="/", type=os.path.realpath, help="the root to boot")
    parser.add_argument("--bind", action="append", default=[], metavar="SRC[:DST]")
    parser.add_argument("--units", action="append", default=[], metavar="DIR", help="unit files")
    parser.add_argument("--bus", action="store_true", help="start D-Bus too (apt: dbus)")
    parser.add_argument("--host-net", action="store_true", help="no network namespace of its own")
    parser.add_argument("command", nargs="*")
    options = parser.parse_args()
    lacking = missing(options.tree)
    if lacking:
        print("boot: this needs " + "; ".join(lacking), file=sys.stderr)
        return FAILED
    cwd = os.getcwd()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    machine: Running | None = None
    place: Place | None = None
    try:
        own_mounts()
        place = Place()
        machine = Running(place, options)
        os.chdir(cwd)
        if options.command:
            status = machine.enter(options.command, options.host_net).wait()
            return status if status >= 0 else 128 - status
        print(json.dumps({"pid": machine.pid}), flush=True)
        gone, _, _ = select.select([machine.end, 0], [], [])
        if machine.end in gone:
            os.read(0, 1)  # whoever holds us decides when to let go
        return 0
    except (BootError, OSError) as error:
        print(f"boot: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if machine is not None:
            machine.kill()
        if place is not None:
            place.close()


if __name__ == "__main__":
    sys.exit(main())

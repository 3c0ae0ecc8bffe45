"""A booted systemd as a test sees it: write units, run commands in it, read its journal.

The checkout, the Python that runs the tests and the test's own directory are at their own paths
inside. A hardened unit cannot see /root, /home or /tmp, where these often lie, so that Python, its
packages and the checkout are at /run/boot as well, and /usr/local/bin has our commands and
`test-python`, which run from there: units name them without a path, as the units that we ship do.
"""

from __future__ import annotations

import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import IO

from tests.support.checkout import CHECKOUT
from tests.support.patience import PATIENCE

from . import boot

BOOT = Path(__file__).with_name("boot.py")
TREE = os.environ.get("CPRD_SYSTEMD_TREE", "/")
OWN = "/run/boot"
LONG = 2 * PATIENCE
LAUNCHERS = {
    "test-python": "",
    "cprd": "-m cprd.daemon.command",
    "cprctl": "-m cprd.cli",
    "cprd-demo-server": "-m cprd.demo.server",
}


class MachineError(AssertionError):
    """A command inside failed; the message has what it said and the end of the journal."""


def launcher(arguments: str) -> str:
    """A script that runs this test's Python from where a hardened unit can see it. It ends in exec,
    so that the PID that systemd started is Python's."""
    own_python = sys.base_prefix != "/usr"
    base = f"{OWN}/python" if own_python else "/usr"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    library = f"export LD_LIBRARY_PATH={OWN}/python/lib\n" if own_python else ""
    return (
        "#!/bin/sh\n"
        f"{library}"
        f"export PYTHONPATH={OWN}/checkout:{OWN}/site PYTHONDONTWRITEBYTECODE=1\n"
        f'exec {base}/bin/{version} {arguments} "$@"\n'
    )


class Machine:
    """A systemd of its own. `root` is its file system from outside, `pid` its PID 1, `units` its
    directory of units. Use as a context manager, or call close()."""

    def __init__(self, scratch: Path, *, bus: bool = False, tree: str = TREE) -> None:
        """Boot, with `scratch` (a directory) at the same path inside. Raises MachineError."""
        programs = scratch / "boot-programs"
        programs.mkdir()
        programs.chmod(0o755)
        for name in os.listdir(os.path.join(tree, "usr/local/bin")):  # what is there stays in reach
            (programs / name).symlink_to(f"{OWN}/local-bin/{name}")
        for name, arguments in LAUNCHERS.items():
            file = programs / name
            file.unlink(missing_ok=True)
            file.write_text(launcher(arguments))
            file.chmod(0o755)
        binds = [
            *{str(CHECKOUT), sys.prefix, sys.base_prefix, str(scratch)},
            f"{CHECKOUT}:{OWN}/checkout",
            f"{sysconfig.get_path('platlib')}:{OWN}/site",
            f"{os.path.join(tree, 'usr/local/bin')}:{OWN}/local-bin",
            f"{programs}:/usr/local/bin",
        ]
        if sys.base_prefix != "/usr":
            binds.append(f"{sys.base_prefix}:{OWN}/python")
        command = [sys.executable, "-I", str(BOOT), f"--tree={tree}"]
        command += [f"--bind={pair}" for pair in binds] + (["--bus"] if bus else [])
        self.holder = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert self.holder.stdin is not None
        assert self.holder.stdout is not None
        self._hold: IO[bytes] = self.holder.stdin
        line = self.holder.stdout.readline()
        if not line:
            _, words = self.holder.communicate()
            raise MachineError(words.decode(errors="replace").strip() or "boot.py said nothing")
        self.pid: int = json.loads(line)["pid"]
        self.root = Path(f"/proc/{self.pid}/root")
        self.units = self.root / boot.UNITS
        first = self.run("systemctl", "--version").split()
        self.version = int(first[1].split(".")[0].split("~")[0])

    # Commands

    def popen(
        self,
        *command: str | Path,
        user: str | None = None,
        stdin: int | IO[bytes] | None = subprocess.DEVNULL,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
        pass_fds: tuple[int, ...] = (),
        env: dict[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a command beside PID 1, in this test's directory and environment, as `user`."""
        line = [str(part) for part in command]
        if user is not None:
            people = (self.root / "etc/passwd").read_text().splitlines()
            gid = next(row.split(":")[3] for row in people if row.startswith(f"{user}:"))
            line = ["setpriv", f"--reuid={user}", f"--regid={gid}", "--init-groups", "--", *line]
        environ = {**os.environ, "SYSTEMD_UNIT_PATH": "/" + boot.UNITS, "SYSTEMD_PAGER": ""}
        environ["PATH"] = f"/usr/local/bin:{environ.get('PATH', boot.PATHS)}"
        return subprocess.Popen(
            [*boot.nsenter(self.pid), *line],
            env={**environ, **(env or {})},
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=pass_fds,
        )

    @staticmethod
    def signal(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
        """Signal what popen() started, which is a child of nsenter's. (nsenter ends as its child
        does; killed itself, it leaves an orphan that holds up the end of the machine.)"""
        inner = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        if inner:
            os.kill(int(inner[0]), number)
        else:
            child.send_signal(number)

    def attempt(
        self, *command: str | Path, user: str | None = None, timeout: float = LONG
    ) -> tuple[int, str]:
        """Run a command; its exit status, and what it said on both streams."""
        child = self.popen(*command, user=user, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            words, _ = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.signal(child, signal.SIGKILL)
            words, _ = child.communicate()
            said = words.decode(errors="replace")
            raise MachineError(
                f"{shlex.join(map(str, command))}: not done in {timeout} s\n{said}{self.journal()}"
            ) from None
        return child.returncode, words.decode(errors="replace")

    def run(self, *command: str | Path, user: str | None = None, timeout: float = LONG) -> str:
        """Run a command that must succeed; what it said on both streams."""
        status, words = self.attempt(*command, user=user, timeout=timeout)
        if status != 0:
            journal = "\n".join(self.journal().splitlines()[-40:])
            raise MachineError(
                f"{shlex.join(map(str, command))}: exit {status}\n{words}\n--- journal\n{journal}"
            )
        return words

    def systemctl(self, *arguments: str, timeout: float = LONG) -> str:
        return self.run("systemctl", *arguments, timeout=timeout)

    def show(self, unit: str, name: str) -> str:
        """One property of a unit, as text ("" when this systemd does not know it)."""
        return self.systemctl("show", "--value", f"--property={name}", unit).strip()

    def main_pid(self, unit: str) -> int:
        """The main process of a unit, by its PID out here (inside it has another)."""
        inside = int(self.show(unit, "MainPID"))
        return self.outside(inside) if inside else 0

    def outside(self, inside: int) -> int:
        """The PID out here of a process with the PID `inside` in there; 0 when there is none."""
        own = os.readlink(f"/proc/{self.pid}/ns/pid")
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    status = Path(f"/proc/{entry}/status").read_text()
                    same = os.readlink(f"/proc/{entry}/ns/pid") == own
                except OSError:
                    continue
                numbers = re.search(r"^NSpid:\s+(.*)$", status, re.MULTILINE)
                if same and numbers and int(numbers[1].split()[-1]) == inside:
                    return int(entry)
        return 0

    # Units

    def unit(self, name: str, text: str | None = None, *, reload: bool = True) -> Path:
        """Write a unit (or a drop-in: "x.service.d/limits.conf"); without a text, one of ours."""
        file = self.units / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text((CHECKOUT / "systemd" / name).read_text() if text is None else text)
        if reload:
            self.systemctl("daemon-reload")
        return file

    # The journal

    def journal(self, unit: str | None = None) -> str:
        """All messages since boot, or those of and about a unit; the text alone."""
        which = [] if unit is None else ["-u", unit]
        self.attempt("journalctl", "--sync")  # a crashed unit's last lines may be on their way
        return self.attempt("journalctl", "--quiet", "-o", "cat", "--no-pager", *which)[1]

    def await_journal(self, pattern: str, unit: str | None = None, timeout: float = LONG) -> str:
        """The first line since boot that matches, once it is there, or MachineError."""
        which = [] if unit is None else ["-u", unit]
        child = self.popen(
            *("timeout", str(timeout), "journalctl", "--quiet", "-f", "-o", "cat", "--no-tail"),
            *which,
            stdout=subprocess.PIPE,
        )
        assert child.stdout is not None
        try:
            for line in child.stdout:
                text = line.decode(errors="replace").rstrip("\n")
                if re.search(pattern, text):
                    return text
        finally:
            self.signal(child, signal.SIGTERM)
            child.stdout.close()
            child.wait()
        raise MachineError(f"no line matched {pattern!r} in {timeout} s:\n{self.journal(unit)}")

    # The end

    def poweroff(self, how: str = "poweroff", timeout: float = LONG) -> None:
        """`systemctl poweroff` (or reboot), until PID 1 is gone. Only close() is left after it."""
        end = os.pidfd_open(self.pid)
        try:
            self.attempt("systemctl", how, timeout=timeout)
            if not select.select([end], [], [], timeout)[0]:
                raise MachineError(f"still up {timeout} s after {how}:\n{self.journal()}")
        finally:
            os.close(end)

    def close(self) -> None:
        """End every process in there at once, and wait until nothing is left of the machine."""
        self._hold.close()
        self.holder.wait()
        for stream in (self.holder.stdout, self.holder.stderr):
            if stream is not None:
                stream.close()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

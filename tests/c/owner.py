"""An owner of a live hold in C, without cprd: the test keeps the receiving end of the root."""

from __future__ import annotations

import os
import signal
import subprocess
import zlib
from pathlib import Path
from typing import Any

import msgpack

from tests.c.building import Programs
from tests.live.owning import HOLD, MEMORY, Op, Root, Things, _alarm


class COwner:
    """A process that makes the changes of a script, one after the other.

    `points`: a log of pause points. `kill_at`: the number of the point where it stops."""

    def __init__(
        self,
        programs: Programs,
        things: Things,
        root: Root,
        script: list[Op],
        place: Path,
        *,
        take: int = -1,
        points: Path | None = None,
        kill_at: int = 0,
    ) -> None:
        tx, rx = root.tx.fileno(), root.rx.fileno()
        words = [programs.command, "own", str(tx), str(rx), str(HOLD)]
        env = {**os.environ}
        if take >= 0:
            words.append(f"--take={take}")
        if points is not None:
            env["CPRD_PAUSE_LOG"] = str(points)
        if kill_at:
            env["CPRD_PAUSE"] = f"#{kill_at}"
        said = place / "script"
        said.write_text("".join(line for op in script for line in lines_of(op, things, place)))
        self._changes = len(script)
        with said.open("rb") as stdin:
            self.process = subprocess.Popen(
                words,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[tx, rx, *things.fds, *([take] if take >= 0 else [])],
                env=env,
            )

    def run(self) -> bool:
        """Let it run to its end, or to its pause point, where it is killed. Returns whether it was
        killed; `done` and `taken` say how far it came."""
        with _alarm(self.process.pid):
            found = os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert found is not None
        killed = found.si_code == os.CLD_STOPPED
        self.process.send_signal(signal.SIGKILL)
        said, why = self.process.communicate()
        lines = said.decode().splitlines()
        self.listed = lines
        answers = [line for line in lines if line == "ok" or ": " in line]
        self.taken = "taken" in lines
        self.done = max(0, len(answers) - 1)  # the first is the begin
        self.began = bool(answers)
        assert all(line == "ok" for line in answers), answers
        if not killed:
            assert self.process.returncode == 0, why.decode()
            assert self.done == self._changes
        return killed


def lines_of(op: Op, things: Things, place: Path) -> list[str]:
    """A change as cprd-c reads it."""
    verb, *rest = op
    if verb == "batch":
        inner = [line for part in rest for line in lines_of(part, things, place)]
        return ["batch\n", *inner, "commit\n"]
    if verb == "save":
        return [f"replace {rest[0]} {rest[1]} {things.fds[rest[2]]}\n"]
    if verb == "section":
        return [f"{_how(rest[1])} {rest[0]} {_file(rest[1], place)}\n"]
    if verb == "memory":
        return [f"memory {rest[0]} {MEMORY}\n"]
    if verb == "write":
        return [f"write {rest[0]} {MEMORY} {rest[1]}\n"]
    return [" ".join(map(str, op)) + "\n"]


def _how(value: Any) -> str:
    return "raw" if isinstance(value, bytes) else "packed"


def _file(value: Any, place: Path) -> Path:
    data = value if isinstance(value, bytes) else msgpack.packb(value)
    path = place / f"{zlib.crc32(data):08x}"
    if not path.exists():
        path.write_bytes(data)
    return path

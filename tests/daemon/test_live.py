"""Live holds with a real cprd: owners are processes, and are killed."""

from __future__ import annotations

import os

import pytest

import cprd
from tests.support.child import Child, Line
from tests.support.daemon import DaemonProcess
from tests.support.live import Live
from tests.support.patience import until


def keep_pipe(line: Line, path: str, fd: int) -> None:
    """Own "chat", taken over or begun anew; keep a pipe; wait."""
    live = Live(path, "chat")
    if live.answer["found"]:
        live.confirm()
    live.kept.save_fd("pipe", 0, fd, replace=True)
    live.kept.save_section("count", live.answer["generation"])
    os.close(fd)
    line.say(f"{live.answer['generation']} {live.answer['found']}")
    line.hear()


def phase(daemon: DaemonProcess, name: str = "chat") -> str:
    with daemon.connect() as connection:
        return {row["name"]: row["phase"] for row in connection.list()}.get(name, "-")


def test_what_a_killed_owner_kept_is_there_for_the_next(daemon: DaemonProcess) -> None:
    reading, writing = os.pipe()
    with Child(keep_pipe, daemon.path, writing) as owner:
        generation, found = owner.hear().split()
        assert found == "False"
        assert phase(daemon) == "live"
        with daemon.connect() as connection:
            with pytest.raises(cprd.Busy, match=f"in use by pid {owner.pid}") as caught:
                connection.load("chat")
            assert (caught.value.pid, caught.value.phase) == (owner.pid, "live")
        owner.kill()
    until(lambda: phase(daemon) == "held", lambda: phase(daemon))
    with Live(daemon.path, "chat") as live:
        assert live.answer["found"]
        assert live.answer["live"]
        assert live.answer["generation"] == int(generation)
        assert live.answer["last_end"] == "killed by SIGKILL"
        state = live.read().state
        assert state["count"] == int(generation)
        assert os.fstat(state.find_fd("pipe", 0)).st_ino == os.fstat(writing).st_ino
        live.confirm()
        assert live.answer["generation"] > int(generation)
        live.end(keep=False)
    assert phase(daemon) == "-"
    os.close(writing)
    os.set_blocking(reading, False)
    until(lambda: os.read(reading, 1) == b"", lambda: "the pipe is held still")
    os.close(reading)

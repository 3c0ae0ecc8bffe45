"""Files of two users whose close blocks, in the unit that we ship: reload and restart wait for none
of these, and nothing has any once they answer."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import cprd
from cprd.linux.rights import close_all
from tests.daemon.test_blocking_files import PLACES, UIDS, Files, leaves
from tests.support.blocking import Fuse, Lingering, Writeback, await_ends, connections, releasers
from tests.support.child import Child
from tests.support.patience import in_time, patience, until
from tests.support.processes import state

from .machine import Machine
from .ours import install

RELOADS = 5


@pytest.fixture
def blocker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lingering | Fuse]:
    made: Lingering | Fuse = request.param(tmp_path)
    yield made
    made.close()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("blocker", [Lingering, Writeback], indirect=True)
def test_a_restart_waits_for_no_file_that_blocks(
    systemd: Machine, blocker: Lingering | Fuse
) -> None:
    """Holds in memory end with the restart; as before Linux 6.16, descriptors come in requests."""
    install(systemd)
    systemd.unit(
        "cprd.service.d/test.conf",
        "[Service]\nFileDescriptorStoreMax=0\nEnvironment=CPRD_NO_PASSRIGHTS=1\n",
    )
    systemd.systemctl("start", "cprd.socket", "cprd.service")
    directory = os.open(systemd.root / "run/cprd", os.O_PATH | os.O_DIRECTORY)
    path = f"/proc/self/fd/{directory}/cprd.sock"  # for other users, too
    pid = systemd.main_pid("cprd.service")
    plain: list[socket.socket] = []
    forked: set[int] = set()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, directory)
        leavers = []
        for uid in UIDS:
            files: Files = {}
            for place in PLACES:
                (ours,), (theirs,) = connections(1)
                plain.append(stack.enter_context(theirs))
                files[place] = [ours.detach(), *blocker.files()]
            leavers.append(stack.enter_context(Child(leaves, path, uid, files)))
            leavers[-1].hear()
            close_all(fd for fds in files.values() for fd in fds)
        root = stack.enter_context(cprd.connect(path))
        os.kill(pid, signal.SIGSTOP)  # until the copies in a request are the last
        for leaver in leavers:
            leaver.say("go on")
            assert leaver.hear() == "sent"
        blocker.mute()
        os.kill(pid, signal.SIGCONT)
        for leaver in leavers:
            leaver.kill()
        for uid in UIDS:
            root.drop(f"{uid}/ended", force=True)
        until(lambda: blocked(root), lambda: repr(root.status()["closing"]))
        for _ in range(RELOADS):
            forked.update(releasers(pid))
            begin = time.monotonic()
            systemd.systemctl("reload", "cprd.service")
            root.status()
            assert in_time(time.monotonic() - begin, 3)  # ExecReload= starts Python thrice
        assert systemd.main_pid("cprd.service") == pid
        forked.update(releasers(pid))
        begin = time.monotonic()
        systemd.systemctl("restart", "cprd.service")
        assert root.list() == []
        assert in_time(time.monotonic() - begin, 5)
        blocker.answer()
        await_ends(plain, patience(5))
        until(lambda: not any(map(state, forked)), lambda: "a releaser is left")
    assert systemd.show("cprd.service", "NRestarts") == "0"
    assert "watchdog" not in systemd.journal("cprd.service").lower()


def blocked(root: cprd.Daemon) -> bool:
    closing = root.status()["closing"]
    return all(closing.get(str(uid), 0) >= 4 for uid in UIDS)

"""The seccomp agent of the page: killed with a call in its hands."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.recipes.recipe import Recipe
from tests.support.daemon import DaemonProcess
from tests.support.patience import until

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("nothing_leaks")]

CALLER = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
for line in sys.stdin:
    print(libc.syscall(4242, int(line)), flush=True)
"""


def seccomp_tells() -> bool:
    path = Path("/proc/sys/kernel/seccomp/actions_avail")
    return path.exists() and "user_notif" in path.read_text()


@pytest.mark.skipif(not seccomp_tells(), reason="needs a kernel with SECCOMP_USER_NOTIFICATION")
def test_calls_wait_for_the_successor_of_an_agent(daemon: DaemonProcess, tmp_path: Path) -> None:
    agent = Recipe("agent.py", daemon, tmp_path, sys.executable, "-c", CALLER)
    (hear, out), (into, say) = os.pipe(), os.pipe()
    try:
        with open(hear, "rb") as answers:
            agent.start(stdin=into, stdout=out)
            os.close(into)
            os.close(out)
            number = 0

            def ask() -> None:
                nonlocal number
                number += 1
                os.write(say, b"%d\n" % number)

            def hear_all() -> None:
                assert answers.readline() == b"%d\n" % (number + 1)

            ask()
            hear_all()
            for end in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
                agent.kill(end)
                ask()  # nobody answers
                agent.start()
                hear_all()
                ask()
                hear_all()
            usual = agent.script.read_text()
            keeping = '        state["notification"] = notification\n'
            slow = usual.replace(keeping, keeping + "        os.kill(os.getpid(), 19)\n")
            assert slow != usual
            agent.script.write_text(slow)  # stops with a call in its hands
            agent.again()
            ask()
            assert agent.process is not None
            os.waitid(os.P_PID, agent.process.pid, os.WSTOPPED | os.WNOWAIT)
            agent.script.write_text(usual)
            agent.again()
            hear_all()
            os.close(say)
            say = -1
            assert answers.read() == b""
        assert agent.process is not None
        assert agent.process.wait(20) == 0
        until(lambda: not held(daemon), lambda: "still held")
    finally:
        if say >= 0:
            os.close(say)
        agent.__exit__()


def held(daemon: DaemonProcess) -> bool:
    with daemon.connect() as client:
        return bool(client.list())

"""The unit of docs/run.md: its program is killed again and again, and nobody is refused."""

from __future__ import annotations

import os
import re
import signal

import pytest

from tests.support.checkout import CHECKOUT
from tests.support.patience import until

from .machine import Machine
from .ours import install

SERVER = 'require("http").createServer((q, r) => r.end(String(process.pid))).listen(8000)'
ASK = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8000', timeout=20).read())"


@pytest.mark.full
def test_a_unit_that_is_killed_refuses_nobody(systemd: Machine) -> None:
    if systemd.attempt("test", "-x", "/usr/bin/node")[0]:
        pytest.skip("needs node: apt-get install nodejs (in a tree: name nodejs to make-tree)")
    page = (CHECKOUT / "docs/run.md").read_text()
    [line] = re.findall(r"^\| systemd, in `\[Service\]` \| `(.+)` \|$", page, re.MULTILINE)
    install(systemd)
    (systemd.root / "run/boot/server.js").write_text(SERVER)
    service = "[Service]\nRestart=always\nRestartSec=1\nWorkingDirectory=/run/boot\n"
    systemd.unit("web.service", f"[Unit]\nWants=cprd.socket\n{service}{line}\n")
    systemd.systemctl("start", "cprd.socket", "cprd.service", "web.service")
    until(lambda: systemd.attempt("test-python", "-c", ASK)[0] == 0, systemd.journal)
    before = systemd.main_pid("web.service")
    for _ in range(3):
        os.kill(before, signal.SIGKILL)
        systemd.run("test-python", "-c", ASK)  # waits for the next one, RestartSec later
        after = systemd.main_pid("web.service")
        assert after not in (0, before)
        before = after
    systemd.systemctl("restart", "cprd.service", "web.service")
    systemd.run("test-python", "-c", ASK)
    assert "ERROR: ld.so" not in systemd.journal("web.service")

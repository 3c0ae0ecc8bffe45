"""Each small change of an answer meets the client in C: a clear error or the documented meaning,
and no fault of memory. (test_hostile.py changes bytes of bundles and of live holds.)"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import cprd
from cprd.protocol import messages
from tests.c.building import Programs
from tests.c.conftest import Build
from tests.protocol.test_mutations import Puppet, Shares
from tests.support import mutations
from tests.support.patience import patience
from tools.vectors import WIRE, stored

pytestmark = [pytest.mark.usefixtures("nothing_leaks"), pytest.mark.xdist_group("c")]

LESS = 7  # a process each


def ask(programs: Programs, path: str, *words: str) -> tuple[int, str]:
    """Exit status and stderr of cprd-c, which must end by itself, and without a fault."""
    done = subprocess.run(
        [programs.command, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "CPRD_SOCKET": path},
        timeout=patience(30),
        check=False,
    )
    assert done.returncode in (0, 1, 3, 4), (words, done.returncode, done.stderr)
    assert "Sanitizer" not in done.stderr, done.stderr
    assert "runtime error" not in done.stderr, done.stderr
    assert done.returncode == 0 or done.stderr.strip(), words
    return done.returncode, done.stderr


@Shares
def test_changed_answers_meet_the_client_in_c(share: int, built: Build, tmp_path: Path) -> None:
    programs = built("sanitized")
    step = 1 if share == 1 else LESS * share
    puppet = Puppet(str(tmp_path / "puppet.sock"))
    answers = {v["name"]: bytes.fromhex(v["hex"]) for v in stored(f"{WIRE}-answers")}
    tried = failed = 0
    try:
        for verb, name in (
            *(("list", "list"), ("wait", "wait"), ("drop", "drop"), ("load", "load")),
            *(("load", "busy"), ("load", "damaged")),
        ):
            message = messages.decode(answers[name], messages.MAX_ANSWER)
            for _, data in mutations.some(mutations.of_message(message), step):
                if not data or b"\xa2id" in data:
                    continue
                puppet.says = data
                tried += 1
                status, _ = ask(programs, puppet.path, verb, *([] if verb == "list" else ["web"]))
                failed += status != 0
    finally:
        puppet.close()
    print(f"{tried} changed answers, {failed} errors")
    assert tried > failed > 5


def test_the_puppet_is_heard(tmp_path: Path) -> None:
    """So that the changes above are changes of what a client takes."""
    puppet = Puppet(str(tmp_path / "puppet.sock"))
    answers = {v["name"]: bytes.fromhex(v["hex"]) for v in stored(f"{WIRE}-answers")}
    try:
        with cprd.connect(puppet.path) as daemon:
            puppet.says = answers["list"]
            (row,) = daemon.list()
            assert row["name"] == "web"
    finally:
        puppet.close()

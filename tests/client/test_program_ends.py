"""A program that ends with claims open: they go back, and the interpreter ends without a word."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import cprd
from tests.support.checkout import CHECKOUT
from tests.support.daemon import DaemonProcess
from tests.support.patience import PATIENCE

OPEN = {
    "claim": 'claim = client.load("held")',
    "cycle": 'claim = client.load("held"); claim.me = claim',
    "confirmed": 'claim = client.load("held"); claim.confirm()',
    "prepared": 'prepared = client.prepare("held", cprd.State(), if_exists="replace")',
    "live": 'live = client.live("held")',
}


@pytest.mark.parametrize("what", OPEN)
@pytest.mark.parametrize("last", ["", "1 / 0"])
def test_what_is_open_when_the_interpreter_ends(
    daemon: DaemonProcess, what: str, last: str
) -> None:
    program = f"import sys; sys.path.insert(0, {str(CHECKOUT)!r})\nimport cprd\n"
    program += f"client = cprd.connect({daemon.path!r})\n{OPEN[what]}\nprint('open')\n{last}"
    with cprd.connect(daemon.path) as client, open(os.devnull, "rb") as null:
        state = cprd.State()
        state.save_fd("null", 0, null)
        client.save("held", state)
        ended = subprocess.run(  # -E: what the tests run with imports modules early
            [sys.executable, "-E", "-c", program],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert ended.stdout == "open\n"
        assert "xception ignored" not in ended.stderr, ended.stderr
        assert ("ZeroDivisionError" in ended.stderr) == bool(last)
        if what in ("confirmed", "prepared"):
            phases = [row["phase"] for row in client.list()]
            assert phases == {"confirmed": [], "prepared": ["held", "in-doubt"]}[what]
            return
        with client.load("held", wait=PATIENCE) as claim:
            assert claim.state.find_fd("null", 0) >= 0
            claim.confirm()

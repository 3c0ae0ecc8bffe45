"""What runs with msgpack alone, as `pip install cprd` has it; and what the rest says is missing.

The Python here is the one of the tests without its packages (-S); msgpack comes by a link.
"""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import msgpack
import pytest

from tests.support.checkout import CHECKOUT
from tests.support.daemon import DaemonProcess


class Bare:
    """A Python that has the standard library, cprd and msgpack."""

    def __init__(self, packages: Path, path: str) -> None:
        (packages / "msgpack").symlink_to(Path(msgpack.__file__).parent)
        kept = {key: value for key, value in os.environ.items() if not key.startswith("CPRD_")}
        search = os.pathsep.join([str(CHECKOUT), str(packages)])
        self.env = {**kept, "PYTHONPATH": search, "CPRD_SOCKET": path, "TERM": "xterm"}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-S", *arguments],
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def on_a_terminal(self, *arguments: str) -> str:
        """What it prints on one; it has to end with 0."""
        own, terminal = pty.openpty()
        try:
            with subprocess.Popen(
                [sys.executable, "-S", *arguments], env=self.env, stdout=terminal
            ) as process:
                assert process.wait(60) == 0
            return os.read(own, 1 << 16).decode()
        finally:
            os.close(own)
            os.close(terminal)


@pytest.fixture
def bare(tmp_path: Path, daemon: DaemonProcess) -> Bare:
    return Bare(tmp_path, daemon.path)


def test_there_is_msgpack_and_nothing_else(bare: Bare) -> None:
    lacking = "import msgpack\nfor name in ('trio', 'rich', 'qemu'):\n"
    lacking += "    try: __import__(name); print(name)\n    except ModuleNotFoundError: pass\n"
    found = bare.run("-c", lacking)
    assert (found.stdout, found.stderr) == ("", "")


@pytest.mark.parametrize("arguments", [[], ["--check"]])
def test_the_daemon_says_in_one_line_that_it_lacks_trio(bare: Bare, arguments: list[str]) -> None:
    refused = bare.run("-m", "cprd.daemon.command", *arguments)
    assert refused.returncode == 1
    assert refused.stderr == (
        "cprd: the daemon needs the Python package trio: pip install 'cprd[daemon]'"
        " (Debian: apt-get install python3-trio)\n"
    )


def test_cprd_trio_is_an_import_error_with_the_same_words(bare: Bare) -> None:
    for line in ("import cprd.trio", "import cprd; cprd.trio"):
        refused = bare.run("-c", line)
        assert refused.stderr.strip().splitlines()[-1] == (
            "ImportError: cprd.trio needs the Python package trio: pip install 'cprd[daemon]'"
            " (Debian: apt-get install python3-trio)"
        )


def test_the_demo_says_in_one_line_that_it_lacks_rich(bare: Bare) -> None:
    refused = bare.run("-m", "cprd.cli", "demo")
    assert refused.returncode == 1
    assert refused.stderr == (
        "cprctl: cprctl demo needs the Python package rich: pip install 'cprd[cli]'"
        " (Debian: apt-get install python3-rich)\n"
    )


def test_the_server_of_the_demo_takes_nothing_that_it_could_not_serve(
    bare: Bare, daemon: DaemonProcess
) -> None:
    import cprd

    with daemon.connect() as connection:
        connection.save("demo", cprd.State())
        refused = bare.run("-m", "cprd.demo.server", "demo")
        assert refused.returncode == 1
        assert "cprd[daemon]" in refused.stderr
        assert refused.stderr.count("\n") == 1
        assert [row["phase"] for row in connection.list()] == ["held"]


def test_cprctl_works_without_rich_on_a_terminal_too(bare: Bare, tmp_path: Path) -> None:
    cli = ("-m", "cprd.cli")
    (tmp_path / "words").write_text("forty-two")
    saved = bare.run(*cli, "save", "web", "--fd", "in=0", "--section", f"words={tmp_path}/words")
    assert (saved.returncode, saved.stderr) == (0, "")
    for verb, words in (
        (("list",), ("generation", "web", "held")),
        (("show", "web"), ("web", "words")),
        (("status",), ("memory",)),
    ):
        shown = bare.on_a_terminal(*cli, *verb)
        for word in words:
            assert word in shown, shown
    assert "held again" not in bare.run(*cli, "wait", "web").stderr
    loaded = bare.run(*cli, "load", "web", "--", "sh", "-c", "echo $LISTEN_FDNAMES; cat <&4")
    assert loaded.stdout == "in:section.words\nforty-two", loaded.stderr
    ran = bare.run(
        *cli, "run", "cold", "--listen", "127.0.0.1:0", "--", "sh", "-c", "echo $LISTEN_FDS"
    )
    assert (ran.returncode, ran.stdout) == (0, "1\n"), ran.stderr

"""A cprd that finds what a newer one wrote: kept, listed, never taken for nothing, there for the
newer one again.

The newer one is this one with another version number in what it writes: a file says which, and is
read at each execution, so that SIGHUP is an upgrade or a downgrade.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cprd
from cprd.bundle import layout
from tests.support.checkout import CHECKOUT
from tests.support.daemon import DaemonProcess
from tests.support.patience import PATIENCE, patience

PROGRAM = """
import os, sys
import cprd.daemon.storage.shelf, cprd.daemon.storage.record
for line in open(os.environ["TEST_VERSIONS"]):
    what, value = line.split()
    module, name = what.rsplit(".", 1)
    room = "protocol" if module == "messages" else "daemon.storage"
    setattr(sys.modules[f"cprd.{room}.{module}"], name, eval(value))
from cprd.daemon.command import main
main()
"""


class Versioned(DaemonProcess):
    def __init__(self, place: Path) -> None:
        self.versions = place / "versions"
        self.versions.write_text("")
        super().__init__(place, env={"TEST_VERSIONS": str(self.versions)})

    def start(self) -> None:
        self.command = [sys.executable, "-c", PROGRAM, "--socket", self.path]
        super().start()

    def become(self, **versions: str) -> None:
        """Re-execute with these: record__VERSION="9"."""
        lines = [f"{key.replace('__', '.')} {value}\n" for key, value in versions.items()]
        self.versions.write_text("".join(lines))
        seen, pid = len(self.log()), self.pid
        os.kill(pid, signal.SIGHUP)
        self.await_log("ready pid=", since=seen)
        assert self.pid == pid


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Versioned]:
    one = Versioned(tmp_path)
    yield one
    one.stop()


def state(text: str, *fds: int) -> cprd.State:
    one = cprd.State()
    one["text"] = text
    for index, fd in enumerate(fds):
        one.save_fd("fd", index, fd)
    return one


def phases(connection: cprd.Daemon) -> dict[str, str]:
    return {row["name"]: row["phase"] for row in connection.list()}


def test_a_claim_goes_on_across_an_upgrade_to_the_next_version_of_the_wire(
    daemon: Versioned,
) -> None:
    """Clients of the version before are served; those of the version before that are told."""
    newer = {"messages__VERSION": "3", "messages__RELEASES": "{2:'0.2',3:'0.3'}"}
    with daemon.connect() as connection, daemon.connect() as another:
        connection.save("web", state("claimed before"))
        claim = connection.load("web")
        another.save("other", state("prepared before"))
        daemon.become(**newer, messages__SPOKEN="(3,2)")
        claim.confirm(state("saved since"))
        claim.close()
        assert phases(another) == {"other": "held", "web": "held"}
        with another.load("other") as claim:
            assert claim.state["text"] == "prepared before"
        daemon.become(**newer, messages__SPOKEN="(4,3)")
        with pytest.raises(cprd.ProtocolError, match=r"speaks version 2 and needs cprd 0\.2"):
            another.list()
        daemon.become()
        assert phases(another) == {"web": "held"}


@pytest.mark.usefixtures("nothing_leaks")
def test_what_a_newer_one_keeps_is_listed_and_busy_and_comes_back_with_it(
    daemon: Versioned,
) -> None:
    with daemon.connect() as connection:
        daemon.become(record__VERSION="9")
        connection.save("new", state("from the newer one"))
        daemon.become()
        connection.save("old", state("from the older one"))

        rows = {row["name"]: row for row in connection.list()}
        assert rows["new"]["phase"] == "unreadable"
        assert "version 9" in rows["new"]["reason"]
        assert rows["new"]["uid"] == os.getuid()
        with pytest.raises(cprd.Busy, match="newer cprd") as refusal:
            connection.load("new")
        assert not isinstance(refusal.value, cprd.Damaged)
        with pytest.raises(cprd.AlreadyHeld):
            connection.save("new", state("over it"))
        with pytest.raises(cprd.Busy):
            connection.save("new", state("over it"), if_exists="replace")
        with pytest.raises(cprd.Busy, match="force"):
            connection.drop("new")
        with pytest.raises(cprd.Busy):
            connection.release("new")
        with pytest.raises(cprd.NotHeld):
            connection.load("nothing")
        with connection.load("old") as claim:
            assert claim.state["text"] == "from the older one"
            claim.reject()
        assert connection.show("new")["phase"] == "unreadable"

        daemon.become(record__VERSION="9")
        assert phases(connection) == {"new": "held", "old": "unreadable"}
        with connection.load("new") as claim:
            assert claim.state["text"] == "from the newer one"


def test_it_stays_through_restarts_and_rewritten_shelves(daemon: Versioned) -> None:
    with daemon.connect() as connection:
        daemon.become(record__VERSION="9", shelf__WANTED_BUFFER="8192")
        connection.save("new", state("precious"))
        daemon.become(shelf__WANTED_BUFFER="8192")
        for _ in range(100):
            connection.save("x", state("x"))
            connection.drop("x")
        daemon.become()
        daemon.become()
        assert phases(connection) == {"new": "unreadable"}
        daemon.become(record__VERSION="9")
        with connection.load("new") as claim:
            assert claim.state["text"] == "precious"


def test_dropped_by_force_it_is_gone_and_let_go_of(daemon: Versioned) -> None:
    reading, writing = os.pipe()
    with daemon.connect() as connection:
        daemon.become(record__VERSION="9")
        connection.save("new", state("x", writing))
        os.close(writing)
        daemon.become()
        assert phases(connection) == {"new": "unreadable"}
        connection.drop("new", force=True)
        poll = select.poll()
        poll.register(reading, select.POLLIN)
        assert poll.poll(patience(1) * 1000)
        os.close(reading)
        with pytest.raises(cprd.NotHeld):
            connection.load("new")
        daemon.become(record__VERSION="9")
        assert phases(connection) == {}


def test_where_not_even_the_name_can_be_read_no_name_is_free_for_sure(daemon: Versioned) -> None:
    """A save would end what is only out of sight, as soon as that comes to light again."""
    with daemon.connect() as connection:
        daemon.become(record__MAGIC="b'NEWS'")
        connection.save("new", state("precious"))
        daemon.become()
        with pytest.raises(cprd.Busy, match="cannot be read"):
            connection.load("new")
        with pytest.raises(cprd.Busy, match="cannot be read"):
            connection.load("whatever", wait=0.1)
        with pytest.raises(cprd.Busy, match="cannot be read"):
            connection.save("new", state("over it"))
        with pytest.raises(cprd.Busy, match="cannot be read"):
            connection.save("new", state("over it"), if_exists="replace")
        with pytest.raises(cprd.Busy, match="cannot be read"):
            connection.prepare("new", state("over it"))
        with pytest.raises(cprd.Busy, match="cannot be read"):
            connection.drop("new", force=True)
        assert "cannot be read" in str(connection.status()["blind"])
        assert phases(connection) == {}
        daemon.become()
        daemon.become(record__MAGIC="b'NEWS'")
        assert connection.status()["blind"] is None
        with connection.load("new") as claim:
            assert claim.state["text"] == "precious"


def test_what_lies_on_a_newer_shelf_is_found_and_both_shelves_count_afterwards(
    daemon: Versioned,
) -> None:
    """Where slots lie is frozen for all versions: the newer shelf is left alone, and what is on it
    goes on."""
    newer = {"shelf__VERSION": "3"}
    with daemon.connect() as connection:
        daemon.become(**newer)
        for name in ("taken", "changed", "left"):
            connection.save(name, state("precious"))
        daemon.become()
        assert connection.status()["blind"] is None
        with connection.load("taken") as claim:
            assert claim.state["text"] == "precious"
        with pytest.raises(cprd.NotHeld):
            connection.load("taken")
        connection.save("changed", state("anew"), if_exists="replace")
        connection.save("old", state("also precious"))
        left = {"changed": "held", "left": "held", "old": "held"}
        for _ in range(2):  # it is passed on, again and again
            daemon.become()
            assert phases(connection) == left
        for versions in (newer, {}, newer):
            daemon.become(**versions)
            assert phases(connection) == left
            assert len(connection.list()) == len(left)
        for name, text in (("changed", "anew"), ("left", "precious"), ("old", "also precious")):
            with connection.load(name) as claim:
                assert claim.state["text"] == text
        daemon.become()
        assert phases(connection) == {}


def test_of_a_newer_shelf_with_newer_slots_all_is_listed_and_can_be_dropped(
    daemon: Versioned,
) -> None:
    newer = {"shelf__VERSION": "3", "record__VERSION": "9"}
    reading, writing = os.pipe()
    with daemon.connect() as connection:
        daemon.become(**newer)
        connection.save("new", state("precious"))
        connection.save("unwanted", state("x", writing))
        os.close(writing)
        daemon.become()
        assert phases(connection) == {"new": "unreadable", "unwanted": "unreadable"}
        with pytest.raises(cprd.Busy, match="version 9"):
            connection.load("new")
        with pytest.raises(cprd.Busy):
            connection.save("new", state("over it"), if_exists="replace")
        with pytest.raises(cprd.NotHeld):
            connection.load("nothing")
        connection.save("old", state("from the older one"))
        with pytest.raises(cprd.Busy, match="force"):
            connection.drop("unwanted")
        connection.drop("unwanted", force=True)
        poll = select.poll()
        poll.register(reading, select.POLLIN)
        assert poll.poll(patience(1) * 1000)
        os.close(reading)
        daemon.become()
        assert phases(connection) == {"new": "unreadable", "old": "held"}
        daemon.become(**newer)
        assert phases(connection) == {"new": "held", "old": "unreadable"}
        with connection.load("new") as claim:
            assert claim.state["text"] == "precious"


@contextlib.contextmanager
def newer_program(path: str, program: str) -> Iterator[subprocess.Popen[str]]:
    """A client whose bundles have version 2."""
    code = "import sys, cprd\nfrom cprd.bundle import layout, pack, unpack\n"
    code += "layout.VERSION = pack.VERSION = unpack.VERSION = 2\n"
    code += "daemon = cprd.connect(sys.argv[1])\n" + program
    with subprocess.Popen(
        [sys.executable, "-c", code, path],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
    ) as process:
        yield process


def test_a_program_too_old_for_a_bundle_leaves_it_whole(daemon: Versioned) -> None:
    """As after a downgrade of the library alone: it is not damaged."""
    with daemon.connect() as connection:
        connection.save("web", state("from version 1"))
        with newer_program(daemon.path, "daemon.load('web')") as process:
            assert process.stderr is not None
            assert "Busy: a bundle of version 1" in process.stderr.read()
        row = connection.show("web")
        assert row["phase"] == "held"
        assert "version 1" in row["last_reject"]
        with connection.load("web") as claim:
            assert claim.state["text"] == "from version 1"


def test_a_bundle_of_a_newer_program_is_kept_for_programs_that_can_read_it(
    daemon: Versioned,
) -> None:
    """cprd itself looks at no more than the outside of a bundle."""
    with newer_program(daemon.path, "daemon.save('web', cprd.State())") as process:
        assert process.wait(PATIENCE) == 0
    with daemon.connect() as connection:
        with pytest.raises(cprd.Busy, match=f"this cprd reads version {layout.VERSION}"):
            connection.load("web")
        assert phases(connection) == {"web": "held"}
    with newer_program(daemon.path, "daemon.load('web').confirm()") as process:
        assert process.wait(PATIENCE) == 0
    with daemon.connect() as connection:
        assert phases(connection) == {}

"""Root's NAME is root's own, in every verb; another user's is UID/NAME, or --owner."""

from __future__ import annotations

import os

import pytest

import cprd
from tests.support.cprctl import cprctl
from tests.support.daemon import DaemonProcess

USER = 4242

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")


def held_by_user(daemon: DaemonProcess, name: str, *, doubtful: bool = False) -> None:
    """Something that the user holds."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups([])
            os.setresgid(USER, USER, USER)
            os.setresuid(USER, USER, USER)
            with daemon.connect() as connection:
                state = cprd.State()
                state.save_fd("e", 0, os.eventfd(0))
                prepared = connection.prepare(name, state)
                status = 0
                if doubtful:
                    os._exit(0)
                prepared.commit()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def owners(daemon: DaemonProcess) -> list[tuple[int, str, str]]:
    with daemon.connect() as connection:
        return sorted((row["uid"], row["name"], row["phase"]) for row in connection.list())


VERBS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "show": ((), ()),
    "wait": (("--timeout", "0"), ()),
    "load": ((), ("--", "true")),
    "run": ((), ("--", "true")),
    "drop": ((), ()),
    "release": (("--force",), ()),
}


@pytest.mark.parametrize("verb", list(VERBS))
@pytest.mark.parametrize("how", ["UID/NAME", "--owner"])
def test_a_verb_finds_the_name_of_another_user_only_when_told_whose(
    daemon: DaemonProcess, verb: str, how: str
) -> None:
    held_by_user(daemon, "web", doubtful=verb == "release")
    before = owners(daemon)
    options, command = VERBS[verb]
    bare = cprctl(daemon, verb, "web", *options, *command)
    assert bare.returncode == 3
    assert f"of uid 0; but uid {USER} holds a 'web': {USER}/web" in bare.stderr
    assert owners(daemon) == before
    name = (f"{USER}/web",) if how == "UID/NAME" else ("web", "--owner", str(USER))
    done = cprctl(daemon, verb, *name, *options, *command)
    assert done.returncode == 0, done.stderr
    after = {"release": [(USER, "web", "held")], "drop": [], "load": [], "run": []}
    assert owners(daemon) == after.get(verb, before)


@pytest.mark.parametrize("how", ["UID/NAME", "--owner"])
def test_root_saves_under_the_name_of_another_user(daemon: DaemonProcess, how: str) -> None:
    name = (f"{USER}/web",) if how == "UID/NAME" else ("web", "--owner", str(USER))
    for words in (("web",), name):
        done = cprctl(daemon, "save", *words, "--section", "s=/etc/hostname")
        assert done.returncode == 0, done.stderr
    assert owners(daemon) == [(0, "web", "held"), (USER, "web", "held")]


def test_two_owners_and_no_owner(daemon: DaemonProcess) -> None:
    for name, owner, why in (
        (f"{USER}/web", "0", "two owners"),
        ("web", "nobody-of-that-name", "name of a user"),
        ("web", str(2**32 - 1), "wants a uid"),
    ):
        done = cprctl(daemon, "drop", name, "--owner", owner)
        assert done.returncode == 2
        assert why in done.stderr

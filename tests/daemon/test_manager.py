"""A service manager that is slow, mute or gone costs durability, and nothing else: whoever comes is
served, nothing that is held is lost, the log says so once, and the store is used again when it can.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cprd
from cprd.daemon.running import FIRST_ANSWER
from cprd.daemon.storage.fdstore import RECHECK
from tests.support.daemon import DaemonProcess
from tests.support.notify_socket import NotifySocket
from tests.support.patience import patience, rest, until
from tests.support.seeded import Seeded

Start = Callable[..., DaemonProcess]

SLACK = patience(3.0)  # s that a busy machine may add to whatever takes no time


@pytest.fixture
def notify(tmp_path: Path) -> Iterator[NotifySocket]:
    one = NotifySocket(tmp_path / "notify")
    yield one
    one.close()


def start(start_daemon: Start, notify: NotifySocket, **env: str) -> DaemonProcess:
    return start_daemon(env={"NOTIFY_SOCKET": str(notify.path), **env})


def kept(daemon: DaemonProcess) -> str:
    with daemon.connect() as connection:
        return str(connection.status()["kept"])


def await_kept(daemon: DaemonProcess, where: str) -> float:
    """Wait until holds are kept there; the seconds that took."""
    began = time.monotonic()
    until(lambda: kept(daemon) == where, lambda: f"not kept in {where}: {daemon.log()}")
    return time.monotonic() - began


def save_and_load(daemon: DaemonProcess, name: str = "web") -> str:
    """A hold from one to the next; where it was kept."""
    with daemon.connect() as connection:
        where = connection.save(name, cprd.State()).kept
        with connection.load(name):
            pass
    return where


def told(daemon: DaemonProcess, event: str) -> int:
    return sum(line.split()[0] == event for line in daemon.log())


def reload(daemon: DaemonProcess) -> None:
    seen = len(daemon.log())
    os.kill(daemon.pid, signal.SIGHUP)
    daemon.await_log("re-executing", since=seen)
    daemon.await_log("ready pid=", since=seen)


def test_a_manager_that_answers_has_what_is_held_before_the_first_client(
    start_daemon: Start, notify: NotifySocket
) -> None:
    notify.read()
    daemon = start(start_daemon, notify)
    assert save_and_load(daemon) == "store"
    until(lambda: len(notify.stored) == 4, lambda: f"stored: {notify.stored}")
    until(lambda: any(b"READY=1" in said for said in notify.said), lambda: str(notify.said))
    assert daemon.stop() == 0
    until(lambda: notify.said[-1].startswith(b"STOPPING=1"), lambda: str(notify.said))


def test_nobody_waits_for_a_mute_manager(start_daemon: Start, notify: NotifySocket) -> None:
    began = time.monotonic()
    daemon = start(start_daemon, notify)
    assert save_and_load(daemon) == "memory"
    assert time.monotonic() - began < FIRST_ANSWER + SLACK
    with daemon.connect() as connection:
        connection.save("held", cprd.State())
        daemon.await_log("manager-mute")
        reload(daemon)
        assert [row["name"] for row in connection.list()] == ["held"]
    assert save_and_load(daemon) == "memory"
    began = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - began < SLACK
    assert told(daemon, "manager-mute") == 1


def test_a_mute_manager_that_reads_again_has_the_store_used_at_once(
    start_daemon: Start, notify: NotifySocket
) -> None:
    daemon = start(start_daemon, notify)
    daemon.await_log("manager-mute")
    notify.read()
    assert await_kept(daemon, "store") < SLACK
    until(lambda: any(b"READY=1" in said for said in notify.said), lambda: str(notify.said))
    daemon.await_log("store-used-again kept=store")


@pytest.mark.parametrize("reloaded", [False, True], ids=["", "reloaded"])
def test_a_manager_that_goes_away_takes_nothing_along(
    start_daemon: Start, notify: NotifySocket, reloaded: bool
) -> None:
    notify.read()
    daemon = start(start_daemon, notify, WATCHDOG_USEC="400000")
    with daemon.connect() as connection:
        assert connection.save("held", cprd.State()).kept == "store"
        notify.go()
        await_kept(daemon, "memory")
        if reloaded:
            reload(daemon)
        daemon.await_log("manager-gone")
        for _ in range(10):  # the watchdog would have been told many times
            assert save_and_load(daemon) == "memory"
            rest(0.2)  # nothing must be said meanwhile
        assert told(daemon, "manager-gone") == 1 + reloaded
        notify.back()
        notify.read()
        assert await_kept(daemon, "store") < 2.0 + SLACK
        assert [row["name"] for row in connection.list()] == ["held"]
        wanted = (b"READY=1", b"STATUS=1 holds", b"WATCHDOG=1")
        until(
            lambda: all(any(word in said for said in notify.said) for word in wanted),
            lambda: str(notify.said),
        )
    assert told(daemon, "task-failed") == 0
    assert daemon.stop() == 0


def test_a_manager_that_comes_late_is_told_everything(
    start_daemon: Start, notify: NotifySocket
) -> None:
    notify.go()
    daemon = start(start_daemon, notify)
    assert save_and_load(daemon) == "memory"
    daemon.await_log("manager-gone")
    notify.back()
    notify.read()
    assert await_kept(daemon, "store") < 2.0 + SLACK
    until(lambda: any(b"READY=1" in said for said in notify.said), lambda: str(notify.said))


def test_nobody_waits_for_a_slow_manager(start_daemon: Start, notify: NotifySocket) -> None:
    notify.read(delay=0.7)
    began = time.monotonic()
    daemon = start(start_daemon, notify)
    assert save_and_load(daemon) == "memory"
    assert time.monotonic() - began < FIRST_ANSWER + SLACK
    await_kept(daemon, "store")
    assert told(daemon, "manager-mute") == 0
    began = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - began < SLACK


def test_a_manager_without_a_store_is_named_once(start_daemon: Start, notify: NotifySocket) -> None:
    notify.read(stores=False)
    daemon = start(start_daemon, notify)
    for _ in range(20):
        assert save_and_load(daemon) == "memory"

    def offers() -> int:
        return sum(b"FDSTORE=1" in said for said in notify.said)

    before = offers()
    assert before
    until(lambda: offers() > before + 3, lambda: "the shelf is not offered again")
    assert told(daemon, "not-stored") == 1


SMALL = "cprd.daemon.storage.shelf.WANTED_BUFFER = 8192"


@pytest.mark.parametrize("manager", ["mute", "gone"])
def test_shelves_do_not_pile_up_while_the_manager_is_away(
    tmp_path: Path, notify: NotifySocket, manager: str
) -> None:
    """Each time that a shelf is written anew the one before is to be taken out of the store."""
    if manager == "gone":
        notify.go()
    daemon = Seeded(tmp_path, SMALL, env={"NOTIFY_SOCKET": str(notify.path)})
    try:
        with daemon.connect() as connection:

            def churn(shelves: int) -> None:
                while told(daemon, "shelf") < shelves:
                    connection.save("churn", cprd.State())
                    connection.drop("churn")

            churn(3)
            before = daemon.fds()
            churn(20)
            # What ended last may be with its releaser still.
            until(lambda: daemon.fds() <= before + 4, lambda: f"{daemon.fds()}, not {before}")
    finally:
        assert daemon.stop() == 0


@pytest.mark.parametrize(
    "env",
    [
        {"NOTIFY_SOCKET": "vsock:2:1"},
        {"NOTIFY_SOCKET": "/nowhere/at/all"},
        {"WATCHDOG_USEC": "soon"},
        {"WATCHDOG_USEC": "9" * 400},
    ],
)
def test_nonsense_in_the_environment_ends_nothing(
    start_daemon: Start, notify: NotifySocket, env: dict[str, str]
) -> None:
    notify.read()
    daemon = start_daemon(env={"NOTIFY_SOCKET": str(notify.path), **env})
    save_and_load(daemon)
    daemon.await_log(
        {"vsock:2:1": "no-manager", "/nowhere/at/all": "manager-gone"}.get(
            env.get("NOTIFY_SOCKET", ""), "no-watchdog"
        )
    )
    assert daemon.stop() == 0


def test_a_reload_that_drops_what_is_stored_is_noticed(
    start_daemon: Start, notify: NotifySocket
) -> None:
    notify.read()
    daemon = start(start_daemon, notify)
    await_kept(daemon, "store")
    assert save_and_load(daemon) == "store"
    notify.reload_without_a_store()
    assert await_kept(daemon, "memory") < RECHECK / 2
    daemon.await_log("not-stored")

"""The fixtures that all tests share: a real cprd of their own, and counting descriptors.

`daemon` is a cprd with the usual limits, `new_daemon` an unused one; `start_daemon(...)` starts one
with others.
`nothing_leaks` (by name, or pytest.mark.usefixtures) fails a test that leaves this process with
another number of descriptors than it found.
"""

from __future__ import annotations

import contextlib
import os
import resource
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.support import checkout, signals
from tests.support.daemon import DaemonProcess, Shared
from tests.support.descriptors import nothing_leaks_inside

CI = os.environ.get("CI") == "true"


def pytest_configure(config: pytest.Config) -> None:
    """The usual soft limit of 1,024 descriptors is less than what these tests hand over."""
    signals.take_as_usual()
    if not hasattr(config, "workerinput"):  # (of pytest-xdist's)
        checkout.compile_for_children()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1 << 16), hard))
    # An example is bounded by its test; 0.2 s of its own would bound the other load of the machine.
    settings.register_profile("cprd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("cprd")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """With CI=true a part of the system that a test needs and does not find is a failure, unless it
    is one that nobody can install (marker `hardware`)."""
    report = yield
    counts = item.get_closest_marker("hardware") is None and not hasattr(report, "wasxfail")
    if CI and counts and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"with CI=true nothing may be skipped: {report.longrepr[2]}"
    return report


@pytest.fixture
def start_daemon() -> Iterator[Callable[..., DaemonProcess]]:
    """start_daemon(*arguments, config=, nofile=, env=): a cprd; all end with the test."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: str, **options: Any) -> DaemonProcess:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cprd-test.")))
            place.chmod(0o755)  # other uids come, too
            daemon = DaemonProcess(place, *arguments, **options)
            stack.callback(daemon.stop)
            return daemon

        yield start


@pytest.fixture(scope="session")
def shared_daemon() -> Iterator[Shared]:
    shared = Shared()
    yield shared
    shared.end()


@pytest.fixture
def daemon(shared_daemon: Shared) -> Iterator[DaemonProcess]:
    """A cprd with the usual limits, in which nothing is held. It may have been another test's."""
    yield shared_daemon.take()
    shared_daemon.give_back()


@pytest.fixture
def new_daemon(start_daemon: Callable[..., DaemonProcess]) -> DaemonProcess:
    """A cprd with the usual limits that nobody has used yet."""
    return start_daemon()


@pytest.fixture
def nothing_leaks(shared_daemon: Shared) -> Iterator[None]:
    """This process ends a test with as many descriptors as it began it."""
    with nothing_leaks_inside(but=shared_daemon.fds):
        yield

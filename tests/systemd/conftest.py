"""The fixtures `systemd` (a booted machine) and `boot_systemd` (for tests that want several, or one
with D-Bus). Where no systemd can be booted these tests are skipped with what is missing.
CPRD_SYSTEMD_TREE=DIR boots the tree of a newer release instead: see docs/systemd.md."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from . import boot
from .machine import TREE, Machine, MachineError

Boot = Callable[..., Machine]


@pytest.fixture(scope="session")
def systemd_boots(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whether it works here, found out once by doing it."""
    lacking = boot.missing(TREE)
    reason = "a real systemd needs " + "; ".join(lacking)
    if not lacking:
        try:
            Machine(tmp_path_factory.mktemp("boot")).close()
            return
        except MachineError as error:
            reason = f"no real systemd here (is CAP_SYS_ADMIN missing?): {error}"
    pytest.skip(reason)


@pytest.fixture
def boot_systemd(systemd_boots: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Boot]:
    """boot_systemd(bus=False): boot a machine; all of them end with the test."""
    with contextlib.ExitStack() as stack:

        def start(*, bus: bool = False, scratch: Path | None = None) -> Machine:
            place = scratch or tmp_path_factory.mktemp("machine")
            return stack.enter_context(Machine(place, bus=bus))

        yield start


@pytest.fixture
def systemd(boot_systemd: Boot, tmp_path: Path) -> Machine:
    """A machine for this test, with its tmp_path at the same place inside."""
    return boot_systemd(scratch=tmp_path)

"""`run(coroutine)`, on asyncio and on uvloop."""

from __future__ import annotations

import pytest

from tests.support.loops import Run, run_on


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    return run_on(request.param)

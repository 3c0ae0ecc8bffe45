"""The fixtures `keeping` (cprd under --keep) and `keep` (for tests that want another one)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from .keeping import KeptByParent

Keep = Callable[..., KeptByParent]


@pytest.fixture
def keep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keep]:
    """keep(*arguments, settings=): cprd under --keep; all of them end with the test."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: str, **options: Any) -> KeptByParent:
            keeping = KeptByParent(tmp_path_factory.mktemp("keep"), *arguments, **options)
            stack.callback(keeping.close)
            return keeping

        yield start


@pytest.fixture
def keeping(keep: Keep) -> KeptByParent:
    return keep()

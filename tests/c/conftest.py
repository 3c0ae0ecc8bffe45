"""The programs of examples/c, built when they are asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.c.building import Programs, build

Build = Callable[..., Programs]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """built(kind, compiler="gcc"): the programs of that kind."""
    place = tmp_path_factory.mktemp("c")
    made: dict[tuple[str, str], Programs] = {}

    def programs(kind: str, compiler: str = "gcc") -> Programs:
        if (kind, compiler) not in made:
            name = f"{kind}-{compiler}".replace(" ", "-")
            made[kind, compiler] = build(place / name, kind, compiler)
        return made[kind, compiler]

    return programs

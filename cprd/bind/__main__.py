"""python -m cprd.bind: build the object for `cprctl run --bind` beside its source, for all."""

from __future__ import annotations

import sys

from cprd.bind.build import HERE, build
from cprd.errors import CprdError
from cprd.linux.stdio import note, say


def main() -> int:
    """Build, and print the path. Exit status: 0, or 1 with a line on stderr."""
    try:
        say(build(HERE, mode=0o755))
    except CprdError as error:
        note(f"cprd.bind: {error}")
        return 1
    return 0


sys.exit(main())

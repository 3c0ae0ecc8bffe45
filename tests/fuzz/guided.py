"""Fuzz a decoder with coverage as the guide, by atheris (`pip install 'cprd[fuzz]'`).

    python -m tests.fuzz.guided TARGET [libFuzzer option, such as -max_total_time=60] [CORPUS]

Exit status: not 0 on a finding, whose input lies in a file crash-* here.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path


def main() -> None:
    import atheris

    with atheris.instrument_imports(include=["cprd"]):
        from tests.fuzz.targets import TARGETS, run
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in TARGETS:
        raise SystemExit(f"usage: guided TARGET ...; targets: {', '.join(TARGETS)}")
    corpus = Path(tempfile.mkdtemp(prefix=f"cprd-fuzz-{name}."))
    for number, seed in enumerate(TARGETS[name].seeds):
        (corpus / str(number)).write_bytes(seed)
    atheris.Setup([*sys.argv, str(corpus)], lambda data: run(name, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()

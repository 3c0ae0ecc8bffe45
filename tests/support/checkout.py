"""Where the checkout lies, and its compiled form."""

from __future__ import annotations

import compileall
import os
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def compile_for_children() -> None:
    """Each program that a test starts finds cprd compiled: half the CPU time of a start of cprd is
    the compiler's where $PYTHONDONTWRITEBYTECODE is set. A clone that cannot be written to stays as
    it is."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if os.access(CHECKOUT / "cprd", os.W_OK):
        compileall.compile_dir(CHECKOUT / "cprd", quiet=2)


def open_to_all(path: Path) -> None:
    """Let other uids reach a directory of this run's below the temporary directory."""
    for place in (path, *path.parents):
        if place == Path(tempfile.gettempdir()) or place.stat().st_uid != os.getuid():
            return
        place.chmod(0o755)

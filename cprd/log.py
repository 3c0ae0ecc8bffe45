"""One line an event on stderr: `event key=value ...`, for people and for grep. Never what a state
contains. Under systemd the line begins with its priority (sd-daemon(3))."""

from __future__ import annotations

import os
import sys
from typing import Any

_journal = "JOURNAL_STREAM" in os.environ
INFO, WARNING, ERROR = 6, 4, 3


def event(what: str, *, level: int = INFO, **fields: Any) -> None:
    line = f"<{level}>{what}" if _journal else what
    for key, value in fields.items():
        if value is None:
            continue
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        if not text or not text.isprintable() or any(c in text for c in ' "='):
            text = ascii(text) if not text.isprintable() else '"' + text.replace('"', "'") + '"'
        line += f" {key}={text}"
    try:
        os.write(2, line.encode("utf-8", "replace") + b"\n")
    except OSError:
        sys.stderr = None  # nobody reads it: go on without

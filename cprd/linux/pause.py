"""Points at which a test may stop a process and kill it there, instead of guessing with sleeps.

`point("save:parked")` does nothing unless the environment arms it at start:

- CPRD_PAUSE_LOG=FILE appends the name of each point as it is passed (one a line);
- CPRD_PAUSE=NAME, NAME#K or #K raises SIGSTOP on the process at the first hit of NAME, its K-th
  hit, or the K-th hit of any point. Whoever waits with WUNTRACED sees it stand there.
"""

from __future__ import annotations

import _thread
import os

_where = os.environ.get("CPRD_PAUSE", "")
_log = os.environ.get("CPRD_PAUSE_LOG", "")
armed = bool(_where or _log)  # for callers to whom a call is too dear
_hits: dict[str, int] = {}


def point(name: str) -> None:
    """Stop here when the environment says so; otherwise nothing."""
    if not armed:
        return
    if _log:
        fd = os.open(_log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, name.encode() + b"\n")
        finally:
            os.close(fd)
    wanted, _, number = _where.partition("#")
    if not _where or (wanted and wanted != name):
        return
    _hits[wanted] = _hits.get(wanted, 0) + 1
    if _hits[wanted] == int(number or 1):
        import signal

        # To this thread, which takes not one step more: kill() may choose another one first.
        signal.pthread_kill(_thread.get_ident(), signal.SIGSTOP)


def arm(where: str = "", log: str = "") -> None:
    """Set both variables anew for this process, and count hits from now on: for a child that a test
    forked."""
    global _where, _log, armed
    _where, _log, armed = where, log, bool(where or log)
    _hits.clear()

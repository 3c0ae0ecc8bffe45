"""What the service manager is told about a VM, by whoever of us is in its cgroup."""

from __future__ import annotations

import os
import sys

from cprd.errors import CprdError


def tell(message: str) -> None:
    """Send a notification, if a manager asked for some. A manager that is away is no failure."""
    from cprd.systemd.notify import Manager, drive

    try:
        manager = Manager.from_environment(os.environ)
        if manager is None:
            return
        with manager:
            drive(manager.tell(message.encode()), timeout=10.0)
    except (CprdError, OSError) as error:
        print(f"cprctl: the service manager was not told: {error}", file=sys.stderr)


def succeed(pid: int, status: str) -> None:
    """Say that `pid` is the service from now on, and wait until the manager has seen it: the old
    main process may end only then."""
    from cprd.systemd.notify import Manager, drive, mainpid
    from cprd.systemd.notify import status as status_line

    manager = Manager.from_environment(os.environ)
    if manager is None:
        return
    with manager:
        drive(manager.tell(mainpid(pid) + b"\n" + status_line(status)), timeout=10.0)
        drive(manager.barrier(), timeout=10.0)

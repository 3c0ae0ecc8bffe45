"""cprctl from a plain clone: `python3 cprd COMMAND`, the directory and not `-m cprd`, because that
imports the package, which needs msgpack, before it comes here.

Should this Python lack the packages that cprd needs, an environment that has them is made first
(tools/bootstrap.py), and the process goes on there."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

PACKAGE = os.path.dirname(os.path.abspath(__file__))
BOOTSTRAP = os.path.join(os.path.dirname(PACKAGE), "tools", "bootstrap.py")
PREPARED = "CPRD_PREPARED"  # set across our own exec only: a failure must not turn into a loop


def main() -> int:
    """Become cprctl. Returns its exit status, or 1 when no environment can be had."""
    if not __package__:  # run as a directory, which Python then puts first: cprd/trio.py hides trio
        sys.path[0] = os.path.dirname(PACKAGE)
    prepared = os.environ.pop(PREPARED, None)
    lacking = any(find_spec(name) is None for name in ("msgpack", "trio", "rich"))
    if prepared is None and lacking and os.path.exists(BOOTSTRAP):
        command = [sys.executable, "-I", BOOTSTRAP, "all"]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if answer.returncode:
            return 1
        python = answer.stdout.strip()
        os.environ[PREPARED] = "1"
        sys.stdout.flush()
        os.execv(python, [python, PACKAGE, *sys.argv[1:]])
    from cprd.cli import main as cprctl

    return cprctl()


if __name__ == "__main__":
    sys.exit(main())

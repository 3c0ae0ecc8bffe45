"""`cprctl qemu start`: become the QEMU of a VM, with the state held under its name, or cold.

Two processes. This one becomes the QEMU: same PID, the QEMU's exit status. A helper (restore.py),
forked twice so that the QEMU never has a child it does not know, speaks to cprd, replays the state
and lets the guest run. The claim is the helper's, and ends with the helper.

    helper: load ... go     hold claimed           a kill -> held again; the guard ends the QEMU
    helper: replay, loaded  QEMU has it, stopped   the same
    helper: begin           in doubt, from now on  a kill -> in doubt, until that QEMU saves again
    helper: cont            the guest runs         the same; an answered error takes it back
    helper: confirm         nothing is held        done
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from cprd.errors import CODES, CprdError
from cprd.linux.pause import point
from cprd.linux.stdio import flush
from cprd.qemu.command import Command
from cprd.qemu.errors import code, one_line
from cprd.qemu.sockets import refuse_taken
from cprd.qemu.spawn import Plumbing, execute, fork_twice, hear, notify, say


def start(
    socket_path: str,
    name: str,
    words: list[str],
    *,
    cold: bool = False,
    force: bool = False,
    timeout: float = 60.0,
) -> NoReturn:
    """Become the QEMU. `timeout`: seconds to load a state. Raises CprdError when nothing was
    started."""
    command = Command(words)
    if command.only_pretty():
        print(f"cprctl: {name}: {command.only_pretty()}", file=sys.stderr)
    if cold:
        print(f"cprctl: {name}: booting cold, as asked; what is held stays held", file=sys.stderr)
        _become_cold(command)
    point("qemu-start:begin")
    plumbing = Plumbing()
    flush()
    qemu = os.getpid()
    if fork_twice():
        _be_helper(plumbing, qemu, socket_path, name, command, force, timeout)
    plumbing.keep_qemus()
    word = hear(plumbing.talk_qemu)
    if word is None:
        raise CprdError(f"{name}: the helper ended; nothing was started")
    if "cold" in word:
        _become_cold(command)
    if "fail" in word:
        raise CODES.get(word["code"], CprdError)(word["fail"])
    point("qemu-start:exec")
    failure = execute(command, plumbing, word)
    raise CprdError(f"{command.words[0]}: {failure.strerror}")


def _be_helper(
    plumbing: Plumbing,
    qemu: int,
    socket_path: str,
    name: str,
    command: Command,
    force: bool,
    timeout: float,
) -> NoReturn:
    status = 1
    try:
        plumbing.keep_ours()
        from cprd.qemu.restore import restore

        status = restore(plumbing, qemu, socket_path, name, command, force=force, timeout=timeout)
    except BaseException as error:
        say(plumbing.talk, fail=f"{name}: {one_line(error)}", code=code(error))
    finally:
        os._exit(status)


def _become_cold(command: Command) -> NoReturn:
    """Raises Refused when a QEMU listens at COMMAND's monitor; CprdError without such a program."""
    refuse_taken(command)
    notify("READY=1\nSTATUS=The guest was booted.")  # a QEMU that boots by itself says nothing
    try:
        os.execvp(command.words[0], command.words)
    except OSError as error:
        raise CprdError(f"{command.words[0]}: {error.strerror}") from None

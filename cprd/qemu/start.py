"""`cprctl qemu start`: become the QEMU of a VM, with what is held under its name, or cold.

Two processes. This one becomes the QEMU (same PID, its exit status the QEMU's). A helper, forked
twice so that the QEMU never has a child it does not know, speaks to cprd, replays the state and
lets the guest run. The claim is the helper's: it ends with the helper.

    helper: load ... go     hold claimed           a kill -> held again; the QEMU is ended (guard)
    helper: replay, loaded  QEMU has it, stopped   the same
    helper: begin           in doubt, from now on  a kill -> in doubt, until that QEMU saves again
    helper: cont            the guest runs         the same; an answered error takes it back
    helper: confirm         nothing is held        done
"""

from __future__ import annotations

import os
import sys

from cprd.errors import Busy
from cprd.linux.pause import point
from cprd.linux.stdio import flush
from cprd.qemu.command import Command
from cprd.qemu.failure import Refused
from cprd.qemu.launch import Plumbing, execute, hear, say
from cprd.qemu.taken import refuse_taken
from cprd.qemu.version import version_of

TOLD = "NOTIFY_SOCKET"


def start(
    socket_path: str,
    name: str,
    words: list[str],
    *,
    cold: bool = False,
    force: bool = False,
    timeout: float = 60.0,
) -> int:
    """Become the QEMU. Returns an exit status only when nothing was started."""
    command = Command(words)
    if command.only_pretty():
        print(f"cprctl: {name}: {command.only_pretty()}", file=sys.stderr)
    if cold:
        print(f"cprctl: {name}: booting cold, as asked; what is held stays held", file=sys.stderr)
        return _become_cold(command)
    point("qemu-start:begin")
    plumbing = Plumbing()
    flush()
    qemu = os.getpid()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if os.fork() == 0:
                from cprd.qemu.resume import helper

                plumbing.keep_ours()
                code = helper(
                    plumbing, qemu, socket_path, name, command, force=force, timeout=timeout
                )
            else:
                code = 0
        except Exception as error:
            say(plumbing.talk, fail=f"{name}: {type(error).__name__}: {error}", status=1)
        finally:
            os._exit(code)
    plumbing.keep_qemus()
    os.waitpid(child, 0)
    talk = plumbing.talk_qemu
    try:
        say(talk, version=list(version_of(command)))
    except Refused as error:
        say(talk, no_version=str(error))
    word = hear(talk)
    if word is None:
        print(f"cprctl: {name}: the helper ended; nothing was started", file=sys.stderr)
        return 1
    if "cold" in word:
        return _become_cold(command)
    if "fail" in word:
        print(f"cprctl: {word['fail']}", file=sys.stderr)
        return int(word["status"])
    point("qemu-start:exec")
    failure = execute(command, plumbing, word)
    print(f"cprctl: {command.words[0]}: {failure.strerror}", file=sys.stderr)
    return 1


def _become_cold(command: Command) -> int:
    try:
        refuse_taken(command)
    except Busy as error:
        print(f"cprctl: {error}", file=sys.stderr)
        return 1
    _ready()
    try:
        os.execvp(command.words[0], command.words)
    except OSError as error:
        print(f"cprctl: {command.words[0]}: {error.strerror}", file=sys.stderr)
    return 1


def _ready() -> None:
    """Nobody is left to say it once we are a QEMU that boots by itself."""
    if TOLD in os.environ:
        from cprd.qemu.supervisor import tell

        tell("READY=1\nSTATUS=The guest was booted.")

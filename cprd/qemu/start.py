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

from cprd.errors import CODES, CprdError
from cprd.linux import identity
from cprd.linux.pause import point
from cprd.linux.stdio import flush, note
from cprd.qemu import acting, signals
from cprd.qemu.spawn import (
    Plumbing,
    become_qemu,
    fork_twice,
    hear,
    notify,
    say_or_note,
    take_rights,
)

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from typing import NoReturn

    from cprd.qemu.command import Command


class Overrides:
    """The differences that an operator wants: other `images`, another `machine`."""

    __slots__ = ("images", "machine")

    def __init__(self, images: bool = False, machine: bool = False) -> None:
        self.images = images
        self.machine = machine


class Order:
    """What to start. `socket`: the path of cprd's; `owner`: the uid with that NAME; `words`:
    COMMAND; `overrides`: what COMMAND may have otherwise; `agent`: the socket of a guest agent that
    sets the guest's clock afterwards; `timeout`: seconds to load a state."""

    def __init__(
        self,
        socket: str,
        name: str,
        owner: int,
        words: list[str],
        *,
        cold: bool,
        force: bool,
        overrides: Overrides,
        agent: str,
        timeout: float,
    ) -> None:
        self.socket = socket
        self.name = name
        self.owner = owner
        self.words = words
        self.cold = cold
        self.force = force
        self.overrides = overrides
        self.agent = agent
        self.timeout = timeout


def start(order: Order) -> NoReturn:
    """Become the QEMU. Raises CprdError when nothing was started."""
    name = order.name
    if order.cold:
        command = _command(order)
        note(f"cprctl: {name}: booting cold, as asked; what is held stays held")
        _become_cold(command, order.owner)
    point("qemu-start:begin")
    plumbing = Plumbing()
    flush()
    qemu = os.getpid()
    if not fork_twice():
        _be_helper(plumbing, qemu, order)
    # The helper imports and asks cprd meanwhile; each has a core.
    import _json  # noqa: F401  # as the user whose QEMU this will be these may not be there
    import warnings  # noqa: F401  # (execvp imports it)

    from cprd.qemu.process import GUARD, guard_mark

    os.environ[GUARD] = guard_mark(plumbing.post_guard(os.pidfd_open(qemu)))
    plumbing.keep_qemus()
    command = _command(order)
    kind, *words = hear(plumbing.talk_qemu) or [""]
    if not kind:
        raise CprdError(f"{name}: the helper ended; nothing was started")
    if kind == "cold":
        del os.environ[GUARD]
        _become_cold(command, order.owner)
    if kind == "fail":
        raise CODES.get(words[1], CprdError)(words[0])
    point("qemu-start:exec")
    failure = become_qemu(command, plumbing, words[0], order.owner)
    raise CprdError(f"{command.words[0]}: {failure.strerror}")


def _command(order: Order) -> Command:
    """Raises InvalidInput."""
    from cprd.qemu.command import Command

    command = Command(order.words)
    for said in (command.only_pretty(), command.changes_user()):
        if said:
            note(f"cprctl: {order.name}: {said}")
    return command


def _be_helper(plumbing: Plumbing, qemu: int, order: Order) -> NoReturn:
    status = 1
    directory = ahead = None
    try:
        plumbing.keep_ours()
        plumbing.close_stderr()
        with signals.watched():
            if order.owner == os.geteuid() and not order.force:
                from cprd.client.ahead import ask

                ahead = ask(order.socket, order.name)
            if ahead is not None:
                from cprd.qemu.early import execute

                directory = execute(plumbing, ahead, order)
            from cprd.qemu.restore import restore

            acting.act_as(order.owner)
            status = restore(plumbing, qemu, order, ahead, directory)
    except BaseException as error:
        from cprd.qemu.errors import code, one_line

        why = f"{order.name}: {one_line(error)}"
        say_or_note(plumbing.talk, why, code(error), executed=directory is not None)
    finally:
        if directory is not None:
            directory.close()
        os._exit(status)


def _become_cold(command: Command, owner: int) -> NoReturn:
    """Raises Refused when a QEMU listens at COMMAND's monitor; CprdError without such a program."""
    from cprd.qemu.sockets import refuse_taken

    acting.act_as(owner)
    try:
        refuse_taken(command)
    finally:
        identity.act_as_ourselves()
    take_rights(command, owner)
    notify("READY=1\nSTATUS=The guest was booted.")  # a QEMU that boots by itself says nothing
    try:
        os.execvp(command.words[0], command.words)
    except OSError as error:
        raise CprdError(f"{command.words[0]}: {error.strerror}") from None

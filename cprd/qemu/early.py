"""The first half of a start: all that is looked at before the QEMU is executed.

The guest waits, and to import the client takes longer than cprd's answer: so the load is sent ahead
(client/ahead.py), and the QEMU executed as soon as nothing in the state speaks against that. The
helper (restore.py) imports while the QEMU begins. Whatever is not as usual is left to the helper,
which asks cprd the same and says why.
"""

from __future__ import annotations

import os

from cprd.errors import CprdError, Damaged
from cprd.linux.pause import point
from cprd.qemu import spawn
from cprd.qemu.command import Command, missing
from cprd.qemu.errors import Refused
from cprd.qemu.hold import GARBLED, Held, Origin, garbled, is_unfinished
from cprd.qemu.private import PrivateDirectory, beside
from cprd.qemu.process import Process
from cprd.qemu.sockets import refuse_taken

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from cprd.client.ahead import Ahead
    from cprd.qemu.start import Order, Overrides
    from cprd.state import State

_ANSWERS = 0.25  # s for cprd, which answers within a few ms unless busy


def execute(plumbing: spawn.Plumbing, ahead: Ahead, order: Order) -> PrivateDirectory | None:
    """Have the QEMU executed, for the state that cprd gives. Returns the directory in which the
    QEMU is to listen, the caller's; None when nothing was executed."""
    try:
        bundle = ahead.bundle(_ANSWERS)
        if bundle < 0:
            return None
        from cprd.bundle.unpack import unpack

        try:
            state = unpack(bundle)
        finally:
            os.close(bundle)
        try:
            if unservable(state):
                return None
            command = Command(order.words)
            refuse_by_words(Held(state), command, order.overrides)
        finally:
            state.close()
        refuse_taken(command)
        return go(plumbing, command)
    except (CprdError, OSError, ValueError):
        return None  # said later


def go(plumbing: spawn.Plumbing, command: Command) -> PrivateDirectory:
    """Have the QEMU executed. Returns the directory in which the QEMU is to listen, the caller's.
    Raises Refused, LimitExceeded: nothing was executed."""
    directory = PrivateDirectory(beside(command))
    path = directory.at("cpr")
    plumbing.guard.arm()
    spawn.say(plumbing.talk, "go", path)
    point("qemu-start:go")
    return directory


def unservable(state: State) -> str:
    """Why a claimed state has to be settled first; "" when it need not."""
    if is_unfinished(state):
        return "its QEMU ended before its state was whole"
    try:
        origin = Origin.read(state["qemu"])
    except (KeyError, Damaged):
        return ""  # said later
    if Process.lives(origin.old) or Process.lives(origin.new):
        return "the QEMU that it was saved from has not ended yet"
    return ""


def refuse_by_words(held: Held, command: Command, overrides: Overrides) -> None:
    """Raises Refused, before anything is started, when COMMAND lacks what was plugged, or would
    give the state to another user; Damaged for a garbled section."""
    if command.changes_user():
        raise Refused(command.changes_user())
    if overrides.machine:
        return
    try:
        lacking = missing(held.machine, command)
    except GARBLED as error:
        raise garbled(error) from None
    if lacking:
        raise Refused(lacking)

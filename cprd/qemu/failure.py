"""How a hand-over of a guest can fail, and where the guest is then."""

from __future__ import annotations

from cprd.errors import Busy, CprdError, NotHeld


class Refused(CprdError):
    """Nothing was begun: the guest is as it was. The message says what to change."""


class Nobody(Refused):
    """No process listens at the path of a monitor."""


class Failed(CprdError):
    """It was begun and taken back; the message says where the guest is."""


class InDoubt(Busy):
    """Nobody can say whether the state was acted on; it is kept, and served only by force."""


class NeverWhole(NotHeld):
    """What was left was not yet a guest's state, and all that had the guest has ended."""


class MonitorBusy(Busy):
    """No greeting in time: a monitor serves one client at a time, and somebody else is that one."""


class MonitorRefused(CprdError):
    """QEMU answered a command with an error: it was not done."""


class MonitorLost(CprdError):
    """No answer: the command may have been done or not."""


class MonitorSpokeFirst(MonitorLost):
    """An event came where the answer to qmp_capabilities belongs: QEMU sends them as soon as it has
    read that, and qemu.qmp takes it for a failure. Nothing was asked yet."""


class MonitorGone(MonitorLost):
    """The connection had ended before the command was sent: it was not done."""

"""How a hand-over of a guest fails, and where the guest is then."""

from __future__ import annotations

from cprd.errors import CODES, Busy, CprdError, NotHeld


class Refused(CprdError):
    """Nothing was begun: the guest is as before. The message says what to change."""


class NoListener(Refused):
    """No process listens at the path of a monitor."""


class OtherOwner(Refused):
    """The QEMU is of another uid than the command was given for. `uid`: of the QEMU."""

    def __init__(self, text: str, uid: int = -1) -> None:
        super().__init__(text)
        self.uid = uid


class ChangedUser(Refused):
    """The QEMU runs as another uid than the uid that made its monitor."""


class Failed(CprdError):
    """A step was begun and taken back. The message says where the guest is."""


class DaemonAway(Failed):
    """The hand-over was taken back because cprd was away. Cprd answers again, and holds nothing of
    this hand-over: try again."""


class GuestEnded(CprdError):
    """The state was acted on, the hold has ended, and so has the guest."""


class InDoubt(Busy):
    """Nobody knows whether the state was acted on. Cprd keeps the state and serves a load only by
    force."""


class Incomplete(NotHeld):
    """The held state never became whole, and every QEMU with the guest has ended."""


class MonitorBusy(Busy):
    """No greeting in time: a monitor serves a single client, and another client is connected."""


class MonitorRefused(CprdError):
    """QEMU answered a command with an error: QEMU did nothing."""


class MonitorLost(CprdError):
    """QEMU did not answer: QEMU may have done the command or not."""


class MonitorGone(MonitorLost):
    """The connection had ended before the command was sent: QEMU did nothing."""


def one_line(error: BaseException) -> str:
    """The message of an error on a single line; the name of the class for an empty message."""
    return " ".join(str(error).split()) or type(error).__name__


def code(error: BaseException) -> str:
    """The name in cprd.errors.CODES that comes closest to an error, for another process."""
    return next((kind.__name__ for kind in type(error).__mro__ if kind.__name__ in CODES), "")

"""The guest runs, and cprd has to hear that: what cprd has of the guest must never be served again.

Until cprd knows, the state is prepared or in doubt, which nobody serves; so cprd may be away for a
while, and the guest does not wait.
"""

from __future__ import annotations

from cprd.errors import CprdError, Timeout, Unavailable
from cprd.qemu import signals
from cprd.qemu.errors import InDoubt
from cprd.qemu.signals import Deadline

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from collections.abc import Callable

AWAY = 60.0  # s that cprd may be away
_AGAIN = 0.2  # s between two tries


def tell(request: Callable[[], object], *, gone: tuple[type[CprdError], ...] = ()) -> None:
    """Make a request of cprd, again and again while cprd is away. `gone`: the answers by which cprd
    has nothing of the guest any more. Blocks for a minute at most, or until a signal comes. Raises
    InDoubt."""
    deadline = Deadline(AWAY)
    while True:
        try:
            request()
            return
        except gone:
            return
        except (Unavailable, Timeout) as error:
            if deadline.has_passed() or signals.came():
                raise InDoubt(
                    f"the guest runs, and cprd could not be told ({error}): the hold stays in doubt"
                    " until this QEMU is saved; drop it by force if you like"
                ) from None
        except CprdError as error:
            raise InDoubt(f"the guest runs, and cprd says: {error}") from None
        signals.sleep(_AGAIN)

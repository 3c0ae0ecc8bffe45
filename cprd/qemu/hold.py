"""A VM in a State: its descriptors under QEMU's own keys, and three sections. No I/O.

- "cpr": the CPR stream, byte for byte; its dummy bytes stand for the descriptors, in their order;
- "main": the migration stream, byte for byte (what `upgrade` leaves has it as a descriptor instead,
  under MAIN_KEY: a memfd that was prepared empty, and is whole once sealed);
- "qemu": a small map, inline, so that `cprctl show` reads the map without a claim;
- "machine": the machine that the guest sees (machine.py), which the next QEMU is compared with. A
  hold of an older cprctl has none.
"""

from __future__ import annotations

import fcntl

from cprd.errors import Damaged, InvalidInput
from cprd.linux.memfd import check_seals
from cprd.state import MemfdSection, State

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from cprd.cpr import CprState

# cprd.cpr is imported late everywhere: a start needs the origin first, and the guest waits.

FORMAT = 1
MAIN_KEY = "cprd:main"
"""The key of a main stream that is a descriptor: no id in QEMU has a colon."""
LIVE = ("running", "suspended")
"""Run states in which a guest goes on by itself: `cont` brings both back."""
KEPT = (*LIVE, "paused", "io-error", "prelaunch", "watchdog")
"""Run states that are worth keeping, and in which QEMU can migrate."""


GARBLED = (LookupError, TypeError, ValueError, AttributeError, RecursionError)
"""What a reader of a section raises when the saver wrote something of another form."""


def garbled(error: Exception) -> Damaged:
    """The error to raise for one of GARBLED from the section "machine"."""
    return Damaged(
        f"what it says of its machine is garbled ({error!r}): --other-images --force-machine"
        " would start the guest in COMMAND's machine all the same"
    )


class Origin:
    """The section "qemu": the origin of the state, and the run state of the guest.

    `old` and `new` are records of processes (pid and start time). Only an upgrade has `new`, and
    `untouched`: the path of a file that is removed before the new QEMU may run. As long as the file
    exists, the new QEMU has not run. `drives` (disks.py): None in a hold of an older cprctl;
    `boot`: the id of the kernel's boot."""

    __slots__ = (
        *("version", "qmp", "status", "machine", "uid"),
        *("old", "new", "untouched", "boot", "drives"),
    )

    def __init__(
        self,
        *,
        version: Sequence[int],
        qmp: str,
        status: str,
        machine: str,
        uid: int = -1,
        old: dict[str, int] | None,
        new: dict[str, int] | None = None,
        untouched: str = "",
        boot: str = "",
        drives: list[dict[str, Any]] | None = None,
    ) -> None:
        self.version = tuple(version)
        self.qmp = qmp
        self.status = status
        self.machine = machine
        self.uid = uid
        self.old = old
        self.new = new
        self.untouched = untouched
        self.boot = boot
        self.drives = drives

    def section(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {"format": FORMAT, **fields, "version": ".".join(map(str, self.version))}

    @classmethod
    def read(cls, value: Any) -> Origin:
        """From the section. Raises Damaged for an unknown format."""
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise Damaged(
                'its section "qemu" is none of this version: it was not saved by `cprctl qemu`, or'
                " by a newer one"
            )
        try:
            return cls(
                version=tuple(int(part) for part in str(value["version"]).split(".")),
                qmp=str(value["qmp"]),
                status=str(value["status"]),
                machine=str(value["machine"]),
                old=value["old"],
                new=value.get("new"),
                uid=int(value["uid"]),
                untouched=str(value.get("untouched", "")),
                boot=str(value.get("boot", "")),
                drives=value.get("drives"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise Damaged(f'its section "qemu" lacks or garbles {error}') from None


def pack(
    cpr_data: bytes,
    fds: Sequence[int],
    main: bytes | bytearray | int,
    origin: Origin,
    machine: dict[str, Any] | None = None,
) -> State:
    """A State of one VM. `fds` stay the caller's, and open until the save returns; so does a `main`
    that is a descriptor: a memfd, still to be filled and sealed."""
    from cprd.cpr import parse

    state = State()
    for element in parse(cpr_data, fds).fds:
        state.save_fd(element.name, element.id, element.fd)
    if isinstance(main, int):
        state.save_fd(MAIN_KEY, 0, main)
    else:
        state["main"] = main
    state["cpr"] = bytes(cpr_data)
    state["qemu"] = origin.section()
    if machine is not None:
        state["machine"] = machine
    return state


UNFINISHED = "its QEMU ended before its state was whole, and the guest with it: it has to boot anew"


def is_unfinished(state: State) -> bool:
    """Whether an upgrade was killed while it still filled the main stream of this state."""
    main_fd = state.find_fd(MAIN_KEY, 0)
    try:
        return main_fd >= 0 and not fcntl.fcntl(main_fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SEAL
    except OSError:
        return False  # no memfd: said by Held


class Held:
    """A VM in a State, which owns the descriptors. The streams (`cpr`, `main`) come by `read`."""

    __slots__ = ("_section", "_state", "cpr", "machine", "main", "origin")

    def __init__(self, state: State) -> None:
        """Raises Damaged when a part is missing."""
        main_fd = state.find_fd(MAIN_KEY, 0)
        for key in ("cpr", "qemu", *(("main",) if main_fd < 0 else ())):
            if key not in state:
                raise Damaged(f"there is no section {key!r}: no QEMU was saved under this name")
            if key != "qemu" and not isinstance(state[key], bytes | memoryview):
                raise Damaged(f"its section {key!r} is no stream")
        self.origin = Origin.read(state["qemu"])
        self.machine: dict[str, Any] = state.get("machine", {})
        if not isinstance(self.machine, dict):
            raise Damaged('its section "machine" is no map')
        self.cpr: CprState
        self.main: memoryview
        self._state = state
        self._section: MemfdSection | None = None  # the map of `main`, while this lives

    def read(self) -> None:
        """Raises Damaged when a stream is not whole, or does not fit the descriptors."""
        from cprd.cpr import VMStateError, parse
        from cprd.qemu.stream import is_whole, machine, run_state

        state = self._state
        main_fd = state.find_fd(MAIN_KEY, 0)
        if main_fd < 0:
            self.main = state["main"]
        else:
            try:
                check_seals(MAIN_KEY, main_fd)
            except InvalidInput:
                raise Damaged(UNFINISHED) from None
            self._section = MemfdSection(main_fd, packed=False, owned=False)
            self.main = self._section.view()
        keys = [key for key in state.fds() if key[:2] != (MAIN_KEY, 0)]
        try:
            self.cpr = parse(state["cpr"], [fd for _, _, fd in keys])
        except VMStateError as error:
            raise Damaged(f"its CPR stream is damaged: {error}") from None
        named = [(element.name, element.id, element.fd) for element in self.cpr.fds]
        if named != keys:
            raise Damaged("its CPR stream names other descriptors than those that are held")
        machine(self.main)
        if not is_whole(self.main):
            raise Damaged("its main stream ends too early: a QEMU would wait for the rest")
        # By the stream's own word; what was seen before may not have been so any more.
        self.origin.status = run_state(self.main) or self.origin.status

    def pieces(self) -> list[tuple[bytes, int]]:
        """The CPR stream for any QEMU: (bytes, -1), or a dummy byte with its descriptor, which
        stays here."""
        return pieces(self.cpr)


def pieces(state: CprState) -> list[tuple[bytes, int]]:
    """The CPR stream of a state in the form that every version takes. QEMU before 10.2 refuses even
    an empty vfio subsection, and a newer QEMU does without. A state with vfio devices keeps the
    subsection, and an older QEMU refuses the state."""
    from cprd.cpr import downgrade, encode

    plain = state if state.vfio_devices else downgrade(state)
    return list(encode(plain).pieces())

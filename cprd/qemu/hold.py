"""How a VM lies in a State: its descriptors under QEMU's own keys, and three sections. No I/O.

- "cpr": the CPR stream, byte for byte; its dummy bytes stand for the descriptors, in their order;
- "main": the migration stream, byte for byte (what `upgrade` leaves has it as a descriptor instead,
  under FILM: a memfd that was prepared empty, and is whole once it is sealed);
- "qemu": a small map, inline, so that `cprctl show` reads it without a claim.
"""

from __future__ import annotations

import fcntl
from typing import TYPE_CHECKING, Any

from cprd import cpr
from cprd.errors import Damaged, InvalidInput
from cprd.linux.memfd import check_seals
from cprd.qemu.stream import is_whole, machine, run_state
from cprd.state import MemfdSection, State

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cprd.vmstate.stream import Stream

FORMAT = 1
FILM = "cprd:main"
"""The key of a main stream that is a descriptor: no id in QEMU can be this."""
LIVE = ("running", "suspended")
"""Run states in which a guest goes on by itself: `cont` brings both back."""


class Origin:
    """The section "qemu": where the state came from, and what the guest was doing.

    `old` and `new` are records of processes (pid and start time); `new` is there for an upgrade,
    and so is `untouched`, a file that goes before the new QEMU may run: without it nobody can say
    that it has not."""

    __slots__ = ("machine", "new", "old", "qmp", "status", "uid", "untouched", "version")

    def __init__(
        self,
        *,
        version: Sequence[int],
        qmp: str,
        status: str,
        machine: str,
        old: dict[str, int] | None,
        new: dict[str, int] | None = None,
        uid: int = -1,
        untouched: str = "",
    ) -> None:
        self.version = tuple(version)
        self.qmp = qmp
        self.status = status
        self.machine = machine
        self.old = old
        self.new = new
        self.uid = uid
        self.untouched = untouched

    def section(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": ".".join(map(str, self.version)),
            "qmp": self.qmp,
            "status": self.status,
            "machine": self.machine,
            "uid": self.uid,
            "old": self.old,
            "new": self.new,
            "untouched": self.untouched,
        }

    @classmethod
    def read(cls, value: Any) -> Origin:
        """From the section. Raises Damaged when it is none that we know."""
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
            )
        except (KeyError, TypeError, ValueError) as error:
            raise Damaged(f'its section "qemu" lacks or garbles {error}') from None


def pack(
    cpr_data: bytes,
    fds: Sequence[int],
    main: bytes | bytearray | int,
    origin: Origin,
) -> State:
    """A State of one VM. `fds` stay the caller's, who keeps them open until the save returns; so
    does `main` when it is a descriptor: a memfd that is still to be filled and sealed."""
    state = State()
    for element in cpr.parse(cpr_data, fds).fds:
        state.save_fd(element.name, element.id, element.fd)
    if isinstance(main, int):
        state.save_fd(FILM, 0, main)
    else:
        state["main"] = main
    state["cpr"] = bytes(cpr_data)
    state["qemu"] = origin.section()
    return state


UNFINISHED = "its QEMU ended before its state was whole, and the guest with it: it has to boot anew"


def is_unfinished(state: State) -> bool:
    """Whether it is what an upgrade was still filling when it was killed."""
    film = state.find_fd(FILM, 0)
    try:
        return film >= 0 and not fcntl.fcntl(film, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SEAL
    except OSError:
        return False  # no memfd: said by Held


class Held:
    """A VM as it was found in a State, which owns the descriptors."""

    __slots__ = ("_film", "cpr", "main", "origin")

    def __init__(self, state: State) -> None:
        """Raises Damaged when a part is missing or does not fit the others."""
        film = state.find_fd(FILM, 0)
        for key in ("cpr", "qemu", *(("main",) if film < 0 else ())):
            if key not in state:
                raise Damaged(f"there is no section {key!r}: no QEMU was saved under this name")
        self.origin = Origin.read(state["qemu"])
        self._film: MemfdSection | None = None  # the map of it, while this lives
        if film < 0:
            self.main: memoryview = state["main"]
        else:
            try:
                check_seals(FILM, film)
            except InvalidInput:
                raise Damaged(UNFINISHED) from None
            self._film = MemfdSection(film, packed=False, owned=False)
            self.main = self._film.view()
        keys = [key for key in state.fds() if key[:2] != (FILM, 0)]
        try:
            self.cpr = cpr.parse(state["cpr"], [fd for _, _, fd in keys])
        except cpr.VMStateError as error:
            raise Damaged(f"its CPR stream is damaged: {error}") from None
        named = [(element.name, element.id, element.fd) for element in self.cpr.fds]
        if named != keys:
            raise Damaged("its CPR stream names other descriptors than those that are held")
        machine(self.main)
        if not is_whole(self.main):
            raise Damaged("its main stream ends too early: a QEMU would wait for the rest")
        # By the stream's own word; what was seen before may not have been so any more.
        self.origin.status = run_state(self.main) or self.origin.status

    def stream(self, version: tuple[int, ...]) -> Stream:
        """The CPR stream for a QEMU of that version. Raises VMStateError when it cannot be: QEMU
        before 10.2 knows no vfio subsection, and refuses even an empty one."""
        state = cpr.downgrade(self.cpr) if version < (10, 2) else self.cpr
        return cpr.encode(state)

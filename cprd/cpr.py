"""QEMU's CPR state, byte for byte: the descriptors a process leaves to its successor, by name.

The stream (magic "QCPR", version 1, then the vmstate `CprState`) has no length and no trailer. A
stream is whole when three things hold: the stream parses, ends exactly there, and had as many
descriptors as elements. QEMU checks none of the three fully; `parse` checks all.

Three forms are in use, by what follows the list of descriptors:

- PLAIN: nothing (QEMU 10.0; later versions load this form, too);
- VFIO: the subsection "CprState/vfio devices", also without devices (QEMU 10.2 and later);
- STUB: the header of that subsection without a list (a QEMU built without iommufd).

So a VFIO stream cut exactly before the subsection reads as PLAIN, cut exactly after the header of
the subsection as STUB. No receiver can tell; a QEMU writes all of that at once.

The lower half of this file is QEMU's include/migration/cpr.h for the process's own state.
"""

from __future__ import annotations

from struct import Struct

from cprd.errors import InvalidInput
from cprd.linux.rights import close_all
from cprd.vmstate.channel import Channel, Tape, as_channel, drain
from cprd.vmstate.description import VMStateDescription, decode
from cprd.vmstate.description import encode as encode_vmstate
from cprd.vmstate.fields import fd as fd_field
from cprd.vmstate.fields import int32, qlist, string, uint32
from cprd.vmstate.stream import Stream, Truncated, VMStateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator, Sequence
    from typing import Literal

    from cprd.state import HasFileno

    Form = Literal["plain", "vfio", "stub"]

__all__ = [
    "MAGIC",
    "MAX_NAME",
    "PLAIN",
    "STUB",
    "VERSION",
    "VFIO",
    "CprFd",
    "CprState",
    "CprVfioDevice",
    "Truncated",
    "VMStateError",
    "clear",
    "delete_fd",
    "downgrade",
    "encode",
    "fds",
    "find_fd",
    "parse",
    "receive",
    "save_fd",
    "state_close",
    "state_form",
    "state_ioc",
    "state_load",
    "state_save",
    "vfio_devices",
]

MAGIC = 0x51435052
VERSION = 1
_HEADER = Struct(">II")

PLAIN: Form = "plain"
VFIO: Form = "vfio"
STUB: Form = "stub"

MAX_NAME = 255
"""Bytes of a name without the NUL: QEMU's own limit for a RAM block, and cprd's for a key."""
MAX_ELEMENTS = 1 << 16


class CprFd:
    """One element: the key (name, id), and the descriptor, a number owned by somebody else."""

    __slots__ = ("fd", "id", "name")

    def __init__(self, name: str = "", id: int = 0, fd: int = -1) -> None:
        self.name = name
        self.id = id
        self.fd = fd

    def __repr__(self) -> str:
        return f"CprFd({self.name!r}, {self.id}, fd={self.fd})"


class CprVfioDevice:
    """A vfio device with an iommufd backend, beside the descriptors."""

    __slots__ = ("devid", "hwpt_id", "ioas_id", "name")

    def __init__(self, name: str = "", devid: int = 0, ioas_id: int = 0, hwpt_id: int = 0) -> None:
        self.name = name
        self.devid = devid
        self.ioas_id = ioas_id
        self.hwpt_id = hwpt_id

    def __repr__(self) -> str:
        return f"CprVfioDevice({self.name!r}, {self.devid}, {self.ioas_id}, {self.hwpt_id})"


class CprState:
    """The content of a stream, in order. Owns no descriptor."""

    __slots__ = ("fds", "form", "vfio_devices")

    def __init__(
        self,
        fds: Sequence[CprFd] = (),
        vfio_devices: Sequence[CprVfioDevice] = (),
        form: Form = PLAIN,
    ) -> None:
        self.fds = list(fds)
        self.vfio_devices = list(vfio_devices)
        self.form: Form = form

    def __repr__(self) -> str:
        return f"CprState({self.fds!r}, {self.vfio_devices!r}, form={self.form!r})"


# The description: QEMU's migration/cpr.c and hw/vfio/cpr-iommufd.c


def _fd_loaded(element: CprFd, version: int) -> None:
    if not element.name:
        raise VMStateError("is empty", path=".name")


def _state_loaded(state: CprState, version: int) -> None:
    seen = set()
    for at, element in enumerate(state.fds):
        key = (element.name, element.id)
        if key in seen:
            raise VMStateError(
                f"the key {element.name!r}, {element.id} was there before", path=f".fds[{at}]"
            )
        seen.add(key)


def _set_form(form: Form) -> Callable[[CprState, int], None]:
    def loaded(state: CprState, version: int) -> None:
        state.form = form

    return loaded


def _check_state(state: CprState) -> None:
    for at, element in enumerate(state.fds):
        if not element.name:
            raise VMStateError("is empty", path=f".fds[{at}].name")
    _state_loaded(state, VERSION)
    if state.vfio_devices and state.form != VFIO:
        raise VMStateError(
            f"has {len(state.vfio_devices)} devices, which the form {state.form!r} cannot carry: "
            "the state can only be loaded by a QEMU that knows them (10.2 or later, with iommufd)",
            path="/vfio devices.vfio_devices",
        )


VMSTATE_CPR_FD = VMStateDescription(
    "cpr fd",
    1,
    1,
    fields=[
        uint32("namelen", length_of="name"),
        string("name", length="namelen", limit=MAX_NAME + 1),
        int32("id"),
        fd_field("fd"),
    ],
    post_load=_fd_loaded,
)

VMSTATE_VFIO_DEVICE = VMStateDescription(
    "cpr vfio device",
    1,
    1,
    fields=[
        uint32("namelen", length_of="name"),
        string("name", length="namelen", limit=MAX_NAME + 1),
        int32("devid"),
        uint32("ioas_id"),
        uint32("hwpt_id"),
    ],
)

VMSTATE_VFIO_DEVICES = VMStateDescription(
    "CprState/vfio devices",
    1,
    1,
    fields=[
        qlist("vfio_devices", VMSTATE_VFIO_DEVICE, CprVfioDevice, version_id=1, limit=MAX_ELEMENTS)
    ],
    needed=lambda state: state.form == VFIO,
    post_load=_set_form(VFIO),
)

VMSTATE_VFIO_STUB = VMStateDescription(
    "CprState/vfio devices",
    1,
    1,
    needed=lambda state: state.form == STUB,
    post_load=_set_form(STUB),
)


def _cpr_state(subsection: VMStateDescription) -> VMStateDescription:
    return VMStateDescription(
        "CprState",
        1,
        1,
        fields=[qlist("fds", VMSTATE_CPR_FD, CprFd, version_id=1, limit=MAX_ELEMENTS)],
        subsections=[subsection],
        pre_save=_check_state,
        post_load=_state_loaded,
    )


VMSTATE_CPR_STATE = _cpr_state(VMSTATE_VFIO_DEVICES)
VMSTATE_CPR_STATE_STUB = _cpr_state(VMSTATE_VFIO_STUB)

# A stub's stream ends in the subsection's version, 00000001; the other forms end in a list's 00.
_STUB_TAIL = b"\x05\x15CprState/vfio devices" + Struct(">I").pack(1)


def encode(state: CprState, form: Form | None = None) -> Stream:
    """The stream of `state`, in the form of the state or in `form`. Descriptors stay borrowed.
    Pure. Raises VMStateError when the form cannot carry the state: vfio devices need VFIO."""
    chosen = state.form if form is None else form
    if chosen not in (PLAIN, VFIO, STUB):
        raise InvalidInput(f"form: {chosen!r} is none of {PLAIN!r}, {VFIO!r}, {STUB!r}")
    shaped = CprState(state.fds, state.vfio_devices, chosen)
    vmsd = VMSTATE_CPR_STATE_STUB if chosen == STUB else VMSTATE_CPR_STATE
    body = encode_vmstate(vmsd, shaped)
    return Stream(
        _HEADER.pack(MAGIC, VERSION) + body.data,
        [(offset + _HEADER.size, number) for offset, number in body.marks],
    )


def parse(
    data: bytes | bytearray | memoryview, fds: Sequence[int], offsets: Sequence[int] | None = None
) -> CprState:
    """The state in a whole stream, received with the descriptors `fds`. Pure.

    Descriptors are only numbers here, and stay the caller's; `range(n)` checks a stream of n
    descriptors. `offsets` (of a tape) says where each arrived. Raises Truncated when the sender
    died on the way, VMStateError for everything else."""
    data = bytes(data)
    header = data[: _HEADER.size]
    if len(header) < _HEADER.size:
        raise Truncated("ends before it is whole", path="the header", offset=len(header))
    magic, version = _HEADER.unpack(header)
    if magic != MAGIC:
        raise VMStateError(f"0x{magic:08x} is not 0x{MAGIC:08x}", path="the magic", offset=0)
    if version != VERSION:
        raise VMStateError(f"{version}, and only {VERSION} is known", path="the version", offset=4)
    vmsd = VMSTATE_CPR_STATE_STUB if data.endswith(_STUB_TAIL) else VMSTATE_CPR_STATE
    state = CprState()
    try:
        decode(
            vmsd,
            data[_HEADER.size :],
            fds,
            offsets=None if offsets is None else [at - _HEADER.size for at in offsets],
            into=state,
        )
    except VMStateError as exc:
        if exc.offset >= 0:
            exc.offset += _HEADER.size
        raise
    return state


def receive(channel: Channel) -> tuple[Tape, CprState]:
    """Read the channel to the end in any case, then parse. The tape, the caller's, has the bytes
    and owns the descriptors of the state. After an error all are closed."""
    tape = drain(channel)
    try:
        return tape, parse(tape.data, tape.fds, tape.offsets)
    except BaseException:
        tape.close()
        raise


def downgrade(state: CprState) -> CprState:
    """The same state for a QEMU 10.0, which refuses a stream with a subsection. Raises VMStateError
    for a state with vfio devices, which would be lost."""
    plain = CprState(state.fds, state.vfio_devices, PLAIN)
    try:
        _check_state(plain)
    except VMStateError as exc:
        exc.inside("CprState")
        raise
    return plain


# The process's own state: QEMU's include/migration/cpr.h


class _Own:
    """The table of this process. Owns loaded descriptors until somebody finds each."""

    def __init__(self) -> None:
        self.fds: dict[tuple[str, int], int] = {}
        self.vfio_devices: list[CprVfioDevice] = []
        self.form: Form = PLAIN
        self.alive: dict[tuple[str, int], object] = {}  # objects whose descriptor is borrowed
        self.unfound: set[tuple[str, int]] = set()  # loaded, and nobody's but ours
        self.channel: Channel | None = None

    def forget(self) -> None:
        close_all(self.fds[key] for key in self.unfound)
        self.fds = {}
        self.vfio_devices = []
        self.form = PLAIN
        self.alive.clear()
        self.unfound.clear()


_own = _Own()


def save_fd(name: str, id: int, fd: int | HasFileno) -> None:
    """Record a descriptor for the next state_save: borrowed, to be kept open until then. Of an
    object (anything with fileno()) a reference is kept.

    Raises InvalidInput for a key that is recorded already (delete_fd first), an empty name, a name
    with a NUL or above 255 bytes, an id beyond 32 bits, or no open descriptor."""
    number = fd if isinstance(fd, int) else fd.fileno()
    raw = name.encode("utf-8", "surrogateescape")
    if not 1 <= len(raw) <= MAX_NAME or b"\0" in raw:
        raise InvalidInput(f"name: {name!r} is not 1 to {MAX_NAME} bytes without a NUL")
    if not -(1 << 31) <= id < 1 << 31:
        raise InvalidInput(f"id: {id} does not fit 32 bits")
    if number < 0:
        raise InvalidInput(f"fd: {number} is no open descriptor")
    if (name, id) in _own.fds:
        raise InvalidInput(f"the key {name!r}, {id} is used already; delete_fd() it first")
    _own.fds[name, id] = number
    if not isinstance(fd, int):
        _own.alive[name, id] = fd


def delete_fd(name: str, id: int) -> None:
    """Forget a key; an unknown key is no error. Closes nothing but a loaded descriptor that nobody
    has found yet, and so has no other owner."""
    number = _own.fds.pop((name, id), None)
    _own.alive.pop((name, id), None)
    if number is not None and (name, id) in _own.unfound:
        _own.unfound.remove((name, id))
        close_all([number])


def find_fd(name: str, id: int) -> int:
    """The recorded descriptor, or -1. A loaded descriptor is the caller's from the first find on;
    the record stays, for the next state_save, until delete_fd (before the close!)."""
    _own.unfound.discard((name, id))
    return _own.fds.get((name, id), -1)


def fds() -> Iterator[tuple[str, int, int]]:
    """All records as (name, id, descriptor), in order. Changes no ownership."""
    return iter([(name, id, number) for (name, id), number in _own.fds.items()])


def vfio_devices() -> list[CprVfioDevice]:
    """The vfio devices of the process's own state, to read and to change in place."""
    return _own.vfio_devices


def state_form() -> Form:
    """The form that state_load met; PLAIN before. The next state_save uses it."""
    return _own.form


def state_save(channel: Channel | socket.socket | int, form: Form | None = None) -> None:
    """Send the process's state and half-close, as QEMU does: by that the receiver knows the end.

    `channel`: a Channel, a connected UNIX stream socket, or the number of a socket (duplicated).
    Kept for state_ioc() until state_close(), which closes the channel; after an error the caller's.
    A receiver that has everything hangs up, which state_ioc() shows as the end of the stream."""
    records = [CprFd(name, id, number) for (name, id), number in _own.fds.items()]
    stream = encode(CprState(records, _own.vfio_devices, _own.form), form)
    _talk(channel, lambda line: _send(line, stream))


def state_load(channel: Channel | socket.socket | int) -> None:
    """Receive a state up to the end and make the state the process's own; earlier records are
    forgotten. Nothing changes unless the whole state is good; otherwise all that came is closed.

    The channel is kept as by state_save: state_close tells the sender that the state has been
    loaded. Raises Truncated, VMStateError, LimitExceeded, Timeout, Unavailable."""
    _talk(channel, _load)


def state_ioc() -> Channel | None:
    """The channel of the last state_save or state_load; None before, and after state_close."""
    return _own.channel


def state_close() -> None:
    """Close the channel: for the other side, the sign that we are done. Safe to repeat."""
    line, _own.channel = _own.channel, None
    if line is not None:
        line.close()


def clear() -> None:
    """Forget all records, and close what was loaded and never found. For tests: a QEMU exits."""
    _own.forget()


def _send(line: Channel, stream: Stream) -> None:
    line.send_stream(stream)
    line.finish()


def _load(line: Channel) -> None:
    tape, state = receive(line)
    _own.forget()
    _own.fds = {(element.name, element.id): element.fd for element in state.fds}
    _own.vfio_devices = state.vfio_devices
    _own.form = state.form
    _own.unfound = set(_own.fds)
    tape.take_fds()


def _talk(channel: Channel | socket.socket | int, do: Callable[[Channel], None]) -> None:
    line = as_channel(channel)
    try:
        do(line)
    except BaseException:
        if isinstance(channel, int):
            line.close()
        raise
    if _own.channel is not line:
        state_close()
    _own.channel = line

"""Describe a state once, beside the objects with the state; encode and decode as QEMU does.

A description lists fields. A field names an attribute of a plain Python object and has a *kind*,
which knows the big-endian form. The rules are QEMU's, migration/vmstate.c (docs/devel/migration):

- a stream newer than `version_id` or older than `minimum_version_id` is refused; the default of the
  latter is 0, as in C: every older stream is understood;
- a field is in the stream when the field's `version_id` is not newer than the stream's; with
  `exists(obj, version)`, when that says so and for no other reason;
- subsections follow the fields: 0x05, u8 length, name (beginning with the parent's name), u32
  version. A subsection is written when `needed(obj)`, and found by name. An unknown name that
  begins with the parent's is refused; anything else ends the list;
- no length, type or checksum of the whole is in the stream. Subsections are looked for after every
  description: a load is complete with a further byte, or with the end of the stream.

Stricter than QEMU where only damage explains a value: booleans and list markers are 0 or 1, a dummy
byte is a space, a subsection comes once, and lengths have limits.
"""

from __future__ import annotations

from struct import Struct as Layout
from types import SimpleNamespace

from cprd.errors import InvalidInput
from cprd.vmstate.stream import Sink, Source, Stream, Truncated, VMStateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

SUBSECTION = 0x05

_U32 = Layout(">I")


class Kind:
    """The form of a value in the stream."""

    def put(self, out: Sink, value: Any) -> None:
        raise NotImplementedError

    def get(self, src: Source, length: int, current: Any) -> Any:
        """Read a value. `length`: by the length field, -1 without such a field. `current`: the
        value of the attribute, for kinds that load into an object."""
        raise NotImplementedError

    def length(self, value: Any) -> int:
        """The length of a value, for a length field."""
        raise VMStateError("has no length that another field could carry")

    blank: Any = None
    """The value of the attribute after a load that failed with descriptors received."""
    carries_fds = False
    anonymous = False  # has no attribute


class Field:
    """A field: the attribute `name`, present in streams of version `version_id` or newer, or as
    `exists(obj, version)` says. `length_of` and `length` tie a buffer to the integer with the
    length of the buffer. Made by the functions of fields.py."""

    __slots__ = ("exists", "kind", "length", "length_of", "name", "version_id")

    def __init__(
        self,
        name: str,
        kind: Kind,
        version_id: int = 0,
        exists: Callable[[Any, int], bool] | None = None,
        *,
        length: str = "",
        length_of: str = "",
    ) -> None:
        self.name = name
        self.kind = kind
        self.version_id = version_id
        self.exists = exists
        self.length = length
        self.length_of = length_of

    def present(self, obj: Any, version: int) -> bool:
        if self.exists is not None:
            return bool(self.exists(obj, version))
        return self.version_id <= version


class VMStateDescription:
    """The parts of a state.

    `pre_save(obj)` runs before the fields are read, `post_load(obj, version)` after the fields and
    subsections are loaded; a ValueError of either refuses the state. `post_load` borrows
    descriptors: the object owns descriptors once the whole load has returned. The description of a
    subsection has `needed`, and "PARENT/" in front of the name."""

    def __init__(
        self,
        name: str,
        version_id: int = 1,
        minimum_version_id: int = 0,
        *,
        fields: Sequence[Field] = (),
        subsections: Sequence[VMStateDescription] = (),
        needed: Callable[[Any], bool] | None = None,
        pre_save: Callable[[Any], None] | None = None,
        post_load: Callable[[Any, int], None] | None = None,
    ) -> None:
        self.name = name
        self.version_id = version_id
        self.minimum_version_id = minimum_version_id
        self.fields = tuple(fields)
        self.subsections = tuple(subsections)
        self.needed = needed
        self.pre_save = pre_save
        self.post_load = post_load
        self._check()

    def _check(self) -> None:
        if not 0 <= self.minimum_version_id <= self.version_id < 1 << 31:
            raise InvalidInput(
                f"{self.name}: versions {self.minimum_version_id} to {self.version_id} are no range"
            )
        lengths: dict[str, str] = {}
        for field in self.fields:
            if field.length_of:
                lengths[field.name] = field.length_of
            if field.length and lengths.get(field.length) != field.name:
                raise InvalidInput(
                    f"{self.name}.{field.name}: its length field {field.length!r} must come before "
                    f"it, with length_of={field.name!r}"
                )
        names = {field.name: field for field in self.fields}
        for counter, target in lengths.items():
            if target not in names or names[target].length != counter:
                raise InvalidInput(
                    f"{self.name}.{counter}: no field {target!r} has length={counter!r}"
                )
        seen = set()
        for sub in self.subsections:
            name = sub.name.encode()
            if not sub.name.startswith(self.name + "/") or len(name) > 255 or name in seen:
                raise InvalidInput(
                    f"{self.name}: the name of subsection {sub.name!r} must begin with "
                    f"{self.name + '/'!r}, have no more than 255 bytes and be used once"
                )
            seen.add(name)


# Encoding and decoding


def encode(vmsd: VMStateDescription, obj: Any, version: int | None = None) -> Stream:
    """The stream of `obj`, in the form of an older `version` when asked. Descriptors are borrowed:
    keep `obj` until the stream has been sent. Raises VMStateError for a value that does not fit."""
    out = Sink()
    try:
        put(out, vmsd, obj, vmsd.version_id if version is None else version)
    except VMStateError as exc:
        exc.inside(vmsd.name)
        raise
    return out.stream()


def decode(
    vmsd: VMStateDescription,
    data: bytes | bytearray | memoryview,
    fds: Sequence[int] = (),
    *,
    offsets: Sequence[int] | None = None,
    version: int | None = None,
    into: Any = None,
) -> Any:
    """Load a whole stream from memory, which must end with the state and have a place for each
    descriptor. Returns `into`, or a new SimpleNamespace.

    `fds` are only numbers here, and stay the caller's; `offsets` says where each arrived (default:
    before the first byte). Raises VMStateError; Truncated for an early end."""
    src = Source(data, fds, offsets)
    obj = SimpleNamespace() if into is None else into
    try:
        get(src, vmsd, obj, vmsd.version_id if version is None else version)
        _refuse_half_a_subsection(src, vmsd)
        src.finish()
    except VMStateError as exc:
        place(exc, vmsd, src)
        raise
    return obj


def place(exc: VMStateError, vmsd: VMStateDescription, src: Source) -> None:
    """Complete the path of an error, and the position: where reading has come to."""
    exc.inside(vmsd.name)
    if exc.offset < 0:
        exc.offset = src.offset


def put(out: Sink, vmsd: VMStateDescription, obj: Any, version: int) -> None:
    """Write the fields and subsections of a description; paths of errors are relative."""
    if vmsd.pre_save is not None:
        try:
            vmsd.pre_save(obj)
        except VMStateError:
            raise
        except ValueError as exc:
            raise VMStateError(f"pre_save refuses: {exc}") from exc
    by_name = {field.name: field for field in vmsd.fields}
    for field in vmsd.fields:
        if not field.present(obj, version):
            continue
        try:
            if field.length_of:
                target = by_name[field.length_of]
                field.kind.put(out, target.kind.length(_value(obj, target)))
            else:
                field.kind.put(out, _value(obj, field))
        except VMStateError as exc:
            exc.inside("." + field.name)
            raise
    for sub in vmsd.subsections:
        if sub.needed is not None and not sub.needed(obj):
            continue
        out.put(_head(sub) + _U32.pack(sub.version_id))
        try:
            put(out, sub, obj, sub.version_id)
        except VMStateError as exc:
            exc.inside(sub.name.removeprefix(vmsd.name))
            raise


def get(src: Source, vmsd: VMStateDescription, obj: Any, version: int) -> None:
    """Read the fields and subsections of a description into `obj`, as of `version`."""
    if version > vmsd.version_id:
        raise VMStateError(
            f"the stream has version {version}, newer than the {vmsd.version_id} known here",
            offset=src.offset,
        )
    if version < vmsd.minimum_version_id:
        raise VMStateError(
            f"the stream has version {version}, older than {vmsd.minimum_version_id}, the oldest "
            "understood here",
            offset=src.offset,
        )
    lengths: dict[str, int] = {}
    for field in vmsd.fields:
        if field.present(obj, version):
            try:
                _get_field(src, field, obj, lengths)
            except VMStateError as exc:
                exc.inside("." + field.name)
                raise
    _get_subsections(src, vmsd, obj)
    if vmsd.post_load is not None:
        try:
            vmsd.post_load(obj, version)
        except VMStateError:
            raise
        except ValueError as exc:
            raise VMStateError(f"post_load refuses: {exc}") from exc


def _get_field(src: Source, field: Field, obj: Any, lengths: dict[str, int]) -> None:
    length = -1
    if field.length:
        if field.length not in lengths:
            raise VMStateError(f"the stream's version has it without {field.length!r}")
        length = lengths[field.length]
    value = field.kind.get(src, length, getattr(obj, field.name, None))
    if field.length_of:
        if value < 0:
            raise VMStateError(f"the length {value} is negative", offset=src.offset)
        lengths[field.name] = value
    elif not field.kind.anonymous:
        setattr(obj, field.name, value)
        if field.kind.carries_fds:
            src.assigned.append((obj, field.name, field.kind.blank))


def _get_subsections(src: Source, vmsd: VMStateDescription, obj: Any) -> None:
    parent = vmsd.name.encode()
    left = {sub.name.encode(): sub for sub in vmsd.subsections}
    known = set(left)
    while True:
        head = src.peek(1)
        if not head or head[0] != SUBSECTION:
            return
        head = src.peek(2)
        if len(head) < 2 or head[1] < len(parent) + 1:
            return
        size = head[1]
        name = src.peek(2 + size)[2:]
        if len(name) < size or not name.startswith(parent):
            return
        sub = left.pop(name, None)
        if sub is None:
            what = "comes twice" if name in known else "is not known here"
            raise VMStateError(
                f"subsection {name.decode(errors='replace')!r} {what}; it was "
                "written by another version",
                offset=src.offset,
            )
        src.read(2 + size)
        try:
            (version,) = _U32.unpack(src.read(4))
            get(src, sub, obj, version)
        except VMStateError as exc:
            exc.inside(sub.name.removeprefix(vmsd.name))
            raise


def _refuse_half_a_subsection(src: Source, vmsd: VMStateDescription) -> None:
    """A subsection cut by the end of the stream is none by the rule above. At the end of everything
    the rest can be nothing else."""
    rest = src.peek(2 + 255)
    for sub in vmsd.subsections:
        if rest and _head(sub).startswith(rest):
            raise Truncated(
                f"the stream ends in the name of subsection {sub.name!r}",
                offset=src.offset + len(rest),
            )


def _head(sub: VMStateDescription) -> bytes:
    name = sub.name.encode()
    return bytes((SUBSECTION, len(name))) + name


def _value(obj: Any, field: Field) -> Any:
    if field.kind.anonymous:
        return None
    try:
        return getattr(obj, field.name)
    except AttributeError:
        raise VMStateError(f"the {type(obj).__name__} has no such attribute") from None

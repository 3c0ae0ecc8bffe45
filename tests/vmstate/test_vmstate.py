"""Descriptions: QEMU's bytes, QEMU's version rules, and streams that mean harm."""

from __future__ import annotations

import os
import socket
import tracemalloc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cprd import vmstate as vm
from cprd.errors import InvalidInput
from tests.support.descriptors import inodes, memfds, nothing_leaks_inside

POINT = vm.VMStateDescription("point", fields=[vm.int16("x"), vm.int16("y")])

EXTRA = vm.VMStateDescription(
    "thing/extra",
    version_id=2,
    minimum_version_id=1,
    needed=lambda obj: obj.extra != 0,
    fields=[vm.uint16("extra"), vm.uint8("since2", version_id=2)],
)
MORE = vm.VMStateDescription(
    "thing/more", needed=lambda obj: bool(obj.more), fields=[vm.counted_string("more")]
)

THING = vm.VMStateDescription(
    "thing",
    version_id=3,
    minimum_version_id=2,
    fields=[
        vm.uint8("a"),
        vm.int8("b"),
        vm.uint16("c"),
        vm.int16("d"),
        vm.uint32("e"),
        vm.int32("f"),
        vm.uint64("g"),
        vm.int64("h"),
        vm.boolean("flag"),
        vm.float64("ratio"),
        vm.buffer("mac", 6),
        vm.unused(3),
        vm.uint32("blob_len", length_of="blob"),
        vm.vbuffer("blob", "blob_len", limit=64),
        vm.uint32("namelen", length_of="name"),
        vm.string("name", "namelen", limit=64),
        vm.string("label", size=8),
        vm.array("four", vm.uint16, 4),
        vm.int32("count", length_of="numbers"),
        vm.array("numbers", vm.int32, length="count", limit=10),
        vm.struct("at", POINT),
        vm.uint8("n_points", length_of="points"),
        vm.struct_array("points", POINT, length="n_points"),
        vm.qlist("path", POINT, limit=20),
        vm.uint32("since3", version_id=3),
    ],
    subsections=[EXTRA, MORE],
)


def point(x: int = 0, y: int = 0) -> SimpleNamespace:
    return SimpleNamespace(x=x, y=y)


def thing(**changes: Any) -> SimpleNamespace:
    values: dict[str, Any] = {
        "a": 1, "b": -2, "c": 3, "d": -4, "e": 5, "f": -6, "g": 7, "h": -8,
        "flag": True, "ratio": 0.5, "mac": b"\x52\x54\0\x12\x34\x56", "blob": b"blob",
        "name": "näme", "label": "lab", "four": [1, 2, 3, 4], "numbers": [-1, 2],
        "at": point(1, -1), "points": [point(2, 3)], "path": [point(4, 5), point(6, 7)],
        "since3": 9, "extra": 0, "since2": 0, "more": "",
    }  # fmt: skip
    return SimpleNamespace(**(values | changes))


def load_thing(data: bytes, version: int = 3) -> SimpleNamespace:
    blank = SimpleNamespace(extra=0, since2=0, more="", since3=0)
    loaded: SimpleNamespace = vm.decode(THING, data, into=blank, version=version)
    return loaded


# The form of each kind


def test_every_kind_has_qemus_big_endian_form() -> None:
    golden = bytes.fromhex(
        "01 fe 0003 fffc 00000005 fffffffa 0000000000000007 fffffffffffffff8"
        "01 3fe0000000000000 525400123456 000000"
        "00000004 626c6f62  00000006 6ec3a46d6500  6c61620000000000"
        "0001 0002 0003 0004  00000002 ffffffff 00000002"
        "0001ffff  01 0002 0003  01 0004 0005 01 0006 0007 00  00000009"
    )
    assert vm.encode(THING, thing()).data == golden
    assert load_thing(golden) == thing()


def test_a_subsection_is_written_when_needed_and_only_then() -> None:
    bare = vm.encode(THING, thing()).data
    both = vm.encode(THING, thing(extra=0x102, since2=3, more="hi")).data
    first, second = b"\x05\x0bthing/extra", b"\x05\x0athing/more"
    assert both == bare + first + b"\0\0\0\2\1\2\3" + second + b"\0\0\0\1\2hi"
    assert load_thing(both) == thing(extra=0x102, since2=3, more="hi")
    # Found by name, so in any order.
    swapped = bare + second + b"\0\0\0\1\2hi" + first + b"\0\0\0\2\1\2\3"
    assert load_thing(swapped) == thing(extra=0x102, since2=3, more="hi")


words = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=15)
points = st.builds(
    point, st.integers(-(1 << 15), (1 << 15) - 1), st.integers(-(1 << 15), (1 << 15) - 1)
)


def ints(bits: int, signed: bool) -> st.SearchStrategy[int]:
    return (
        st.integers(-1 << bits - 1, (1 << bits - 1) - 1)
        if signed
        else st.integers(0, (1 << bits) - 1)
    )


things = st.fixed_dictionaries(
    {
        "a": ints(8, False), "b": ints(8, True), "c": ints(16, False), "d": ints(16, True),
        "e": ints(32, False), "f": ints(32, True), "g": ints(64, False), "h": ints(64, True),
        "flag": st.booleans(), "ratio": st.floats(allow_nan=False),
        "mac": st.binary(min_size=6, max_size=6), "blob": st.binary(max_size=64), "name": words,
        "label": st.text("abc", max_size=7), "at": points,
        "four": st.lists(ints(16, False), min_size=4, max_size=4),
        "numbers": st.lists(ints(32, True), max_size=10),
        "points": st.lists(points, max_size=9), "path": st.lists(points, max_size=20),
        "since3": ints(32, False), "more": words,
    }
)  # fmt: skip


@given(things, st.integers(0, 255), st.integers(1, 65535))
def test_any_object_comes_back(values: dict[str, Any], since2: int, extra: int) -> None:
    obj = thing(**values, extra=extra, since2=since2)
    assert load_thing(vm.encode(THING, obj).data) == obj


@given(st.binary(max_size=300), st.integers(0, 160), st.integers(0, 9))
def test_a_mutilated_stream_is_refused_by_name_or_loads(new: bytes, at: int, gone: int) -> None:
    data = vm.encode(THING, thing(extra=1, more="x")).data
    data = data[:at] + new + data[at + gone :]
    path = "thing"
    try:
        load_thing(data)
    except vm.VMStateError as exc:
        path = exc.path
    assert path.startswith("thing")


def test_a_stream_cut_anywhere_is_truncated() -> None:
    bare = len(vm.encode(THING, thing()).data)
    extra = bare + 2 + 11 + 4 + 3
    data = vm.encode(THING, thing(extra=1, more="x")).data
    for cut in range(len(data)):
        if cut in (bare, extra):
            assert load_thing(data[:cut]).more == ""
        else:
            with pytest.raises(vm.Truncated):
                load_thing(data[:cut])


# Versions


def test_an_older_stream_leaves_newer_fields_alone() -> None:
    old = vm.encode(THING, thing(), version=2).data
    assert len(old) == len(vm.encode(THING, thing()).data) - 4
    assert load_thing(old, version=2) == thing(since3=0)


def test_a_stream_too_new_or_too_old_is_refused() -> None:
    data = vm.encode(THING, thing()).data
    with pytest.raises(vm.VMStateError, match="version 4, newer than the 3 known"):
        load_thing(data, version=4)
    with pytest.raises(vm.VMStateError, match="version 1, older than 2"):
        load_thing(data, version=1)


def test_without_an_oldest_version_every_older_stream_is_understood() -> None:
    """As QEMU has it: minimum_version_id is 0 where nobody sets it."""
    vmsd = vm.VMStateDescription("d", 2, fields=[vm.uint32("a"), vm.uint32("b", version_id=2)])
    for version in (0, 1):
        assert vm.decode(vmsd, b"\0\0\0\7", version=version) == SimpleNamespace(a=7)
    data = vm.encode(vmsd, SimpleNamespace(a=7, b=8)).data
    assert vm.decode(vmsd, data) == SimpleNamespace(a=7, b=8)
    with pytest.raises(vm.VMStateError, match="version 3, newer"):
        vm.decode(vmsd, data, version=3)


def test_an_older_subsection_loads_without_its_newer_field() -> None:
    data = vm.encode(THING, thing()).data + b"\x05\x0bthing/extra\0\0\0\1\0\7"
    loaded = load_thing(data)
    assert (loaded.extra, loaded.since2) == (7, 0)


@pytest.mark.parametrize(("version", "what"), [(3, "newer"), (0, "older"), (0xFFFFFFFF, "newer")])
def test_a_subsection_of_a_strange_version_is_refused(version: int, what: str) -> None:
    head = b"\x05\x0bthing/extra" + version.to_bytes(4, "big")
    with pytest.raises(vm.VMStateError, match=what) as caught:
        load_thing(vm.encode(THING, thing()).data + head + b"\0\7\0")
    assert caught.value.path == "thing/extra"


def test_exists_alone_decides_when_there_is_one() -> None:
    vmsd = vm.VMStateDescription(
        "e",
        version_id=5,
        minimum_version_id=0,
        fields=[
            vm.uint8("kind"),
            vm.uint8("only", version_id=9, exists=lambda obj, version: obj.kind == 1 < version),
        ],
    )
    assert vm.encode(vmsd, SimpleNamespace(kind=1, only=7)).data == b"\1\7"
    assert vm.encode(vmsd, SimpleNamespace(kind=1, only=7), version=1).data == b"\1"
    assert vm.encode(vmsd, SimpleNamespace(kind=2)).data == b"\2"
    assert vm.decode(vmsd, b"\1\7") == SimpleNamespace(kind=1, only=7)


def test_a_struct_inside_has_the_version_its_field_gives() -> None:
    inner = vm.VMStateDescription(
        "inner",
        version_id=2,
        minimum_version_id=1,
        fields=[vm.uint8("old"), vm.uint8("new", version_id=2)],
    )
    both = SimpleNamespace(i=SimpleNamespace(old=1, new=2), l=[SimpleNamespace(old=3, new=4)])
    for version, data in ((1, b"\1\1\3\0"), (2, b"\1\2\1\3\4\0")):
        vmsd = vm.VMStateDescription(
            "outer",
            fields=[
                vm.struct("i", inner, struct_version=version),
                vm.qlist("l", inner, element_version=version),
            ],
        )
        assert vm.encode(vmsd, both).data == data
        assert vm.decode(vmsd, data).i.old == 1
    with pytest.raises(InvalidInput, match="version 3"):
        vm.struct("i", inner, struct_version=3)


# Subsections


def test_an_unknown_subsection_of_ours_is_refused() -> None:
    data = vm.encode(THING, thing()).data
    with pytest.raises(vm.VMStateError, match="'thing/new' is not known here"):
        load_thing(data + b"\x05\x09thing/new\0\0\0\1")


def test_a_subsection_that_comes_twice_is_refused() -> None:
    data = vm.encode(THING, thing(more="x")).data
    with pytest.raises(vm.VMStateError, match="comes twice"):
        load_thing(data + b"\x05\x0athing/more\0\0\0\1\1y")


@pytest.mark.parametrize("tail", [b"\x05", b"\x05\x02xx", b"\x05\x05thing", b"\x05\x09other/one"])
def test_a_five_that_begins_no_subsection_of_ours_belongs_to_what_follows(tail: bytes) -> None:
    vmsd = vm.VMStateDescription(
        "outer", fields=[vm.struct("at", POINT), vm.buffer("tail", len(tail))]
    )
    obj = SimpleNamespace(at=point(1, 2), tail=tail)
    assert vm.decode(vmsd, vm.encode(vmsd, obj).data) == obj


def test_a_subsection_of_a_struct_inside_is_named_by_its_way() -> None:
    inner = vm.VMStateDescription(
        "inner",
        fields=[vm.uint8("v")],
        subsections=[
            vm.VMStateDescription(
                "inner/more", fields=[vm.boolean("on")], needed=lambda obj: hasattr(obj, "on")
            )
        ],
    )
    vmsd = vm.VMStateDescription("outer", fields=[vm.qlist("items", inner), vm.uint8("end")])
    obj = SimpleNamespace(
        items=[SimpleNamespace(v=1, on=True), SimpleNamespace(v=2), SimpleNamespace(v=3, on=False)],
        end=9,
    )
    data = vm.encode(vmsd, obj).data
    assert vm.decode(vmsd, data) == obj
    broken = data.replace(
        b"\x01\x03\x05\x0ainner/more\0\0\0\1\0", b"\x01\x03\x05\x0ainner/more\0\0\0\1\2"
    )
    assert broken != data
    with pytest.raises(vm.VMStateError) as caught:
        vm.decode(vmsd, broken)
    assert caught.value.path == "outer.items[2]/more.on"


@pytest.mark.parametrize(
    "name", ["extra", "thin/extra", "thing", "thing/" + "x" * 250, "other/extra"]
)
def test_a_subsection_without_its_parents_prefix_is_refused_when_declared(name: str) -> None:
    with pytest.raises(InvalidInput, match="subsection"):
        vm.VMStateDescription("thing", subsections=[vm.VMStateDescription(name)])


# Errors and limits


@pytest.mark.parametrize(
    ("change", "path", "what"),
    [
        ({"a": 256}, "thing.a", "0 to 255"),
        ({"b": -129}, "thing.b", "-128 to 127"),
        ({"g": -1}, "thing.g", "not within"),
        ({"c": "3"}, "thing.c", "not an integer"),
        ({"flag": 1}, "thing.flag", "not a bool"),
        ({"ratio": "x"}, "thing.ratio", "not a number"),
        ({"mac": b"12345"}, "thing.mac", "5 bytes where 6"),
        ({"mac": "123456"}, "thing.mac", "not bytes"),
        ({"blob": bytes(65)}, "thing.blob_len", "limit is 64"),
        ({"name": "a\0b"}, "thing.namelen", "NUL inside"),
        ({"name": b"x"}, "thing.namelen", "not a str"),
        ({"name": "\ud800"}, "thing.namelen", "UTF-8"),
        ({"label": "12345678"}, "thing.label", "9 bytes with the NUL"),
        ({"four": [1, 2, 3]}, "thing.four", "3 elements where 4"),
        ({"four": [1, 2, 3, -4]}, "thing.four[3]", "not within"),
        ({"numbers": [0] * 11}, "thing.count", "limit is 10"),
        ({"at": SimpleNamespace(x=1)}, "thing.at.y", "no such attribute"),
        ({"points": [point()] * 256}, "thing.n_points", "0 to 255"),
        ({"points": [point(), point(1 << 15)]}, "thing.points[1].x", "not within"),
        ({"path": [point()] * 21}, "thing.path", "limit is 20"),
        ({"path": 3}, "thing.path", "not a list"),
        ({"path": [point(), point(0, 99999)]}, "thing.path[1].y", "not within"),
        ({"extra": 1, "since2": 256}, "thing/extra.since2", "not within"),
        ({"more": "x" * 256}, "thing/more.more", "limit is 255"),
    ],
)
def test_a_value_that_does_not_fit_is_named_and_nothing_is_sent(
    change: dict[str, Any], path: str, what: str
) -> None:
    with vm.Tape() as tape:
        with pytest.raises(vm.VMStateError, match=what) as caught:
            vm.save(tape, THING, thing(**change))
        assert caught.value.path == path
        assert not tape.data


LENGTH = vm.uint32("n", length_of="x")


def u32(value: int) -> bytes:
    return value.to_bytes(4, "big")


@pytest.mark.parametrize(
    ("field", "data", "path", "what"),
    [
        ([vm.boolean("x")], b"\2", "t.x", "0x02 is not a bool"),
        ([vm.uint64("x")], b"\0" * 7, "t.x", "1 of 8 bytes early"),
        ([vm.uint32("n", length_of="x"), vm.vbuffer("x", "n")], u32(1 << 31), "t.x", "limit"),
        ([vm.int32("n", length_of="x"), vm.vbuffer("x", "n")], b"\xff" * 4, "t.n", "negative"),
        ([vm.uint8("n", length_of="x"), vm.string("x", "n")], b"\2ab", "t.x", "no NUL"),
        ([vm.uint8("n", length_of="x"), vm.string("x", "n")], b"\3a\0\0", "t.x", "NUL inside"),
        ([vm.string("x", size=2)], b"ab", "t.x", "no NUL"),
        ([LENGTH, vm.array("x", vm.uint8, length="n")], u32(65537), "t.x", "65536"),
        ([vm.qlist("x", POINT)], b"\1\0\0\0\0\7", "t.x[1]", "0x07 is not the marker"),
        ([vm.qlist("x", POINT, limit=1)], b"\1\0\0\0\0\1\0\0\0\0\0", "t.x[1]", "limit of 1"),
        ([vm.fd("x")], b"!", "t.x", "0x21 stands where"),
        ([vm.fd("x")], b" ", "t.x", "no descriptor came"),
        ([vm.fd("x")], b"", "t.x", "ends before"),
        ([vm.uint8("x")], b"\0\0", "t", "bytes follow"),
    ],
)  # fmt: skip
def test_a_damaged_field_is_named(field: list[vm.Field], data: bytes, path: str, what: str) -> None:
    with pytest.raises(vm.VMStateError, match=what) as caught:
        vm.decode(vm.VMStateDescription("t", fields=field), data)
    assert caught.value.path == path
    assert caught.value.offset >= 0


EMPTY = vm.VMStateDescription("empty")
ROW = vm.VMStateDescription(
    "row", fields=[vm.uint32("n", length_of="x"), vm.struct_array("x", EMPTY, length="n")]
)


def test_nothing_times_millions_is_not_allocated() -> None:
    """Elements of no bytes: 4 bytes of stream ask for 65,536 objects, again and again."""
    vmsd = vm.VMStateDescription("t", fields=[vm.qlist("rows", ROW)])
    data = (b"\1" + u32(1 << 16)) * 10 + b"\0"
    src = vm.Source(data, max_items=1 << 17)
    from cprd.vmstate.description import get

    tracemalloc.start()
    try:
        with pytest.raises(vm.VMStateError, match="more list and array elements"):
            get(src, vmsd, SimpleNamespace(), 1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20


@pytest.mark.parametrize(
    "declare",
    [
        lambda: vm.VMStateDescription("t", fields=[vm.vbuffer("x", "n")]),
        lambda: vm.VMStateDescription("t", fields=[vm.vbuffer("x", "n"), LENGTH]),
        lambda: vm.VMStateDescription("t", fields=[LENGTH, vm.buffer("x", 3)]),
        lambda: vm.VMStateDescription("t", fields=[vm.uint8("n", length_of="gone")]),
        lambda: vm.VMStateDescription("t", version_id=1, minimum_version_id=2),
        lambda: vm.string("x"),
        lambda: vm.string("x", "n", size=3),
        lambda: vm.array("x", vm.uint8),
    ],
)  # fmt: skip
def test_a_description_that_cannot_work_is_refused_when_declared(
    declare: Callable[[], object],
) -> None:
    with pytest.raises(InvalidInput):
        declare()


# Hooks


def test_hooks_run_before_the_save_and_after_fields_and_subsections() -> None:
    seen: list[str] = []
    vmsd = vm.VMStateDescription(
        "h",
        fields=[vm.uint8("v")],
        subsections=[
            vm.VMStateDescription(
                "h/s",
                fields=[vm.uint8("w")],
                pre_save=lambda obj: seen.append("save h/s"),
                post_load=lambda obj, version: seen.append(f"load h/s {version} {obj.w}"),
            )
        ],
        pre_save=lambda obj: setattr(obj, "v", 5),
        post_load=lambda obj, version: seen.append(f"load h {version} {obj.v}"),
    )
    data = vm.encode(vmsd, SimpleNamespace(w=6)).data
    vm.decode(vmsd, data)
    assert seen == ["save h/s", "load h/s 1 6", "load h 1 5"]


def refuse(obj: Any, version: int = 0) -> None:
    raise ValueError("no such disk")


def test_a_hook_that_refuses_is_an_error_with_its_path() -> None:
    inner = vm.VMStateDescription("i", fields=[vm.uint8("v")], post_load=refuse)
    outer = vm.VMStateDescription("o", fields=[vm.struct("i", inner)])
    with pytest.raises(vm.VMStateError, match=r"^o\.i: post_load refuses: no such disk"):
        vm.decode(outer, b"\1")
    inner = vm.VMStateDescription("i", fields=[vm.uint8("v")], pre_save=refuse)
    outer = vm.VMStateDescription("o", fields=[vm.struct("i", inner)])
    with pytest.raises(vm.VMStateError, match=r"^o\.i: pre_save refuses: no such disk"):
        vm.encode(outer, SimpleNamespace(i=SimpleNamespace(v=1)))


# Descriptors


CONN = vm.VMStateDescription("conn", fields=[vm.counted_string("user"), vm.fd("sock")])
SERVER = vm.VMStateDescription(
    "server",
    fields=[
        vm.fd("listener"),
        vm.qlist("conns", CONN),
        vm.array("pair", vm.fd, 2),
        vm.uint8("end"),
    ],
)


def server(fds: list[int]) -> SimpleNamespace:
    return SimpleNamespace(
        listener=fds[0],
        conns=[SimpleNamespace(user="a", sock=fds[1]), SimpleNamespace(user="b", sock=fds[2])],
        pair=fds[3:5],
        end=1,
    )


def server_fds(obj: SimpleNamespace) -> list[int]:
    return [obj.listener, *(conn.sock for conn in obj.conns), *obj.pair]


def test_descriptors_travel_in_the_order_of_their_fields() -> None:
    with nothing_leaks_inside(), memfds(5) as fds:
        left, right = socket.socketpair()
        with vm.SocketChannel(left) as sender, vm.SocketChannel(right, 20) as receiver:
            vm.save(sender, SERVER, server(fds))
            sender.finish()
            with vm.Reader(receiver) as reader:
                got = vm.load(reader, SERVER)
                reader.finish()
        assert inodes(server_fds(got)) == inodes(fds)
        assert not any(os.get_inheritable(fd) for fd in server_fds(got))
        for fd in server_fds(got):
            os.close(fd)


def test_two_states_follow_each_other_on_one_connection() -> None:
    with nothing_leaks_inside(), memfds(5) as fds:
        left, right = socket.socketpair()
        with vm.SocketChannel(left) as sender, vm.SocketChannel(right, 20) as receiver:
            vm.save(sender, SERVER, server(fds))
            vm.save(sender, THING, thing(more="after it"))
            sender.finish()
            with vm.Reader(receiver) as reader:
                got = vm.load(reader, SERVER)
                assert vm.load(reader, THING, thing(since2=0)).more == "after it"
                reader.finish()
        for fd in server_fds(got):
            os.close(fd)


def test_an_object_with_fileno_is_a_descriptor_too() -> None:
    vmsd = vm.VMStateDescription("t", fields=[vm.fd("sock")])
    with nothing_leaks_inside():
        left, right = socket.socketpair()
        with left, right, vm.Tape() as tape:
            vm.save(tape, vmsd, SimpleNamespace(sock=left))
            assert inodes(tape.fds) == inodes([left.fileno()])
        for closed in (left, -1, None, "3"):
            with pytest.raises(vm.VMStateError, match=r"^t\.sock: .* not an open descriptor"):
                vm.encode(vmsd, SimpleNamespace(sock=closed))


def test_a_load_cut_anywhere_closes_what_came_and_forgets_it() -> None:
    with nothing_leaks_inside(), memfds(5) as fds:
        stream = vm.encode(SERVER, server(fds))
        for cut in range(len(stream.data)):
            marks = [(place, os.dup(fd)) for place, fd in stream.marks if place < cut]
            tape = vm.Tape(
                stream.data[:cut], [fd for _, fd in marks], [place for place, _ in marks]
            )
            into = SimpleNamespace(listener=-1, pair=[])
            with tape, vm.Reader(tape) as reader:
                with pytest.raises(vm.Truncated):
                    vm.load(reader, SERVER, into)
            assert into.listener == -1
            assert not into.pair


def test_a_refusing_hook_leaves_no_descriptor_behind() -> None:
    vmsd = vm.VMStateDescription(
        "t", fields=[vm.fd("one"), vm.array("two", vm.fd, 2)], post_load=refuse
    )
    with nothing_leaks_inside(), memfds(3) as fds:
        into = SimpleNamespace()
        with vm.Tape(b"   ", [os.dup(fd) for fd in fds]) as tape, vm.Reader(tape) as reader:
            with pytest.raises(vm.VMStateError, match="no such disk"):
                vm.load(reader, vmsd, into)
        assert into.one == -1
        assert not into.two


def test_descriptors_that_nobody_asked_for_are_closed_with_the_reader() -> None:
    vmsd = vm.VMStateDescription("t", fields=[vm.fd("one")])
    with nothing_leaks_inside(), memfds(3) as fds:
        with vm.Tape(b" ", [os.dup(fd) for fd in fds]) as tape, vm.Reader(tape) as reader:
            got = vm.load(reader, vmsd)
            with pytest.raises(vm.VMStateError, match="2 more descriptors"):
                reader.finish()
        assert inodes([got.one]) == inodes(fds[:1])
        os.close(got.one)


def test_decoding_from_memory_closes_nothing_even_when_it_fails() -> None:
    with nothing_leaks_inside(), memfds(5) as fds:
        stream = vm.encode(SERVER, server(fds))
        assert server_fds(vm.decode(SERVER, stream.data, fds)) == fds
        with pytest.raises(vm.Truncated):
            vm.decode(SERVER, stream.data[:-1], fds)
        assert len(inodes(fds)) == 5


def test_a_late_descriptor_is_refused_while_the_stream_is_still_arriving() -> None:
    vmsd = vm.VMStateDescription("t", fields=[vm.uint8("n"), vm.fd("one"), vm.uint8("m")])
    with nothing_leaks_inside(), memfds(1) as fds, vm.Tape() as tape:
        tape.feed(b"\1 ")
        tape.feed(b"\2", [os.dup(fds[0])])
        with vm.Reader(tape) as reader, pytest.raises(vm.VMStateError, match=r"^t\.one: no desc"):
            vm.load(reader, vmsd)


def test_a_tape_refuses_places_outside_its_bytes_and_takes_nothing() -> None:
    with nothing_leaks_inside(), memfds(2) as fds:
        for offsets in ([0], [1, 0], [0, 2], [-1, 0]):
            with pytest.raises(InvalidInput, match="offsets"):
                vm.Tape(b"  ", fds, offsets)


# The example of docs/vmstate.md


def test_the_example_of_the_documentation_runs() -> None:
    page = os.path.join(os.path.dirname(__file__), os.pardir, os.pardir, "docs", "vmstate.md")
    with open(page) as file:
        example = file.read().split("```python\n")[1].split("```")[0]
    with nothing_leaks_inside():
        exec(compile(example, page, "exec"), {"__name__": "example"})

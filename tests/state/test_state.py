"""State: keys and their order, who owns what, sections as a mapping."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import fcntl
import gc
import mmap
import os
import socket
from array import array
from typing import Any

import msgpack
import pytest

from cprd import InvalidInput, LimitExceeded, MissingKey, State
from cprd.bundle.unpack import unpack
from cprd.linux.memfd import SEALS
from tests.support.bundles import pack
from tests.support.descriptors import io_uring, open_fds
from tests.support.eventfds import full_table, of, opened

pytestmark = pytest.mark.usefixtures("nothing_leaks")


def is_open(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError:
        return False
    return True


def loaded(state: State) -> State:
    """`state` as a successor gets it."""
    packed = pack(state)
    try:
        return unpack(packed.fd)
    finally:
        packed.close()


def memfd(content: bytes, seals: int = SEALS) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


# Keys


def test_order_is_that_of_saving_across_names_and_after_deletions() -> None:
    state = State()
    for name, id in (("b", 2), ("a", 1), ("b", -1), ("a", 0)):
        state.save_fd(name, id, 0)
    state.delete_fd("a", 1)
    state.save_fd("a", 1, 1)
    wanted = [("b", 2, 0), ("b", -1, 0), ("a", 0, 0), ("a", 1, 1)]
    assert list(state.fds()) == wanted
    assert list(state.fds("b")) == wanted[:2]
    assert list(state.fds("none")) == []
    assert state.fd_count == 4
    successor = loaded(state)
    assert [(name, id) for name, id, _ in successor.fds()] == [key[:2] for key in wanted]
    successor.close()


def test_a_key_used_twice_is_refused_and_the_first_stays() -> None:
    state = State()
    state.save_fd("a", 0, 1)
    with pytest.raises(InvalidInput, match=r"\('a', 0\) is used already"):
        state.save_fd("a", 0, 2)
    assert state.find_fd("a", 0) == 1
    assert state.fd_count == 1
    state.save_fd("a", 1, 2)


def test_a_key_used_twice_is_refused_in_a_loaded_state_too() -> None:
    state = State()
    state.save_fd("a", 0, 1)
    successor = loaded(state)
    with pytest.raises(InvalidInput, match="used already"):
        successor.save_fd("a", 0, 2)
    successor.close()


@pytest.mark.parametrize(
    ("name", "id", "why"),
    [
        ("", 0, "name"),
        ("x" * 256, 0, "name"),
        ("\u00e9" * 128, 0, "name"),  # 256 bytes
        ("a\0b", 0, "name"),
        (b"bytes", 0, "key"),
        (None, 0, "key"),
        ("a", 1 << 31, "id"),
        ("a", -(1 << 31) - 1, "id"),
        ("a", "0", "key"),
        ("a", None, "key"),
    ],
)
def test_a_key_that_qemu_could_not_say_is_refused(name: Any, id: Any, why: str) -> None:
    state = State()
    with pytest.raises(InvalidInput, match=why):
        state.save_fd(name, id, 0)
    assert state.fd_count == 0


@pytest.mark.parametrize("id", [1.5, 1.0, "1", None, [], 1 << 40])
def test_a_key_that_is_refused_leaves_the_state_as_it_was(id: Any) -> None:
    with opened(3) as fds:
        state = of(fds[:1], "before")
        with pytest.raises(InvalidInput):
            state.save_fd("bad", id, fds[1])
        state.save_fd("after", 7, fds[2])
        assert list(state.fds()) == [("before", 0, fds[0]), ("after", 7, fds[2])]
        successor = loaded(state)
        assert [key[:2] for key in successor.fds()] == [("before", 0), ("after", 7)]
        successor.close()


def test_what_counts_as_an_integer_is_an_id() -> None:
    class Number:
        def __index__(self) -> int:
            return 7

    state = State()
    state.save_fd("a", Number(), 0)  # type: ignore[arg-type]
    assert state.find_fd("a", 7) == 0
    successor = loaded(state)
    assert [key[:2] for key in successor.fds()] == [("a", 7)]
    successor.close()


def test_no_room_for_a_copy_leaves_a_loaded_state_as_it_was() -> None:
    with opened(1) as fds:
        ram = memfd(b"abc")
        state = of(fds)
        state["ram"] = b"x" * 20_000
        successor = loaded(state)
        with full_table(1, 0):
            with pytest.raises(LimitExceeded, match="RLIMIT_NOFILE"):
                successor.save_fd("more", 0, fds[0])
            with pytest.raises(LimitExceeded, match="RLIMIT_NOFILE"):
                successor.save_section_fd("ram", ram)
        assert [key[:2] for key in successor.fds()] == [("fd", 0)]
        assert bytes(successor["ram"]) == b"x" * 20_000
        successor.close()
        os.close(ram)


def test_a_section_set_to_itself_stays() -> None:
    state = State()
    state["raw"] = b"x" * 20_000
    successor = loaded(state)
    successor["raw"] = successor["raw"]
    assert bytes(successor["raw"]) == b"x" * 20_000
    successor.close()


@pytest.mark.parametrize("name", ["x" * 255, "\u00e9" * 127, "a b/c:d", "\udcff raw byte", "."])
@pytest.mark.parametrize("id", [0, (1 << 31) - 1, -(1 << 31)])
def test_keys_at_their_limits_travel(name: str, id: int) -> None:
    state = State()
    state.save_fd(name, id, 0)
    successor = loaded(state)
    assert [(key, number) for key, number, _ in successor.fds()] == [(name, id)]
    assert successor.find_fd(name, id) >= 0
    successor.close()


@pytest.mark.parametrize("fd", [-1, 1 << 20, 1 << 40])
@pytest.mark.parametrize("bulk", [False, True])
def test_a_descriptor_that_is_not_open_is_refused_with_its_key(fd: int, bulk: bool) -> None:
    """A number that cannot be one at once, any other when the state is packed."""
    with pytest.raises(InvalidInput, match="not a memfd"):
        State().save_section_fd("a", fd)
    state = State()
    state.save_fd("good", 0, 0)

    def save() -> None:
        if bulk:
            state.save_fds("a", {6: 0, 7: fd})
        else:
            state.save_fd("a", 7, fd)
        pack(state)

    with pytest.raises(InvalidInput, match=rf"fd {fd} of \('a', 7\) is not an open descriptor"):
        save()


def test_what_the_kernel_passes_to_nobody_is_refused() -> None:
    ring = io_uring()
    state = State()
    state.save_fds("a", {6: 0, 7: ring})
    with pytest.raises(InvalidInput, match=rf"fd {ring} of \('a', 7\) cannot be passed to another"):
        pack(state)
    os.close(ring)


def test_a_loaded_state_copies_only_what_is_open() -> None:
    successor = loaded(State())
    with pytest.raises(InvalidInput, match=r"fd 1048576 of \('a', 0\) is not an open descriptor"):
        successor.save_fd("a", 0, 1 << 20)
    successor.close()


def test_a_closed_object_and_one_without_a_descriptor_are_refused() -> None:
    sock = socket.socket()
    sock.close()
    for thing in (sock, object(), "7"):
        with pytest.raises(InvalidInput):
            State().save_fd("a", 0, thing)  # type: ignore[arg-type]


def test_a_descriptor_closed_between_save_fd_and_save_is_named() -> None:
    state = State()
    fd = os.dup(0)
    state.save_fd("good", 0, 0)
    state.save_fd("gone", 3, fd)
    os.close(fd)
    with pytest.raises(InvalidInput, match=r"\('gone', 3\) is not .* was closed before save"):
        pack(state)


# Whose descriptors they are


def test_a_built_state_borrows_and_closes_nothing() -> None:
    state = State()
    with socket.socket() as sock:
        fd = os.dup(0)
        state.save_fd("sock", 0, sock)
        state.save_fd("fd", 0, fd)
        state.delete_fd("fd")
        assert is_open(fd)
        state.save_fd("fd", 0, fd)
        assert state.take_fd("fd") == fd
        state.save_fd("fd", 0, fd)
        state.close()
        assert is_open(fd)
        assert is_open(sock.fileno())
        os.close(fd)


def test_an_object_stays_alive_until_the_state_lets_it_go() -> None:
    state = State()
    state.save_fd("sock", 0, socket.socket())
    gc.collect()
    fd = state.find_fd("sock")
    assert is_open(fd)
    state.delete_fd("sock")
    gc.collect()
    assert not is_open(fd)


def test_a_loaded_state_owns_and_closes_what_nobody_took() -> None:
    state = State()
    for number in range(5):
        state.save_fd("a", number, 0)
    before = open_fds()
    successor = loaded(state)
    assert open_fds() == before + 5
    taken = successor.take_fd("a", 1)
    with pytest.raises(MissingKey):
        successor.take_fd("a", 1)
    assert successor.find_fd("a", 1) == -1
    gone = successor.find_fd("a", 2)
    successor.delete_fd("a", 2)
    assert not is_open(gone)
    assert [id for _, id, _ in successor.fds()] == [0, 3, 4]
    successor.close()
    assert open_fds() == before + 1
    successor.close()  # safe to repeat
    assert is_open(taken)
    os.close(taken)


def test_what_is_loaded_is_close_on_exec_and_the_same_file() -> None:
    state = State()
    fd = os.eventfd(7, os.EFD_NONBLOCK)
    state.save_fd("counter", 0, fd)
    successor = loaded(state)
    os.close(fd)
    mine = successor.take_fd("counter")
    successor.close()
    assert not os.get_inheritable(mine)
    assert os.eventfd_read(mine) == 7
    os.close(mine)


def test_absent_keys_are_named_when_taken_and_nothing_when_deleted() -> None:
    state = State()
    assert state.find_fd("a", 0) == -1
    with pytest.raises(MissingKey, match=r"no descriptor under \('a', 0\): the names are none"):
        state.take_fd("a")
    assert state.take_fd("a", 0, default=-1) == -1
    assert state.take_fds("a") == {}
    assert state.take_sockets("a") == {}
    state.delete_fd("a", 0)
    for id in range(7):
        state.save_fd("a", id, 0)
    state.save_fd("b", 0, 0)
    with pytest.raises(MissingKey, match=r"'a' has ids 0, 1, 2, 3, 4 and 2 more"):
        state.take_fd("a", 9)
    with pytest.raises(KeyError, match=r"the names are 'a', 'b'"):
        state.take_fd("c")
    with pytest.raises(MissingKey):
        state.take_fd("a", [])  # type: ignore[arg-type]
    assert state.fd_count == 8


def test_what_is_added_to_a_loaded_state_stays_the_programs() -> None:
    successor = loaded(State())
    fd = os.dup(0)
    successor.save_fd("mine", 0, fd)
    successor.close()
    assert is_open(fd)
    os.close(fd)


def test_a_loaded_state_can_be_saved_on() -> None:
    state = State()
    state.save_fd("a", 0, 0)
    state["big"] = {"list": list(range(50_000))}
    state["small"] = {"n": 1}
    first = loaded(state)
    first["big"]["list"].append("changed")
    first["small"]["n"] = 2
    first.save_fd("b", 0, 1)
    second = loaded(first)
    first.close()
    assert second["big"]["list"][-1] == "changed"
    assert second["small"] == {"n": 2}
    assert [name for name, _, _ in second.fds()] == ["a", "b"]
    second.close()


# Sections


def test_sections_are_a_mapping() -> None:
    state = State()
    state["a"] = 1
    state["b"] = [1, 2]
    state["a"] = 2
    assert list(state) == ["a", "b"]
    assert len(state) == 2
    assert "a" in state
    assert "c" not in state
    assert not state.__contains__(7)
    assert state.get("c", "default") == "default"
    assert dict(state) == {"a": 2, "b": [1, 2]}
    assert state.pop("a") == 2
    with pytest.raises(KeyError):
        state["a"]
    with pytest.raises(KeyError):
        del state["a"]
    with pytest.raises(KeyError):
        state.section_fd("a")
    assert state  # an empty one, too: `if state` asks whether there is one
    assert State()


@pytest.mark.parametrize("key", ["", "x" * 256, "a\0b", 7, None, b"a", "\ud800"])
def test_a_bad_section_key_is_refused(key: Any) -> None:
    with pytest.raises(InvalidInput, match="section"):
        State()[key] = 1
    fd = memfd(b"x")
    with pytest.raises(InvalidInput, match="section"):
        State().save_section_fd(key, fd)
    os.close(fd)


VALUES: list[Any] = [
    None,
    True,
    0,
    -(1 << 63),
    (1 << 64) - 1,
    1.5,
    "",
    "text \u20ac",
    [],
    [1, [2, [3]]],
    {},
    {"a": {1: b"bytes", None: 2.5}},
    {(1, (2, 3)): "a tuple as key"},
    msgpack.ExtType(5, b"x"),
    msgpack.Timestamp(1, 2),
    "x" * 100_000,
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:30])
def test_a_msgpack_value_comes_back_as_it_was(value: Any) -> None:
    state = State()
    state["key"] = value
    successor = loaded(state)
    assert successor["key"] == value
    assert successor["key"] is successor["key"]  # the same object each time
    successor.close()


UNSAYABLE = [
    ({"b": [0, object()]}, r"a\.b\[1\]: msgpack cannot say object"),
    ({"b": {"no name": {1, 2}}}, r"a\.b\['no name'\]: .* a set: set sorted\(\) or list\(\) of it"),
    ([frozenset()], r"a\[0\]: .* a frozenset"),
    (1 << 64, r"a: .* an integer beyond 64 bits"),
    ((1, {2: "\ud800"}), r"a\[1\]\[2\]: .* text that is no UTF-8 .* set bytes"),
    ({frozenset(): 1}, r"a key frozenset\(\): "),
    ([datetime.datetime(2026, 1, 1)], r"a\[0\]: .* a datetime without a time zone"),
    (1j, r"a: .* complex 1j"),
    (ctypes.c_int(7), r"a: .* c_int"),
]


@pytest.mark.parametrize(("value", "words"), UNSAYABLE, ids=range(len(UNSAYABLE)))
def test_what_msgpack_cannot_say_is_refused_where_it_is_set_with_the_path_inside(
    value: Any, words: str
) -> None:
    state = State()
    state["a"] = "before"
    with pytest.raises(InvalidInput, match=f"section 'a': {words}"):
        state["a"] = value
    assert dict(state) == {"a": "before"}


def test_what_becomes_unsayable_later_is_refused_when_the_state_is_packed() -> None:
    state = State()
    state["other"] = b"x" * 100_000  # has a memfd of its own, which must not be left
    state["a"] = {"b": []}
    state["a"]["b"].append(object())
    with pytest.raises(InvalidInput, match=r"section 'a': a\.b\[0\]: msgpack cannot say"):
        pack(state)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def test_a_value_nested_too_deeply_is_refused() -> None:
    with pytest.raises(InvalidInput, match="'deep': lists and maps lie in each other deeper than"):
        State()["deep"] = nested(5000)


@pytest.mark.parametrize("depth", [100, 510, 511, 512, 1021, 1022, 1023, 1024])
def test_a_value_that_is_not_refused_as_nested_too_deeply_can_be_read(depth: int) -> None:
    state = State()
    with contextlib.suppress(InvalidInput):
        state["deep"] = nested(depth)
    assert depth > 500 or "deep" in state
    successor = loaded(state)
    found = successor.get("deep")
    deep = 0
    while found:
        (found,), deep = found, deep + 1
    assert deep == (depth if "deep" in state else 0)
    successor.close()


def test_a_datetime_with_a_time_zone_comes_back_as_the_same_moment() -> None:
    then = datetime.datetime(2026, 2, 3, 4, 5, 6, 789, datetime.UTC)
    state = State()
    state["when"] = [then]
    successor = loaded(state)
    assert successor["when"][0].to_datetime() == then
    successor.close()


@pytest.mark.parametrize("size", [0, 1, 16 * 1024, 16 * 1024 + 1, 3_000_000])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, "array", "mmap"])
def test_bytes_and_buffers_come_back_as_a_read_only_memoryview(size: int, kind: Any) -> None:
    raw = os.urandom(min(size, 1000)).ljust(size, b"\xa5")
    given: Any = raw
    if kind == "array":
        given = array("B", raw)
    elif kind == "mmap":
        if not size:
            return  # there is no mapping of nothing
        given = mmap.mmap(-1, size)
        given[:] = raw
    elif kind is not bytes:
        given = kind(raw)
    state = State()
    state["raw"] = given
    successor = loaded(state)
    view = successor["raw"]
    assert isinstance(view, memoryview)
    assert view.readonly
    assert view == raw
    view.release()
    successor.close()


def test_a_buffer_of_wider_items_goes_as_its_bytes() -> None:
    state = State()
    state["floats"] = array("d", [1.5, 2.5])
    successor = loaded(state)
    assert list(successor["floats"].cast("d")) == [1.5, 2.5]
    successor.close()


@pytest.mark.parametrize("size", [0, 3, 5000])
@pytest.mark.parametrize("kind", [ctypes.c_int, ctypes.c_ubyte, ctypes.c_double])
def test_a_buffer_of_another_library_goes_as_its_bytes(size: int, kind: Any) -> None:
    given = (kind * size)(*range(1, size % 200))
    state = State()
    state["raw"] = given
    state["empty"] = array("d")
    successor = loaded(state)
    assert bytes(successor["raw"]) == bytes(given)
    assert bytes(successor["empty"]) == b""
    successor.close()


def released() -> memoryview:
    view = memoryview(b"abc")
    view.release()
    return view


def unmapped() -> mmap.mmap:
    mapped = mmap.mmap(-1, 10)
    mapped.close()
    return mapped


@pytest.mark.parametrize(
    "value",
    [memoryview(b"abcd")[::2], released(), unmapped()],
    ids=["gaps", "released", "unmapped"],
)
def test_a_buffer_that_cannot_be_read_is_refused_with_the_sections_name(value: Any) -> None:
    with pytest.raises(InvalidInput, match="bad one"):
        State()["bad one"] = value


def test_a_slice_in_use_survives_the_end_of_its_state() -> None:
    state = State()
    state["raw"] = b"\x07" * 50_000
    successor = loaded(state)
    piece = successor["raw"][10:20]
    successor.close()
    assert bytes(piece) == b"\x07" * 10


def test_a_section_set_anew_or_deleted_lets_its_memfd_go() -> None:
    state = State()
    state["raw"] = b"x" * 50_000
    before = open_fds()
    state.section_fd("raw")
    state["raw"] = b"other"
    assert open_fds() == before
    state.section_fd("raw")
    del state["raw"]
    assert open_fds() == before


def test_section_fd_is_the_memfd_or_a_sealed_copy_of_what_lies_inline() -> None:
    state = State()
    state["small"] = b"inline"
    state["large"] = b"y" * 50_000
    state["value"] = {"a": 1}
    successor = loaded(state)
    assert successor["value"] == {"a": 1}
    for key, content in (
        ("small", b"inline"),
        ("large", b"y" * 50_000),
        ("value", msgpack.packb({"a": 1})),
    ):
        fd = successor.section_fd(key)
        assert fd == successor.section_fd(key)
        assert os.pread(fd, 100_000, 0) == content
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS
    successor.close()
    assert not is_open(fd)


# Sections that are memfds already


def test_a_sealed_memfd_travels_uncopied() -> None:
    fd = memfd(b"guest memory")
    state = State()
    state.save_section_fd("ram", fd)
    successor = loaded(state)
    assert os.fstat(successor.section_fd("ram")).st_ino == os.fstat(fd).st_ino
    assert successor["ram"] == b"guest memory"
    state.close()
    assert is_open(fd)
    successor.close()
    assert is_open(fd)
    os.close(fd)


def test_an_empty_memfd_is_an_empty_section() -> None:
    fd = memfd(b"")
    state = State()
    state.save_section_fd("empty", fd)
    successor = loaded(state)
    assert successor["empty"] == b""
    successor.close()
    os.close(fd)


@pytest.mark.parametrize(
    ("seals", "missing"),
    [
        (0, "F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE"),
        (fcntl.F_SEAL_WRITE, "F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW"),
        (SEALS & ~fcntl.F_SEAL_WRITE, "F_SEAL_WRITE"),
        (SEALS & ~fcntl.F_SEAL_SEAL, "F_SEAL_SEAL"),
        (SEALS & ~fcntl.F_SEAL_GROW, "F_SEAL_GROW"),
    ],
)
def test_a_memfd_that_is_not_sealed_is_refused_with_the_seals_it_lacks(
    seals: int, missing: str
) -> None:
    fd = memfd(b"x", seals)
    with pytest.raises(InvalidInput, match=f"'ram': the memfd lacks the seals {missing};"):
        State().save_section_fd("ram", fd)
    with pytest.raises(InvalidInput, match=r"save_fd\(name, id, fd\)"):
        State().save_section_fd("ram", fd)
    os.close(fd)


def test_a_memfd_that_is_still_mapped_writable_cannot_be_sealed_and_is_refused() -> None:
    fd = memfd(b"x" * 4096, 0)
    with mmap.mmap(fd, 4096) as mapped:
        with pytest.raises(OSError, match="busy"):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        with pytest.raises(InvalidInput, match="after unmapping it everywhere"):
            State().save_section_fd("ram", fd)
        mapped[0] = 1
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    State().save_section_fd("ram", fd)
    os.close(fd)


def test_what_is_no_memfd_is_refused_and_told_where_to_go() -> None:
    with pytest.raises(InvalidInput, match=r"not a memfd.*save_fd"):
        State().save_section_fd("ram", 0)
    with socket.socket() as sock:
        with pytest.raises(InvalidInput, match="not a memfd"):
            State().save_section_fd("ram", sock)


def test_section_fd_stands_at_its_beginning_whatever_a_former_reader_did() -> None:
    state = State()
    state["large"] = b"y" * 50_000
    state["value"] = {"a": 1}
    for _ in range(2):
        successor = loaded(state)
        for key in ("large", "value"):
            for _ in range(2):
                fd = successor.section_fd(key)
                assert os.lseek(fd, 0, os.SEEK_CUR) == 0
                assert os.read(fd, 3)
        state.close()
        state = successor
    state.close()


def test_what_a_program_changes_after_section_fd_is_saved_all_the_same() -> None:
    state = State()
    state["value"] = {"a": 1}
    state.section_fd("value")
    state["value"]["a"] = 2
    successor = loaded(state)
    assert successor["value"] == {"a": 2}
    state.close()
    successor.close()


# What a claimant never asked for, and what comes after the end


def test_keys_that_nobody_asked_for_are_told() -> None:
    state = State()
    for name, id in (("a", 0), ("b", 0), ("a", 1), ("c", 5)):
        state.save_fd(name, id, 0)
    state["x"], state["y"], state["z"] = 1, b"2", b"z" * 50_000
    assert state.untaken() == []  # there was nothing to ask for
    successor = loaded(state)
    every: list[Any] = [("a", 0), ("b", 0), ("a", 1), ("c", 5), "x", "y", "z"]
    assert successor.untaken() == every
    asks: list[tuple[Any, Any]] = [
        (lambda: os.close(successor.take_fd("a", 0)), ("a", 0)),
        (lambda: successor.find_fd("a", 1), ("a", 1)),
        (lambda: successor.find_fd("a", 7), None),
        (lambda: list(successor.fds("c")), ("c", 5)),
        (lambda: "x" in successor, None),
        (lambda: len(successor), None),
        (lambda: successor["x"], "x"),
        (lambda: successor.section_fd("y"), "y"),
        (lambda: successor.get("none"), None),
    ]
    for ask, key in asks:
        ask()
        every = [one for one in every if one != key]
        assert successor.untaken() == every
    assert every == [("b", 0), "z"]
    assert list(successor.items())
    assert len(list(successor.fds())) == 3
    assert successor.untaken() == []
    successor["mine"] = 1
    successor.save_fd("mine", 0)
    successor.save_fds("mine", {1: 0})
    assert successor.untaken() == []  # its own
    successor.close()


USES: list[Any] = [
    lambda state: state.save_fd("a", 0, 0),
    lambda state: state.save_fds("a", {0: 0}),
    lambda state: state.find_fd("a"),
    lambda state: state.take_fd("a"),
    lambda state: state.take_fd("a", default=-1),
    lambda state: state.take_fds("a"),
    lambda state: state.take_sockets("a"),
    lambda state: state.delete_fd("a"),
    lambda state: state.fds(),
    lambda state: state.fd_count,
    lambda state: state.untaken(),
    lambda state: state["a"],
    lambda state: state.get("a"),
    lambda state: "a" in state,
    len,
    list,
    dict,
    lambda state: state.pop("a", None),
    lambda state: state.update(a=1),
    lambda state: state.section_fd("a"),
    pack,
]


@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("use", USES, ids=range(len(USES)))
def test_a_closed_state_says_so_instead_of_looking_empty(use: Any, owned: bool) -> None:
    state = State()
    state.save_fd("a", 0, 0)
    state["a"] = 1
    if owned:
        state = loaded(state)
    state.close()
    with pytest.raises(InvalidInput, match="this state is closed"):
        use(state)
    assert state
    assert repr(state) == "<cprd.State: closed>"
    assert isinstance(state, State)
    state.close()  # safe to repeat


def test_a_section_that_is_missing_is_named_with_those_that_are_there() -> None:
    state = State()
    state["a"], state["b"] = 1, 2
    with pytest.raises(MissingKey, match="no section 'c': the sections are 'a', 'b'"):
        state["c"]
    with pytest.raises(MissingKey):
        del state["c"]
    with pytest.raises(MissingKey):
        state.section_fd("c")
    assert state.get("c") is None
    assert state.pop("c", 7) == 7

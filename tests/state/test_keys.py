"""Keys of a state by many at once: order, errors that change nothing, interrupts between any two
steps."""

from __future__ import annotations

import os
import socket
import ssl
import sys
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cprd import InvalidInput, LimitExceeded, State
from cprd.bundle.unpack import unpack
from cprd.linux.rights import close_all
from cprd.state.descriptors import tail
from tests.support.bundles import pack
from tests.support.descriptors import open_fds
from tests.support.eventfds import full_table, opened

pytestmark = pytest.mark.usefixtures("nothing_leaks")


def loaded(state: State) -> State:
    """`state` as a successor gets it."""
    packed = pack(state)
    try:
        return unpack(packed.fd)
    finally:
        packed.close()


def keys(state: State) -> list[tuple[str, int]]:
    return [(name, id) for name, id, _ in state.fds()]


def as_they_travel(state: State) -> list[tuple[str, int]]:
    names, ids, fds = state.columns()
    assert len(fds) == len(ids)
    texts = names.decode("utf-8", "surrogateescape").split("\0") if names else []
    return [*zip(texts, ids, strict=True)]


@given(st.lists(st.sampled_from([b"", b"a", b"ba", b"b"]), min_size=1, max_size=9))
def test_the_tail_of_names_is_all_that_are_like_the_last_or_the_last_alone(
    names: list[bytes],
) -> None:
    last, before, times = tail(b"\0".join(names))
    first = names.index(last)
    assert last == names[-1]
    assert before + times == len(names)
    assert before == (first if set(names[first:]) == {last} else len(names) - 1)


# Many at once


def test_save_fds_takes_a_mapping_or_pairs_and_keeps_their_order() -> None:
    with opened(6) as fds:
        state = State()
        state.save_fd("listener", fds[0])
        state.save_fds("client", {9: fds[1], -4: fds[2]})
        state.save_fds("client", ((id, fds[id]) for id in (5, 3)))
        state.save_fds("none", {})
        state.save_fds("none", [])
        wanted = [
            *(("listener", 0, fds[0]), ("client", 9, fds[1]), ("client", -4, fds[2])),
            *(("client", 5, fds[5]), ("client", 3, fds[3])),
        ]
        assert list(state.fds()) == wanted
        assert state.fd_count == 5
        successor = loaded(state)
        assert keys(successor) == [key[:2] for key in wanted]
        taken = successor.take_fds("client")
        assert [os.eventfd_read(fd) for fd in taken.values()] == [2, 3, 6, 4]
        assert list(taken) == [9, -4, 5, 3]
        assert successor.take_fds("client") == {}
        assert keys(successor) == [("listener", 0)]
        successor.close()
        close_all(taken.values())


def test_what_was_given_to_save_fds_may_change_afterwards() -> None:
    given = {1: 0}
    state = State()
    state.save_fds("a", given)
    given[2] = 0
    assert keys(state) == [("a", 1)]
    taken = state.take_fds("a")
    taken[7] = 0
    assert keys(state) == []
    state.save_fds("a", taken)
    state.save_fd("a", 3, 0)
    assert taken == {1: 0, 7: 0}


def test_objects_stay_alive_until_each_is_let_go() -> None:
    before = open_fds()
    state = State()
    state.save_fds("sock", {id: socket.socket() for id in range(5)})
    assert open_fds() == before + 5
    state.delete_fd("sock", 3)
    assert open_fds() == before + 4
    more: dict[int, socket.socket | int] = {7: socket.socket(), 8: 0}
    state.save_fds("sock", more)
    del more
    assert open_fds() == before + 5
    state.take_fd("sock", 1)
    assert open_fds() == before + 4
    state.take_fds("sock")
    assert open_fds() == before


CLOSED = socket.socket()
CLOSED.close()
BAD: list[tuple[Any, str]] = [
    ({1: 0, 5: 0}, r"\('a', 5\) is used already"),
    ([(1, 0), (2, 0), (1, 1)], r"\('a', 1\) is used already"),
    ({1: 0, 1 << 31: 0}, r"id 2147483648 of 'a'"),
    ({1: 0, "x": 0}, r"key \('a', 'x'\)"),
    ({1: 0, 1.5: 0}, r"key \('a', 1.5\)"),
    ({1: 0, None: 0}, r"key \('a', None\)"),
    ({1: 0, 2: object()}, "has no descriptor"),
    ({1: 0, 2: -1}, r"fd -1 of \('a', 2\)"),
    ({1: CLOSED, 2: CLOSED}, r"fd -1 of \('a', 1\)"),
    ({1: 0, 2: 1 << 31}, r"fd 2147483648 of \('a', 2\)"),
    ([1, 2], "wants ids with their descriptors"),
    ([(1, 2, 3)], "wants ids with their descriptors"),
    (7, "wants ids with their descriptors"),
]


@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize(("fds", "why"), BAD, ids=range(len(BAD)))
def test_what_save_fds_refuses_changes_nothing(fds: Any, why: str, owned: bool) -> None:
    state = State()
    state.save_fd("a", 5, 0)
    state = loaded(state) if owned else state
    with opened(0):
        before = open_fds()
        with pytest.raises(InvalidInput, match=why):
            state.save_fds("a", fds)
        assert open_fds() == before
    assert keys(state) == [("a", 5)]
    for name in ("", b"a", None, "x" * 256):
        with pytest.raises(InvalidInput, match="name"):
            state.save_fds(name, {1: 0})  # type: ignore[arg-type]
    state.close()


def test_save_fds_refuses_tls_beside_plain_sockets() -> None:
    state, context = State(), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with socket.socket() as plain, context.wrap_socket(socket.socket(), server_hostname="a") as tls:
        for many in ({1: tls}, {1: plain, 2: tls}):
            with pytest.raises(InvalidInput, match="speaks TLS"):
                state.save_fds("a", many)
        state.save_fds("a", {1: plain})
    assert keys(state) == [("a", 1)]


def test_save_fds_of_a_loaded_state_copies_all_or_nothing() -> None:
    with opened(3) as fds:
        successor = loaded(State())
        with full_table(1, 2), pytest.raises(LimitExceeded, match="RLIMIT_NOFILE"):
            successor.save_fds("a", dict(enumerate(fds)))
        assert keys(successor) == []
        successor.save_fds("a", dict(enumerate(fds)))
        copies = successor.take_fds("a")
        assert not set(copies.values()) & set(fds)
        assert [os.eventfd_read(fd) for fd in copies.values()] == [1, 2, 3]
        close_all(copies.values())
        successor.close()


def test_save_fd_without_an_id_has_the_id_0() -> None:
    state = State()
    with socket.socket() as sock:
        state.save_fd("sock", sock)
        state.save_fd("number", 0)
        state.save_fd("named", fd=sock)
        assert list(state.fds()) == [
            *(("sock", 0, sock.fileno()), ("number", 0, 0), ("named", 0, sock.fileno()))
        ]
    with pytest.raises(InvalidInput, match="no descriptor"):
        state.save_fd("nothing")


# Sockets


def test_take_sockets_checks_the_first_and_makes_all_blocking() -> None:
    with ExitStack() as stack:
        pairs = [socket.socketpair() for _ in range(3)]
        for pair in pairs:
            stack.enter_context(pair[0])
            stack.enter_context(pair[1])
            pair[0].setblocking(False)
        state = State()
        state.save_fds("client", {id: pair[0] for id, pair in enumerate(pairs)})
        for arguments in ((), (socket.AF_UNIX, socket.SOCK_STREAM)):
            successor = loaded(state)
            taken = successor.take_sockets("client", *arguments)
            assert list(taken) == [0, 1, 2]
            assert successor.fd_count == 0
            for id, sock in taken.items():
                assert (sock.family, sock.type) == (socket.AF_UNIX, socket.SOCK_STREAM)
                assert os.get_blocking(sock.fileno())
                sock.send(b"%d" % id)
                assert pairs[id][1].recv(9) == b"%d" % id
                sock.close()
            successor.close()
        successor = loaded(state)
        for sock in successor.take_sockets("client", blocking=False).values():
            assert not os.get_blocking(sock.fileno())
            assert sock.gettimeout() == 0
            sock.close()
        successor.close()


@pytest.mark.parametrize("how", ["family", "type", "asked family", "file", "later file"])
def test_take_sockets_refuses_what_is_no_such_socket_and_takes_nothing(how: str) -> None:
    every: dict[str, dict[str, Any]] = {
        "family": {"family": socket.AF_INET, "type": socket.SOCK_STREAM},
        "type": {"family": socket.AF_UNIX, "type": socket.SOCK_DGRAM},
        "asked family": {"family": socket.AF_INET},
        "file": {},
        "later file": {"family": socket.AF_UNIX, "type": socket.SOCK_STREAM},
    }
    arguments = every[how]
    one, two = socket.socketpair()
    with one, two, opened(1) as fds:
        state = State()
        state.save_fds("a", [(0, one), (1, fds[0] if "file" in how else two), (2, one)])
        state.save_fd("b", 0)
        successor = loaded(state)
        before = open_fds()
        with pytest.raises(InvalidInput, match=r"\('a', [01]\)"):
            successor.take_sockets("a", **arguments)
        assert open_fds() == before
        assert keys(successor) == [("a", 0), ("a", 1), ("a", 2), ("b", 0)]
        successor.close()


# Order, by a model

names = st.sampled_from(["a", "b", "c", "\udcff"])
ids = st.integers(0, 4)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("save"), names, ids),
        st.tuples(st.just("save many"), names, st.lists(ids, unique=True)),
        st.tuples(st.just("take"), names, ids),
        st.tuples(st.just("delete"), names, ids),
        st.tuples(st.just("take many"), names),
        st.tuples(st.just("hand over")),
    ),
    max_size=40,
)


@settings(max_examples=300)
@given(operations)
def test_any_order_of_verbs_is_that_of_a_list(steps: list[tuple[Any, ...]]) -> None:
    """The descriptor of each key is standard input; a loaded state's are copies."""
    before = open_fds()
    state, model, taken = State(), [], list[int]()
    for what, *arguments in steps:
        name, id = (*arguments, None, None)[:2]
        if what == "save" and (name, id) not in model:
            state.save_fd(name, id, 0)
            model.append((name, id))
        elif what == "save many" and not any((name, one) in model for one in id):
            state.save_fds(name, dict.fromkeys(id, 0))
            model += [(name, one) for one in id]
        elif what == "take":
            taken.append(state.take_fd(name, id, default=0))
            assert (taken[-1] > 0) <= ((name, id) in model)
        elif what == "delete":
            state.delete_fd(name, id)
        elif what == "take many":
            found = state.take_fds(name)
            assert [(name, id) for id in found] == [key for key in model if key[0] == name]
            taken += found.values()
            model = [key for key in model if key[0] != name]
        elif what == "hand over":
            state, old = loaded(state), state
            old.close()
        if what in ("take", "delete") and (name, id) in model:
            model.remove((name, id))
        assert as_they_travel(state) == model
        assert state.fd_count == len(model)
        if what == "save many":  # the columns are there, until a question about a key
            continue
        assert keys(state) == model
        assert all((state.find_fd(*key) >= 0) == (key in model) for key in [("a", 0), ("b", 1)])
    successor = loaded(state)
    assert keys(successor) == model
    state.close()
    successor.close()
    close_all(fd for fd in taken if fd > 2)
    assert open_fds() == before


# Interrupts


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


class Interrupt(BaseException):
    """As KeyboardInterrupt."""


def interrupted(do: Callable[[], object], after: int) -> bool:
    """Raise Interrupt in `do` before the step number `after` of cprd/state; whether it came."""
    steps = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal steps
        if "/cprd/state/" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            steps += 1
            if steps == after:
                raise Interrupt
        return trace

    former = sys.gettrace()
    sys.settrace(trace)
    try:
        do()
    except Interrupt:
        return True
    finally:
        sys.settrace(former)
    return False


def mixed() -> State:
    state = State()
    for name, id in (("a", 0), ("b", 0), ("a", 1)):
        state.save_fd(name, id, 0)
    return state


def rowed() -> State:
    state = State()
    state.save_fds("a", {0: 0, 1: 0})
    state.save_fd("b", 0, 0)
    return state


def many() -> State:
    state = State()
    state.save_fd("b", 0, 0)
    state.save_fds("a", {0: 0, 1: 0})
    return state


VERBS: dict[str, Callable[[State], object]] = {
    "save_fd, a new name": lambda state: state.save_fd("c", 0, 0),
    "save_fd, the last name": lambda state: state.save_fd("b", 1, 0),
    "save_fd, another name": lambda state: state.save_fd("a", 2, 0),
    "save_fds": lambda state: state.save_fds("a", {7: 0, 8: 0}),
    "save_fds, a new name": lambda state: state.save_fds("c", {7: 0, 8: 0}),
    "delete_fd": lambda state: state.delete_fd("a", 1),
    "delete_fd, the last id": lambda state: state.delete_fd("b", 0),
    "find_fd": lambda state: state.find_fd("a", 1),
    "fds": lambda state: list(state.fds()),
    "columns": lambda state: state.columns(),
}


@pytest.mark.parametrize("made", [mixed, rowed, many], ids=["mixed", "in rows", "many"])
@pytest.mark.parametrize("verb", VERBS)
def test_an_interrupt_between_any_two_steps_leaves_a_whole_state(
    verb: str, made: Callable[[], State]
) -> None:
    """Before or after, never between; and what comes next is right."""
    do = VERBS[verb]
    before, done = made(), made()
    do(done)
    after = 0
    while True:
        after += 1
        state = made()
        came = interrupted(lambda state=state: do(state), after)  # type: ignore[misc]
        assert keys(state) in (keys(before), keys(done))
        _, ids, fds = state.columns()
        assert len(ids) == len(fds) == state.fd_count == len(keys(state))
        reached = keys(state)
        if reached == keys(before) and verb not in ("find_fd", "fds", "columns"):
            do(state)
            assert keys(state) == keys(done)
        for name in ("a", "b", "z"):
            state.save_fd(name, 99, 0)
        wanted = [*reached] if reached != keys(before) else keys(done)
        wanted = keys(before) if verb in ("find_fd", "fds", "columns") else wanted
        assert keys(state) == [*wanted, ("a", 99), ("b", 99), ("z", 99)]
        successor = loaded(state)
        assert keys(successor) == keys(state)
        successor.close()
        if not came:
            break
    assert after > 5


@pytest.mark.parametrize("verb", ["find_fd", "fds", "columns", "delete_fd"])
def test_an_interrupt_while_a_loaded_state_is_unfolded_leaves_it_whole(verb: str) -> None:
    built = mixed()
    after = 0
    came = True
    while came:
        after += 1
        state = loaded(built)
        numbers = set(state.columns()[2])
        came = interrupted(lambda state=state: VERBS[verb](state), after)  # type: ignore[misc]
        assert set(keys(built)) - {("a", 1)} <= set(keys(state)) <= set(keys(built))
        fds = [fd for _, _, fd in state.fds()]
        before = open_fds()
        state.close()
        assert open_fds() == before - len(fds)
        if verb == "delete_fd" and came and len(fds) == 2:
            close_all(fd for fd in numbers - set(fds) if is_open(fd))


@pytest.mark.parametrize("arguments", [(), (socket.AF_UNIX, socket.SOCK_STREAM)])
def test_an_interrupted_take_sockets_closes_no_number_twice(arguments: tuple[int, ...]) -> None:
    """A number that is closed twice may be somebody else's by then: fillers take each free one."""
    one, two = socket.socketpair()
    with one, two:
        built = State()
        built.save_fds("a", dict.fromkeys(range(3), one))
        after = 0
        came = True
        while came:
            after += 1
            state = loaded(built)
            taken: dict[int, socket.socket] = {}

            def take(state: State = state, taken: dict[int, socket.socket] = taken) -> None:
                taken.update(state.take_sockets("a", *arguments))

            numbers = {fd for _, _, fd in state.fds()}
            came = interrupted(take, after)
            lost = numbers - {fd for _, _, fd in state.fds()}
            lost -= {sock.fileno() for sock in taken.values()}
            assert len(lost) <= (3 if came else 0)
            fillers = [os.dup(0) for _ in range(5)]
            state.close()
            for sock in taken.values():
                sock.close()
            for fd in fillers:
                os.fstat(fd)  # still ours
            close_all(fillers)
            for fd in lost - set(fillers):
                try:
                    os.close(fd)
                except OSError:
                    pass  # its object closed it

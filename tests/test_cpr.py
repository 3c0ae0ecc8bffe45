"""The CPR stream: what real QEMUs sent, what a dying or hostile one may send, and whose each
descriptor is afterwards."""

from __future__ import annotations

import os
import resource
import select
import socket
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cprd import cpr
from cprd.errors import InvalidInput, LimitExceeded, Timeout, Unavailable
from cprd.vmstate import SocketChannel, Stream, Tape, drain
from tests.support.descriptors import inodes, memfds, nothing_leaks_inside, open_fds
from tests.support.patience import PATIENCE

# Streams captured from Debian's QEMU 10.0.2 and 11.1.3, element by element.
HEADER = "51435052 00000001"
RSDP = "01 00000013 2f726f6d406574632f616370692f7273647000 00000000 20"
LOADER = "01 00000016 2f726f6d406574632f7461626c652d6c6f6164657200 00000000 20"
TABLES = "01 00000015 2f726f6d406574632f616370692f7461626c657300 00000000 20"
PC_ROM = "01 00000007 70632e726f6d00 00000000 20"
PC_BIOS = "01 00000008 70632e62696f7300 00000000 20"
RAM0 = "01 00000005 72616d3000 00000000 20"
END = "00"
VFIO_HEAD = "05 15 43707253746174652f7666696f2064657669636573 00000001"


def stream_of(*parts: str) -> bytes:
    return bytes.fromhex(" ".join(parts))


Q35_10_0 = stream_of(HEADER, RSDP, LOADER, TABLES, PC_ROM, PC_BIOS, RAM0, END)
Q35_11_1 = stream_of(HEADER, RSDP, TABLES, PC_BIOS, LOADER, PC_ROM, RAM0, END, VFIO_HEAD, END)
MICROVM_10_0 = stream_of(HEADER, RSDP, LOADER, TABLES, PC_BIOS, RAM0, END)
STUB_11 = stream_of(HEADER, RAM0, END, VFIO_HEAD)
ONE_DEVICE = stream_of(
    HEADER, RAM0, END, VFIO_HEAD, "01 00000006 76666e3000 00 00000007 00000002 00000003", END
).replace(b"vfn0\0\0", b"vfio0\0")

CAPTURED = [
    pytest.param(Q35_10_0, 151, 6, cpr.PLAIN, id="10.0.2-q35-and-pc"),
    pytest.param(Q35_11_1, 179, 6, cpr.VFIO, id="11.1.3-q35"),
    pytest.param(MICROVM_10_0, 134, 5, cpr.PLAIN, id="10.0.2-microvm"),
]
FORMS = [*CAPTURED, pytest.param(STUB_11, 24 + 27, 1, cpr.STUB, id="without-iommufd")]


@contextmanager
def line(timeout: float | None = 20) -> Iterator[tuple[socket.socket, SocketChannel]]:
    """A sender's plain socket and the receiving channel."""
    left, right = socket.socketpair()
    with left, SocketChannel(right, timeout) as channel:
        yield left, channel


@pytest.fixture(autouse=True)
def own_state_is_empty() -> Iterator[None]:
    before = open_fds()
    yield
    cpr.state_close()
    cpr.clear()
    assert open_fds() == before


def offsets_of(stream: bytes, count: int) -> list[int]:
    return [offset for offset, _ in cpr.encode(cpr.parse(stream, range(count))).marks]


def send_message(sock: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    if fds:
        assert socket.send_fds(sock, [data], list(fds)) == len(data)
    else:
        sock.sendall(data)


# What real QEMUs sent


@pytest.mark.parametrize(("stream", "size", "count", "form"), FORMS)
def test_a_captured_stream_decodes_and_encodes_to_the_same_bytes(
    stream: bytes, size: int, count: int, form: cpr.Form
) -> None:
    assert len(stream) == size
    state = cpr.parse(stream, range(count))
    assert state.form == form
    assert [element.fd for element in state.fds] == list(range(count))
    assert [element.id for element in state.fds] == [0] * count
    assert state.fds[-1].name == "ram0"
    again = cpr.encode(state)
    assert again.data == stream
    assert [stream[offset] for offset, _ in again.marks] == [0x20] * count
    assert len(list(again.pieces())) == 2 * count + 1


def test_the_names_of_a_q35_in_its_order() -> None:
    assert [element.name for element in cpr.parse(Q35_11_1, range(6)).fds] == [
        "/rom@etc/acpi/rsdp",
        "/rom@etc/acpi/tables",
        "pc.bios",
        "/rom@etc/table-loader",
        "pc.rom",
        "ram0",
    ]


def test_a_vfio_device_keeps_its_four_numbers() -> None:
    state = cpr.parse(ONE_DEVICE, range(1))
    (device,) = state.vfio_devices
    assert (device.name, device.devid, device.ioas_id, device.hwpt_id) == ("vfio0", 7, 2, 3)
    assert cpr.encode(state).data == ONE_DEVICE


def test_a_downgrade_strips_an_empty_subsection() -> None:
    state = cpr.parse(Q35_11_1, range(6))
    plain = cpr.downgrade(state)
    assert cpr.encode(plain).data == Q35_11_1[:-28]
    assert len(cpr.encode(plain).data) == 151
    assert cpr.encode(state, cpr.PLAIN).data == cpr.encode(plain).data
    assert cpr.encode(plain, cpr.VFIO).data == Q35_11_1


def test_a_downgrade_that_would_lose_a_device_is_refused() -> None:
    state = cpr.parse(ONE_DEVICE, range(1))
    for lose in (
        cpr.downgrade,
        lambda s: cpr.encode(s, cpr.PLAIN),
        lambda s: cpr.encode(s, "stub"),
    ):
        with pytest.raises(cpr.VMStateError, match="has 1 devices") as caught:
            lose(state)
        assert caught.value.path == "CprState/vfio devices.vfio_devices"


# What a dying or hostile sender may send


@pytest.mark.parametrize(("stream", "size", "count", "form"), FORMS)
def test_a_stream_cut_anywhere_is_refused(
    stream: bytes, size: int, count: int, form: cpr.Form
) -> None:
    # The only prefixes that are whole streams themselves: without the subsection, or its list.
    whole = {cpr.PLAIN: set(), cpr.VFIO: {151, 178}, cpr.STUB: {24}}[form]
    places = offsets_of(stream, count)
    for cut in range(size):
        fds = range(sum(1 for place in places if place < cut))
        if cut in whole:
            assert cpr.encode(cpr.parse(stream[:cut], fds)).data == stream[:cut]
            continue
        with pytest.raises(cpr.Truncated):
            cpr.parse(stream[:cut], fds)


@pytest.mark.parametrize(("stream", "size", "count", "form"), FORMS)
def test_a_byte_after_the_end_is_refused(
    stream: bytes, size: int, count: int, form: cpr.Form
) -> None:
    for extra in (b"\0", b"\1", b"\5", b" ", b"QCPR"):
        if form == cpr.STUB and extra == b"\0":
            continue  # that is the other form, with an empty list
        with pytest.raises(cpr.VMStateError):
            cpr.parse(stream + extra, range(count))


@pytest.mark.parametrize(("stream", "size", "count", "form"), FORMS)
def test_descriptors_missing_or_too_many_are_refused(
    stream: bytes, size: int, count: int, form: cpr.Form
) -> None:
    for number in range(count):
        with pytest.raises(cpr.VMStateError, match="no descriptor came") as caught:
            cpr.parse(stream, range(number))
        assert caught.value.path == f"CprState.fds[{number}].fd"
    with pytest.raises(cpr.VMStateError, match="1 more descriptors than elements"):
        cpr.parse(stream, range(count + 1))


@pytest.mark.parametrize(
    ("stream", "path", "what"),
    [
        (b"", "the header", "whole"),
        (b"QEVM" + Q35_10_0[4:], "the magic", "0x5145564d"),
        (stream_of("51435052 00000002", END), "the version", "only 1"),
        (stream_of(HEADER, "02"), "CprState.fds[0]", "0x02"),
        (stream_of(HEADER, "01 ffffffff"), "CprState.fds[0].name", "limit is 256"),
        (stream_of(HEADER, RAM0, "01 00000101"), "CprState.fds[1].name", "limit is 256"),
        (stream_of(HEADER, "01 00000000"), "CprState.fds[0].name", "no NUL"),
        (stream_of(HEADER, "01 00000001 00 00000000 20"), "CprState.fds[0].name", "empty"),
        (stream_of(HEADER, "01 00000002 6161"), "CprState.fds[0].name", "no NUL"),
        (stream_of(HEADER, "01 00000003 610000"), "CprState.fds[0].name", "NUL inside"),
        (stream_of(HEADER, "01 00000002 6100 00000000 21"), "CprState.fds[0].fd", "0x21"),
        (stream_of(HEADER, RAM0, RAM0, END), "CprState.fds[1]", "there before"),
        (stream_of(HEADER, END, "05 0a 43707253746174652f78"), "CprState", "not known"),
        (stream_of(HEADER, END, VFIO_HEAD, END, VFIO_HEAD, END), "CprState", "comes twice"),
        (stream_of(HEADER, END, VFIO_HEAD[:-1] + "2"), "CprState/vfio devices", "newer"),
        (stream_of(HEADER, END, VFIO_HEAD[:-1] + "0"), "CprState/vfio devices", "older"),
        (
            stream_of(HEADER, END, VFIO_HEAD, "01 7fffffff"),
            "CprState/vfio devices.vfio_devices[0].name",
            "limit is 256",
        ),
    ],
)
def test_a_damaged_field_is_named(stream: bytes, path: str, what: str) -> None:
    with pytest.raises(cpr.VMStateError, match=what) as caught:
        cpr.parse(stream, range(2))
    assert caught.value.path == path
    assert str(caught.value).startswith(path + ": ")


def test_announced_gigabytes_are_not_allocated() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(cpr.VMStateError):
            cpr.parse(stream_of(HEADER, "01 7fffffff"), ())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_a_descriptor_later_than_its_dummy_byte_is_refused() -> None:
    places = offsets_of(Q35_10_0, 6)
    assert len(cpr.parse(Q35_10_0, range(6), places).fds) == 6
    for late in range(6):
        moved = [*places[:late], *(place + 1 for place in places[late:])]
        with pytest.raises(cpr.VMStateError, match="came late") as caught:
            cpr.parse(Q35_10_0, range(6), moved)
        assert caught.value.path == f"CprState.fds[{late}].fd"


@given(
    st.sampled_from([Q35_10_0, Q35_11_1, MICROVM_10_0, STUB_11, ONE_DEVICE]),
    st.lists(st.tuples(st.integers(0, 200), st.binary(max_size=4), st.integers(0, 4)), max_size=4),
    st.integers(0, 8),
)
def test_a_mutilated_stream_is_refused_or_understood_to_the_last_byte(
    stream: bytes, wounds: list[tuple[int, bytes, int]], count: int
) -> None:
    for at, new, gone in wounds:
        stream = stream[:at] + new + stream[at + gone :]
    with nothing_leaks_inside(), memfds(count) as fds:
        tape = Tape(stream, [os.dup(fd) for fd in fds] if stream else ())
        try:
            received, state = cpr.receive(tape)
        except cpr.VMStateError:
            pass
        else:
            assert cpr.encode(state).data == stream
            assert inodes([element.fd for element in state.fds]) == inodes(fds)
            received.close()
        tape.close()


names = st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1, max_size=60)
i32 = st.integers(-(1 << 31), (1 << 31) - 1)
u32 = st.integers(0, (1 << 32) - 1)


@given(
    st.lists(st.tuples(names, i32), unique=True, max_size=40),
    st.lists(st.tuples(names, i32, u32, u32), max_size=5),
)
def test_any_state_comes_back(
    keys: list[tuple[str, int]], devices: list[tuple[str, int, int, int]]
) -> None:
    state = cpr.CprState(
        [cpr.CprFd(name, id, n) for n, (name, id) in enumerate(keys)],
        [cpr.CprVfioDevice(*device) for device in devices],
        cpr.VFIO,
    )
    stream = cpr.encode(state)
    again = cpr.parse(stream.data, range(len(keys)))
    assert repr(again) == repr(state)
    assert cpr.encode(again).data == stream.data


def test_a_name_that_is_no_utf8_survives() -> None:
    stream = stream_of(HEADER, "01 00000003 ff80 00 ffffffff 20", END)
    state = cpr.parse(stream, range(1))
    assert state.fds[0].id == -1
    assert cpr.encode(state).data == stream


# Arrangements over a real socket


def many(count: int) -> bytes:
    return cpr.encode(cpr.CprState([cpr.CprFd(f"dev{n}/vram", 0, n) for n in range(count)])).data


@pytest.mark.parametrize("count", [0, 1, 6, 22, 60])
def test_one_descriptor_a_byte_as_qemu_sends(count: int) -> None:
    with nothing_leaks_inside(), memfds(count) as fds, line() as (left, channel):
        marks = list(zip(offsets_of(many(count), count), fds, strict=True))
        sender = SocketChannel(left)
        sender.send_stream(Stream(many(count), marks))
        sender.finish()
        tape, state = cpr.receive(channel)
        with tape:
            assert tape.data == many(count)
            assert inodes([element.fd for element in state.fds]) == inodes(fds)
            assert not any(os.get_inheritable(fd) for fd in tape.fds)


@pytest.mark.parametrize("count", [1, 16, 60, 253])
def test_all_descriptors_in_the_first_message(count: int) -> None:
    for split in (1, 9, len(many(count))):
        with nothing_leaks_inside(), memfds(count) as fds, line() as (left, channel):
            send_message(left, many(count)[:split], fds)
            left.sendall(many(count)[split:])
            left.shutdown(socket.SHUT_WR)
            tape, state = cpr.receive(channel)
            with tape:
                assert inodes([element.fd for element in state.fds]) == inodes(fds)


@given(st.data())
def test_any_legal_arrangement(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    stream = many(count)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=30)))
    starts = [0, *cuts]
    dummies = offsets_of(stream, count)
    carriers: list[int] = []  # for each descriptor the message that carries it
    for place in dummies:
        latest = max(n for n, start in enumerate(starts) if start <= place)
        carriers.append(data.draw(st.integers(carriers[-1] if carriers else 0, latest)))
    with nothing_leaks_inside(), memfds(count) as fds, line() as (left, channel):
        for n, (start, end) in enumerate(zip(starts, [*cuts, len(stream)], strict=True)):
            carried = [fd for fd, by in zip(fds, carriers, strict=True) if by == n]
            send_message(left, stream[start:end], carried)
        left.shutdown(socket.SHUT_WR)
        tape, state = cpr.receive(channel)
        with tape:
            assert inodes([element.fd for element in state.fds]) == inodes(fds)


@pytest.mark.parametrize("cut", range(0, 151, 7))
def test_a_sender_that_dies_half_way_leaves_no_descriptor(cut: int) -> None:
    with nothing_leaks_inside(), memfds(6) as fds, line() as (left, channel):
        places = [place for place in offsets_of(Q35_10_0, 6) if place < cut]
        marks = list(zip(places, fds, strict=False))
        SocketChannel(left).send_stream(Stream(Q35_10_0[:cut], marks))
        left.close()
        with pytest.raises(cpr.Truncated):
            cpr.receive(channel)


def test_a_wrong_number_of_descriptors_over_a_socket_is_refused() -> None:
    for count in (0, 5, 7):
        with nothing_leaks_inside(), memfds(count) as fds, line() as (left, channel):
            send_message(left, Q35_10_0, fds)
            left.shutdown(socket.SHUT_WR)
            with pytest.raises(cpr.VMStateError, match="descriptor"):
                cpr.receive(channel)


def test_descriptors_lost_at_the_limit_are_an_error_after_the_stream_was_read_to_its_end() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with nothing_leaks_inside(), memfds(10) as fds, line() as (left, channel):
        marks = list(zip(offsets_of(many(10), 10), fds, strict=True))
        SocketChannel(left).send_stream(Stream(many(10), marks))
        left.shutdown(socket.SHUT_WR)
        free = os.dup(left.fileno())  # the lowest free number
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 2, hard))
        try:
            with pytest.raises(LimitExceeded, match="RLIMIT_NOFILE"):
                cpr.receive(channel)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert channel.receive() == (b"", [])


def test_a_stream_beyond_the_limits_is_read_on_and_refused() -> None:
    with nothing_leaks_inside(), memfds(10) as fds, line() as (left, channel):
        marks = list(zip(offsets_of(many(10), 10), fds, strict=True))
        SocketChannel(left).send_stream(Stream(many(10), marks))
        left.shutdown(socket.SHUT_WR)
        with pytest.raises(LimitExceeded, match="3 descriptors"):
            drain(channel, max_fds=3)
        assert channel.receive() == (b"", [])


def test_a_mute_sender_is_a_timeout_that_leaks_nothing() -> None:
    with nothing_leaks_inside(), memfds(1) as fds, line(timeout=0.05) as (left, channel):
        send_message(left, many(1)[:-1], fds)
        with pytest.raises(Timeout, match=r"0\.05 s"):
            cpr.receive(channel)


def test_time_runs_out_even_when_bytes_are_always_ready() -> None:
    with line() as (left, channel):
        left.sendall(b"x")
        channel.restart_clock(0)
        with pytest.raises(Timeout):
            channel.receive()


def test_a_receiver_that_does_not_read_is_a_timeout() -> None:
    with nothing_leaks_inside(), line(timeout=0.05) as (_, channel):
        with pytest.raises(Timeout, match="did not read"):
            channel.send(bytes(1 << 22))


def test_a_receiver_that_is_gone_is_unavailable() -> None:
    with nothing_leaks_inside(), line() as (left, channel):
        left.close()
        with pytest.raises(Unavailable):
            channel.send(b"x")


def test_a_closed_descriptor_is_named_before_it_is_sent() -> None:
    with nothing_leaks_inside(), line() as (_, channel):
        gone = os.memfd_create("gone")
        os.close(gone)
        with pytest.raises(InvalidInput, match=f"descriptor {gone} "):
            channel.send(b" ", gone)


def test_a_channel_over_the_wrong_kind_of_socket_is_refused() -> None:
    for family, kind in ((socket.AF_UNIX, socket.SOCK_SEQPACKET), (socket.AF_INET, 1)):
        with socket.socket(family, kind) as sock, pytest.raises(InvalidInput, match="UNIX stream"):
            SocketChannel(sock)


def test_a_tape_replays_with_each_descriptor_beside_its_dummy_byte() -> None:
    with nothing_leaks_inside(), memfds(6) as fds, line() as (left, channel):
        send_message(left, Q35_11_1, fds)
        left.shutdown(socket.SHUT_WR)
        tape, state = cpr.receive(channel)
        with tape, Tape() as replayed, line() as (left2, channel2):
            sender = SocketChannel(left2)
            sender.send_stream(cpr.encode(state))
            sender.finish()
            pieces = []
            while (piece := channel2.receive())[0]:
                pieces.append(piece)
                replayed.feed(*piece)
            assert [len(numbers) for _, numbers in pieces] == [1, 1, 1, 1, 1, 1, 0]
            assert [data[-1:] for data, _ in pieces[:-1]] == [b" "] * 6
            assert replayed.data == Q35_11_1
            assert inodes(replayed.fds) == inodes(fds)


# The process's own state


def test_what_one_side_saves_the_other_finds() -> None:
    with nothing_leaks_inside(), memfds(2) as (ram, rom):
        left, right = socket.socketpair()
        right.settimeout(PATIENCE)
        cpr.save_fd("ram0", 0, ram)
        cpr.save_fd("dev/rom", 3, rom)
        cpr.state_save(left)
        assert cpr.state_ioc() is not None
        cpr.state_load(right)
        assert left.fileno() == -1  # the channel of the save went with the load's
        assert next(iter(cpr.fds()))[:2] == ("ram0", 0)
        got = cpr.find_fd("ram0", 0)
        assert inodes([got]) == inodes([ram])
        assert got != ram
        assert cpr.find_fd("ram0", 1) == cpr.find_fd("ram", 0) == -1
        cpr.state_close()
        cpr.clear()  # closes dev/rom, which nobody found
        os.fstat(got)
        os.close(got)


def test_a_save_half_closes_and_sees_the_hang_up_of_the_loader() -> None:
    left, right = socket.socketpair()
    with right, memfds(1) as (ram,):
        cpr.save_fd("ram0", 0, ram)
        cpr.state_save(left)
        line = cpr.state_ioc()
        assert isinstance(line, SocketChannel)
        with drain(SocketChannel(right, 20)) as tape:
            assert cpr.parse(tape.data, tape.fds, tape.offsets).form == cpr.PLAIN
        poll = select.poll()
        poll.register(left, select.POLLIN)
        assert poll.poll(0) == []
        right.close()
        line.wait_hangup()


@pytest.mark.parametrize(("stream", "size", "count", "form"), FORMS)
def test_a_loaded_state_is_saved_again_in_its_form(
    stream: bytes, size: int, count: int, form: cpr.Form
) -> None:
    with nothing_leaks_inside(), memfds(count) as fds:
        cpr.state_load(Tape(stream, [os.dup(fd) for fd in fds]))
        assert cpr.state_form() == form
        with Tape() as out:
            cpr.state_save(out)
            assert out.data == stream
            assert inodes(out.fds) == inodes(fds)
        with Tape() as out:
            cpr.state_save(out, cpr.PLAIN)
            assert out.data == cpr.encode(cpr.parse(stream, range(count)), cpr.PLAIN).data
        cpr.clear()


def test_a_failed_load_changes_nothing_and_leaks_nothing() -> None:
    with nothing_leaks_inside(), memfds(6) as fds, memfds(1) as (mine,):
        cpr.save_fd("mine", 0, mine)
        for damaged in (Q35_10_0[:-1], Q35_10_0 + b"x", b"QEVM" + Q35_10_0[4:]):
            with line() as (left, channel):
                send_message(left, damaged, fds)
                left.shutdown(socket.SHUT_WR)
                with pytest.raises(cpr.VMStateError):
                    cpr.state_load(channel)
                assert channel.sock.fileno() >= 0  # still its owner's
            assert cpr.state_ioc() is None
            assert list(cpr.fds()) == [("mine", 0, mine)]


def test_a_load_by_descriptor_number_leaves_the_number_to_its_owner() -> None:
    with nothing_leaks_inside(), memfds(1) as (ram,):
        left, right = socket.socketpair()
        with left, right:
            cpr.save_fd("ram0", 0, ram)
            cpr.state_save(left.fileno())
            cpr.state_close()
            assert left.fileno() >= 0
            cpr.state_load(right.fileno())
            cpr.state_close()
            assert right.fileno() >= 0
        cpr.clear()


def test_a_key_used_twice_is_refused() -> None:
    with memfds(2) as (one, two):
        cpr.save_fd("ram0", 0, one)
        with pytest.raises(InvalidInput, match="'ram0', 0 is used already"):
            cpr.save_fd("ram0", 0, two)
        cpr.save_fd("ram0", 1, two)
        cpr.delete_fd("ram0", 0)
        cpr.delete_fd("ram0", 0)
        assert cpr.find_fd("ram0", 0) == -1
        cpr.save_fd("ram0", 0, two)
        assert cpr.find_fd("ram0", 0) == two
        os.fstat(one)


@pytest.mark.parametrize(
    ("name", "id", "fd", "what"),
    [
        ("", 0, 0, "name"),
        ("x" * 256, 0, 0, "name"),
        ("a\0b", 0, 0, "name"),
        ("x", 1 << 31, 0, "id"),
        ("x", -(1 << 31) - 1, 0, "id"),
        ("x", 0, -1, "fd"),
    ],
)
def test_a_bad_key_is_refused_at_once(name: str, id: int, fd: int, what: str) -> None:
    with pytest.raises(InvalidInput, match=f"^{what}: "):
        cpr.save_fd(name, id, fd)
    assert list(cpr.fds()) == []


def test_deleting_a_loaded_descriptor_that_nobody_found_closes_it() -> None:
    with nothing_leaks_inside(), memfds(1) as (ram,):
        cpr.state_load(Tape(stream_of(HEADER, RAM0, END), [os.dup(ram)]))
        (got,) = (fd for _, _, fd in cpr.fds())
        cpr.delete_fd("ram0", 0)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(got)


def test_an_object_is_kept_alive_until_it_was_sent() -> None:
    with nothing_leaks_inside():
        left, right = socket.socketpair()
        with right:
            cpr.save_fd("listener", 0, left)
            del left
            with Tape() as out:
                cpr.state_save(out)
                assert len(out.fds) == 1
            right.send(b"alive")
            cpr.delete_fd("listener", 0)
            with pytest.raises(BrokenPipeError):
                right.send(b"gone")


def test_an_unknown_form_is_refused_before_anything_is_sent() -> None:
    with Tape() as out:
        with pytest.raises(InvalidInput, match="form"):
            cpr.state_save(out, "10.3")  # type: ignore[arg-type]
        assert not out.data

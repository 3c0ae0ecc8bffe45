"""cprd.cpr against real QEMU, in both directions: this process loads what a QEMU saved, is all that
is left of the VM for a while, and saves it into the next QEMU. No daemon is involved."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cprd import cpr
from cprd.errors import LimitExceeded
from cprd.qemu import stream
from cprd.qemu.monitor import Monitor
from cprd.vmstate import SocketChannel, Tape
from tests.qemu.machine import Machine
from tests.support.patience import PATIENCE, until

pytestmark = pytest.mark.usefixtures("nothing_leaks")

COUNTER = 0x8000  # where the guest counts, in its RAM
AUXILIARY = {"/rom@etc/acpi/tables", "/rom@etc/table-loader", "/rom@etc/acpi/rsdp"}
BASE = AUXILIARY | {"ram0", "pc.bios", "pc.rom"}
EIGHT_DISPLAYS = [word for _ in range(8) for word in ("-device", "bochs-display")]


class Transfer:
    """One VM between its QEMUs, of which there is at most one: what `cprctl qemu` does, by hand."""

    def __init__(self, place: Path, *extra: str, **options: Any) -> None:
        self.vm = Machine(place, "no cprd here", *extra, **options)
        self._stack = contextlib.ExitStack()
        self._pool = self._stack.enter_context(ThreadPoolExecutor(1))
        self._stack.callback(self.vm.close)
        self._listeners: dict[str, socket.socket] = {}
        self.boot()
        self.vm.goes_on()

    def boot(self, *extra: str) -> subprocess.Popen[bytes]:
        with open(self.vm.err, "ab") as err:
            process = subprocess.Popen(
                [*self.vm.command, *extra], stdin=subprocess.DEVNULL, stdout=err, stderr=err
            )
        self.vm.processes.append(process)
        return process

    def path(self, name: str) -> str:
        return str(self.vm.place / name)

    def migrate(self) -> tuple[SocketChannel, Future[Any]]:
        """Tell the QEMU to hand over to us: the CPR channel, and the answer, which QEMU gives once
        that channel has been read."""
        for kind in ("cpr", "main"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path(f"{kind}-in"))
            listener = self._stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(self.path(f"{kind}-in"))
            listener.listen(1)
            listener.settimeout(PATIENCE)
            self._listeners[kind] = listener
        unix = {"transport": "socket", "type": "unix"}
        channels = [
            {"channel-type": kind, "addr": {**unix, "path": self.path(f"{kind}-in")}}
            for kind in ("cpr", "main")
        ]

        def ask(monitor: Monitor) -> None:
            monitor.execute("migrate-set-parameters", mode="cpr-transfer")
            monitor.execute("migrate", channels=channels)

        answer = self._pool.submit(self.vm.ask, ask)
        return SocketChannel(self._listeners["cpr"].accept()[0], PATIENCE), answer

    def stop_listening(self) -> None:
        for listener in self._listeners.values():
            listener.close()

    def take_main(self) -> bytes:
        """The main stream, after the CPR channel was hung up; the QEMU has ended on return."""
        main = bytearray()
        with self._listeners["main"].accept()[0] as sock:
            sock.settimeout(PATIENCE)
            while data := sock.recv(1 << 18):
                main += data
        self.stop_listening()
        assert stream.is_whole(main)
        self.vm.await_status("postmigrate")
        self.vm.execute("quit")
        assert self.vm.processes[-1].wait(PATIENCE) == 0
        assert self.vm.alive() == []
        return bytes(main)

    def wait_for_state(self) -> SocketChannel:
        """Start the next QEMU: the channel on which it waits for its CPR state."""
        words: list[str] = []
        for kind in ("main", "cpr"):
            words += [
                "-incoming",
                f'{{"channel-type":"{kind}","addr":{{"transport":"socket","type":"unix",'
                f'"path":"{self.path(kind)}"}}}}',
            ]
        process = self.boot(*words)
        return SocketChannel(self._connect("cpr", process), PATIENCE)

    def give_main(self, main: bytes) -> None:
        with self._connect("main", self.vm.processes[-1]) as sock:
            sock.sendall(main)

    def _connect(self, name: str, process: subprocess.Popen[bytes]) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)

        def listens() -> bool:
            assert process.poll() is None, self.vm.said()
            return sock.connect_ex(self.path(name)) == 0

        until(listens, lambda: f"no QEMU at {name}")
        return sock

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def transfer() -> Iterator[Any]:
    """transfer(*extra, **options): a VM with its guest counting; everything ends with the test."""
    with contextlib.ExitStack() as stack:

        def make(*extra: str, **options: Any) -> Transfer:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cprd-cpr.")))
            made = Transfer(place, *extra, **options)
            stack.callback(made.close)
            return made

        yield make
    cpr.state_close()
    cpr.clear()


def counter_in(ram: int) -> int:
    return int(struct.unpack("<I", os.pread(ram, 4, COUNTER))[0])


@pytest.mark.parametrize(("machine", "smp"), [("q35", 1), ("pc", 2)])
def test_a_guest_outlives_its_qemus_in_the_table_of_this_process(
    transfer: Any, machine: str, smp: int
) -> None:
    between = transfer(machine=machine, smp=smp)
    for _ in range(2):
        channel, answer = between.migrate()
        cpr.state_load(channel)
        answer.result(PATIENCE)
        assert cpr.state_ioc() is channel
        assert between.vm.status() == "running"  # as long as we have not hung up
        cpr.state_close()
        main = between.take_main()

        found = {(name, id): cpr.find_fd(name, id) for name, id, _ in cpr.fds()}
        assert found.keys() == {(name, 0) for name in BASE}
        ram = found["ram0", 0]
        assert os.fstat(ram).st_size == 128 << 20
        assert all(
            os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:") for fd in found.values()
        )
        # The guest stopped between two of its lines: the RAM in our hands is what it counted in.
        assert counter_in(ram) in (between.vm.ticks(), between.vm.ticks() + 1)

        channel = between.wait_for_state()
        cpr.state_save(channel)
        channel.wait_hangup()
        cpr.state_close()
        between.give_main(main)
        between.vm.goes_on()
        assert counter_in(ram) >= between.vm.ticks() - 1  # the same RAM, not a copy of it
        for (name, id), fd in found.items():
            cpr.delete_fd(name, id)
            os.close(fd)


@pytest.mark.parametrize(
    ("extra", "count"),
    [pytest.param([], 6, id="6"), pytest.param(EIGHT_DISPLAYS, 22, id="22-descriptors")],
)
def test_what_a_qemu_sent_encodes_to_the_same_bytes_and_another_one_takes_it(
    transfer: Any, extra: list[str], count: int
) -> None:
    between = transfer(*extra)
    channel, answer = between.migrate()
    tape, state = cpr.receive(channel)
    with tape:
        answer.result(PATIENCE)
        again = cpr.encode(state)
        assert again.data == tape.data
        assert [fd for _, fd in again.marks] == tape.fds
        assert len(state.fds) == count
        assert {element.name for element in state.fds} >= BASE
        channel.close()
        main = between.take_main()

        with between.wait_for_state() as channel:
            channel.send_stream(again)
            channel.finish()
            channel.wait_hangup()
        between.give_main(main)
        between.vm.goes_on()


def test_a_qemu_takes_other_descriptors_of_the_same_memory_in_another_order(transfer: Any) -> None:
    between = transfer()
    channel, answer = between.migrate()
    tape, state = cpr.receive(channel)
    with tape, Tape() as copied:
        answer.result(PATIENCE)
        channel.close()
        main = between.take_main()
        copied.send_stream(cpr.encode(state))  # (a tape duplicates what is sent to it)
        tape.close()
        twin = cpr.parse(copied.data, copied.fds, copied.offsets)
        twin.fds.reverse()
        with between.wait_for_state() as channel:
            channel.send_stream(cpr.encode(twin))
            channel.finish()
            channel.wait_hangup()
        between.give_main(main)
        between.vm.goes_on()


def test_a_qemu_runs_on_when_its_descriptors_do_not_fit_this_process(transfer: Any) -> None:
    between = transfer()
    cpr.save_fd("mine", 0, 0)
    channel, answer = between.migrate()
    answer.result(PATIENCE)  # its thread has given back the descriptors of the monitor
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    first_free = os.dup(0)
    os.close(first_free)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (first_free + 2, limits[1]))
        with pytest.raises(LimitExceeded, match="RLIMIT_NOFILE"):
            cpr.state_load(channel)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert list(cpr.fds()) == [("mine", 0, 0)]  # what was there before
    between.stop_listening()  # in this order: QEMU must find no main channel
    channel.close()
    between.vm.until(
        lambda: between.vm.ask(lambda monitor: monitor.migration()) == "failed", "failed"
    )
    between.vm.goes_on()
    assert between.vm.status() == "running"

    channel, answer = between.migrate()  # and the next attempt is whole
    cpr.state_load(channel)
    answer.result(PATIENCE)
    assert {name for name, _, _ in cpr.fds()} == BASE
    cpr.state_close()
    between.take_main()


def test_a_qemu_refuses_the_streams_that_we_refuse(transfer: Any) -> None:
    between = transfer()
    channel, answer = between.migrate()
    tape, state = cpr.receive(channel)
    with tape:
        answer.result(PATIENCE)
        channel.close()
        main = between.take_main()
        whole = cpr.encode(cpr.downgrade(state))
        cut = bytes(whole.data[:-1])  # without the end of the list: what a dead sender leaves
        with pytest.raises(cpr.Truncated):
            cpr.parse(cut, tape.fds, tape.offsets)
        with between.wait_for_state() as channel:
            channel.send_stream(type(whole)(cut, whole.marks))
            channel.finish()
            assert between.vm.processes[-1].wait(PATIENCE) == 1
        with between.wait_for_state() as channel:  # the same descriptors serve the next one
            channel.send_stream(cpr.encode(state))
            channel.finish()
            channel.wait_hangup()
        between.give_main(main)
        between.vm.goes_on()

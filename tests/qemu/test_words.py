"""What is read from a command line and from a stream, without any QEMU."""

from __future__ import annotations

import json
import socket
import struct
from contextlib import suppress
from pathlib import Path

import pytest

import cprd
from cprd.cpr import PLAIN, STUB, VFIO, CprFd, CprState, CprVfioDevice, encode
from cprd.qemu import stream
from cprd.qemu.command import Command, keyed
from cprd.qemu.errors import Refused
from cprd.qemu.examine import about_command_line
from cprd.qemu.hold import Held, Origin, pieces
from cprd.qemu.process import Process
from cprd.qemu.sockets import refuse_taken

WORDS = [
    "prlimit", "--nofile=4096", "qemu-system-x86_64", "-nodefaults", "-enable-kvm", "-m", "1G",
    "-append", "-not -an -option", "disk.img",
    "-chardev", "socket,id=mon,path=/run/vm/a,,b.qmp,server=on,wait=off",
    "-mon", "chardev=mon,mode=control",
    "-chardev", "socket,id=out,path=/run/vm/out,server=off",
    "-chardev", "file,id=log,path=/var/log/vm,append=on",
    "-serial", "file:/tmp/serial",
    "-monitor", "unix:/run/vm/hmp,server,nowait",
]  # fmt: skip


def test_the_qemu_is_found_behind_its_wrappers_and_values_are_no_options() -> None:
    command = Command(WORDS)
    assert command.wrappers == ["prlimit", "--nofile=4096"]
    assert list(command.values("m")) == ["1G"]
    assert list(command.values("append")) == ["-not -an -option"]
    assert not any(name.startswith("not") for name, _ in command.options)


def test_only_what_listens_is_a_listening_path() -> None:
    command = Command(WORDS)
    assert sorted(command.listening()) == [
        ("-chardev", "/run/vm/a,b.qmp"),
        ("-monitor", "/run/vm/hmp"),
    ]
    assert command.monitor_path() == "/run/vm/a,b.qmp"


def test_files_that_the_next_qemu_would_empty() -> None:
    assert Command(WORDS).truncating() == ["/tmp/serial"]
    logs = "-D /1 -trace enable=x,file=/2 -audiodev wav,id=a,path=/3 -trace y -d unimp"
    assert Command(["kvm", *logs.split(" ")]).truncating() == ["/1", "/2", "/3"]


def test_qmp_is_preferred_and_hmp_is_no_qmp() -> None:
    assert Command(["kvm", "-qmp", "unix:q,server=on"]).monitor_path() == "q"
    assert Command(["kvm", "-monitor", "unix:q,server=on"]).monitor_path() == ""
    assert Command(["kvm", "-qmp", "unix:q"]).monitor_path() == ""


@pytest.mark.parametrize("hidden", ["-S", "-daemonize", "--incoming", "-loadvm", "-snapshot"])
@pytest.mark.parametrize(
    "flag", ["-enable-sync-profile", "-perfmap", "-jitdump", "-one-insn-per-tb", "-of-qemu-99"]
)
def test_nothing_that_is_refused_hides_behind_a_flag(flag: str, hidden: str) -> None:
    with pytest.raises(cprd.InvalidInput, match=hidden.removeprefix("-")):
        Command(["qemu-system-x86_64", "-m", "1G", flag, hidden, "x"])
    assert Command(["kvm", flag, "-qmp", "unix:q,server=on"]).monitor_path() == "q"


@pytest.mark.parametrize("option", ["-append", "-name"])
def test_free_text_may_look_like_an_option(option: str) -> None:
    command = Command(["qemu-system-x86_64", option, "-S", "-m", "1G"])
    assert list(command.values(option[1:])) == ["-S"]
    assert list(command.values("m")) == ["1G"]


def test_a_disk_that_forgets_is_refused() -> None:
    with pytest.raises(cprd.InvalidInput, match="snapshot=on"):
        Command(["kvm", "-drive", "file=d,if=virtio,snapshot=on"])
    assert Command(["kvm", "-drive", "file=d", "-drive", "file=d,snapshot=off"])


MONITORS = [
    "kvm", "-qmp-pretty", "unix:/p,server=on", "-qmp", "unix:/q,server=on", "-monitor",
    "unix:/h,server=on", "-chardev", "socket,id=c,path=/c,server=on", "-mon",
    "chardev=c,mode=control", "-chardev", "socket,id=d,path=/d,server=on", "-mon", "chardev=d",
    "-qmp", "tcp:localhost:4444,server=on",
    "-chardev", "socket,id=e,path=/e,server=on", "-object", "monitor-qmp,id=m,chardev=e",
    "-chardev", "socket,id=f,path=/f,server=on", "-object",
    '{"qom-type":"monitor-qmp","id":"n","chardev":"f","pretty":true}',
    "-chardev", "socket,id=g,path=/g,server=on", "-object", "monitor-hmp,id=o,chardev=g",
]  # fmt: skip


def test_every_monitor_is_known_and_a_pretty_one_comes_last() -> None:
    command = Command(MONITORS)
    assert sorted(command.monitors()) == [
        *(("/c", False), ("/e", False), ("/f", True), ("/p", True), ("/q", False))
    ]
    assert sorted(path for path, _ in command.monitors(people=True)) == [
        "/c", "/d", "/e", "/f", "/g", "/h", "/p", "/q",
    ]  # fmt: skip
    assert command.monitor_path() == "/q"
    assert command.only_pretty() == ""
    assert "/p" in Command(MONITORS[:3]).only_pretty()


@pytest.mark.parametrize("where", ["/c", "/d", "/h", "/p", "/q"])
def test_a_qemu_that_listens_at_any_of_its_monitors_is_not_started_again(
    tmp_path: Path, where: str
) -> None:
    command = Command([word.replace("/", f"{tmp_path}/") for word in MONITORS])
    refuse_taken(command)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(f"{tmp_path}{where}")
        other.listen(1)
        with pytest.raises(Refused, match="listens at"):
            refuse_taken(command)
    refuse_taken(command)  # the path is there, and nobody behind it


def test_every_path_at_which_a_qemu_listens() -> None:
    command = Command([
        "kvm", "-gdb", "unix:/1,server=on", "-debugcon", "unix:/2,server=on",
        "-serial", "mon:unix:/3,server=on", "-display", "vnc=unix:/4",
        "-vnc", "unix:/5,share=force-shared",
        "-netdev", "stream,id=n,server=on,addr.type=unix,addr.path=/6",
        "-netdev", '{"type":"stream","id":"m","server":true,"addr":{"type":"unix","path":"/7"}}',
        "-netdev", "stream,id=o,server=off,addr.type=unix,addr.path=/8",
    ])  # fmt: skip
    assert sorted(path for _, path in command.listening()) == [f"/{n}" for n in range(1, 8)]


VSOCK = ["-device", "vhost-vsock-pci,guest-cid=3"]
BY_NOW = ["-device", '{"driver":"vhost-vsock-pci","guest-cid":3}']


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["-netdev", "tap,id=n,ifname=tap7"], "tap7"),
        (["-netdev", '{"type":"tap","id":"n","ifname":"tap7"}'], "tap7"),
        (["-net", "tap,ifname=tap7"], "tap7"),
        (["-netdev", "tap,id=n,fd=7"], ""),
        (["-s"], "tcp::1234"),
        (["-spice", "port=5930,disable-ticketing=on"], "port=5930"),
        (["-serial", "tcp:127.0.0.1:4444"], ""),  # a client
        (["-vnc", "none"], ""),
        (VSOCK, "guest-cid=3"),
        (BY_NOW, "guest-cid=3"),
    ],
)
def test_what_two_qemus_cannot_have_at_once(words: list[str], named: str) -> None:
    conflicts, _ = about_command_line(["kvm", *words])
    assert len(conflicts) == bool(named)
    assert all(named in conflict for conflict in conflicts)


def test_an_empty_command_is_a_usage_error() -> None:
    with pytest.raises(cprd.InvalidInput):
        Command([])


def test_flags_and_their_negations() -> None:
    found = keyed("unix:x,server,nowait")
    assert (found["server"], found["wait"]) == ("on", "off")
    assert keyed('{"driver": "virtio-blk", "id": "d"}')["id"] == "d"


def test_what_is_added_for_a_state() -> None:
    command = Command(["qemu-system-x86_64", "-m", "1G"])
    words = command.incoming(monitor=5, main=6, cpr="/run/vm/.cprd-1/cpr")
    assert "-S" in words
    channels = [json.loads(words[at + 1]) for at, word in enumerate(words) if word == "-incoming"]
    kinds = {channel["channel-type"]: channel["addr"] for channel in channels}
    assert kinds["main"] == {"transport": "socket", "type": "fd", "str": "6"}
    assert kinds["cpr"] == {"transport": "socket", "type": "unix", "path": "/run/vm/.cprd-1/cpr"}


def test_a_stream_goes_in_the_form_that_every_version_takes() -> None:
    fds = [CprFd("ram0", 0, 7)]
    plain = list(encode(CprState(fds)).pieces())
    for form in (PLAIN, STUB, VFIO):
        assert pieces(CprState(fds, form=form)) == plain
    devices = [CprVfioDevice("vfio0", 0, 1, 2)]
    whole = CprState(fds, devices, VFIO)
    assert pieces(whole) == list(encode(whole).pieces())


JUNK: list[object] = [None, 0, 1 << 62, "", "x", [], {}, b"z", True, 1.5]
SECTION = {"format": 1, "version": "10.0.2", "qmp": "/x", "status": "running", "machine": "q"}
SECTION |= {"uid": 0, "old": {"pid": 1, "start": 2}, "new": None, "untouched": "", "drives": []}


@pytest.mark.parametrize("junk", JUNK)
def test_sections_of_any_form_are_damaged_at_worst(junk: object) -> None:
    for name in ("main", "cpr", "qemu", "machine"):
        state = cprd.State()
        for key, value in {"main": b"QEVM", "cpr": b"QCPR", "qemu": SECTION, name: junk}.items():
            state[key] = value
        with pytest.raises(cprd.CprdError):
            Held(state).read()
    for name in SECTION:
        with suppress(cprd.Damaged):
            origin = Origin.read({**SECTION, name: junk})
            assert Process.find(origin.old) is None
    for name in ("pid", "start"):
        assert Process.find({"pid": 1, "start": 2, name: junk}) is None


def _main(json_text: bytes) -> bytes:
    head = b"QEVM\0\0\0\x03\x07" + struct.pack(">I", 11) + b"pc-q35-10.0"
    return head + b"\x04some}sections" + b"\0\x06" + struct.pack(">I", len(json_text)) + json_text


def test_a_stream_is_whole_only_at_its_very_end() -> None:
    whole = _main(b'{"vmsd_name": "x", "a": {"b": {}}}')
    assert stream.is_whole(whole)
    assert [cut for cut in range(len(whole)) if stream.is_whole(whole[:cut])] == []
    assert not stream.is_whole(whole + b"}")
    assert stream.machine(whole) == "pc-q35-10.0"
    with pytest.raises(cprd.Damaged):
        stream.machine(b"nonsense")


def test_the_run_state_is_the_streams_last_word_not_a_guests() -> None:
    def section(state: bytes) -> bytes:
        head = b"\x04\0\0\0\x28\x0bglobalstate" + struct.pack(">II", 0, 1)
        return head + struct.pack(">I", len(state) + 1) + state.ljust(32, b"\0") + b"\0\0\x7e"

    json_text = b'{"vmsd_name": "globalstate"}'
    whole = _main(json_text)
    assert stream.run_state(whole) == ""
    said = whole.replace(b"some}sections", section(b"running") + section(b"guest-panicked"))
    assert stream.run_state(said) == "guest-panicked"
    assert stream.run_state(whole.replace(b"some}sections", section(b"\xff\0"))) == ""


@pytest.mark.parametrize("value", [0, 1])
def test_the_return_path_byte_by_byte(value: int) -> None:
    said = bytes.fromhex("0002000400000001") + bytes.fromhex("00010004") + value.to_bytes(4, "big")
    answers = stream.Answers()
    assert [answers.feed(said[at : at + 1]) for at in range(len(said))] == [None] * 15 + [value]

"""What is read from a command line and from a stream, without any QEMU."""

from __future__ import annotations

import json
import struct

import pytest

import cprd
from cprd.qemu import stream
from cprd.qemu.command import Command, keyed
from cprd.qemu.version import parse

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


def test_qmp_is_preferred_and_hmp_is_no_qmp() -> None:
    assert Command(["kvm", "-qmp", "unix:q,server=on"]).monitor_path() == "q"
    assert Command(["kvm", "-monitor", "unix:q,server=on"]).monitor_path() == ""
    assert Command(["kvm", "-qmp", "unix:q"]).monitor_path() == ""


def test_an_empty_command_is_a_usage_error() -> None:
    with pytest.raises(cprd.InvalidInput):
        Command([])


def test_flags_and_their_negations() -> None:
    found = keyed("unix:x,server,nowait")
    assert (found["server"], found["wait"]) == ("on", "off")
    assert keyed('{"driver": "virtio-blk", "id": "d"}')["id"] == "d"


@pytest.mark.parametrize("cpr", [7, "/run/vm/.cprd-1/cpr"])
def test_what_is_added_for_a_state(cpr: int | str) -> None:
    words = Command(["qemu-system-x86_64", "-m", "1G"]).incoming(monitor=5, main=6, cpr=cpr)
    assert "-S" in words
    channels = [json.loads(words[at + 1]) for at, word in enumerate(words) if word == "-incoming"]
    kinds = {channel["channel-type"]: channel["addr"] for channel in channels}
    assert kinds["main"] == {"transport": "socket", "type": "fd", "str": "6"}
    assert kinds["cpr"]["type"] == ("fd" if isinstance(cpr, int) else "unix")


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)", (10, 0, 2)),
        ("QEMU emulator version 11.1", (11, 1, 0)),
        ("qemu: what?", None),
    ],
)
def test_versions_as_they_are_said(text: str, version: tuple[int, int, int] | None) -> None:
    assert parse(text) == version


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

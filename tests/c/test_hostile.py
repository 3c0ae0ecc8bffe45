"""Bytes that nobody should have written: the client in C says what the client in Python says, and
never reads beyond them."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cprd.bundle.unpack import unpack
from cprd.errors import CprdError
from cprd.linux.rights import close_all, send
from cprd.live import reader
from cprd.live.queue import make_pair
from cprd.live.records import CHANGE, FD, HEADER, ROOT, SAVE, SNAPSHOT, deletion, encode
from tests.c.building import Programs
from tests.c.conftest import Build
from tests.support.patience import PATIENCE
from tools import vectors
from tools.vectors import BUNDLE, LIVE, WIRE, Vector, stored

pytestmark = [pytest.mark.usefixtures("nothing_leaks"), pytest.mark.xdist_group("c")]

BUNDLES = stored(BUNDLE)
HOLDS = [vector for vector in stored(LIVE) if "queue" in vector]
AT_ONCE = 100  # queues that one process looks at
LONGEST = 300  # bytes of a memfd that are changed
EVERY = 31  # of the changes, in each run; all of them in the whole one
STEPS = [EVERY, pytest.param(1, marks=pytest.mark.full)]


def name_of(vector: Vector) -> str:
    return str(vector["name"])


def python_says(fd: int, is_live: bool) -> str:
    try:
        if is_live:
            found = reader.read(fd)
            found.close()
            state = found.state
        else:
            state = unpack(fd)
        try:
            keys = [(name, id) for name, id, _ in state.fds()]
        finally:
            state.close()
    except CprdError as error:
        return type(error).__name__
    # Python's reader does not look for a key that is there twice.
    return "ok" if len({*keys}) == len(keys) else "Damaged"


def c_says(programs: Programs, fds: list[int], is_live: bool) -> list[str]:
    """Of each queue "ok", or the class of the error. None of them closes another descriptor: stdin
    is a good queue, which comes last."""
    good = next(vector for vector in (HOLDS if is_live else BUNDLES) if "error" not in vector)
    stdin = vectors.build(good)
    try:
        done = subprocess.run(
            [programs.command, "found" if is_live else "unpack", *map(str, fds), "0"],
            stdin=stdin,
            pass_fds=fds,
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
    finally:
        os.close(stdin)
    assert done.returncode == 0, done.stderr.decode()
    said = []
    for line in done.stdout.decode(errors="replace").splitlines():
        first = line.split(": ")[0]
        if first in ("ok", "Damaged", "Busy", "LimitExceeded", "InvalidInput", "CprdError"):
            said.append(first)
    assert said.pop() == "ok"
    return said


def places(value: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Where a vector has bytes."""
    if isinstance(value, list):
        for each in value:
            yield from places(each)
    elif isinstance(value, dict):
        for key in ("hex", "memfd"):
            if key in value:
                yield value, key
        for key in ("queue", "carries"):
            yield from places(value.get(key, []))


def changed(vector: Vector) -> Iterator[Vector]:
    """Copies with one byte flipped, dropped or doubled."""
    changes: tuple[Callable[[int], list[int]], ...] = (
        lambda b: [b ^ 1],
        lambda b: [b ^ 0x80],
        lambda b: [255 - b],
        lambda b: [],
    )
    for number, (there, key) in enumerate(places(vector)):
        data = bytes.fromhex(there[key])
        for at, change in itertools.product(range(min(len(data), LONGEST)), changes):
            made = copy.deepcopy(vector)
            into, _ = next(itertools.islice(places(made), number, None))
            into[key] = (data[:at] + bytes(change(data[at])) + data[at + 1 :]).hex()
            yield made


@pytest.mark.parametrize("vector", BUNDLES, ids=name_of)
def test_a_bundle_is_read_as_the_vectors_say(built: Build, vector: Vector) -> None:
    fd = vectors.build(vector)
    try:
        assert c_says(built("sanitized"), [fd], False) == [vector.get("error", "ok")]
    finally:
        os.close(fd)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("is_live", [False, True], ids=["bundles", "live"])
def test_changed_bytes_mean_the_same_in_c_as_in_python(
    built: Build, monkeypatch: pytest.MonkeyPatch, is_live: bool, step: int
) -> None:
    monkeypatch.setattr(reader, "RETRIES", 1)
    programs = built("sanitized")
    every = (made for vector in (HOLDS if is_live else BUNDLES) for made in changed(vector))
    chosen = itertools.islice(every, 0, None, step)
    seen = set()
    while some := list(itertools.islice(chosen, AT_ONCE)):
        fds = [vectors.build(made) for made in some]
        try:
            here = [python_says(fd, is_live) for fd in fds]
            there = c_says(programs, fds, is_live)
            assert len(there) == len(here)
            for made, one, other in zip(some, here, there, strict=True):
                assert one == other, made
            seen.update(here)
        finally:
            close_all(fds)
    assert {"ok", "Damaged"} <= seen


def test_a_record_with_an_entry_that_cannot_be_closes_nothing(built: Build) -> None:
    """Of the entries behind that, none has been looked at."""
    ended = [deletion((FD, b"c", number)) for number in range(3)]
    data = bytearray(encode(ROOT, 1, 1, 0, ended, 0, part=(1, 1)))
    data[HEADER.size + 4] = 99  # the first op
    tx, rx = make_pair()
    tx.send(data)
    assert c_says(built("sanitized"), [rx.fileno()], True) == ["Damaged"]
    tx.close()
    rx.close()


def test_what_a_segment_ended_before_a_snapshot_stays_away(built: Build) -> None:
    """The key lies in another segment."""
    key = (FD, b"c", 0)
    root, kept, ended = make_pair(), make_pair(), make_pair()
    send(kept[0], encode(CHANGE, 1, 1, 0, [(SAVE, 1, key, b"")], 1), [root[0].fileno()])
    send(ended[0], encode(CHANGE, 1, 2, 0, [deletion(key)], 0), [])
    send(ended[0], encode(SNAPSHOT, 1, 3, 1, [], 0), [])
    ends = [kept[1].fileno(), ended[1].fileno()]
    send(root[0], encode(ROOT, 1, 4, 0, [], 2, ids=(1, 2), part=(1, 1)), ends)
    said = built("sanitized").run("", "found", str(root[1].fileno()), fds=(root[1].fileno(),))
    for end in (*root, *kept, *ended):
        end.close()
    assert said == "ok\n"


# -- a cprd that says anything -------------------------------------------------------------------

ANSWERS = {name_of(vector): bytes.fromhex(vector["hex"]) for vector in stored(f"{WIRE}-answers")}


class Liar:
    """Listens, and answers the first message with the first answer, and so on."""

    def __init__(self, place: Path) -> None:
        self.path = str(place / "liar")
        self.answers: list[bytes] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(self.path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            peer, _ = self._listener.accept()
            with peer, contextlib.suppress(OSError):
                for answer in [*self.answers]:
                    if not peer.recv(1 << 16):
                        break
                    peer.send(answer)
                else:
                    if not self.answers:
                        return
                    peer.recv(1 << 16)

    def close(self) -> None:
        self.answers = []
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as last:
            last.connect(self.path)
        self._thread.join(PATIENCE)
        self._listener.close()


def with_byte(data: bytes, at: int, byte: int) -> bytes:
    return data[:at] + bytes([byte]) + data[at + 1 :]


@pytest.mark.parametrize("step", [61, pytest.param(1, marks=pytest.mark.full)])
def test_no_answer_makes_the_client_more_than_an_error(
    built: Build, tmp_path: Path, step: int
) -> None:
    programs = built("sanitized")
    liar = Liar(tmp_path)
    hello, load = ANSWERS["hello"], ANSWERS["load"]
    lists = ANSWERS["list"]
    try:
        for verb, answers in (("load", [hello, load]), ("list", [hello, lists])):
            cases = [
                [
                    with_byte(each, at, byte) if n == which else each
                    for n, each in enumerate(answers)
                ]
                for which in (0, 1)
                for at in range(len(answers[which]))
                for byte in (0xFF, 0xC1, answers[which][at] ^ 1)
            ]
            for case in cases[::step]:
                liar.answers = case
                done = subprocess.run(
                    [programs.command, verb, "web", "--timeout=0.05"],
                    env={**os.environ, "CPRD_SOCKET": liar.path},
                    capture_output=True,
                    timeout=PATIENCE,
                    check=False,
                )
                assert done.returncode in (0, 1, 3, 4), (case, done.stderr.decode())
                assert b"Sanitizer" not in done.stderr, done.stderr.decode()
                assert b"runtime error" not in done.stderr, done.stderr.decode()
    finally:
        liar.close()

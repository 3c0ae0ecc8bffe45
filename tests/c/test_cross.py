"""States from Python to C and back: the same keys, files, sections, in order."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import resource
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest

import cprd
from cprd.linux.memfd import SEALS
from cprd.linux.rights import close_all
from tests.c.conftest import Build
from tests.support.daemon import DaemonProcess

pytestmark = [pytest.mark.usefixtures("nothing_leaks"), pytest.mark.xdist_group("c")]

EACH = (0, 1, 249, 250, 253, 254, 1000)
MANY = (15_000,)
STATES = [
    ("sanitized", "gcc", EACH),
    ("pause", "gcc", (254, 1000)),
    *(
        pytest.param(kind, compiler, counts, marks=pytest.mark.full)
        for kind, compiler, counts in (
            *(("pause", "gcc", EACH), ("pause", "gcc", MANY), ("sanitized", "gcc", MANY)),
            *(("sanitized", "clang", EACH), ("sanitized", "clang", MANY)),
            *(("plain", "clang", EACH), ("plain", "clang", MANY)),
        )
    ),
]
FILES = 100  # pipes whose ends are passed, again and again


@contextlib.contextmanager
def descriptors(count: int) -> Iterator[list[int]]:
    """So many descriptors, of some pipes in no simple order."""
    ends = [end for _ in range(min(count, FILES)) for end in os.pipe()]
    fds = [os.dup(ends[number * number % len(ends)]) for number in range(count)]
    try:
        yield fds
    finally:
        close_all([*ends, *fds])


def key(number: int) -> tuple[str, int]:
    return f"name{number % 7}", number - 3


def inodes(fds: list[int]) -> list[tuple[str, int, int]]:
    return [(*key(number), os.fstat(fd).st_ino) for number, fd in enumerate(fds)]


SECTIONS: dict[str, object] = {
    "none": b"",
    "one": b"1",
    "inline": bytes(16384),
    "large": os.urandom(16385),
    "larger": os.urandom(1 << 20),
    "größe": {"a": [1, 2.5, None]},
    "text": "x" * 20_000,
}


def fds_in(said: str) -> list[tuple[str, int, int]]:
    """Name, id and inode of each descriptor that cprd-c lists."""
    lines = [line.split() for line in said.splitlines() if line.startswith("fd ")]
    return [(name, int(id), int(inode)) for _, name, id, _, inode in lines]


def sections_in(said: str) -> list[list[str]]:
    return [line.split() for line in said.splitlines() if not line.startswith("fd ")]


def packed(value: object) -> bytes:
    return value if isinstance(value, bytes) else msgpack.packb(value)


@pytest.mark.parametrize(("kind", "compiler", "counts"), STATES, ids=str)
def test_a_state_comes_over_in_both_directions(
    daemon: DaemonProcess,
    tmp_path: Path,
    built: Build,
    kind: str,
    compiler: str,
    counts: tuple[int, ...],
) -> None:
    programs = built(kind, compiler)
    lines, listed = [], []
    for number, (name, value) in enumerate(SECTIONS.items()):
        data, how = packed(value), "raw" if isinstance(value, bytes) else "packed"
        (tmp_path / str(number)).write_bytes(data)
        lines.append(f"{how} {name} {tmp_path / str(number)}\n")
        listed.append([how, name, str(len(data)), f"{zlib.crc32(data):08x}"])
    for count in counts:
        with descriptors(count) as fds:
            wanted = inodes(fds)
            said = [*lines, *(f"fd {key(n)[0]} {key(n)[1]} {fd}\n" for n, fd in enumerate(fds))]
            programs.run(daemon.path, "save", "web", stdin="".join(said), fds=tuple(fds))
        with daemon.connect() as connection:
            with connection.load("web") as claim:
                found = [(name, id, os.fstat(fd).st_ino) for name, id, fd in claim.state.fds()]
                assert found == wanted
                for name, value in SECTIONS.items():
                    there = claim.state[name]
                    assert (bytes(there) if isinstance(value, bytes) else there) == value
                assert [*claim.state] == [*SECTIONS]
                taken = [claim.state.take_fd(*key(number)) for number in range(count)]
            state = cprd.State()
            for number, fd in enumerate(taken):
                state.save_fd(*key(number), fd)
            for name, value in SECTIONS.items():
                state[name] = value
            connection.save("web", state)
            close_all(taken)
            found_in_c = programs.run(daemon.path, "load", "web")
            assert fds_in(found_in_c) == wanted
            assert sections_in(found_in_c) == listed
            assert connection.list() == []


@pytest.mark.parametrize("size", [1 << 20, pytest.param(1 << 30, marks=pytest.mark.full)])
def test_a_sealed_memfd_travels_as_a_section(
    daemon: DaemonProcess, built: Build, size: int
) -> None:
    programs = built("pause")
    memfd = os.memfd_create("large", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    try:
        os.ftruncate(memfd, size)
        os.pwrite(memfd, b"begin", 0)
        os.pwrite(memfd, b"end", size - 3)
        said = programs.run(
            daemon.path, "save", "web", stdin=f"memfd m {memfd}\n", fds=(memfd,), status=1
        )
        assert "InvalidInput: section 'm'" in said
        assert "all four seals" in said
        fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, SEALS)
        programs.run(daemon.path, "save", "web", stdin=f"memfd m {memfd}\n", fds=(memfd,))
        with daemon.connect() as connection:
            claim = connection.load("web")
            assert os.fstat(claim.state.section_fd("m")).st_ino == os.fstat(memfd).st_ino
            claim.reject("to be loaded in C")
            claim.close()
        said = programs.run(daemon.path, "load", "web")
        with mmap.mmap(memfd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as mapped:
            assert said == f"raw m {size} {zlib.crc32(mapped):08x}\n"
    finally:
        os.close(memfd)


def test_what_a_state_needs_and_the_process_has_not_is_a_limit_and_no_damage(
    daemon: DaemonProcess, built: Build
) -> None:
    programs = built("pause")
    with descriptors(200) as fds, daemon.connect() as connection:
        state = cprd.State()
        for number, fd in enumerate(fds):
            state.save_fd(*key(number), fd)
        connection.save("web", state)
        for limit in (4, 100, 207):  # 4: no room for the bundle itself
            done = subprocess.run(
                [programs.command, "load", "web"],
                capture_output=True,
                text=True,
                env={**os.environ, "CPRD_SOCKET": daemon.path},
                preexec_fn=lambda limit=limit: resource.setrlimit(  # type: ignore[misc]
                    resource.RLIMIT_NOFILE, (limit, limit)
                ),
                check=False,
            )
            assert done.returncode == 1
            assert "LimitExceeded" in done.stderr
            assert "what is held stays held" in done.stderr
        [row] = connection.list()
        assert row["phase"] == "held"
        assert row["attempts"] == 0
        assert "RLIMIT_NOFILE" in row["last_reject"]
        assert fds_in(programs.run(daemon.path, "load", "web")) == inodes(fds)


def test_each_error_has_its_class_and_the_words_of_cprd(
    daemon: DaemonProcess, built: Build, tmp_path: Path
) -> None:
    programs = built("sanitized")
    run = programs.run
    assert "NotHeld: nothing is held under 'web'" in run(daemon.path, "load", "web", status=3)
    assert "NotHeld" in run(daemon.path, "load", "web", "--wait=0.2", status=3)
    assert "NotHeld" in run(daemon.path, "wait", "web", "--wait=0.2", status=3)
    assert "InvalidInput" in run(daemon.path, "load", "a/b/c", status=1)
    assert "InvalidInput: fd 99 of (n, 0)" in run(
        daemon.path, "save", "web", stdin="fd n 0 99\n", status=1
    )
    assert "used already" in run(daemon.path, "save", "web", stdin="fd n 0 0\nfd n 0 1\n", status=1)
    run(daemon.path, "save", "web", "--ttl=100")
    assert "AlreadyHeld" in run(daemon.path, "save", "web", status=1)
    assert "LimitExceeded" in run(daemon.path, "save", "web", "--replace", "--store", status=1)
    with daemon.connect() as connection:
        claim = connection.load("web")
        assert "claimed by pid" in run(daemon.path, "load", "web", status=4)
        claim.close()
    run(daemon.path, "load", "web", "--begin", "--reject=not ours")
    with daemon.connect() as connection:
        [row] = connection.list()
        assert (row["phase"], row["last_reject"]) == ("held", "not ours")
        assert row["expires"] is None or row["expires"] <= 100
    assert "held" in run(daemon.path, "list")
    run(daemon.path, "save", "web", "--replace", "--abort")
    run(daemon.path, "load", "web", "--next", "--after-exit")
    run(daemon.path, "wait", "web", "--wait=20")
    run(daemon.path, "drop", "web")
    assert run(daemon.path, "list") == ""
    nowhere = str(tmp_path / "nowhere")
    assert f"Unavailable: no cprd answers at {nowhere}" in run(nowhere, "load", "web", status=1)

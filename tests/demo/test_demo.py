"""The demonstration, whole: its verdict must be true, and nothing may stay behind."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from cprd.demo.load import Load
from cprd.demo.picture import legend, svg, terminal
from cprd.demo.server import LINE, Tally
from cprd.demo.timeline import Report, Restart, ceiling, longest_silence, rates, round_up
from tests.support.checkout import CHECKOUT
from tests.support.daemon import DaemonProcess
from tests.support.patience import PATIENCE

NO, NO3 = (False, False), (False, True, True)


@pytest.fixture
def place() -> Iterator[Path]:
    """An empty directory with a path short enough for the demo to put its socket below it."""
    with tempfile.TemporaryDirectory(prefix="cprd-test.", dir="/tmp") as name:
        yield Path(name)


def demo(place: Path, *arguments: str, **extra: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "TMPDIR": str(place), **extra}
    return subprocess.Popen(
        [sys.executable, "-m", "cprd.cli", "demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def processes_of(folder: Path) -> list[str]:
    """Command lines of all processes whose environment names `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(folder).encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_text())
        except OSError:
            continue
    return found


def test_restarts_and_a_killed_successor_lose_nothing(place: Path) -> None:
    picture = place / "picture.svg"
    process = demo(
        place,
        *("--connections", "60", "--restarts", "3", "--seconds", "4", "--svg", str(picture)),
        CPRD_SOCKET=str(place / "not-to-be-used.sock"),
    )
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out + err
    rows = dict(re.findall(r"^ (\S.*?)  +(\S.*?) *$", out, re.MULTILINE))
    assert rows["restarts"].startswith("3, number 2 by kill -9, in number 2 the first successor")
    assert rows["answers lost"] == rows["answers wrong"] == rows["connections dropped"] == "0"
    assert int(rows["requests answered"].replace(",", "")) > 200
    blackouts = [int(number) for number in rows["blackout of each, ms"].split()]
    assert len(blackouts) == 3
    assert min(blackouts) > 5  # the server really was away
    assert ET.parse(picture).getroot().tag.endswith("svg")
    assert sorted(place.iterdir()) == [picture]
    assert processes_of(place) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_demo_ended_half_way_leaves_no_process_behind(
    place: Path, number: signal.Signals
) -> None:
    process = demo(place, "--connections", "20", "--seconds", "30")
    assert process.stdout is not None
    process.stdout.readline()  # it is running
    pids = [os.pidfd_open(pid) for pid in children(process.pid)]
    assert len(pids) == 2, "cprd and the server"
    process.send_signal(number)
    process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    for pidfd in pids:
        gone(pidfd)
        os.close(pidfd)
    left = [path.name for path in place.iterdir()]
    if number == signal.SIGKILL:  # nobody was there to remove its directory, which proves the rest
        assert [name[:10] for name in left] == ["cprd-demo-"]
    else:
        assert left == []


def test_a_server_that_dies_without_a_word_is_no_success(place: Path) -> None:
    process = demo(place, "--connections", "20", "--restarts", "2", "--seconds", "4")
    assert process.stdout is not None
    process.stdout.readline()
    server = next(
        pid
        for pid in children(process.pid)
        if b"cprd.demo.server" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    os.kill(server, signal.SIGKILL)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert err.startswith("cprctl: ")
    assert err.count("\n") == 1
    assert list(place.iterdir()) == []


def test_a_server_ended_right_after_its_load_saves_what_it_took(daemon: DaemonProcess) -> None:
    env = {**daemon.env, "CPRD_SOCKET": daemon.path}
    command = [sys.executable, "-m", "cprd.demo.server", "chat"]
    first = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    ready = next(line for line in first.stdout if line.startswith("ready "))
    with socket.create_connection(("127.0.0.1", int(ready.split()[1])), timeout=PATIENCE) as client:
        client.sendall(b"5\n")
        assert client.recv(100) == b"1 5\n"
        first.terminate()
        first.communicate(timeout=PATIENCE)
        paused = {**env, "CPRD_PAUSE": "confirm:answered"}
        second = subprocess.Popen(command, env=paused, stdout=subprocess.PIPE)
        os.waitid(os.P_PID, second.pid, os.WSTOPPED)
        second.send_signal(signal.SIGTERM)
        second.send_signal(signal.SIGCONT)
        second.communicate(timeout=PATIENCE)
        assert second.returncode == 0
        third = subprocess.Popen(command, env=env, stdout=subprocess.PIPE)
        client.sendall(b"6\n")
        assert client.recv(100) == b"2 11\n"
        third.terminate()
        third.communicate(timeout=PATIENCE)


def test_the_server_as_a_command_says_what_is_wrong(daemon: DaemonProcess) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-m", "cprd.demo.server", "chat", str(taken.getsockname()[1])]
        env = {**daemon.env, "CPRD_SOCKET": daemon.path}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"cprd-demo-server: .*in use.*\n", done.stderr)


Answer = Callable[[int, int, int], bytes | None]


@pytest.mark.parametrize(
    ("answer", "wrong", "dropped", "owed"),
    [
        (lambda count, total, _: b"%d %d\n" % (count, total), False, False, False),
        (lambda count, total, new: b"%d %d\n" % (count, total - new * (count == 3)), True, *NO),
        (lambda count, total, _: b"%d %d\n" % (count - (count == 3), total), True, *NO),
        (lambda count, total, _: b"%d %d\n" % (count, total) * (1 + (count == 3)), True, *NO),
        (lambda count, total, _: b"%d %d\n" % (count, total) if count < 3 else b"", *NO, True),
        (lambda count, total, _: b"%d %d\n" % (count, total) if count < 3 else None, *NO3),
    ],
    ids=["right", "a number forgotten", "a step back", "said twice", "never said", "hung up"],
)
async def test_the_clients_notice(answer: Answer, wrong: bool, dropped: bool, owed: bool) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        count, total, unread = 0, 0, b""
        async for data in stream:
            *lines, unread = (unread + data).split(b"\n")
            for line in lines:
                count += 1
                total += int(line)
                said = answer(count, total, int(line))
                if said is None:
                    await stream.aclose()
                    return
                if said:
                    await stream.send_all(said)

    load = Load(3, 200.0, trio.current_time)
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        port = listener.socket.getsockname()[1]
        await load.connect(port)
        nursery.start_soon(load.run, port)

        def noticed() -> tuple[bool, bool, bool]:
            return (load.wrong > 0, load.dropped > 0, load.owed > 0)

        with trio.fail_after(PATIENCE):  # three connections, whose first two answers are right
            while len(load.answers) < 6 or noticed()[:2] != (wrong, dropped):
                await trio.testing.wait_all_tasks_blocked(0.005)
        with trio.move_on_after(1):  # what is owed stays so
            await load.settle()
        assert noticed() == (wrong, dropped, owed)
        load.stopping = True
        nursery.cancel_scope.cancel()
    load.close()


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pidfd: int) -> None:
    import select

    assert select.select([pidfd], [], [], PATIENCE)[0], "a child of the demo outlives it"


def test_a_hard_limit_too_low_is_named_before_anything_starts(place: Path) -> None:
    done = subprocess.run(
        ["prlimit", "--nofile=256:256", sys.executable, "-m", "cprd.cli", "demo"],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "TMPDIR": str(place)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 1
    assert "RLIMIT_NOFILE" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(place.iterdir()) == []


@pytest.fixture
def unconnected() -> Iterator[socket.socket]:
    with socket.socket() as sock:
        yield sock


def test_a_line_torn_anywhere_is_answered_once(unconnected: socket.socket) -> None:
    numbers = [random.Random(1).randrange(10**6) for _ in range(50)]
    data = b"".join(b"%d\n" % number for number in numbers)
    expected, total = b"", 0
    for count, number in enumerate(numbers, 1):
        total += number
        expected += b"%d %d\n" % (count, total)
    cuts = random.Random(2)
    for _ in range(100):
        at = cuts.randrange(len(data) + 1)
        first = Tally(unconnected)
        first.take(data[:at])
        second = Tally(unconnected, first.count, first.total)
        second.unread, second.unsent = first.unread, first.unsent
        second.take(data[at:])
        assert second.unsent == expected


def test_a_client_that_sends_no_number_is_refused(unconnected: socket.socket) -> None:
    for data in (b"x" * (LINE + 1), b"seven\n"):
        with pytest.raises(ValueError, match=r"."):
            Tally(unconnected).take(data)


def some_report() -> Report:
    answers = [i / 100 for i in range(1000) if not 300 <= i < 330 and not 600 <= i < 680]
    restarts = [Restart(3.0, 3.1, 3.3, False), Restart(6.0, 6.1, 6.8, True)]
    return Report(
        connections=5,
        seconds=10.0,
        answers=answers,
        restarts=restarts,
        lost=0,
        wrong=0,
        dropped=0,
        visits=3,
        slowest=0.8,
    )


def test_a_blackout_is_the_longest_silence_of_everybody() -> None:
    assert some_report().blackouts() == pytest.approx([0.31, 0.81])
    assert longest_silence([], 1.0, 3.0, 4.0) == 4.0
    assert longest_silence([1.5], 1.0, 3.0, 4.0) == 2.5
    assert longest_silence([0.9, 1.5, 3.5], 1.0, 3.0) == 2.0


def test_a_blackout_that_lasts_into_the_next_restart_is_not_cut_short_by_it() -> None:
    answers = [n / 100 for n in range(100)] + [1.8 + n / 100 for n in range(50)]
    restarts = [Restart(1.0, 1.05, 1.2, False), Restart(1.21, 1.3, 1.7, False)]
    report = some_report()._replace(answers=answers, restarts=restarts)
    assert report.blackouts() == pytest.approx([0.81, 0.81])


def test_one_lost_answer_is_no_success() -> None:
    report = some_report()
    assert report.flawless
    assert not report._replace(lost=1).flawless
    assert not report._replace(wrong=1).flawless
    assert not report._replace(dropped=1).flawless
    assert not report._replace(answers=[]).flawless


def test_rates_and_axes() -> None:
    assert rates([0.1, 0.2, 1.9, 2.5], 2.0, 2) == [2.0, 1.0]
    assert [round_up(v) for v in (0.2, 1, 1.2, 700, 2900)] == [1.0, 1.0, 1.5, 800.0, 3000.0]
    assert ceiling([100.0] * 9 + [1000.0]) == 200.0


@pytest.mark.parametrize("width", [30, 80, 200])
def test_the_terminal_picture_fits_and_shows_each_restart(width: int) -> None:
    for ascii_only, marks in ((False, "▲✗"), (True, "^x")):
        lines = terminal(some_report(), width, ascii_only=ascii_only)
        assert max(map(len, lines)) <= width
        assert [c for c in lines[-2] if c != " "] == list(marks)
        if ascii_only:
            assert "\n".join([*lines, legend(ascii_only=True)]).isascii()


def test_the_svg_is_well_formed_and_follows_the_colour_scheme() -> None:
    root = ET.fromstring(svg(some_report()))
    space = "{http://www.w3.org/2000/svg}"
    classes = [path.get("class") for path in root.iter(f"{space}path")]
    assert classes.count("restart") == 1
    assert classes.count("crash") == 1
    style = root.find(f"{space}style")
    assert style is not None
    assert "prefers-color-scheme: dark" in (style.text or "")
    for name in {c for element in root.iter() for c in (element.get("class") or "").split()}:
        assert f".{name} " in (style.text or ""), f"no colour for {name}"

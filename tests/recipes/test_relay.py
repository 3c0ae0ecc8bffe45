"""The relay of the page: subscribed at Redis once, killed again and again."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.recipes.recipe import Lines, Recipe, left_in
from tests.recipes.servers import redis
from tests.support.daemon import DaemonProcess
from tests.support.patience import until

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("nothing_leaks")]


def bulk(client: Lines) -> bytes:
    """A bulk string of Redis's."""
    size = int(client.line().removeprefix(b"$"))
    text = b""
    while len(text) < size + 2:
        text += client.line()
    return text


def subscriber(redis: Lines) -> bytes:
    """What Redis knows of its only subscriber: id and address."""
    redis.send(b"CLIENT LIST TYPE pubsub\r\n")
    (line,) = bulk(redis).strip().splitlines()
    return b" ".join(line.split()[:2])


def test_a_subscription_outlives_the_subscriber(daemon: DaemonProcess, tmp_path: Path) -> None:
    with redis() as port, Recipe("relay.py", daemon, tmp_path, str(port)) as relay:
        to_redis = Recipe("relay.py", daemon, tmp_path, port=port)  # (only to connect)
        with Lines(relay.connect()) as client, Lines(to_redis.connect()) as publisher:
            published = 0

            def publish() -> None:
                nonlocal published
                published += 1
                publisher.send(b"PUBLISH news words%d\r\n" % published)
                assert publisher.line() == b":1\r\n"

            heard: list[bytes] = []

            def hear() -> None:
                """All that was published, each once but for repetitions, in order."""
                while len(heard) < published:
                    line = client.line()
                    if line not in heard:
                        heard.append(line)

            until(lambda: accepted(relay.port), lambda: "not accepted")
            publish()
            hear()
            before = subscriber(publisher)
            for end in (signal.SIGKILL, signal.SIGTERM, *[signal.SIGKILL] * 6):
                for _ in range(20):
                    publish()
                relay.kill(end)
                for _ in range(5):
                    publish()  # while nobody runs
                relay.start()
                publish()
                hear()
            assert heard == [b"%d words%d\n" % (n, n) for n in range(1, published + 1)]
            assert subscriber(publisher) == before
            relay.kill()
    assert left_in(daemon, "relay") == (
        [("listener", 0), ("upstream", 0), ("client", 1)],
        ["upstream"],
    )


def accepted(port: int) -> bool:
    """Whether the listener's queue is empty."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    (queue,) = [row[4] for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")]
    return int(queue.split(":")[1], 16) == 0

"""tests/vectors/ and the code agree in both directions, and the pages show the vectors.

`python -m tools.vectors` writes the files and the examples of the pages."""

from __future__ import annotations

import json
import os
import re
import socket

import pytest

from cprd.bundle import inspect
from cprd.bundle.unpack import unpack
from cprd.errors import CODES, CprdError, ProtocolError
from cprd.linux.rights import close_all, receive
from cprd.protocol import messages
from tests.support import wire
from tests.support.daemon import DaemonProcess
from tests.support.patience import PATIENCE
from tools import pages, vectors
from tools.vectors import BUNDLE, LIVE, WIRE, Vector, stored

REQUESTS, ANSWERS = stored(f"{WIRE}-requests"), stored(f"{WIRE}-answers")
BUNDLES, HOLDS = stored(BUNDLE), stored(LIVE)

pytestmark = pytest.mark.usefixtures("nothing_leaks")


def name_of(vector: Vector) -> str:
    return str(vector["name"])


def test_the_code_writes_these_bytes_and_no_others() -> None:
    """Other bytes want another version, and files of that version beside these."""
    made = vectors.every()
    assert vectors.changed(made) == []
    assert {name: json.loads(vectors.text_of(content)) for name, content in made.items()} == {
        name: stored(name) for name in made
    }


@pytest.mark.parametrize("vector", REQUESTS, ids=name_of)
def test_a_request_is_read_as_it_says(vector: Vector) -> None:
    data = bytes.fromhex(vector["hex"])
    if "means" in vector:
        assert vectors.plain(messages.read_request(data)) == vector["means"]
        return
    with pytest.raises(ProtocolError, match="^" + re.escape(vector["refused"])) as refusal:
        messages.read_request(data)
    goes_on = isinstance(refusal.value, messages.BadRequest)
    assert vector["connection"] == ("goes on" if goes_on else "ends")


@pytest.mark.parametrize("vector", ANSWERS, ids=name_of)
def test_an_answer_is_read_as_it_says(vector: Vector) -> None:
    _, said = messages.parse_answer(bytes.fromhex(vector["hex"]))
    if "means" in vector:
        assert not isinstance(said, CprdError)
        assert vectors.plain(messages.read_fields(vector["verb"], said)) == vector["means"]
        return
    error = vector["error"]
    assert type(said) is CODES[error["error"]]
    assert str(said) == error["why"]
    for field in ("pid", "phase", "until"):
        assert getattr(said, field, None) == error.get(field)


@pytest.mark.parametrize("vector", BUNDLES, ids=name_of)
def test_a_bundle_is_read_as_it_says(vector: Vector) -> None:
    fd = vectors.build(vector)
    try:
        if "error" in vector:
            with pytest.raises(CODES[vector["error"]], match=re.escape(vector["why"])):
                unpack(fd).close()
            return
        inspect.check(fd, vector["save"]["parked"])
        state = unpack(fd)
        assert vectors.state_means(state) == vector["means"]
        state.close()
    finally:
        os.close(fd)


@pytest.mark.parametrize("vector", HOLDS, ids=name_of)
def test_a_live_hold_is_read_as_it_says(vector: Vector) -> None:
    if "queue" in vector:
        assert vectors.live_means({"queue": vector["queue"]}) == vector["means"]
    else:
        assert vectors.record_means(bytes.fromhex(vector["hex"])) == vector["means"]


def test_each_verb_has_a_vector_and_a_place_in_the_page() -> None:
    asked = {vector["means"]["verb"] for vector in REQUESTS if "means" in vector}
    answered = {vector["verb"] for vector in ANSWERS if "verb" in vector}
    assert asked == answered == messages.REQUESTS.keys()
    page = pages.PAGES[0].read_text(encoding="utf-8")
    for verb in messages.REQUESTS:
        assert f"<!-- fields {verb} -->" in page
        assert re.search(f"<!-- example request/{verb}(-.*)? -->", page)
        assert f"<!-- example answer/{verb} -->" in page


def test_the_requests_of_the_page_meet_cprd_as_they_are(daemon: DaemonProcess) -> None:
    """All in one conversation: what is there is done, and a claim that is not there is fenced."""
    (small,) = [vector for vector in BUNDLES if vector["name"] == "small"]
    outcomes: dict[str, str] = {}
    bundle = vectors.build(small)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(daemon.path)
        waits = ("load-all", "wait", "nil")
        for vector in [one for one in REQUESTS if "means" in one and one["name"] not in waits]:
            name, verb = vector["name"], vector["means"]["verb"]
            inlet = wire.park(sock, bundle) if name in ("save", "save-all") else None
            sock.send(bytes.fromhex(vector["hex"]))
            data, fds, _ = receive(sock, messages.MAX_ANSWER)
            close_all(fds)
            number, said = messages.parse_answer(data)
            assert number == vector["means"]["id"]
            outcomes[name] = type(said).__name__
            if not isinstance(said, CprdError):
                messages.read_fields(verb, said)
                outcomes[name] = "ok"
            if inlet is not None:
                inlet.close()
    os.close(bundle)
    done = [name for name, outcome in outcomes.items() if outcome == "ok"]
    assert {"hello", "queue", "save", "load", "list", "show", "status"} <= {*done}
    for name in ("confirm", "reject", "renew", "commit", "end"):
        assert outcomes[name] in ("Fenced", "ProtocolError"), outcomes
    with daemon.connect() as client:
        client.drop("web", force=True)


def test_the_pages_show_the_vectors() -> None:
    made = vectors.every()
    for page in pages.PAGES:
        text = page.read_text(encoding="utf-8")
        assert pages.filled(text, made) == text, f"{page.name}: python -m tools.vectors"

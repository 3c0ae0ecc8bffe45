"""LISTEN_FDNAMES says each key once, unmistakably, or nothing at all."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cprd import LimitExceeded
from cprd.cli.names import fd_name, listen_fdnames, parse, section_name
from cprd.linux.listen_fds import MAX_NAMES

IDS = st.integers(-(2**31), 2**31 - 1)
NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
KEYS = st.tuples(NAMES, IDS)


@pytest.mark.parametrize(
    ("name", "id", "text"),
    [
        ("listener", 0, "listener"),
        ("conn", 7, "conn.7"),
        ("conn", -7, "conn.-7"),
        ("tcp:80", 0, "tcp%3A80"),
        ("100%", 0, "100%25"),
        ("tab\tand space", 0, "tab%09and space"),
        ("caf\u00e9", 1, "caf%C3%A9.1"),
        ("net.conf", 0, "net.conf"),
        ("a.1", 0, "a%2E1"),
        ("a.1", 2, "a.1.2"),
        ("section.x", 0, "section%2Ex"),
        ("section.1", 3, "section%2E1.3"),
    ],
)
def test_keys_as_the_manual_says(name: str, id: int, text: str) -> None:
    assert fd_name(name, id) == text
    assert parse(text) == (name, id)


@given(KEYS)
@example(("a.-5", 0))
@example(("section.", 0))
@example(("section.9.9", 0))
@example(("section.9", 1))
def test_every_key_can_be_read_back(key: tuple[str, int]) -> None:
    text = fd_name(*key)
    assert parse(text) == key
    assert all(" " <= c <= "~" and c != ":" for c in text)


@given(NAMES)
def test_every_section_can_be_read_back_and_is_no_descriptor(key: str) -> None:
    assert parse(section_name(key)) == key


@given(st.sets(KEYS, max_size=20), st.sets(NAMES, max_size=5))
def test_no_two_keys_share_a_name(keys: set[tuple[str, int]], sections: set[str]) -> None:
    value = listen_fdnames(keys, sections)
    assert len({*value.split(":")} - {""}) == len(keys) + len(sections)


def test_the_limit_is_that_of_one_variable() -> None:
    room = MAX_NAMES - len("LISTEN_FDNAMES=") - 1
    assert len(listen_fdnames([("x" * room, 0)], [])) == room
    with pytest.raises(LimitExceeded, match="131072"):
        listen_fdnames([("x" * (room + 1), 0)], [])

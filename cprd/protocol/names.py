"""Names of holds: NAME, or UID/NAME for the name of another uid. No I/O."""

from __future__ import annotations

from functools import lru_cache

from cprd.errors import Denied, InvalidInput

Key = tuple[int, str]
"""The owner's uid and the bare name."""


@lru_cache(maxsize=64)
def split_name(text: str, uid: int) -> Key:
    """The key of NAME or UID/NAME; a bare NAME belongs to `uid`. Raises InvalidInput."""
    owner, slash, name = text.rpartition("/")
    if slash:
        if not owner.isascii() or not owner.isdigit() or int(owner) >= (1 << 32) - 1:
            raise InvalidInput(f"name {text!r:.300}: wants NAME, or UID/NAME as root; no other '/'")
        uid = int(owner)
    check_name(name)
    return uid, name


def key_for(text: str, uid: int) -> Key:
    """The key that a peer of `uid` may touch. Raises InvalidInput, Denied."""
    key = split_name(text, uid)
    if key[0] != uid and uid != 0:
        raise Denied(f"uid {uid} may not touch names of uid {key[0]}; root may")
    return key


def check_name(name: str) -> str:
    """Return `name`: 1..255 bytes of printable UTF-8, no '/', no leading '.'.

    Raises InvalidInput."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        size = 0
    if not 0 < size < 256 or not name.isprintable() or name[0] == "." or "/" in name:
        raise InvalidInput(
            f"name {name!r:.300}: wants 1 to 255 bytes of printable UTF-8 without '/', not"
            " beginning with '.'"
        )
    return name

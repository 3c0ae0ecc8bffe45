"""NAME of a verb, and the user with that name: NAME is one's own, for root too."""

from __future__ import annotations

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    import argparse


def add_name(parser: argparse.ArgumentParser) -> None:
    """The argument NAME, and --owner."""
    parser.add_argument("name", metavar="NAME", help="your own; as root UID/NAME, another user's")
    parser.add_argument("--owner", metavar="USER", help="as root: NAME of that user (or uid)")


def full_name(name: str, owner: str | None) -> str:
    """NAME, or UID/NAME with an --owner. Raises InvalidInput for two owners that differ."""
    if owner is None:
        return name
    from cprd.errors import InvalidInput
    from cprd.linux.identity import uid_of

    uid = uid_of(owner)
    before, slash, bare = name.rpartition("/")
    if slash and before != str(uid):
        raise InvalidInput(f"{name!r} and --owner {owner} (uid {uid}): two owners; which one?")
    return f"{uid}/{bare}"

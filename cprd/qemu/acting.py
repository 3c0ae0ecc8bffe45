"""Root's tools act as the uid of the QEMU: in all that they do by path, and before cprd."""

from __future__ import annotations

import os

from cprd.errors import InvalidInput
from cprd.linux import identity

_LATE = (
    "ctypes",
    "encodings.ascii",
    "encodings.idna",
    "json",
    "resource",
    "signal",
    "socket",
    "cprd.bundle.inspect",
    "cprd.bundle.pack",
    "cprd.bundle.unpack",
    "cprd.client.blocking",
    "cprd.cpr",
    "cprd.linux.child",
    "cprd.linux.describe",
    "cprd.linux.nofile",
    "cprd.qemu.agent",
    "cprd.qemu.doubt",
    "cprd.qemu.inventory",
    "cprd.qemu.restore",
    "cprd.qemu.save",
    "cprd.qemu.stop",
    "cprd.qemu.stream",
    "cprd.qemu.target",
    "cprd.qemu.upgrade",
    "cprd.systemd.notify",
)
"""Modules that are imported late elsewhere: that user may not be allowed to read them."""


def owner_of(name: str) -> int:
    """The uid with NAME: of UID/NAME, else our own. Raises InvalidInput."""
    uid, slash, _ = name.rpartition("/")
    if not slash:
        return os.geteuid()
    if not uid.isascii() or not uid.isdigit() or int(uid) >= identity.NOBODY:
        raise InvalidInput(f"name {name!r:.300}: wants NAME, or UID/NAME as root; no other '/'")
    return int(uid)


def act_as(uid: int) -> None:
    """Act as `uid`, for root; nothing for everybody else, whom cprd will ask. Raises Denied."""
    if not identity.is_root() or uid == os.geteuid():
        return
    from importlib import import_module

    for module in _LATE:
        import_module(module)
    identity.act_as(uid)

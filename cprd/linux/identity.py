"""Acting as another user: root's tools do as uid N all that concerns a process of uid N.

`act_as` changes the effective ids and the groups. From then on the kernel decides each access to a
file and each connection as for uid N, and no capability is in effect. The real and the saved uid
stay 0: uid N can neither signal nor trace this process, the limits of uid N do not count, and
`act_as_ourselves` leads back. All threads change together (glibc sees to that).
"""

from __future__ import annotations

import os
import pwd

from cprd.errors import Denied, InvalidInput
from cprd.linux import proc

NOBODY = (1 << 32) - 1  # (uid_t)-1, which is no uid

_ours: tuple[int, list[int]] | None = None  # the effective gid and the groups of ourselves


def is_root() -> bool:
    """Whether root started this process, whoever the process acts as."""
    return os.getuid() == 0


def uid_of(text: str) -> int:
    """The uid in "UID" or "USER". Raises InvalidInput."""
    if text.isascii() and text.isdigit():
        if int(text) < NOBODY:
            return int(text)
    else:
        try:
            return pwd.getpwnam(text).pw_uid
        except KeyError:
            pass
    raise InvalidInput(f"{text!r}: wants a uid, or the name of a user of this host")


def act_as(uid: int, gid: int | None = None) -> None:
    """Act as `uid`, in the groups of that user. `gid`: the group (None: the user's own, by
    passwd(5)). For root only; a second call changes over. Raises Denied."""
    global _ours
    act_as_ourselves()
    own, groups = _groups(uid)
    gid = own if gid is None else gid
    if _ours is None:
        _ours = os.getegid(), os.getgroups()
    try:
        os.setgroups(groups or [gid])
        os.setegid(gid)
        os.seteuid(uid)
    except OSError as error:
        act_as_ourselves()
        raise Denied(
            f"root cannot act as uid {uid} here ({error.strerror}): run this command as that user"
        ) from None
    if uid and _has_capabilities():
        act_as_ourselves()
        raise Denied(
            f"root's capabilities may stay in effect for uid {uid} here (securebits, or no /proc to"
            " tell): run this command as that user"
        )


def act_as_ourselves() -> None:
    """Undo `act_as`."""
    global _ours
    if _ours is None:
        return
    os.seteuid(0)
    gid, groups = _ours
    os.setegid(gid)
    os.setgroups(groups)
    _ours = None


def become(uid: int) -> None:
    """Become `uid` for good: for a program that is executed next."""
    gid = os.getegid() if os.geteuid() == uid else None
    act_as_ourselves()
    own, groups = _groups(uid)
    gid = own if gid is None else gid
    os.setgroups(groups or [gid])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


class wholly:
    """A block with the real ids of the user as well. The kernel asks for those where a process is
    signalled or its descriptors are copied: root's would open every process of root's."""

    def __enter__(self) -> None:
        uid, self._before = os.geteuid(), os.getresgid()
        self._changed = uid != os.getuid()
        if self._changed:
            gid = self._before[1]
            os.setresgid(gid, gid, -1)
            os.setresuid(uid, uid, -1)

    def __exit__(self, *exc: object) -> None:
        if self._changed:
            real, gid, saved = self._before
            os.setresuid(0, os.geteuid(), 0)
            os.setresgid(real, gid, saved)


def _groups(uid: int) -> tuple[int, list[int]]:
    """(gid, groups) of a user; a group of nobody's for a uid without an entry in passwd(5)."""
    try:
        found = pwd.getpwuid(uid)
    except KeyError:
        return 65534, []
    return found.pw_gid, os.getgrouplist(found.pw_name, found.pw_gid)


def _has_capabilities() -> bool:
    said = (line for line in proc.lines("self", "status") if line.startswith("CapEff:"))
    return next((int(line[7:], 16) != 0 for line in said), True)  # True: nobody can tell

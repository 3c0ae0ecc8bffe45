"""Find or build the object for LD_PRELOAD.

The object is code, and runs as the user of the service: a file is used only when nobody else could
have written the file or the directory. The name has a digest of the source, so that a newer cprd
builds anew.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from cprd.errors import CprdError

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = os.path.dirname(os.path.abspath(__file__))
SOURCE = os.path.join(HERE, "bind.c")
PATIENCE = 60.0  # seconds for the compiler
_OPTIONS = ("-O2", "-fPIC", "-shared", "-Wl,-z,relro,-z,now")


def find_or_build() -> str:
    """The path of an object. Raises CprdError where there is none and none can be built."""
    name = _file_name()
    found = os.path.join(HERE, name)
    if _is_safe(found):
        return found
    places = list(_caches())
    for place in places:
        found = os.path.join(place, name)
        if _is_safe(found, private=True) and _is_own(place):
            return found
    why = "no directory to build in: set XDG_CACHE_HOME or CACHE_DIRECTORY, or build it once for"
    why += " all (as root: python -m cprd.bind)"
    for place in places:
        try:
            os.makedirs(place, mode=0o700, exist_ok=True)
        except OSError as error:
            why = f"{place}: {error.strerror}"
            continue
        if not _is_own(place):
            why = f"{place} can be written or replaced by others"
            continue
        return build(place, mode=0o700)
    raise CprdError(f"--bind needs an object for LD_PRELOAD, and there is none: {why}")


def build(place: str, *, mode: int) -> str:
    """Build the object in `place`; returns the path. Raises CprdError with the compiler's words."""
    import shutil
    import subprocess
    import tempfile

    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), "")
    if not compiler:
        raise CprdError(
            "--bind needs an object for LD_PRELOAD, and there is no C compiler to build it:"
            " install one (apt-get install gcc libc6-dev), or copy what `python -m cprd.bind` made"
            f" on a machine like this one to {HERE}"
        )
    path = os.path.join(place, _file_name())
    made = ""
    try:
        handle, made = tempfile.mkstemp(prefix=".bind.", suffix=".so", dir=place)
        os.close(handle)
        command = [*compiler.split(), *_OPTIONS, "-o", made, SOURCE, "-ldl"]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=PATIENCE,
            check=False,
        )
        if done.returncode:
            raise CprdError(f"{command[0]} cannot build {SOURCE}: {done.stderr.strip()[:500]}")
        os.chmod(made, mode)
        os.replace(made, path)
        made = ""
    except OSError as error:
        raise CprdError(f"cannot build in {place}: {error.strerror or error}") from None
    except subprocess.TimeoutExpired:
        raise CprdError(f"{command[0]} did not build {SOURCE} within {PATIENCE:g} s") from None
    finally:
        if made:
            os.unlink(made)
    return path


def _file_name() -> str:
    import hashlib

    with open(SOURCE, "rb") as file:
        digest = hashlib.sha256(file.read() + " ".join(_OPTIONS).encode()).hexdigest()
    return f"bind-{os.uname().machine}-{digest[:16]}.so"


def _caches() -> Iterator[str]:
    """Directories of the user, best first."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    systemd = os.environ.get("CACHE_DIRECTORY", "").partition(":")[0]
    for place in (systemd, home, os.environ.get("XDG_RUNTIME_DIR", "")):
        if os.path.isabs(place):
            yield os.path.join(place, "cprd")


def _is_own(path: str) -> bool:
    """Whether the user alone can write in `path`, and nobody but the user or root can put another
    directory in place of `path`."""
    found = os.lstat(path)
    if found.st_uid != os.geteuid() or found.st_mode & 0o022 or stat.S_ISLNK(found.st_mode):
        return False
    above = os.path.realpath(path)
    while above != "/":
        above = os.path.dirname(above)
        found = os.stat(above)
        sticky = found.st_mode & stat.S_ISVTX  # as /tmp: others rename only what is theirs
        if found.st_uid not in (0, os.geteuid()) or (found.st_mode & 0o022 and not sticky):
            return False
    return True


def _is_safe(path: str, *, private: bool = False) -> bool:
    """Whether the file `path` may be loaded: a regular file, writable by the user or (unless
    `private`) by root alone, as is the directory."""
    for each in (path, os.path.dirname(path)):
        try:
            found = os.lstat(each)
        except OSError:
            return False
        owners = {os.geteuid()} if private else {os.geteuid(), 0}
        if found.st_uid not in owners or found.st_mode & 0o022:
            return False
    return stat.S_ISREG(os.lstat(path).st_mode)

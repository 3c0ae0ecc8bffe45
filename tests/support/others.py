"""cprd and a Python for other uids, who often may not enter the directories in which the checkout,
its packages and the Python of the tests lie (a home directory, mostly)."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from tests.support.checkout import CHECKOUT

UID = 1000
USER = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--inh-caps=-all", "env"]
"""(env: setpriv itself executes what it is given with root's rights to find it.)"""

VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
NEEDED = "import cprd.daemon.command, cprd.daemon.server, cprd.cli, msgpack, trio, rich"


@functools.cache
def python_and_path() -> tuple[str, str]:
    """A Python that UID may run, and the PYTHONPATH with which it finds cprd. Needs root. Where
    UID cannot reach them as they lie, a copy (of links, where that can be) until the run ends."""
    purelib = sysconfig.get_path("purelib")
    path = f"{CHECKOUT}:{purelib}"
    copy = None
    if not _readable(path):
        copy = _place()
        _copy(CHECKOUT / "cprd", copy / "checkout/cprd")
        _copy(Path(purelib), copy / "site")
        path = f"{copy}/checkout:{copy}/site"
    for found in (sys.executable, f"/usr/bin/{VERSION}"):
        if _works(found, path):
            return found, path
    return str(_copied_python(copy or _place())), path


def _readable(path: str) -> bool:
    words = [*USER, "sh", "-c", 'for each; do test -r "$each" || exit 1; done', "sh"]
    wanted = [CHECKOUT / "cprd/__init__.py", *map(Path, path.split(":")[1:])]
    return subprocess.run([*words, *map(str, wanted)], check=False).returncode == 0


def _works(python: str, path: str) -> bool:
    words = [*USER, f"PYTHONPATH={path}", python, "-c", NEEDED]
    return subprocess.run(words, capture_output=True, check=False, cwd="/").returncode == 0


def _place() -> Path:
    place = Path(tempfile.mkdtemp(prefix="cprd-others."))
    place.chmod(0o755)
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


def _copy(source: Path, target: Path, *without: str) -> None:
    ignore = shutil.ignore_patterns(*without)
    try:
        shutil.copytree(source, target, symlinks=True, ignore=ignore, copy_function=os.link)
    except shutil.Error:  # another file system
        shutil.rmtree(target)
        shutil.copytree(source, target, symlinks=True, ignore=ignore)


def _copied_python(place: Path) -> Path:
    """A command that runs a copy of this Python."""
    base = Path(sys.base_prefix)
    _copy(base / "lib" / VERSION, place / "python/lib" / VERSION, "test", "site-packages")
    (place / "python/bin").mkdir()
    for library in (base / "lib").glob("libpython*.so*"):
        shutil.copy2(library, place / "python/lib")
    shutil.copy2(base / "bin" / VERSION, place / "python/bin")
    command = place / "python/run"
    command.write_text(
        f'#!/bin/sh\nLD_LIBRARY_PATH={place}/python/lib exec {place}/python/bin/{VERSION} "$@"\n'
    )
    command.chmod(0o755)
    return command

"""Questions to systemd about the unit of the process."""

from __future__ import annotations

import os
import subprocess

from cprd.linux import proc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

PATIENCE = 0.5  # s: the daemon ends meanwhile
KEEPS = {"yes": True, "on-success": True, "restart": False, "no": False}


def store_outlives_stop(environ: Mapping[str, str]) -> bool | None:
    """Whether the unit's descriptor store outlives `systemctl stop`; None when systemd does not
    say. Before 254 no store does ($FDSTORE is since then); later FileDescriptorStorePreserve= of
    the unit decides. Blocks for at most half a second."""
    if "FDSTORE" not in environ:
        return False
    unit = _unit()
    if not unit:
        return None
    command = ["systemctl", "show", "--value", "--property=FileDescriptorStorePreserve", unit]
    try:
        said = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=PATIENCE,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return KEEPS.get(said.stdout.decode(errors="replace").strip())


def _unit() -> str:
    """The service's name, an empty string outside of a service: the last part of the cgroup."""
    paths = [line[3:] for line in proc.lines("self", "cgroup") if line.startswith("0::")]
    name = os.path.basename(paths[0]) if paths else ""
    return name if name.endswith(".service") else ""

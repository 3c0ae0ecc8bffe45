"""cprd in a real container by podman: PID 1 by --keep, its socket on a volume, others come and go.

The containers have this machine's own files, changes kept apart (--rootfs /:O): no image is pulled.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import cprd
from tests.keep.keeping import children
from tests.support.checkout import CHECKOUT
from tests.support.patience import until

from .test_namespaces import LOAD, SAVE

pytestmark = pytest.mark.full

# crun refuses cgroups v1 and v2 side by side; a view of v2 alone, which is not used, will do.
HOLD = """
mount --make-rprivate / &&
case $(stat -f -c %T /sys/fs/cgroup) in
    cgroup2fs) ;;
    *) umount -R /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup ;;
esac && echo held && exec cat
"""
PRELUDE = "import os\nimport cprd\ndef say(*words): print(*words, flush=True)\n"


class Podman:
    """podman(1) in a mount namespace of its own, with a store of its own under `place`."""

    def __init__(self, place: Path) -> None:
        self.holder = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", HOLD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.holder.stdout is not None
        assert self.holder.stdout.readline() == "held\n"
        self.place = place

    def attempt(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        line = ["nsenter", f"--target={self.holder.pid}", "--mount", "podman"]
        line += [f"--root={self.place}/root", f"--runroot={self.place}/run"]
        line += ["--cgroup-manager=cgroupfs", "--events-backend=none", *arguments]
        return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)

    def __call__(self, *arguments: str) -> str:
        said = self.attempt(*arguments)
        assert said.returncode == 0, said.stderr
        return said.stdout.strip()

    def run(self, volume: Path, *arguments: str, command: list[str]) -> str:
        own = ["--network=none", "--cgroups=disabled", f"--volume={volume}:/run/cprd"]
        own += ["--ulimit=nofile=4096:4096", "--ulimit=nproc=4096:4096", "--log-driver=k8s-file"]
        own += [f"--env=PYTHONPATH={CHECKOUT}"]
        return self("run", *own, *arguments, "--rootfs", "/:O", *command)

    def logs(self, container: str) -> str:
        said = self.attempt("logs", container)
        return said.stdout + said.stderr

    def close(self) -> None:
        self.attempt("rm", "--all", "--force", "--time=0")
        self.holder.communicate()


@pytest.fixture
def podman() -> Iterator[Podman]:
    if os.geteuid() != 0 or shutil.which("podman") is None:
        pytest.skip("podman is missing: as root, apt-get install podman crun")
    # podman wants its paths short.
    place = Path(tempfile.mkdtemp(prefix="cprd-podman.", dir="/tmp"))
    made = Podman(place)
    try:
        said = made.attempt(
            *("run", "--rm", "--network=none", "--cgroups=disabled", "--ulimit=nofile=4096:4096"),
            *("--ulimit=nproc=4096:4096", "--rootfs", "/:O", "true"),
        )
        if said.returncode:
            pytest.skip(f"podman does not work here: {said.stderr.strip()}")
        yield made
    finally:
        made.close()
        shutil.rmtree(place)


def test_a_sidecar_hands_over_between_containers_and_survives_kill_9(
    podman: Podman, tmp_path: Path
) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    sidecar = podman.run(
        volume, "--detach", command=[sys.executable, "-m", "cprd.daemon.command", "--keep"]
    )  # as root: /run/cprd/cprd.sock
    path = str(volume / "cprd.sock")
    until(lambda: os.path.exists(path), lambda: podman.logs(sidecar))
    until(lambda: "ready pid=" in podman.logs(sidecar), lambda: podman.logs(sidecar))
    init = int(podman("inspect", "--format={{.State.Pid}}", sidecar))
    for round_ in range(3):
        said = podman.run(volume, "--rm", command=[sys.executable, "-c", PRELUDE + SAVE])
        assert said == "0 True 1"
        (before,) = children(init)
        os.kill(before, signal.SIGKILL)
        said = podman.run(volume, "--rm", command=[sys.executable, "-c", PRELUDE + LOAD])
        assert said == "41 whole"
        assert before not in children(init), f"round {round_}: a zombie"
    with cprd.connect(path) as daemon:  # and from the host, by the volume
        assert daemon.status()["kept"] == "store"
        assert daemon.list() == []
    started = time.monotonic()
    podman("stop", "--time=10", sidecar)
    assert time.monotonic() - started < 4  # podman's own share is about 1 s
    assert podman("inspect", "--format={{.State.ExitCode}}", sidecar) == "0"
    assert "keep-ended status=0" in podman.logs(sidecar)
    assert os.listdir(volume) == []

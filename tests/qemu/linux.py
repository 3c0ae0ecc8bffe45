"""A small Linux guest from Debian's own packages: kernel, virtio modules, busybox.

The boot-sector guest knows the BIOS and nothing else. This one uses its devices as an operating
system does, two CPUs, interrupts, rings in its memory and fsync, and says on the first serial port
what came of it, a line a round:

    T 17 cpus=2 disk=ok net=ok port=ok memory=ok
"""

from __future__ import annotations

import lzma
import shutil
import subprocess
from pathlib import Path

# What the kernel has built in, or does not have, is left out.
MODULES = [
    *("virtio", "virtio_ring", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci"),
    *("virtio_blk", "failover", "net_failover", "virtio_net", "virtio_console"),
    *("crc16", "crc32c_generic", "libcrc32c", "mbcache", "jbd2", "ext4"),
]

FIRST_SECTOR = 16
SECTORS = 2000
"""Round n writes its number, as text, to sector FIRST_SECTOR + n % SECTORS, and fsyncs it."""

_INIT = f"""#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for pass in 1 2 3; do # which needs which differs between kernels
    for module in /modules/*; do insmod $module 2> /dev/null; done
done
mkdir /disk
[ ! -b /dev/vdb ] || mount -t ext4 /dev/vdb /disk || echo "F MOUNT FAILED"
agent=$(grep -l org.qemu.guest_agent /sys/class/virtio-ports/*/name 2> /dev/null | head -n 1)
if [ "$agent" ] && [ -x /bin/qemu-ga ]; then
    mkdir -p /sbin /run && ln -s /bin/busybox /sbin/hwclock
    qemu-ga -m virtio-serial -p /dev/$(basename $(dirname $agent)) -t /run &
fi
ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up
mkdir /big
mount -t tmpfs -o size=32m tmpfs /big
dd if=/dev/urandom of=/big/random bs=1M count=16 2> /dev/null
sum=$(md5sum < /big/random)
until port=$(ls /dev/vport*p1 2> /dev/null) && [ -b /dev/vda ] &&
    ping -c 1 -W 5 10.0.2.2 > /dev/null 2>&1; do usleep 100000; done
n=0
while true; do
    n=$((n + 1))
    [ $n != "$sleep_at" ] || echo mem > /sys/power/state
    disk=FAILED net=FAILED port_=FAILED memory=FAILED
    printf '%-512s' $n | dd of=/dev/vda bs=512 seek=$(({FIRST_SECTOR} + n % {SECTORS})) \\
        conv=notrunc,fsync 2> /dev/null && disk=ok
    ping -c 1 -W 5 10.0.2.2 > /dev/null && net=ok
    echo "P $n" > $port && port_=ok
    [ ! -d /disk/lost+found ] || {{ echo $n > /disk/n$((n % 50)) && sync && echo "F $n"; }}
    [ $((n % 8)) != 0 ] || memory=$(md5sum < /big/random)
    [ $((n % 8)) = 0 ] || memory=$sum
    [ "$memory" = "$sum" ] && memory=ok
    [ ! "$agent" ] || ! pidof qemu-ga > /dev/null || echo "C $(date +%s)"
    echo "T $n cpus=$(nproc) disk=$disk net=$net port=$port_ memory=$memory"
done
"""


class Missing(Exception):
    """The packages cannot be had here; the message says why."""


class Linux:
    """Where the kernel and the initramfs lie."""

    def __init__(self, kernel: Path, initramfs: Path) -> None:
        self.kernel = kernel
        self.initramfs = initramfs

    def arguments(self, sleep_at: int = 0) -> list[str]:
        """For QEMU: direct boot, quiet, and an end (not a loop) where the guest panics. The guest
        puts itself to sleep (S3) before round `sleep_at`."""
        return [
            *("-kernel", str(self.kernel), "-initrd", str(self.initramfs), "-no-reboot"),
            *("-append", f"console=ttyS0 quiet panic=-1 no_timer_check sleep_at={sleep_at}"),
        ]


def fetch(place: Path) -> Linux:
    """Download by apt, unpack into `place` (nothing is installed), and pack. Raises Missing."""
    for tool in ("apt-get", "apt-cache", "dpkg"):
        if shutil.which(tool) is None:
            raise Missing(f"no {tool} here")
    tree = place / "tree"
    for package in (_depends("linux-image-cloud-amd64"), "busybox-static"):
        _run("apt-get", "download", package, where=place)
    for archive in sorted(place.glob("*.deb")):
        _run("dpkg", "-x", str(archive), str(tree), where=place)
    kernels = sorted(tree.glob("boot/vmlinuz-*"))
    if not kernels:
        raise Missing("there is no kernel in the package")
    files = {"init": _INIT.encode(), "bin/busybox": next(tree.glob("**/bin/busybox")).read_bytes()}
    for name in MODULES:
        for found in tree.glob(f"**/{name}.ko*"):
            data = found.read_bytes()
            files[f"modules/{name}.ko"] = lzma.decompress(data) if found.suffix == ".xz" else data
    files |= _agent(place)
    initramfs = place / "initramfs"
    initramfs.write_bytes(_newc(files))
    return Linux(kernels[-1], initramfs)


def _agent(place: Path) -> dict[str, bytes]:
    """The guest agent with its libraries; nothing where they cannot be had."""
    tree = place / "agent"
    try:
        (place / "ga").mkdir()
        _run("apt-get", "download", "qemu-guest-agent", where=place / "ga")
        _run("dpkg", "-x", str(next((place / "ga").glob("*.deb"))), str(tree), where=place)
        program = next(tree.glob("**/qemu-ga"))
        said = _run("ldd", str(program))
    except (Missing, StopIteration):
        return {}
    libraries = [word for line in said.splitlines() for word in line.split() if word[0] == "/"]
    files = {path.lstrip("/"): Path(path).read_bytes() for path in libraries}
    return {"bin/qemu-ga": program.read_bytes(), **files}


def _depends(package: str) -> str:
    """What a metapackage stands for at the moment."""
    said = _run("apt-cache", "depends", "--important", package)
    found = [line.split()[-1] for line in said.splitlines() if line.strip().startswith("Depends:")]
    if not found:
        raise Missing(f"apt knows no {package}: apt-get update")
    return found[0]


def _run(*words: str, where: Path | None = None) -> str:
    done = subprocess.run(
        words, cwd=where, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Missing(f"{' '.join(words)}: {done.stderr.strip()[-500:]}")
    return done.stdout


def _newc(files: dict[str, bytes]) -> bytes:
    """A cpio archive as the kernel unpacks it (Documentation/driver-api/early-userspace)."""
    places = ["bin", "modules", "proc", "sys", "dev"]
    rows = [(name, 0o040755, b"") for name in places]
    deeper = {str(parent) for name in files for parent in Path(name).parents}
    rows += [(name, 0o040755, b"") for name in sorted(deeper - {".", *places})]
    rows += [(name, 0o100755, data) for name, data in files.items()]
    out = bytearray()
    for number, (name, mode, data) in enumerate([*rows, ("TRAILER!!!", 0, b"")], 1):
        raw = name.encode() + b"\0"
        fields = [number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(raw), 0]
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + raw
        out += bytes(-len(out) % 4)
        out += data
        out += bytes(-len(out) % 4)
    return bytes(out)

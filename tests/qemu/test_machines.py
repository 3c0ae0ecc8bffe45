"""A matrix of device configurations: cold, check, save, start, save, start, upgrade. What `check`
promises, every later step keeps; what `check` refuses is left alone. `tests/run --machines` runs
the matrix."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.qemu.conftest import MakeMachine
from tests.qemu.machine import Machine
from tests.qemu.test_same_machine import starts

pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]

RAW = "-drive file={place}/b.raw,format=raw,if=none,id=b"
QCOW = "-drive file={place}/b.qcow2,format=qcow2,if=none,id=b"
CHAIN = "-drive file={place}/top.qcow2,format=qcow2,if=none,id=b"
NODE = (
    '-blockdev {{"driver":"qcow2","node-name":"b",'
    '"file":{{"driver":"file","filename":"{place}/b.qcow2"}}}}'
)
CD = "-drive file={place}/a.iso,media=cdrom,readonly=on,if=none,id=b"
NET = "-netdev user,id=n"
ROOT = "-device pcie-root-port,id=rp,chassis=1"

Q35 = {
    "plain": "",
    "smp": "-smp 2",
    "smp-topology": "-smp 4,sockets=2,cores=2,maxcpus=8",
    "cpu-max": "-cpu max",
    "cpu-flags": "-cpu qemu64,+ssse3,-sse2",
    "cpu-model": "-cpu Nehalem-v1",
    "memory-slots": "-m 128M,slots=4,maxmem=1G",
    "dimm": "-m 128M,slots=2,maxmem=1G -object memory-backend-memfd,id=m1,size=64M,share=on"
    " -device pc-dimm,id=dimm1,memdev=m1",
    "virtio-mem": "-m 128M,maxmem=1G -object memory-backend-memfd,id=m1,size=64M,share=on"
    " -device virtio-mem-pci,id=vm1,memdev=m1,requested-size=0",
    "uuid": "-uuid a1b2c3d4-0000-4000-8000-0123456789ab",
    "smbios": "-smbios type=1,manufacturer=a,serial=b",
    "vmgenid": "-device vmgenid,guid=324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87",
    "vmgenid-auto": "-device vmgenid,guid=auto",
    "rtc": "-rtc base=localtime,clock=vm",
    "no-hpet": "-global hpet.msi=on",
    "vga": "-device VGA",
    "vga-std": "-vga std",
    "cirrus": "-device cirrus-vga",
    "bochs": "-device bochs-display",
    "virtio-vga": "-device virtio-vga",
    "virtio-gpu": "-device virtio-gpu-pci",
    "ramfb": "-device ramfb",
    "vmware-svga": "-device vmware-svga",
    "blk-raw": RAW + " -device virtio-blk-pci,drive=b",
    "blk-qcow2": QCOW + " -device virtio-blk-pci,drive=b,serial=x",
    "blk-chain": CHAIN + " -device virtio-blk-pci,drive=b",
    "blk-node": NODE + " -device virtio-blk-pci,drive=b,id=disk1",
    "blk-throttled": RAW + ",throttling.iops-total=100 -device virtio-blk-pci,drive=b",
    "blk-group": "-object throttle-group,id=tg,x-iops-total=50 -drive driver=throttle,"
    "throttle-group=tg,file.driver=file,file.filename={place}/b.raw,if=none,id=b"
    " -device virtio-blk-pci,drive=b",
    "blk-iothread": "-object iothread,id=io1 "
    + RAW
    + " -device virtio-blk-pci,drive=b,iothread=io1",
    "blk-direct": RAW + ",cache=none,aio=native -device virtio-blk-pci,drive=b",
    "blk-readonly": RAW + ",readonly=on -device virtio-blk-pci,drive=b",
    "blk-unlocked": RAW + ",file.locking=off -device virtio-blk-pci,drive=b",
    "blk-null": "-drive driver=null-co,size=1M,if=none,id=b -device virtio-blk-pci,drive=b",
    "blk-if": "-drive file={place}/b.raw,format=raw,if=virtio",
    "blk-data-file": "-drive file={place}/data.qcow2,format=qcow2,if=none,id=b"
    " -device virtio-blk-pci,drive=b",
    "scsi-disk": "-device virtio-scsi-pci,id=s "
    + RAW
    + " -device scsi-hd,drive=b,bus=s.0,wwn=0x5000",
    "scsi-cd": "-device virtio-scsi-pci,id=s " + CD + " -device scsi-cd,drive=b,bus=s.0",
    "lsi": "-device lsi53c895a,id=s " + RAW + " -device scsi-hd,drive=b,bus=s.0",
    "megasas": "-device megasas,id=s " + RAW + " -device scsi-hd,drive=b,bus=s.0",
    "mptsas": "-device mptsas1068,id=s " + RAW + " -device scsi-hd,drive=b,bus=s.0",
    "pvscsi": "-device pvscsi,id=s " + RAW + " -device scsi-hd,drive=b,bus=s.0",
    "ide-disk": RAW + " -device ide-hd,drive=b,bus=ide.1",
    "ide-cd": CD + " -device ide-cd,drive=b",
    "ide-cd-empty": "-drive if=none,id=b,media=cdrom -device ide-cd,drive=b",
    "cdrom": "-cdrom {place}/a.iso",
    "hdb": "-drive file={place}/b.raw,format=raw,index=3,media=disk",
    "usb-storage": "-device qemu-xhci " + RAW + " -device usb-storage,drive=b",
    "nvme": RAW + " -device nvme,drive=b,serial=x",
    "sdhci": "-device sdhci-pci " + RAW + " -device sd-card,drive=b",
    "net": NET + " -device virtio-net-pci,netdev=n,mac=52:54:00:12:34:56",
    "net-default-mac": NET + " -device virtio-net-pci,netdev=n",
    "net-nic": "-nic user,model=virtio-net-pci",
    "net-two": NET + " -device virtio-net-pci,netdev=n -netdev user,id=n2 -device e1000,netdev=n2",
    "e1000": NET + " -device e1000,netdev=n",
    "e1000e": NET + " -device e1000e,netdev=n",
    "rtl8139": NET + " -device rtl8139,netdev=n",
    "vmxnet3": NET + " -device vmxnet3,netdev=n",
    "igb": NET + " -device igb,netdev=n",
    "hubport": "-netdev hubport,id=n,hubid=0 -device virtio-net-pci,netdev=n",
    "xhci": "-device qemu-xhci,id=x -device usb-tablet,bus=x.0 -device usb-kbd,bus=x.0,port=4",
    "ehci": "-device usb-ehci,id=x -device usb-mouse,bus=x.0",
    "uhci": "-usb -device usb-tablet",
    "usb-hub": "-device qemu-xhci,id=x -device usb-hub,bus=x.0 -device usb-kbd,bus=x.0,port=1.1",
    "serial-pci": "-device pci-serial,chardev=c -chardev null,id=c",
    "serial-two": "-serial null",
    "virtio-serial": "-device virtio-serial-pci -chardev null,id=c"
    " -device virtserialport,chardev=c,name=org.qemu.guest_agent.0",
    "virtio-console": "-device virtio-serial-pci -chardev null,id=c -device virtconsole,chardev=c",
    "chardev-listening": "-device virtio-serial-pci"
    " -chardev socket,id=c,path={place}/c.sock,server=on,wait=off"
    " -device virtserialport,chardev=c,name=a",
    "monitor-too": "-monitor unix:{place}/hmp,server=on,wait=off",
    "rng": "-object rng-random,id=r,filename=/dev/urandom -device virtio-rng-pci,rng=r",
    "rng-builtin": "-device virtio-rng-pci",
    "balloon": "-device virtio-balloon-pci",
    "virtio-input": "-device virtio-keyboard-pci -device virtio-tablet-pci",
    "virtio-crypto": "-object cryptodev-backend-builtin,id=cr"
    " -device virtio-crypto-pci,cryptodev=cr",
    "virtio-pmem": "-m 128M,maxmem=1G -object memory-backend-memfd,id=m1,size=16M,share=on"
    " -device virtio-pmem-pci,memdev=m1,id=p1",
    "iommu": "-device intel-iommu",
    "virtio-iommu": "-device virtio-iommu-pci",
    "root-port": ROOT + " " + NET + " -device virtio-net-pci,netdev=n,bus=rp",
    "pci-bridge": "-device pci-bridge,id=br,chassis_nr=1 "
    + RAW
    + " -device virtio-blk-pci,drive=b,bus=br,addr=1",
    "pxb": "-device pxb-pcie,id=pxb,bus_nr=64 -device pcie-root-port,id=rp,bus=pxb,chassis=2",
    "switch": ROOT + " -device x3130-upstream,id=up,bus=rp"
    " -device xio3130-downstream,id=down,bus=up,chassis=9",
    "hda": "-audiodev none,id=a -device intel-hda -device hda-duplex,audiodev=a",
    "ac97": "-audiodev none,id=a -device AC97,audiodev=a",
    "virtio-sound": "-audiodev none,id=a -device virtio-sound-pci,audiodev=a",
    "watchdog": "-device i6300esb",
    "itco": "-watchdog-action none -global ICH9-LPC.noreboot=false",
    "pvpanic": "-device pvpanic",
    "pvpanic-pci": "-device pvpanic-pci",
    "edu": "-device edu",
    "ipmi": "-device ipmi-bmc-sim,id=bmc -device isa-ipmi-kcs,bmc=bmc",
    "isa-debug": "-device isa-debug-exit",
    "debugcon": "-debugcon null",
    "fw-cfg": "-fw_cfg name=opt/a,string=b",
    "pcspk": "-audiodev none,id=a -machine pcspk-audiodev=a",
    "global-migration": "-global migration.x-multifd=on",
    "no-shutdown": "-no-shutdown -no-reboot",
    "boot-order": "-boot order=c,menu=off",
    "ivshmem": "-object memory-backend-memfd,id=m1,size=1M,share=on"
    " -device ivshmem-plain,memdev=m1",
    "nested-name": "-name web,debug-threads=on",
}
PC = [
    *("plain", "smp", "cpu-max", "dimm", "vga", "cirrus", "blk-qcow2", "blk-chain", "blk-node"),
    *("scsi-disk", "lsi", "cdrom", "ide-cd-empty", "net", "e1000", "rtl8139", "xhci", "uhci"),
    *("virtio-serial", "rng", "balloon", "ac97", "watchdog", "pvpanic"),
]
ROWS = [("q35", name) for name in Q35] + [("pc", name) for name in PC]


def images(place: Path) -> None:
    (place / "b.raw").write_bytes(bytes(4 << 20))
    (place / "a.iso").write_bytes(bytes(1 << 20))
    for words in (
        "-f qcow2 b.qcow2 4M",
        "-f qcow2 -F qcow2 -b b.qcow2 top.qcow2",
        f"-f qcow2 -o data_file={place}/data.raw data.qcow2 4M",
    ):
        subprocess.run(["qemu-img", "create", "-q", *words.split()], cwd=place, check=True)


def refused_cold(vm: Machine, words: list[str]) -> str:
    """QEMU's words when it does not even start so; an empty string when it does."""
    probe = [*words, "-S", "-qmp", f"unix:{vm.place}/probe,server=on,wait=off"]
    process = subprocess.Popen(
        probe, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        vm.until(lambda: process.poll() is not None or (vm.place / "probe").exists(), "QEMU begins")
        _, said = process.communicate(timeout=0.5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return ""
    return said.decode(errors="replace")


@pytest.mark.parametrize(("machine", "name"), ROWS)
def test_what_check_promises_is_kept(make_machine: MakeMachine, machine: str, name: str) -> None:
    vm = make_machine(machine=machine)
    images(vm.place)
    vm.command += [word.format(place=vm.place) for word in Q35[name].split(" ") if word]
    said = refused_cold(vm, vm.command)
    if said:
        pytest.skip(f"this QEMU does not start so: {said.strip()[-200:]}")
    vm.log.unlink(missing_ok=True)
    vm.start()
    vm.goes_on(5)
    checked = vm.cprctl("qemu", "check", "--qmp", vm.qmp)
    print(machine, name, "check:", checked.returncode, checked.stdout.strip())
    if checked.returncode:
        assert "no: " in checked.stdout
        vm.goes_on(3)
        return
    for _ in range(2):
        saved = vm.save()
        assert saved.returncode == 0, saved.stderr
        starts(vm, vm.command)
    upgraded = vm.upgrade(vm.qmp, vm.command)
    if "not by upgrade" in checked.stdout:
        assert upgraded.returncode == 1
    else:
        assert upgraded.returncode == 0, upgraded.stderr
    vm.goes_on(5)

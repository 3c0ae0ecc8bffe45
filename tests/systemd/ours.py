"""What we ship for systemd, installed in a booted machine as a package would do it."""

from __future__ import annotations

import re

from tests.support.checkout import CHECKOUT

from .machine import Machine

UNITS = CHECKOUT / "systemd"
SERVED = ["cprd.socket", "cprd.service", "vm@.service", "chat@.service"]


def install(machine: Machine) -> None:
    """As a package would: units, enabled; users, directories. Nothing is started."""
    for name in SERVED:
        machine.unit(name, reload=False)
    for target, name in (("sockets", "cprd.socket"), ("multi-user", "cprd.service")):
        wants = machine.units / f"{target}.target.wants"  # what `systemctl enable` makes
        wants.mkdir(exist_ok=True)
        (wants / name).symlink_to(f"../{name}")
    (machine.root / "etc/cprd/vm").mkdir(parents=True)
    (machine.root / "etc/cprd/vm/test.conf").write_text("QEMU_ARGS=-m 1G\n")
    users = (UNITS / "cprd.sysusers").read_text()
    with_examples = machine.root / "run/boot/sysusers.conf"
    with_examples.write_text(re.sub(r"^#(?=[um] )", "", users, flags=re.MULTILINE))
    machine.run("systemd-sysusers", "/run/boot/sysusers.conf")
    machine.run("systemd-tmpfiles", "--create", UNITS / "cprd.tmpfiles")
    machine.systemctl("daemon-reload")
